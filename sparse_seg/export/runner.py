"""Where a command's passes run: PyTorch, another runtime, or what pays by a rule."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from sparse_seg.errors import SparseSegError
from sparse_seg.export.runtime import RUNTIMES
from sparse_seg.export.segmentor import RuntimeRun, RuntimeSegmentor, in_runtime
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.passes import Pass
from sparse_seg.run.way import Way

TORCH, AUTO = "torch", "auto"
CHOICES = (AUTO, TORCH, *RUNTIMES)
PATIENCE = 10  # runs at a size that are left to PyTorch: a graph takes some seconds to make
SIZES = 4  # that get graphs
PIXELS = 2**21  # of the largest images that get one: a runtime keeps all memory that it ever needed


class Runner:
    """Starts a model's passes in one runtime; what it starts has `follow`, `classes`, `logits` and `mask`.

    `auto`: a size of images that has come `PATIENCE` times gets a graph in onnxruntime, the first `SIZES` of
    them up to `PIXELS`; all else runs in PyTorch, and so does what no graph can run.

    Args:
        model: in eval mode, on its device.
        asked: `auto`, `torch`, `onnxruntime` or `openvino`.
        way: that all passes will follow.
        logits: whether they will be asked for logits; may change from pass to pass.
        refusal: why `auto` is to stay with PyTorch, if it is.

    Raises:
        SparseSegError: what is asked for is not installed, or cannot run this way.
    """

    def __init__(
        self,
        model: SelectiveNetwork,
        asked: str,
        way: Way,
        logits: bool = False,
        refusal: str | None = None,
    ) -> None:
        self.way, self.logits, self.strides = way, logits, model.strides
        device = model.device.type
        self.torch = model.for_inference()
        self._auto = asked == AUTO
        self.policy = None if way.is_dense else model.policy_for(way)
        self._seen, self._counts = Counter[tuple[torch.Size, bool]](), Counter[str]()
        self._pays: dict[tuple[torch.Size, bool], bool] = {}  # whether what came often has a graph
        self._fast: RuntimeSegmentor | None = None
        self._refusal = (refusal or (None if device == "cpu" else f"on {device}")) if self._auto else None
        if asked == TORCH or self._refusal:
            return
        try:
            fast = in_runtime(model, RUNTIMES[0] if self._auto else asked)
            fast.check(way, self.policy)
            self._fast = fast
        except SparseSegError as error:
            if not self._auto:
                raise
            self._refusal = str(error)

    @property
    def seconds(self) -> float:
        """Spent on making graphs."""
        return self._fast.seconds if self._fast else 0.0

    @property
    def runs(self) -> dict[str, int]:
        """How many passes each runtime had."""
        return dict(self._counts)

    def start(self, images: Tensor, labels: Tensor | None = None) -> Pass | RuntimeRun:
        """Start a pass over normalised images `[B, 3, H, W]`; nothing is computed yet.

        Raises:
            ValueError: images of a wrong shape or dtype.
        """
        if self._fast is not None and (not self._auto or self._has_graph(images)):
            self._counts[self._fast.runtime] += 1
            return self._fast.start(images, labels)
        self._counts[TORCH] += 1
        return self.torch.start(images, labels)

    def report(self) -> str:
        """One line: what ran where, and why not elsewhere."""
        name = self._fast.runtime if self._fast else ""
        fast, slow, reason = self._counts[name], self._counts[TORCH], self._refusal
        if fast and not slow:
            return f"runtime: {name}"
        if fast:
            text = f"runtime: {name} for {fast} of {fast + slow} runs, {TORCH} for the others"
        else:
            text = f"runtime: {TORCH}"
            if name and not reason:
                reason = f"a size gets a graph in {name} when it has come {PATIENCE} times"
        return text + (f" ({reason})" if reason else "")

    def _has_graph(self, images: Tensor) -> bool:
        """Whether images of this size get a graph, which is made now if it is not there."""
        key = images.shape, self.logits
        self._seen[key] += 1
        if key in self._pays:
            return self._pays[key]
        if self._seen[key] <= PATIENCE or len(self._pays) == SIZES or images[0, 0].numel() > PIXELS:
            return False
        assert self._fast is not None
        try:
            self._fast.start(images).follow(self.way, self.policy).prepare(self.logits)
            self._pays[key] = True
        except Exception as error:  # whatever exporter or runtime raise: PyTorch can do it
            first = next(iter(str(error).splitlines()), type(error).__name__)
            self._refusal = first if len(first) <= 200 else f"{first[:197]}..."
            self._pays[key] = False
        return self._pays[key]
