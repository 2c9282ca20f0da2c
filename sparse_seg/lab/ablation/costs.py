"""Cost of the cells: multiply-adds, parameters, bytes, memory, and latency in one interleaved run; and an
estimate of the time that the remaining work takes, for which no network is timed."""

import json
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_seg.checkpoint import load_model
from sparse_seg.config import Config, to_dict
from sparse_seg.data import open_split
from sparse_seg.data.batches import EvaluationView
from sparse_seg.evaluation.cost import checkpoint_bytes, count_macs, count_parameters
from sparse_seg.files import locked
from sparse_seg.lab.ablation.grid import Cell
from sparse_seg.lab.ablation.runner import Ablation
from sparse_seg.lab.latency import SPAWN, Run, interleaved, peak_memory
from sparse_seg.lab.provenance import write_result
from sparse_seg.run.build import build_model
from sparse_seg.run.way import Way
from sparse_seg.training.checkpoint import LOG
from sparse_seg.training.distillation import Teacher
from sparse_seg.training.objective import Objective
from sparse_seg.training.statistics import BATCHES

REPEATS = 11  # timed runs of each way
SIDE = 128  # px, of the image whose multiply-adds tell those of larger ones
STEP = 3  # a training step: the forward pass, and the gradients of inputs and of weights


def cost_key(ablation: Ablation, cell: Cell) -> str:
    """Cells with the same key are measured once: cost depends on size and way to run, not on the weights.

    (But for the last upsampling on the CPU, which has less to do where a network sees larger areas.)
    """
    config = ablation.cell_config(cell)
    if cell.run.is_dense:
        return dense_key(config, cell.run.output_stride)
    return json.dumps([None, to_dict(config.model)], sort_keys=True)


def dense_key(config: Config, stride: int | None) -> str:
    """The same for networks that cost the same when they run dense at a stride."""
    model = to_dict(config.model)
    for name in ("mask", "strides", "exchange"):
        del model[name]
    return json.dumps([stride, model], sort_keys=True)


def measure_costs(ablation: Ablation) -> dict[str, Any]:
    """What the grid's cells cost: `costs` by `cost_key`, and `steps` by network.

    Kept in `costs.json` of the work folder. Every distinct cost is measured on the first validation frame, by
    the weights of its first cell, as `model.for_inference()`: mask policy, network and argmax. All take turns
    in one run; if one is missing, all are measured again. A step is that of `step_seconds`.
    """
    path = ablation.work_dir / "costs.json"
    distinct: dict[str, Cell] = {}
    for cell in ablation.grid.cells:
        distinct.setdefault(cost_key(ablation, cell), cell)
    trained = {name for name, network in ablation.grid.networks.items() if network.source is None}
    with locked(path.with_suffix(".lock"), wait=True), ProcessPoolExecutor(1, SPAWN) as pool:
        if path.exists():
            kept = json.loads(path.read_text())
            if set(distinct) <= set(kept["costs"]) and trained <= set(kept["steps"]):
                return kept
        costs = _measure(ablation, distinct, pool)
        content = {"costs": costs, "steps": {name: step_seconds(ablation, name) for name in trained}}
        write_result(path, content)
        return content


def _measure(
    ablation: Ablation, distinct: dict[str, Cell], pool: ProcessPoolExecutor
) -> dict[str, dict[str, Any]]:
    costs, runs = dict[str, dict[str, Any]](), dict[str, Run]()
    for key, cell in distinct.items():
        config, checkpoint = ablation.cell_config(cell), ablation.checkpoint(cell.network, cell.seed)
        arguments = checkpoint, config, cell.run.output_stride, ablation.device
        model = load_model(checkpoint, config).to(ablation.device)
        image, label = first_frame(config, ablation.device)
        runs[key] = prepare(*arguments)
        macs = count_macs(model, image, Way(cell.run.output_stride), label)
        costs[key] = {
            "gmacs": sum(macs.values()) / 1e9,
            "parameters": count_parameters(model),
            "checkpoint_mb": checkpoint_bytes(model) / 1e6,
            "peak_mib": peak_memory(prepare, arguments, ablation.device, pool),
        }
    for key, latency in interleaved(runs, REPEATS, ablation.device, warmup=2).items():
        costs[key] |= {"milliseconds": latency.median, "milliseconds_spread": latency.spread}
    return costs


def first_frame(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first validation frame: image float `[1, 3, H, W]` and label int64 `[1, H, W]`."""
    dataset = open_split(config.data, "val")
    image, label, _ = EvaluationView(dataset, config.data)[0]
    return image.to(device), label.to(device)


def prepare(checkpoint: Path, config: Config, output_stride: int | None, device: torch.device) -> Run:
    """A run of a network on the first frame, as made for inference; it has run once."""
    model = load_model(checkpoint, config).to(device).for_inference()
    image, label = first_frame(config, device)

    def run() -> Any:
        return model.classify(image, output_stride, labels=label)

    run()
    return run


def step_seconds(ablation: Ablation, name: str) -> float:
    """Seconds of a training step of a network, with random images of its config's crop and batch size. A
    teacher is run as if nothing of it were cached."""
    config, device = ablation.config(name, ablation.grid.spec.seeds[0]), ablation.device
    taught = config.train.distill.teacher
    teacher = None if taught is None else Teacher(taught, config, device=device)
    model = build_model(config).to(device).train()
    objective = Objective(config.train, teacher).to(device)
    images = torch.randn(config.train.batch_size, 3, *config.data.crop, device=device)
    labels = torch.zeros(config.train.batch_size, *config.data.crop, dtype=torch.int64, device=device)
    timed = interleaved({"": lambda: objective(model, images, labels).backward()}, 3, device)
    return timed[""].median / 1000


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
