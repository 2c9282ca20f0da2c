"""The training loop: iterations, log, validation, checkpoints, resume."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_seg.checkpoint.captured import content_of
from sparse_seg.config import Config, changes, check_classes, check_training, to_yaml
from sparse_seg.data import open_split
from sparse_seg.data.batches import training_batches
from sparse_seg.errors import DataError, SparseSegError, TrainingError
from sparse_seg.evaluation.evaluate import combined, measure
from sparse_seg.files import atomic_write
from sparse_seg.graph.file import check_plain
from sparse_seg.processes import Processes, ProcessLost
from sparse_seg.progress import say
from sparse_seg.training.checkpoint import (
    CONFIG,
    LAST,
    PROGRESS,
    best_of,
    check_same_function,
    check_work_dir,
    is_complete,
    load_state,
    own_folder,
    save_best,
    save_state,
)
from sparse_seg.training.distillation import Teacher
from sparse_seg.training.losses import check_class_weights
from sparse_seg.training.objective import Objective, training_way
from sparse_seg.training.pretrained import initial_model
from sparse_seg.training.report import TrainingReport
from sparse_seg.training.schedule import learning_rate
from sparse_seg.training.step import Step
from sparse_seg.training.stopping import AlreadyTrained, Diverged, Stop, Stopped, device_failed, reason


class Trainer:
    """Trains a config's network in a work folder, which it keeps other trainings out of until `run` ends.

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
        size, count = config.train.batch_size, self.processes.count
        if size % count:
            raise TrainingError(
                f"train.batch_size {size} cannot be shared by {count} processes; use a multiple"
            )
        self.last, self.resume_hint = self.work_dir / LAST, f"resume with --work-dir {work_dir} --resume"
        with ExitStack() as held:
            self.processes.decided(lambda: held.enter_context(own_folder(self.work_dir)))
            self._prepare(resume)
            if self.report:
                held.callback(self.report.close)
            self._held: ExitStack | None = held.pop_all()

    def _prepare(self, resume: str | Path | bool) -> None:
        """Check and build all that `run` needs; files are written last."""
        config, train, data = self.config, self.config.train, self.config.data
        goes_on = bool(resume is True or (resume and Path(resume).resolve() == self.last.resolve()))
        if self.last.exists() and not goes_on:
            raise TrainingError(
                f"{self.work_dir} already holds a run; add --resume alone or choose another --work-dir"
            )
        check_work_dir(self.work_dir)
        if train.threads is not None:
            torch.set_num_threads(train.threads)
        source = self.last if resume is True else Path(str(resume))
        state = load_state(source) if resume else None
        if state is not None and state["progress"]["iteration"] >= train.iterations:
            done = goes_on and is_complete(state, train.iterations, self.work_dir)
            if done or not goes_on:
                raise (AlreadyTrained if done else TrainingError)(
                    f"{self.work_dir if done else resume} is already trained to iteration "
                    f"{state['progress']['iteration']}; raise train.iterations to continue"
                )

        self.dataset, self.validation = (open_split(data, split) for split in ("train", "val"))
        check_classes(config)
        self.processes.decided(self._check_frames)
        if self.processes.is_first and {*self.dataset.samples} & {*self.validation.samples}:
            say("warning: frames of the validation train, too: its score flatters")

        torch.manual_seed(train.seed)
        self.model = initial_model(config, self.device, self.processes, starts=state is None)
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
            self.saved = self.iteration if goes_on else 0
        self.processes.seed(train.seed, self.iteration)
        self.stop = Stop(alone=self.processes.count == 1)
        self.report: TrainingReport | None = None
        self.processes.gather(lambda: None)  # all have come so far
        if self.processes.is_first:
            atomic_write(self.work_dir / CONFIG, to_yaml(config))
            self.report = TrainingReport(train, self.work_dir, self.iteration, self.device)

    def _check_frames(self) -> None:
        check_class_weights(self.dataset.check(), self.config.train.loss.class_weights)
        self.validation.check(self.config.train.eval_images)

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        self.step.restore(state, path)
        check_same_function(self.config, state["config"], path)
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
        if self._held is None:
            raise TrainingError(
                f"this trainer has run; make another one with resume=True for {self.work_dir}"
            )
        held, self._held = self._held, None
        with held, self.stop.signals_heard():
            try:
                self._train()
            except (SparseSegError, OSError, RuntimeError) as failure:
                if isinstance(failure, RuntimeError) and not device_failed(failure):
                    raise
                raise self._stopped(failure) from None
        return self.best

    def _train(self) -> None:
        """Raises what ends it early, the same in all processes, or the loss of one of them."""
        iterations, part = self.config.train.iterations, (self.processes.rank, self.processes.count)
        batches = iter(
            training_batches(self.dataset, self.config, self.iteration, iterations, part, self.device)
        )
        self._set_training()
        before = self.validated, self.loss_count
        self._log_and_validate()  # what a run that was stopped meanwhile left undone
        if before != (self.validated, self.loss_count):
            self.save()
        while (batch := self._next(batches)) is not None:
            loss = self.step(*batch, self.iteration)
            self.iteration += 1
            self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
            self._after_step()
            if self.report:
                self.report.step(loss, self.best)

    def _next(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
        """The next batch, None after the last one; in all processes, or an error in all."""
        with self.processes.together(self.device):
            return self.stop.interruptible(lambda: next(batches, None))

    def _set_training(self) -> None:
        """Training mode; a frozen network stays in eval mode, so that its statistics stay as they are."""
        self.model.train(not self.config.train.freeze)
        self.model.policy.train()

    def _after_step(self) -> None:
        """Log, validate and save when it is time."""
        self._log_and_validate()
        if self._is_due(self.config.train.save_every):
            self.save()

    def _log_and_validate(self) -> None:
        """Log and validate when it is time and not yet done."""
        train = self.config.train
        if self._is_due(train.log_every) and self.loss_count:
            self.processes.gather(self._log_loss)
        if self._is_due(train.eval_every) and self.validated < self.iteration:
            self._validate()

    def _is_due(self, every: int) -> bool:
        return self.iteration % every == 0 or self.iteration >= self.config.train.iterations

    def _log_loss(self) -> None:
        loss, rate = self.loss_sum / self.loss_count, learning_rate(self.iteration - 1, self.config.train)
        if self.report:
            self.report.loss(self.iteration, loss, rate)
        self.loss_sum, self.loss_count = 0.0, 0

    def _validate(self) -> None:
        """Validate the network as it trains.

        Raises:
            DataError: an image cannot be read, in any process.
            Stopped: a request ended it; it is repeated when the run resumes.
        """
        model: Any = self.ema or self.model
        train, frames = self.config.train, self.validation
        share = self.processes.share(min(len(frames), train.eval_images or len(frames)))
        work = partial(
            measure, model, frames, self.config.data, training_way(train, model), share, with_loss=True
        )
        self.processes.share_buffers(model)
        result = combined(self.processes.gather(lambda: self.stop.interruptible(work)))
        miou = result.metrics.miou
        if math.isnan(miou):
            raise TrainingError(
                f"validation at iteration {self.iteration} found no labelled pixel; check the val labels or "
                "raise train.eval_images"
            )
        best = max(miou, self.best)

        def write() -> None:
            if self.report and miou > self.best:
                said: dict[str, Any] = {"frame": self.dataset.frame_size, "iteration": self.iteration}
                save_best(self.work_dir, self.config, *content_of(model), miou=miou, **said)
            if self.report:
                self.report.validation(self.iteration, result, best, self.validation.classes.names)

        self.processes.gather(write)
        self.best, self.validated = best, self.iteration

    # -- stopping ------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write `last.pt`, with everything that the next step depends on: the first process does, for all."""
        self.processes.decided(self._write_state)
        self.saved = self.iteration

    def _write_state(self) -> None:
        progress = {name: getattr(self, name) for name in PROGRESS}
        save_state(self.last, self.config, self.model.state_dict(), progress=progress, **self.step.state())
        self.saved = self.iteration

    def _stopped(self, failure: Exception) -> SparseSegError:
        """Save; returns the error that says what ended `_train`, what was saved and how to resume."""
        asked, lost = isinstance(failure, Stopped), isinstance(failure, ProcessLost)
        what = f"stopped at iteration {self.iteration}" if asked else reason(failure)
        kind = DataError if isinstance(failure, DataError) else TrainingError
        if lost and not self.processes.is_first:  # the first one may be gone
            return kind(f"{what}; if {self.last} is there, {self.resume_hint}, else start again")
        if self.iteration > 0 and not device_failed(failure):
            try:
                (self._write_state if lost else self.save)()
            except (OSError, ProcessLost) as error:
                what += "" if reason(error) in what else f"; {reason(error)}"
        kept, how = "no checkpoint was written yet; ", "start again"
        if self.saved:
            last = f"the last good checkpoint is {self.last}, of iteration {self.saved}; "
            kept, how = "" if asked and self.saved == self.iteration else last, self.resume_hint
        if isinstance(failure, Diverged):
            how = f"lower train.lr or set train.clip_grad_norm, then {how}"
        return kind(f"{what}; {kept}{how}")
