"""Residual blocks on rows: convolutions with batch norms, and a shortcut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.sparse import (
    SelectiveAvgPool2d,
    SelectiveConv2d,
    SelectiveLinear,
    SiteLayout,
    Step,
    select_rows,
)
from sparse_seg.sparse.conv import plain_norm


class Residual(nn.Module):
    """Convolutions with batch norm and ReLU, the last without ReLU; plus the shortcut; ReLU.

    The convolutions are `conv1`, `conv2`, ..., their norms `bn1`, `bn2`, ... A subclass says which they are,
    and has all forms from here.

    Args:
        convs: in order, of the selective layers; one of them may go to other sites.
        channels: of the input.
        projects: whether the shortcut has a 1x1 convolution.
        pool: px of the window step of the shortcut's 2x2 mean before it; None: no mean, sites are picked.
        exchange: rule of that mean.
    """

    expansion = 1  # channels of the output over `width`

    def __init__(
        self, convs: Sequence[Any], channels: int, projects: bool, pool: int | None, exchange: str
    ) -> None:
        super().__init__()
        self.depth, width = len(convs), convs[-1].out_channels
        for number, conv in enumerate(convs, start=1):
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm1d(conv.out_channels))
        self.downsample: Any = None
        if projects:
            self.downsample = nn.Sequential(SelectiveLinear(channels, width), nn.BatchNorm1d(width))
        self.pool = None if pool is None else SelectiveAvgPool2d(pool, exchange)

    @property
    def convs(self) -> list[tuple[Any, Any]]:
        """The convolutions with their norms."""
        return [(self.get_submodule(conv), self.get_submodule(norm)) for conv, norm in self.norm_pairs()]

    def forward(self, rows: Tensor, src: SiteLayout | Step, dst: SiteLayout | Step) -> Tensor:
        """Rows `[src.num_run, channels]` to `[dst.num_run, expansion * width]`."""
        src, dst = Step.of(src), Step.of(dst)
        out, at = rows, src
        for number, (conv, norm) in enumerate(self.convs, start=1):
            out, at = norm(conv(out, at, dst)), conv.sites(at, dst)
            out = F.relu(out, inplace=True) if number < self.depth else out
        shortcut = self.pool(rows, src, dst) if self.pool else select_rows(rows, src, dst, self)
        out += self.downsample(shortcut) if self.downsample else shortcut
        return F.relu(out, inplace=True)

    def norm_pairs(self) -> list[tuple[str, str]]:
        return [(f"conv{number}", f"bn{number}") for number in range(1, self.depth + 1)]

    def plain(self, src: int, dst: int) -> PlainResidual:
        """Dense, from stride `src` to `dst`, px."""
        branch, at = list[nn.Module](), src
        for conv, norm in self.convs:
            branch += [conv.plain(at, conv.sites(at, dst)), plain_norm(norm), nn.ReLU(inplace=True)]
            at = conv.sites(at, dst)
        shortcut = list[nn.Module]()
        if self.pool is not None:
            shortcut.append(self.pool.plain(src, dst))
        if self.downsample is not None:
            linear, norm = self.downsample
            shortcut += [linear.plain(dst if self.pool else src, dst), plain_norm(norm)]
        return PlainResidual(nn.Sequential(*branch[:-1]), nn.Sequential(*shortcut))

    def macs(self, src: Step, dst: Step) -> int:
        total, at = 0, src
        for conv, _ in self.convs:
            total, at = total + conv.macs(at, dst), conv.sites(at, dst)
        return total + (self.downsample[0].macs(dst) if self.downsample else 0)


class PlainResidual(nn.Module):
    """A `Residual` on grids."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, grid: Tensor) -> Tensor:
        """`[B, I, H, W]` to `[B, O, H', W']`."""
        out = self.branch(grid)
        out += self.shortcut(grid)
        return F.relu(out, inplace=True)


class BasicBlock(Residual):
    """Two 3x3 convolutions. The second always has the stage's natural spacing (docs/method.md).

    Args:
        channels, width: of the input and of the 3x3 convolutions.
        entry, spacing: px between taps of the first and of the second convolution.
        exchange, engine: see `SelectiveConv2d`.
        projects, pool: see `Residual`.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        entry: int,
        spacing: int | None,
        exchange: str,
        engine: str,
        projects: bool,
        pool: int | None = None,
    ) -> None:
        convs = [
            SelectiveConv2d(channels, width, entry, exchange, engine),
            SelectiveConv2d(width, width, spacing, exchange, engine),
        ]
        super().__init__(convs, channels, projects, pool, exchange)


class Bottleneck(Residual):
    """1x1, 3x3, 1x1; the 3x3 is the one that strides (torchvision's variant). Arguments as `BasicBlock`'s."""

    expansion = 4

    def __init__(
        self,
        channels: int,
        width: int,
        entry: int,
        spacing: int | None,
        exchange: str,
        engine: str,
        projects: bool,
        pool: int | None = None,
    ) -> None:
        convs = [
            SelectiveLinear(channels, width),
            SelectiveConv2d(width, width, entry, exchange, engine),
            SelectiveLinear(width, width * self.expansion),
        ]
        super().__init__(convs, channels, projects, pool, exchange)


class Stage(nn.ModuleList):
    """A stage's blocks. Only the first may change the sites; all others read and write the same."""

    def forward(self, rows: Tensor, src: Step, dst: Step) -> Tensor:
        for block in self:
            rows, src = block(rows, src, dst), dst
        return rows

    def plain(self, src: int, dst: int) -> nn.Sequential:
        first, *others = self
        return nn.Sequential(first.plain(src, dst), *(block.plain(dst, dst) for block in others))  # type: ignore[operator]

    def macs(self, src: Step, dst: Step) -> int:
        first, *others = self
        return first.macs(src, dst) + sum(block.macs(dst, dst) for block in others)  # type: ignore[operator]
