"""Triton kernels: a convolution at scattered sites as an implicit GEMM, its ghosts made in registers.

This file imports Triton, so `triton.py` alone imports it, and only where the kernels run.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.testing import do_bench

from sparse_seg.sites.level import Level
from sparse_seg.sites.values import NOTHING, Epilogue


class Tile(NamedTuple):
    """What one program of a kernel computes: so many sites and output channels, so many bytes of an input
    row at a time; how it is compiled; and how many programs share the input channels (split-K), each in
    float32 sums of its own, which a second kernel adds up in order."""

    sites: int
    channels: int
    bytes: int
    warps: int
    stages: int
    splits: int = 1


# By whether the convolution is depthwise, which has no product. None takes more than the 99 KiB of shared
# memory that GPUs for consumers have.
TILES = {
    False: (
        Tile(128, 128, 64, 8, 2),
        Tile(128, 64, 64, 4, 3),
        Tile(64, 128, 64, 4, 3),
        Tile(32, 64, 128, 4, 3),
        Tile(128, 128, 64, 8, 2, 4),  # of few sites and many channels, which give too few programs
        Tile(64, 128, 64, 4, 3, 2),
    ),
    True: (Tile(32, 64, 0, 4, 1), Tile(8, 128, 0, 4, 1)),
}
INTERPRETED = Tile(128, 128, 256, 1, 1)  # a few large ones: the interpreter's time is that of its calls
SUM_SITES, SUM_CHANNELS = 16, 128  # of one program that adds up splits
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_VARYING = ["sites", "taps", "num_rows", "cells", "added"]  # arguments whose values are not compiled in
_fastest: dict[tuple[object, ...], Tile] = {}


@triton.jit
def _places(
    rows, source, corners, index, site, sites, tap, taps, num_rows, cells, inner,
    RULE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Where the sites of a tile find what one tap reads, by its numbers in the index.

    Those below `num_rows` are rows; the next `3 * cells` are ghosts, of phases 1, 2 and 3 of all cells; all
    others lie outside, zero. A ghost is its cell's row of `source`; by the rule `linear` its mean with those
    right (phase 1), below (2), or right, below and diagonal (3).

    Returns:
        For each site four pointers, and masks of which sites read the first, the second, and the last two.
    """
    outside = num_rows + 3 * cells
    number = tl.load(index + site * taps + tap, mask=site < sites, other=outside).to(tl.int32)
    here = number < num_rows
    first, second, third, fourth = rows + number.to(tl.int64) * inner, source, source, source
    reads, ghost, diagonal = here, here, here
    if RULE != "none":
        ghost = (number >= num_rows) & (number < outside)
        place = number - num_rows
        phase = 1 + (place >= cells).to(tl.int32) + (place >= 2 * cells).to(tl.int32)
        cell = (place - (phase - 1) * cells).to(tl.int64)
        first, reads = tl.where(here, first, source + cell * inner), here | ghost
        if ALIGNED:  # else it would be read one number at a time: the compiler does not see through `where`
            first = tl.multiple_of(first, 16)
    if RULE == "linear":
        diagonal = ghost & (phase == 3)
        beside = tl.load(corners + tl.where(phase == 2, 2, 1) * cells + cell, mask=ghost, other=0)
        below = tl.load(corners + 2 * cells + cell, mask=diagonal, other=0)
        across = tl.load(corners + 3 * cells + cell, mask=diagonal, other=0)
        second, third, fourth = source + beside * inner, source + below * inner, source + across * inner
    return first, second, third, fourth, reads, ghost, diagonal


@triton.jit
def _features(places, channel, inner, RULE: tl.constexpr):
    """`[sites, channels]` of what `_places` found."""
    first, second, third, fourth, reads, ghost, diagonal = places
    inside = (channel < inner)[None, :]
    values = tl.load(first[:, None] + channel[None, :], mask=reads[:, None] & inside, other=0.0)
    if RULE == "linear":
        values = values.to(tl.float32)
        values += tl.load(second[:, None] + channel[None, :], mask=ghost[:, None] & inside, other=0.0)
        values += tl.load(third[:, None] + channel[None, :], mask=diagonal[:, None] & inside, other=0.0)
        values += tl.load(fourth[:, None] + channel[None, :], mask=diagonal[:, None] & inside, other=0.0)
        values *= tl.where(diagonal, 0.25, tl.where(ghost, 0.5, 1.0))[:, None]
    return values


@triton.jit
def _write(
    out, bias, residual, total, site, channel, sites, outer, added, low, high, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """Sums, with bias and, of the first `added` sites, residual, clamped to `low`..`high`; NaN stays NaN."""
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=channel < outer, other=0.0).to(tl.float32)[None, :]
    place, inside = site[:, None] * outer + channel[None, :], (channel < outer)[None, :]
    total += tl.load(residual + place, mask=(site < added)[:, None] & inside, other=0.0).to(tl.float32)
    total = tl.where(total < low, low, total)
    total = tl.where(total > high, high, total)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(site < sites)[:, None] & inside)


@triton.jit(do_not_specialize=_VARYING)
def _dense_kernel(
    rows, source, corners, index, weight, bias, residual, out, sites, taps, num_rows, cells, inner, outer,
    added, low, high, part,
    RULE: tl.constexpr, ALIGNED: tl.constexpr, HAS_BIAS: tl.constexpr, FACTORS: tl.constexpr,
    PRECISION: tl.constexpr, SITES: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """weight: `[outer, taps, inner]`; out: `[splits, sites, outer]`, each of `part` input channels. FACTORS:
    the dtype of what is multiplied; sums are float32."""
    out += tl.program_id(2).to(tl.int64) * sites * outer
    begin = tl.program_id(2) * part
    end = tl.minimum(begin + part, inner)
    site = (tl.program_id(0) * SITES + tl.arange(0, SITES)).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.full((SITES, CHANNELS), 0.0, tl.float32)
    for tap in range(taps):
        places = _places(
            rows, source, corners, index, site, sites, tap, taps, num_rows, cells, inner, RULE, ALIGNED
        )
        for start in range(begin, end, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            values = _features(places, depth, inner, RULE)
            mask = (depth < inner)[:, None] & (channel < outer)[None, :]
            place = (channel[None, :] * taps + tap) * inner + depth[:, None]
            factors = tl.load(weight + place, mask=mask, other=0.0)
            total = tl.dot(values.to(FACTORS), factors.to(FACTORS), total, input_precision=PRECISION)
    _write(out, bias, residual, total, site, channel, sites, outer, added, low, high, HAS_BIAS)


@triton.jit(do_not_specialize=_VARYING)
def _depthwise_kernel(
    rows, source, corners, index, weight, bias, residual, out, sites, taps, num_rows, cells, inner, outer,
    added, low, high,
    RULE: tl.constexpr, ALIGNED: tl.constexpr, HAS_BIAS: tl.constexpr,
    SITES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """weight: `[outer, taps]`; `inner` and `outer` are equal."""
    site = (tl.program_id(0) * SITES + tl.arange(0, SITES)).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.full((SITES, CHANNELS), 0.0, tl.float32)
    for tap in range(taps):
        places = _places(
            rows, source, corners, index, site, sites, tap, taps, num_rows, cells, inner, RULE, ALIGNED
        )
        factors = tl.load(weight + channel * taps + tap, mask=channel < outer, other=0.0).to(tl.float32)
        total += _features(places, channel, inner, RULE).to(tl.float32) * factors[None, :]
    _write(out, bias, residual, total, site, channel, sites, outer, added, low, high, HAS_BIAS)


@triton.jit(do_not_specialize=_VARYING)
def _sum_kernel(
    parts, bias, residual, out, sites, outer, added, low, high,
    HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, SITES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """parts: `[SPLITS, sites, outer]`, added up in order, so that sums are the same each time."""
    site = (tl.program_id(0) * SITES + tl.arange(0, SITES)).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (site < sites)[:, None] & (channel < outer)[None, :]
    total = tl.full((SITES, CHANNELS), 0.0, tl.float32)
    for split in range(SPLITS):
        place = (site + split * sites)[:, None] * outer + channel[None, :]
        total += tl.load(parts + place, mask=mask, other=0.0)
    _write(out, bias, residual, total, site, channel, sites, outer, added, low, high, HAS_BIAS)


def conv2d(
    rows: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor, level: Level | None,
    tf32: bool, end: Epilogue = NOTHING, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """See `triton.conv2d`; all of one dtype, without ghosts where there is no level.

    Args:
        tf32: whether products of float32 round to TF32.
        tile: None: the fastest of `TILES` for so many sites and channels, found out at the first call.
    """
    inner, outer, depthwise = int(rows.shape[1]), int(weight.shape[0]), weight.shape[1] != rows.shape[1]
    flat = weight.flatten(2)  # [O, I, T]
    taps, sites = int(flat.shape[2]), index.numel() // int(flat.shape[2])
    out = rows.new_empty(sites, outer)
    if not sites:
        return out
    flat = (flat if depthwise else flat.transpose(1, 2)).contiguous()
    rows, source = rows.contiguous(), source.contiguous()
    corners, cells = (index, 0) if level is None else (level.plan.corners, level.plan.cells)
    reads = rows, source, corners, index, flat
    numbers = sites, taps, int(rows.shape[0]), cells, inner, outer
    aligned = not any(number % 16 for number in (inner, rows.data_ptr(), source.data_ptr()))
    rule = "none" if level is None else level.exchange
    options = {"RULE": rule, "ALIGNED": aligned}
    if not depthwise:
        # interpreted, bfloat16 has no products
        options["FACTORS"] = _DTYPES[rows.dtype] if _is_compiled() else tl.float32
        options["PRECISION"] = "tf32" if tf32 else "ieee"
    biases = rows if bias is None else bias  # some pointer
    residual, added = (rows, 0) if end.residual is None else (end.residual.contiguous(), sites)

    def run(tile: Tile) -> None:
        own = {"SITES": tile.sites, "CHANNELS": tile.channels, "HAS_BIAS": bias is not None}
        written, ends = out, [added, end.low, end.high]
        if tile.splits > 1:
            written = out.new_empty(tile.splits, sites, outer, dtype=torch.float32)
            own["HAS_BIAS"], ends = False, [0, NOTHING.low, NOTHING.high]
        if not depthwise:
            own["DEPTH"] = tile.bytes // rows.element_size()
            ends.append(triton.cdiv(inner, tile.splits * own["DEPTH"]) * own["DEPTH"])
        kernel = _depthwise_kernel if depthwise else _dense_kernel
        grid = triton.cdiv(sites, tile.sites), triton.cdiv(outer, tile.channels), tile.splits
        compiled = {"num_warps": tile.warps, "num_stages": tile.stages}
        with torch.cuda.device_of(rows):
            kernel[grid](*reads, biases, residual, written, *numbers, *ends, **options, **own, **compiled)
            if tile.splits > 1:
                _sum_kernel[triton.cdiv(sites, SUM_SITES), triton.cdiv(outer, SUM_CHANNELS)](
                    written, biases, residual, out, sites, outer, added, end.low, end.high,
                    bias is not None, tile.splits, SUM_SITES, SUM_CHANNELS,
                )  # fmt: skip

    if tile is None:
        key = rows.device, rows.dtype, tf32, rule, depthwise, sites.bit_length(), taps, inner, outer
        if key not in _fastest:
            _fastest[key] = _choose(tiles(depthwise), run)
        tile = _fastest[key]
    run(tile)
    return out


def tiles(depthwise: bool) -> tuple[Tile, ...]:
    """Those that may run."""
    return TILES[depthwise] if _is_compiled() else (INTERPRETED,)


def _choose(among: tuple[Tile, ...], run: Callable[[Tile], None]) -> Tile:
    """The fastest."""
    if len(among) == 1:
        return among[0]
    # ms; a run takes microseconds, and a network has some 15 kinds of them
    times = {tile: do_bench(functools.partial(run, tile), warmup=2, rep=8) for tile in among}
    return min(times, key=times.__getitem__)


def _is_compiled() -> bool:
    """Whether Triton compiles the kernels, and does not interpret them."""
    return isinstance(_dense_kernel, triton.JITFunction)
