"""What a benchmark runs: one network, its input, and the cases to measure."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

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
from sparse_seg.run.segmentor import Segmentor
from sparse_seg.models.forms import channels_last
from sparse_seg.run.passes import Pass
from sparse_seg.models.plain import plain_network, plain_stages
from sparse_seg.run.way import Way
from sparse_seg.run.build import build_model
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.sparse import SiteLayout, Step, rows_to_grid
from sparse_seg.training.schedule import build_optimizer

STAGES = ("layer3", "layer4")  # what the scope `stages` runs: those whose stride the mask decides


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
        scope: `stages`, layer3 and layer4 from given features; `network`, images to logits; `train`, a step.
        kind: `plain` (the `nn.Conv2d` twin), `dense` (ours on the lattice), `selective`, or `peer`.
        way: how the network runs; its mask is None for the config's policy.
        folded: the form that `for_inference` makes.
        given: whether the mask is made beforehand.
        peer: name of the other runtime.
    """

    scope: str
    kind: str
    way: Way = Way(8)  # noqa: RUF009 (a frozen value)
    folded: bool = False
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
        if self.kind == "plain":
            return "nn.Conv2d"
        engine = self.peer or self.way.engine or "gather"
        return f"{engine}, folded" if self.folded else engine

    def as_row(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "scope": self.scope,
            "kind": self.kind,
            "output_stride": self.way.output_stride or 8,
            "fine_fraction": self.way.fine_fraction,
            "engine": self.peer or self.way.engine,
            "folded": self.folded,
            "policy": "given" if self.given else self.way.mask,
            "network": self.name,
            "form": self.form,
        }


class Table(NamedTuple):
    """A neighbour table that a forward builds: indices of its two layouts among the stages', and how."""

    src: int
    dst: int
    spacing: int
    exchange: str
    lattice: bool


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
        self.is_captured = isinstance(model, SelectiveNetwork)
        if not self.is_captured:
            model.auxiliary = None
        self.float_model: Any = model.eval().to(self.device)  # a Segmentor
        images, labels = scenes(setup.config, setup.size, setup.batch)
        self.images, self.labels = images.to(self.device, self.dtype), labels.to(self.device)
        self._plain: dict[tuple[str, int], nn.Module] = {}
        self._costs: dict[tuple[Way, bool], dict[str, int]] = {}

    @cached_property
    def model(self) -> Any:
        """Ours, in eval mode, in the dtype asked for."""
        if self.dtype == torch.float32:
            return self.float_model
        return copy.deepcopy(self.float_model).to(self.dtype)

    @cached_property
    def folded_model(self) -> Any:
        """Its form for inference."""
        return self.model.for_inference()

    @cached_property
    def training_copy(self) -> Any:
        return copy.deepcopy(self.float_model).train()

    @cached_property
    def features(self) -> Tensor:
        """Rows of layer2, `[B * ceil(H/8) * ceil(W/8), C]`: what the last stages read."""
        with torch.inference_mode():
            return self.start(self.model, Case("network", "dense")).stage_rows()[1]

    def policy(self, way: Way) -> MaskPolicy:
        return self.model.policy_for(way)

    def fine_blocks(self, way: Way) -> Tensor:
        """The mask by the config's policy on this input."""
        policy = self.policy(dataclasses.replace(way, mask=None))
        with torch.inference_mode():
            return policy(self.model.start(self.images, self.labels)).clone()

    def start(self, model: Segmentor, case: Case) -> Pass:
        """A pass of a case, with the mask chosen, or given."""
        run = model.start(self.images, self.labels)
        if case.given:
            return run.take(self.fine_blocks(case.way), case.way)
        return run.follow(case.way, None if case.way.is_dense else self.policy(case.way))

    def macs(self, case: Case) -> int:
        """Multiply-adds of the case's scope: one forward, or in training forward and both gradients (x 3)."""
        key = case.way, case.given
        if key not in self._costs:
            if case.given:
                with torch.inference_mode():
                    self._costs[key] = self.start(self.model, case).macs()
            else:
                self._costs[key] = count_macs(self.model, self.images, case.way, self.labels)
        counts = self._costs[key]
        if case.scope == "stages":
            return sum(counts[stage] for stage in STAGES)
        return sum(counts.values()) * (3 if case.scope == "train" else 1)

    @torch.inference_mode()
    def stored_mib(self, case: Case) -> float | None:
        """MiB of the activations that a case keeps for refining, if it does."""
        if case.scope != "network" or case.way.is_dense:
            return None
        run = self.start(self.model, case)
        if run.memory is None:
            return None
        run.grid_logits()
        return run.memory.num_bytes / 2**20

    # -- runs ----------------------------------------------------------------------------------------------

    def run(self, case: Case) -> Run:
        """What to call to run once."""
        if case.scope == "train":
            return self._training_step(case)
        if case.kind == "peer":
            assert case.peer is not None
            return peer_run(case.peer, *self.plain_module(case))
        run = self._plain_run(case) if case.kind == "plain" else self._our_run(case)
        return torch.inference_mode()(run)

    def _plain_run(self, case: Case) -> Run:
        module, given = self.plain_module(case)
        return lambda: module(given)

    def plain_module(self, case: Case) -> tuple[nn.Module, Tensor]:
        """The `nn.Conv2d` network, or its last stages, and what it is given; channels_last."""
        stride = case.way.output_stride or 8
        key = case.scope, stride
        if key not in self._plain:
            if case.scope == "network":
                self._plain[key] = plain_network(self.model, stride)
            else:
                self._plain[key] = channels_last(plain_stages(self.model.backbone, stride, first=2)).eval()
        if case.scope == "network":
            return self._plain[key], self.images.contiguous(memory_format=torch.channels_last)
        size = self.model.dense_layouts(self.images, 8)[1].size
        return self._plain[key], rows_to_grid(self.features, self.images.shape[0], size)

    def _our_run(self, case: Case) -> Run:
        """Layouts, tables and (in the scope `network`) the mask are made anew in each run."""
        model, way = self.folded_model if case.folded else self.model, case.way
        policy = None if way.is_dense else self.policy(way)
        fixed = None if way.is_dense else self.fine_blocks(way)

        def network() -> Tensor:
            run = model.start(self.images, self.labels)
            if case.given and fixed is not None:
                return run.take(fixed, way).logits()
            return run.follow(way, policy).logits()

        if case.scope == "network":
            return network
        features, backbone = self.features, model.backbone

        def stages() -> Tensor:
            if fixed is None:
                layouts = model.dense_layouts(self.images, way.output_stride or 8)
            else:
                layouts = model.selective_layouts(self.images, fixed)
            third, fourth = (Step(layout, engine=way.engine) for layout in layouts[2:])
            fourth = third if layouts[3] is layouts[2] else fourth
            return backbone.run_stages(features, [third, fourth], 2, layouts[1])[-1]

        return stages

    def _training_step(self, case: Case) -> Run:
        """Forward, cross-entropy, backward, SGD; half precision by autocast."""
        way = case.way
        network: Any = plain_network(self.training_copy) if case.kind == "plain" else self.training_copy
        optimizer = build_optimizer(network, dataclasses.replace(self.setup.config.train, optimizer="sgd"))
        images, half = self.images.float(), self.dtype != torch.float32
        policy = None if way.is_dense else self.policy(way)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, self.dtype, enabled=half):
                if case.kind == "dense":
                    logits = network.dense(images, way.output_stride)
                elif policy is None:
                    logits = network(images)
                else:
                    logits = self.training_copy.start(images, self.labels).follow(way, policy).logits()
            F.cross_entropy(logits.float(), self.labels, ignore_index=IGNORE_INDEX).backward()
            optimizer.step()

        return step

    # -- layouts -------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def tables(self, way: Way) -> list[Table]:
        """The neighbour tables that a run of a selective way builds."""
        run = self.model.start(self.images).take(self.fine_blocks(way), way)
        run.grid_logits()
        layouts = list(dict.fromkeys(run.layouts))
        return [
            Table(run.layouts.index(src), run.layouts.index(dst), *known)
            for src in layouts
            for dst in layouts
            for known in src.known_tables(dst)
        ]

    def layout_run(self, way: Way) -> Run:
        """Only the layouts and tables of a selective way, from its mask on."""
        blocks, tables = self.fine_blocks(way), self.tables(way)
        return torch.inference_mode()(lambda: self.prepare(blocks, tables))

    def prepare(self, fine_blocks: Tensor, tables: Iterable[Table]) -> list[SiteLayout]:
        """Layouts with their tables built."""
        layouts = self.model.selective_layouts(self.images, fine_blocks)
        for src, dst, spacing, exchange, lattice in tables:
            layouts[src].neighbours(layouts[dst], spacing, exchange, lattice)
        layouts[1].rows_at(layouts[2])
        return layouts


def prepare_case(setup: Setup, case: Case) -> Run:
    """For a child process: the run of a case."""
    return Subject(setup).run(case)
