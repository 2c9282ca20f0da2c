"""A model's own interface for prediction, run as graphs of fixed sizes."""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_seg.errors import SparseSegError
from sparse_seg.export.options import ExportOptions, check_options
from sparse_seg.export.static import StaticNetwork
from sparse_seg.masks import MaskPolicy, block_levels, block_shape
from sparse_seg.run.images import check_images
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.predicting import Predicting
from sparse_seg.run.way import Way

_MAKING = threading.Lock()  # PyTorch's exporter keeps state outside the network: one graph at a time
GRAPHS = 8  # kept: each holds the weights
Session = Callable[..., dict[str, Tensor]]  # named inputs to outputs by name
SIZE_TO_CHECK = (512, 512)  # px; which options fit does not depend on it


class Elsewhere(Predicting):
    """A model whose passes may run in another runtime."""

    def __init__(self, model: SelectiveNetwork) -> None:
        self.model, self.strides = model, model.strides
        self._policies: dict[Way, MaskPolicy | None] = {}

    def __call__(self, images: Tensor, fine_blocks: Tensor | None = None) -> Tensor:
        return self.forward(images, fine_blocks)

    def policy_for(self, way: Way) -> MaskPolicy | None:
        """The policy of a way, the same object each time, since graphs are kept by it; None when dense."""
        if way not in self._policies:  # of threads that ask at once the first one wins
            self._policies.setdefault(way, None if way.is_dense else self.model.policy_for(way))
        return self._policies[way]


class RuntimeSegmentor(Elsewhere):
    """A network that runs as graphs. They are made when they are needed, one for each size and batch of
    images, way to run and number of given fine blocks, and the latest stay in memory. The first images of
    each new graph run in PyTorch, too: a SparseSegError says where the results differ.

    Args:
        model: whose weights they are; it must not change.
        most: how many graphs are kept in memory.

    Attributes:
        seconds: spent on making graphs, and on opening them, so far; made: how many were made.
        folder: where they are kept on disk, if they are.
    """

    runtime: str
    folder: Path | None = None
    dtype = torch.float32  # of the images

    def __init__(self, model: SelectiveNetwork, most: int | None = None) -> None:
        super().__init__(model)
        self.most, self.made, self.seconds = most or GRAPHS, 0, 0.0
        self._sessions: OrderedDict[ExportOptions, Session] = OrderedDict()
        self._lock = threading.Lock()  # of the dictionary: others run their graphs while one is made
        self._checked: set[tuple[Way, MaskPolicy | None]] = set()

    def start(self, images: Tensor, labels: Tensor | None = None) -> RuntimeRun:
        """Start a run over images `[B, 3, H, W]`; nothing is computed yet.

        Raises:
            ValueError: images of a wrong shape or dtype.
        """
        check_images(images)
        if images.dtype != self.dtype:
            raise ValueError(f"{self.runtime} takes {str(self.dtype)[6:]} images, not {images.dtype}")
        return RuntimeRun(self, images)

    def check(self, way: Way, policy: MaskPolicy | None = None) -> None:
        """Raises a SparseSegError, of one line, for a way that no graph can run."""
        if (way, policy) in self._checked:
            return
        if policy is not None and not policy.reads_image_alone:
            raise SparseSegError(f"mask policy {policy.name} needs more than the image: no graph has it")
        self.check_sites(way)
        check_options(self.model, options_of(SIZE_TO_CHECK, 1, way, policy))
        self._checked.add((way, policy))

    def check_sites(self, way: Way) -> None:
        """Raises a SparseSegError for strides or an exchange rule that no graph has."""
        if not way.is_dense and len(self.strides) > 2:
            raise SparseSegError("a graph tells the blocks at the finest stride alone: not for three strides")
        if not way.is_dense and way.exchange not in (None, self.model.exchange):
            raise SparseSegError(f"a graph has the model's exchange rule, not {way.exchange}")

    def session(self, options: ExportOptions, inputs: dict[str, Tensor]) -> Session:
        """The graph for these options; made, and compared with PyTorch on these inputs, if it is not there.

        Raises:
            SparseSegError: it gives other results than PyTorch.
        """
        session = self._kept(options)
        if session is not None:
            return session
        with _MAKING:
            return self._cached(options) or self._made(options, inputs)

    def find(self, options: ExportOptions) -> bool:
        """Whether there is a graph for these options, in memory or on disk; it is then ready."""
        with _MAKING:
            return self._cached(options) is not None

    def _kept(self, options: ExportOptions) -> Session | None:
        with self._lock:
            if options in self._sessions:
                self._sessions.move_to_end(options)
            return self._sessions.get(options)

    def _cached(self, options: ExportOptions) -> Session | None:
        """The graph in memory, or the one on disk."""
        session = self._kept(options)
        with self._counted(), suppress(SparseSegError):  # one that does not open is made again
            if session is None and (session := self._read(options)) is not None:
                self._keep(options, session)
        return session

    def _made(self, options: ExportOptions, inputs: dict[str, Tensor]) -> Session:
        with self._counted(), torch.autocast("cpu", enabled=False):
            session = self._make(options, inputs)
            self.made += 1
        return self._keep(options, session)

    def _keep(self, options: ExportOptions, session: Session) -> Session:
        with self._lock:
            while len(self._sessions) >= self.most:
                self._sessions.popitem(last=False)
            self._sessions[options] = session
        return session

    @abstractmethod
    def _make(self, options: ExportOptions, inputs: dict[str, Tensor]) -> Session:
        """A new graph, compared with PyTorch on these inputs."""

    def _read(self, options: ExportOptions) -> Session | None:
        """The graph that is kept on disk."""
        return None

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Adds the time inside to `seconds`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    @cached_property
    def _folded(self) -> SelectiveNetwork:
        """What graphs are made of: on the CPU, wherever the model is."""
        with torch.inference_mode(False):  # they outlast the call that asks for them first
            return copy.deepcopy(self.model).cpu().float().for_inference()

    def _static(self, options: ExportOptions) -> StaticNetwork:
        policy = None if options.policy is None else copy.deepcopy(options.policy).cpu().float()
        return StaticNetwork(self._folded, dataclasses.replace(options, policy=policy))


def options_of(
    size: tuple[int, int], batch: int, way: Way, policy: MaskPolicy | None, **more: Any
) -> ExportOptions:
    """Of a graph that takes normalised images and runs a way, under a policy if it is selective."""
    return ExportOptions(
        size,
        batch,
        way.output_stride,
        merge=way.merge,
        policy=policy,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        **more,
    )


class RuntimeRun:
    """One run of a graph; as a `Pass`, but what happens inside is not there.

    Args:
        images: normalised, `[B, 3, H, W]`.
    """

    def __init__(self, segmentor: RuntimeSegmentor, images: Tensor) -> None:
        self.segmentor, self.images = segmentor, images
        self._options: ExportOptions | None = None
        self._blocks: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def follow(self, way: Way | None = None, policy: MaskPolicy | None = None) -> RuntimeRun:
        """Run this way. Returns the run itself.

        Args:
            policy: overrides the way's.

        Raises:
            SparseSegError: no graph can run it.
        """
        way = way or Way()
        policy = None if way.is_dense else policy or self.segmentor.policy_for(way)
        self.segmentor.check(way, policy)
        return self._ask(options_of(self._size, len(self.images), way, policy))

    def take(self, fine_blocks: Tensor, way: Way | None = None) -> RuntimeRun:
        """Run under this mask, bool `[B, Hc, Wc]`.

        Raises:
            ValueError: levels in place of a mask, a mask of a wrong shape, images with different numbers of
                fine blocks, or with none.
            SparseSegError: no graph can run it.
        """
        way = way or Way()
        self.segmentor.check_sites(way)
        expected = block_shape(self.images, self.segmentor.strides[-1])
        if tuple(fine_blocks.shape) != tuple(expected):
            raise ValueError(f"fine_blocks must be {list(expected)}, not {list(fine_blocks.shape)}")
        if fine_blocks.dtype != torch.bool:
            raise ValueError("in a runtime fine_blocks must be bool; levels need the model itself")
        counts = fine_blocks.flatten(1).sum(1)
        count = int(counts[0])
        if count == 0 or bool((counts != count).any()):
            raise ValueError("in a runtime all images need the same number of fine blocks, and some")
        numbers = fine_blocks.flatten(1).nonzero()[:, 1].reshape(-1, count).to(self.images.device)
        fraction = count / fine_blocks[0].numel()
        options = options_of(self._size, len(self.images), way, None, fine_fraction=fraction, given=True)
        return self._ask(options, {"blocks": numbers})

    def logits(self) -> Tensor:
        """Logits `[B, K, H, W]` at the images' size."""
        return self._run(True)["logits"]

    def classes(self) -> Tensor:
        """Classes int64 `[B, H, W]`, cheaper than through `logits`."""
        return self._run(False)["classes"].long()

    @property
    def mask(self) -> Tensor | None:
        """The fine blocks, bool `[B, Hc, Wc]`; None when dense."""
        return self._run(False).get("fine_blocks")

    @property
    def levels(self) -> Tensor:
        """The blocks' levels int64 `[B, Hc, Wc]`, 0 for the coarsest stride.

        Raises:
            ValueError: the run is dense.
        """
        if self.mask is None:
            raise ValueError("a dense run has no mask")
        return block_levels(self.mask, self.segmentor.strides)

    def prepare(self, logits: bool) -> None:
        """Make the graph for `logits` or `classes`.

        Raises:
            SparseSegError: it gives other results than PyTorch.
        """
        self.segmentor.session(self.options(logits), self._inputs)

    def options(self, logits: bool) -> ExportOptions:
        """Of the graph that gives `logits` or `classes`."""
        if self._options is None:
            self.follow()
        assert self._options is not None
        return dataclasses.replace(self._options, logits=logits)

    @property
    def _inputs(self) -> dict[str, Tensor]:
        return {"images": self.images} | self._blocks

    @property
    def _size(self) -> tuple[int, int]:
        return int(self.images.shape[2]), int(self.images.shape[3])

    def _ask(self, options: ExportOptions, blocks: dict[str, Tensor] | None = None) -> RuntimeRun:
        self._options, self._blocks, self._outputs = options, blocks or {}, {}
        return self

    def _run(self, logits: bool) -> dict[str, Tensor]:
        options = self.options(logits)
        if not self._outputs or (logits and "logits" not in self._outputs):
            inputs = self._inputs
            self._outputs = self.segmentor.session(options, inputs)(**inputs)
        return self._outputs
