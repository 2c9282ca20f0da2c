"""The spconv engine: extra sites as a submanifold level of spconv (Graham and van der Maaten, 2017).

A level lives on the grid of its cells: phases are batch entries, so dilation is in cells and phases never
mix. With exchange `linear` or `nearest` it is widened by its rim, the places without a site that its sites
read, with ghost features; the rim's own outputs are dropped. The lattice is complete, so it stays a plain
convolution; under `separate` it is such a level itself, and the sites of each block's level are batch entries
of their own. spconv is optional; on the CPU it runs forward only.
"""

from __future__ import annotations

import functools
import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.errors import SparseSegError, first_line
from sparse_seg.sites.level import Level
from sparse_seg.sites.plan import Taps

ENGINES = ("auto", "gather", "spconv", "triton")
DEVICES, DTYPES = ("cpu", "cuda"), (torch.float32, torch.float16)
TOLERANCE = 1e-3  # of the self-check, above TF32's rounding
# The CPU-only wheels (`spconv` 2.3.6 and 2.3.8) are wrong by half the largest value on two threads, which
# race. The check finds that most times on an idle machine (20 of 20 runs with 20x20 blocks), at times not at
# all on a busy one, and never on one thread: so that build is refused by name as well.
CHECK_BLOCKS, CHECK_CHANNELS, CHECK_RUNS = 20, 16, 4


class EngineError(SparseSegError):
    """An engine was asked for that cannot run here; the message, one line, says what to do."""


def fits(taps: Taps) -> bool:
    """Whether a window is what spconv knows: 3x3, its taps one distance apart along both axes."""
    return taps.y == taps.x == (-taps.reach, 0, taps.reach)


def computing_dtype(rows: Tensor) -> torch.dtype:
    """The dtype a convolution of these rows runs in: autocast's, or their own."""
    if torch.is_autocast_enabled(rows.device.type) and rows.dtype != torch.float64:
        return torch.get_autocast_dtype(rows.device.type)
    return rows.dtype


def level_conv2d(
    level: Level,
    taps: Taps,
    source: Tensor,
    extras: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    blocks: Tensor | None = None,
) -> Tensor:
    """A 3x3 convolution at a level's extra sites, all of them run: `[3 * K, O]`, zero outside the image.

    Args:
        taps: see `fits`; their distance is a multiple of twice the level's stride.
        source: `[cells, I]`, the complete grid at that stride, of which ghosts are made.
        extras: `[3 * K, I]`.
        weight: `[O, I, 3, 3]`.
        blocks: `[3 * K]`, see `Apart.of_extras`: a site reads those of an equal number only. None: all.

    Raises:
        EngineError: spconv is missing, broken, or cannot run this dtype or this backward.
    """
    places, rim = level.cached(("spconv", taps), lambda: _level_places(level, taps, blocks))
    source, extras, weight = (one.to(computing_dtype(one)) for one in (source, extras, weight))
    with torch.autocast(extras.device.type, enabled=False):
        ghosts = extras[:0] if rim is None else level.ghosts(source, rim, level.exchange)
        features = torch.cat([extras, ghosts])
    out = _conv2d(features, weight, bias, places, taps.reach // (2 * level.plan.stride))[: level.num_run]
    if level.valid is None:
        return out
    return out.new_zeros(int(extras.shape[0]), int(out.shape[1])).index_copy(0, level.valid, out)


def lattice_conv2d(
    level: Level, taps: Taps, rows: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor
) -> Tensor:
    """The same at the sites of the lattice at twice the level's stride: `[cells, I]` to `[cells, O]`.

    blocks: `[cells]`, as there.
    """

    def build() -> Places:
        plan = level.plan
        cells = torch.arange(plan.cells, device=rows.device)
        image = cells // (plan.cells // plan.batch)
        return _places(cells, image, plan.coarse, plan.batch, blocks)

    places = level.cached(("spconv lattice",), build)
    return _conv2d(rows, weight, bias, places, taps.reach // (2 * level.plan.stride))


# -- places ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Places:
    """Sites as spconv's places on a grid of cells, and the index pairs it found.

    Args:
        places: `[M, 3]` int32: (batch entry, y, x).
        rows: `[M]`, which of the features they are; None: all, in order.
    """

    places: Tensor
    size: tuple[int, int]
    batch: int
    rows: Tensor | None = None
    pairs: dict[str, Any] = field(default_factory=dict)


def _level_places(level: Level, taps: Taps, blocks: Tensor | None) -> tuple[Places, Tensor | None]:
    """Of the extra sites and their rim, if there are ghosts; and the rim's cells."""
    plan, cells = level.plan, level.cells
    rim = None if level.exchange == "none" else level.rim([taps])
    parts = [cells] if rim is None else [cells, rim]
    inside = torch.cat([plan.inside.index_select(1, part).reshape(-1) for part in parts])
    phase = torch.arange(3, device=cells.device)
    entry = [phase.repeat_interleave(int(part.shape[0])) for part in parts]
    every = torch.cat([part.repeat(3) for part in parts])
    entries = every // (plan.cells // plan.batch) * 3 + torch.cat(entry)
    rows = None if plan.is_even else inside.nonzero().squeeze(1)
    return _places(every, entries, plan.coarse, 3 * plan.batch, blocks, rows), rim


def _places(
    cells: Tensor, entry: Tensor, size: tuple[int, int], batch: int, blocks: Tensor | None,
    rows: Tensor | None = None,
) -> Places:  # fmt: skip
    if blocks is not None:
        kinds, kind = blocks.unique(return_inverse=True)
        entry, batch = entry + batch * kind, batch * int(kinds.shape[0])
    # spconv reads the memory as it lies: a transposed view gives wrong numbers without a word
    places = torch.stack((entry, cells // size[1] % size[0], cells % size[1]), 1).int().contiguous()
    return Places(places if rows is None else places.index_select(0, rows), size, batch, rows)


# -- how spconv is called ----------------------------------------------------------------------------------


def _conv2d(features: Tensor, weight: Tensor, bias: Tensor | None, places: Places, dilation: int) -> Tensor:
    """`[N, I]` to `[M, O]` at the M places."""
    features, weight = (one.to(computing_dtype(one)) for one in (features, weight))
    needs_grad = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad)
    _check(features.device, features.dtype, needs_grad)
    library = _library(features.device.type)
    if places.rows is not None:
        features = features.index_select(0, places.rows)
    out = _submanifold(library, features, weight, places, dilation, needs_grad)
    return out if bias is None else out + bias.to(out.dtype)


def _check(device: torch.device, dtype: torch.dtype, needs_grad: bool) -> None:
    if device.type not in DEVICES or dtype not in DTYPES:
        raise EngineError(f"spconv cannot run {dtype} on {device.type}; set engine: gather (or auto)")
    if device.type == "cpu" and needs_grad:
        raise EngineError(
            "spconv has no gradients on the CPU; to train set engine: gather, to predict use torch.no_grad()"
        )


def _submanifold(
    library: Any, features: Tensor, weight: Tensor, places: Places, dilation: int, needs_grad: bool
) -> Tensor:
    """3x3 submanifold convolution `[M, I]` to `[M, O]`."""
    krsc = weight.permute(0, 2, 3, 1).contiguous()
    layer = _layer(krsc.shape[3], krsc.shape[0], dilation, features.device.type, needs_grad)
    tensor = library.SparseConvTensor(
        features.contiguous(), places.places, places.size, places.batch, indice_dict=places.pairs
    )
    # its own autocast would cast to float16 whatever was asked for
    with torch.autocast(features.device.type, enabled=False):
        out = torch.func.functional_call(layer, {"weight": krsc}, (tensor,))
    places.pairs.update(out.indice_dict)
    return out.features


@functools.cache
def _layer(in_channels: int, out_channels: int, dilation: int, device: str, training: bool) -> Any:
    """A layer whose weight has no memory: ours takes its place for each call."""
    library = _import()
    with torch.device("meta"):
        layer = library.SubMConv2d(
            in_channels,
            out_channels,
            3,
            padding=dilation,
            dilation=dilation,
            bias=False,  # on the CPU a bias asserts in eval
            # pairs found in eval lack those of backward; a lattice's places serve every dilation
            indice_key=f"{'training' if training else 'eval'} {dilation}",
            algo=library.ConvAlgo.Native if device == "cpu" else None,  # its default asserts on the CPU
        )
    return layer.train(training)


# -- whether it works --------------------------------------------------------------------------------------


def _library(device: str) -> Any:
    """The module `spconv.pytorch`, once it has shown on this device that it computes what it should."""
    library, problem = _outcome(device)
    if problem:
        raise EngineError(f"{problem}; {_how_to_install()}")
    return library


@functools.cache
def _outcome(device: str) -> tuple[Any, str]:
    """The library, and what is wrong with it, if anything is."""
    try:
        library = _import()
    except Exception as error:  # a mismatched build fails in many ways
        if isinstance(error, ModuleNotFoundError) and error.name in ("spconv", "spconv.pytorch"):
            return None, "spconv is not installed"
        return None, f"spconv cannot be imported ({first_line(error)})"
    if library.ops.CPU_ONLY_BUILD:
        return None, "the CPU-only build of spconv computes wrong numbers"
    try:
        error_found = _self_check(library, device)
    except Exception as error:
        return None, f"spconv fails on {device} ({first_line(error)})"
    if not error_found < TOLERANCE:
        wrong = f"computes wrong numbers on {device} (relative error {error_found:.1g})"
        return None, f"the installed spconv {wrong}"
    return library, ""


def _import() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses old names of torch.cuda.amp
        import spconv.pytorch
    return spconv.pytorch


@torch.no_grad()
def _self_check(library: Any, device: str) -> float:
    """Largest relative error of several runs on whole grids against a dense convolution in float64: a race
    does not show in every one."""
    batch, side, channels = 6, CHECK_BLOCKS, CHECK_CHANNELS
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(batch * side * side, channels, generator=generator)
    weight = torch.randn(channels, channels, 3, 3, generator=generator)
    grid = rows.double().reshape(batch, side, side, channels).permute(0, 3, 1, 2)
    dense = F.conv2d(grid, weight.double(), padding=1).permute(0, 2, 3, 1).reshape(-1, channels)
    expected = dense.float().to(device)
    cells = torch.arange(batch * side * side, device=device)
    errors = []
    for _ in range(CHECK_RUNS):
        places = _places(cells, cells // (side * side), (side, side), batch, None)
        found = _submanifold(library, rows.to(device), weight.to(device), places, 1, needs_grad=False)
        errors.append((found - expected).abs().max() / expected.abs().max())
    return torch.stack(errors).max().item()


def _how_to_install(
    python: tuple[int, int] = (sys.version_info[0], sys.version_info[1]),
    cuda: str | None = torch.version.cuda,
) -> str:
    here = f"Python {python[0]}.{python[1]} " + (f"and CUDA {cuda}" if cuda else "without CUDA")
    if python >= (3, 14):
        return f"there is no wheel for {here}: set engine: gather"
    build, release = ("cu120", "2.3.6") if python < (3, 12) else ("cu126", "2.3.8")
    # all wheels share one folder: removing the CPU-only one alone would break the other
    remove = f"pip uninstall -y spconv cumm spconv-{build} cumm-{build}"
    return f"for {here}: {remove} && pip install spconv-{build}=={release}; or set engine: gather"
