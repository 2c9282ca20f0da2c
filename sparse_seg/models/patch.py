"""Merge `patch`: coarse blocks keep the coarse pass's logits; the head decodes the cells of fine ones alone.

A head's dense 3x3 was trained one cell apart; on densified coarse rows it is neither of the two dense
networks. Level by level, logits are interpolated as densify does, and each split cell gets those of its four
places from their own level. So all blocks coarse is the dense coarse network, and all fine the dense fine
one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.sparse import grid_to_rows


def layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of nested `nn.Sequential`s, in order."""
    if not isinstance(module, nn.Sequential):
        yield module
        return
    for child in module:
        yield from layers(child)


def reads_neighbours(layer: nn.Module) -> bool:
    """Whether a layer is a convolution of more than one tap."""
    return isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)


def decode_split_cells(
    refine: nn.Module, classify: Callable[[Tensor], Tensor], grid: Tensor, split: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """Run a head's layers on the four places of split cells alone, as they would run on the whole grid.

    Args:
        refine: layers of which the first alone may be a 3x3 convolution, padded by zeros.
        classify: what follows them, 1x1.
        grid: `[B, C, H, W]`.
        split: bool `[B, ceil(H/2), ceil(W/2)]`, cells of half the resolution.
        step: cells between the convolution's taps.

    Returns:
        Rows `[M, O]` and their flat cells int64 `[M]`.
    """
    _, channels, height, width = grid.shape
    halo = step if any(map(reads_neighbours, layers(refine))) else 0
    missing = (halo, halo + width % 2, halo, halo + height % 2)
    padded = F.pad(grid, missing) if any(missing) else grid
    rows, side = grid_to_rows(padded), 2 + 2 * halo
    image, y, x = (place[:, None, None] for place in split.nonzero(as_tuple=True))
    down, across = torch.arange(side, device=grid.device)[:, None], torch.arange(side, device=grid.device)
    places = (image * padded.shape[2] + 2 * y + down) * padded.shape[3] + 2 * x + across
    windows = rows.index_select(0, places.flatten()).view(-1, side, side, channels).permute(0, 3, 1, 2)
    for layer in layers(refine):
        if isinstance(layer, nn.Conv2d) and reads_neighbours(layer):
            windows = F.conv2d(windows, layer.weight, layer.bias, dilation=step, groups=layer.groups)
        else:
            windows = layer(windows)
    windows = classify(windows)
    own_y, own_x = 2 * y + down[:2], 2 * x + across[:2]
    cells, out = ((image * height + own_y) * width + own_x).flatten(), grid_to_rows(windows)
    if height % 2 or width % 2:
        inside = ((own_y < height) & (own_x < width)).flatten()
        return out[inside], cells[inside]
    return out, cells


def enlarged(split: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask `[B, h, w]` on a finer grid `[B, 1, *size]` of a power of two times its resolution."""
    factor = 1
    while factor * split.shape[1] < size[0] or factor * split.shape[2] < size[1]:
        factor *= 2
    return split.repeat_interleave(factor, 1).repeat_interleave(factor, 2)[:, None, : size[0], : size[1]]
