"""Learning rate over iterations, the optimiser, and the average of weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sparse_seg.config import TrainConfig


def learning_rate(iteration: int, config: TrainConfig) -> float:
    """Poly schedule with linear warm-up: the rate of step `iteration` (from 0) of `config.iterations`.

    `lr * (1 - t) ** power` as in DeepLab (Chen et al., TPAMI 2018), times the share of the warm-up done.
    """
    remaining = max(1 - iteration / config.iterations, 0.0)  # of a run resumed with fewer iterations, none
    warm = min(1.0, (iteration + 1) / (config.warmup_iterations + 1))
    return config.lr * warm * remaining**config.poly_power


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW; no weight decay on biases and norms (one-dimensional parameters)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, iteration: int) -> None:
    """Exponential moving average of weights and statistics; its decay grows from 0.1 to `decay`."""
    decay = min(decay, (1 + iteration) / (10 + iteration))
    tensors = (one.state_dict(keep_vars=True).values() for one in (average, model))
    found = {id(kept): (kept.detach(), new.detach()) for kept, new in zip(*tensors, strict=True)}  # once each
    averaged = [pair for pair in found.values() if pair[0].is_floating_point()]
    get_ema_multi_avg_fn(decay)(*zip(*averaged, strict=True), None)
    for kept, new in found.values():
        if not kept.is_floating_point():
            kept.copy_(new)
