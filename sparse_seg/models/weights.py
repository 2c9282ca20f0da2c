"""State dicts into networks, with nothing dropped in silence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_seg.errors import CheckpointError


def part_of(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy a state dict into `model`; every name and shape must fit, every value be finite.

    Raises:
        CheckpointError: names the first tensor that does not fit or is not finite, and how many do not fit.
    """
    own = model.state_dict()
    faults = [f"{name} is missing" for name in own if name not in weights]
    faults += [f"{name} has no place in this model" for name in weights if name not in own]
    faults += [
        f"{name} is {list(weights[name].shape)}, the model's is {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise CheckpointError(
            f"{source} does not fit the configured model: {faults[0]}{more}; check model.* keys"
        )
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{source}: {name} holds NaN or infinite values; take an earlier checkpoint"
            )
    model.load_state_dict(dict(weights))
