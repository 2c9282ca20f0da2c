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


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, 10, (64, 96), val_fraction=0.4)
    return build_dataset("scenes", root, "val")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(
        {"width": 0.125, "depths": [1, 1, 1, 1], "head_channels": 16, "num_classes": 19}
    ).eval()


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
@pytest.mark.parametrize("strides", [[8, 16], [8, 16, 32]], ids=str)
def test_comparison_of_options_exchanges_and_strides(dataset, strides):
    """Each way as it is alone, and from a shared coarse pass."""
    torch.manual_seed(0)
    mask = {"middle_fraction": 0.25}
    model = build_model({"width": 0.125, "head_channels": 16, "strides": strides, "mask": mask}).eval()
    specs, rules = ["edge:cad", "confidence:entropy,max", "oracle"], ["linear", "separate"]
    ways = comparison_ways(model, specs, [0, 0.25], rules)
    dense = len(strides)
    assert [len(part) for part in groups(ways)] == [dense, *[2] * 6]
    timed, shared = (compare(model, dataset, DATA, ways, 2, timed=one) for one in (True, False))
    middle = "+0.25" if dense == 3 else ""
    names = [f"selective, edge:cad, f={fraction}{middle}, linear" for fraction in (0, 0.25)]
    assert [row["network"] for row in timed][: dense + 2] == [*(f"dense OS{one}" for one in strides), *names]
    assert [row["exchange"] for row in timed[dense:]] == ["linear", "linear", "separate", "separate"] * 3
    assert timed[-1]["middle_fraction"] == (0.25 if dense == 3 else None)
    assert model.exchange == "linear"
    for way, row, other in zip(ways, timed, shared, strict=True):
        alone = evaluate(model, dataset, DATA, way, limit=2).metrics
        for name, value in (("miou", alone.miou), ("boundary_miou", alone.boundary_miou)):
            assert row[name] == pytest.approx(100 * value), way.name
            assert other[name] == pytest.approx(100 * value, rel=1e-3), way.name
        assert row["class_iou"] == pytest.approx([100 * iou for iou in alone.class_iou], nan_ok=True)
        for key in ("network", "fine_fraction", "exchange", "gmacs", "images"):
            assert row[key] == other[key]
        assert (row["images"], other["milliseconds"]) == (2, None)
        assert row["milliseconds"] > 0
    edge, confidence = timed[dense + 1]["gmacs"], timed[dense + 5]["gmacs"]
    assert timed[dense - 1]["gmacs"] < edge < timed[0]["gmacs"]
    assert edge < confidence < 1.2 * edge, "a head on the coarse grid more"


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
