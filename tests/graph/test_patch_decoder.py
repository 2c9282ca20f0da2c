"""Merge `patch` of a decoder at stride 4 behind the rows, layer by layer, and what the merge refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_seg
from sparse_seg.errors import SparseSegError
from sparse_seg.run.way import Way
from tests.graph.toys import Decoder, Doing, conv, decoding
from tests.reference import relative_error

PATCH = Way(merge="patch")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("strides", [(8, 16), (8, 16, 32)], ids=str)
@torch.no_grad()
def test_blocks_keep_the_level_before_and_finer_ones_read_it(
    strides: tuple[int, ...], training: bool
) -> None:
    """Against the decoder on whole grids, layer by layer, in which other blocks keep the level before."""
    net = decoding(strides).train(training)
    module, images, block = net.module, torch.randn(2, 3, 64, 96).double(), strides[-1]
    assert isinstance(module, Decoder)
    generator = torch.Generator().manual_seed(1)
    mask = torch.randint(0, len(strides), (2, 64 // block, 96 // block), generator=generator)
    before = copy.deepcopy(module)
    found = net.start(images).take(mask, PATCH).grid_logits()
    updated: Any = copy.deepcopy(module.decode[1])
    run = net.start(images).take(mask)  # late values of it see the densified rows
    assert run._values is not None
    (name,) = net.geometry.exits
    rows, low = run._values[name], module.stem(images)

    values: list[Tensor] = []
    for level, stride in enumerate(reversed(strides)):  # taps 8 px apart, or a cell
        grid = module.refine(rows.densify(stride=stride).tensor)
        size = (grid.shape[2], grid.shape[3])
        values.append(grid.where(_inside(mask, level, size), double(values[-1], size)) if level else grid)
    values = [_up(grid, stride, low.shape[2:]) for grid, stride in zip(values, strides[::-1], strict=True)]
    values = [torch.cat([value, module.skip(low)], 1) for value in values]  # type: ignore[misc]
    inside = [_inside(mask, level, (16, 24)) for level in range(len(strides))]
    values = _kept(values, inside)
    norm: Any = before.decode[1]
    for layer in [*before.decode, before.classify]:
        if training and layer is norm:
            at = [value.movedim(1, -1)[there[:, 0]] for value, there in zip(values, inside, strict=True)]
            variance, mean = torch.var_mean(torch.cat(at), 0)
            assert relative_error(updated.running_mean, 0.9 * norm.running_mean + 0.1 * mean) < 1e-12
            assert relative_error(updated.running_var, 0.9 * norm.running_var + 0.1 * variance) < 1e-12
            count = sum(len(one) for one in at)
            biased = variance * (count - 1) / count
            values = [F.batch_norm(one, mean, biased, norm.weight, norm.bias) for one in values]
        else:
            values = _kept([layer(value) for value in values], inside)
    assert relative_error(found, values[-1]) < 1e-12
    assert 0.2 < (mask > 0).float().mean() < 0.9


def double(grid: Tensor, fine: tuple[int, int]) -> Tensor:
    """Twice the resolution: even places exact, odd places the mean of those around them inside the image."""
    height, width = grid.shape[2:]
    padded = F.pad(grid, (0, fine[1] - (2 * width - 1), 0, fine[0] - (2 * height - 1)), mode="replicate")
    size = (2 * padded.shape[2] - 1, 2 * padded.shape[3] - 1)
    return F.interpolate(padded, size, mode="bilinear", align_corners=True)[:, :, : fine[0], : fine[1]]


def _inside(mask: Tensor, level: int, size: tuple[int, int]) -> Tensor:
    """`[B, 1, *size]`: what lies in blocks of a level or a finer one."""
    factor = size[0] // mask.shape[1]
    return (mask >= level).repeat_interleave(factor, 1).repeat_interleave(factor, 2)[:, None]


def _kept(values: list[Tensor], inside: list[Tensor]) -> list[Tensor]:
    """Each level's values inside its blocks, and those of the level before elsewhere."""
    kept = values[:1]
    for value, there in zip(values[1:], inside[1:], strict=True):
        kept.append(value.where(there, kept[-1]))
    return kept


def _up(grid: Tensor, stride: int, size: torch.Size) -> Tensor:
    """To stride 4, at the places that an upsampling from stride 8 reads: (q + 1/2) / 2 - 1/2 cells of it."""
    for axis, length in enumerate(size):
        places = ((torch.arange(length).double() + 0.5) / 2 - 0.5) * 8 / stride
        count = grid.shape[2 + axis]
        places = places.clamp(0, count - 1)
        first = places.floor().long()
        share = (places - first).reshape([-1 if place == axis else 1 for place in range(2)])
        second = (first + 1).clamp(max=count - 1)
        grid = grid.index_select(2 + axis, first) * (1 - share) + grid.index_select(2 + axis, second) * share
    return grid


def pooled() -> Doing:
    """A gate of late values behind the decoder."""
    decoder = Decoder(False)
    decoder.classify = nn.Conv2d(8, 8, 1)

    def gated(toy: Any, images: Tensor) -> Tensor:
        x = toy.decoder(images)
        return toy.head(x * x.mean((2, 3), keepdim=True).sigmoid())

    return Doing(gated, decoder=decoder)


def down() -> Decoder:
    """Three steps down behind the rows, to stride 32."""
    decoder = Decoder(False)
    decoder.decode.extend([*(conv(1, 2) for _ in range(3)), nn.UpsamplingBilinear2d(scale_factor=8)])
    return decoder


@pytest.mark.parametrize(
    ("module", "message"), [(pooled(), "reads whole images behind"), (down(), "32 px apart behind the rows")]
)
@pytest.mark.filterwarnings("ignore:Decoder. at sizes that are no multiples of 32 px")
def test_what_it_cannot_do_is_refused(module: nn.Module, message: str) -> None:
    net = sparse_seg.selective(module.double().eval(), size=(64, 128))
    images, mask = torch.randn(1, 3, 64, 64).double(), torch.ones(1, 4, 4, dtype=torch.bool)
    with pytest.raises(SparseSegError, match=f"{message}.*; choose merge whole") as error:
        net.start(images).take(mask, PATCH)
    assert "\n" not in str(error.value)
