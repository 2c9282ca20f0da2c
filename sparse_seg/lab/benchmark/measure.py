"""One network run in many ways on rendered scenes: time, multiply-adds and memory against the dense one."""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import update_bn

from sparse_seg.checkpoint import load_model
from sparse_seg.config import Config
from sparse_seg.data.cityscapes import Cityscapes
from sparse_seg.data.dataset import IGNORE_INDEX
from sparse_seg.data.scenes import render_scene
from sparse_seg.data.transforms import normalise
from sparse_seg.errors import MeasurementError, SparseSegError, first_line
from sparse_seg.evaluation.cost import count_macs
from sparse_seg.export.runner import runtime_segmentor
from sparse_seg.export.runtime import RUNTIMES
from sparse_seg.lab.latency import Run, interleaved, peak_memory
from sparse_seg.progress import bar
from sparse_seg.run.build import build_model
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.passes import Pass
from sparse_seg.run.way import Way
from sparse_seg.training.schedule import build_optimizer

CPU = torch.device("cpu")
TOLERANCE = 1e-2  # largest difference over largest value: a peer that computes something else is no peer
COLUMNS = (
    *("scope", "network", "form", "milliseconds", "spread", "gmacs"),
    *("speedup", "mac_ratio", "speedup_per_mac_ratio", "peak_mib"),
)


@dataclass(frozen=True)
class Case:
    """A row of a benchmark.

    Args:
        scope: `network`, images to logits by the form that `for_inference` makes; `train`, a step.
        way: how the network runs; its mask is None for the config's policy.
        given: whether the mask is made beforehand.
        peer: name of another runtime, for the dense network.
    """

    scope: str
    way: Way
    given: bool = False
    peer: str | None = None

    def as_row(self) -> dict[str, Any]:
        """Plain values."""
        way, kind = self.way, "peer" if self.peer else "dense" if self.way.is_dense else "selective"
        policy = "given" if self.given else way.mask
        share = f"{policy or kind} f={way.fine_fraction or 0:g}"
        return {
            "scope": self.scope,
            "kind": kind,
            "output_stride": way.output_stride,
            "fine_fraction": way.fine_fraction,
            "engine": self.peer or way.engine,
            "policy": policy,
            "network": f"{kind} OS{way.output_stride}" if way.is_dense else share,
            "form": "conv2d" if kind == "dense" else self.peer or way.engine or "gather",
        }


@dataclass
class Subject:
    """A network, its input, and its runs. Weights are shared by all cases but training's.

    What is measured follows from the fields: a child process gets `dataclasses.replace(subject)`, which holds
    these alone, and builds the same network and input.

    Args:
        checkpoint: None for random weights of a fixed seed.
        size: height and width of the images, px.
    """

    config: Config
    checkpoint: str | None = None
    size: tuple[int, int] = (512, 1024)
    batch: int = 1
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    @cached_property
    def float_model(self) -> SelectiveNetwork:
        """The network in eval mode, in float32."""
        if self.checkpoint is None:
            torch.manual_seed(0)
            model = build_model(self.config)
            randomise_norms(model)
        else:
            model = load_model(self.checkpoint, self.config)
        return model.eval().to(self.device)

    @cached_property
    @torch.inference_mode(False)  # a training step reads them, too
    def scene(self) -> tuple[Tensor, Tensor]:
        """Rendered street scenes: normalised images `[B, 3, H, W]` and train ids `[B, H, W]` (int64)."""
        data, ids = self.config.data, np.full(256, IGNORE_INDEX)
        ids[list(Cityscapes.train_ids)] = list(Cityscapes.train_ids.values())
        pairs = [render_scene(np.random.default_rng(seed), self.size) for seed in range(self.batch)]
        images = torch.stack([normalise(image, data.mean, data.std) for image, _ in pairs])
        labels = torch.stack([torch.from_numpy(ids[label].astype(np.int64)) for _, label in pairs])
        labels = labels.where(labels < self.float_model.num_classes, IGNORE_INDEX)
        return images.to(self.device, self.dtype), labels.to(self.device)

    @property
    def images(self) -> Tensor:
        return self.scene[0]

    @cached_property
    def model(self) -> Any:
        """The network in eval mode, in the dtype asked for."""
        copied = self.float_model if self.dtype == torch.float32 else copy.deepcopy(self.float_model)
        return copied.to(self.dtype)

    @cached_property
    def folded_model(self) -> Any:
        """Its form for inference, its kernels in channels_last memory, as its grids are."""
        return self.model.for_inference().to(memory_format=torch.channels_last)

    @cached_property
    def training_copy(self) -> Any:
        return copy.deepcopy(self.float_model).train()

    def fine_blocks(self, way: Way) -> Tensor:
        """The mask by the config's policy on this input."""
        policy = self.model.policy_for(way)
        with torch.inference_mode():
            return policy(self.model.start(*self.scene)).clone()

    def starter(self, model: SelectiveNetwork, case: Case) -> Callable[[], Pass]:
        """What starts a pass of a case. What a mask needs, and the mask, is made anew each time, unless it is
        given."""
        if case.given:
            blocks = self.fine_blocks(case.way)
            return lambda: model.start(*self.scene).take(blocks, case.way)
        policy = None if case.way.is_dense else self.model.policy_for(case.way)
        return lambda: model.start(*self.scene).follow(case.way, policy)

    @torch.inference_mode()
    def costs(self, case: Case) -> dict[str, float | None]:
        """`gmacs` of one forward, or of a training step (of the forward and both gradients: x 3);
        `stored_mib` of the activations that a case keeps for refining, if it does."""
        run, (images, labels) = self.starter(self.model, case)(), self.scene
        counts = run.macs() if case.given else count_macs(self.model, images, case.way, labels)
        is_train = case.scope == "train"
        kept = None if is_train or case.way.is_dense else run.memory
        if kept is not None:
            run.grid_logits()
        gmacs = sum(counts.values()) * (3 if is_train else 1) / 1e9
        return {"gmacs": gmacs, "stored_mib": None if kept is None else kept / 2**20}

    def run(self, case: Case) -> Run:
        """What to call to run a case once."""
        if case.scope == "train":
            return self._training_step(case)
        if case.peer is not None:
            assert case.way.output_stride is not None
            return peer_run(case.peer, self.folded_model, self.images, case.way.output_stride)
        start = self.starter(self.folded_model, case)
        return torch.inference_mode()(lambda: start().logits())

    def _training_step(self, case: Case) -> Run:
        """Forward, cross-entropy, backward, SGD; half precision by autocast."""
        network = self.training_copy
        policy = None if case.way.is_dense else self.model.policy_for(case.way)
        optimizer = build_optimizer(network, dataclasses.replace(self.config.train, optimizer="sgd"))
        images, labels = self.scene
        images, half = images.float(), self.dtype != torch.float32

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, self.dtype, enabled=half):
                logits = network.start(images, labels).follow(case.way, policy).logits()
            F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX).backward()
            optimizer.step()

        return step


def randomise_norms(model: SelectiveNetwork) -> None:
    """Give every batch norm the statistics of its activations, so that these keep order one."""
    images = torch.randn(2, 3, *model.graph.size, generator=torch.Generator().manual_seed(0))
    update_bn([images], model.module)  # the dense network that was captured
    for name, values in model.module.named_buffers():
        if name.endswith("running_var"):
            values.add_(0.05)  # what is pooled varies too little to be divided by
    model.eval()


def peer_run(name: str, model: SelectiveNetwork, images: Tensor, stride: int) -> Run:
    """A run of the network, dense at a stride, by a peer, compiled beforehand and checked.

    Raises:
        MeasurementError: it computes other numbers, or not on this device.
        Exception: whatever the peer raises where it is missing or fails.
    """
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        expected, dense = model.dense(images, stride), PEERS[name](model)
        found = dense(images, stride)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error < TOLERANCE:
        raise MeasurementError(f"{name} computes other numbers (relative error {error:.1g})")
    return torch.inference_mode()(lambda: dense(images, stride))


def _in_runtime(runtime: str, model: SelectiveNetwork) -> Callable[..., Tensor]:
    if model.device.type != "cpu":
        raise MeasurementError("tried on the CPU only")
    return runtime_segmentor(model, runtime).dense


# `SelectiveNetwork.dense` by others; none is required: one that is missing raises as it is tried
PEERS: dict[str, Callable[[SelectiveNetwork], Callable[..., Tensor]]] = {
    "torch.compile": lambda model: torch.compile(model.dense),
    **{runtime: partial(_in_runtime, runtime) for runtime in RUNTIMES},
}


def cases(
    scope: str,
    fractions: Sequence[float],
    engines: Sequence[str],
    strides: Sequence[int],
    policies: Sequence[str] = (),
    peers: Iterable[str] = (),
) -> list[Case]:
    """All rows of a scope, the baseline (dense at the finest of the strides) first.

    Args:
        policies: beside the config's own, by the engine gather; `given`: the config's mask, ready made.
        peers: other runtimes, for the baseline. These two are of scope `network` alone.
    """
    ends = (strides[0], strides[-1]) if scope == "network" else strides[:1]
    rows = [Case(scope, Way.dense(stride)) for stride in ends]
    for fraction in fractions:
        rows += [Case(scope, Way(None, None, fraction, engine=engine)) for engine in engines]
        for policy in policies if scope == "network" else ():
            given = policy == "given"
            rows.append(Case(scope, Way(None, None if given else policy, fraction, engine="gather"), given))
    return rows + [Case(scope, rows[0].way, peer=peer) for peer in peers if scope == "network"]


def measure_cases(
    subject: Subject,
    rows: Sequence[Case],
    repeats: int,
    memory: bool = True,
    notes: Callable[[str], None] = lambda note: None,
) -> list[dict[str, Any]]:
    """Run the cases of one scope in turns; a plain dict of results for each, the baseline first.

    A peer or an engine that cannot run is left out and reported to `notes`. Peers' memory is not measured:
    their runtimes reserve it as they compile, before a run.
    """
    runs: dict[Case, Run] = {}
    for case in bar(rows, f"{rows[0].scope}: first runs", len(rows), unit="run"):
        try:
            run = subject.run(case)
            run()
            runs[case] = run
        except Exception as error:  # a peer's may be of any kind
            refused = case.way.engine == "spconv" and isinstance(error, SparseSegError)
            if case.peer is None and not refused:
                raise
            reason = str(error) if refused else f"{type(error).__name__}: {first_line(error)}"
            notes(f"{case.scope}: {case.as_row()['form']} not measured: {reason}")
    times = interleaved(runs, repeats, subject.device, warmup=1)
    results: list[dict[str, Any]] = []
    for case, time in bar(times.items(), "memory", len(times), memory, "run"):
        measured = memory and case.peer is None
        arguments = dataclasses.replace(subject), case
        peak = peak_memory(Subject.run, arguments, subject.device) if measured else None
        row = case.as_row() | subject.costs(case) | {"milliseconds": time.median, "spread": time.spread}
        row |= {"quartiles": time.quartiles, "samples": time.samples, "peak_mib": peak}
        first = results[0] if results else row
        row["speedup"] = first["milliseconds"] / row["milliseconds"]
        row["mac_ratio"] = first["gmacs"] / row["gmacs"]
        row["speedup_per_mac_ratio"] = row["speedup"] / row["mac_ratio"]
        results.append(row)
    return results
