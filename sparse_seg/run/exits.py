"""What losses read of a pass: the values on rows that late ones read, and logits of others in their place."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_seg.masks import block_shape
from sparse_seg.ops.upsample import at_least_float32, upsample_logits
from sparse_seg.run.passes import Pass
from sparse_seg.run.values import Values
from sparse_seg.run.way import Way
from sparse_seg.sites import Grid, Mixed, Sites


def last_exit(run: Pass) -> tuple[Grid, Tensor]:
    """The last value that late ones read, on its finest grid, and which of its cells are sites, bool
    `[B, h, w]`."""
    name = run.model.geometry.exits[-1]
    value = run.values()[name]
    grid: Grid = value.densify() if isinstance(value, Mixed) else value
    batch, _, height, width = grid.tensor.shape
    is_site = torch.ones(batch, height, width, dtype=torch.bool, device=run.images.device)
    if isinstance(value, Mixed):
        lattice, finest = run.model.geometry.lattice(name), grid.stride
        steps = [min(lattice, stride) // finest for stride in reversed(run.model.strides)]
        block = run.model.strides[-1] // finest
        step = torch.tensor(steps, device=is_site.device)[run.levels]
        step = step.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :height, :width]
        down, across = (torch.arange(length, device=is_site.device) for length in (height, width))
        is_site = (down[:, None] % step == 0) & (across % step == 0)
    return grid, is_site


def lattice_logits(run: Pass) -> Tensor:
    """Logits `[B, K, H, W]` of the coarse lattice alone: what late values give if no block is fine."""
    values = run.values()
    return run.decoded(values | _lattices(run, values))


def blended_logits(run: Pass, fine: Tensor) -> Tensor:
    """Logits `[B, K, H, W]` of exits that are, block by block, those of the dense fine network or
    what `densify` makes of their lattices; for training a mask.

    Args:
        run: then a dense one at the finest stride.
        fine: the share of the former in each block, `[B, Hc, Wc]`; gradients flow to it.

    Raises:
        ValueError: not two strides.
    """
    strides = run.model.strides
    if len(strides) != 2:
        raise ValueError(f"a blend has two strides, not {len(strides)}")
    values = run.follow(Way.dense(strides[0])).values(late=False)
    for name, lattice in _lattices(run, values).items():
        grid = lattice.densify()
        height, width = grid.tensor.shape[2:]
        cells = fine.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None, :height, :width]
        values[name] = Grid(grid.tensor + cells * (values[name].tensor - grid.tensor), grid.stride)
    return run.decoded(values)


def auxiliary_logits(run: Pass) -> Tensor | None:
    """Logits `[B, K, H, W]` of the auxiliary head; None without one or outside training."""
    model = run.model
    if not (model.auxiliary and model.training):
        return None
    head, name = model.auxiliary
    value = run.values()[name]
    with run.context():
        grid = value.densify() if isinstance(value, Mixed) else value
        logits = at_least_float32(head.at(grid.tensor, grid.stride))
    offset, size = model.settings.trained_stride, (run.images.shape[2], run.images.shape[3])
    return upsample_logits(logits, size, grid.stride, offset, model.settings.align_corners)


def _lattices(run: Pass, values: Values) -> dict[str, Mixed]:
    """The exits in `values`, of their lattices alone."""
    model, (batch, _, height, width), device = run.model, run.images.shape, run.images.device
    plans = model.plans(batch, (height, width), device)
    blocks = torch.zeros(block_shape(run.images, model.strides[-1]), dtype=torch.int64, device=device)
    sites, alone = Sites.of_mask(blocks, plans, "linear", {}), dict[str, Mixed]()
    for name in model.geometry.exits:
        value, stride = values[name], model.geometry.lattice(name)
        lattice = value.lattice if isinstance(value, Mixed) else Grid(value.thinned(stride), stride)
        none = lattice.tensor.new_zeros(0, int(lattice.tensor.shape[1]))
        alone[name] = Mixed(lattice, {one: none for one in plans if one < stride}, sites)
    return alone
