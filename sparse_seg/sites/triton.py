"""The triton engine: a convolution at extra sites as one kernel, which gathers what it multiplies.

The gather engine writes ghosts to memory, and then all that the taps read; the kernel (`implicit_gemm.py`)
reads rows where they are, makes ghosts in registers, and adds and clamps before it writes. It runs forward on
CUDA, and on the CPU where Triton interprets it (`TRITON_INTERPRET=1`), for tests. It is used only once it has
shown, on its device and in its dtype, that its numbers are right. Where they are not, or it cannot run,
gather runs, and a warning says why.
"""

from __future__ import annotations

import os
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_seg.errors import first_line, out_of_memory
from sparse_seg.sites.level import Level
from sparse_seg.sites.plan import LevelPlan, Taps
from sparse_seg.sites.spconv import computing_dtype
from sparse_seg.sites.values import NOTHING, Epilogue

# of the self-check, by dtype, relative to the largest value: ten times what rounding gave
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
TF32_TOLERANCE = 4e-3
CHECK_CHANNELS = 48, 80  # read and written; multiples of 16, as most layers have


class EngineWarning(UserWarning):
    """The triton engine was asked for and cannot run; gather runs in its place."""


class Kind(NamedTuple):
    """Kernels that are checked together. tf32: whether products round to it; rule: of ghosts, see `Level`."""

    device: torch.device
    dtype: torch.dtype
    tf32: bool
    is_depthwise: bool
    rule: str


_problems: dict[Kind, str] = {}  # of the kinds that were asked for; "" of those that work


def conv2d(
    rows: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    source: Tensor | None = None,
    level: Level | None = None,
    end: Epilogue = NOTHING,
) -> Tensor | None:
    """A convolution of T taps at M sites, and what follows it: `[M, O]`. None where gather is to run: without
    CUDA, with gradients, with groups that are neither one nor as many as channels, and where the kernel does
    not work.

    Args:
        rows: `[R, I]`.
        index: `[M * T]`, the rows that taps read; from R on `3 * cells` ghosts of `level`, by its exchange
            rule, see `Level.tap_rows`; above these, zero.
        weight: `[O, I, kh, kw]`, or `[I, 1, kh, kw]` of a depthwise convolution.
        source: `[cells, I]`, of which ghosts are made; None: there are none.
    """
    if not may_run(rows.device):
        return None
    tensors = [one for one in (rows, weight, bias, source, end.residual) if one is not None]
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
        return None
    channels = int(rows.shape[1])
    is_depthwise = weight.shape[1] == 1 and weight.shape[0] == channels > 1
    if not is_depthwise and weight.shape[1] != channels:
        return None
    level = None if source is None else level
    dtype, rule = computing_dtype(rows), "none" if level is None else level.exchange
    tf32 = rows.is_cuda and dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    kind = Kind(rows.device, dtype, tf32, is_depthwise, rule)
    if kind not in _problems:
        _tell(kind, _problem(kind))
    if _problems[kind]:
        return None
    rows, weight, source = (one.to(dtype) for one in (rows, weight, rows if source is None else source))
    try:
        bias = None if bias is None else bias.to(dtype)
        return _kernels().conv2d(rows, index, weight, bias, source, level, tf32, end)
    except Exception as error:
        if out_of_memory(error):
            raise
        _tell(kind, f"Triton fails ({first_line(error)})")
        return None


def may_run(device: torch.device) -> bool:
    """Whether the kernels are for this device; they may still not work on it."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def problem(device: torch.device, dtype: torch.dtype) -> str:
    """Why gather ran in the kernels' place on a device, in a dtype, so far; "" where it did not."""
    if not may_run(device):
        return f"it needs a CUDA device, not {device.type}"
    kinds = (kind for kind in _problems if (kind.device.type, kind.dtype) == (device.type, dtype))
    return next(filter(None, map(_problems.__getitem__, kinds)), "")


def _tell(kind: Kind, why: str) -> None:
    _problems[kind] = why
    if why:
        warnings.warn(f"engine triton: {why}; gather runs", EngineWarning, stacklevel=2)


def _kernels() -> Any:
    from sparse_seg.sites import implicit_gemm  # imports Triton

    return implicit_gemm


def _problem(kind: Kind) -> str:
    """What keeps kernels from running, if anything does."""
    if kind.dtype not in TOLERANCES:
        return f"it cannot run {kind.dtype}"
    try:
        found = _self_check(kind)
    except Exception as error:  # whatever a compiler raises
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "Triton is not installed (pip install triton)"
        return f"Triton fails on {kind.device} in {kind.dtype} ({first_line(error)})"
    if not found < (TF32_TOLERANCE if kind.tf32 else TOLERANCES[kind.dtype]):
        return f"it computes wrong numbers on {kind.device} in {kind.dtype} (relative error {found:.1g})"
    return ""


@torch.no_grad()
def _self_check(kind: Kind) -> float:
    """Largest relative error of a kernel's tiles against gathered rows times a matrix in float64."""
    kernels, (inner, outer), taps = _kernels(), CHECK_CHANNELS, Taps((-16, 0, 16), (-16, 0, 16))
    plan, generator = LevelPlan(2, (137, 200), 8, kind.device), torch.Generator().manual_seed(0)
    cells = (torch.rand(plan.cells, generator=generator) < 0.3).nonzero().reshape(-1)
    level = Level(plan, cells.to(kind.device), kind.rule)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(kind.device, kind.dtype)

    outer = inner if kind.is_depthwise else outer
    source, extras, index = draw(plan.cells, inner), draw(3 * level.count, inner), level.tap_rows(taps)
    weight, bias = draw(outer, 1 if kind.is_depthwise else inner, 3, 3), draw(outer)
    end = Epilogue(draw(3 * level.count, outer), 0.0)
    table = level.table(source.double(), extras.double(), level.kind(taps))
    read, flat = table[index].reshape(-1, 9, inner), weight.double().flatten(2)
    expected = torch.einsum("mti,it->mi" if kind.is_depthwise else "mti,oit->mo", read, flat.squeeze(1))
    expected = end(expected + bias.double())
    ghosts = None if kind.rule == "none" else level
    errors = []
    for tile in kernels.tiles(kind.is_depthwise):
        found = kernels.conv2d(extras, index, weight, bias, source, ghosts, kind.tf32, end, tile)
        errors.append((found - expected).abs().max() / expected.abs().max())
    return torch.stack(errors).max().item()
