"""Multiply-adds counted from outside, layer by layer, from the sizes that a real forward meets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sparse_seg.sparse import SelectiveConv2d, SelectiveDepthwiseConv2d


def count_modules(
    model: nn.Module, run: Callable[[], Any], part: Callable[[str], str] = lambda name: "all"
) -> dict[str, int]:
    """Those of the convolutions and linear layers of `model` while `run()` uses it, by `part` of a name."""
    counts: dict[str, int] = {}

    def counter(key: str) -> Callable[..., None]:
        def count(module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            if isinstance(module, nn.Conv2d):
                places = output.numel() // output.shape[1]
            elif isinstance(module, nn.Linear):  # a pooled vector counts as if it stood in every row
                places = inputs[0].shape[0]
            else:
                places = output.shape[0]
            counts[key] = counts.get(key, 0) + places * module.weight.numel()

        return count

    kinds = (nn.Conv2d, nn.Linear, SelectiveConv2d, SelectiveDepthwiseConv2d)
    hooks = [
        module.register_forward_hook(counter(part(name)))
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return counts
