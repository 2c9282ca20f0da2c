"""What a forward costs: multiply-adds counted by the layers from what they ran on, and parameters."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from sparse_seg.models.segmentor import SelectiveSegmentor
from sparse_seg.sparse import SelectiveConv2d, SiteLayout


@torch.inference_mode()
def count_macs(model: SelectiveSegmentor, images: Tensor, layouts: list[SiteLayout]) -> dict[str, int]:
    """Multiply-adds of one forward by part (`stem`, `layer1`..`layer4`, `head`), for the whole batch.

    Convolutions and linear layers are counted, from the sizes they meet in a real forward; taps that fall
    outside the image count, as in the usual figure of a dense network.
    """
    counts: dict[str, int] = defaultdict(int)

    def counter(part: str) -> Any:
        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            counts[part] += _module_macs(module, inputs[0], output)

        return count

    hooks = [
        module.register_forward_hook(counter(_part(name)))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear, SelectiveConv2d))
    ]
    was_training = model.training
    model.eval()
    try:
        model.outputs(images, layouts)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return dict(counts)


def _module_macs(module: nn.Module, source: Tensor, output: Tensor) -> int:
    if isinstance(module, SelectiveConv2d):
        return module.macs
    if isinstance(module, nn.Linear):
        return source.numel() // module.in_features * module.weight.numel()
    assert isinstance(module, nn.Conv2d)
    return output.numel() // output.shape[1] * module.weight.numel()


def _part(name: str) -> str:
    """`stem`, `layer1`..`layer4` or `head` from a module's name."""
    first, *rest = name.split(".")
    if first != "backbone":
        return first
    return rest[0] if rest[0].startswith("layer") else "stem"


def count_parameters(model: nn.Module) -> int:
    """Parameters that inference needs: without the auxiliary head."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("auxiliary."))
