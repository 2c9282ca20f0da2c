"""A network for images of one size as one branch-free module: the graph's own run (`run/values.py`) with the
blocks' numbers in place of a mask."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from sparse_seg.errors import SparseSegError
from sparse_seg.export.options import ExportOptions, check_options
from sparse_seg.export.tiles import Tiles
from sparse_seg.masks import MaskPolicy, blur_scores
from sparse_seg.ops import Graph
from sparse_seg.ops.upsample import at_least_float32, interpolation_matrix
from sparse_seg.run.card import Card
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.patch import patched
from sparse_seg.run.side_stream import SideStream
from sparse_seg.run.values import Interpreter
from sparse_seg.run.weights import Tensors
from sparse_seg.sites import Grid, LevelPlan, Sites, grid_size


class _Asked(NamedTuple):
    """What a policy may ask, see `masks.PolicyInput` (but what only bounds may)."""

    images: Tensor
    features: Callable[[], Tensor]
    coarse_logits: Callable[..., Tensor]
    labels: None = None


class Ranking(NamedTuple):
    """The blocks of the highest scores: how many of an image get the finest stride, and with three strides
    the middle one; and whether scores are blurred before."""

    fine: int
    middle: int
    blur: bool

    def __call__(self, scores: Tensor) -> Tensor:
        """Scores `[B, Hc, Wc]` to block numbers `[B, fine + middle]`, in rank."""
        scores = blur_scores(scores) if self.blur else scores
        flat, count = scores.flatten(1), self.fine + self.middle
        if torch.jit.is_tracing():  # ONNX's TopK takes equal scores in raster order
            return flat.topk(count, 1).indices
        return flat.sort(dim=1, descending=True, stable=True).indices[:, :count]


class StaticNetwork(nn.Module):
    """A network with every shape fixed (but see `ExportOptions.ghosts`): its folded graph, and copies of its
    tensors, named after their layers.

    Args:
        model: in eval mode; stays as it is.

    Attributes:
        choice: the policy; None where the network is dense, or blocks are given.
        lists: how many blocks each list has that is given, at the finest stride and at the middle one.
        normalisation: mean and std of its images, RGB in units of 0..1.
        output_stride: of the network where it runs dense, at most.
        second_stream: whether extra sites run on a CUDA stream of their own, beside the lattices; read when
            the network goes to a device.

    Raises:
        SparseSegError: options that do not fit the model.
        ValueError: an unknown merge.
    """

    mean: Tensor
    std: Tensor
    plans: dict[int, LevelPlan]

    def __init__(self, model: SelectiveNetwork, options: ExportOptions) -> None:
        check_options(model, options)
        super().__init__()
        self.options, self.strides = options, model.strides
        self.exchange, self.merge = model.exchange, options.merge or model.merge
        self.classes = model.num_classes
        self.second_stream = False
        self.engine = model.engine if model.engine == "triton" else "gather"  # no graph has it
        card = model.card or Card.unnamed(model.num_classes)
        self.normalisation = options.mean or card.mean, options.std or card.std
        scale = 1.0 if options.input == "float" else 255.0
        for name, values in zip(("mean", "std"), self.normalisation, strict=True):
            self.register_buffer(name, (torch.tensor(values) * scale).reshape(1, 3, 1, 1), persistent=False)
        folded = model.for_inference()
        self.geometry, tensors = folded.geometry, folded.tensors
        self.has_std = not _fold_std(folded.graph, tensors, self.std)
        self.names = _names_by_layer(folded.graph)
        self.weights = Tensors({name: tensors[own].float() for own, name in self.names.items()})
        self.choice: MaskPolicy | None = None
        self.lists: list[int] = []
        if options.dense is None:
            self._prepare_choice(model)
        self.output_stride = options.dense or self.strides[0]
        output = folded.graph.output
        self._stride = stride = self.geometry.cells(self.output_stride)[output]  # of the logits' grid, px
        # of their upsampling: the stride whose offset it keeps, and whether it aligns corners
        self._offset = trained, align = self.geometry.trained(output), folded.graph.align_corners
        self.tiles = None
        if options.tiles and Tiles.fit(options.size, stride, trained, align):
            cells = grid_size(options.size, stride)
            self.tiles = Tiles(options.batch, cells, options.size, stride, trained)
        self.eval().requires_grad_(False)
        self._prepare()

    def grid_logits(self, images: Tensor, *blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits `[B, K, h, w]` before the last upsampling, and the blocks that are not coarse `[B, k]`, the
        finest first."""
        images = images.permute(0, 3, 1, 2).float() if self.options.input == "uint8" else images
        centred, geometry = images - self.mean, self.geometry
        weights = dict(self.weights.named_buffers())
        tensors = {own: weights[name] for own, name in self.names.items()}
        images = centred / self.std if self.has_std else centred
        run = Interpreter(geometry, tensors, images, side=self.side)
        if self.options.dense is not None:
            return run.output(run.dense(self.options.dense)).tensor, None
        patches = self.merge == "patch"
        kept = geometry.kept_lattices | (geometry.kept_late if patches else set())
        features = run.early()[geometry.features].thinned(self.strides[0])
        if self.side is not None:
            self.side.computed()
        coarse = run.dense(self.strides[-1], kept)
        with nullcontext() if self.side is None else self.side.beside():
            if self.choice is None:
                chosen = torch.cat(blocks, 1) if len(blocks) > 1 else blocks[0]
            else:
                output = geometry.graph.output
                asked: Any = _Asked(
                    centred / self.std,
                    lambda: features,
                    lambda every=1, _=None: self._upsampled(run.awaited(coarse, output), every),
                )
                chosen = self.ranking(self.choice.scores(asked))
            near = geometry.near(self.options.size) if self.options.ghosts else {}
            sites = Sites.of_numbers(chosen, self.ranking.fine, self.plans, self.exchange, near, self.engine)
            values = run.mixed(sites, coarse if geometry.refines else None, late=False, last=True)
        if patches:
            return patched(run, sites, coarse, values).tensor, chosen
        return run.late(values).tensor, chosen

    def upsampling(self, grid_logits: Tensor) -> Tensor:
        """Logits `[B, K, h, w]` at the images' size."""
        return self._upsampled(Grid(grid_logits, self._stride))

    def _upsampled(self, grid: Grid, every: int = 1) -> Tensor:
        """As `ops.upsample.upsample_logits` in float32 or more, always by two matrix products."""
        logits = at_least_float32(grid.tensor)
        if (grid.stride, every) not in self._matrices:
            geometry = grid.stride, *self._offset, every, logits.dtype, logits.device
            axes = zip(map(int, logits.shape[2:]), self.options.size, strict=True)
            rows, columns = (interpolation_matrix(*axis, *geometry) for axis in axes)
            self._matrices[grid.stride, every] = rows, columns.t().contiguous()
        rows, columns = self._matrices[grid.stride, every]
        return torch.matmul(rows, torch.matmul(logits, columns))

    def example(self) -> tuple[Tensor, ...]:
        """Inputs of the right shapes."""
        batch, size = self.options.batch, self.options.size
        images = torch.zeros(batch, 3, *size)
        if self.options.input == "uint8":
            images = torch.zeros(batch, *size, 3, dtype=torch.uint8)
        return images, *torch.arange(sum(self.lists)).repeat(batch, 1).split(self.lists, 1)

    def interface(self) -> tuple[list[str], list[str]]:
        """Names of inputs and of outputs."""
        inputs, outputs = ["images", "blocks", "middle_blocks"][: 1 + len(self.lists)], ["classes"]
        outputs += ["fine_blocks"] if self.options.dense is None else []
        return inputs, outputs + (["logits"] if self.options.logits else [])

    def forward(self, images: Tensor, *blocks: Tensor) -> tuple[Tensor, ...]:
        """Images, and with `given` block numbers, to classes uint8 `[B, H, W]`, if selective fine blocks bool
        `[B, Hc, Wc]`, and if asked for logits `[B, K, H, W]`.

        Args:
            blocks: int64 `[B, k]`, those at the finest stride; with three strides a second list, those at the
                middle one.
        """
        logits, chosen = self.grid_logits(images, *blocks)
        every = self.upsampling(logits) if self.options.logits or self.tiles is None else logits
        classes = every.argmax(1).to(torch.uint8) if self.tiles is None else self.tiles(logits)
        mask = [] if chosen is None else [self._mask(chosen[:, : self.ranking.fine])]
        return classes, *mask, *([every] if self.options.logits else [])

    def _prepare_choice(self, model: SelectiveNetwork) -> None:
        options, coarsest = self.options, self.strides[-1]
        self.blocks = grid_size(options.size, coarsest)
        total, policy = self.blocks[0] * self.blocks[1], options.policy or model.policy
        fine = policy.fine_fraction if options.fine_fraction is None else options.fine_fraction
        assert fine is not None
        middle = min(policy.middle_fraction or 0, 1 - fine) if len(self.strides) == 3 else 0
        count = round(fine * total)
        self.ranking = Ranking(count, round((fine + middle) * total) - count, policy.blur)
        if count == 0:
            raise SparseSegError(
                f"a fine fraction of {fine:g} gives none of {total} blocks; choose a larger one, or --dense "
                f"{coarsest}"
            )
        if options.given:
            self.lists = [count for count in self.ranking[:2] if count]
        else:
            self.choice = _static_policy(policy)

    def _prepare(self) -> None:
        """Make the tables, where the network is."""
        batch, size, device = self.options.batch, self.options.size, self.mean.device
        has_side = self.second_stream and self.geometry.refines and device.type == "cuda"
        self.side = SideStream(device) if has_side else None
        self._matrices: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # of upsampling
        finer = self.strides[-2::-1]
        self.plans = {one: LevelPlan(batch, size, one, device, in_graph=True) for one in finer}
        with torch.no_grad():
            self(*(value.to(self.mean if value.is_floating_point() else device) for value in self.example()))

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        super()._apply(*arguments, **options)
        self._prepare()
        return self

    def _mask(self, fine: Tensor) -> Tensor:
        batch, total = self.options.batch, self.blocks[0] * self.blocks[1]
        mask = torch.zeros(batch, total, dtype=torch.bool, device=fine.device)
        mask = mask.scatter(1, fine, torch.ones_like(fine, dtype=torch.bool))
        return mask.reshape(batch, *self.blocks)


def _static_policy(policy: MaskPolicy) -> MaskPolicy:
    """A copy whose scores can be traced."""
    policy = copy.deepcopy(policy)
    for part in policy.modules():
        if isinstance(part, nn.BatchNorm2d) and not part.affine:  # ONNX's operator has a weight and a bias
            part.weight = nn.Parameter(torch.ones(part.num_features), requires_grad=False)
            part.bias = nn.Parameter(torch.zeros(part.num_features), requires_grad=False)
    return policy


def _names_by_layer(graph: Graph) -> dict[str, str]:
    """For each tensor of a graph `LAYER.ROLE`, of the first node that reads it."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for node in graph.nodes:
        for role, own in node.tensors.items():
            if own in names:
                continue
            layer, number = node.layer or node.name.replace(".", "_"), 1
            while (name := f"{layer}{f'_{number}' if number > 1 else ''}.{role}") in taken:
                number += 1
            names[own] = name
            taken.add(name)
    return names


def _fold_std(graph: Graph, tensors: dict[str, Tensor], std: Tensor) -> bool:
    """Make the division by the standard deviation part of the first weights; whether that was possible."""
    users = graph.users()[graph.nodes[0].name]
    names = {node.tensors.get("weight", "") for node in users}
    if any(node.op != "conv2d" or node.options["groups"] != 1 for node in users):
        return False
    if any(set(node.tensors.values()) & names for node in graph.nodes if node not in users):
        return False
    for name in names:
        tensors[name] = tensors[name] / std.to(tensors[name])
    return True
