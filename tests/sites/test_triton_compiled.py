"""Triton's kernels compiled for GPUs that are not here: they fit, read 16 bytes at once, use tensor cores."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest

from tests.sites.conftest import import_kernels

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is optional"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]

SHARED = 99 << 10  # bytes for a program on consumers' GPUs (compute capability 8.6, 8.9, 12.0)
POINTERS = ("rows", "source", "corners", "index", "weight", "bias", "residual", "parts", "out")
TYPES = {"corners": "*i64", "index": "*i64", "parts": "*fp32", "low": "fp32", "high": "fp32"}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    import_kernels(monkeypatch)
    from sparse_seg.sites import implicit_gemm

    yield implicit_gemm
    import_kernels(monkeypatch)


def compiled(kernels: Any, dtype: str, tile: Any, capability: int, is_depthwise: bool, **values: Any) -> Any:
    """A kernel for pointers and channels that are multiples of 16; of several splits, their sums."""
    import triton.language as tl

    kernel, types = kernels._depthwise_kernel if is_depthwise else kernels._dense_kernel, dict(TYPES)
    values |= {"ALIGNED": True, "HAS_BIAS": tile.splits == 1, "SITES": tile.sites, "CHANNELS": tile.channels}
    if not is_depthwise:
        size = 4 if dtype == "fp32" else 2
        factors = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}[dtype]
        values |= {"FACTORS": factors, "DEPTH": tile.bytes // size}
    if tile.splits > 1:
        types["out"] = "*fp32"
    return compiled_as(kernel, dtype, types, values, capability, num_warps=tile.warps, num_stages=tile.stages)


def compiled_as(
    kernel: Any, dtype: str, types: dict[str, str], values: dict[str, Any], capability: int, **options: int
) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    kinds = {name: f"*{dtype}" if name in POINTERS else "i32" for name in names}
    kinds |= {name: kind for name, kind in types.items() if name in names} | dict.fromkeys(
        values, "constexpr"
    )
    even = [name for name in (*POINTERS, "inner", "outer", "part") if name in names]
    source = ASTSource(
        kernel,
        kinds,
        {(names.index(name),): value for name, value in values.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in even},
    )
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "precision"), [("fp32", "ieee"), ("fp32", "tf32"), ("fp16", "ieee"), ("bf16", "ieee")]
)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rule", ["linear", "nearest", "none"])
def test_products(kernels: Any, dtype: str, precision: str, capability: int, rule: str) -> None:
    for tile in kernels.TILES[False]:
        found = compiled(kernels, dtype, tile, capability, False, RULE=rule, PRECISION=precision)
        assert found.metadata.shared <= SHARED, tile
        code = found.asm["ptx"]
        assert (dtype == "fp32" and precision == "ieee") != ("mma.sync" in code or "wgmma.mma_async" in code)
        assert "cp.async.ca" not in code, "features are read in parts of fewer than 16 bytes"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_depthwise(kernels: Any, capability: int) -> None:
    for tile, rule in itertools.product(kernels.TILES[True], ("linear", "none")):
        found = compiled(kernels, "fp16", tile, capability, True, RULE=rule)
        assert found.metadata.shared <= SHARED
        assert ".local" not in found.asm["ptx"], "registers spill"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_sums_of_splits(kernels: Any, capability: int) -> None:
    sizes = {"SITES": kernels.SUM_SITES, "CHANNELS": kernels.SUM_CHANNELS, "HAS_BIAS": True}
    for dtype, splits in itertools.product(("fp32", "fp16", "bf16"), (2, 4)):
        assert compiled_as(kernels._sum_kernel, dtype, TYPES, sizes | {"SPLITS": splits}, capability).asm[
            "ptx"
        ]
