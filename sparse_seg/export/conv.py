"""Static forms of the layers: each runs on the lattice's grid, and on the rows of a level's extra sites.

Batch norm is folded. A weight is kept once, `[O, 3, 3, I]`: a channels_last OIHW kernel for the lattice, and
the matrix `[O, 9 * I]` for rows. Runtimes fold the change of layout when they load the file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.sparse.depthwise import WINDOW, window_mean


def fold(weight: Tensor, norm: nn.Module | None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with its batch norm, in eval mode."""
    if norm is None:
        return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    if bias is not None:
        shift = shift + bias * scale
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), shift


class Conv3x3(nn.Module):
    """3x3 convolution of any spacing.

    Args:
        weight: `[O, 3, 3, I]`.
    """

    def __init__(self, weight: Tensor, norm: nn.Module | None, spacing: int) -> None:
        super().__init__()
        weight, bias = fold(weight, norm)
        self.weight, self.bias = nn.Parameter(weight.contiguous()), nn.Parameter(bias)
        self.spacing = spacing

    def lattice(self, grid: Tensor, src: int, dst: int) -> Tensor:
        """Grid `[B, I, h, w]` at stride `src` to `[B, O, ...]` at `dst`."""
        dilation = self.spacing // src
        return F.conv2d(grid, self.weight.permute(0, 3, 1, 2), self.bias, dst // src, dilation, dilation)

    def extra(self, taps: Tensor, plus: Tensor | None = None) -> Tensor:
        """`[M, 9, I]` to `[M, O]`; `plus` `[M, O]` is added."""
        matrix = self.weight.flatten(1).t()
        if plus is None:
            return torch.addmm(self.bias, taps.flatten(1), matrix)
        return torch.addmm(plus + self.bias, taps.flatten(1), matrix)


class Conv1x1(nn.Module):
    """1x1 convolution; weight `[O, I]`."""

    def __init__(self, weight: Tensor, norm: nn.Module | None = None, bias: Tensor | None = None) -> None:
        super().__init__()
        weight, bias = fold(weight, norm, bias)
        self.weight, self.bias = nn.Parameter(weight.contiguous()), nn.Parameter(bias)

    def lattice(self, grid: Tensor, src: int = 1, dst: int = 1) -> Tensor:
        return F.conv2d(grid, self.weight[:, :, None, None], self.bias, dst // src)

    def extra(self, rows: Tensor, plus: Tensor | None = None) -> Tensor:
        bias = self.bias if plus is None else plus + self.bias
        return torch.addmm(bias, rows, self.weight.t())


class Depthwise3x3(nn.Module):
    """Depthwise 3x3 convolution; weight `[C, 3, 3, 1]`."""

    def __init__(self, weight: Tensor, norm: nn.Module | None, spacing: int) -> None:
        super().__init__()
        weight, bias = fold(weight, norm)
        self.weight, self.bias, self.spacing = nn.Parameter(weight), nn.Parameter(bias), spacing

    def lattice(self, grid: Tensor, src: int, dst: int) -> Tensor:
        dilation = self.spacing // src
        kernel = self.weight.permute(0, 3, 1, 2)
        return F.conv2d(grid, kernel, self.bias, dst // src, dilation, dilation, grid.shape[1])

    def extra(self, taps: Tensor) -> Tensor:
        return (taps * self.weight.flatten(1).t()).sum(1) + self.bias


class AvgPool(nn.Module):
    """2x2 mean of a place and those `spacing` px to the right, below, and both, inside the image."""

    def __init__(self, spacing: int) -> None:
        super().__init__()
        self.spacing = spacing

    def lattice(self, grid: Tensor, src: int, dst: int) -> Tensor:
        return window_mean(grid, dst // src, self.spacing // src)

    def extra(self, taps: Tensor, inside: Tensor) -> Tensor:
        """`[M, 9, C]` and whether each tap lies inside the image, `[M, 9]`, to `[M, C]`."""
        window = list(WINDOW)
        count = inside[:, window].to(taps.dtype).sum(1, keepdim=True)
        return taps[:, window].sum(1) / count
