"""3x3 convolution with taps one cell of the finest grid apart, whatever its stride.

On mixed levels such taps fall between the places of the lattice, so its sites are gathered like the extra
ones, with ghosts where there is no site. Phases mix and the lattice comes to depend on the mask: a network
that has such a convolution in its selective stages (mmsegmentation's BasicBlock) loses P1 (docs/method.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_seg.sparse.engines import gather
from sparse_seg.sparse.layout import SiteLayout
from sparse_seg.sparse.neighbours import NeighbourTable


def undilated_conv2d(
    rows: Tensor, weight: Tensor, layout: SiteLayout, exchange: str, bias: Tensor | None = None
) -> Tensor:
    """`[N, I]` to `[N, O]`, with `weight` `[O, 3, 3, I]` and `bias` `[O]`.

    exchange: see `SiteLayout.neighbours`.

    Raises:
        ValueError: rows and layout differ in length.
    """
    gather.check_rows(rows, layout)
    rows, weight = gather.autocast(rows, weight)
    if not layout.splits:
        return gather.lattice_conv2d(rows, weight, layout, 1, 1, bias)
    table = layout.neighbours(
        layout, layout.stride, exchange, lattice=True
    )  # one cell of the finest grid away
    return _EverySite.apply(rows, weight, table, bias)


class _EverySite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, table: NeighbourTable, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.table = table
        out = rows.new_empty(table.index.shape[0], weight.shape[0])
        gather.multiply_neighbours(rows, weight, table, out, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = gather.add_weight_grad(torch.zeros_like(weight), grad, rows, ctx.table)
        if ctx.needs_input_grad[0]:
            no_lattice = rows.new_zeros(1, rows.shape[1], 0, 0)
            grad_rows = gather.rows_grad(no_lattice, grad, weight, ctx.table)
        return grad_rows, grad_weight, None, grad.sum(0) if ctx.needs_input_grad[3] else None
