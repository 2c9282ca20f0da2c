"""Run a converted network on random input and compare the ways in which it must agree with itself.

That it computes what the source's network does cannot be seen from the file: settings that tensors do not
tell, such as ASPP's rates, are the same in all of its forms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_seg.config import ModelConfig
from sparse_seg.models.plain import plain_network, plain_stages, plain_stem
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.sparse import rows_to_grid

SIZE = (129, 161)  # height, width in px: odd, so that borders are checked too
TOLERANCE = 1e-4  # relative; float32 rounding over a hundred layers stays well below


@dataclass(frozen=True)
class Difference:
    """Largest difference over largest value of two ways to run."""

    name: str
    value: float

    @property
    def agrees(self) -> bool:
        return self.value < TOLERANCE  # false for nan


@dataclass(frozen=True)
class Verification:
    """Differences that must vanish in any network, and those that P1 (docs/method.md) makes vanish."""

    always: list[Difference]
    p1: list[Difference]

    @property
    def always_agree(self) -> bool:
        return all(difference.agrees for difference in self.always)

    @property
    def p1_holds(self) -> bool:
        return all(difference.agrees for difference in self.p1)


@torch.no_grad()
def verify(model: SelectiveNetwork, has_head: bool = True, seed: int = 0) -> Verification:
    """Compare dense, all-fine and selective runs of a network in eval mode on one random image.

    Args:
        has_head: False compares the features of layer4 alone.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(1, 3, *SIZE, generator=generator)
    finest, coarsest = model.strides[0], model.strides[-1]
    blocks = (1, -(-SIZE[0] // coarsest), -(-SIZE[1] // coarsest))
    some = torch.rand(blocks, generator=generator) < 0.3
    fine = torch.ones(blocks, dtype=torch.bool)
    dense = {stride: _features(model, images, stride) for stride in (finest, coarsest)}
    plain = _plain_features(model, images, finest)
    name = f"dense OS{finest}"
    always = [Difference(f"features, {name} against plain nn.Conv2d", relative(dense[finest], plain))]
    if has_head:
        logits = model.dense(images, finest)
        plain = plain_network(model, finest)(images)
        always.append(Difference(f"logits, {name} against plain nn.Conv2d", relative(logits, plain)))
        all_fine = model(images, fine_blocks=fine)
        always.append(Difference(f"logits, all-fine against {name}", relative(all_fine, logits)))
    else:
        all_fine = _grid(model, images, fine)
        always.append(Difference(f"features, all-fine against {name}", relative(all_fine, dense[finest])))
    lattice, step = _lattice(model, images, some), coarsest // finest
    coarse = f"coarse sites of a random mask against dense OS{coarsest}"
    sampled = f"the same against {name} at every {'second' if step == 2 else 'fourth'} cell"
    p1 = [
        Difference(coarse, relative(lattice, dense[coarsest])),
        Difference(sampled, relative(lattice, dense[finest][:, :, ::step, ::step])),
    ]
    return Verification(always, p1)


def _features(model: SelectiveNetwork, images: Tensor, stride: int) -> Tensor:
    layouts = model.dense_layouts(images, stride)
    return rows_to_grid(model.backbone(images, layouts)[3], images.shape[0], layouts[3].size)


def _plain_features(model: SelectiveNetwork, images: Tensor, stride: int) -> Tensor:
    return plain_stages(model.backbone, stride).eval()(plain_stem(model.backbone).eval()(images))


def _grid(model: SelectiveNetwork, images: Tensor, blocks: Tensor) -> Tensor:
    """layer4 of an all-fine run as a grid."""
    layouts = model.selective_layouts(images, blocks)
    rows = model.backbone(images, layouts)[3]
    grid = torch.empty_like(rows).index_copy_(0, layouts[3].cells, rows)
    return rows_to_grid(grid, images.shape[0], layouts[3].size)


def _lattice(model: SelectiveNetwork, images: Tensor, blocks: Tensor) -> Tensor:
    """layer4 of the coarse sites as a grid."""
    layouts = model.selective_layouts(images, blocks)
    rows = model.backbone(images, layouts)[3][: layouts[3].num_lattice]
    return rows_to_grid(rows, images.shape[0], layouts[3].lattice_size)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def explain(result: Verification, config: ModelConfig) -> list[str]:
    """Lines for the terminal: each difference, whether P1 holds, and what it means."""
    lines = [f"{'ok' if d.agrees else 'DIFFERS':<9} {d.value:8.1e}  {d.name}" for d in result.always]
    lines += [f"{'P1' if d.agrees else 'no P1':<9} {d.value:8.1e}  {d.name}" for d in result.p1]
    finest, coarsest = config.own_strides[0], config.own_strides[-1]
    dense = f"the dense network of output stride {coarsest}"
    if result.p1_holds:
        meaning = (
            f"P1 holds: coarse sites compute what {dense} does, whatever the mask; sites can be refined "
            "later without recomputing them"
        )
    else:
        meaning = (
            f"P1 does not hold: coarse sites depend on the mask and differ from {dense}. All-fine still "
            f"equals dense OS{finest}; between the ends expect a larger loss, and refinement after a coarse "
            "pass is not exact"
        )
        if not config.dilate_second:
            meaning += (
                ". The cause: the second 3x3 of each basic block is undilated, so its taps fall between the "
                "coarse sites, where values are interpolated"
            )
    unseen = (
        "These compare our forms of the network with each other; whether the source's network has the same "
        "settings, the file cannot tell"
    )
    return [*lines, meaning, unseen]
