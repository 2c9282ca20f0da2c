"""visinf/cad (Hesse et al., CVPRW 2023): dense networks, edge-mask networks, learned-mask networks.

Dense ones are VainF's, and fcn. Edge-mask ones (`ap`, `batch_ap`) have 1-D convolutions where the mask
decides: 1x1 as `[O, I, 1]`, 3x3 as `[O, I, 9, 1]`. Learned-mask ones (`ad`) hold layer3 and layer4 twice,
`*_low_res` and `*_high_res`, with shared weights but batch statistics of their own; CAD's evaluation runs
both resolutions with the low-resolution ones, and so do we. Their mask net is kept for policy `learned`.
"""

from __future__ import annotations

import torch

from sparse_seg.conversion import vainf
from sparse_seg.conversion.backbone import find_backbone
from sparse_seg.conversion.plan import CLASSIFIER, Options, Plan, Tensors, assumed_stride, output_channels
from sparse_seg.errors import CheckpointError

MASK_NET, OURS = "backbone.mask_estimator.", "policy.net."  # CAD's prefix and ours
LOGITS = "7."  # its last convolution


def detect(tensors: Tensors) -> bool:
    """Whether only CAD uses these names; its dense deeplabs are named like VainF's."""
    marks = ("backbone.layer4.0.conv2.conv.weight", "backbone.layer4_low_res.0.conv2.weight")
    fcn = "backbone.conv1.weight" in tensors and "classifier.classifier.0.weight" in tensors
    return any(mark in tensors for mark in marks) or (fcn and "classifier.project.0.weight" not in tensors)


def plan(tensors: Tensors, options: Options) -> Plan:
    """See `Plan`.

    Raises:
        CheckpointError: an output stride other than what the names tell.
    """
    learned = "backbone.layer4_low_res.0.conv2.weight" in tensors
    stages = {"layer3": "layer3_low_res", "layer4": "layer4_low_res"} if learned else {}
    renamed = {name: _stage_name(name, stages) for name in tensors}
    backbone = find_backbone({new: tensors[name] for name, new in renamed.items() if new}, "backbone.")
    modules = {ours: _cad_name(tensors, theirs, stages) for ours, theirs in backbone.modules.items()}
    stride, assumed = _output_stride(tensors, options, learned)
    result = Plan("", backbone.config, modules, assumed=assumed)
    if "classifier.classifier.0.weight" in tensors and not vainf.detect(tensors):
        name = _add_fcn(result, tensors, stride)
    else:
        name = vainf.add_head(result, tensors, stride)
    kind = "_ad" if learned else "_ap" if "backbone.layer4.0.conv2.conv.weight" in tensors else ""
    result.arch = f"{name}{kind}_{backbone.name}"
    result.dropped = {"backbone.fc.": CLASSIFIER}
    _add_mask_net(result, tensors)
    if learned:
        _drop_high_resolution(result, tensors)
    return result


def _add_mask_net(result: Plan, tensors: Tensors) -> None:
    """The mask net, as policy `learned` runs it.

    Of CAD's two logits the first is for the fine resolution, the second for the coarse one. A block's score
    is their difference, so the last convolution's two filters become one. CAD draws a block's resolution from
    its logits (Gumbel-softmax), even in evaluation; a score above 0 says that fine is the likelier.
    """
    result.learned_net = "cad_mask_net"
    result.dropped[MASK_NET + LOGITS] = "the mask net's two logits, of which a score is made"
    result.kept = {MASK_NET: OURS}
    for name, tensor in tensors.items():
        if name.startswith(MASK_NET + LOGITS):
            if not tensor.ndim or tensor.shape[0] != 2:
                raise CheckpointError(f"{name} is {list(tensor.shape)}, where CAD's mask net has two logits")
            result.fresh[OURS + name.removeprefix(MASK_NET)] = tensor[:1] - tensor[1:]


def _stage_name(name: str, stages: dict[str, str]) -> str:
    """A source's name in the common naming; empty for the high-resolution twin."""
    if "_high_res." in name:
        return ""
    for ours, theirs in stages.items():
        name = name.replace(f"backbone.{theirs}.", f"backbone.{ours}.")
    return name


def _cad_name(tensors: Tensors, module: str, stages: dict[str, str]) -> str:
    """CAD's name of a backbone's module, from the common one."""
    for ours, theirs in stages.items():
        module = module.replace(f"backbone.{ours}.", f"backbone.{theirs}.")
    if f"{module}.conv.weight" in tensors:
        return f"{module}.conv"
    for common, own in (("downsample.0", "downsample.conv1"), ("downsample.1", "downsample.norm1")):
        if module.endswith(common) and f"{module.removesuffix(common)}{own}.weight" in tensors:
            return module.removesuffix(common) + own
    return module


def _output_stride(tensors: Tensors, options: Options, learned: bool) -> tuple[int, list[str]]:
    """Stages with 1-D convolutions are those below the output stride; the learned mask is at 8."""
    told = None
    if learned or "backbone.layer3.0.conv2.conv.weight" in tensors:
        told = 8
    elif "backbone.layer4.0.conv2.conv.weight" in tensors:
        told = 16
    if told is None:
        return assumed_stride(options, 8)
    if options.output_stride not in (None, told):
        raise CheckpointError(f"its names tell output stride {told}, not {options.output_stride}")
    return told, []


def _add_fcn(result: Plan, tensors: Tensors, stride: int) -> str:
    modules = {"refine.0": 0, "refine.1": 1, "classifier": 4}
    result.modules |= {f"head.{ours}": f"classifier.classifier.{i}" for ours, i in modules.items()}
    result.config |= {
        "head": "fcn",
        "head_channels": output_channels(tensors, "classifier.classifier.0.weight"),
        "num_classes": output_channels(tensors, "classifier.classifier.4.weight"),
        "trained_stride": stride,
    }
    return "fcn"


def _drop_high_resolution(result: Plan, tensors: Tensors) -> None:
    statistics, others = 0, list[str]()
    for name in tensors:
        twin = name.replace("_high_res.", "_low_res.")
        if twin == name:
            continue
        if twin in tensors and torch.equal(tensors[name], tensors[twin]):
            result.aliases[name] = twin
        elif ".running_" in name or name.endswith("num_batches_tracked"):
            statistics += 1
        else:
            others.append(name)
    for stage in ("layer3", "layer4"):
        result.dropped[f"backbone.{stage}_high_res."] = f"twin of {stage}_low_res"
    result.notes.append(
        f"layer3 and layer4 run with the low-resolution statistics at both resolutions, as in CAD's own "
        f"evaluation; {statistics} statistics of the high-resolution twin differ"
    )
    if others:
        result.notes.append(
            f"{len(others)} weights of the twin differ too, though CAD shares them; the first is {others[0]}"
        )
