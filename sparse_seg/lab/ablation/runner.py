"""Run a grid: train what is missing, evaluate what is missing, measure costs. A killed run resumes.

Several processes may share a work folder, on as many GPUs: each takes what no other is at work on.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from sparse_seg.checkpoint import find, load_model
from sparse_seg.checkpoint.captured import content_of
from sparse_seg.config import Config, to_dict
from sparse_seg.data import open_split
from sparse_seg.errors import CheckpointError
from sparse_seg.evaluation.evaluate import evaluate
from sparse_seg.files import atomic_write, locked
from sparse_seg.lab.ablation.grid import Cell, RunGrid, slug
from sparse_seg.lab.provenance import provenance
from sparse_seg.processes import Processes
from sparse_seg.progress import say
from sparse_seg.run.way import Way
from sparse_seg.training.checkpoint import best_of, save_checkpoint
from sparse_seg.training.finish import finish_training, is_finished
from sparse_seg.training.statistics import recalibrate_batch_norm

WAIT = 5.0  # seconds between looks at what other processes have done
_T = TypeVar("_T")


class Ablation:
    """A grid in a work folder: `training/NETWORK-seedN/` as `train` leaves it, and `cells/*.json`.

    Args:
        grid: what to run.
        work_dir: created if need be.
        checkpoint: use it as the first network, for all seeds, instead of training that one.
        device: where to train and evaluate.
        processes: that share each training and each evaluation; the first one writes the files.
    """

    def __init__(
        self,
        grid: RunGrid,
        work_dir: str | Path,
        checkpoint: str | Path | None = None,
        device: torch.device | str = "cpu",
        processes: Processes | None = None,
    ) -> None:
        self.grid, self.work_dir, self.device = grid, Path(work_dir), torch.device(device)
        self.processes = processes or Processes()
        self.given = {next(iter(grid.networks)): find(checkpoint)} if checkpoint is not None else {}
        if checkpoint is not None:
            load_model(checkpoint, next(iter(grid.configs.values())))  # before hours of other work
        self._digests: dict[tuple[Path, int], str] = {}

    # -- what is there -------------------------------------------------------------------------------------

    def folder(self, name: str, seed: int) -> Path:
        """Where a network's training is kept."""
        return self.work_dir / "training" / f"{slug(name)}-seed{seed}"

    def checkpoint(self, name: str, seed: int) -> Path:
        """Path of the trained weights, which need not exist yet."""
        return self.given.get(name, best_of(self.folder(name, seed)))

    def config(self, name: str, seed: int) -> Config:
        """A network's training config with its seed, and the networks of that seed that it builds on."""
        config, network = self.grid.configs[name], self.grid.networks[name]
        train = dataclasses.replace(config.train, seed=seed)
        if network.teacher is not None:
            teacher = str(self.checkpoint(network.teacher, seed))
            train.distill = dataclasses.replace(train.distill, teacher=teacher)
        if network.init is not None:
            train.init = str(self.checkpoint(network.init, seed))
        return dataclasses.replace(config, train=train)

    def is_trained(self, name: str, seed: int) -> bool:
        """Whether training is done: then `checkpoint` is the final one.

        Raises:
            TrainingError: its folder holds a run of another config.
        """
        if name in self.given:
            return True
        if self.grid.networks[name].source is not None:
            copy, origin = self.checkpoint(name, seed), self._origin(name, seed)
            return copy.exists() and origin.exists() and origin.read_text() == self._made_of(name, seed)
        return is_finished(self.config(name, seed), self.folder(name, seed))

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """A finished cell's result; None if there is none, or one of other weights or settings."""
        path, checkpoint = self._cell_path(cell), self.checkpoint(cell.network, cell.seed)
        if not path.exists() or not checkpoint.exists():
            return None
        content = json.loads(path.read_text())
        return content if content["key"] == self._key(cell) else None

    def _cell_path(self, cell: Cell) -> Path:
        return self.work_dir / "cells" / f"{cell.slug}.json"

    def _origin(self, name: str, seed: int) -> Path:
        """Keeps what `_made_of` said of a network with a source when it was made."""
        return self.folder(name, seed) / "source.txt"

    def _made_of(self, name: str, seed: int) -> str:
        """Tells of which weights, and how, a network with a source is to be made."""
        network = self.grid.networks[name]
        source = self.checkpoint(str(network.source), seed)
        return f"{network.statistics} {self._digest(source) if source.exists() else None}"

    def _digest(self, path: Path) -> str:
        version = path, path.stat().st_mtime_ns
        if version not in self._digests:
            self._digests[version] = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        return self._digests[version]

    def _key(self, cell: Cell) -> str:
        """Identifies a result: its weights, model settings, data and images."""
        config, weights = self.cell_config(cell), self._digest(self.checkpoint(cell.network, cell.seed))
        settings = [
            to_dict(config.model),
            cell.run.output_stride,
            config.data.dataset,
            str(Path(config.data.root).resolve()),
            self.grid.spec.eval_images,
            *filter(None, [config.data.bits]),
            *([config.data.withheld, config.data.train_on] if config.data.withheld else []),
        ]
        text = weights + json.dumps(settings, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def cell_config(self, cell: Cell) -> Config:
        """A network's config with the way that a cell runs it."""
        return cell.run.applied(self.config(cell.network, cell.seed))

    # -- running -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train and evaluate all that is missing; waits for cells that other processes work on.

        Raises:
            TrainingError: training failed, or its folder holds a run of another config.
            DataError, CheckpointError: as of training and evaluation.
        """
        _finish(
            self.processes,
            self.grid.trainings,
            lambda job: self.folder(*job) / ".lock",
            lambda job: self.is_trained(*job),
            lambda job: self.train(*job),
            lambda job: all(self.is_trained(name, job[1]) for name in self.grid.networks[job[0]].others),
        )
        _finish(
            self.processes,
            self.grid.cells,
            lambda cell: self._cell_path(cell).with_suffix(".lock"),
            lambda cell: self.result(cell) is not None,
            self.evaluate,
        )

    def train(self, name: str, seed: int) -> None:
        """Train a network, resume its training, or recalibrate its source's batch norm."""
        config, network = self.config(name, seed), self.grid.networks[name]
        if network.source is None:
            if self.processes.is_first:
                say(f"training {name}, seed {seed}")
            finish_training(config, self.folder(name, seed), self.device, self.processes)
            return
        assert network.statistics is not None
        model = load_model(self.checkpoint(network.source, seed), config).to(self.device)
        recalibrate_batch_norm(model, config, network.statistics)
        if self.processes.is_first:
            frame = None if model.card is None else model.card.frame
            save_checkpoint(self.checkpoint(name, seed), config, *content_of(model), frame=frame)
            atomic_write(self._origin(name, seed), self._made_of(name, seed))

    def evaluate(self, cell: Cell) -> None:
        """Measure a cell's accuracy and write its file."""
        config = self.cell_config(cell)
        model = load_model(self.checkpoint(cell.network, cell.seed), config).to(self.device)
        dataset = open_split(config.data, "val")
        images = self.grid.spec.eval_images
        run = cell.run
        way = Way(run.output_stride)
        result = evaluate(model, dataset, config.data, way, images, processes=self.processes)
        if not self.processes.is_first:
            return
        own = {"policy": run.mask, "fraction": run.fine_fraction}
        own |= {key: getattr(run, key) for key in ("output_stride", "exchange", "strides", "middle_fraction")}
        content: dict[str, Any] = {"network": cell.network, "seed": cell.seed, "run": own}
        content |= {"key": self._key(cell), "origin": provenance(), "metrics": result.as_dict()}
        del content["metrics"]["confusion"]
        atomic_write(self._cell_path(cell), json.dumps(content, indent=1) + "\n")
        say(f"evaluated {cell.slug}: mIoU {100 * result.metrics.miou:.2f}")

    def results(self) -> list[dict[str, Any]]:
        """All cells' results, in order.

        Raises:
            CheckpointError: a cell is not finished.
        """
        results = []
        for cell in self.grid.cells:
            result = self.result(cell)
            if result is None:
                raise CheckpointError(f"{self._cell_path(cell)} is missing or out of date: run it again")
            results.append(result)
        return results


def _finish(
    processes: Processes,
    jobs: Sequence[_T],
    lock_of: Callable[[_T], Path],
    is_done: Callable[[_T], bool],
    work: Callable[[_T], None],
    is_ready: Callable[[_T], bool] = lambda job: True,
) -> None:
    """Do all jobs that are not done; those that another run holds come last. The first process decides."""

    def take(job: _T, held: ExitStack) -> str:
        """Take a job's lock, held until `held` ends, if the job can be done now."""
        if not (is_ready(job) and held.enter_context(locked(lock_of(job)))):
            return "busy"
        return "done" if is_done(job) else "to do"

    left = processes.decided(lambda: [job for job in jobs if not is_done(job)])
    while left:
        before = len(left)
        for job in list(left):
            with ExitStack() as held:
                state = processes.decided(partial(take, job, held))
                if state == "to do":
                    work(job)
            if state != "busy":
                left.remove(job)
        if len(left) == before:
            time.sleep(WAIT)
