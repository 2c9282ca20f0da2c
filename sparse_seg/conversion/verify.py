"""Run a network on random input and compare the ways in which it must agree with itself.

That it computes what the source's network does cannot be seen from the file: settings that tensors do not
tell, such as ASPP's rates, are the same in all of its forms.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_seg.networks.encoder_decoder import build_module
from sparse_seg.ops import OPERATORS
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.values import Interpreter
from sparse_seg.run.way import Way
from sparse_seg.sites import Mixed, Sites

SIZE = (129, 161)  # height, width in px: odd, so that borders are checked too
TOLERANCE = 1e-4  # relative; float32 rounding over a hundred layers stays well below


class Difference(NamedTuple):
    """Largest difference over largest value of two ways to run; `must` it vanish in this network
    (docs/method.md)?"""

    name: str
    value: float
    must: bool = True

    @property
    def agrees(self) -> bool:
        return self.value < TOLERANCE  # false for nan

    def __str__(self) -> str:
        verdict = "ok" if self.agrees else "DIFFERS" if self.must else "inexact"
        return f"{verdict:<9} {self.value:8.1e}  {self.name}"


@torch.no_grad()
def verify(model: SelectiveNetwork, seed: int = 0) -> list[Difference]:
    """Compare dense, all-fine and selective runs of a network in eval mode on one random image; what must
    agree stands first.

    A network of ours is compared with its module in plain PyTorch, too; of another, graph and module were
    when it was captured. P2 is not exact where vectors are pooled of rows, P1 where phases are mixed.
    """
    refines, finest, coarsest = model.geometry.refines, model.strides[0], model.strides[-1]
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(1, 3, *SIZE, generator=generator).to(next(iter(model.tensors.values())))
    some = torch.rand(1, -(-SIZE[0] // coarsest), -(-SIZE[1] // coarsest), generator=generator) < 0.3
    found, dense = list[Difference](), model.dense(images, finest)
    if model.settings.module is None:
        module = build_module(model.settings, finest).eval()
        module.load_state_dict(model.module.state_dict())
        name = f"logits, dense OS{finest} against plain nn.Conv2d"
        found.append(Difference(name, relative(dense, module(images))))
    fine = model(images, fine_blocks=torch.ones_like(some))
    name = f"P2: logits, all-fine against dense OS{finest}"
    found.append(Difference(name, relative(fine, dense), not _pools_rows(model)))
    places = "second" if coarsest == 2 * finest else "fourth"
    names = {
        coarsest: f"P1: coarse sites of a random mask against dense OS{coarsest}",
        finest: f"P1: the same against dense OS{finest} at every {places} cell",
    }
    for stride, error in _lattice_errors(model, images, some).items():
        found.append(Difference(names[stride], error, refines))
    if refines:
        refined = model.start(images).start_coarse().take(some).logits()
        error = relative(refined, model.start(images).take(some, Way()).logits())
        found.append(Difference("P4: a refined coarse pass against a single one", error))
    return sorted(found, key=lambda difference: not difference.must)


def _pools_rows(model: SelectiveNetwork) -> bool:
    """Whether vectors are pooled of rows other than behind all windows, where every site counts."""
    geometry = model.geometry
    pools = {node.name for node in geometry.graph.nodes if OPERATORS[node.op].is_pool} - geometry.final_pools
    return any(geometry.kind[geometry.graph.node(name).inputs[0]] == "rows" for name in pools)


def _lattice_errors(model: SelectiveNetwork, images: Tensor, blocks: Tensor) -> dict[int, float]:
    """Of all values on rows, at the coarse sites under a mask, against the dense network at both strides."""
    geometry, size = model.geometry, (int(images.shape[2]), int(images.shape[3]))
    run, plans = Interpreter(geometry, model.tensors, images), model.plans(1, size, images.device)
    levels = blocks.long() * (len(model.strides) - 1)
    found = run.mixed(Sites.of_mask(levels, plans, model.exchange, geometry.near(size)), None)
    # behind a head's last pooling, which weighs all sites, the mask counts by design
    left_out = geometry.masked if geometry.refines else set[str]()
    rows = {n: one.lattice for n, one in found.items() if isinstance(one, Mixed) and n not in left_out}
    errors = dict[int, float]()
    for stride in (model.strides[-1], model.strides[0]) if rows else ():
        dense: Any = run.dense(stride, geometry.nodes)
        errors[stride] = max(relative(g.tensor, dense[n].thinned(g.stride)) for n, g in rows.items())
    return errors


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def explain(result: list[Difference], model: SelectiveNetwork) -> list[str]:
    """Lines for the terminal: each difference, whether P1 holds, and what it means."""
    lines = [str(difference) for difference in result]
    dense = f"the dense network of output stride {model.strides[-1]}"
    if model.geometry.refines:
        lines.append(
            f"P1 holds: coarse sites compute what {dense} does, whatever the mask; sites can be refined "
            "later without recomputing them"
        )
    else:
        cause = (
            ". The cause: the second 3x3 of each basic block is undilated, so its taps fall between the "
            "coarse sites, where values are interpolated"
        )
        lines.append(
            f"P1 does not hold: coarse sites depend on the mask and differ from {dense}, for "
            f"{model.geometry.where_mixing} mixes phases. Between all-coarse and all-fine expect a larger "
            "loss; no coarse pass is refined (P4), so that a policy that reads one, as confidence, costs a "
            f"second pass: edge reads none{'' if model.settings.dilate_second else cause}"
        )
    if _pools_rows(model):
        lines.append("vectors pooled of rows read the lattice alone: all-fine differs from dense by those")
    if model.settings.module is None:
        lines.append(
            "These compare our forms of the network with each other; whether the source's network has the "
            "same settings, the file cannot tell"
        )
    return lines
