"""The training loop: iterations, log, validation, checkpoints, resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_seg.checkpoint.captured import content_of
from sparse_seg.config import Config, changes, check_classes, check_training, to_yaml
from sparse_seg.data import open_split
from sparse_seg.data.batches import training_batches
from sparse_seg.errors import DataError, SparseSegError, TrainingError
from sparse_seg.files import atomic_write
from sparse_seg.graph.file import check_plain
from sparse_seg.processes import Processes, ProcessLost
from sparse_seg.progress import say
from sparse_seg.training.batch import check_batch
from sparse_seg.training.checkpoint import (
    LAST,
    best_of,
    check_work_dir,
    is_complete,
    load_state,
    save_best,
    save_state,
)
from sparse_seg.training.console import Console
from sparse_seg.training.distillation import Teacher
from sparse_seg.training.folder import CONFIG, FolderLock
from sparse_seg.training.log import TrainingLog
from sparse_seg.training.losses import check_class_weights
from sparse_seg.training.objective import Objective
from sparse_seg.training.pretrained import initial_model
from sparse_seg.training.schedule import learning_rate
from sparse_seg.training.step import Step
from sparse_seg.training.stopping import (
    AlreadyTrained,
    DeviceFailed,
    Diverged,
    Stop,
    ending,
    reason,
    signals_to,
)
from sparse_seg.training.validation import logged, validate

PROGRESS = ("iteration", "best", "validated", "loss_sum", "loss_count")  # attributes that a state keeps


class Trainer:
    """Trains a config's network in a work folder.

    The folder gets `config.yaml` (resolved), `log.jsonl` (one JSON line per log step and validation),
    `last.pt` (all state, to resume from) and `best.safetensors` (weights of the best validation mIoU).

    Args:
        config: resolved config.
        work_dir: created if need be; one that already holds a run is refused unless resuming, and
            so is one in which another training runs.
        resume: checkpoint to resume from, bit for bit on the CPU with one process; True takes the
            folder's `last.pt`.
        device: where to train.
        processes: that train together: each takes a share of every batch and of the validation, and the
            first one writes the files.

    Raises:
        AlreadyTrained: the folder's run, which is to be resumed, has come to its end.
        TrainingError: the folder already holds a run or one trains there, or a batch cannot be shared by the
            processes.
        ConfigError: settings of a learned mask that exclude each other.
        CheckpointError: the checkpoint to start or resume from is missing, corrupt or of another model.
        DataError: the dataset is incomplete or inconsistent.
    """

    def __init__(
        self,
        config: Config,
        work_dir: str | Path,
        resume: str | Path | bool = False,
        device: torch.device | str = "cpu",
        processes: Processes | None = None,
    ) -> None:
        self.config, self.work_dir, self.device = config, Path(work_dir), torch.device(device)
        self.processes = processes or Processes()
        check_training(config)
        check_batch(config, self.processes, self.device)
        self.last, self.lock = self.work_dir / LAST, FolderLock(self.work_dir, self.processes)
        with self.lock:
            self._prepare(resume)

    def _prepare(self, resume: str | Path | bool) -> None:
        """Check and build all that `run` needs; the work folder is written last."""
        config, train, data = self.config, self.config.train, self.config.data
        self.lock.take(create=False)
        goes_on = bool(resume is True or (resume and Path(resume).resolve() == self.last.resolve()))
        self._check_folder(goes_on)
        if train.threads is not None:
            torch.set_num_threads(train.threads)
        source = self.last if resume is True else Path(str(resume))
        state = load_state(source) if resume else None
        if state is not None and goes_on and is_complete(state, train.iterations, self.work_dir):
            raise AlreadyTrained(
                f"{self.work_dir} is already trained to iteration {state['progress']['iteration']}; raise "
                "train.iterations to continue"
            )

        self.dataset = open_split(data, "train")
        self.validation = open_split(data, "val")
        check_classes(config)
        check_class_weights(self.dataset.check(), train.loss.class_weights)
        self.validation.check(train.eval_images)
        if self.processes.is_first and {*self.dataset.samples} & {*self.validation.samples}:
            say("warning: frames of the validation train, too: its score flatters")

        torch.manual_seed(train.seed)
        self.model = initial_model(config, self.device, self.processes, starts=state is None)
        check_batch(config, self.processes, self.device, self.model)
        check_plain(self.model.graph)  # it is saved later on
        path, cache = train.distill.teacher, train.distill.cache
        teacher = None if path is None else Teacher(path, config, cache, self.device)
        self.objective = Objective(train, teacher).to(self.device)
        self.step = Step(self.model, self.objective, train, self.device, self.processes)
        self.ema, self.optimizer = self.step.average, self.step.optimizer
        self.iteration, self.best, self.loss_sum, self.loss_count = 0, -1.0, 0.0, 0
        self.validated = self.saved = 0  # iterations
        if state is not None:
            self._restore(state, source)
            if goes_on:
                self.saved = self.iteration
            elif self.iteration >= train.iterations:
                raise TrainingError(
                    f"{resume} is already trained to iteration {self.iteration}; raise train.iterations"
                )
        self.processes.seed(train.seed, self.iteration)
        if self.lock.take(create=True):
            self._check_folder(goes_on)  # once more: another training may have been in it meanwhile
        if self.processes.is_first:
            atomic_write(self.work_dir / CONFIG, to_yaml(config))
            self.log = TrainingLog(self.work_dir, self.iteration, train.tensorboard)
        self.resume_hint = f"resume with --work-dir {self.work_dir} --resume"
        self.resume_hint_changed = self.resume_hint
        self.stop = Stop(self.processes, self.device)

    def _check_folder(self, goes_on: bool) -> None:
        if self.last.exists() and not goes_on:
            raise TrainingError(
                f"{self.work_dir} already holds a run; add --resume alone or choose another --work-dir"
            )
        check_work_dir(self.work_dir)

    # -- the loop ------------------------------------------------------------------------------------------

    def run(self) -> float:
        """Train to the configured iteration; returns the best validation mIoU in 0..1.

        What stops it early (a request, damaged data, a lost worker, a full disk, a loss that is not finite)
        costs no step: `last.pt` is written first, if the disk takes it. Where the GPU fails, what it held is
        lost.

        Raises:
            DataError: an image cannot be read, or a worker that reads was killed.
            TrainingError: stopped for another reason.
        """
        with self.lock:
            self.lock.take(create=True)
            return self._run()

    def _run(self) -> float:
        train = self.config.train
        part = self.processes.rank, self.processes.count
        batches = iter(
            training_batches(self.dataset, self.config, self.iteration, train.iterations, part, self.device)
        )
        self._set_training()
        self.console = Console(train, self.iteration, self.device, self.processes.is_first)
        with signals_to(self.stop.request):
            try:
                self._catch_up()
                while True:
                    batch = None if self.stop.failure else self.stop.attempt(next, batches, None)
                    if self.stop.is_due():
                        raise self._stopped()
                    if batch is None:
                        return self.best
                    self.stop.attempt(self._advance, batch)
            finally:
                self.console.close()

    def _advance(self, batch: tuple[Tensor, Tensor]) -> None:
        loss = self._step(*batch)
        self._after_step()
        self.console.step(loss, self.best)

    def _step(self, images: Tensor, labels: Tensor) -> float:
        loss = self.step(images, labels, self.iteration)
        self.iteration += 1
        self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
        return loss

    def _set_training(self) -> None:
        """Training mode; a frozen network stays in eval mode, so that its statistics stay as they are."""
        self.model.train(not self.config.train.freeze)
        self.model.policy.train()

    def _after_step(self) -> None:
        """Log, validate and save when it is time."""
        self._report()
        if self._is_due(self.config.train.save_every):
            with self.console.paused():
                self.stop.attempt(self.save)

    def _report(self) -> None:
        """Log and validate when it is time and not yet done."""
        train = self.config.train
        if self._is_due(train.log_every) and self.loss_count:
            self.stop.attempt(self._log_loss)
        if self._is_due(train.eval_every) and self.validated < self.iteration:
            self.stop.attempt(self._validate)

    def _catch_up(self) -> None:
        """Log and validate what a run that was stopped meanwhile left undone."""
        before = self.validated, self.loss_count
        self._report()
        if before != (self.validated, self.loss_count):
            self.stop.attempt(self.save)

    def _is_due(self, every: int) -> bool:
        return self.iteration % every == 0 or self.iteration >= self.config.train.iterations

    def _log_loss(self) -> None:
        loss, rate = self.loss_sum / self.loss_count, learning_rate(self.iteration - 1, self.config.train)
        if self.processes.is_first:
            self.log.write(self.iteration, loss=loss, lr=rate)
        self.loss_sum, self.loss_count = 0.0, 0
        self.console.line(self.iteration, loss, rate)

    def _validate(self) -> None:
        model: Any = self.ema or self.model
        with self.console.paused():
            result = validate(model, self.validation, self.config, self.stop)
        if result is None:  # repeated when the run resumes
            return
        metrics = result.metrics
        if math.isnan(metrics.miou):
            raise TrainingError(
                f"validation at iteration {self.iteration} found no labelled pixel; check the val labels or "
                "raise train.eval_images"
            )
        is_best = metrics.miou > self.best
        if self.processes.is_first:
            if is_best:
                said: dict[str, Any] = {
                    "frame": self.dataset.frame_size,
                    "iteration": self.iteration,
                    "miou": metrics.miou,
                }
                save_best(self.work_dir, self.config, *content_of(model), **said)
            self.log.write(self.iteration, **logged(result, self.validation.classes))
        self.best, self.validated = max(self.best, metrics.miou), self.iteration
        self.console.validated(self.iteration, result, self.best)

    # -- stopping and going on -----------------------------------------------------------------------------

    def save(self) -> None:
        """Write `last.pt`, with everything that the next step depends on: the first process's, for all."""
        if self.processes.is_first:
            progress = {name: getattr(self, name) for name in PROGRESS}
            weights, state = self.model.state_dict(), self.step.state()
            save_state(self.last, self.config, weights, progress=progress, **state)
        self.saved = self.iteration

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        self.step.restore(state, path)
        progress = state["progress"]
        for name in PROGRESS:  # earlier versions did not say when they validated
            setattr(self, name, progress.get(name, progress["iteration"]))
        if not best_of(self.work_dir).exists():
            self.best = -1.0  # another folder's best is not here: the next validation writes this one's
            if self.iteration >= self.config.train.iterations:
                self.validated = 0
        if self.processes.is_first:
            changed = ", ".join(changes(state["config"], self.config))
            say(f"resuming at iteration {self.iteration}" + (f"; changed: {changed}" if changed else ""))

    def _stopped(self) -> SparseSegError:
        """Save; returns the error that says what happened, what was saved and how to resume."""
        failure, unsaved = self.stop.cause(), None
        what = reason(failure) if failure else f"stopped at iteration {self.iteration}"
        kind = DataError if isinstance(failure, DataError) else TrainingError
        if isinstance(failure, ProcessLost) and not self.processes.is_first:  # the first one may be gone
            return kind(f"{what}; if {self.last} is there, {self.resume_hint}, else start again")
        if self.iteration > 0 and not isinstance(failure, DeviceFailed):
            try:
                self.save()
            except OSError as error:
                unsaved = error
        kept = f"the last good checkpoint is {self.last}, of iteration {self.saved}" if self.saved else ""
        how = self.resume_hint_changed if isinstance(failure, Diverged) else self.resume_hint
        if failure is None and unsaved is None and kept:
            return kind(f"{what}; {how}")
        return kind(ending(what, failure, unsaved, kept, how))
