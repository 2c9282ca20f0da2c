"""Which engine runs, and that nothing but speed on CUDA is lost without spconv."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparse_seg import build_model
from sparse_seg.sparse import ENGINES, EngineError, SelectiveConv2d, SiteLayout, Step
from sparse_seg.sparse import conv as conv_module
from sparse_seg.sparse.engines import gather, spconv
from tests.reference import block_mask

ROOT = Path(__file__).parents[2]


@pytest.fixture
def without_spconv(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in sys.modules if name.startswith("spconv.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "spconv", None)
    spconv._outcome.cache_clear()
    yield
    spconv._outcome.cache_clear()


def small_model(engine: str, head: str = "deeplabv3"):
    torch.manual_seed(0)
    config = {"width": 0.125, "head": head, "head_channels": 16, "num_classes": 3, "engine": engine}
    return build_model(config)


def test_everything_but_spconv_works_without_it(without_spconv: None, device: str) -> None:
    """Prediction and a training step; asking for spconv by name says what to install."""
    images = torch.randn(2, 3, 64, 96).to(device)
    mask = block_mask("random", (2, 4, 6)).to(device)
    for engine in ("auto", "gather"):
        model = small_model(engine).to(device)
        model(images, fine_blocks=mask).square().mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        with torch.no_grad():
            assert model.eval()(images, fine_blocks=mask).isfinite().all()
    model = small_model("spconv").to(device).eval()
    with torch.no_grad():
        assert model.dense(images).isfinite().all(), "dense networks have nothing for spconv to do"
        with pytest.raises(
            EngineError, match=r"^spconv is not installed; for Python .*pip install spconv-cu"
        ):
            model(images, fine_blocks=mask)


@pytest.mark.slow
def test_gather_never_imports_spconv() -> None:
    program = (
        "import sys, torch, sparse_seg\n"
        "model = sparse_seg.build_model({'width': 0.125, 'engine': 'ENGINE'})\n"
        "model(torch.randn(1, 3, 64, 64)).mean().backward()\n"
        "assert 'spconv' not in sys.modules and 'cumm' not in sys.modules\n"
    )
    for engine in ("gather", "auto") if not torch.cuda.is_available() else ("gather",):
        subprocess.run([sys.executable, "-c", program.replace("ENGINE", engine)], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("python", "cuda", "message"),
    [
        ((3, 10), "12.1", "for Python 3.10 and CUDA 12.1: pip uninstall .* pip install spconv-cu120==2.3.6"),
        ((3, 11), None, "for Python 3.11 without CUDA: pip uninstall .* pip install spconv-cu120==2.3.6"),
        ((3, 12), "12.6", "for Python 3.12 and CUDA 12.6: pip uninstall .* pip install spconv-cu126==2.3.8"),
        ((3, 13), None, "pip install spconv-cu126==2.3.8; or set engine: gather"),
        ((3, 14), "13.0", "there is no wheel for Python 3.14 and CUDA 13.0: set engine: gather"),
    ],
)
def test_what_to_install(python: tuple[int, int], cuda: str | None, message: str) -> None:
    assert re.search(message, spconv._how_to_install(python, cuda))


def test_what_auto_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Step(SiteLayout.from_fine_blocks(block_mask("random", (2, 4, 6)), (8, 12)))
    dense = Step(SiteLayout(2, (8, 12), 8))
    rows = torch.zeros(layout.num_run, 4)
    asked: list[str] = []

    def available(device: str) -> bool:
        asked.append(device)
        return True

    monkeypatch.setattr(spconv, "available", available)
    assert conv_module._engine("auto", rows, layout, layout) is gather, "on the CPU"
    assert conv_module._engine("spconv", rows, layout, layout) is spconv
    assert conv_module._engine("gather", rows, layout, layout) is gather
    assert asked == []
    cuda = torch.device("cuda")
    fits = [
        dtype
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        if spconv.suits(cuda, dtype)
    ]
    assert fits == [torch.float32, torch.float16]
    assert asked == ["cuda", "cuda"]
    monkeypatch.setattr(spconv, "available", lambda device: False)
    assert not spconv.suits(cuda, torch.float32)

    seen: list[tuple[str, torch.dtype]] = []

    def suits(device: torch.device, dtype: torch.dtype) -> bool:
        seen.append((device.type, dtype))
        return True

    monkeypatch.setattr(spconv, "suits", suits)
    assert conv_module._engine("auto", rows, layout, layout) is spconv
    with torch.autocast("cpu", torch.bfloat16):
        conv_module._engine("auto", rows, layout, layout)
    assert seen == [("cpu", torch.float32), ("cpu", torch.bfloat16)], "the dtype it will run in"
    for src, dst in ((dense, dense), (dense, layout)):
        assert conv_module._engine("auto", rows, src, dst) is gather, "no extra sites, or a stage's entry"
    assert len(seen) == 2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("head", ["lite", "deeplabv3"])
def test_the_config_reaches_every_convolution(engine: str, head: str) -> None:
    model = small_model(engine, head)
    convs = [module for module in model.modules() if isinstance(module, SelectiveConv2d)]
    assert len(convs) == 16 + 3 * (head == "deeplabv3")
    assert {conv.engine for conv in convs} == {engine}
    assert all(f"engine={engine}" in repr(conv) for conv in convs)


def test_an_unknown_engine() -> None:
    with pytest.raises(ValueError, match="unknown engine 'cuda'; choose one of auto, gather, spconv"):
        SelectiveConv2d(3, 4, 16, engine="cuda")


def test_what_a_layout_caches_is_built_once() -> None:
    layout = SiteLayout(1, (4, 4), 8)
    assert layout.cached("key", lambda: [1]) is layout.cached("key", lambda: [2])
    assert layout.cached("other", lambda: [2]) == [2]
    assert SiteLayout(1, (4, 4), 8).cached("key", lambda: [3]) == [3]


def test_sparse_imports_nothing_of_ours_but_sites_and_errors() -> None:
    for path in (ROOT / "sparse_seg/sparse").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            ours = [name for name in names if name.split(".")[0] == "sparse_seg"]
            allowed = ("sparse_seg.sparse", "sparse_seg.sites", "sparse_seg.errors")
            assert all(name.startswith(allowed) for name in ours), (path, ours)
