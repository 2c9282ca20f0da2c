"""The selective network by loops over cells and plain `F.conv2d`: the reference of P3 and of gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import DenseBasicBlock, DenseBottleneck, DenseDeepLabV3, DenseLite, DenseSegmentor

Method = TypeVar("Method", bound=Callable[..., Any])


def once(method: Method) -> Method:
    """A method that remembers its results, as long as its object lives."""

    @functools.wraps(method)
    def look_up(self: Any, *key: Any) -> Any:
        memory = self.__dict__.setdefault(f"_{method.__name__}", {})
        if key not in memory:
            memory[key] = method(self, *key)
        return memory[key]

    return cast(Method, look_up)


class SlowSites:
    """Sites of nested levels, by loops over cells: the order of rows, and what stands where no site is."""

    def __init__(self, batch: int, size: tuple[int, int], splits: Sequence[Tensor] = ()) -> None:
        self.batch, self.size, self.sizes = batch, size, [size]
        for _ in splits:
            self.sizes.insert(0, (-(-self.sizes[0][0] // 2), -(-self.sizes[0][1] // 2)))
        cells = _all_cells(batch, self.sizes[0])
        self.rows_of = [{cell: row for row, cell in enumerate(cells)}]  # per level: cell -> row
        self.splits = [split.tolist() for split in splits]
        for split, coarse, fine in zip(self.splits, self.sizes, self.sizes[1:], strict=False):
            last = self.rows_of[-1]
            rows = {(b, 2 * y, 2 * x): row for (b, y, x), row in last.items()}
            for b, y, x in _all_cells(batch, coarse):
                assert not split[b][y][x] or (b, y, x) in last
                for dy, dx in ((0, 1), (1, 0), (1, 1)) if split[b][y][x] else ():
                    if 2 * y + dy < fine[0] and 2 * x + dx < fine[1]:
                        rows[b, 2 * y + dy, 2 * x + dx] = len(rows)
            self.rows_of.append(rows)

    @property
    def cells(self) -> list[tuple[int, int, int]]:
        """The finest cell (b, y, x) of each row, in row order."""
        return sorted(self.rows_of[-1], key=self.rows_of[-1].__getitem__)

    def owner(self, cell: tuple[int, int, int], level: int = -1) -> int:
        """The row of the cell's own site, or else of its block's."""
        level %= len(self.rows_of)
        b, y, x = cell
        own = self.rows_of[level].get(cell)
        return own if own is not None else self.owner((b, y // 2, x // 2), level - 1)

    def level(self, cell: tuple[int, int, int]) -> int:
        """How many of the splits the finest cell's block has gone through."""
        b, y, x = cell
        last = len(self.splits)
        return sum(s[b][y >> last - n][x >> last - n] for n, s in enumerate(self.splits))

    def bilinear(self, cell: tuple[int, int, int], level: int = -1) -> dict[int, float]:
        """Row -> weight: the cell's own site, or the mean of the 2 or 4 around it on the level above."""
        level %= len(self.rows_of)
        if cell in self.rows_of[level]:
            return {self.rows_of[level][cell]: 1.0}
        b, y, x = cell
        height, width = self.sizes[level - 1]
        ys = [v for v in {y // 2, (y + 1) // 2} if v < height]
        xs = [v for v in {x // 2, (x + 1) // 2} if v < width]
        weights: dict[int, float] = {}
        for v, u in product(ys, xs):
            for row, weight in self.bilinear((b, v, u), level - 1).items():
                weights[row] = weights.get(row, 0.0) + weight / (len(ys) * len(xs))
        return weights

    @once
    def rebuild_matrix(self, exchange: str) -> Tensor:
        """`[B*H*W, N]` float64: rows to the whole grid, cells without a site by the exchange rule."""
        places = _all_cells(self.batch, self.size)
        matrix = torch.zeros(len(places), len(self.rows_of[-1]), dtype=torch.float64)
        for place, cell in enumerate(places):
            if exchange == "linear" or cell in self.rows_of[-1]:
                for row, weight in self.bilinear(cell).items():
                    matrix[place, row] = weight
            elif exchange == "nearest":
                matrix[place, self.owner(cell)] = 1
        return matrix

    def rebuild(self, rows: Tensor, exchange: str) -> Tensor:
        """Rows `[N, C]` to the whole grid `[B, C, H, W]`."""
        grid = self.rebuild_matrix(exchange).to(rows) @ rows
        return grid.view(self.batch, *self.size, rows.shape[1]).permute(0, 3, 1, 2)

    def read(self, grid: Tensor) -> Tensor:
        """`[B, C, H, W]` to rows `[N, C]`."""
        b, y, x = torch.tensor(self.cells, device=grid.device).T
        return grid[b, :, y, x]


def _all_cells(batch: int, size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Every (b, y, x) of a grid, row-major."""
    return list(product(range(batch), range(size[0]), range(size[1])))


def slow_conv(
    rows: Tensor, weight: Tensor, src: SlowSites, dst: SlowSites, dilation: int, exchange: str
) -> Tensor:
    """Rebuild the whole grid of `src`, convolve it densely (weight OIHW), read the sites of `dst`.

    With `separate`, once for each level of `src`: on a grid of its sites alone, read where that level is.
    """

    def conv(rows: Tensor) -> Tensor:
        return dst.read(F.conv2d(src.rebuild(rows, exchange), weight, None, 1, dilation, dilation))

    if exchange != "separate":
        return conv(rows)
    own, asked = (torch.tensor([src.level(cell) for cell in sites.cells])[:, None] for sites in (src, dst))
    return sum(conv(rows * (own == n)) * (asked == n) for n in range(len(src.sizes)))  # type: ignore[return-value]


STAGE_STRIDES = (4, 8, 16, 32)


@dataclass
class SlowSelective:
    """A dense network at the finest stride whose selective stages see only sites: P3's reference.

    Called again with `refine`, sites of the call before keep the values they had there, in every layer.
    """

    network: DenseSegmentor
    exchange: str
    strides: tuple[int, ...] = (8, 16)
    refine: bool = False
    kept: list[dict[tuple[int, int, int], Tensor]] = field(default_factory=list)
    stage_sites: list[SlowSites] = field(default_factory=list)

    def features(self, images: Tensor, levels: Tensor) -> list[Tensor]:
        """Rows of the stages whose stride the mask decides, at `stage_sites`."""
        backbone, stages = self.network.backbone, ["layer1", "layer2", "layer3", "layer4"]
        self.layer, self.fresh = 0, not (self.refine and self.kept)
        levels = levels.long() * (len(self.strides) - 1 if levels.dtype == torch.bool else 1)
        x = F.max_pool2d(F.relu(backbone.bn1(backbone.conv1(images))), 3, 2, 1)
        while STAGE_STRIDES[4 - len(stages)] <= self.strides[0]:
            x, stages = getattr(backbone, stages[0])(x), stages[1:]
        size = (x.shape[2], x.shape[3])
        src = SlowSites(len(x), size)
        rows, outputs, self.stage_sites = src.read(x), [], []
        for stage in stages:
            stride = min(STAGE_STRIDES[int(stage[-1]) - 1], self.strides[-1])
            self.sites = SlowSites(len(x), size, self._splits(levels, stride, size))
            for block in getattr(backbone, stage):
                assert isinstance(block, (DenseBasicBlock, DenseBottleneck))
                rows, src = self._block(block, rows, src), self.sites
            outputs.append(rows)
            self.stage_sites.append(self.sites)
        return outputs

    def _splits(self, levels: Tensor, lattice: int, size: tuple[int, int]) -> list[Tensor]:
        """From the lattice's stride on: a cell is split if its block's stride is finer than the cell's."""
        splits = []
        for stride in (stride for stride in self.strides[::-1] if self.strides[0] < stride <= lattice):
            shape = [-(-length * self.strides[0] // stride) for length in size]
            split = torch.zeros(len(levels), *shape, dtype=torch.bool)
            for b, y, x in product(*map(range, split.shape)):
                level = int(levels[b, y * stride // self.strides[-1], x * stride // self.strides[-1]])
                split[b, y, x] = self.strides[-1] // 2**level < stride
            splits.append(split)
        return splits

    def grid_logits(self, images: Tensor, levels: Tensor) -> Tensor:
        """At the finest stride."""
        rows, head = self.features(images, levels)[-1], self.network.head
        if isinstance(head, DenseLite):
            rows = _each_site(head.reduce, rows)
        else:
            assert isinstance(head, DenseDeepLabV3)
            rows = self._aspp(head, rows, levels)
        assert isinstance(head.classifier, nn.Conv2d)
        return head.classifier(head.refine(self.sites.rebuild(rows, "linear")))

    def logits(self, images: Tensor, levels: Tensor) -> Tensor:
        logits = self.grid_logits(images, levels)
        return F.interpolate(logits, (images.shape[2], images.shape[3]), mode="bilinear", align_corners=False)

    def _keep(self, rows: Tensor) -> Tensor:
        """Rows of a layer's output, known sites with the values they had."""
        cells = self.sites.cells
        if self.fresh:
            self.kept = [*self.kept[: self.layer], {}]
        known = self.kept[self.layer]
        rows = torch.stack([known.get(cell, row) for cell, row in zip(cells, rows, strict=True)])
        known.update(zip(cells, rows, strict=True))
        self.layer += 1
        return rows

    def _conv(self, conv: nn.Conv2d, rows: Tensor, src: SlowSites) -> Tensor:
        return slow_conv(rows, conv.weight, src, self.sites, conv.dilation[0], self.exchange)

    def _block(self, block: DenseBasicBlock | DenseBottleneck, rows: Tensor, src: SlowSites) -> Tensor:
        at_sites = rows if src is self.sites else self.sites.read(src.rebuild(rows, "none"))
        shortcut = _each_site(block.downsample, at_sites) if block.downsample else at_sites
        if isinstance(block, DenseBasicBlock):
            out = self._keep(F.relu(_each_site(block.bn1, self._conv(block.conv1, rows, src))))
            out = _each_site(block.bn2, self._conv(block.conv2, out, self.sites))
        else:
            out = F.relu(_each_site(block.bn1, _each_site(block.conv1, rows)))
            out = self._keep(F.relu(_each_site(block.bn2, self._conv(block.conv2, out, src))))
            out = _each_site(block.bn3, _each_site(block.conv3, out))
        return self._keep(F.relu(out + shortcut))

    def _aspp(self, head: DenseDeepLabV3, rows: Tensor, levels: Tensor) -> Tensor:
        """Its output depends on the mask everywhere, by the pooled branch: only the 3x3 branches are kept."""
        first, *atrous, pool = (branch for branch in head.convs if isinstance(branch, nn.Sequential))
        branches = [_each_site(first, rows)]
        for branch in atrous:
            assert isinstance(branch[0], nn.Conv2d)
            branches.append(self._keep(_each_site(branch[1:], self._conv(branch[0], rows, self.sites))))
        images = torch.tensor([b for b, _, _ in self.sites.cells])
        top, steps = len(self.strides) - 1, self.strides[-1] // self.strides[0]
        levels = levels.long() * (top if levels.dtype == torch.bool else 1)
        areas = [4.0 ** (top - int(levels[b, y // steps, x // steps])) for b, y, x in self.sites.cells]
        means = []
        for b in range(self.sites.batch):
            share = (torch.tensor(areas) * (images == b)).to(rows)
            means.append((share[:, None] * rows).sum(0) / share.sum())
        branches.append(_each_site(pool, torch.stack(means))[images])
        return _each_site(head.project, torch.cat(branches, 1))


def _each_site(module: nn.Module, rows: Tensor) -> Tensor:
    """Run 1x1 convolutions and batch norms on rows `[N, C]`, each an image of one pixel."""
    return module(rows[:, :, None, None])[:, :, 0, 0]
