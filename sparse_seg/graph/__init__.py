"""A network as a graph: captured from a module, its geometry, and which part can run on sites."""

from sparse_seg.graph.capture import capture, logits_of
from sparse_seg.graph.geometry import Geometry, NotSelective
from sparse_seg.graph.reading import CaptureFailed
from sparse_seg.graph.rewrite import fold_norms, fold_pads

__all__ = ["CaptureFailed", "Geometry", "NotSelective", "capture", "fold_norms", "fold_pads", "logits_of"]
