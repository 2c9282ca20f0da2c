"""Every command that takes a model takes a file with a graph; what makes no sense for one is one line."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from sparse_seg import load_model, save_model, selective
from sparse_seg.data.scenes import write_scenes
from sparse_seg.lab.latency import Latency, Run
from tests import captured
from tests.cli.commands import done, fails


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("captured")
    write_scenes(root / "scenes", 4, (64, 96), val_fraction=0.5)
    save_model(selective(captured.trained(19), size=(64, 64)), root / "net.safetensors")
    settings = f"data: {{root: {root / 'scenes'}, crop: [64, 64]}}\nmodel: {{mask: {{policy: confidence}}}}"
    (root / "data.yaml").write_text(settings)
    picture = np.random.default_rng(0).integers(0, 255, (64, 96, 3)).astype(np.uint8)
    cv2.imwrite(str(root / "photo.png"), picture)
    return root


def test_predict_refines(folder: Path, tmp_path: Path) -> None:
    options = ("--steps", 0, 0.3, "--runtime", "torch", "--out", tmp_path)
    done("predict", folder / "net.safetensors", folder / "photo.png", *options)
    assert (tmp_path / "photo_ids.png").exists()
    assert list(tmp_path.glob("photo_step*"))
    done("predict", folder / "net.safetensors", folder / "photo.png", "--dense", 64, "--out", tmp_path / "64")


@pytest.mark.slow
def test_evaluate_compares(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    files = folder / "data.yaml", folder / "net.safetensors"
    out = ("--json", tmp_path / "rows.json", "--report", tmp_path / "report.html")
    done("evaluate", *files, "--compare", 0.1, 0.2, "--policies", "confidence", "oracle:change", *out)
    rows, printed = json.loads((tmp_path / "rows.json").read_text())["rows"], capsys.readouterr().out
    assert [row["network"] for row in rows] == [
        *("dense OS8", "dense OS16"),
        *("selective, confidence, f=0.1", "selective, confidence, f=0.2"),
        *("selective, oracle:change, f=0.1", "selective, oracle:change, f=0.2"),
    ]
    assert all(row["network"] in printed for row in rows)
    assert rows[1]["gmacs"] < rows[0]["gmacs"]
    page = (tmp_path / "report.html").read_text()
    assert "Net, on 2 images" in page
    # four curves; for each of the two images three pictures, dense OS8, four steps, and blocks of two
    assert page.count("<img") == 4 + 2 * (3 + 1 + 4 + 2)
    assert page.count('href="#step-') == 4
    assert "http" not in re.sub(r'src="data:image[^"]*"', "", page), "self-contained"
    assert (tmp_path / "report.png").exists()


def test_calibrate_and_fit_gain(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = folder / "data.yaml", folder / "net.safetensors"
    done("calibrate", *files, "--fine-fraction", 0.25, "--out", tmp_path / "budget.safetensors", "--limit", 2)
    printed = capsys.readouterr().out
    assert "policy confidence: 0.250 of the blocks of 2 frames" in printed
    threshold = float(re.findall(r"--set model.mask.threshold=(\S+)", printed)[0])
    policy = load_model(tmp_path / "budget.safetensors").policy
    assert (policy.name, policy.fine_fraction) == ("confidence", None)
    assert policy.threshold == pytest.approx(threshold, rel=1e-5)
    there = fails(capsys, "calibrate", *files, "--set", "model.mask.threshold=0.5")
    assert "set model.mask.threshold=null, or --fine-fraction F" in there
    done("fit-gain", *files, tmp_path / "gain.safetensors", "--limit", 1)
    found = load_model(tmp_path / "gain.safetensors")
    assert (found.policy.name, found.merge) == ("gain", "patch")


def test_benchmark(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("benchmark", folder / "data.yaml", "--checkpoint", folder / "net.safetensors")
    sizes = ("--size", "64x96", "--repeats", 1, "--fine-fraction", 0.2, "--no-memory")
    options = ("--engines", "gather", "--scopes", "network", "train", "--json", tmp_path / "rows.json")
    done(*common, *sizes, *options, "--batch", 2)
    out = capsys.readouterr().out
    assert re.search(r"^network +selective f=0.2 +gather +\d+\.\d ", out, re.M)
    assert "2 x 64x96 px, confidence mask; medians of 1" in out
    written = json.loads((tmp_path / "rows.json").read_text())
    assert {"command", "commit", "machine", "threads", "date", "notes", "parameters"} <= set(written)
    assert written["checkpoint_bytes"] > 4 * written["parameters"]
    assert [f"{row['scope']}, {row['network']}" for row in written["rows"]] == [
        *("network, dense OS8", "network, dense OS16", "network, selective f=0.2"),
        *("train, dense OS8", "train, selective f=0.2"),
    ]


@pytest.mark.slow
def test_benchmark_in_a_runtime(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the fraction asked for, of which a comparison tells the accuracy; processes are those of
    tests/export/test_files.py."""
    rows: list[dict[str, object]] = [
        {"output_stride": stride, "policy": None, "fine_fraction": None, "miou": miou}
        for stride, miou in ((8, 60.0), (16, 50.0))
    ]
    rows.append({"output_stride": None, "policy": "confidence", "fine_fraction": 0.2, "miou": 58.0})
    (tmp_path / "accuracy.json").write_text(json.dumps({"rows": rows}))

    def timed(prepares: dict[str, Callable[[], Run]], *given: object) -> dict[str, Latency]:
        assert all(prepare()().shape == (1, 64, 96) for prepare in prepares.values())
        return {name: Latency((20.0 - number,)) for number, name in enumerate(prepares)}

    monkeypatch.setattr("sparse_seg.lab.benchmark.runtimes.timed_apart", timed)
    common = ("benchmark", folder / "data.yaml", "--checkpoint", folder / "net.safetensors", "--scopes")
    options = ("--runtimes", "torch", "--fine-fraction", 0.2, "--accuracy", tmp_path / "accuracy.json")
    done(*common, "--size", "64x96", "--repeats", 1, *options, "--json", tmp_path / "out.json")
    found = {row["run"]: row for row in json.loads((tmp_path / "out.json").read_text())["runtimes"]}
    assert {"fine torch", "coarse torch", "selective torch whole f=0.2"} <= set(found)
    assert found["selective torch whole f=0.2"]["accuracy_share"] == pytest.approx(0.8)
