"""Image and label stay aligned through scale, crop and flip; colours stay in range; the rest is padding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_seg.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    TrainTransform,
    normalise,
)


def denormalise(tensor: torch.Tensor) -> np.ndarray:
    """The inverse of `normalise`: float `[3, H, W]` to uint8 RGB `[H, W, 3]`."""
    pixels = tensor.permute(1, 2, 0).double().numpy() * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
    return np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8)


def striped(height: int, width: int, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """A label of random cells and an image whose grey value is ten times the label."""
    rng = np.random.default_rng([height, width])
    cells = rng.integers(0, 19, (height // cell + 1, width // cell + 1), np.uint8)
    label = np.kron(cells, np.ones((cell, cell), np.uint8))[:height, :width]
    return np.repeat(label[..., None] * np.uint8(10), 3, axis=2), label


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(40, 150), st.integers(40, 150)),
    crop=st.tuples(st.integers(30, 130), st.integers(30, 130)),
    scale=st.tuples(st.floats(0.5, 1), st.floats(1, 2)),
    seed=st.integers(0, 1000),
)
def test_image_and_label_stay_aligned(
    size: tuple[int, int], crop: tuple[int, int], scale: tuple[float, float], seed: int
) -> None:
    image, label = striped(*size, cell=16)
    transform = TrainTransform(crop, scale, jitter=0)
    tensor, target = transform(image, label, np.random.default_rng(seed))
    assert tensor.shape == (3, *crop)
    assert tensor.dtype == torch.float32
    assert target.shape == crop
    assert target.dtype == torch.int64
    grey = denormalise(tensor)[..., 0].astype(int)
    inside = (target != 255).numpy()
    if inside.any():
        # bilinear and nearest may differ along the borders of cells alone: within each neighbourhood that
        # has one label the image shows exactly that label
        label_map = target.numpy()
        flat = np.ones_like(inside)
        flat[[0, -1]] = flat[:, [0, -1]] = False
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                flat &= np.roll(label_map, (dy, dx), (0, 1)) == label_map
        flat &= inside
        np.testing.assert_array_equal(grey[flat], 10 * label_map[flat])


def test_unit_scale_crop_is_an_exact_window() -> None:
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (50, 70, 3), np.uint8)
    label = rng.integers(0, 19, (50, 70), np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(label, (20, 30)).reshape(-1, 20, 30)
    transform = TrainTransform((20, 30), (1.0, 1.0), jitter=0)
    flipped = 0
    for seed in range(12):
        tensor, target = transform(image, label, np.random.default_rng(seed))
        views = {False: target.numpy(), True: target.numpy()[:, ::-1]}
        hits = {mirror: (windows == view).all((1, 2)) for mirror, view in views.items()}
        mirror = bool(hits[True].any())
        flipped += mirror
        assert hits[mirror].sum() == 1
        top, left = divmod(int(hits[mirror].argmax()), 70 - 30 + 1)
        pixels = denormalise(tensor)
        np.testing.assert_array_equal(
            pixels[:, ::-1] if mirror else pixels, image[top : top + 20, left : left + 30]
        )
    assert 0 < flipped < 12


def test_scale_enlarges_about_the_right_place() -> None:
    """At scale 2 output pixel q shows source place (q + 0.5) / 2 - 0.5: each source pixel twice."""
    label = np.arange(16, dtype=np.uint8).repeat(16).reshape(16, 16)
    image = np.repeat(label[..., None], 3, 2)
    transform = TrainTransform((32, 32), (2.0, 2.0), flip=False, jitter=0)
    _, target = transform(image, label, np.random.default_rng(0))
    assert target[:, 5].tolist() == [row for row in range(16) for _ in range(2)]


def test_small_image_is_padded_with_the_mean_colour() -> None:
    image = np.full((10, 12, 3), 200, np.uint8)
    label = np.full((10, 12), 4, np.uint8)
    transform = TrainTransform((32, 32), (1.0, 1.0), jitter=0)
    tensor, target = transform(image, label, np.random.default_rng(0))
    assert (target == 4).sum() == 120
    assert (target == 255).sum() == 32 * 32 - 120
    outside = tensor[:, target == 255]
    assert outside.abs().max() < 0.5 / 255 / min(IMAGENET_STD) + 1e-6  # the mean, rounded to a grey level
    assert (denormalise(tensor)[(target == 4).numpy()] == 200).all()


def test_crops_reach_every_pixel() -> None:
    label = np.arange(12, dtype=np.uint8)[None].repeat(12, 0)
    image = np.zeros((12, 12, 3), np.uint8)
    transform = TrainTransform((4, 4), (1.0, 1.0), flip=False)
    starts = {int(transform(image, label, np.random.default_rng(seed))[1][0, 0]) for seed in range(200)}
    assert starts == set(range(9))


def test_same_rng_same_sample() -> None:
    image, label = striped(60, 80, 8)
    transform = TrainTransform((32, 48))
    first, again, other = (transform(image, label, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def plain(jitter: float = 0, gamma: float = 0) -> TrainTransform:
    """Whole 16x16 images in 0..1."""
    size, mean, std = (16, 16), (0, 0, 0), (1, 1, 1)
    return TrainTransform(size, (1.0, 1.0), flip=False, jitter=jitter, mean=mean, std=std, gamma=gamma)


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
BLANK = np.zeros((16, 16), np.uint8)


def test_jitter_keeps_grey_grey_in_range_and_changes_colours() -> None:
    red = np.broadcast_to(np.array((200, 40, 40), np.uint8), RAMP.shape)
    brighter, spreads = set(), []
    for seed in range(20):
        grey, other = (plain(0.4)(image, BLANK, np.random.default_rng(seed))[0] for image in (RAMP, red))
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


def test_normalise_formula_and_inverse() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    tensor = normalise(image)
    expected = (torch.from_numpy(image).double() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(
        IMAGENET_STD
    )
    torch.testing.assert_close(tensor, expected.permute(2, 0, 1).float(), rtol=1e-5, atol=1e-5)
    assert tensor.is_contiguous()
    np.testing.assert_array_equal(denormalise(tensor), image)


def test_images_of_floats_are_refused() -> None:
    """In 0..1 they would all become nearly black."""
    image = np.full((8, 8, 3), 0.5, np.float32)
    with pytest.raises(ValueError, match="an image of float32: expected uint8"):
        normalise(image)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="an image of float32: expected uint8"):
        TrainTransform((4, 4))(image, np.zeros((8, 8), np.uint8), np.random.default_rng(0))  # type: ignore[arg-type]


def test_tint_multiplies_the_channels() -> None:
    image = np.full((16, 16, 3), 100, np.uint8)
    transform = TrainTransform(
        (16, 16), (1.0, 1.0), flip=False, jitter=0, mean=(0, 0, 0), std=(1, 1, 1), tint=0.2
    )
    label = np.zeros((16, 16), np.uint8)
    factors = np.array(
        [transform(image, label, np.random.default_rng(seed))[0][:, 3, 5].numpy() for seed in range(50)]
    ) / (100 / 255)
    assert factors.min() >= 0.8 - 1e-6
    assert factors.max() <= 1.2 + 1e-6
    assert np.ptp(factors, axis=0).min() > 0.3  # each channel of its own
    assert np.abs(np.diff(factors, axis=1)).max() > 0.2
