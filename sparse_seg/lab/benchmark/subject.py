"""What a benchmark runs: one network, a rendered scene, the cases to measure, and other runtimes (peers)."""

from __future__ import annotations

import copy
import dataclasses
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from sparse_seg.checkpoint import load_model
from sparse_seg.config import Config
from sparse_seg.data.cityscapes import Cityscapes
from sparse_seg.data.dataset import IGNORE_INDEX
from sparse_seg.data.scenes import render_scene
from sparse_seg.data.transforms import normalise
from sparse_seg.errors import MeasurementError
from sparse_seg.evaluation.cost import count_macs
from sparse_seg.export.runtime import RUNTIMES, open_session
from sparse_seg.lab.latency import Run
from sparse_seg.run.build import build_model
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.passes import Pass
from sparse_seg.run.way import Way
from sparse_seg.training.schedule import build_optimizer

TOLERANCE = 1e-2  # largest difference over largest value: a peer that computes something else is no peer


@dataclass(frozen=True)
class Setup:
    """What is measured. Picklable: a child process builds the same network and input from it."""

    config: Config
    checkpoint: str | None = None  # else random weights of a fixed seed
    size: tuple[int, int] = (512, 1024)  # height, width of the images
    batch: int = 1
    device: str = "cpu"
    dtype: str = "float32"


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


class Dense(nn.Module):
    """A network dense at a stride, as a module of images alone, for other runtimes."""

    def __init__(self, model: SelectiveNetwork, stride: int) -> None:
        super().__init__()
        self.model, self.stride = model, stride

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]` to logits `[B, K, H, W]`."""
        return self.model.dense(images, self.stride)


class Subject:
    """A network, its input, and its runs. Weights are shared by all cases but training's."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.device = setup, torch.device(setup.device)
        self.dtype: torch.dtype = getattr(torch, setup.dtype)
        if setup.checkpoint is None:
            torch.manual_seed(0)
            model = build_model(setup.config)
            randomise_norms(model)
        else:
            model = load_model(setup.checkpoint, setup.config)
        self.float_model: Any = model.eval().to(self.device)  # a SelectiveNetwork
        images, labels = scenes(setup.config, setup.size, setup.batch)
        self.images, self.labels = images.to(self.device, self.dtype), labels.to(self.device)

    @cached_property
    def model(self) -> Any:
        """The network in eval mode, in the dtype asked for."""
        if self.dtype == torch.float32:
            return self.float_model
        return copy.deepcopy(self.float_model).to(self.dtype)

    @cached_property
    def folded_model(self) -> Any:
        """Its form for inference, its kernels in channels_last memory, as its grids are."""
        return self.model.for_inference().to(memory_format=torch.channels_last)

    @cached_property
    def training_copy(self) -> Any:
        return copy.deepcopy(self.float_model).train()

    def fine_blocks(self, way: Way) -> Tensor:
        """The mask by the config's policy on this input."""
        policy = self.model.policy_for(dataclasses.replace(way, mask=None))
        with torch.inference_mode():
            return policy(self.model.start(self.images, self.labels)).clone()

    def starter(self, model: SelectiveNetwork, case: Case) -> Callable[[], Pass]:
        """What starts a pass of a case. What a mask needs, and the mask, is made anew each time, unless it is
        given."""
        if case.given:
            blocks = self.fine_blocks(case.way)
            return lambda: model.start(self.images, self.labels).take(blocks, case.way)
        policy = None if case.way.is_dense else self.model.policy_for(case.way)
        return lambda: model.start(self.images, self.labels).follow(case.way, policy)

    @torch.inference_mode()
    def costs(self, case: Case) -> dict[str, float | None]:
        """`gmacs` of one forward, or of a training step (of the forward and both gradients: x 3);
        `stored_mib` of the activations that a case keeps for refining, if it does."""
        run = self.starter(self.model, case)()
        counts = run.macs() if case.given else count_macs(self.model, self.images, case.way, self.labels)
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
            return peer_run(case.peer, *self.dense_module(case.way))
        start = self.starter(self.folded_model, case)
        return torch.inference_mode()(lambda: start().logits())

    def dense_module(self, way: Way) -> tuple[nn.Module, Tensor]:
        """The network dense at a stride, and what it is given; channels_last."""
        assert way.output_stride is not None
        images = self.images.contiguous(memory_format=torch.channels_last)
        return Dense(self.folded_model, way.output_stride).eval(), images

    def _training_step(self, case: Case) -> Run:
        """Forward, cross-entropy, backward, SGD; half precision by autocast."""
        network = self.training_copy
        policy = None if case.way.is_dense else self.model.policy_for(case.way)
        optimizer = build_optimizer(network, dataclasses.replace(self.setup.config.train, optimizer="sgd"))
        images, half = self.images.float(), self.dtype != torch.float32

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, self.dtype, enabled=half):
                logits = network.start(images, self.labels).follow(case.way, policy).logits()
            F.cross_entropy(logits.float(), self.labels, ignore_index=IGNORE_INDEX).backward()
            optimizer.step()

        return step


def prepare_case(setup: Setup, case: Case) -> Run:
    """For a child process: the run of a case."""
    return Subject(setup).run(case)


def scenes(config: Config, size: tuple[int, int], batch: int) -> tuple[Tensor, Tensor]:
    """Rendered street scenes: normalised images `[B, 3, H, W]` and train ids `[B, H, W]` (int64)."""
    data, ids = config.data, np.full(256, IGNORE_INDEX)
    ids[list(Cityscapes.train_ids)] = list(Cityscapes.train_ids.values())
    pairs = [render_scene(np.random.default_rng(seed), size) for seed in range(batch)]
    images = torch.stack([normalise(image, data.mean, data.std) for image, _ in pairs])
    labels = torch.stack([torch.from_numpy(ids[label].astype(np.int64)) for _, label in pairs])
    classes = config.model.num_classes
    return images, labels if classes is None else labels.where(labels < classes, IGNORE_INDEX)


def randomise_norms(model: SelectiveNetwork) -> None:
    """Give every batch norm the statistics of its activations, so that these keep order one."""
    images = torch.randn(2, 3, *model.graph.size, generator=torch.Generator().manual_seed(0))
    update_bn([images], model.module)  # the dense network that was captured
    for name, values in model.module.named_buffers():
        if name.endswith("running_var"):
            values.add_(0.05)  # what is pooled varies too little to be divided by
    model.eval()


def peer_run(name: str, module: nn.Module, given: Tensor) -> Run:
    """A run of `module(given)` by a peer, compiled beforehand and checked.

    Raises:
        MeasurementError: it computes other numbers, or not on this device.
        Exception: whatever the peer raises where it is missing or fails.
    """
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        expected, run = module(given), PEERS[name](module, given)
        found = torch.as_tensor(run()).to(expected)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error < TOLERANCE:
        raise MeasurementError(f"{name} computes other numbers (relative error {error:.1g})")
    return run


def _torch_compile(module: nn.Module, given: Tensor) -> Run:
    compiled = torch.compile(module)
    return torch.inference_mode()(lambda: compiled(given))


def _exported(runtime: str, module: nn.Module, given: Tensor) -> Run:
    if given.device.type != "cpu":
        raise MeasurementError("tried on the CPU only")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    given, graph = given.contiguous(), io.BytesIO()
    options = {"input_names": ["images"], "dynamo": False, "opset_version": 17}
    torch.onnx.export(module, (given,), graph, **options)  # type: ignore[arg-type]  # without dynamo it can
    session, images = open_session(graph.getvalue(), runtime, torch.get_num_threads()), given.numpy()
    return lambda: next(iter(session(images=images).values()))


# none is required: one that is missing raises as it is tried
PEERS: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    "torch.compile": _torch_compile,
    **{runtime: partial(_exported, runtime) for runtime in RUNTIMES},
}
