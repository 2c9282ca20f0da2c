"""Image and label stay aligned through scale, crop and flip; colours stay in range; the rest is padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_seg.config import DataConfig
from sparse_seg.data.transforms import IMAGENET_MEAN, IMAGENET_STD, TrainTransform, normalise


def transform(crop: tuple[int, int], scale: tuple[float, float] = (1, 1), **keys: Any) -> TrainTransform:
    return TrainTransform(DataConfig(crop=list(crop), scale_range=list(scale), **{"jitter": 0.0} | keys))


def denormalise(tensor: torch.Tensor) -> np.ndarray:
    """The inverse of `normalise`: float `[3, H, W]` to uint8 RGB `[H, W, 3]`."""
    pixels = tensor.permute(1, 2, 0).double().numpy() * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
    return np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8)


@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(40, 150), st.integers(40, 150)),
    crop=st.tuples(st.integers(32, 130), st.integers(32, 130)),
    scale=st.tuples(st.floats(0.5, 1), st.floats(1, 2)),
    seed=st.integers(0, 1000),
)
def test_image_and_label_stay_aligned(
    size: tuple[int, int], crop: tuple[int, int], scale: tuple[float, float], seed: int
) -> None:
    """Of cells whose grey value is ten times the label. Bilinear and nearest may differ along their borders
    alone: where a neighbourhood has one label, the image shows it."""
    cells = np.random.default_rng(size).integers(0, 19, (size[0] // 16 + 1, size[1] // 16 + 1), np.uint8)
    label = np.kron(cells, np.ones((16, 16), np.uint8))[: size[0], : size[1]]
    image = np.repeat(label[..., None] * np.uint8(10), 3, axis=2)
    tensor, target = transform(crop, scale)(image, label, np.random.default_rng(seed))
    assert (tensor.shape, tensor.dtype) == ((3, *crop), torch.float32)
    assert (target.shape, target.dtype) == (crop, torch.int64)
    shown, found = denormalise(tensor)[..., 0].astype(int), target.numpy()
    flat = found != 255
    flat[[0, -1]] = flat[:, [0, -1]] = False
    for dy, dx in np.ndindex(3, 3):
        flat &= np.roll(found, (dy - 1, dx - 1), (0, 1)) == found
    np.testing.assert_array_equal(shown[flat], 10 * found[flat])


def test_at_unit_scale_crops_are_all_windows_as_they_are_or_mirrored() -> None:
    label = np.arange(144, dtype=np.uint8).reshape(12, 12)
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    seen = set[tuple[int, bool]]()
    for seed in range(300):
        tensor, target = transform((4, 4))(image, label, np.random.default_rng(seed))
        flipped = bool(target[0, 0] > target[0, 1])
        top, left = divmod(int(target.min()), 12)
        window, turn = (slice(top, top + 4), slice(left, left + 4)), -1 if flipped else 1
        np.testing.assert_array_equal(target.numpy()[:, ::turn], label[window])
        np.testing.assert_array_equal(denormalise(tensor)[:, ::turn], image[window])
        seen |= {(top, flipped), (100 + left, flipped)}
    assert seen == {(start + at, flip) for start in (0, 100) for at in range(9) for flip in (False, True)}


def test_scale_enlarges_about_the_right_place() -> None:
    """At scale 2 output pixel q shows source place (q + 0.5) / 2 - 0.5: each source pixel twice."""
    label = np.arange(16, dtype=np.uint8).repeat(16).reshape(16, 16)
    image = np.repeat(label[..., None], 3, 2)
    _, target = transform((32, 32), (2, 2), flip=False)(image, label, np.random.default_rng(0))
    assert target[:, 5].tolist() == [row for row in range(16) for _ in range(2)]


def test_small_image_is_padded_with_the_mean_colour() -> None:
    image, label = np.full((10, 12, 3), 200, np.uint8), np.full((10, 12), 4, np.uint8)
    tensor, target = transform((32, 32))(image, label, np.random.default_rng(0))
    assert (target == 4).sum() == 120
    assert (target == 255).sum() == 32 * 32 - 120
    outside = tensor[:, target == 255]
    assert outside.abs().max() < 0.5 / 255 / min(IMAGENET_STD) + 1e-6  # the mean, rounded to a grey level
    assert (denormalise(tensor)[(target == 4).numpy()] == 200).all()


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
BLANK = np.zeros((16, 16), np.uint8)


def plain(**keys: Any) -> TrainTransform:
    """Whole 16x16 images in 0..1."""
    return transform((16, 16), flip=False, mean=[0.0] * 3, std=[1.0] * 3, **keys)


def test_jitter_keeps_grey_grey_in_range_and_changes_colours() -> None:
    red = np.broadcast_to(np.array((200, 40, 40), np.uint8), RAMP.shape)
    brighter, spreads = set(), []
    for seed in range(20):
        grey, other = (
            plain(jitter=0.4)(image, BLANK, np.random.default_rng(seed))[0] for image in (RAMP, red)
        )
        assert np.ptp(grey.numpy(), axis=0).max() < 1e-4
        assert 0 <= grey.min() <= grey.max() <= 1 + 1e-6
        brighter.add(bool(grey.mean() > 0.5))
        spreads.append(255 * float(np.ptp(other[:, 5, 5].numpy())))
    assert brighter == {True, False}
    assert min(spreads) < 160 < max(spreads)


def test_gamma_is_a_power_of_values_in_0_to_1() -> None:
    exponents = []
    for seed in range(20):
        exponents.append(plain(gamma=0.5).draw(16, 16, np.random.default_rng(seed)).exponent)
        out = plain(gamma=0.5)(RAMP, BLANK, np.random.default_rng(seed))[0]
        expected = np.rint(255 * (RAMP[..., 0] / 255) ** exponents[-1])
        np.testing.assert_allclose(255 * out[1].numpy(), expected, atol=1e-3)
    assert np.exp(-0.5) < min(exponents) < 0.9 < 1.1 < max(exponents) < np.exp(0.5)


def test_tint_multiplies_the_channels() -> None:
    image = np.full((16, 16, 3), 100, np.uint8)
    tints = [plain(tint=0.2)(image, BLANK, np.random.default_rng(seed))[0][:, 3, 5] for seed in range(50)]
    factors = torch.stack(tints).numpy() * 255 / 100
    assert factors.min() >= 0.8 - 1e-6
    assert factors.max() <= 1.2 + 1e-6
    assert np.ptp(factors, axis=0).min() > 0.3  # each channel of its own
    assert np.abs(np.diff(factors, axis=1)).max() > 0.2


def test_normalise_formula_and_inverse() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    tensor, mean, std = normalise(image), torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    expected = (torch.from_numpy(image).double() / 255 - mean) / std
    torch.testing.assert_close(tensor, expected.permute(2, 0, 1).float(), rtol=1e-5, atol=1e-5)
    assert tensor.is_contiguous()
    np.testing.assert_array_equal(denormalise(tensor), image)
    floats: Any = image / np.float32(255)  # in 0..1 they would all become nearly black
    for use in (normalise, lambda given: plain()(given, BLANK, np.random.default_rng(0))):
        with pytest.raises(ValueError, match="an image of float32: expected uint8"):
            use(floats)
