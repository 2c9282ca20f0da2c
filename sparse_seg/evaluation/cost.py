"""What a network costs: multiply-adds, parameters, bytes on disk.

Latency and peak memory, which need a clock and a machine, are in `latency.py`.
"""

from __future__ import annotations

import io

import torch
from torch import Tensor

from sparse_seg.masks import MaskPolicy
from sparse_seg.run.modes import eval_mode
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way


@torch.inference_mode()
def count_macs(
    model: SelectiveNetwork,
    images: Tensor,
    way: Way | None = None,
    labels: Tensor | None = None,
    policy: MaskPolicy | None = None,
) -> dict[str, int]:
    """Multiply-adds of one forward, for the whole batch, of all passes that it takes, by part: `early`,
    `rows`, `late` and `mask`, see `Pass.macs`.

    The mask of a bound (an oracle) costs nothing, even one that takes whole dense passes: no one runs it.

    Args:
        way: by default selective under the model's own policy.
        policy: overrides the way's.
    """
    way = way or Way()
    with eval_mode(model):
        run = model.start(images, labels)
        if not way.is_dense:
            policy = policy or model.policy_for(way)
            if policy.is_bound:
                return model.start(images).take(policy(run), way).macs()
        return run.follow(way, policy).macs()


def count_parameters(model: SelectiveNetwork) -> int:
    """Parameters that inference needs: without an auxiliary head."""
    needed = _needed(model)
    return sum(one.numel() for name, one in model.named_parameters() if name in needed)


def checkpoint_bytes(model: SelectiveNetwork) -> int:
    """Bytes of the tensors that inference needs, saved as a plain dict: written to memory and measured."""
    buffer = io.BytesIO()
    torch.save(_needed(model), buffer)
    return buffer.tell()


def _needed(model: SelectiveNetwork) -> dict[str, Tensor]:
    """Of the state dict, what the graph names, and the policy's."""
    owners = {f"{owner}.{name}" for owner in ("module", "constants") for name in model.graph.tensor_names}
    state = model.state_dict().items()
    return {name: tensor for name, tensor in state if name in owners or name.startswith("policy.")}
