"""What a benchmark runs: one network, its input, and the ways to run it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.checkpoint import load_model
from sparse_seg.data.cityscapes import Cityscapes
from sparse_seg.data.dataset import IGNORE_INDEX
from sparse_seg.data.scenes import render_scene
from sparse_seg.data.transforms import normalise
from sparse_seg.evaluation.cost import Macs, count_cost, count_segment
from sparse_seg.evaluation.latency import Run
from sparse_seg.evaluation.peers import peer_run
from sparse_seg.masks import ConfidencePolicy, MaskPolicy
from sparse_seg.models.build import build_model, policy_for
from sparse_seg.models.plain import channels_last, plain_network, plain_stages
from sparse_seg.models.refinement import Refinement
from sparse_seg.models.segmentor import SelectiveSegmentor
from sparse_seg.schema import Config
from sparse_seg.sparse import (
    SelectiveAvgPool2d,
    SelectiveConv2d,
    SelectiveDepthwiseConv2d,
    SiteLayout,
    rows_to_grid,
)
from sparse_seg.training.schedule import build_optimizer

_READERS = (SelectiveConv2d, SelectiveDepthwiseConv2d, SelectiveAvgPool2d)  # of neighbour tables
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
class Way:
    """One way to run the network.

    Args:
        scope: `stages`, layer3 and layer4 from given features; `network`, images to logits; `train`, a step.
        kind: `plain` (the `nn.Conv2d` twin), `dense` (ours on the lattice), `selective`, or `peer`.
        engine: of our network, or the peer's name.
        fast: the form that `for_inference` makes.
        policy: the mask policy of a selective run, None for the config's; `given`, the config's mask, made
            beforehand.
    """

    scope: str
    kind: str
    output_stride: int = 8
    fine_fraction: float | None = None
    engine: str | None = None
    fast: bool = False
    policy: str | None = None

    @property
    def name(self) -> str:
        if self.kind == "selective":
            return f"{self.policy or 'selective'} f={self.fine_fraction:g}"
        return f"{self.kind} OS{self.output_stride}"

    @property
    def form(self) -> str:
        if self.kind == "plain":
            return "nn.Conv2d"
        return f"{self.engine}, fast" if self.fast else f"{self.engine}"


class Table(NamedTuple):
    """A neighbour table that a forward builds: indices of its two layouts among the stages', and how."""

    src: int
    dst: int
    spacing: int
    exchange: str


class Subject:
    """A network, its input, and the ways to run it. Weights are shared by all ways but training's."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.device = setup, torch.device(setup.device)
        self.dtype: torch.dtype = getattr(torch, setup.dtype)
        if setup.checkpoint is None:
            torch.manual_seed(0)
            model = build_model(setup.config)
            randomise_norms(model)
        else:
            model = load_model(setup.checkpoint, setup.config)
        model.auxiliary = None
        self.float_model = model.eval().to(self.device)
        images, labels = scenes(setup)
        self.images, self.labels = images.to(self.device, self.dtype), labels.to(self.device)
        self._plain: dict[tuple[str, int], nn.Module] = {}
        self._costs: dict[tuple[str, int, float | None, str | None], dict[str, Macs]] = {}

    @cached_property
    def model(self) -> SelectiveSegmentor:
        """Ours, in eval mode, in the dtype asked for."""
        if self.dtype == torch.float32:
            return self.float_model
        return copy.deepcopy(self.float_model).to(self.dtype)

    @cached_property
    def fast_model(self) -> SelectiveSegmentor:
        """Its fast form."""
        return self.model.for_inference()

    @cached_property
    def trainee(self) -> SelectiveSegmentor:
        return copy.deepcopy(self.float_model).train()

    @cached_property
    def features(self) -> Tensor:
        """Rows of layer2, `[B * ceil(H/8) * ceil(W/8), C]`: what the last stages read."""
        with torch.inference_mode():
            return self.model.backbone(self.images, self.model.dense_layouts(self.images, 8))[1]

    def policy(self, fraction: float, name: str | None = None) -> MaskPolicy:
        """A policy by name, or the config's."""
        mask = dataclasses.replace(self.setup.config.model.mask, fine_fraction=fraction, threshold=None)
        if name not in (None, "given"):
            mask = dataclasses.replace(mask, policy=name)
        return policy_for(self.model, mask)

    def fine_blocks(self, fraction: float) -> Tensor:
        """The mask by the config's policy on this input; the network runs only for a policy that reads it."""
        policy = self.policy(fraction)
        with torch.inference_mode():
            if policy.reads == "images":
                return policy(self.images, self.labels).clone()
            return self.model.segment(self.images, self.labels, policy).fine_blocks.clone()

    def layouts(self, way: Way) -> list[SiteLayout]:
        if way.fine_fraction is None:
            return self.model.dense_layouts(self.images, way.output_stride)
        return self.model.selective_layouts(self.images, self.fine_blocks(way.fine_fraction))

    def cost(self, way: Way) -> Macs:
        """Multiply-adds of the way's scope: one forward, or in training forward and both gradients (x 3)."""
        key = way.scope, way.output_stride, way.fine_fraction, way.policy
        if key not in self._costs:
            if way.scope == "network" and way.fine_fraction is not None and way.policy != "given":
                policy = self.policy(way.fine_fraction, way.policy)
                self._costs[key] = count_segment(self.model, self.images, policy, self.labels)
            else:
                self._costs[key] = count_cost(self.model, self.images, self.layouts(way))
        counts = self._costs[key]
        parts = STAGES if way.scope == "stages" else tuple(counts)
        passes = 3 if way.scope == "train" else 1
        return Macs(*(passes * sum(numbers) for numbers in zip(*(counts[p] for p in parts), strict=True)))

    def stored_mib(self, way: Way) -> float | None:
        """MiB of the activations that a way keeps for refining, if it does."""
        if way.scope != "network" or way.fine_fraction is None or way.policy == "given":
            return None
        policy = self.policy(way.fine_fraction, way.policy)
        if not isinstance(policy, ConfidencePolicy):
            return None
        run = Refinement(self.model, self.images, policy.stored_dtype)
        run.refine(policy.cut(run.scores(policy)))
        return run.memory.num_bytes / 2**20

    # -- runs ----------------------------------------------------------------------------------------------

    def run(self, way: Way) -> Run:
        """What to call to run once."""
        if way.scope == "train":
            return self._training_step(way)
        if way.kind == "peer":
            assert way.engine is not None
            return peer_run(way.engine, *self._plain_module(way))
        run = self._plain_run(way) if way.kind == "plain" else self._our_run(way)
        return torch.inference_mode()(run)

    def _plain_run(self, way: Way) -> Run:
        module, given = self._plain_module(way)
        return lambda: module(given)

    def _plain_module(self, way: Way) -> tuple[nn.Module, Tensor]:
        """The `nn.Conv2d` network, or its last stages, and what it is given; channels_last."""
        key = way.scope, way.output_stride
        if key not in self._plain:
            if way.scope == "network":
                self._plain[key] = plain_network(self.model, way.output_stride)
            else:
                stages = plain_stages(self.model.backbone, way.output_stride, first=3)
                self._plain[key] = channels_last(stages).eval()
        if way.scope == "network":
            return self._plain[key], self.images.contiguous(memory_format=torch.channels_last)
        size = self.model.dense_layouts(self.images, 8)[1].size
        return self._plain[key], rows_to_grid(self.features, self.images.shape[0], size)

    def _our_run(self, way: Way) -> Run:
        """Layouts, tables and (in the scope `network`) the mask are made anew in each run."""
        model = self.fast_model if way.fast else self.model
        policy = fixed = None
        if way.fine_fraction is not None:
            policy = self.policy(way.fine_fraction, way.policy)
            fixed = self.fine_blocks(way.fine_fraction)

        def layouts(fine_blocks: Tensor | None) -> list[SiteLayout]:
            if fine_blocks is None:
                return model.dense_layouts(self.images, way.output_stride)
            return model.selective_layouts(self.images, fine_blocks)

        def network() -> Tensor:
            use_engine(model, way.engine)
            if policy is None or way.policy == "given":
                return model.outputs(self.images, layouts(fixed)).logits
            return model.segment(self.images, self.labels, policy).outputs.logits

        if way.scope == "network":
            return network
        features = self.features

        def stages() -> Tensor:
            use_engine(model, way.engine)
            _, eighth, third, fourth = layouts(fixed)
            return model.backbone.layer4(model.backbone.layer3(features, eighth, third), third, fourth)

        return stages

    def _training_step(self, way: Way) -> Run:
        """Forward, cross-entropy, backward, SGD; half precision by autocast."""
        network = plain_network(self.trainee) if way.kind == "plain" else self.trainee
        optimizer = build_optimizer(network, dataclasses.replace(self.setup.config.train, optimizer="sgd"))
        images, half = self.images.float(), self.dtype != torch.float32
        policy = None if way.fine_fraction is None else self.policy(way.fine_fraction)

        def step() -> None:
            use_engine(network, way.engine)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, self.dtype, enabled=half):
                if policy is None:
                    logits = network(images)
                else:
                    logits = self.trainee.segment(images, self.labels, policy).outputs.logits
            F.cross_entropy(logits.float(), self.labels, ignore_index=IGNORE_INDEX).backward()
            optimizer.step()

        return step

    # -- layouts -------------------------------------------------------------------------------------------

    def tables(self, way: Way) -> list[Table]:
        """The neighbour tables that a run of this way builds."""
        layouts, found = self.layouts(way), []

        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert isinstance(module, _READERS)
            if module.spacing is None:  # it has a table of its own kind
                return
            src, dst = (next(i for i, one in enumerate(layouts) if one is layout) for layout in inputs[1:])
            found.append(Table(src, dst, module.spacing, module.exchange))

        convs = [m for n, m in self.model.named_modules() if isinstance(m, _READERS) and _in(n, way)]
        hooks = [conv.register_forward_pre_hook(note) for conv in convs]
        try:
            with torch.inference_mode():
                self.model.outputs(self.images, layouts)
        finally:
            for hook in hooks:
                hook.remove()
        return [table for table in dict.fromkeys(found) if layouts[table.dst].num_extra]

    def layout_run(self, way: Way) -> Run:
        """Only the layouts and tables of a selective way, from its mask on."""
        assert way.fine_fraction is not None
        blocks, tables = self.fine_blocks(way.fine_fraction), self.tables(way)
        return torch.inference_mode()(lambda: self.prepare(blocks, tables))

    def prepare(self, fine_blocks: Tensor, tables: Iterable[Table]) -> list[SiteLayout]:
        """Layouts with their tables built."""
        layouts = self.model.selective_layouts(self.images, fine_blocks)
        for table in tables:
            layouts[table.src].neighbours(layouts[table.dst], table.spacing, table.exchange)
        layouts[1].rows_at(layouts[2])
        return layouts


def _in(name: str, way: Way) -> bool:
    return way.scope != "stages" or any(f".{stage}." in name for stage in STAGES)


def scenes(setup: Setup) -> tuple[Tensor, Tensor]:
    """Rendered street scenes: normalised images `[B, 3, H, W]` and train ids `[B, H, W]` (int64)."""
    data, ids = setup.config.data, np.full(256, IGNORE_INDEX)
    for label_id, train_id in Cityscapes.train_ids.items():
        ids[label_id] = train_id
    pairs = [render_scene(np.random.default_rng(seed), setup.size) for seed in range(setup.batch)]
    images = torch.stack([normalise(image, data.mean, data.std) for image, _ in pairs])
    labels = torch.stack([torch.from_numpy(ids[label].astype(np.int64)) for _, label in pairs])
    classes = setup.config.model.num_classes
    return images, labels if classes is None else labels.where(labels < classes, IGNORE_INDEX)


@torch.no_grad()
def randomise_norms(model: SelectiveSegmentor, seed: int = 0) -> None:
    """Statistics of every batch norm near those of its activations, so that these keep order one."""
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    model.train().dense(torch.randn(2, 3, 64, 96, generator=generator))
    for norm in norms:
        assert norm.running_var is not None
        norm.running_var.mul_(torch.rand(norm.num_features, generator=generator) + 0.5).add_(0.05)
        norm.momentum = 0.1
    model.eval()


def use_engine(model: nn.Module, engine: str | None) -> None:
    """Let the 3x3 convolutions run by an engine."""
    for module in model.modules():
        if isinstance(module, SelectiveConv2d):
            module.__dict__["engine"] = engine or "gather"


def prepare_way(setup: Setup, way: Way) -> Run:
    """For a child process: the run of a way."""
    return Subject(setup).run(way)
