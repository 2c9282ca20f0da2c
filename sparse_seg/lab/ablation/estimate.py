"""The remaining work of an ablation, and an estimate of its time, for which no network is timed."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional as F

from sparse_seg.config import Config
from sparse_seg.data import open_split
from sparse_seg.evaluation.cost import count_macs
from sparse_seg.lab.ablation.costs import dense_key
from sparse_seg.lab.ablation.grid import Cell
from sparse_seg.lab.ablation.runner import Ablation
from sparse_seg.lab.latency import interleaved
from sparse_seg.run.build import build_model
from sparse_seg.run.way import Way
from sparse_seg.training.checkpoint import LOG
from sparse_seg.training.statistics import BATCHES

SIDE = 128  # px, of the image whose multiply-adds tell those of larger ones
STEP = 3  # a training step: the forward pass, and the gradients of inputs and of weights


def remaining(ablation: Ablation) -> list[dict[str, Any]]:
    """A row for each training and each cell of the grid, in order: `what`, `done`, and `seconds` still to go.

    Multiply-adds take the time that those of one convolution take on the device, and a selective network has
    them in proportion to its fine fraction. A training that has begun, or one of the same network, tells by
    its log what a step takes.

    Raises:
        DataError: the dataset is not there.
    """
    rows, costs = list[dict[str, Any]](), _Costs(ablation)
    for name, seed in ablation.grid.trainings:
        done = ablation.is_trained(name, seed)
        seconds = 0.0 if done else costs.training(name, seed)
        rows.append({"what": f"train {name}, seed {seed}", "done": done, "seconds": seconds})
    for cell in ablation.grid.cells:
        done = ablation.result(cell) is not None
        what = f"evaluate {cell.network}, seed {cell.seed}: {cell.run.name}"
        what += f", {cell.run.exchange}" if cell.run.exchange else ""
        rows.append({"what": what, "done": done, "seconds": 0.0 if done else costs.cell(cell)})
    return rows


class _Costs:
    def __init__(self, ablation: Ablation) -> None:
        self.ablation, self.grid, self._known = ablation, ablation.grid, dict[str, float]()
        weights, given = torch.randn(64, 64, 3, 3), torch.randn(1, 64, SIDE, SIDE)
        weights, given = weights.to(ablation.device), given.to(ablation.device)
        timed = interleaved({"": lambda: F.conv2d(given, weights, padding=1)}, 3, ablation.device)
        self.rate = 1000 * weights.numel() * SIDE**2 / timed[""].median  # multiply-adds/s

    def training(self, name: str, seed: int) -> float:
        network, config = self.grid.networks[name], self.grid.configs[name]
        train, crop = config.train, config.data.crop
        fraction = config.model.mask.fine_fraction if train.network == "selective" else None
        forward = self._macs(config, train.output_stride, fraction)
        teacher = 0.0 if network.teacher is None else self._macs(self.grid.configs[network.teacher])
        batch = train.batch_size * crop[0] * crop[1] / self.rate
        if network.source is not None:
            return BATCHES * forward * batch
        logs = {one: self._log(name, one) for one in self.grid.spec.seeds}
        told = (seconds / steps for steps, seconds in logs.values() if steps)
        step = next(told, (STEP * forward + teacher) * batch)
        return (train.iterations - logs[seed][0]) * step

    def cell(self, cell: Cell) -> float:
        config, run = self.ablation.cell_config(cell), cell.run
        return self._pixels * self._macs(config, run.output_stride, run.fine_fraction) / self.rate

    @cached_property
    def _pixels(self) -> int:
        """Of all frames that an evaluation sees, if they are as large as the first."""
        dataset = open_split(next(iter(self.grid.configs.values())).data, "val")
        height, width = dataset.load(0)[0].shape[:2]
        return min(len(dataset), self.grid.spec.eval_images or len(dataset)) * height * width

    def _log(self, name: str, seed: int) -> tuple[int, float]:
        """Steps of a training so far, and their seconds."""
        path = self.ablation.folder(name, seed) / LOG
        try:
            last = json.loads(path.read_text().splitlines()[-1])
            return last["iteration"], last["seconds"]
        except (OSError, ValueError, LookupError):  # none yet, or cut by a kill
            return 0, 0.0

    def _macs(self, config: Config, stride: int | None = None, fraction: float | None = None) -> float:
        """Multiply-adds a pixel: dense at a stride (None: the finest), or at a fraction of fine blocks."""
        if fraction is not None:
            strides = config.model.own_strides
            fine, coarse = self._macs(config, strides[0]), self._macs(config, strides[-1])
            return coarse + fraction * (fine - coarse)
        key = dense_key(config, stride)
        if key not in self._known:
            model = build_model(config).to(self.ablation.device)
            way, image = Way.dense(stride or model.dense_stride), torch.zeros(1, 3, SIDE, SIDE)
            counts = count_macs(model, image.to(model.device), way)
            self._known[key] = sum(counts.values()) / SIDE**2
        return self._known[key]
