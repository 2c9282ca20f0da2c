"""What a network costs: multiply-adds, parameters, bytes on disk.

Latency and peak memory, which need a clock and a machine, are in `latency.py`.
"""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn

from sparse_seg.masks import MaskPolicy
from sparse_seg.run.segmentor import Segmentor
from sparse_seg.run.modes import eval_mode
from sparse_seg.run.way import Way


@torch.inference_mode()
def count_macs(
    model: Segmentor,
    images: Tensor,
    way: Way | None = None,
    labels: Tensor | None = None,
    policy: MaskPolicy | None = None,
) -> dict[str, int]:
    """Multiply-adds of one forward by part, for the whole batch, see `Pass.macs`: of all passes it takes.

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


def count_parameters(model: nn.Module) -> int:
    """Parameters that inference needs: without the auxiliary head."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("auxiliary."))


def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes of the state dict that inference needs, saved as a plain dict: written to memory and measured."""
    state = {n: tensor for n, tensor in model.state_dict().items() if not n.startswith("auxiliary.")}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.tell()
