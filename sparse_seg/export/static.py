"""A network for images of one size as one branch-free module: the graph's own run (`run/values.py`) with the
blocks' numbers in place of a mask."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from sparse_seg.errors import SparseSegError
from sparse_seg.export.options import ExportOptions, check_options
from sparse_seg.export.policies import Ranking, StaticRun, static_policy
from sparse_seg.export.tiles import Tiles
from sparse_seg.masks import MaskPolicy
from sparse_seg.ops import Graph
from sparse_seg.ops.upsample import at_least_float32, interpolation_matrix
from sparse_seg.run.card import Card
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.patch import patched
from sparse_seg.run.values import Interpreter
from sparse_seg.run.weights import Tensors
from sparse_seg.sites import Grid, LevelPlan, Sites, grid_size


class StaticNetwork(nn.Module):
    """A network with every shape fixed (but see `ExportOptions.ghosts`): its folded graph, and copies of its
    tensors, named after their layers.

    Args:
        model: in eval mode; stays as it is.

    Attributes:
        choice: the policy; None where the network is dense, or blocks are given.
        normalisation: mean and std of its images, RGB in units of 0..1.
        output_stride: of the network where it runs dense, at most.

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
        if options.dense is None:
            self._prepare_choice(model)
        self.output_stride = options.dense or self.strides[0]
        (trained, align), stride = self._offset, self.geometry.cells(self.output_stride)[folded.graph.output]
        self.tiles = None
        if options.tiles and Tiles.fit(options.size, stride, trained, align):
            cells = grid_size(options.size, stride)
            self.tiles = Tiles(options.batch, cells, options.size, stride, trained)
        self.eval().requires_grad_(False)
        self._prepare()

    def grid_logits(self, images: Tensor, *blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits `[B, K, h, w]` before the last upsampling, and the blocks that are not coarse `[B, k]`, the
        finest first."""
        centred, geometry = self._centred(images), self.geometry
        weights = dict(self.weights.named_buffers())
        tensors = {own: weights[name] for own, name in self.names.items()}
        run = Interpreter(geometry, tensors, centred / self.std if self.has_std else centred)
        if self.options.dense is not None:
            return run.output(run.dense(self.options.dense)).tensor, None
        patches = self.merge == "patch"
        kept = geometry.kept_lattices | (geometry.kept_late if patches else set())
        coarse = run.dense(self.strides[-1], kept)
        features = run.early()[geometry.features].thinned(self.strides[0])
        if self.choice is None:
            chosen = torch.cat(list(blocks), 1) if len(blocks) > 1 else blocks[0]
        else:
            asked: Any = StaticRun(
                centred / self.std, features, lambda every: self._upsampled(run.output(coarse), every)
            )
            chosen = self.ranking(self.choice.scores(asked))
        near = geometry.near(self.options.size) if self.options.ghosts else {}
        sites = Sites.of_numbers(chosen, self.ranking.fine, self.plans, self.exchange, near, self.engine)
        values = run.mixed(sites, coarse if geometry.refines else None, late=not patches)
        if patches:
            return patched(run, sites, coarse, values).tensor, chosen
        return run.output(values).tensor, chosen

    def upsampling(self, grid_logits: Tensor) -> Tensor:
        """Logits `[B, K, h, w]` at the images' size."""
        stride = self.geometry.cells(self.output_stride)[self.geometry.graph.output]
        return self._upsampled(Grid(grid_logits, stride))

    def _upsampled(self, grid: Grid, every: int = 1) -> Tensor:
        """As `ops.upsample.upsample_logits` in float32 or more, always by two matrix products."""
        logits = at_least_float32(grid.tensor)
        key = grid.stride, every, logits.dtype
        if key not in self._matrices:
            geometry = grid.stride, *self._offset, every, logits.dtype, logits.device
            rows, columns = (
                interpolation_matrix(int(cells), length, *geometry)
                for cells, length in zip(logits.shape[2:], self.options.size, strict=True)
            )
            self._matrices[key] = rows, columns.t().contiguous()
        rows, columns = self._matrices[key]
        return torch.matmul(rows, torch.matmul(logits, columns))

    @property
    def _offset(self) -> tuple[int, bool]:
        """Of the logits' upsampling: the stride whose offset it keeps, and whether it aligns corners."""
        graph = self.geometry.graph
        return self.geometry.trained(graph.output), graph.align_corners

    def example(self) -> tuple[Tensor, ...]:
        """Inputs of the right shapes."""
        batch, (height, width) = self.options.batch, self.options.size
        images = torch.zeros(batch, 3, height, width)
        if self.options.input == "uint8":
            images = torch.zeros(batch, height, width, 3, dtype=torch.uint8)
        if self.options.dense is not None or not self.options.given:
            return (images,)
        lists = (self.ranking.fine, self.ranking.middle) if len(self.strides) == 3 else (self.ranking.fine,)
        blocks = torch.arange(sum(lists)).repeat(batch, 1)
        return (images, *blocks.split(lists, 1))

    def interface(self) -> tuple[list[str], list[str]]:
        """Names of inputs and of outputs."""
        inputs, outputs = ["images"], ["classes"]
        if self.options.dense is None:
            outputs.append("fine_blocks")
            if self.choice is None:
                inputs += ["blocks", "middle_blocks"] if self.ranking.middle else ["blocks"]
        if self.options.logits:
            outputs.append("logits")
        return inputs, outputs

    def forward(self, images: Tensor, *blocks: Tensor) -> tuple[Tensor, ...]:
        """Images, and with `given` block numbers, to classes uint8 `[B, H, W]`, if selective fine blocks bool
        `[B, Hc, Wc]`, and if asked for logits `[B, K, H, W]`.

        Args:
            blocks: int64 `[B, k]`, those at the finest stride; with three strides a second list, those at the
                middle one.
        """
        logits, chosen = self.grid_logits(images, *blocks)
        every = self.upsampling(logits) if self.options.logits or self.tiles is None else logits
        if self.tiles is not None:
            outputs = [self.tiles(logits)]
        else:
            outputs = [every.argmax(1).to(torch.uint8)]
        if chosen is not None:
            outputs.append(self._mask(chosen[:, : self.ranking.fine]))
        if self.options.logits:
            outputs.append(every)
        return tuple(outputs)

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
        self.choice = None if options.given else static_policy(policy)

    def _prepare(self) -> None:
        """Make the tables, where the network is."""
        batch, size, device = self.options.batch, self.options.size, self.mean.device
        self._matrices: dict[tuple[int, int, torch.dtype], tuple[Tensor, Tensor]] = {}  # of upsampling
        self.plans = {stride: LevelPlan(batch, size, stride, device) for stride in self.strides[-2::-1]}
        with torch.no_grad():
            self(*(value.to(self.mean if value.is_floating_point() else device) for value in self.example()))

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        super()._apply(*arguments, **options)
        self._prepare()
        return self

    def _centred(self, images: Tensor) -> Tensor:
        """Images as given to float32 `[B, 3, H, W]` less the mean, not yet over the standard deviation."""
        if self.options.input == "uint8":
            images = images.permute(0, 3, 1, 2).float()
        return images - self.mean

    def _mask(self, fine: Tensor) -> Tensor:
        batch, total = self.options.batch, self.blocks[0] * self.blocks[1]
        mask = torch.zeros(batch, total, dtype=torch.bool, device=fine.device)
        mask = mask.scatter(1, fine, torch.ones_like(fine, dtype=torch.bool))
        return mask.reshape(batch, *self.blocks)


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
