"""What `gpu` measures on a CUDA device, rehearsed on the CPU."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from sparse_seg.cli import gpu
from sparse_seg.lab.benchmark.gpu import PRECISIONS, gpu_table
from tests.cli.commands import done

RESULTS = Path(__file__).parents[2] / "docs/results"


@pytest.mark.slow
def test_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs of one network agree; what the CPU lacks is said, and the rest is measured and written."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "tiny.yaml").write_text("model: {width: 0.125, head_channels: 8, mask: {policy: confidence}}")
    monkeypatch.setattr(gpu, "NETWORKS", {"tiny": ("tiny.yaml", 0.3, ["model.num_classes=5"])})
    monkeypatch.setattr(gpu, "BATCHES", (2,))
    monkeypatch.setattr(gpu, "PRECISIONS", {"tf32": PRECISIONS["tf32"]})
    out = tmp_path / "gpu.json"
    done("gpu", "--json", out, "--configs", tmp_path, "--repeats", 1)
    rows = json.loads(out.read_text())["rows"]
    assert {(row["batch"], row["precision"]) for row in rows} == {(2, "tf32")}
    names = {row["run"] for row in rows}
    assert {"dense OS8, cuDNN", "dense OS16, cuDNN", "selective, gather", "selective, static"} <= names
    assert max(row["difference"] for row in rows) < 1e-4
    said = capsys.readouterr().out
    assert "dense OS8, CUDA graph not measured: " in said
    assert "selective, triton not measured: EngineError: it needs a CUDA device, not cpu" in said
    assert out.with_suffix(".md").read_text().count("\n") == len(rows) + 2


def test_a_run_that_is_stopped_says_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done("gpu", "--json", tmp_path / "gpu.json", "--minutes", 0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "stopped after 0 minutes; not measured:"
    assert len(lines) == 1 + 2 * 2 * 4
    assert lines[1] == "  DeepLabV3-ResNet-50, 1 x 64x96, tf32"


def test_large_images_on_tensor_cores_come_first() -> None:
    keys = list(itertools.product(("heavy", "light"), ((8, 16), (16, 32)), (1, 4), ("fp32", "fp16")))
    found = gpu.by_weight(keys)
    assert sorted(found) == sorted(keys)
    assert found[:2] == [("heavy", (16, 32), 1, "fp16"), ("heavy", (16, 32), 4, "fp16")]
    pixels = [batch * size[0] * size[1] for _, size, batch, _ in found[2:]]
    assert pixels == sorted(pixels)


def test_table_of_the_docs_is_the_result_file() -> None:
    rows = json.loads((RESULTS / "gpu_h100.json").read_text())["rows"]
    cells = itertools.groupby(
        rows, lambda row: [row[key] for key in ("network", "size", "batch", "precision")]
    )
    assert gpu_table([list(cell) for _, cell in cells]) == (RESULTS / "gpu_h100.md").read_text()
