"""Where passes run: in PyTorch, in another runtime, or where it takes less time in all."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparse_seg.errors import SparseSegError, choose_one, first_line
from sparse_seg.export import cuda_graph
from sparse_seg.export.onnx_segmentor import OnnxSegmentor
from sparse_seg.export.options import ExportOptions
from sparse_seg.export.runtime import RUNTIMES
from sparse_seg.export.segmentor import Elsewhere, RuntimeRun, RuntimeSegmentor
from sparse_seg.masks import MaskPolicy
from sparse_seg.run.images import warn_of_bytes
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way

TORCH, AUTO = "torch", "auto"
CHOICES = (AUTO, TORCH, *RUNTIMES, cuda_graph.NAME)
SIZES = 4  # that get graphs
PIXELS = 2**21  # of the largest images that get one: a runtime keeps all memory that it ever needed
# What `auto` reckons with. camvid-slim at 360x480, one thread of an AMD EPYC: a graph takes 1.35 s to make,
# and an image 33 ms in onnxruntime in place of 52
SAVED = 0.25  # of PyTorch's time for an image, by a graph
NODE_SECONDS = 0.016  # to make a graph, for each node of the network, and
RUNS = 4  # as long as so many runs in PyTorch


def in_runtime(
    model: SelectiveNetwork, runtime: str, threads: int | None = None
) -> RuntimeSegmentor | Runner:
    """A model run by onnxruntime, OpenVINO or as CUDA graphs, for prediction: the same classes but for ties.

    Several threads may use it at once.

    Args:
        model: in eval mode; its device is where onnxruntime runs, if it is built for it. Where it changes
            afterwards (weights, settings, policy), a call raises a SparseSegError: call this again. Values
            written through `.data` or NumPy go unnoticed.
        runtime: `onnxruntime` or `openvino`; `cuda-graph`, on a CUDA device, in the model's precision; or
            `auto`, which runs in PyTorch until a graph in onnxruntime is worth making, see `Runner`.
        threads: of the processor; None: as many as PyTorch uses.

    Raises:
        SparseSegError: an unknown runtime, or one that is not installed or does not run on this device.
        ValueError: no network of this package, or threads that are no number.
    """
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads must be a whole number from 1, not {threads!r}")
    if not isinstance(model, SelectiveNetwork):
        raise ValueError(
            f"model must be a network of this package, not {type(model).__name__}: load_model reads a file, "
            "selective takes a module"
        )
    return Runner(model, threads=threads) if runtime == AUTO else runtime_segmentor(model, runtime, threads)


def runtime_segmentor(
    model: SelectiveNetwork, runtime: str, threads: int | None = None, most: int | None = None
) -> RuntimeSegmentor:
    """See `in_runtime`.

    Args:
        most: how many graphs are kept in memory.
    """
    if runtime == cuda_graph.NAME:
        return cuda_graph.CudaGraphSegmentor(model, most)
    if runtime not in RUNTIMES:
        raise SparseSegError(f"unknown runtime {choose_one(runtime, (AUTO, *RUNTIMES, cuda_graph.NAME))}")
    return OnnxSegmentor(model, runtime, threads, most)


@dataclass
class _Case:
    """Images of one size, run one way.

    Args:
        seen: how many came.
        seconds: that PyTorch needs for one, the least so far; None: not measured.
        is_fast: whether it has a graph.
        refusal: why it can have none; None: it has one, or may still get one.
    """

    seen: int = 0
    seconds: float | None = None
    is_fast: bool = False
    refusal: str | None = None


class Runner(Elsewhere):
    """Starts a model's passes; what it starts has `follow`, `take`, `classes`, `logits` and `mask`.

    `auto`, on the CPU: images of one size, run one way, get a graph in onnxruntime if one is on disk, or if
    it will save more time than it takes to make. What it will save follows from the time of an image in
    PyTorch, which is measured, and from how many are still to come (`expect`); where nobody says how many, as
    many as have been. At most `SIZES` graphs are made so. Images of over `PIXELS` run in PyTorch, and so does
    what no graph can run.

    Args:
        model: in eval mode, on its device.
        asked: `auto`, `torch`, `onnxruntime` or `openvino`.
        way: that all passes will follow, if it is known: then what cannot run so is told at once.
        refusal: why `auto` is to stay with PyTorch, if it is.
        threads: of another runtime; None: as many as PyTorch uses.

    Attributes:
        last: where the last pass ran; runs: how many passes each runtime had.
        refusal: why all run in PyTorch, if they do; refusals: why some passes did, and how many.

    Raises:
        SparseSegError: what is asked for is not installed, or cannot run this way.
    """

    def __init__(
        self,
        model: SelectiveNetwork,
        asked: str = AUTO,
        way: Way | None = None,
        refusal: str | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(model)
        self._auto = asked == AUTO
        self.runs, self.cases = Counter[str](), dict[ExportOptions, _Case]()
        self.refusals = Counter[str]()  # of ways that no graph runs, whatever the images
        self._coming: int | None = None  # as counted from the first pass
        device = model.device.type
        self.refusal = (refusal or (None if device == "cpu" else f"on {device}")) if self._auto else None
        self.fast: RuntimeSegmentor | None = None
        self.last: RuntimeSegmentor | SelectiveNetwork = model
        if asked == TORCH or self.refusal:
            return
        try:
            fast = runtime_segmentor(model, RUNTIMES[0] if self._auto else asked, threads)
            if way is not None:
                fast.check(way, self.policy_for(way))
            self.fast = fast
        except SparseSegError as error:
            if not self._auto:
                raise
            self.refusal = str(error)

    @cached_property
    def torch(self) -> SelectiveNetwork:
        """The model as PyTorch runs it."""
        with torch.inference_mode(False):
            return self.model.for_inference()

    @property
    def seconds(self) -> float:
        """Spent on making graphs."""
        return self.fast.seconds if self.fast else 0.0

    def expect(self, passes: int | None) -> None:
        """Say how many passes are still to come; None: unknown."""
        self._coming = None if passes is None else passes + self.runs.total()

    def start(self, images: Tensor, labels: Tensor | None = None) -> Any:
        """Start a pass over normalised images `[B, 3, H, W]`; nothing is computed yet.

        Raises:
            ValueError, SparseSegError: see `check_start`.
        """
        if self.fast is not None and not self._auto:
            return self.counted(self.fast).start(images, labels)
        self.check_start(images)
        if self.fast is not None:
            return _Run(self, images, labels)
        return self.counted(self.torch).start(images, labels)

    def counted(self, place: RuntimeSegmentor | SelectiveNetwork) -> RuntimeSegmentor | SelectiveNetwork:
        """Count a pass at a place. Returns the place."""
        self.last = place
        self.runs[place.runtime if isinstance(place, RuntimeSegmentor) else TORCH] += 1
        return place

    def report(self) -> str:
        """One line: what ran where, why not elsewhere, and what graphs took."""
        name = self.fast.runtime if self.fast else ""
        fast, slow, reasons = self.runs[name], self.runs[TORCH], Counter(self.refusals)
        text = f"runtime: {name if fast else TORCH}"
        if fast and slow:
            text += f" for {fast} of {fast + slow} runs, {TORCH} for the others"
        for case in self.cases.values():
            if case.refusal:
                reasons[case.refusal] += case.seen
        if self.refusal:
            reasons[self.refusal] = slow
        elif name and not fast and (slow > reasons.total() or not reasons):
            reasons[f"too few images for a graph in {name}"] = slow - reasons.total()
        told = [
            why if count == slow else f"{count} run{'s' * (count > 1)}: {why}"
            for why, count in reasons.items()
        ]
        text += f" ({'; '.join(told)})" if told else ""
        if self.fast and self.fast.made:
            kept = f", kept in {self.fast.folder}" if self.fast.folder else ""
            text += f"; {self.fast.made} graph{'s' * (self.fast.made > 1)} in {self.seconds:.1f} s{kept}"
        return text

    def decide(self, case: _Case, run: RuntimeRun, logits: bool) -> None:
        """Whether a case gets a graph, which is then made; it may stay open."""
        assert self.fast is not None
        if run.images[0, 0].numel() > PIXELS:
            case.refusal = f"images of over {PIXELS} px get no graph"
            return
        try:
            if case.seen == 1 and self.fast.find(run.options(logits)):
                case.is_fast = True
            elif self._pays(case):
                run.prepare(logits)
                case.is_fast = True
        except Exception as error:  # whatever exporter or runtime raise: PyTorch can do it
            case.refusal = first_line(error)

    def _pays(self, case: _Case) -> bool:
        """Whether a graph saves more time than it takes to make."""
        graphs = sum(other.is_fast for other in self.cases.values())
        if case.seconds is None or graphs >= SIZES:
            return False
        past = self.runs.total()
        coming = past if self._coming is None or self._coming <= past else self._coming - past
        share = case.seen / sum(other.seen for other in self.cases.values())
        cost = NODE_SECONDS * len(self.model.graph.nodes) + RUNS * case.seconds
        return SAVED * case.seconds * coming * share > cost


class _Run:
    """A run whose place is chosen when something of it is asked for; else as a `Pass`."""

    def __init__(self, runner: Runner, images: Tensor, labels: Tensor | None) -> None:
        self.runner, self.images, self.labels = runner, images, labels
        self._ask: Callable[[Any], Any] = lambda run: run.follow()
        self._run: Any = None
        self._case: _Case | None = None

    def follow(self, way: Way | None = None, policy: MaskPolicy | None = None) -> _Run:
        """Run this way. Returns the run itself."""
        way = way or Way()
        policy = policy or self.runner.policy_for(way)
        self._ask, self._run = lambda run: run.follow(way, policy), None
        return self

    def take(self, fine_blocks: Tensor, way: Way | None = None) -> _Run:
        """Run under this mask. Returns the run itself."""
        self._ask, self._run = lambda run: run.take(fine_blocks, way), None
        return self

    def logits(self) -> Tensor:
        """Logits `[B, K, H, W]` at the images' size."""
        return self._result("logits")

    def classes(self) -> Tensor:
        """Classes int64 `[B, H, W]`, cheaper than through `logits`."""
        return self._result("classes")

    def __getattr__(self, name: str) -> Any:
        """The mask, levels, and what policies ask."""
        return getattr(self._placed(False), name)

    def _result(self, name: str) -> Tensor:
        first, before, start = self._run is None, self.runner.seconds, time.process_time()
        run = self._placed(name == "logits")
        result = getattr(run, name)()
        # the processor's time, by threads: what others take of the machine changes it little
        spent = (time.process_time() - start) / torch.get_num_threads()
        case, made = self._case, self.runner.seconds > before
        if first and not made and case is not None and case.seen > 1 and not case.is_fast:
            case.seconds = min(spent, case.seconds or spent)
        return result

    def _placed(self, logits: bool) -> Any:
        """The run where it pays."""
        if self._run is not None:
            return self._run
        runner, self._case = self.runner, None
        assert runner.fast is not None
        try:
            run = self._ask(RuntimeRun(runner.fast, self.images))
            self._case = runner.cases.setdefault(run.options(logits), _Case())
        except (SparseSegError, ValueError) as error:  # PyTorch can do it, or says why not
            runner.refusals[str(error)] += 1
        if self._case is not None:
            self._case.seen += 1
            if not self._case.is_fast and self._case.refusal is None:
                runner.decide(self._case, run, logits)
            if self._case.is_fast:
                runner.counted(runner.fast)
                warn_of_bytes(self.images)
                self._run = run
                return run
        self._run = self._ask(runner.counted(runner.torch).start(self.images, self.labels))
        return self._run
