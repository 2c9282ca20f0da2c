"""Where passes run: by the rule of `auto`, or where they are asked to; and what is said of it."""

import sys

import numpy as np
import pytest
import torch

import sparse_seg
from sparse_seg.errors import SparseSegError
from sparse_seg.export import in_runtime
from sparse_seg.export import runner as rules
from sparse_seg.export.runner import Runner
from sparse_seg.lab.predict.segment import ImageSegmenter
from sparse_seg.run.way import Way
from tests.export.kinds import kind_model
from tests.reference import block_mask, relative_error

pytest.importorskip("onnx", reason="needs the package onnx")
pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")


def run(runner: Runner, images: torch.Tensor, way: Way | None = None) -> torch.Tensor:
    with torch.inference_mode():
        return runner.start(images).follow(way or Way()).classes()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def price(monkeypatch):
    """Sets what `auto` takes for the price of a graph, in runs: as many must be to come."""

    def set_to(runs: float) -> None:
        monkeypatch.setattr(rules, "NODE_SECONDS", 0.0)
        monkeypatch.setattr(rules, "RUNS", rules.SAVED * runs)

    return set_to


class Worth(Exception):
    """In place of an exporter: a graph was asked for."""


@pytest.mark.parametrize(
    ("expected", "count"),
    [(11, None), (12, None), (13, 2), (300, 2), (None, 11)],
    ids=["too few", "just too few", "just enough", "many", "unknown: as many as have been"],
)
def test_a_graph_is_made_when_it_saves_more_than_it_costs(expected, count, images, price, monkeypatch):
    def ask(network):
        raise Worth("asked for")

    monkeypatch.setattr("sparse_seg.export.onnx_segmentor.to_onnx", ask)
    price(10)
    runner = Runner(kind_model("tiny", "edge"))
    runner.expect(expected)
    for number in range(expected if expected in (11, 12) else 14):
        run(runner, images)
        asked = "asked for" in runner.report()
        assert asked == (count is not None and number >= count)
        if asked:
            break
    else:
        assert count is None
        assert runner.report() == "runtime: torch (too few images for a graph in onnxruntime)"


@pytest.mark.slow
def test_sizes_get_their_graphs(images, price, monkeypatch):
    price(0)
    monkeypatch.setattr(rules, "SIZES", 1)
    model = kind_model("tiny", "entropy")
    runner, expected = Runner(model, "auto", Way()), model.classify(images)[0]
    for number in range(5):
        assert (run(runner, images) == expected).float().mean() > 0.99
        assert runner.runs.get("onnxruntime", 0) == max(0, number - 1)
    for _ in range(4):  # a second size: there is no room for its graph
        run(runner, images[..., :64])
    assert runner.runs == {"torch": 6, "onnxruntime": 3}
    report = runner.report()
    assert report.startswith("runtime: onnxruntime for 3 of 9 runs, torch for the others; 1 graph in ")
    assert runner.seconds > 0
    monkeypatch.setattr(rules, "PIXELS", 64 * 95)  # the first size is larger
    runner = Runner(model, "auto", Way.dense(16))
    for size in (96, 64):
        for _ in range(3):
            run(runner, images[..., :size], Way.dense(16))
    assert runner.runs == {"torch": 5, "onnxruntime": 1}


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["auto", "onnxruntime", "openvino", "cuda-graph"])
@torch.no_grad()
def test_a_model_anywhere_is_the_model(runtime, images, price, replayed_here):
    """In `auto` each result comes from PyTorch and, from the third run, onnxruntime, but what no graph can
    run."""
    pytest.importorskip("openvino" if runtime == "openvino" else "onnxruntime")
    price(0)
    model = kind_model("tiny", "entropy")
    fast, blocks, pair = (
        in_runtime(model, runtime, 1),
        block_mask("random", (1, 4, 6)),
        torch.randn(2, 3, 47, 70),
    )
    for _ in range(3 if runtime == "auto" else 1):
        assert relative_error(fast(images), model(images)) < 1e-5
        assert relative_error(fast(images, blocks), model(images, blocks)) < 1e-5
        assert relative_error(fast.dense(images, 8), model.dense(images, 8)) < 1e-5
        found, expected = fast.classify(images), model.classify(images)
        assert found[0].dtype == torch.int64
        assert (found[0] == expected[0]).float().mean() > 0.99
        assert found[1] is not None
        assert expected[1] is not None
        assert torch.equal(found[1], expected[1])
    assert relative_error(fast(pair), model(pair)) < 1e-5
    assert fast.seconds > 0
    if not isinstance(fast, Runner):
        assert fast.classify(images, output_stride=8)[1] is None
        return
    assert fast.runs == {"torch": 9, "onnxruntime": 4}
    levels = blocks.long()
    assert relative_error(fast(images, levels), model(images, levels)) < 1e-5
    picture = np.zeros((64, 96, 3), np.uint8)
    assert sparse_seg.segment(fast, picture).classes.shape == (64, 96)
    assert fast.runs == {"torch": 10, "onnxruntime": 5}
    with pytest.raises(ValueError, match="32x32"):
        fast(images[..., :16])


@pytest.mark.parametrize(
    ("kind", "way", "reason"),
    [
        ("tiny", Way.policy("previous", 0.2), "mask policy previous needs more than the image"),
        ("8 16 32", Way(), "not for three strides"),
        ("tiny", Way.policy("edge", 0.001), "gives none of 24 blocks"),
        ("undilated", Way(merge="patch"), "the coarse pass depend on the mask"),
    ],
    ids=str,
)
def test_what_cannot_be_exported_stays_in_torch_and_says_why(kind, way, reason, images, price):
    price(0)
    runner = Runner(kind_model(kind, "edge"), "auto", way)
    if kind != "undilated":  # a pass refuses it, too
        for _ in range(3):
            run(runner, images, way)
        assert runner.runs == {"torch": 3}
    assert runner.report().startswith("runtime: torch (")
    assert reason in runner.report()
    with pytest.raises(SparseSegError, match=reason):
        run(Runner(kind_model(kind, "edge"), "onnxruntime", way), images, way)


def test_each_refusal_is_told_with_its_runs(images, monkeypatch):
    runner, blocks = Runner(kind_model("tiny", "edge")), block_mask("random", (1, 4, 6))
    with torch.inference_mode():
        for _ in range(2):
            runner(images, blocks.long())
        runner(images, torch.zeros_like(blocks))
        runner(images)
        monkeypatch.setattr(rules, "PIXELS", 64 * 95)
        runner.dense(images)
    said = runner.report()
    assert said.startswith("runtime: torch (2 runs: in a runtime fine_blocks must be bool")
    assert "; 1 run: in a runtime all images need the same number of fine blocks" in said
    assert "; 1 run: images of over 6080 px get no graph; 1 run: too few images for a graph" in said


@pytest.mark.slow
def test_one_failing_size_leaves_the_others_where_they_are(images, price, monkeypatch):
    def fail(network):
        raise RuntimeError("too much memory\nIR follows")

    price(0)
    runner = Runner(kind_model("tiny", "edge"), "auto", Way())
    for _ in range(3):
        run(runner, images)
    monkeypatch.setattr("sparse_seg.export.onnx_segmentor.to_onnx", fail)
    before = runner.seconds
    for _ in range(3):
        run(runner, images[..., :64])
        run(runner, images)
    assert runner.runs == {"torch": 5, "onnxruntime": 4}
    assert "for 4 of 9 runs, torch for the others (3 runs: too much memory); 1 graph" in runner.report()
    assert runner.seconds > before > 0


@pytest.mark.slow
@pytest.mark.parametrize("way", [Way(), Way.policy("edge", 0.3)], ids=["own policy", "named policy"])
def test_one_graph_for_one_way(way, images, price, made):
    """Whoever asks for it, however often: `auto`, a named runtime, and a segmenter of photos."""
    price(0)
    model = kind_model("tiny", "edge")
    runner = Runner(model, "auto", way)
    segmenter = ImageSegmenter(runner, way)
    for _ in range(4):
        segmenter(np.zeros((64, 96, 3), np.uint8))
    assert (len(made), runner.runs) == (1, {"torch": 2, "onnxruntime": 2})
    assert (segmenter.frames, segmenter.seconds > 0) == (4, True)
    named = Runner(model, "onnxruntime", way)
    for _ in range(2):
        run(named, images, way)
    assert len(made) == 2
    assert named.report().partition(";")[0] == "runtime: onnxruntime"


def test_a_missing_package(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    runner = Runner(kind_model("tiny", "edge"), "auto", Way())
    run(runner, images)
    assert runner.report().startswith("runtime: torch (onnxruntime is not installed: pip install")
    runner = Runner(kind_model("tiny", "edge"), "torch", Way())
    run(runner, images)
    assert runner.report() == "runtime: torch"
    with pytest.raises(SparseSegError, match="onnxruntime is not installed"):
        Runner(kind_model("tiny", "edge"), "onnxruntime", Way())
