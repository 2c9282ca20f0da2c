"""A training step, and all that it changes: weights, their average, the optimiser's and scaler's state."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_seg.checkpoint.content import EARLIER_PARTS
from sparse_seg.config import TrainConfig
from sparse_seg.errors import CheckpointError, SparseSegError, TrainingError, out_of_memory
from sparse_seg.processes import Processes
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.weights import load_weights
from sparse_seg.training.checkpoint import best_of, restore_optimizer
from sparse_seg.training.objective import Objective
from sparse_seg.training.schedule import build_optimizer, learning_rate, update_average
from sparse_seg.training.stopping import Diverged


class Step:
    """Steps of a model on its device.

    Args:
        processes: that share each batch. They step by the gradient of the loss of the whole batch.
    """

    def __init__(
        self,
        model: SelectiveNetwork,
        objective: Objective,
        config: TrainConfig,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self.model, self.objective, self.config = model, objective, config
        self.device, self.processes = device, processes
        objective.loss.across = processes.mean
        self.average = copy.deepcopy(model) if config.ema_decay is not None else None
        self.optimizer = build_optimizer(model, config)
        half = config.amp and config.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)

    def __call__(self, images: Tensor, labels: Tensor, iteration: int) -> float:
        """Take step `iteration` on this process's share of a batch; returns the loss of the whole batch.

        Raises:
            SparseSegError, OSError: it failed, in one process at least, and nothing has changed in any.
        """
        random, buffers = torch.get_rng_state(), [buffer.clone() for buffer in self.model.buffers()]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(iteration, self.config)
        try:
            loss = self._gradients(images.to(self.device), labels.to(self.device), iteration)
        except (SparseSegError, OSError):  # a forward pass changes these alone
            torch.set_rng_state(random)
            with torch.no_grad():
                for buffer, value in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(value)
            raise
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            update_average(self.average, self.model, self.config.ema_decay or 0.0, iteration)
        return loss

    def _gradients(self, images: Tensor, labels: Tensor, iteration: int) -> float:
        """Compute the gradients of a batch; returns its loss."""
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)
        with self.processes.together(self.device), limits_named():
            with torch.autocast(self.device.type, getattr(torch, config.amp_dtype), enabled=config.amp):
                loss = self.objective(self.model, images, labels)
            whole_loss = self.processes.mean(loss)
            _require_finite(whole_loss, "loss", iteration)
            self.scaler.scale(loss).backward()
        self.processes.average_gradients(self.model.parameters())
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if config.clip_grad_norm is None else config.clip_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        if not self.scaler.is_enabled():  # with float16 the scaler skips such a step and lowers its scale
            _require_finite(norm, "gradient", iteration)
        return whole_loss.item()

    def state(self) -> dict[str, Any]:
        """What `restore` needs."""
        return {
            "ema": self.average.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
        }

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Go on from a state of `load_state`.

        Raises:
            CheckpointError: it is damaged, or of another network or optimiser.
        """
        if any(name.startswith(EARLIER_PARTS) for name in state["model"]):
            raise CheckpointError(
                f"{path} was written by an earlier version, which named the weights otherwise: train on in "
                f"another folder from its best ones, train.init={best_of(path.parent)}"
            )
        if state["config"].train.optimizer != self.config.optimizer:
            raise CheckpointError(f"{path} was trained with another train.optimizer")
        load_weights(self.model, state["model"], path)
        if self.average is not None:
            load_weights(self.average, state["ema"] or state["model"], path)
        restore_optimizer(self.optimizer, self.config.optimizer, state["optimizer"], path)
        try:
            if state["scaler"] and self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(state["random"])
        except (RuntimeError, KeyError):
            raise CheckpointError(f"{path} is damaged: its random or scaler state is none") from None


@contextmanager
def limits_named() -> Iterator[None]:
    """Raises a TrainingError where a step finds no memory, on GPU or CPU, or a batch norm too few values."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if out_of_memory(error):
            raise TrainingError("no memory for a step; lower train.batch_size or data.crop") from None
        if "more than 1 value per channel" not in str(error):
            raise
        raise TrainingError(
            "a batch norm gets one value per channel and learns nothing: raise train.batch_size (2 images "
            "for each process where the head pools them), or else data.crop"
        ) from None


def _require_finite(value: Tensor, name: str, iteration: int) -> None:
    if not torch.isfinite(value):
        raise Diverged(f"{name} is {value.item()} at iteration {iteration}")
