"""Cells of nested grids, each of twice the resolution of the one above: what layouts are made of."""

from __future__ import annotations

import torch
from torch import Tensor

_PHASE_Y, _PHASE_X = (0, 1, 1), (1, 0, 1)  # phases 1, 2, 3 of a 2x2 block


def check_split(split: Tensor, shape: tuple[int, ...], site: Tensor) -> None:
    """Raises a ValueError where a split is no mask of `shape`, or splits a cell whose `site` is -1."""
    if split.dtype != torch.bool or tuple(split.shape) != shape:
        raise ValueError(f"a block mask must be bool {list(shape)}, not {split.dtype} {list(split.shape)}")
    if bool((split & (site < 0)).any()):
        raise ValueError("a block mask splits a cell that has no site of its own")


def cells_apart(spacing: int, stride: int) -> int:
    """A spacing in cells of a grid of `stride`, both in px; raises a ValueError where it is no multiple."""
    if spacing % stride:
        raise ValueError(f"a spacing of {spacing} px is no multiple of the stride {stride}")
    return spacing // stride


def children(split: Tensor, fine: tuple[int, int]) -> Tensor:
    """Flat cells of the fine grid: phases 1, 2, 3 of each split cell in (b, y, x) order, inside the image."""
    batch, y, x = split.nonzero().T[:, :, None]
    y = 2 * y + torch.tensor(_PHASE_Y, device=split.device)
    x = 2 * x + torch.tensor(_PHASE_X, device=split.device)
    return ((batch * fine[0] + y) * fine[1] + x)[(y < fine[0]) & (x < fine[1])]


def unflatten(cells: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Flat cells of a grid of `size` (H, W) as (image, y, x)."""
    area = size[0] * size[1]
    within = cells % area
    return cells // area, within // size[1], within % size[1]


def spread(grid: Tensor, fine: tuple[int, int]) -> Tensor:
    """`[B, h, w]` to `[B, *fine]`: values at the even places, -1 elsewhere."""
    spread = grid.new_full((grid.shape[0], *fine), -1)
    spread[:, ::2, ::2] = grid
    return spread


def repeat(grid: Tensor, fine: tuple[int, int]) -> Tensor:
    """`[B, h, w]` to `[B, *fine]`: each value over its 2x2 block."""
    return grid.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, : fine[0], : fine[1]].contiguous()


def parents(batch: int, coarse: tuple[int, int], fine: tuple[int, int], device: torch.device) -> Tensor:
    """`[B*H*W, 4]`: for each fine cell the four coarse cells around it, clamped to the image."""
    y, x = (torch.arange(n, device=device) for n in fine)
    ys = torch.stack((y // 2, ((y + 1) // 2).clamp_max(coarse[0] - 1)), 1)[:, None, :, None]
    xs = torch.stack((x // 2, ((x + 1) // 2).clamp_max(coarse[1] - 1)), 1)[None, :, None, :]
    image = torch.arange(batch, device=device).view(-1, 1, 1, 1, 1) * (coarse[0] * coarse[1])
    return (image + ys * coarse[1] + xs).view(-1, 4)
