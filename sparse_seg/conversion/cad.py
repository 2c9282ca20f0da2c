"""visinf/cad (Hesse et al., CVPRW 2023): dense networks, edge-mask networks, learned-mask networks.

Dense ones are VainF's, and fcn. Edge-mask ones (`ap`, `batch_ap`) have 1-D convolutions where the mask
decides: 1x1 as `[O, I, 1]`, 3x3 as `[O, I, 9, 1]`. Learned-mask ones (`ad`) hold layer3 and layer4 twice,
`*_low_res` and `*_high_res`, with shared weights but batch statistics of their own; CAD's evaluation runs
both resolutions with the low-resolution ones, and so do we. Their mask net is kept for policy `learned`.
"""

from __future__ import annotations

import torch

from sparse_seg.conversion import vainf
from sparse_seg.conversion.plan import CLASSIFIER, Pairs, Plan, Tensors, assumed_stride
from sparse_seg.errors import CheckpointError
from sparse_seg.run.weights import part_of

MASK_NET, OURS = "backbone.mask_estimator.", "policy.net."  # CAD's prefix and ours
LOGITS = "7."  # its last convolution


def detect(tensors: Tensors) -> bool:
    """Whether only CAD uses these names; its dense deeplabs are named like VainF's."""
    marks = ("backbone.layer4.0.conv2.conv.weight", "backbone.layer4_low_res.0.conv2.weight")
    fcn = "backbone.conv1.weight" in tensors and vainf.is_fcn(tensors)
    return fcn or any(mark in tensors for mark in marks)


def plan(tensors: Tensors, output_stride: int | None) -> Plan:
    """See `Plan`.

    Raises:
        CheckpointError: an output stride other than what the names tell.
    """
    learned = "backbone.layer4_low_res.0.conv2.weight" in tensors
    flat = [stage for stage in (3, 4) if f"backbone.layer{stage}.0.conv2.conv.weight" in tensors]
    stride, assumed = _output_stride(output_stride, 3 if learned else min(flat, default=None))
    result = vainf.plan_at(tensors, stride, assumed, _stage_names(learned, flat))
    head, _, backbone = result.arch.partition("_")
    result.arch = f"{head}{'_ad' if learned else '_ap' if flat else ''}_{backbone}"
    result.dropped = {"backbone.fc.": CLASSIFIER}
    _add_mask_net(result, tensors)
    if learned:
        _drop_high_resolution(result, tensors)
    return result


def _stage_names(learned: bool, flat: list[int]) -> Pairs:
    """The stages that the mask decides on: low-resolution twins, or with 1-D convolutions."""
    if learned:
        return [(f"backbone.layer{stage}.", f"backbone.layer{stage}_low_res.") for stage in (3, 4)]
    parts = {"conv2": "conv2.conv", "downsample.0": "downsample.conv1", "downsample.1": "downsample.norm1"}
    blocks = [f"backbone.layer{stage}.#" for stage in flat]
    return [(f"{block}.{ours}.", f"{block}.{own}.") for block in blocks for ours, own in parts.items()]


def _output_stride(asked: int | None, first: int | None) -> tuple[int, list[str]]:
    """The first stage that the mask decides on is that below the output stride."""
    if first is None:
        return assumed_stride(asked, 8)
    told = {3: 8, 4: 16}[first]
    if asked not in (None, told):
        raise CheckpointError(f"its names tell output stride {told}, not {asked}")
    return told, []


def _add_mask_net(result: Plan, tensors: Tensors) -> None:
    """The mask net, as policy `learned` runs it.

    Of CAD's two logits the first is for the fine resolution, the second for the coarse one. A block's score
    is their difference, so the last convolution's two filters become one. CAD draws a block's resolution from
    its logits (Gumbel-softmax), even in evaluation; a score above 0 says that fine is the likelier.
    """
    result.dropped[MASK_NET] = "mask net, for a learned policy"
    for name, tensor in part_of(tensors, MASK_NET).items():
        if name.startswith(LOGITS):
            if not tensor.ndim or tensor.shape[0] != 2:
                raise CheckpointError(
                    f"{MASK_NET}{name} is {list(tensor.shape)}, where CAD's mask net has two logits"
                )
            tensor = tensor[:1] - tensor[1:]
        result.fresh[OURS + name] = tensor


def _drop_high_resolution(result: Plan, tensors: Tensors) -> None:
    others = list[str]()
    for name in tensors:
        twin = name.replace("_high_res.", "_low_res.")
        if twin in tensors and twin != name and torch.equal(tensors[name], tensors[twin]):
            result.aliases[name] = twin
        elif twin != name:
            others.append(name)
    result.dropped |= {f"backbone.layer{n}_high_res.": f"twin of layer{n}_low_res" for n in (3, 4)}
    weights = [one for one in others if ".running_" not in one and not one.endswith("num_batches_tracked")]
    result.notes.append(
        f"layer3 and layer4 run with the low-resolution statistics at both resolutions, as in CAD's own "
        f"evaluation; {len(others) - len(weights)} statistics of the high-resolution twin differ"
    )
    if weights:
        result.notes.append(
            f"{len(weights)} weights of the twin differ too, as {weights[0]}, though CAD shares them"
        )
