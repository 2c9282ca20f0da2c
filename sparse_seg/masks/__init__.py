"""Mask policies: which blocks are worth full resolution."""

from sparse_seg.masks.base import BLOCK, MaskPolicy, block_shape, top_blocks
from sparse_seg.masks.confidence import REDUCTIONS, UNCERTAINTIES, ConfidencePolicy
from sparse_seg.masks.edge import RULES, EdgePolicy, cad_edges, gradient_magnitude
from sparse_seg.masks.oracle import OraclePolicy
from sparse_seg.masks.random import RandomPolicy
from sparse_seg.masks.uniform import UniformPolicy

POLICIES: dict[str, type[MaskPolicy]] = {
    "uniform": UniformPolicy,
    "random": RandomPolicy,
    "edge": EdgePolicy,
    "confidence": ConfidencePolicy,
    "oracle": OraclePolicy,
}

__all__ = [
    "BLOCK",
    "POLICIES",
    "REDUCTIONS",
    "RULES",
    "UNCERTAINTIES",
    "ConfidencePolicy",
    "EdgePolicy",
    "MaskPolicy",
    "OraclePolicy",
    "RandomPolicy",
    "UniformPolicy",
    "block_shape",
    "cad_edges",
    "gradient_magnitude",
    "top_blocks",
]
