"""Windows that cover an image, and looks that are averaged."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sparse_seg.evaluation.views import ONCE, Views, _spans, at_size, predict
from sparse_seg.run.build import build_model
from sparse_seg.run.card import Card
from sparse_seg.run.way import Way
from tests.reference import randomise


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_model({"width": 0.125, "head_channels": 16, "num_classes": 4})
    randomise(model)
    return model.eval()


@given(st.integers(256, 4100), st.integers(0, 300), st.sampled_from([(256, 1.0), (256, 4.0), (640, 10.0)]))
def test_windows_cover_an_axis_once(length, overlap, window_at):
    window, scale = window_at
    spans = list(_spans(length, Views(window, overlap, scales=(scale,))))
    assert [place for span in spans for place in range(span.first, span.last)] == list(range(length))
    for span in spans:
        assert span.start <= span.first < span.last <= span.stop <= length
        assert span.stop - span.start <= window / scale
        assert span.start % 32 == span.first % 32 == 0
    for one, other in itertools.pairwise(spans if scale == 1 else []):
        assert one.stop - one.last >= min(overlap, 128) // 64 * 32 - 32
        assert other.first - other.start >= min(overlap, 128) // 64 * 32 - 32


def test_a_window_as_large_as_the_image_changes_nothing(model):
    images = torch.randn(1, 3, 300, 290)
    for way in (Way.dense(8), Way()):
        whole, windowed = (predict(model, images, None, way, views=v) for v in (Views(), Views(320)))
        assert torch.equal(whole.classes, windowed.classes)
        if whole.levels is not None and windowed.levels is not None:
            assert torch.equal(whole.levels, windowed.levels)


def test_far_from_seams_windows_are_exact():
    """Two 3x3 in each stage reach about 120 px around a pixel, which is less than half the overlap."""
    torch.manual_seed(0)
    model = build_model({"width": 0.125, "head_channels": 16, "num_classes": 4, "depths": [1, 1, 1, 1]})
    randomise(model)
    model = model.double().eval()
    images = torch.randn(1, 3, 96, 896, dtype=torch.float64)
    whole = predict(model, images, None, Way.dense(8)).classes
    windowed = predict(model, images, None, Way.dense(8), views=Views(704, 512)).classes
    assert torch.equal(whole, windowed)
    assert not torch.equal(whole, predict(model, images, None, Way.dense(8), views=Views(256, 0)).classes)


def test_levels_of_windows_fit_together(model):
    images = torch.randn(2, 3, 300, 530)
    found = predict(model, images, way=Way.policy("edge", 0.25), views=Views(256, 64))
    assert found.classes.shape == (2, 300, 530)
    assert found.levels is not None
    assert found.levels.shape == (2, 19, 34)
    assert 0.15 < found.levels.float().mean() < 0.35


def test_looks_are_averaged(model):
    images = torch.randn(1, 3, 64, 96)
    flipped = images.flip(3)
    by_hand = model.dense(images).softmax(1) + model.dense(flipped).softmax(1).flip(3)
    found = predict(model, images, way=Way.dense(8), views=Views(flip=True))
    assert torch.equal(found.classes, by_hand.argmax(1))
    again = predict(model, flipped, way=Way.dense(8), views=Views(flip=True)).classes.flip(2)
    assert (found.classes == again).float().mean() > 0.999, "the mirror image's is the mirror"
    small = predict(model, images, way=Way(), views=Views(scales=(0.5, 1.0)))
    assert small.classes.shape == (1, 64, 96)
    assert small.levels is not None
    assert small.levels.shape == (1, 4, 6)
    labels = torch.zeros(1, 64, 96, dtype=torch.int64)
    labels[:, :, 48:] = 1
    found = predict(model, images, labels, Way.policy("oracle", 0.2), views=Views(flip=True, scales=(0.5, 2)))
    assert found.levels is not None
    assert found.levels.sum() > 0


def test_one_small_look_at_a_large_image(model):
    """Its classes are those of the upsampled probabilities, and windows are of the small image."""
    images = torch.randn(1, 3, 600, 640)
    small = F.interpolate(images, (150, 160), mode="bilinear", antialias=True)
    probabilities = model.dense(small).softmax(1)
    by_hand = F.interpolate(probabilities, (600, 640), mode="bilinear").argmax(1)
    found = predict(model, images, way=Way.dense(8), views=Views(256, scales=(0.25,)))
    assert (found.classes == by_hand).float().mean() > 0.9999


@pytest.mark.slow
def test_a_policy_that_looks_back_gets_whole_images_in_order(model):
    policy, confidence = (model.policy_for(Way.policy(name, 0.25)) for name in ("previous", "confidence"))
    first, second = torch.randn(2, 1, 3, 300, 320)

    def levels(image, views=ONCE, policy=policy):
        found = predict(model, image, None, Way(), policy, views).levels
        assert found is not None
        return found

    own = [levels(image, policy=confidence) for image in (first, second)]
    assert torch.equal(levels(first), own[0])
    after = levels(second)
    assert not torch.equal(after, own[1])
    policy.remember(None)
    assert torch.equal(levels(second), own[1]), "a new sequence"
    policy.remember(None)
    levels(first, Views(256))
    levels(first, Views(flip=True))
    assert torch.equal(levels(second), own[1]), "windows and averages are not remembered"
    half = Views(scales=(0.5,))
    policy.remember(None)
    levels(first, half)
    assert not torch.equal(levels(second, half), levels(second, half, confidence)), "one look of any size is"


@pytest.mark.parametrize(
    ("height", "width", "scale", "at_most"),
    [
        (360, 480, 1, 1),
        (450, 600, 1, 1),  # near enough
        (288, 384, 1, 1),
        (3000, 4000, 0.12, 0.12),
        (4000, 3000, 0.12, 0.12),
        (1080, 1920, (172800 / 2073600) ** 0.5, (172800 / 2073600) ** 0.5),
        (240, 320, 1.5, 1),
        (90, 120, 2, 1),  # not by 4
        (64, 200_000, 0.5, 0.5),  # no side below 32 px
        (20, 200_000, 1, 1),
    ],
)
def test_images_get_the_area_of_the_training_frames(height, width, scale, at_most):
    known = (
        Card.unnamed(3),
        replace(Card.unnamed(3), frame=(360, 480)),
        replace(Card.unnamed(3), at_most=(360, 480)),
    )
    assert [card.scale_for(height, width) for card in known] == pytest.approx([1, scale, at_most])
    assert Views(scales=(0.5, 1)).at(0.1).factors == (0.5, 1), "what is asked for stays"
    assert Views(flip=True).at(0.1) == Views(flip=True, scales=(0.1,))


@pytest.mark.parametrize(
    ("size", "seen"), [((640, 96), (480, 72)), ((480, 65), (360, 49)), ((1024, 80), (410, 32))]
)
def test_a_block_of_a_scaled_image_is_that_in_which_its_middle_lies(size, seen):
    grids = [[-(-length // 16) for length in one] for one in (size, seen)]
    levels = torch.arange(grids[1][0] * grids[1][1]).reshape(1, *grids[1])
    found = at_size(torch.zeros(1, 2, *seen), levels, seen, size, 16).levels
    assert found is not None
    assert list(found.shape[1:]) == grids[0]
    for y, x in itertools.product(*map(range, grids[0])):
        middles = ((16 * n + min(16 * n + 16, length)) / 2 for n, length in zip((y, x), size, strict=True))
        row, column = (int(m * b / a / 16) for m, a, b in zip(middles, size, seen, strict=True))
        assert found[0, y, x] == levels[0, row, column]


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"window": 256, "scales": (10,)}, "256 px show 25 px of an image at a scale of 10; use 640 or"),
        (
            {"window": 256, "scales": (0.5, 4.01)},
            "show 63 px of an image at a scale of 4.01; use 257 or more",
        ),
        ({"window": 64}, "use 256 or more"),
        *(({"scales": scales}, "scales must be positive") for scales in ((0.0,), (), (1.0, float("nan")))),
        ({"scales": (float("inf"),)}, "scales must be positive"),
        ({"window": 512, "overlap": -32}, "overlap must not be negative, not -32"),
    ],
)
def test_impossible_views_are_refused(views, message):
    with pytest.raises(ValueError, match=message):
        Views(**views)


def test_images_that_cannot_be_are_refused(model):
    with pytest.raises(ValueError, match="at least 32 px at a scale"):
        predict(model, torch.zeros(1, 3, 64, 64), views=Views(scales=(0.25,)))
    for run in (model, model.dense, model.classify, lambda images: predict(model, images)):
        with pytest.raises(ValueError, match=r"one or more, not an empty batch \[0, 3, 64, 64\]"):
            run(torch.zeros(0, 3, 64, 64))
