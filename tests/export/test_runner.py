"""Where passes run: by the rule of `auto`, or where they are asked to; and what is said of it."""

import sys

import numpy as np
import pytest
import torch

from sparse_seg.errors import SparseSegError
from sparse_seg.export import runner as rules
from sparse_seg.export.onnx_file import to_onnx
from sparse_seg.export.runner import Runner
from sparse_seg.export.segmentor import in_runtime
from sparse_seg.lab.predict.segment import Segmenter
from sparse_seg.run.way import Way
from tests.export.kinds import kind_model

pytest.importorskip("onnx", reason="needs the package onnx")
pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")


def run(runner: Runner, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return runner.start(images).follow(runner.way).classes()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_a_size_gets_a_graph_when_it_has_come_often(images, monkeypatch):
    monkeypatch.setattr(rules, "PATIENCE", 2)
    monkeypatch.setattr(rules, "SIZES", 1)
    model = kind_model("lite", "entropy")
    runner, expected = Runner(model, "auto", Way()), model.classify(images)[0]
    for number in range(5):
        assert (run(runner, images) == expected).float().mean() > 0.99
        assert runner.runs.get("onnxruntime", 0) == max(0, number - 1)
    for _ in range(4):  # a second size: there is no room for its graph
        run(runner, images[..., :64])
    assert runner.runs == {"torch": 6, "onnxruntime": 3}
    assert runner.report() == "runtime: onnxruntime for 3 of 9 runs, torch for the others"
    assert runner.seconds > 0


@pytest.mark.slow
def test_large_images_stay_in_torch(images, monkeypatch):
    monkeypatch.setattr(rules, "PATIENCE", 0)
    monkeypatch.setattr(rules, "PIXELS", 64 * 95)
    runner = Runner(kind_model("lite", "entropy"), "auto", Way.dense(16))
    run(runner, images)
    assert runner.runs == {"torch": 1}
    run(runner, images[..., :64])
    assert runner.runs == {"torch": 1, "onnxruntime": 1}


@pytest.mark.parametrize(
    ("kind", "way", "reason"),
    [
        ("lite", Way.policy("previous", 0.2), "mask policy previous needs more than the image"),
        ("8 16 32", Way(), "not for three strides"),
        ("lite", Way.policy("edge", 0.001), "gives none of 24 blocks"),
        ("undilated", Way(merge="patch"), "the coarse pass depend on the mask"),
    ],
    ids=str,
)
def test_what_cannot_be_exported_stays_in_torch_and_says_why(kind, way, reason, images, monkeypatch):
    monkeypatch.setattr(rules, "PATIENCE", 0)
    runner = Runner(kind_model(kind, "edge"), "auto", way)
    if kind != "undilated":  # a pass refuses it, too
        run(runner, images)
        assert runner.runs == {"torch": 1}
    assert runner.report().startswith("runtime: torch (")
    assert reason in runner.report()
    with pytest.raises(SparseSegError, match=reason):
        run(Runner(kind_model(kind, "edge"), "onnxruntime", way), images)


def test_a_failing_exporter_stops_no_run(images, monkeypatch):
    def fail(network):
        raise RuntimeError("no such operator\nIR follows")

    monkeypatch.setattr(rules, "PATIENCE", 0)
    monkeypatch.setattr("sparse_seg.export.segmentor.to_onnx", fail)
    runner = Runner(kind_model("lite", "edge"), "auto", Way())
    run(runner, images)
    assert runner.report() == "runtime: torch (no such operator)"


@pytest.mark.slow
def test_one_failing_size_leaves_the_others_where_they_are(images, monkeypatch):
    def fail(network):
        raise RuntimeError("too much memory")

    monkeypatch.setattr(rules, "PATIENCE", 0)
    runner = Runner(kind_model("lite", "edge"), "auto", Way())
    run(runner, images)
    monkeypatch.setattr("sparse_seg.export.segmentor.to_onnx", fail)
    before = runner.seconds
    for _ in range(2):
        run(runner, images[..., :64])
        run(runner, images)
    assert runner.runs == {"torch": 2, "onnxruntime": 3}
    assert runner.report().endswith("for 3 of 5 runs, torch for the others (too much memory)")
    assert runner.seconds > before > 0


@pytest.mark.slow
@pytest.mark.parametrize("way", [Way(), Way.policy("edge", 0.3)], ids=["own policy", "named policy"])
def test_one_graph_for_one_way(way, images, monkeypatch):
    """Whoever asks for it, however often: `auto`, a named runtime, and a segmenter of photos."""
    graphs = []

    def counted(network):
        graphs.append(network)
        return to_onnx(network)

    monkeypatch.setattr(rules, "PATIENCE", 0)
    monkeypatch.setattr("sparse_seg.export.segmentor.to_onnx", counted)
    model = kind_model("lite", "edge")
    runner = Runner(model, "auto", way)
    segmenter = Segmenter(model, way, runner=runner)
    for _ in range(2):
        segmenter(np.zeros((64, 96, 3), np.uint8))
    assert len(graphs) == 1
    fast = in_runtime(model, "onnxruntime")
    for _ in range(2):
        fast.start(images).follow(way).classes()
    assert len(graphs) == 2


def test_a_missing_package(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    runner = Runner(kind_model("lite", "edge"), "auto", Way())
    run(runner, images)
    assert runner.report().startswith("runtime: torch (onnxruntime is not installed: pip install")
    with pytest.raises(SparseSegError, match="onnxruntime is not installed"):
        Runner(kind_model("lite", "edge"), "onnxruntime", Way())


@pytest.mark.slow
def test_reports_of_one_runtime(images):
    model = kind_model("lite", "edge")
    for asked, report in (
        ("onnxruntime", "runtime: onnxruntime"),
        ("torch", "runtime: torch"),
        ("auto", "runtime: torch (a size gets a graph in onnxruntime when it has come 10 times)"),
    ):
        runner = Runner(model, asked, Way())
        run(runner, images)
        assert runner.report() == report
