"""Networks as they come from their packages: equal at their own stride, and P1, P2, P4 hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import sparse_seg
from sparse_seg.errors import SparseSegError
from sparse_seg.graph import logits_of
from sparse_seg.ops import OPERATORS
from sparse_seg.ops.upsample import upsample_logits
from sparse_seg.run.way import Way
from tests.conversion.packages import mmseg, smp
from tests.graph.layers import randomise
from tests.peers import package
from tests.reference import relative_error

SIZE = (64, 96)
POOLED = "pooling to .* places depends on the image's size|nothing of this network"


def lraspp() -> nn.Module:
    models = package("torchvision.models.segmentation")
    return models.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)


def plus(encoder: str) -> Callable[[], nn.Module]:
    """smp's DeepLabV3+."""
    return partial(smp, "DeepLabV3Plus", encoder, True, 16, 5, decoder_channels=16)


def hugging_face() -> nn.Module:
    transformers = package("transformers")
    config = transformers.MobileNetV2Config(num_labels=5, output_stride=16)
    return transformers.MobileNetV2ForSemanticSegmentation(config)


def mmseg_mobilenet() -> nn.Module:
    norm = {"norm_cfg": {"type": "BN"}}
    backbone = {
        "type": "MobileNetV2", "widen_factor": 1.0, "strides": (1, 2, 2, 1, 1, 1, 1),
        "dilations": (1, 1, 1, 2, 2, 4, 4), "out_indices": (1, 2, 4, 6), **norm,
    }  # fmt: skip
    head = {
        "type": "FCNHead", "in_channels": 320, "in_index": 3, "channels": 16, "num_convs": 1,
        "concat_input": False, "num_classes": 5, "align_corners": False,
        "loss_decode": {"type": "CrossEntropyLoss"}, **norm,
    }  # fmt: skip
    whole = {
        "type": "EncoderDecoder",
        "backbone": backbone,
        "decode_head": head,
        "test_cfg": {"mode": "whole"},
    }
    return package("mmseg.models").build_segmentor(whole)


# each with whether its lattice depends on the mask (P1 and P4 do not hold)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "torchvision LR-ASPP": (lraspp, False),
    "smp MobileNetV2": (plus("mobilenet_v2"), False),
    "smp EfficientNet-B0": (plus("efficientnet-b0"), False),
    "timm EfficientNet-Lite0": (plus("tu-efficientnet_lite0"), False),
    "smp RegNet": (plus("timm-regnetx_002"), False),
    "smp SE-ResNet-50": (plus("se_resnet50"), False),
    "smp Res2Net-50": (plus("timm-res2net50_26w_4s"), False),
    "smp ResNeSt-14": (plus("timm-resnest14d"), False),
    "timm ResNet-18-D": (plus("tu-resnet18d"), False),
    "timm NFNet-L0": (plus("tu-nfnet_l0"), False),
    "timm ECA-ResNet-26": (plus("tu-ecaresnet26t"), False),
    "timm SK-ResNet-18": (plus("tu-skresnet18"), True),
    "timm GENet": (plus("tu-gernet_s"), True),
    "timm ConvNeXt": (plus("tu-convnext_atto"), False),
    "timm MobileNetV4": (plus("tu-mobilenetv4_conv_small"), False),
    "Hugging Face MobileNetV2": (hugging_face, False),
    "mmsegmentation ResNet-18": (partial(mmseg, "deeplabv3", 18, channels=16), True),
    "mmsegmentation MobileNetV2": (mmseg_mobilenet, True),
}
FAST = ("torchvision LR-ASPP",)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_network(name: str):
    build, mixes = NETWORKS[name]
    torch.manual_seed(0)
    module = randomise(build()).double().eval()
    network = sparse_seg.selective(module, size=(128, 128))
    images = torch.randn(2, 3, *SIZE, dtype=torch.float64)
    fine, coarse = network.strides
    run = network.start(images).follow(Way.dense(network.geometry.own))
    logits, expected = run.grid_logits(), logits_of(module(images))
    if logits.shape != expected.shape:
        grid = run._grid()
        step, trained = SIZE[0] // expected.shape[2], network.geometry.trained(network.graph.output)
        size = (int(expected.shape[2]), int(expected.shape[3]))
        align = network.graph.align_corners
        logits = upsample_logits(logits, size, grid.stride // step, trained // step, align)
    assert relative_error(logits, expected) < 1e-10
    blocks = torch.rand(2, -(-SIZE[0] // coarse), -(-SIZE[1] // coarse)) < 0.5
    every = torch.ones_like(blocks)
    assert network.geometry.refines != mixes
    assert network(images).isfinite().all()
    geometry = network.geometry
    pools = {node.name for node in geometry.graph.nodes if OPERATORS[node.op].is_pool} - geometry.final_pools
    on_rows = any(geometry.kind[geometry.nodes[name].inputs[0]] == "rows" for name in pools)
    # pooled vectors read the lattice: docs/method.md
    assert relative_error(network(images, every), network.dense(images, fine)) < (0.1 if on_rows else 1e-10)
    if mixes:
        with pytest.raises(ValueError, match="depend on the mask"):
            network.start(images).start_coarse()
        return
    pass_ = network.start(images).start_coarse()
    lattices = pass_._coarse
    refined, once = pass_.take(blocks), network.start(images).take(blocks)
    assert relative_error(refined.logits(), once.logits()) < 1e-10
    assert lattices is not None
    assert once._values is not None
    for exit_ in network.geometry.exits:
        if (
            exit_ not in network.geometry.masked
            and exit_ in lattices
            and hasattr(once._values[exit_], "lattice")
        ):
            assert relative_error(once._values[exit_].lattice.tensor, lattices[exit_].tensor) < 1e-10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Unet", "PSPNet"])
def test_networks_that_cannot(kind: str):
    network = getattr(package("segmentation_models_pytorch"), kind)("resnet18", encoder_weights=None)
    with pytest.raises(SparseSegError, match=POOLED) as caught:
        sparse_seg.selective(network, size=(128, 128))
    assert "\n" not in str(caught.value)
