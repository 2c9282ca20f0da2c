"""EfficientNet-Lite against timm's, LR-ASPP against its formula, and P2 and P4 of networks of them."""

import functools

import pytest
import torch
from torch import Tensor, nn

from sparse_seg import build_model
from sparse_seg.networks.encoder_decoder import build_module
from sparse_seg.networks.heads import LRASPPHead
from sparse_seg.ops.upsample import upsample_logits
from sparse_seg.registry import BACKBONES
from sparse_seg.run.network import SelectiveNetwork
from tests.peers import package
from tests.reference import NUM_CLASSES, block_mask, randomise, relative_error

SIZE = (70, 101)


@pytest.mark.parametrize("number", [0, 1, 2])
@torch.no_grad()
def test_as_timm(number: int) -> None:
    """Names and features."""
    torch.manual_seed(0)
    theirs = package("timm").create_model(
        f"tf_efficientnet_lite{number}", features_only=True, out_indices=(1, 2, 3, 4)
    )
    ours, images = BACKBONES[f"efficientnet_lite{number}"](), torch.randn(2, 3, 224, 224)
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.uniform_(0.5, 1.5), norm.bias.uniform_(-0.5, 0.5)
            norm.momentum = 1.0
    theirs.train()(images)  # statistics of its own
    ours.load_state_dict(theirs.state_dict())
    for feature, expected in zip(ours.eval()(images), theirs.eval()(images), strict=True):
        assert relative_error(feature, expected) < 1e-5


@torch.no_grad()
def test_lraspp_upsamples_channels() -> None:
    """The formula has the channels upsampled before the classifier, not the logits."""
    torch.manual_seed(0)
    head = LRASPPHead([6, 20], NUM_CLASSES, head_channels=16).double().eval()
    low, grid = torch.randn(2, 6, 17, 26).double(), torch.randn(2, 20, 9, 13).double()
    gated = head.cbr(grid) * torch.sigmoid(head.scale[1](grid.mean((2, 3), keepdim=True)))
    expected = head.classifier(upsample_logits(gated, (17, 26), 2, 2)) + head.low_classifier(low)
    assert relative_error(head([low, grid]), expected) < 1e-12


@functools.cache
def network(head: str, strides: tuple[int, ...]) -> SelectiveNetwork:
    """In float64, with random weights and statistics, in eval mode."""
    torch.manual_seed(0)
    config = {"backbone": "efficientnet_lite0", "head": head, "head_channels": 16}
    model = build_model(config | {"num_classes": NUM_CLASSES, "strides": list(strides)}).double()
    randomise(model)
    return model


def random_images() -> Tensor:
    return torch.randn(2, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def dense(model: SelectiveNetwork, stride: int, images: Tensor) -> Tensor:
    """Logits of the module itself, built for an output stride."""
    module = build_module(model.settings, stride).double().eval()
    module.load_state_dict(model.module.state_dict())
    return module(images)


@pytest.mark.parametrize(
    ("head", "strides"),
    [
        ("lite", (16, 32)),
        ("lraspp", (8, 16)),
        pytest.param("lite", (8, 16), marks=pytest.mark.slow),
        pytest.param("lraspp", (16, 32), marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_selective(head: str, strides: tuple[int, ...]) -> None:
    """Dense as the module itself; P2: all fine as that at the finer stride; P4: refined as in one pass."""
    model, images = network(head, strides), random_images()
    expected = {stride: dense(model, stride, images) for stride in (8, 16, 32)}
    for stride, logits in expected.items():
        assert relative_error(model.dense(images, stride), logits) < 1e-12, stride
    shape = (2, -(-SIZE[0] // strides[1]), -(-SIZE[1] // strides[1]))
    fine, mask = (block_mask(kind, shape) for kind in ("full", "random"))
    assert relative_error(model(images, fine), expected[strides[0]]) < 1e-12, "P2"
    run = model.start(images).start_coarse()
    assert relative_error(run.logits(), expected[strides[1]]) < 1e-12, "P4: the coarse pass"
    refined, once = run.take(mask).logits(), model(images, mask)
    assert relative_error(refined, once) < 1e-12, "P4"
    for logits in (expected[strides[0]], expected[strides[1]]):
        assert relative_error(once, logits) > 1e-3, "else P4 proves nothing"
