"""What a network costs: multiply-adds counted by the layers from what they ran on, parameters, bytes on disk.

Latency and peak memory, which need a clock and a machine, are in `latency.py`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_seg.masks import MaskPolicy
from sparse_seg.models.aspp import PooledLinear
from sparse_seg.models.segmentor import SelectiveSegmentor, eval_mode
from sparse_seg.sparse import SelectiveConv2d, SelectiveDepthwiseConv2d, SiteLayout
from sparse_seg.sparse.engines.undilated import every_site

COUNTED = (nn.Conv2d, nn.Linear, SelectiveConv2d, SelectiveDepthwiseConv2d)


class Macs(NamedTuple):
    """Multiply-adds: `total`, sites x taps x in x out as the usual figures count, padding included; and
    `hits`, only the taps that read a site or a ghost."""

    total: int = 0
    hits: int = 0

    def __add__(self, other: Macs) -> Macs:  # type: ignore[override]
        return Macs(self.total + other.total, self.hits + other.hits)


def count_macs(model: SelectiveSegmentor, images: Tensor, layouts: list[SiteLayout]) -> dict[str, int]:
    """Multiply-adds of one forward by part, for the whole batch: the `total` of `count_cost`."""
    return {part: macs.total for part, macs in count_cost(model, images, layouts).items()}


@torch.inference_mode()
def count_cost(
    model: SelectiveSegmentor,
    images: Tensor,
    layouts: list[SiteLayout],
    policy: MaskPolicy | None = None,
    labels: Tensor | None = None,
) -> dict[str, Macs]:
    """Multiply-adds of one forward by part, for the whole batch.

    The parts: `stem`, `layer1`..`layer4`, `neck` (what the head runs on rows), `head` (after densify) and,
    if a policy is given, `mask`. Convolutions and linear layers are counted, from the sizes they meet in a
    real forward; interpolation and pooling are not, as in the usual figures.
    """
    with eval_mode(model):
        counts = count_modules(model, lambda: model.outputs(images, layouts), _part)
    if policy is not None:
        counts["mask"] = _policy_macs(policy, images, labels)
    return counts


@torch.inference_mode()
def count_segment(
    model: SelectiveSegmentor, images: Tensor, policy: MaskPolicy, labels: Tensor | None = None
) -> dict[str, Macs]:
    """As `count_cost`, of `model.segment`, where the mask may read the network: in several passes, say.

    An oracle's mask costs nothing, even one that takes whole dense passes: it is a bound, not a way to run.
    """
    if policy.reads == "dense":
        fine_blocks = model.choose(images, labels, policy)
        return count_cost(model, images, model.selective_layouts(images, fine_blocks))
    both = nn.ModuleDict({"model": model, "policy": policy})
    return count_modules(
        both,
        lambda: model.segment(images, labels, policy),
        lambda name: _part(name.removeprefix("model.")),
    )


def count_run(
    model: SelectiveSegmentor,
    images: Tensor,
    labels: Tensor,
    output_stride: int | None,
    policy: MaskPolicy | None,
) -> int:
    """Multiply-adds of a run: dense at `output_stride`, or else under the mask of `policy`."""
    if output_stride is not None:
        return sum(count_macs(model, images, model.dense_layouts(images, output_stride)).values())
    assert policy is not None
    return sum(macs.total for macs in count_segment(model, images, policy, labels).values())


def count_modules(
    model: nn.Module, run: Callable[[], Any], part: Callable[[str], str] = lambda name: "all"
) -> dict[str, Macs]:
    """Multiply-adds of the convolutions and linear layers of `model` while `run()` uses it.

    Args:
        part: what a module counts as, by its name in `model`.
    """
    counts: dict[str, Macs] = {}

    def counter(key: str) -> Callable[..., None]:
        def count(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            counts[key] = counts.get(key, Macs()) + layer_macs(module, inputs, output)

        return count

    hooks = [
        module.register_forward_hook(counter(part(name)))
        for name, module in model.named_modules()
        if isinstance(module, COUNTED)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def layer_macs(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Macs:
    """Multiply-adds of one layer for the inputs it met."""
    if isinstance(module, SelectiveConv2d):
        _, src, dst = inputs
        return Macs(module.macs, _site_hits(module, src, dst) * module.in_channels * module.out_channels)
    if isinstance(module, SelectiveDepthwiseConv2d):
        _, src, dst = inputs
        return Macs(module.macs, _site_hits(module, src, dst) * module.channels)
    if isinstance(module, PooledLinear):
        macs = inputs[0].shape[0] * module.weight.numel()
        return Macs(macs, macs)
    if isinstance(module, nn.Linear):
        macs = inputs[0].numel() // module.in_features * module.weight.numel()
        return Macs(macs, macs)
    assert isinstance(module, nn.Conv2d)
    hits = module.weight.shape[0] * module.weight.shape[1] * output.shape[0]
    for axis in (0, 1):
        padding = module.padding[axis]
        assert isinstance(padding, int)
        hits *= _axis_hits(
            inputs[0].shape[2 + axis],
            output.shape[2 + axis],
            module.kernel_size[axis],
            module.stride[axis],
            module.dilation[axis],
            padding,
        )
    return Macs(output.numel() // output.shape[1] * module.weight.numel(), hits)


def _site_hits(conv: SelectiveConv2d | SelectiveDepthwiseConv2d, src: SiteLayout, dst: SiteLayout) -> int:
    """(site, tap) pairs that read something: on the lattice those inside the image, else sites and ghosts."""
    if conv.spacing is None and dst.splits:
        return every_site(dst, conv.exchange).num_hits
    if conv.spacing is None:
        height, width = (_axis_hits(cells, cells, 3, 1, 1, 1) for cells in dst.size)
        return dst.batch * height * width
    stride, dilation = dst.lattice_stride // src.lattice_stride, conv.spacing // src.lattice_stride
    hits = dst.batch if dst.runs_lattice else 0
    for inside, outside in zip(src.lattice_size, dst.lattice_size, strict=True):
        hits *= _axis_hits(inside, outside, 3, stride, dilation, dilation)
    if dst.num_extra:
        hits += src.neighbours(dst, conv.spacing, conv.exchange).num_hits
    return hits


def _axis_hits(inside: int, outside: int, kernel: int, stride: int, dilation: int, padding: int) -> int:
    """(output, tap) pairs along one axis whose tap falls on one of the `inside` inputs."""
    places = (out * stride + tap * dilation - padding for out in range(outside) for tap in range(kernel))
    return sum(0 <= place < inside for place in places)


def _policy_macs(policy: MaskPolicy, images: Tensor, labels: Tensor | None) -> Macs:
    """A policy is small and may use functions in place of modules: PyTorch counts it, padding included."""
    with FlopCounterMode(display=False) as counter:
        policy(images, labels)
    macs = counter.get_total_flops() // 2
    return Macs(macs, macs)


def _part(name: str) -> str:
    """`stem`, `layer1`..`layer4`, `neck`, `head` or `mask` from a module's name in `SelectiveSegmentor`."""
    first, *rest = name.split(".")
    if first == "backbone":
        return rest[0] if rest[0].startswith("layer") else "stem"
    if first == "head" and rest[0] in ("reduce", "aspp"):
        return "neck"
    return "mask" if first == "policy" else first


def count_parameters(model: nn.Module) -> int:
    """Parameters that inference needs: without the auxiliary head."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("auxiliary."))


def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes of the state dict that inference needs, saved as a plain dict: written to memory and measured."""
    state = {n: tensor for n, tensor in model.state_dict().items() if not n.startswith("auxiliary.")}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.tell()
