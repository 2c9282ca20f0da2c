"""The remaining work of an ablation, with a time estimate for this machine."""

from __future__ import annotations

import json
from typing import Any

from sparse_seg.config import to_dict
from sparse_seg.data import open_split
from sparse_seg.lab.ablation.costs import first_frame, step_seconds
from sparse_seg.lab.ablation.grid import Cell
from sparse_seg.lab.ablation.runner import Ablation
from sparse_seg.lab.latency import interleaved
from sparse_seg.run.build import build_model
from sparse_seg.training.checkpoint import LAST, load_state
from sparse_seg.training.statistics import BATCHES


def remaining(ablation: Ablation) -> list[dict[str, Any]]:
    """A row for each training and each cell of the grid, in order: `what`, `done`, and `seconds` still to go.

    One training step (random images of the config's crop and batch size) and one validation frame are timed
    for each distinct network, with fresh weights.

    Raises:
        DataError: the dataset is not there.
    """
    clock = _Clock(ablation)
    rows = []
    for name, seed in ablation.grid.trainings:
        done = ablation.is_trained(name, seed)
        seconds = 0.0 if done else clock.training(name, seed)
        rows.append({"what": f"train {name}, seed {seed}", "done": done, "seconds": seconds})
    for cell in ablation.grid.cells:
        done = ablation.result(cell) is not None
        what = f"evaluate {cell.network}, seed {cell.seed}: {cell.run.name}"
        what += f", {cell.run.exchange}" if cell.run.exchange else ""
        rows.append({"what": what, "done": done, "seconds": 0.0 if done else clock.cell(cell)})
    return rows


class _Clock:
    def __init__(self, ablation: Ablation) -> None:
        self.ablation = ablation
        self._steps: dict[str, float] = {}
        self._frames: dict[str, float] = {}

    def training(self, name: str, seed: int) -> float:
        network, config = self.ablation.grid.networks[name], self.ablation.config(name, seed)
        if name not in self._steps:
            self._steps[name] = step_seconds(self.ablation, name)
        if network.source is not None:  # a step without its backward pass
            return BATCHES * self._steps[name] / 3
        last, done = self.ablation.folder(name, seed) / LAST, 0
        if last.exists():
            done = load_state(last)["progress"]["iteration"]
        return (config.train.iterations - done) * self._steps[name]

    def cell(self, cell: Cell) -> float:
        config = self.ablation.cell_config(cell)
        key = json.dumps([cell.run.output_stride, to_dict(config.model)], sort_keys=True)
        if key not in self._frames:
            model = build_model(config).to(self.ablation.device).eval()
            image, label = first_frame(config, self.ablation.device)
            run = {"": lambda: model.classify(image, cell.run.output_stride, labels=label)}
            self._frames[key] = interleaved(run, 1, self.ablation.device)[""].median / 1000
        count = len(open_split(config.data, "val"))
        return min(count, self.ablation.grid.spec.eval_images or count) * self._frames[key]
