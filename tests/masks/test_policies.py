"""Mask policies against loops over pixels and blocks."""

import math
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_seg import build_model
from sparse_seg.config import MaskConfig
from sparse_seg.errors import ConfigError
from sparse_seg.masks import (
    POLICIES,
    ConfidencePolicy,
    MaskPolicy,
    OraclePolicy,
    block_shape,
    blur_scores,
    parse_policy,
    top_blocks,
)
from sparse_seg.masks.edge import EdgePolicy, gradient_magnitude
from sparse_seg.masks.random import RandomPolicy
from sparse_seg.masks.uniform import UniformPolicy
from sparse_seg.run.way import Way

SIZES = [(32, 32), (49, 81)]


def frames(images: Tensor, labels: Tensor | None = None) -> Any:
    """What a policy may ask that looks at images, and perhaps labels, alone."""
    return SimpleNamespace(images=images, labels=labels)


class Given(MaskPolicy):
    """Scores as handed in."""

    def __init__(self, values: Tensor, **cut: Any) -> None:
        super().__init__(**cut)
        self.values = values

    def scores(self, run: Any) -> Tensor:
        return self.values


@pytest.fixture(params=SIZES, ids=str)
def images(request: pytest.FixtureRequest) -> Tensor:
    return torch.randn(2, 3, *request.param, generator=torch.Generator().manual_seed(0))


def random_labels(images: Tensor, classes: int = 3) -> Tensor:
    """Patches of a few labels, some of them ignored, so that boundaries are sparse."""
    height, width = images.shape[2:]
    generator = torch.Generator().manual_seed(4)
    small = torch.randint(0, classes, (len(images), height // 9 + 1, width // 9 + 1), generator=generator)
    small[torch.rand(small.shape, generator=generator) < 0.2] = 255
    return small.repeat_interleave(9, 1).repeat_interleave(9, 2)[:, :height, :width]


@pytest.mark.parametrize("values", [10**6, 3], ids=["distinct", "tied"])
@pytest.mark.parametrize(("fine", "middle"), [(0.0, 1.0), (0.15, 0.3), (0.77, 0.23), (1.0, 0.0)])
def test_the_highest_scores_of_each_image(values: int, fine: float, middle: float) -> None:
    """Exactly so many of each, in one ranking, ties in raster order; an unstable sort would mix them."""
    scores = torch.randint(0, values, (3, 64, 63), generator=torch.Generator().manual_seed(1)).float()
    order = np.argsort(-scores.flatten(1).numpy(), axis=1, kind="stable")
    expected = np.zeros(order.shape, np.int64)
    for level, share in ((1, fine + middle), (2, fine)):
        np.put_along_axis(expected, order[:, : round(share * order.shape[1])], level, 1)
    levels, mask = top_blocks(scores, fine, middle), top_blocks(scores, fine)
    assert levels.flatten(1).tolist() == expected.tolist()
    assert mask.dtype == torch.bool
    assert torch.equal(mask, levels == 2)


IMAGE_POLICIES = sorted(
    name for name, policy in POLICIES.items() if not (policy.needs_net or policy.ranks_refinement)
)


@pytest.mark.parametrize("name", IMAGE_POLICIES)
def test_every_policy(name: str, images: Tensor, device: str) -> None:
    """The right shape and exact budget for both images of a batch, on any size; each image for itself."""
    blocks = (2, math.ceil(images.shape[2] / 16), math.ceil(images.shape[3] / 16))
    assert block_shape(images) == blocks
    fraction = 1.0 if name == "uniform" else 0.3
    policy, labels = POLICIES[name](fine_fraction=fraction).eval(), random_labels(images).to(device)
    images = images.to(device)
    mask = policy(frames(images, labels))
    assert mask.device.type == device
    assert tuple(mask.shape) == blocks
    assert mask.dtype == torch.bool
    assert mask.flatten(1).sum(1).tolist() == [round(fraction * blocks[1] * blocks[2])] * 2
    if name in ("edge", "oracle"):
        alone = torch.cat([policy(frames(images[i : i + 1], labels[i : i + 1])) for i in range(2)])
        assert torch.equal(alone, mask)


def test_gradient_magnitude(images: Tensor) -> None:
    """OpenCV's Sobel over the channel mean, borders replicated, divided by its gain."""
    ours = gradient_magnitude(images)
    for image, magnitude in zip(images.double().numpy(), ours, strict=True):
        grey = image.mean(0)
        dx, dy = (
            cv2.Sobel(grey, cv2.CV_64F, *order, ksize=3, scale=1 / 8, borderType=cv2.BORDER_REPLICATE)
            for order in ((1, 0), (0, 1))
        )
        np.testing.assert_allclose(magnitude[0].numpy(), np.hypot(dx, dy), atol=1e-5)


def test_edge_scores(images: Tensor) -> None:
    """The largest magnitude of a block's pixels, those of cut blocks at the border included."""
    magnitude = gradient_magnitude(images)[:, 0]
    scores = EdgePolicy(threshold=0.0).scores(frames(images))
    for b, y, x in np.ndindex(*block_shape(images)):
        block = magnitude[b, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16]
        assert scores[b, y, x] == block.max()


def test_oracle_scores(images: Tensor) -> None:
    """Boundary pixels over 256 places: a block cut by the border has less to gain."""
    labels = random_labels(images)
    scores = OraclePolicy(threshold=0.0).scores(frames(images, labels))
    counts = np.zeros(block_shape(images))
    plain = labels.tolist()
    height, width = images.shape[2:]
    for b, y, x in np.ndindex(len(plain), height, width):
        own = plain[b][y][x]
        around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        others = [plain[b][v][u] for v, u in around if 0 <= v < height and 0 <= u < width]
        counts[b, y // 16, x // 16] += own != 255 and any(other not in (own, 255) for other in others)
    assert 0 < counts.sum() < labels.numel() / 2
    np.testing.assert_allclose(scores.numpy(), counts / 256, atol=1e-6)


def test_oracle_ignores_the_ignored() -> None:
    labels = torch.zeros(1, 32, 32, dtype=torch.long)
    labels[:, 10:, 20:] = 255
    policy, images = OraclePolicy(threshold=0.0), torch.zeros(1, 3, 32, 32)
    assert not policy(frames(images, labels)).any()
    labels[:, 10:, 20:] = 1
    assert policy(frames(images, labels)).tolist() == [[[False, True], [False, True]]]
    assert not OraclePolicy(threshold=0.0, ignore_index=1)(frames(images, labels)).any()
    with pytest.raises(ValueError, match=r"oracle policy \(boundary\) reads labels: give them \(model.start"):
        policy(frames(images))


@pytest.mark.parametrize(("size", "threshold"), [((96, 128), 0.15), ((100, 131), 0.95)], ids=str)
def test_cad_rule(size: tuple[int, int], threshold: float) -> None:
    """The published rule by loops: signed differences, zero border, 11x11 dilation, any of 4x4 cells."""
    generator = torch.Generator().manual_seed(int(100 * threshold))
    spots = torch.rand(2, 1, *size, generator=generator) < 0.001
    images = 1.6 * threshold * spots * torch.rand(2, 3, *size, generator=generator)
    mask = EdgePolicy(threshold=threshold, rule="cad")(frames(images))
    height, width = size
    expected = torch.zeros_like(mask)
    for b in range(2):
        grey = np.pad((images[b].permute(1, 2, 0).numpy() @ np.array([0.299, 0.587, 0.114], np.float32)), 1)
        edges = grey[1:-1, 2:] - grey[1:-1, :-2] >= threshold
        edges |= grey[2:, 1:-1] - grey[:-2, 1:-1] >= threshold
        dilated = cv2.dilate(edges.astype(np.uint8), np.ones((11, 11), np.uint8))
        for y, x in np.ndindex(-(-height // 8), -(-width // 8)):
            if dilated[8 * y, 8 * x]:
                expected[b, y // 4 * 2 : y // 4 * 2 + 2, x // 4 * 2 : x // 4 * 2 + 2] = True
    assert torch.equal(mask, expected)
    assert 0 < expected.sum() < expected.numel()


def test_cad_counts_bright_borders_and_equality() -> None:
    """Outside the image is zero, so a bright left border is an edge; a difference of the threshold counts."""
    bright = EdgePolicy(threshold=0.9, rule="cad")(frames(torch.ones(1, 3, 64, 96)))[0]
    assert bright.nonzero().tolist() == [[y, x] for y in range(4) for x in range(6) if min(y, x) < 2]
    assert not EdgePolicy(threshold=0.9, rule="cad")(frames(-torch.ones(1, 3, 64, 96))).any(), (
        "read 8 px further in"
    )
    flat = torch.zeros(1, 3, 64, 96)
    flat[..., 48:] = 0.5
    scores = EdgePolicy(threshold=0.5, rule="cad").scores(frames(flat))
    top = scores.max().item()
    assert EdgePolicy(threshold=top, rule="cad")(frames(flat)).any()
    assert not EdgePolicy(threshold=top)(frames(flat)).any()
    with pytest.raises(ValueError, match="unknown edge rule 'canny'; choose one of sobel, cad"):
        EdgePolicy(threshold=0.5, rule="canny")


def test_cuts_by_thresholds() -> None:
    values = torch.tensor([[[0.1, 0.5, 0.6]]])
    policy = Given(values, threshold=0.5, middle_threshold=-0.5)
    assert policy(values).tolist() == [[[1, 1, 2]]], "above, not at"
    assert policy.extra_repr() == "threshold=0.5, middle_threshold=-0.5"


def test_blurred_scores() -> None:
    """OpenCV's 3x3 Gaussian, whose kernel is 1 2 1 too; the cut sees it, the scores do not."""
    scores = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(2))
    expected = [cv2.GaussianBlur(one.numpy(), (3, 3), 0, borderType=cv2.BORDER_REPLICATE) for one in scores]
    np.testing.assert_allclose(blur_scores(scores), np.stack(expected), atol=1e-6)
    policy = Given(scores, fine_fraction=0.2, blur=True)
    assert torch.equal(policy(scores), top_blocks(blur_scores(scores), 0.2))
    assert not torch.equal(policy(scores), top_blocks(scores, 0.2))
    assert policy.extra_repr() == "fine_fraction=0.2, blur"


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ({}, "either fine_fraction or threshold"),
        ({"fine_fraction": 0.1, "threshold": 0.1}, "either fine_fraction or threshold"),
        ({"fine_fraction": -0.1}, r"fine_fraction must lie in 0\.\.1, not -0\.1"),
        ({"fine_fraction": 0.8, "middle_fraction": 0.3}, "must add up to 1 at most"),
        ({"fine_fraction": 0.1, "middle_threshold": 0.3}, "fractions with fractions"),
        ({"threshold": 0.1, "middle_threshold": 0.3}, "must not exceed threshold"),
    ],
)
def test_bad_cuts(cut: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EdgePolicy(**cut)


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("edge:cad", {"policy": "edge", "edge": "cad"}),
        ("oracle:change,blur", {"policy": "oracle", "oracle": "change", "blur": True}),
        (
            "confidence:entropy,max,neighbours",
            {"policy": "confidence", "uncertainty": "entropy", "reduce": "max", "neighbours": True},
        ),
        ("edges", r"unknown mask policy 'edges'; did you mean 'edge'\? Choose one of uniform, random"),
        ("edge:cat", r"unknown option 'cat'; did you mean 'cad'\? Choose one of blur, sobel, cad"),
        ("random:cad", "mask policy 'random:cad': unknown option 'cad'; choose one of blur"),
    ],
)
def test_policy_specs(spec: str, found: Any) -> None:
    if isinstance(found, dict):
        assert parse_policy(spec, MaskConfig(fine_fraction=0.3)) == MaskConfig(fine_fraction=0.3, **found)
        return
    with pytest.raises(ConfigError, match=found):
        parse_policy(spec, MaskConfig())


def test_ways_that_cannot_be() -> None:
    model = build_model({"width": 0.125, "strides": [8, 16, 32], "mask": {"middle_fraction": 0.3}}).eval()
    with pytest.raises(ConfigError, match=r"f=0.9: "):
        model.policy_for(Way(fine_fraction=0.9))
    model = build_model({"width": 0.125, "mask": {"policy": "confidence", "threshold": 0.5}}).eval()
    with pytest.raises(ConfigError, match=r"threshold 0.5 was found for another policy than edge"):
        model.policy_for(Way(mask="edge"))
    assert model.policy_for(Way(mask="edge", fine_fraction=0.2)).threshold is None
    for rule in ("boundary", "change", "gain"):
        assert model.policy_for(Way.policy(f"oracle:{rule}", 0.2)).rule == rule
    for build, message in (
        (lambda: OraclePolicy(0.1, rule="win"), "unknown oracle rule 'win'; choose one of boundary"),
        (lambda: ConfidencePolicy(0.1, reduce="sum"), "unknown reduction 'sum'; choose one of max, mean"),
    ):
        with pytest.raises(ValueError, match=message):
            build()


def test_uniform() -> None:
    images = torch.zeros(2, 3, 40, 50)
    assert not UniformPolicy(0)(frames(images)).any()
    assert UniformPolicy(1)(frames(images)).all()
    assert UniformPolicy(threshold=0.4)(frames(images)).all()
    assert not UniformPolicy(threshold=0.6)(frames(images)).any()
    with pytest.raises(ValueError, match=r"takes fine_fraction 0 or 1, not 0\.5"):
        UniformPolicy(0.5)


def test_random() -> None:
    """Eval repeats itself and leaves the global generator alone; training draws anew; images differ."""
    images = torch.zeros(2, 3, 128, 128)
    policy = RandomPolicy(0.5, seed=3).eval()
    state = torch.get_rng_state()
    first = policy(frames(images))
    assert torch.equal(first, policy(frames(images)))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, RandomPolicy(0.5, seed=4).eval()(frames(images)))
    assert not torch.equal(first[0], first[1])
    policy.train()
    assert not torch.equal(policy(frames(images)), policy(frames(images)))
