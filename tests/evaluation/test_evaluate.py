"""Evaluation and comparison over a dataset, against a loop written out here."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparse_seg import build_model
from sparse_seg.config import DataConfig
from sparse_seg.data import build_dataset
from sparse_seg.data.scenes import write_scenes
from sparse_seg.data.transforms import normalise
from sparse_seg.evaluation.evaluate import combined, evaluate, measure
from sparse_seg.lab.compare import run as comparison
from sparse_seg.lab.compare.run import compare, comparison_ways, groups
from sparse_seg.masks.previous import PreviousPolicy
from sparse_seg.run.passes import Pass
from sparse_seg.run.way import Way

DATA = DataConfig()


def slow_miou(model, dataset, run) -> float:
    """Summed intersections and unions, class by class; classes that never occur do not count."""
    inter, union = np.zeros(19), np.zeros(19)
    for index in range(len(dataset)):
        image, label = dataset.load(index)
        with torch.no_grad():
            prediction = run(normalise(image, DATA.mean, DATA.std)[None]).argmax(1)[0].numpy()
        for k in range(19):
            predicted, labelled = (prediction == k) & (label != 255), label == k
            inter[k] += (predicted & labelled).sum()
            union[k] += (predicted | labelled).sum()
    return float((inter[union > 0] / union[union > 0]).mean())


@torch.no_grad()
def test_the_loss_is_that_of_every_fourth_pixel(dataset):
    torch.manual_seed(0)
    model = build_model({"width": 0.125, "num_classes": 19}).eval()
    found = combined([measure(model, dataset, DATA, Way.dense(8), range(2), with_loss=True)]).loss
    logits, labels = [], []
    for index in (0, 1):
        image, label = dataset.load(index)
        full = model.dense(normalise(image, DATA.mean, DATA.std)[None], 8)
        logits.append(full[0, :, 2::4, 2::4].flatten(1).T)
        labels.append(torch.from_numpy(label[2::4, 2::4].astype(np.int64)).flatten())
    expected = F.cross_entropy(torch.cat(logits), torch.cat(labels), ignore_index=255)
    assert found == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strides", [(8, 16), (8, 16, 32)], ids=str)
def test_a_shared_coarse_pass_changes_no_accuracy(dataset, strides):
    torch.manual_seed(0)
    mask = {"middle_fraction": 0.3}
    model = build_model({"width": 0.125, "num_classes": 19, "strides": list(strides), "mask": mask}).eval()
    ways = comparison_ways(model, ["edge", "confidence", "oracle"], [0, 0.3], ["linear", "separate"])
    timed = compare(model, dataset, DATA, ways, limit=2)
    shared = compare(model, dataset, DATA, ways, limit=2, timed=False)
    assert len(timed) == len(strides) + 3 * 2 * 2
    for one, other in zip(timed, shared, strict=True):
        for key in ("network", "fine_fraction", "exchange", "gmacs", "images"):
            assert one[key] == other[key]
        assert other["miou"] == pytest.approx(one["miou"], rel=1e-3), one["network"]
        assert other["boundary_miou"] == pytest.approx(one["boundary_miou"], rel=1e-3)
        assert one["milliseconds"] > 0
        assert other["milliseconds"] is None


def test_dense_miou_is_that_of_the_slow_loop(model, dataset):
    result = evaluate(model.train(), dataset, DATA, Way.dense(8))
    assert model.training, "its mode is put back"
    model.eval()
    assert result.metrics.miou == pytest.approx(slow_miou(model, dataset, lambda x: model.dense(x, 8)))
    assert result.fine_fraction is None
    assert result.images == len(dataset)
    assert result.as_dict()["images_per_second"] > 0
    assert evaluate(model, dataset, DATA, Way.dense(16), limit=2).images == 2


def test_selective_miou_fraction_and_policy(model, dataset):
    way = Way.policy("edge", 0.5)
    policy = model.policy_for(way)
    result = evaluate(model, dataset, DATA, way)
    assert result.fine_fraction == 0.5  # 12 of 24 blocks
    assert result.metrics.miou == pytest.approx(
        slow_miou(model, dataset, lambda x: model(x, policy(model.start(x))))
    )
    own = evaluate(model, dataset, DATA)
    assert own.fine_fraction == pytest.approx(round(0.15 * 24) / 24)
    three = build_model({"width": 0.125, "num_classes": 19, "strides": [8, 16, 32]})
    way = Way.policy("edge", 0.5, middle_fraction=0.5)
    assert evaluate(three, dataset, DATA, way, limit=1).fine_fraction == 0.5, "of the finest"


@pytest.mark.slow
def test_bounds_cost_their_last_pass_only(model, dataset, monkeypatch):
    """The mask of a bound is made off the clock and the count; a shared coarse pass changes nothing."""
    specs = ["oracle", "oracle:change", "oracle:gain"]
    ways = comparison_ways(model, specs, [0.25])
    clocks = []

    def noted(name, run):
        def call(*args):
            clocks.append(name)
            return run(*args)

        return call

    monkeypatch.setattr(comparison, "now", noted("clock", comparison.now))
    monkeypatch.setattr(Pass, "dense_classes", noted("dense", Pass.dense_classes))
    rows = compare(model, dataset, DATA, ways, limit=1)
    assert clocks == ["clock"] * 6 + ["dense", "dense", "clock", "clock"] * 2, "once for the count"
    assert rows[2]["gmacs"] == rows[3]["gmacs"] == rows[4]["gmacs"]
    shared = compare(model, dataset, DATA, ways, limit=3, timed=False)
    for way, row in zip(ways, shared, strict=True):
        alone = evaluate(model, dataset, DATA, way, limit=3)
        assert row["miou"] == pytest.approx(100 * alone.metrics.miou, rel=1e-3)


@pytest.mark.slow
def test_comparison_of_options_exchanges_and_strides(dataset):
    """Every policy with its options under every rule; three strides have three dense rows."""
    torch.manual_seed(0)
    mask = {"middle_fraction": 0.25}
    model = build_model({"width": 0.125, "head_channels": 16, "strides": [8, 16, 32], "mask": mask}).eval()
    specs, rules = ["edge:cad", "confidence:entropy,max"], ["linear", "none"]
    ways = comparison_ways(model, specs, [0.25], rules)
    assert [len(part) for part in groups(ways)] == [3, 1, 1, 1, 1]
    rows = compare(model, dataset, DATA, ways, limit=2)
    names = [*(f"dense OS{stride}" for stride in (8, 16, 32)), "selective, edge:cad, f=0.25+0.25, linear"]
    assert [row["network"] for row in rows][:4] == names
    assert [row["exchange"] for row in rows[3:]] == ["linear", "none", "linear", "none"]
    assert rows[-1]["middle_fraction"] == 0.25
    assert model.exchange == "linear"
    for way, row in zip(ways, rows, strict=True):
        alone = evaluate(model, dataset, DATA, way, limit=2)
        assert row["miou"] == pytest.approx(100 * alone.metrics.miou)
        assert row["boundary_miou"] == pytest.approx(100 * alone.metrics.boundary_miou)
        assert row["images"] == 2
        assert row["class_iou"] == pytest.approx([100 * iou for iou in alone.metrics.class_iou], nan_ok=True)
    assert rows[2]["gmacs"] < rows[3]["gmacs"] < rows[0]["gmacs"]
    assert rows[3]["gmacs"] < rows[5]["gmacs"] < 1.2 * rows[3]["gmacs"], "a head on the coarse grid more"


@pytest.mark.slow
def test_a_policy_that_looks_back_starts_anew_with_each_video(model, tmp_path, monkeypatch):
    """Confidence at the first frame of each video, else the blocks that the frame before left uncertain."""
    write_scenes(tmp_path / "videos", 3, (64, 96), pan=8)
    videos = build_dataset("scenes", tmp_path / "videos", "train")
    asked = []

    def note(policy, run):
        asked.append(policy._last is None)
        return scores(policy, run)

    scores = PreviousPolicy.scores
    monkeypatch.setattr(PreviousPolicy, "scores", note)
    evaluate(model, videos, DATA, Way.policy("previous", 0.2), limit=12)
    frames = [frame in (0, 10) for frame in range(12)]
    assert asked == frames
    asked.clear()
    for timed in (True, False):
        ways = comparison_ways(model, ["previous"], [0.2])[-1:] * 2
        row, other = compare(model, videos, DATA, ways, 12, timed=timed)
        first = [frame for frame in frames[:2] for _ in range(4)]  # counted, too
        assert asked == [*first, *(frame for frame in frames[2:] for _ in range(2))]
        assert row["miou"] == other["miou"]
        asked.clear()
