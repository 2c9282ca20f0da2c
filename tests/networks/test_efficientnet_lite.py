"""EfficientNet-Lite against timm's, LR-ASPP against its formula, and P2 and P4 of networks of them."""

from typing import Any

import pytest
import torch
from torch import nn

from sparse_seg import build_model
from sparse_seg.networks.encoder_decoder import build_module
from sparse_seg.networks.heads import LRASPPHead
from sparse_seg.ops.upsample import upsample_logits
from sparse_seg.registry import BACKBONES
from tests.peers import package
from tests.reference import NUM_CLASSES, block_mask, randomise, relative_error


@pytest.mark.slow
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


@pytest.mark.slow
@torch.no_grad()
def test_selective() -> None:
    """Dense as the module itself; P2: all fine as that at the finer stride; P4: refined as in one pass."""
    torch.manual_seed(0)
    settings = {"backbone": "efficientnet_lite0", "head": "lraspp", "head_channels": 16, "num_classes": 5}
    model: Any = build_model(settings | {"strides": [16, 32]}).double()
    randomise(model)
    images = torch.randn(1, 3, 70, 101, generator=torch.Generator().manual_seed(1)).double()
    fine, mask = (block_mask(kind, (1, 3, 4)) for kind in ("full", "random"))
    expected = {}
    for stride in (16, 32):
        module = build_module(model.settings, stride).double().eval()
        module.load_state_dict(model.module.state_dict())
        expected[stride] = module(images)
        assert relative_error(model.dense(images, stride), expected[stride]) < 1e-12, stride
    assert relative_error(model(images, fine), expected[16]) < 1e-12, "P2"
    run = model.start(images).start_coarse()
    assert relative_error(run.logits(), expected[32]) < 1e-12, "P4: the coarse pass"
    refined, once = run.take(mask).logits(), model(images, mask)
    assert relative_error(refined, once) < 1e-12, "P4"
    for logits in expected.values():
        assert relative_error(once, logits) > 1e-3, "else P4 proves nothing"
