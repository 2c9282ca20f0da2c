"""Run a network on random input and compare the ways in which it must agree with itself.

That it computes what the source's network does cannot be seen from the file: settings that tensors do not
tell, such as ASPP's rates, are the same in all of its forms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Difference:
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


@dataclass(frozen=True)
class Verification:
    """All differences, those that must vanish first."""

    differences: list[Difference]

    @property
    def agrees(self) -> bool:
        return all(one.agrees for one in self.differences if one.must)


@torch.no_grad()
def verify(model: SelectiveNetwork, seed: int = 0) -> Verification:
    """Compare dense, all-fine and selective runs of a network in eval mode on one random image.

    A network of ours is compared with its module in plain PyTorch, too; of another, graph and module were
    when it was captured. P2 is not exact where vectors are pooled of rows, P1 where phases are mixed.
    """
    geometry, finest, coarsest = model.geometry, model.strides[0], model.strides[-1]
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(1, 3, *SIZE, generator=generator).to(next(iter(model.tensors.values())))
    blocks = (1, -(-SIZE[0] // coarsest), -(-SIZE[1] // coarsest))
    some = torch.rand(blocks, generator=generator) < 0.3
    found, dense = list[Difference](), model.dense(images, finest)
    if model.settings.module is None:
        error = relative(dense, _plain(model, finest)(images))
        found.append(Difference(f"logits, dense OS{finest} against plain nn.Conv2d", error))
    error = relative(model(images, fine_blocks=torch.ones_like(some)), dense)
    found.append(Difference(f"P2: logits, all-fine against dense OS{finest}", error, not _pools_rows(model)))
    found += _lattice_differences(model, images, some)
    if geometry.refines:
        refined = model.start(images).start_coarse().take(some).logits()
        one = model.start(images).take(some, Way()).logits()
        error = relative(refined, one)
        found.append(Difference("P4: a refined coarse pass against a single one", error))
    return Verification(sorted(found, key=lambda difference: not difference.must))


def _pools_rows(model: SelectiveNetwork) -> bool:
    """Whether vectors are pooled of rows other than behind all windows, where every site counts."""
    geometry = model.geometry
    pools = {node.name for node in geometry.graph.nodes if OPERATORS[node.op].is_pool} - geometry.final_pools
    return any(geometry.kind[geometry.graph.node(name).inputs[0]] == "rows" for name in pools)


def _plain(model: SelectiveNetwork, stride: int) -> torch.nn.Module:
    """A network of ours at an output stride, in plain PyTorch."""
    module = build_module(model.settings, stride)
    module.load_state_dict(model.module.state_dict())
    return module.eval()


def _lattice_differences(model: SelectiveNetwork, images: Tensor, blocks: Tensor) -> list[Difference]:
    """Values on rows at the coarse sites under a mask, against the dense network at both ends."""
    geometry, finest, coarsest = model.geometry, model.strides[0], model.strides[-1]
    run = Interpreter(geometry, model.tensors, images)
    size = (int(images.shape[2]), int(images.shape[3]))
    plans, levels = model.plans(1, size, images.device), blocks.long() * (len(model.strides) - 1)
    found = run.mixed(Sites.of_mask(levels, plans, model.exchange, geometry.near(size)), None)
    # behind a head's last pooling, which weighs all sites, the mask counts by design
    left_out = geometry.masked if geometry.refines else set[str]()
    on_rows = [name for name, value in found.items() if isinstance(value, Mixed) and name not in left_out]
    if not on_rows:
        return []
    coarse, fine = (run.dense(stride, geometry.nodes) for stride in (coarsest, finest))
    places = "second" if coarsest == 2 * finest else "fourth"
    names = {
        f"P1: coarse sites of a random mask against dense OS{coarsest}": coarse,
        f"P1: the same against dense OS{finest} at every {places} cell": fine,
    }
    return [
        Difference(name, max(_lattice_error(found[one], values[one]) for one in on_rows), geometry.refines)
        for name, values in names.items()
    ]


def _lattice_error(mixed: Any, grid: Any) -> float:
    return relative(mixed.lattice.tensor, grid.thinned(mixed.lattice.stride))


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def explain(result: Verification, model: SelectiveNetwork) -> list[str]:
    """Lines for the terminal: each difference, whether P1 holds, and what it means."""
    lines = [str(difference) for difference in result.differences]
    dense = f"the dense network of output stride {model.strides[-1]}"
    if model.geometry.refines:
        lines.append(
            f"P1 holds: coarse sites compute what {dense} does, whatever the mask; sites can be refined "
            "later without recomputing them"
        )
    else:
        lines.append(
            f"P1 does not hold: coarse sites depend on the mask and differ from {dense}, for "
            f"{model.geometry.where_mixing} mixes phases. Between all-coarse and all-fine expect a larger "
            "loss; no coarse pass is refined (P4), so that a policy that reads one, as confidence, costs a "
            "second pass: edge reads none"
        )
        if not model.settings.dilate_second:
            lines[-1] += (
                ". The cause: the second 3x3 of each basic block is undilated, so its taps fall between the "
                "coarse sites, where values are interpolated"
            )
    if _pools_rows(model):
        lines.append("vectors pooled of rows read the lattice alone: all-fine differs from dense by those")
    if model.settings.module is None:
        lines.append(
            "These compare our forms of the network with each other; whether the source's network has the "
            "same settings, the file cannot tell"
        )
    return lines
