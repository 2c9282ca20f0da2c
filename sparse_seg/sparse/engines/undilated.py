"""3x3 convolution with taps one cell of the finest grid apart, whatever its stride.

On mixed levels such taps fall between the places of the lattice, so its sites are gathered like the extra
ones, with ghosts where there is no site. Phases mix and the lattice comes to depend on the mask: a network
that has such a convolution in its selective stages (mmsegmentation's BasicBlock) loses P1 (docs/method.md).
"""

from __future__ import annotations

from torch import Tensor

from sparse_seg.sparse.engines import gather
from sparse_seg.sparse.layout import SiteLayout


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
    table = layout.neighbours(layout, layout.stride, exchange, lattice=True)  # one cell of the finest grid
    return gather.every_site_conv2d(rows, weight, table, bias)
