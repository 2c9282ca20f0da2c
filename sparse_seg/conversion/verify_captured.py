"""Run a captured network on random input and compare the ways in which it must agree with itself."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_seg.conversion.verify import SIZE, Difference, Verification, relative
from sparse_seg.run.way import Way
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.values import Run, Values
from sparse_seg.sites import Grid, Mixed, Sites


@torch.no_grad()
def verify_captured(model: SelectiveNetwork, seed: int = 0) -> Verification:
    """Compare dense, all-fine and selective runs of a network in eval mode on one random image.

    Where vectors are pooled of rows, all-fine is not exact (docs/method.md), and counts among `p1`, what may
    differ. That the graph gives what its module gives was compared when it was captured.
    """
    geometry, strides = model.geometry, model.strides
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(1, 3, *SIZE, generator=generator).to(next(iter(model.tensors.values())))
    blocks = (1, -(-SIZE[0] // strides[-1]), -(-SIZE[1] // strides[-1]))
    some = torch.rand(blocks, generator=generator) < 0.3
    fine = torch.ones(blocks, dtype=torch.bool)
    dense = model.dense(images, strides[0])
    all_fine = Difference(
        f"P2: logits, all-fine against dense OS{strides[0]}",
        relative(model(images, fine_blocks=fine), dense),
    )
    pooled = any(
        geometry.part(name) == "rows" for name in geometry.vectors if name not in geometry.final_pools
    )
    always, depends = ([], [all_fine]) if pooled else ([all_fine], [])
    run = Run(geometry, model.tensors, images)
    coarse = run.dense(strides[-1], geometry.nodes)
    found = run.mixed(_sites(model, some, images), None)
    on_rows = [
        name for name, value in found.items() if isinstance(value, Mixed) and name not in geometry.masked
    ]
    lattices = [_lattice_error(found, coarse, name) for name in on_rows]
    if lattices:
        name = f"P1: coarse sites of a random mask against dense OS{strides[-1]}"
        depends.append(Difference(name, max(lattices)))
    if model.refines(Way()):
        refined = model.start(images).start_coarse().take(some).logits()
        one = model.start(images).take(some, Way()).logits()
        always.append(Difference("P4: a refined coarse pass against a single one", relative(refined, one)))
    return Verification(always, depends)


def _sites(model: SelectiveNetwork, blocks: Tensor, images: Tensor) -> Sites:
    size = (int(images.shape[2]), int(images.shape[3]))
    plans, levels = model.plans(1, size, images.device), blocks.long() * (len(model.strides) - 1)
    return Sites.of_mask(levels, plans, model.exchange, model.geometry.near(size))


def _lattice_error(found: Values, coarse: Values, name: str) -> float:
    mixed, grid = found[name], coarse[name]
    assert isinstance(mixed, Mixed)
    assert isinstance(grid, Grid)
    return relative(mixed.lattice.tensor, grid.thinned(mixed.lattice.stride))


def explain_captured(result: Verification, model: SelectiveNetwork) -> list[str]:
    """Lines for the terminal: each difference, and what those mean that do not vanish."""
    lines = [f"{'ok' if one.agrees else 'DIFFERS':<9} {one.value:8.1e}  {one.name}" for one in result.always]
    lines += [f"{'ok' if one.agrees else 'inexact':<9} {one.value:8.1e}  {one.name}" for one in result.p1]
    geometry = model.geometry
    if not geometry.refines:
        lines.append(
            f"{geometry.where_mixing} mixes phases: P1 and P4 do not hold, coarse sites depend on the mask, "
            "and no coarse pass is refined; choose a policy that reads none, as edge"
        )
    elif not result.p1_holds:
        lines.append("vectors pooled of rows read the lattice alone: all-fine differs from dense by those")
    return lines
