"""What `gpu` measures on a CUDA device, rehearsed on the CPU."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from sparse_seg.cli import gpu
from sparse_seg.errors import MeasurementError
from sparse_seg.lab.benchmark.gpu import PRECISIONS, by_onnxruntime, gpu_table
from sparse_seg.lab.benchmark.measure import Subject
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
    for name in ("", "2 streams, ", "triton, ", "triton, 2 streams, "):
        assert f"\nselective, static, {name}CUDA graph not measured: " in said
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


def test_a_cell_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(subject: Subject, *_: object) -> list[dict[str, object]]:
        if subject.batch == 4:
            raise RuntimeError("CUDA error:\nan illegal memory access")
        return [{"run": "dense OS8, cuDNN", "milliseconds": 2.0, "spread": 0.1, "difference": 0.0}]

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(gpu, "measure_gpu", fail)
    done("gpu", "--json", tmp_path / "gpu.json")
    said = capsys.readouterr().out.splitlines()
    reason = "not measured: RuntimeError: CUDA error: an illegal memory access"
    assert f"light, 4 x 64x96, fp16 {reason}" in said
    assert len([line for line in said if line.endswith(reason)]) == 2 * 4
    assert len(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == 2 * 4


@torch.inference_mode()
def test_by_a_provider_of_onnxruntime() -> None:
    """Images and logits stay where they are, in their dtype; a provider that is not there is named."""
    pytest.importorskip("onnxruntime")
    images = torch.rand(2, 3, 8, 12).to(memory_format=torch.channels_last)
    for dtype in (torch.float32, torch.float16):
        network, given = torch.nn.Conv2d(3, 4, 3).to(dtype).eval(), images.to(dtype)
        run = by_onnxruntime("CPUExecutionProvider", network, given)
        assert run().dtype == dtype
        assert (run() - network(given)).abs().max() < 1e-2
    with pytest.raises(MeasurementError, match="cannot load TensorrtExecutionProvider here"):
        by_onnxruntime("TensorrtExecutionProvider", network, given, trt_fp16_enable=True)


def test_table_of_the_docs_is_the_result_file() -> None:
    rows = json.loads((RESULTS / "gpu_h100.json").read_text())["rows"]
    cells = itertools.groupby(
        rows, lambda row: [row[key] for key in ("network", "size", "batch", "precision")]
    )
    assert gpu_table([list(cell) for _, cell in cells]) == (RESULTS / "gpu_h100.md").read_text()
