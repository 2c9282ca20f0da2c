"""mmsegmentation: `deeplabv3_*` and `deeplabv3plus_*` with ResNet and ResNetV1c.

Its ASPP puts image pooling first and has a 3x3, the bottleneck, instead of the 1x1 projection. Its basic
blocks leave their second 3x3 undilated. The tensors do not tell D8 (output stride 8, rates 12, 24, 36) from
D16 (6, 12, 18).
"""

from __future__ import annotations

from sparse_seg.conversion.plan import (
    AUXILIARY,
    Pairs,
    Plan,
    Tensors,
    assumed_stride,
    count_modules,
    resnet_plan,
)
from sparse_seg.errors import CheckpointError

THRESHOLD = 0.3  # of a network of one logit: foreground from this probability on, if its config says no other


def detect(tensors: Tensors) -> bool:
    """Whether the names are mmsegmentation's."""
    return "decode_head.conv_seg.weight" in tensors and any(n.startswith("backbone.") for n in tensors)


def plan(tensors: Tensors, output_stride: int | None) -> Plan:
    """See `Plan`.

    Raises:
        CheckpointError: another head than ASPP's, or ResNetV1d.
    """
    if "decode_head.aspp_modules.0.conv.weight" not in tensors:
        raise CheckpointError("its decode head is neither deeplabv3 nor deeplabv3plus of mmsegmentation")
    stride, assumed = assumed_stride(output_stride, 8)
    pairs, dropped = _head_names(tensors), {"auxiliary_head.": AUXILIARY}
    result = resnet_plan(tensors, pairs, "backbone.", stride, assumed=assumed, dropped=dropped)
    result.threshold = THRESHOLD
    if result.config.get("shortcut") == "avg_pool":
        raise CheckpointError("ResNetV1d of mmsegmentation is not supported; ResNet and ResNetV1c are")
    if "backbone.layer1.0.conv3" not in result.own:
        result.config["dilate_second"] = False
    result.rolls["head.refine.0.weight"] = (1, result.config["head_channels"])  # image pooling, last in ours
    return result


def _head_names(tensors: Tensors) -> Pairs:
    pairs = [("head.classifier.", "decode_head.conv_seg.")]
    pairs += _conv_bn(
        f"head.aspp.convs.{count_modules(tensors, 'decode_head.aspp_modules.')}", "image_pool.1", 1
    )
    pairs += _conv_bn("head.aspp.convs.0", "aspp_modules.0")
    pairs += _conv_bn("head.refine", "bottleneck")
    if "decode_head.sep_bottleneck.0.depthwise_conv.conv.weight" not in tensors:
        return pairs + _conv_bn("head.aspp.convs.#", "aspp_modules.#")
    pairs += _conv_bn("head.aspp.convs.#.0", "aspp_modules.#.depthwise_conv")
    last = "decode_head.aspp_modules.#.pointwise_conv"
    pairs += [("head.aspp.convs.#.0.3.", f"{last}.conv."), ("head.aspp.convs.#.1.", f"{last}.bn.")]
    pairs += _conv_bn("head.decoder.#", "sep_bottleneck.#.depthwise_conv")
    pairs += _conv_bn("head.decoder.#", "sep_bottleneck.#.pointwise_conv", 3)
    return pairs + _conv_bn("head.low_level", "c1_bottleneck")


def _conv_bn(ours: str, theirs: str, first: int = 0) -> Pairs:
    """A `ConvModule`: convolution and norm at `first` and the next place of our sequence."""
    theirs = f"decode_head.{theirs}"
    return [(f"{ours}.{first}.", f"{theirs}.conv."), (f"{ours}.{first + 1}.", f"{theirs}.bn.")]
