"""The weights that come with the package."""

from pathlib import Path

import cv2
import pytest
import torch

import sparse_seg
from sparse_seg.checkpoint import load
from sparse_seg.checkpoint.file import SHIPPED
from sparse_seg.config import DataConfig
from sparse_seg.data import build_dataset
from sparse_seg.errors import CheckpointError
from sparse_seg.evaluation.cost import count_macs, count_parameters
from sparse_seg.evaluation.evaluate import evaluate
from sparse_seg.evaluation.views import ONCE, Views
from sparse_seg.run.way import Way
from tests.shared import SHARED, needs_shared

NAMES = sorted(path.stem for path in SHIPPED.glob("*.safetensors"))


@pytest.mark.parametrize("name", NAMES)
def test_each_has_a_card_classes_and_a_size_that_a_package_bears(name: str) -> None:
    checkpoint = load(name)
    assert checkpoint.path.stat().st_size < 8e6
    assert checkpoint.classes is not None
    assert checkpoint.training["frame"] == [360, 480]
    assert "licence" in checkpoint.path.with_suffix(".md").read_text()


@pytest.mark.parametrize(("name", "parameters", "gmacs"), [("camvid-slim", 0.8, 1), ("street-lite0", 4, 3.5)])
def test_they_keep_their_budgets(name: str, parameters: float, gmacs: float) -> None:
    model = sparse_seg.load_model(name)
    assert count_parameters(model) < parameters * 1e6
    assert sum(count_macs(model, torch.randn(1, 3, 360, 480)).values()) < gmacs * 1e9


def test_camvid_slim_has_the_weights_that_its_results_were_measured_with() -> None:
    assert load("camvid-slim").digest == "00655fe5a765605f4804a441b55f83db"


def test_a_file_of_the_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "camvid-slim").write_bytes(b"other")
    with pytest.raises(CheckpointError):
        sparse_seg.load_model("camvid-slim")


@pytest.mark.slow
@needs_shared("data/camvid")
def test_camvid_slim_segments_frames_it_has_not_seen() -> None:
    model, dataset = (
        sparse_seg.load_model("camvid-slim"),
        build_dataset("camvid", SHARED / "data/camvid", "val"),
    )
    result = evaluate(model, dataset, DataConfig(dataset="camvid"), Way.dense(8), limit=6)
    assert result.metrics.pixel_accuracy > 0.88


@pytest.mark.slow
@needs_shared("data/camvid")
@pytest.mark.parametrize("factor", [0.5, 1, 1.2, 5], ids=str)
def test_camvid_slim_sees_a_frame_alike_at_any_size(factor: float) -> None:
    """A photo of the scene has many more pixels, a thumbnail fewer."""
    model = sparse_seg.load_model("camvid-slim")
    frame, label = build_dataset("camvid", SHARED / "data/camvid", "val").load(1)
    method = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    photo = cv2.resize(frame, None, fx=factor, fy=factor, interpolation=method)
    truth = cv2.resize(label, photo.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    counted = truth < 255

    def right(views: Views = ONCE) -> float:
        found = sparse_seg.segment(model, photo, Way.dense(8), views)
        assert found.classes.shape == photo.shape[:2]
        return float((found.classes == truth)[counted].mean())

    assert right() > 0.93
    if factor == 5:
        assert right(Views(scales=(1,))) < 0.8, "as it is, objects are far too large"
