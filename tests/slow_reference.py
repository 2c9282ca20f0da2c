"""The selective network by loops over cells and plain `F.conv2d`: the reference of P3 and of gradients."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import DenseBasicBlock, DenseBottleneck, DenseDeepLabV3, DenseLite, DenseSegmentor


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

    @functools.cache  # noqa: B019 (a handful of small objects per test)
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
    """Rebuild the whole grid of `src`, convolve it densely (weight OIHW), read the sites of `dst`."""
    return dst.read(F.conv2d(src.rebuild(rows, exchange), weight, None, 1, dilation, dilation))


@dataclass
class SlowSelective:
    """A dense OS8 network whose selective stages see only sites: P3's reference."""

    network: DenseSegmentor
    exchange: str

    def features(self, images: Tensor, fine_blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of layer3 and layer4."""
        backbone = self.network.backbone
        x = backbone.layer2(
            backbone.layer1(F.max_pool2d(F.relu(backbone.bn1(backbone.conv1(images))), 3, 2, 1))
        )
        size = (x.shape[2], x.shape[3])
        dense, self.sites = SlowSites(len(x), size), SlowSites(len(x), size, [fine_blocks])
        rows, src, outputs = dense.read(x), dense, []
        for stage in (backbone.layer3, backbone.layer4):
            for block in stage:
                assert isinstance(block, (DenseBasicBlock, DenseBottleneck))
                rows, src = self._block(block, rows, src), self.sites
            outputs.append(rows)
        return outputs[0], outputs[1]

    def logits(self, images: Tensor, fine_blocks: Tensor) -> Tensor:
        rows, head = self.features(images, fine_blocks)[1], self.network.head
        if isinstance(head, DenseLite):
            rows = _each_site(head.reduce, rows)
        else:
            assert isinstance(head, DenseDeepLabV3)
            rows = _each_site(head.project, torch.cat(self._aspp(head, rows, fine_blocks), 1))
        logits = head.classifier(head.refine(self.sites.rebuild(rows, "linear")))
        return F.interpolate(logits, (images.shape[2], images.shape[3]), mode="bilinear", align_corners=False)

    def _conv(self, conv: nn.Conv2d, rows: Tensor, src: SlowSites) -> Tensor:
        return slow_conv(rows, conv.weight, src, self.sites, conv.dilation[0], self.exchange)

    def _block(self, block: DenseBasicBlock | DenseBottleneck, rows: Tensor, src: SlowSites) -> Tensor:
        at_sites = rows if src is self.sites else self.sites.read(src.rebuild(rows, "none"))
        shortcut = _each_site(block.downsample, at_sites) if block.downsample else at_sites
        if isinstance(block, DenseBasicBlock):
            out = F.relu(_each_site(block.bn1, self._conv(block.conv1, rows, src)))
            out = _each_site(block.bn2, self._conv(block.conv2, out, self.sites))
        else:
            out = F.relu(_each_site(block.bn1, _each_site(block.conv1, rows)))
            out = F.relu(_each_site(block.bn2, self._conv(block.conv2, out, src)))
            out = _each_site(block.bn3, _each_site(block.conv3, out))
        return F.relu(out + shortcut)

    def _aspp(self, head: DenseDeepLabV3, rows: Tensor, fine_blocks: Tensor) -> list[Tensor]:
        first, *atrous, pool = (branch for branch in head.convs if isinstance(branch, nn.Sequential))
        branches = [_each_site(first, rows)]
        for branch in atrous:
            assert isinstance(branch[0], nn.Conv2d)
            branches.append(_each_site(branch[1:], self._conv(branch[0], rows, self.sites)))
        images = torch.tensor([b for b, _, _ in self.sites.cells])
        areas = torch.tensor([1.0 if fine_blocks[b, y // 2, x // 2] else 4.0 for b, y, x in self.sites.cells])
        means = []
        for b in range(self.sites.batch):
            share = (areas * (images == b)).to(rows)
            means.append((share[:, None] * rows).sum(0) / share.sum())
        return [*branches, _each_site(pool, torch.stack(means))[images]]


def _each_site(module: nn.Module, rows: Tensor) -> Tensor:
    """Run 1x1 convolutions and batch norms on rows `[N, C]`, each an image of one pixel."""
    return module(rows[:, :, None, None])[:, :, 0, 0]
