"""mmsegmentation: `deeplabv3_*` and `deeplabv3plus_*` with ResNet and ResNetV1c.

Its ASPP puts image pooling first and has a 3x3, the bottleneck, instead of the 1x1 projection. Its basic
blocks leave their second 3x3 undilated. The tensors do not tell D8 (output stride 8, rates 12, 24, 36) from
D16 (6, 12, 18).
"""

from __future__ import annotations

from sparse_seg.conversion.backbone import find_backbone
from sparse_seg.conversion.plan import (
    AUXILIARY,
    Options,
    Plan,
    Tensors,
    assumed_stride,
    count_modules,
    output_channels,
)
from sparse_seg.errors import CheckpointError

THRESHOLD = (
    0.3  # of a network of one logit: foreground from this probability on, unless its config says another
)


def detect(tensors: Tensors) -> bool:
    """Whether the names are mmsegmentation's."""
    return "decode_head.conv_seg.weight" in tensors and any(n.startswith("backbone.") for n in tensors)


def plan(tensors: Tensors, options: Options) -> Plan:
    """See `Plan`.

    Raises:
        CheckpointError: another head than ASPP's, or ResNetV1d.
    """
    plus = "decode_head.sep_bottleneck.0.depthwise_conv.conv.weight" in tensors
    if "decode_head.aspp_modules.0.conv.weight" not in tensors:
        raise CheckpointError("its decode head is neither deeplabv3 nor deeplabv3plus of mmsegmentation")
    backbone = find_backbone(tensors, "backbone.")
    if backbone.config.get("shortcut") == "avg_pool":
        raise CheckpointError("ResNetV1d of mmsegmentation is not supported; ResNet and ResNetV1c are")
    stride, assumed = assumed_stride(options, 8)
    rates = count_modules(tensors, "decode_head.aspp_modules.") - 1
    channels = output_channels(tensors, "decode_head.aspp_modules.0.conv.weight")
    config = backbone.config | {
        "head": "deeplabv3plus" if plus else "deeplabv3",
        "head_channels": channels,
        "num_classes": output_channels(tensors, "decode_head.conv_seg.weight"),
        "aspp_rates": [96 // stride * (index + 1) for index in range(rates)],
        "aspp_projection": False,
        "trained_stride": stride,
    }
    if backbone.basic:
        config["dilate_second"] = False
    modules = backbone.modules | {"head.classifier": "decode_head.conv_seg"}
    modules |= _conv_bn("head.aspp.convs.0.", "aspp_modules.0")
    modules |= _conv_bn(f"head.aspp.convs.{rates + 1}.", "image_pool.1", 1)
    result = Plan(f"{config['head']}_{backbone.name}", config, modules, assumed=assumed)
    result.dropped = {"auxiliary_head.": AUXILIARY}
    result.modules |= _conv_bn("head.refine.", "bottleneck")
    result.rolls["head.refine.0.weight"] = (1, channels)  # image pooling comes last in ours
    result.threshold = THRESHOLD
    if plus:
        _add_separable(result, tensors, rates)
    else:
        for index in range(1, rates + 1):
            result.modules |= _conv_bn(f"head.aspp.convs.{index}.", f"aspp_modules.{index}")
    return result


def _conv_bn(ours: str, theirs: str, first: int = 0) -> dict[str, str]:
    """A `ConvModule`: convolution and norm at `first` and the next place of our sequence."""
    theirs = f"decode_head.{theirs}"
    return {f"{ours}{first}": f"{theirs}.conv", f"{ours}{first + 1}": f"{theirs}.bn"}


def _add_separable(result: Plan, tensors: Tensors, rates: int) -> None:
    """deeplabv3plus: depthwise, norm, ReLU and 1x1 instead of each 3x3 but the bottleneck's."""
    for index in range(1, rates + 1):
        theirs, ours = f"decode_head.aspp_modules.{index}", f"head.aspp.convs.{index}"
        result.modules |= {
            f"{ours}.0.0": f"{theirs}.depthwise_conv.conv",
            f"{ours}.0.1": f"{theirs}.depthwise_conv.bn",
            f"{ours}.0.3": f"{theirs}.pointwise_conv.conv",
            f"{ours}.1": f"{theirs}.pointwise_conv.bn",
        }
    decoders = count_modules(tensors, "decode_head.sep_bottleneck.")
    for index in range(decoders):
        result.modules |= _conv_bn(f"head.decoder.{index}.", f"sep_bottleneck.{index}.depthwise_conv")
        result.modules |= _conv_bn(f"head.decoder.{index}.", f"sep_bottleneck.{index}.pointwise_conv", 3)
    result.modules |= _conv_bn("head.low_level.", "c1_bottleneck")
    result.config |= {
        "aspp_separable": "normed",
        "separable": "normed",
        "refine_separable": "none",
        "low_level_channels": output_channels(tensors, "decode_head.c1_bottleneck.conv.weight"),
        "decoder_convs": decoders,
    }
