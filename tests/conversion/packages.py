"""The sources' own networks, built by the packages where they are installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from tests.peers import package


def torchvision(name: str, **settings: Any) -> nn.Module:
    """A segmentation network with its auxiliary head."""
    build = getattr(package("torchvision.models.segmentation"), name)
    return build(weights=None, weights_backbone=None, aux_loss=True, **settings)


def torchvision_classifier(name: str) -> nn.Module:
    return getattr(package("torchvision.models"), name)(weights=None)


def timm(name: str) -> nn.Module:
    return package("timm").create_model(name, pretrained=False)


def smp(name: str, encoder: str, separable: bool, stride: int, classes: int = 19, **more: Any) -> nn.Module:
    return getattr(package("segmentation_models_pytorch"), name)(
        encoder, encoder_weights=None, encoder_output_stride=stride, classes=classes,
        decoder_aspp_separable=separable, **more,
    )  # fmt: skip


def mmseg(
    head: str,
    depth: int,
    stride: int = 8,
    backbone: str = "ResNetV1c",
    channels: int | None = None,
    logits: int = 19,
) -> nn.Module:
    """`deeplabv3` or `deeplabv3plus` as configs/_base_/models of mmsegmentation 1.2 describe them.

    Args:
        channels: of the head; None: the config's own.
        logits: one is for two classes.
    """
    inside, plain = (512, 128) if depth < 50 else (2048, 512)
    norm: Any = {"norm_cfg": {"type": "BN"}}
    classes: Any = {"num_classes": max(2, logits), "out_channels": logits, "align_corners": False}
    loss = {"loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": logits == 1}}
    dilations, strides = ((1, 1, 2, 4), (1, 2, 1, 1)) if stride == 8 else ((1, 1, 1, 2), (1, 2, 2, 1))
    decode = {
        "type": "ASPPHead", "in_channels": inside, "in_index": 3, "channels": channels or plain,
        "dilations": (1, *(96 // stride * number for number in (1, 2, 3))), **norm, **classes, **loss,
    }  # fmt: skip
    if head == "deeplabv3plus":
        decode |= {"type": "DepthwiseSeparableASPPHead", "c1_in_channels": inside // 8}
        decode |= {"c1_channels": 12 if depth < 50 else 48}
    auxiliary = {
        "type": "FCNHead", "in_channels": inside // 2, "in_index": 2, "channels": inside // 8,
        "num_convs": 1, "concat_input": False, **norm, **classes, **loss,
    }  # fmt: skip
    config = {
        "type": "EncoderDecoder",
        "backbone": {
            "type": backbone, "depth": depth, "num_stages": 4, "out_indices": (0, 1, 2, 3),
            "dilations": dilations, "strides": strides, "contract_dilation": True, **norm,
        },
        "decode_head": decode,
        "auxiliary_head": auxiliary,
        "test_cfg": {"mode": "whole"},
    }  # fmt: skip
    models = package("mmseg.models")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return models.build_segmentor(config)


def mmseg_logits(network: Any, images: Tensor) -> Tensor:
    """`[B, 3, H, W]` to `[B, K, H, W]` as its own inference computes them."""
    size: Sequence[int] = images.shape[2:]
    return network.encode_decode(images, [{"img_shape": size}])


PACKAGED: dict[str, Callable[[], nn.Module]] = {
    "mmseg_deeplabv3_r18-d8": partial(mmseg, "deeplabv3", 18),
    "mmseg_deeplabv3_r50-d8": partial(mmseg, "deeplabv3", 50),
    "mmseg_deeplabv3_resnet50-d16": partial(mmseg, "deeplabv3", 50, 16, "ResNet"),
    "mmseg_deeplabv3plus_r18-d8": partial(mmseg, "deeplabv3plus", 18),
    "mmseg_deeplabv3plus_r50-d8": partial(mmseg, "deeplabv3plus", 50),
    "smp_deeplabv3_resnet50": partial(smp, "DeepLabV3", "resnet50", False, 8),
    "smp_deeplabv3_separable_resnet18": partial(smp, "DeepLabV3", "resnet18", True, 8),
    "smp_deeplabv3plus_plain_resnet18": partial(smp, "DeepLabV3Plus", "resnet18", False, 8),
    "smp_deeplabv3plus_resnet50": partial(smp, "DeepLabV3Plus", "resnet50", True, 16),
    "timm_resnet18d": partial(timm, "resnet18d"),
    "timm_resnet50d": partial(timm, "resnet50d"),
    "torchvision_deeplabv3_resnet50": partial(torchvision, "deeplabv3_resnet50"),
    "torchvision_fcn_resnet50": partial(torchvision, "fcn_resnet50"),
    "torchvision_resnet18": partial(torchvision_classifier, "resnet18"),
    "torchvision_resnet50": partial(torchvision_classifier, "resnet50"),
}
"""The network of each record in real_files.json whose package can be installed."""
