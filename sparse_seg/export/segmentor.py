"""A model's own interface for prediction, run as graphs of fixed sizes."""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_seg.checkpoint import digest_of
from sparse_seg.errors import SparseSegError
from sparse_seg.export.options import ExportOptions, check_options
from sparse_seg.export.static import StaticNetwork
from sparse_seg.masks import MaskPolicy, block_levels, block_shape
from sparse_seg.run.images import check_images, warn_of_bytes
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.predicting import Predicting
from sparse_seg.run.way import Way
from sparse_seg.run.weights import held

_MAKING = threading.Lock()  # PyTorch's exporter keeps state outside the network: one graph at a time
GRAPHS = 8  # kept: each holds the weights
Session = Callable[..., dict[str, Tensor]]  # named inputs to outputs by name
SIZE_TO_CHECK = (512, 512)  # px; which options fit does not depend on it


class Elsewhere(Predicting):
    """A model whose passes may run in another runtime; it must not change meanwhile."""

    __call__ = Predicting.forward

    def __init__(self, model: SelectiveNetwork) -> None:
        self.model, self.strides = model, model.strides
        self._policies: dict[Way, MaskPolicy | None] = {}
        self._tensors = held(model)  # kept, lest new ones get their places in memory
        self._known = self._state()

    def _state(self) -> list[Any]:
        """What tells whether the model has changed, but for values written through `.data` or NumPy, which
        PyTorch does not count: each call asks, and to compare ResNet-50's takes 12 ms."""
        own = own_settings(self.model.policy) | {"training": False}  # which changes no result
        told = [value if isinstance(value, (float, int, str)) else id(value) for value in own.values()]
        tensors = held(self.model)
        versions = [0 if one.is_inference() else one._version for one in tensors]
        places = [one.data_ptr() for one in tensors]
        return [self.model.settings, id(self.model.policy), told, versions, places]

    def check_start(self, images: Tensor) -> None:
        """Raises a SparseSegError where the model has changed since it was read; a ValueError of images of a
        wrong shape or dtype, or whose gradients would be lost."""
        if self._state() != self._known:
            raise SparseSegError(
                "the network has changed since its graphs were made: call in_runtime again, for the new one"
            )
        check_images(images)
        if images.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "a runtime gives no gradients, and images ask for them: pass images.detach(), or run the "
                "model itself"
            )

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
        self._sessions: dict[ExportOptions, Session] = {}
        self._lock = threading.Lock()  # of the dictionary: others run their graphs while one is made
        self._checked: set[tuple[Way, MaskPolicy | None]] = set()
        self._equal: dict[str, MaskPolicy] = {}

    def start(self, images: Tensor, labels: Tensor | None = None) -> RuntimeRun:
        """Start a run over images `[B, 3, H, W]`; nothing is computed yet.

        Raises:
            ValueError, SparseSegError: see `check_start`.
        """
        self.check_start(images)
        warn_of_bytes(images)
        return RuntimeRun(self, images)

    def check(self, way: Way, policy: MaskPolicy | None = None) -> None:
        """Raises a SparseSegError, of one line, for a way that no graph can run, or what the model raises."""
        self.model.check_way(way)  # first: 8.0 equals 8
        if (way, policy) in self._checked:
            return
        if policy is not None and not policy.reads_image_alone:
            raise SparseSegError(f"mask policy {policy.name} needs more than the image: no graph has it")
        self.check_sites(way)
        check_options(self.model, options_of(SIZE_TO_CHECK, 1, way, policy))
        self._checked.add((way, policy))

    def equal_policy(self, policy: MaskPolicy) -> MaskPolicy:
        """The first one that was given of the same content: graphs are kept by it."""
        return self._equal.setdefault(digest_of([description(policy)]), policy)

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
        if session := self._kept(options):
            return session
        with _MAKING, self._counted(), torch.autocast("cpu", enabled=False):
            if session := self._cached(options):
                return session
            session = self._make(options, inputs)
            self.made += 1
            return self._keep(options, session)

    def find(self, options: ExportOptions) -> bool:
        """Whether there is a graph for these options, in memory or on disk; it is then ready."""
        with _MAKING, self._counted():
            return self._cached(options) is not None

    def _kept(self, options: ExportOptions) -> Session | None:
        with self._lock:
            session = self._sessions.pop(options, None)
            if session is not None:
                self._sessions[options] = session  # the last one that was used is the last
            return session

    def _cached(self, options: ExportOptions) -> Session | None:
        """The graph in memory, or the one on disk."""
        if session := self._kept(options):
            return session
        with suppress(SparseSegError):  # one that does not open is made again
            if session := self._read(options):
                return self._keep(options, session)
        return None

    def _keep(self, options: ExportOptions, session: Session) -> Session:
        with self._lock:
            while len(self._sessions) >= self.most:
                del self._sessions[next(iter(self._sessions))]
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


def description(policy: MaskPolicy) -> list[object]:
    """All that a policy's scores and cuts follow from."""
    return [type(policy).__qualname__, repr(policy), own_settings(policy), policy.state_dict()]


def own_settings(policy: MaskPolicy) -> dict[str, Any]:
    """A policy's attributes, but for its tensors and what is private."""
    return {name: value for name, value in vars(policy).items() if not name.startswith("_")}


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
        images: normalised, `[B, 3, H, W]`, see `Elsewhere.check_start`.

    Raises:
        ValueError: images of another dtype than the graphs'.
    """

    def __init__(self, segmentor: RuntimeSegmentor, images: Tensor) -> None:
        if images.dtype != segmentor.dtype:
            raise ValueError(
                f"{segmentor.runtime} takes {str(segmentor.dtype)[6:]} images, not {images.dtype}"
            )
        self.segmentor, self.images = segmentor, images
        self._options: ExportOptions | None = None
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def follow(self, way: Way | None = None, policy: MaskPolicy | None = None) -> RuntimeRun:
        """Run this way. Returns the run itself.

        Args:
            policy: overrides the way's.

        Raises:
            SparseSegError: no graph can run it.
        """
        way = way or Way()
        if policy is not None:
            policy = self.segmentor.equal_policy(policy)
        policy = None if way.is_dense else policy or self.segmentor.policy_for(way)
        self.segmentor.check(way, policy)
        return self._ask(way, policy, {})

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
        return self._ask(way, None, {"blocks": numbers}, fine_fraction=fraction, given=True)

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
        options = self.options(logits)
        self.segmentor.session(options, self._inputs)

    def options(self, logits: bool) -> ExportOptions:
        """Of the graph that gives `logits` or `classes`."""
        if self._options is None:
            self.follow()
        assert self._options is not None
        return dataclasses.replace(self._options, logits=logits)

    def _ask(
        self, way: Way, policy: MaskPolicy | None, blocks: dict[str, Tensor], **given: Any
    ) -> RuntimeRun:
        size = int(self.images.shape[2]), int(self.images.shape[3])
        self._options = options_of(size, len(self.images), way, policy, **given)
        self._inputs, self._outputs = {"images": self.images} | blocks, {}
        return self

    def _run(self, logits: bool) -> dict[str, Tensor]:
        options = self.options(logits)
        if not self._outputs or (logits and "logits" not in self._outputs):
            self._outputs = self.segmentor.session(options, self._inputs)(**self._inputs)
        return self._outputs
