"""The spconv engine: extra sites as a submanifold level of spconv (Graham and van der Maaten, 2017).

The level lives on the block grid: the phases of a block are batch entries, so dilation is in block units and
phases never mix. With exchange `linear` or `nearest` the level is widened by its rim, the places in coarse
blocks that its sites read, with ghost features; the rim's own outputs are dropped. The lattice is complete,
so it stays a plain convolution, and the entry of a stage, whose taps cross phases, stays with gather. With
`separate` coarse sites and fine ones are both such levels, and there is no lattice.

spconv reads our weight as it is: `[O, 3, 3, I]` is its KRSC. It is optional; on the CPU it runs forward only.
"""

from __future__ import annotations

import functools
import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_seg.sparse.engines import EngineError, gather
from sparse_seg.sparse.grids import unflatten
from sparse_seg.sparse.layout import SiteLayout
from sparse_seg.sparse.neighbours import NeighbourTable
from sparse_seg.sparse.step import Step

DEVICES, DTYPES = ("cpu", "cuda"), (torch.float32, torch.float16)
TOLERANCE = 1e-3  # of the self-check, above TF32's rounding
# The CPU-only wheels (`spconv` 2.3.6 and 2.3.8) are wrong by half the largest value on two threads, which
# race. The check finds that most times on an idle machine (20 of 20 runs with 20x20 blocks), at times not at
# all on a busy one, and never on one thread: so that build is refused by name as well.
CHECK_BLOCKS, CHECK_CHANNELS, CHECK_RUNS = 20, 16, 4


def selective_conv2d(
    rows: Tensor,
    weight: Tensor,
    src: SiteLayout | Step,
    dst: SiteLayout | Step,
    spacing: int,
    exchange: str,
    bias: Tensor | None = None,
) -> Tensor:
    """As `gather.selective_conv2d`: same arguments, same result to rounding.

    Raises:
        EngineError: spconv is missing, broken, or cannot run this dtype or this backward.
    """
    src, dst = Step.of(src), Step.of(dst)
    if not runs(src, dst):
        return gather.selective_conv2d(rows, weight, src, dst, spacing, exchange, bias)
    layout = src.layout
    gather.check_rows(rows, layout)
    _, dilation = gather.lattice_conv_geometry(layout, layout, spacing)
    rows, weight = gather.autocast(rows, weight)
    needs_grad = torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)
    _check(rows.device, rows.dtype, needs_grad)

    apart = layout.separates(exchange)
    table = layout.neighbours(layout, spacing, exchange, apart)
    level = layout.cached(("spconv", spacing, exchange), lambda: _level(layout, table, apart))
    first = 0 if apart else layout.num_lattice
    features = torch.cat((rows[first:], gather.ghost_rows(rows, table)))
    library = _library(rows.device.type)
    out = _submanifold(library, features, weight, level, dilation, needs_grad)[: layout.num_sites - first]
    if not apart:
        out = torch.cat((gather.lattice_conv2d(rows, weight, layout, 1, dilation), out))
    return out if bias is None else out + bias.to(out.dtype)


def runs(src: Step, dst: Step) -> bool:
    """Whether there is work for spconv; the rest (no extra sites, a stage's entry, a step that runs new sites
    only) goes to gather."""
    return src.layout is dst.layout and dst.layout.num_extra > 0 and dst.runs_lattice


def suits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `engine: auto` should choose spconv for features of this device and dtype."""
    return device.type == "cuda" and dtype in DTYPES and available(device.type)


def available(device: str) -> bool:
    """Whether spconv imports and computes correctly on this device type (found out once)."""
    return isinstance(_outcome(device), _Works)


def _check(device: torch.device, dtype: torch.dtype, needs_grad: bool) -> None:
    if device.type not in DEVICES or dtype not in DTYPES:
        raise EngineError(f"spconv cannot run {dtype} on {device.type}; set engine: gather (or auto)")
    if device.type == "cpu" and needs_grad:
        raise EngineError(
            "spconv has no gradients on the CPU; to train set engine: gather, to predict use torch.no_grad()"
        )


@dataclass(frozen=True, eq=False)
class _Level:
    """The extra sites and their rim as spconv's places on the block grid, and the index pairs it found.

    With levels apart, the sites of all levels instead, each level as batch entries of its own.
    """

    places: Tensor  # [M + G, 3] int32: (image, phase and level, y, x)
    size: tuple[int, int]
    batch: int
    pairs: dict[str, Any] = field(default_factory=dict)


def _level(layout: SiteLayout, table: NeighbourTable, apart: bool = False) -> _Level:
    phases = layout.lattice_stride // layout.stride  # per axis
    cells = torch.cat((layout.cells[0 if apart else layout.num_lattice :], table.ghost_cells))
    image, y, x = unflatten(cells, layout.size)
    entry, batch = image * phases**2 + y % phases * phases + x % phases, layout.batch * phases**2
    if apart:
        entry, batch = entry + batch * layout.level.flatten()[cells], batch * len(layout.sizes)
    # spconv reads the memory as it lies: a transposed view gives wrong numbers without a word
    places = torch.stack((entry, y // phases, x // phases), 1).int().contiguous()
    return _Level(places, layout.lattice_size, batch)


def _submanifold(
    library: Any, features: Tensor, weight: Tensor, level: _Level, dilation: int, needs_grad: bool
) -> Tensor:
    """3x3 submanifold convolution `[M + G, I]` to `[M + G, O]`."""
    layer = _layer(weight.shape[3], weight.shape[0], dilation, features.device.type, needs_grad)
    places = library.SparseConvTensor(
        features.contiguous(), level.places, level.size, level.batch, indice_dict=level.pairs
    )
    # its own autocast would cast to float16 whatever was asked for
    with torch.autocast(features.device.type, enabled=False):
        out = torch.func.functional_call(layer, {"weight": weight}, (places,))
    level.pairs.update(out.indice_dict)
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
            indice_key="training" if training else "eval",  # pairs found in eval lack those of backward
            algo=library.ConvAlgo.Native if device == "cpu" else None,  # its default asserts on the CPU
        )
    return layer.train(training)


@dataclass(frozen=True)
class _Works:
    library: Any  # the module spconv.pytorch


@dataclass(frozen=True)
class _Fails:
    message: str


def _library(device: str) -> Any:
    """The module `spconv.pytorch`, once it has shown on this device that it computes what it should."""
    outcome = _outcome(device)
    if isinstance(outcome, _Fails):
        raise EngineError(outcome.message)
    return outcome.library


@functools.cache
def _outcome(device: str) -> _Works | _Fails:
    try:
        library = _import()
    except Exception as error:  # a mismatched build fails in many ways
        if isinstance(error, ModuleNotFoundError) and error.name in ("spconv", "spconv.pytorch"):
            return _Fails(f"spconv is not installed; {_how_to_install()}")
        return _Fails(f"spconv cannot be imported ({_reason(error)}); {_how_to_install()}")
    if library.ops.CPU_ONLY_BUILD:
        return _Fails(f"the CPU-only build of spconv computes wrong numbers; {_how_to_install()}")
    try:
        error_found = _self_check(library, device)
    except Exception as error:
        return _Fails(f"spconv fails on {device} ({_reason(error)}); {_how_to_install()}")
    if not error_found < TOLERANCE:
        wrong = f"computes wrong numbers on {device} (relative error {error_found:.1g})"
        return _Fails(f"the installed spconv {wrong}; {_how_to_install()}")
    return _Works(library)


def _import() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses old names of torch.cuda.amp
        import spconv.pytorch
    return spconv.pytorch


@torch.no_grad()
def _self_check(library: Any, device: str) -> float:
    """Largest relative error of several runs against the gather engine: a race does not show in every one."""
    blocks = torch.ones(2, CHECK_BLOCKS, CHECK_BLOCKS, dtype=torch.bool, device=device)
    layout = SiteLayout.from_fine_blocks(blocks, (2 * CHECK_BLOCKS, 2 * CHECK_BLOCKS))
    generator, channels = torch.Generator().manual_seed(0), CHECK_CHANNELS
    rows = torch.randn(layout.num_sites, channels, generator=generator).to(device)
    weight = torch.randn(channels, 3, 3, channels, generator=generator).to(device)
    spacing = layout.lattice_stride
    with torch.autocast(device, enabled=False):
        expected = gather.selective_conv2d(rows, weight, layout, layout, spacing, "none")
    expected, table = expected[layout.num_lattice :], layout.neighbours(layout, spacing, "none")
    errors = []
    for _ in range(CHECK_RUNS):
        level = _level(layout, table)
        found = _submanifold(library, rows[layout.num_lattice :], weight, level, 1, needs_grad=False)
        errors.append((found - expected).abs().max() / expected.abs().max())
    return torch.stack(errors).max().item()


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


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
