"""segmentation_models.pytorch: `DeepLabV3` and `DeepLabV3Plus` with its own ResNet encoders.

The tensors do not tell the output stride; smp's defaults are 8 for DeepLabV3, 16 for DeepLabV3Plus, with the
rates 12, 24, 36 at either. A dilated stage of smp dilates all its convolutions, the first one too
(`replace_strides_with_dilation`), so its entry has the stage's own spacing. Upsampling aligns corners.
"""

from __future__ import annotations

import re

from sparse_seg.conversion.plan import CLASSIFIER, Plan, Tensors, assumed_stride, conv_names, resnet_plan
from sparse_seg.errors import CheckpointError

# other decoders of smp: a part of their names that no other has
DECODERS = {
    "UnetPlusPlus": r"decoder\.blocks\.x_\d",
    "MAnet": r"decoder\.center\.(top|center|bottom)_conv\.",
    "Unet": r"decoder\.blocks\.\d+\.conv1\.",
    "Linknet": r"decoder\.blocks\.\d+\.block\.",
    "PAN": r"decoder\.(fpa|gau\d)\.",
    "UPerNet": r"decoder\.(fpn_|psp\.out_conv)",
    "FPN": r"decoder\.(p5|seg_blocks)\.",
    "PSPNet": r"decoder\.psp\.",
    "Segformer": r"decoder\.mlp_stage\.",
    "DPT": r"decoder\.(reassemble|projection|fusion)_blocks\.",
}


def detect(tensors: Tensors) -> bool:
    """Whether the names are smp's."""
    head = "segmentation_head.0.weight" in tensors or "segmentation_head.head.0.weight" in tensors
    return head and any(name.startswith("encoder.") for name in tensors)


def plan(tensors: Tensors, output_stride: int | None) -> Plan:
    """See `Plan`.

    Raises:
        CheckpointError: another decoder than DeepLab's, or another encoder than a ResNet.
    """
    _check_supported(tensors)
    plus = "decoder.block1.0.weight" in tensors
    aspp, conv, norm = "decoder.aspp.", "decoder.conv", "decoder.bn"
    if plus:
        aspp, conv, norm = "decoder.aspp.0.", "decoder.aspp.1", "decoder.aspp.2"
    elif "decoder.0.convs.0.0.weight" in tensors:  # before version 0.4
        aspp, conv, norm = "decoder.0.", "decoder.1", "decoder.2"
    pairs = [("head.classifier.", "segmentation_head.0."), ("head.aspp.", aspp)]
    pairs += conv_names(tensors, "head.refine", conv, norm)
    if plus:
        pairs += conv_names(tensors, "head.decoder.0", "decoder.block2.0", "decoder.block2.1")
        pairs.append(("head.low_level.", "decoder.block1."))
    stride, assumed = assumed_stride(output_stride, 16 if plus else 8)
    assumed.append("ASPP rates 12, 24, 36 (else use --set aspp_rates=[...])")
    dropped = {"classification_head.": CLASSIFIER}
    result = resnet_plan(tensors, pairs, "encoder.", stride, 12, assumed=assumed, dropped=dropped)
    result.config |= {"align_corners": True, "entry_spacings": [4, 16 if stride == 8 else 8, 32]}
    result.notes.append(
        f"entries of dilated stages have the stage's own spacing, as in smp at output stride {stride}; smp's "
        f"own network of output stride {24 - stride} has another spacing at layer3's entry, so these weights "
        "run at that stride here compute something else than there"
    )
    return result


def _check_supported(tensors: Tensors) -> None:
    decoder = next(
        (name for name, part in DECODERS.items() if any(re.match(part, tensor) for tensor in tensors)), None
    )
    known = "of smp, DeepLabV3 and DeepLabV3Plus with ResNet encoders can be converted"
    if decoder is not None:
        raise CheckpointError(f"it is a {decoder} of smp, which is not supported; {known}")
    if "encoder.layer1.0.conv1.weight" not in tensors:
        first = next(name for name in tensors if name.startswith("encoder."))
        raise CheckpointError(f"it is a network of smp whose encoder ({first}) is no ResNet; {known}")
