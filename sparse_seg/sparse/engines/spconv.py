"""The spconv engine: extra sites as a submanifold level of spconv (Graham and van der Maaten, 2017).

The level lives on the block grid: the phases of a block are batch entries, so dilation is in block units and
phases never mix. With exchange `linear` or `nearest` the level is widened by its rim, the places in coarse
blocks that its sites read, with ghost features; the rim's own outputs are dropped. The lattice is complete,
so it stays a plain convolution, and so does the entry of a stage, whose taps cross phases (gather engine).

spconv reads our weight as it is: `[O, 3, 3, I]` is its KRSC. It is optional: `pip install spconv-cu120==2.3.6`
(Python 3.9 to 3.11) or `spconv-cu126==2.3.8` (3.9 to 3.13), on CUDA and, forward only, on the CPU.
"""

from __future__ import annotations

import functools
import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_seg.errors import EngineError
from sparse_seg.sparse.engines import gather
from sparse_seg.sparse.layout import NeighbourTable, SiteLayout

DTYPES = (torch.float32, torch.float16)
TOLERANCE = 1e-3  # of the self-check; the broken CPU-only wheel is off by about 0.9


def selective_conv2d(
    rows: Tensor, weight: Tensor, src: SiteLayout, dst: SiteLayout, spacing: int, exchange: str
) -> Tensor:
    """As `gather.selective_conv2d`: same arguments, same result to rounding.

    Raises:
        EngineError: spconv is missing, broken, or cannot run this dtype or this backward.
    """
    if dst.num_extra == 0 or src is not dst or spacing % src.lattice_stride:
        return gather.selective_conv2d(rows, weight, src, dst, spacing, exchange)
    rows, weight = gather.autocast(rows, weight)
    _check(rows, weight)
    lattice = gather.lattice_conv2d(rows, weight, src, dst, spacing)
    table = src.neighbours(dst, spacing, exchange)
    level = src.cached(dst, ("spconv", spacing, exchange), lambda: _level(src, table))
    features = torch.cat((rows[src.num_lattice :], gather.ghost_rows(rows, table)))
    extra = _submanifold(features, weight, level, spacing // src.lattice_stride)
    return torch.cat((lattice, extra[: src.num_extra]))


def available() -> bool:
    """Whether spconv imports and computes correctly here."""
    try:
        _library(torch.device("cuda" if torch.cuda.is_available() else "cpu").type)
    except EngineError:
        return False
    return True


@dataclass(frozen=True, eq=False)
class _Level:
    """Places of the extra sites and their rim on the block grid, and spconv's index pairs for them."""

    places: Tensor  # [M + G, 3] int32: (image and phase, y, x)
    size: tuple[int, int]
    batch: int
    pairs: dict[str, Any] = field(default_factory=dict)


def _level(layout: SiteLayout, table: NeighbourTable) -> _Level:
    phases = layout.lattice_stride // layout.stride
    cells = torch.cat((layout.cells[layout.num_lattice :], table.ghost_cells))
    height, width = layout.size
    x, y, image = cells % width, cells // width % height, cells // (width * height)
    entry = image * phases**2 + y % phases * phases + x % phases
    # spconv reads the memory as it stands: a transposed view gives wrong numbers without a word
    places = torch.stack((entry, y // phases, x // phases), 1).int().contiguous()
    return _Level(places, layout.lattice_size, layout.batch * phases**2)


def _submanifold(features: Tensor, weight: Tensor, level: _Level, dilation: int) -> Tensor:
    """3x3 submanifold convolution `[M + G, I]` to `[M + G, O]`."""
    library = _library(features.device.type)
    layer = _layer(weight.shape[3], weight.shape[0], dilation, features.device.type)
    layer.__dict__["weight"] = weight  # ours, shared: the layer has none of its own
    layer.train(torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad))
    places = library.SparseConvTensor(
        features.contiguous(), level.places, level.size, level.batch, indice_dict=level.pairs
    )
    with torch.autocast(
        features.device.type, enabled=False
    ):  # its own would cast to float16 whatever we asked
        out = layer(places)
    level.pairs.update(out.indice_dict)
    return out.features


@functools.lru_cache(maxsize=None)
def _layer(in_channels: int, out_channels: int, dilation: int, device: str) -> Any:
    library = _import()
    layer = library.SubMConv2d(
        in_channels,
        out_channels,
        3,
        padding=dilation,
        dilation=dilation,
        bias=False,  # on the CPU a bias asserts in eval
        indice_key="level",
        algo=library.ConvAlgo.Native if device == "cpu" else None,  # its default asserts on the CPU
    )
    del layer.weight
    return layer


def _check(rows: Tensor, weight: Tensor) -> None:
    if rows.dtype not in DTYPES:
        raise EngineError(f"spconv runs float32 and float16, not {rows.dtype}; set model.engine=gather")
    if rows.device.type == "cpu" and torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad):
        raise EngineError("spconv cannot train on the CPU (its backward needs CUDA); set model.engine=gather")


@functools.lru_cache(maxsize=None)
def _library(device: str) -> Any:
    """spconv's module, once it has shown on this device that it computes what it should."""
    library = _import()
    layout = SiteLayout.from_fine_blocks(torch.ones(1, 3, 4, dtype=torch.bool, device=device), (6, 8))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(layout.num_sites, 16, generator=generator).to(device)
    weight = torch.randn(16, 3, 3, 16, generator=generator).to(device)
    table = layout.neighbours(layout, layout.lattice_stride, "none")
    with torch.no_grad():
        expected = gather.selective_conv2d(rows, weight, layout, layout, layout.lattice_stride, "none")
        # the library is not in the cache yet, so hand it over
        layer = _layer(16, 16, 1, device)
        layer.__dict__["weight"] = weight
        level = _level(layout, table)
        places = library.SparseConvTensor(
            rows[layout.num_lattice :].contiguous(), level.places, level.size, level.batch
        )
        found = layer.eval()(places).features
    error = (found - expected[layout.num_lattice :]).abs().max() / expected.abs().max()
    if not error < TOLERANCE:
        raise EngineError(
            f"the installed spconv computes wrong numbers (relative error {error:.1g}); {_how_to_install()}"
        )
    return library


@functools.lru_cache(maxsize=None)
def _import() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it uses torch.cuda.amp's old names
            import spconv.pytorch
            from spconv.core import ConvAlgo
    except Exception as error:  # a mismatched build fails in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EngineError(f"spconv cannot be imported ({reason}); {_how_to_install()}") from None
    spconv.pytorch.ConvAlgo = ConvAlgo
    return spconv.pytorch


def _how_to_install() -> str:
    package = "spconv-cu120==2.3.6" if sys.version_info < (3, 12) else "spconv-cu126==2.3.8"
    return f"pip uninstall spconv, then pip install {package}; or set model.engine=gather"
