"""What a benchmark runs: one network, its input, and the cases to measure."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.checkpoint import load_model
from sparse_seg.config import Config
from sparse_seg.data.dataset import IGNORE_INDEX
from sparse_seg.evaluation.cost import count_macs
from sparse_seg.lab.benchmark.inputs import randomise_norms, scenes
from sparse_seg.lab.benchmark.peers import peer_run
from sparse_seg.lab.latency import Run
from sparse_seg.masks import MaskPolicy
from sparse_seg.run.build import build_model
from sparse_seg.run.passes import Pass
from sparse_seg.run.segmentor import Segmentor
from sparse_seg.run.way import Way
from sparse_seg.training.schedule import build_optimizer


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
    """What is measured.

    Args:
        scope: `network`, images to logits by the form that `for_inference` makes; `train`, a step.
        kind: `dense`, `selective`, or `peer`, dense in another runtime.
        way: how the network runs; its mask is None for the config's policy.
        given: whether the mask is made beforehand.
        peer: name of the other runtime.
    """

    scope: str
    kind: str
    way: Way
    given: bool = False
    peer: str | None = None

    @property
    def name(self) -> str:
        if self.kind == "selective":
            mask = "given" if self.given else self.way.mask or "selective"
            return f"{mask} f={self.way.fine_fraction:g}"
        return f"{self.kind} OS{self.way.output_stride}"

    @property
    def form(self) -> str:
        if self.kind == "dense":
            return "conv2d"
        return self.peer or self.way.engine or "gather"

    def as_row(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "scope": self.scope,
            "kind": self.kind,
            "output_stride": self.way.output_stride,
            "fine_fraction": self.way.fine_fraction,
            "engine": self.peer or self.way.engine,
            "policy": "given" if self.given else self.way.mask,
            "network": self.name,
            "form": self.form,
        }


class Dense(nn.Module):
    """A network dense at a stride, as a module of images alone, for other runtimes."""

    def __init__(self, model: Segmentor, stride: int) -> None:
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
        self.float_model: Any = model.eval().to(self.device)  # a Segmentor
        images, labels = scenes(setup.config, setup.size, setup.batch)
        self.images, self.labels = images.to(self.device, self.dtype), labels.to(self.device)
        self._costs: dict[tuple[Way, bool], int] = {}

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

    def policy(self, way: Way) -> MaskPolicy | None:
        return None if way.is_dense else self.model.policy_for(way)

    def fine_blocks(self, way: Way) -> Tensor:
        """The mask by the config's policy on this input."""
        policy = self.model.policy_for(dataclasses.replace(way, mask=None))
        with torch.inference_mode():
            return policy(self.model.start(self.images, self.labels)).clone()

    def start(self, model: Segmentor, case: Case) -> Pass:
        """A pass of a case, with the mask chosen, or given."""
        run = model.start(self.images, self.labels)
        if case.given:
            return run.take(self.fine_blocks(case.way), case.way)
        return run.follow(case.way, self.policy(case.way))

    def macs(self, case: Case) -> int:
        """Multiply-adds of one forward, or of a training step: of the forward and both gradients (x 3)."""
        key = case.way, case.given
        if key not in self._costs:
            with torch.inference_mode():
                given = self.start(self.model, case).macs() if case.given else None
            counts = given or count_macs(self.model, self.images, case.way, self.labels)
            self._costs[key] = sum(counts.values())
        return self._costs[key] * (3 if case.scope == "train" else 1)

    @torch.inference_mode()
    def stored_mib(self, case: Case) -> float | None:
        """MiB of the activations that a case keeps for refining, if it does."""
        if case.scope == "train" or case.way.is_dense:
            return None
        run = self.start(self.model, case)
        if run.memory is None:
            return None
        run.grid_logits()
        return run.memory.num_bytes / 2**20

    # -- runs ----------------------------------------------------------------------------------------------

    def run(self, case: Case) -> Run:
        """What to call to run once; what a mask needs, and the mask itself, is made anew each time."""
        if case.scope == "train":
            return self._training_step(case)
        if case.kind == "peer":
            assert case.peer is not None
            return peer_run(case.peer, *self.dense_module(case.way))
        model, policy = self.folded_model, self.policy(case.way)
        fixed = self.fine_blocks(case.way) if case.given else None

        def run() -> Tensor:
            one = model.start(self.images, self.labels)
            return (one.follow(case.way, policy) if fixed is None else one.take(fixed, case.way)).logits()

        return torch.inference_mode()(run)

    def dense_module(self, way: Way) -> tuple[nn.Module, Tensor]:
        """The network dense at a stride, and what it is given; channels_last."""
        assert way.output_stride is not None
        images = self.images.contiguous(memory_format=torch.channels_last)
        return Dense(self.folded_model, way.output_stride).eval(), images

    def _training_step(self, case: Case) -> Run:
        """Forward, cross-entropy, backward, SGD; half precision by autocast."""
        network, policy = self.training_copy, self.policy(case.way)
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
