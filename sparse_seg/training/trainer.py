"""The training loop: iterations, log, validation, checkpoints, resume."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from sparse_seg.checkpoint import load
from sparse_seg.checkpoint.loading import initial_weights
from sparse_seg.config import Config, check_classes, check_training, to_yaml
from sparse_seg.data import build_dataset
from sparse_seg.data.loader import training_batches
from sparse_seg.errors import CheckpointError, DataError, SparseSegError, TrainingError
from sparse_seg.evaluation.evaluate import evaluate
from sparse_seg.files import atomic_write
from sparse_seg.models.build import build_model
from sparse_seg.models.way import Way
from sparse_seg.models.weights import load_weights
from sparse_seg.training.checkpoint import (
    LAST,
    best_of,
    load_state,
    restore_optimizer,
    save_best,
    save_state,
)
from sparse_seg.training.distillation import Teacher
from sparse_seg.training.distributed import Processes
from sparse_seg.training.log import TrainingLog
from sparse_seg.training.losses import check_class_weights
from sparse_seg.training.objective import Objective
from sparse_seg.training.pretrained import load_pretrained
from sparse_seg.training.schedule import build_optimizer, learning_rate, update_average
from sparse_seg.training.stopping import (
    AlreadyTrained,
    Diverged,
    UndoPoint,
    ValidationStopped,
    ending,
    is_complete,
    memory_named,
    reason,
    signals_to,
)

_Result = TypeVar("_Result")


class Trainer:
    """Trains a config's network in a work folder.

    The folder gets `config.yaml` (resolved), `log.jsonl` (one JSON line per log step and validation),
    `last.pt` (all state, to resume from) and `best.safetensors` (weights of the best validation mIoU).

    Args:
        config: resolved config.
        work_dir: created if need be; one that already holds a run is refused unless resuming.
        resume: checkpoint to resume from, bit for bit on the CPU with one process; True takes the
            folder's `last.pt`.
        device: where to train.
        processes: that train together; see `training/distributed.py`.

    Raises:
        AlreadyTrained: the folder's run, which is to be resumed, has come to its end.
        TrainingError: the folder already holds a run, or a batch cannot be shared by the processes.
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
        last = self.work_dir / LAST
        goes_on = resume is True or (resume and Path(resume).resolve() == last.resolve())
        if last.exists() and not goes_on:
            raise TrainingError(
                f"{self.work_dir} already holds a run; add --resume alone or choose another --work-dir"
            )
        train, data = config.train, config.data
        self.processes.check_batch(config, self.device)
        if train.threads is not None:
            torch.set_num_threads(train.threads)
        state = load_state(last if resume is True else resume) if resume else None
        if state is not None and goes_on and is_complete(state, train.iterations, self.work_dir):
            raise AlreadyTrained(
                f"{self.work_dir} is already trained to iteration {state['progress']['iteration']}; raise "
                "train.iterations to continue"
            )

        self.dataset = build_dataset(data.dataset, data.root, "train")
        self.validation = build_dataset(data.dataset, data.root, "val")
        check_classes(config)
        check_class_weights(self.dataset.check(), train.loss.class_weights)
        self.validation.check(train.eval_images)

        torch.manual_seed(train.seed)
        self.model = build_model(config)
        if config.model.pretrained is not None and state is None:
            report = load_pretrained(self.model, config.model, config.model.pretrained)
            if self.processes.is_first:
                tqdm.write(report)
        self.model.to(self.device)
        if train.init is not None and state is None:
            load_weights(self.model, initial_weights(load(train.init), self.model, config), train.init)
        if train.freeze:
            self.model.requires_grad_(False)
            self.model.policy.requires_grad_(True)
        self.model = self.processes.share_norms(self.model, self.device)
        self.ema = copy.deepcopy(self.model) if train.ema_decay is not None else None
        distill = train.distill
        teacher = None
        if distill.teacher is not None:
            teacher = Teacher(distill.teacher, config, distill.cache, self.device)
        self.objective = Objective(train, teacher).to(self.device)
        self.optimizer = build_optimizer(self.model, train)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=train.amp and train.amp_dtype == "float16"
        )
        self.iteration, self.best, self.loss_sum, self.loss_count = 0, -1.0, 0.0, 0
        self.validated = self.saved = 0  # iterations
        if state is not None:
            self._restore(state, last if resume is True else Path(str(resume)))
            if goes_on:
                self.saved = self.iteration
            elif self.iteration >= train.iterations:
                raise TrainingError(
                    f"{resume} is already trained to iteration {self.iteration}; raise train.iterations"
                )
        self.processes.seed(train.seed, self.iteration)
        if self.processes.is_first:
            self.work_dir.mkdir(parents=True, exist_ok=True)
            atomic_write(self.work_dir / "config.yaml", to_yaml(config))
            self.log = TrainingLog(self.work_dir, self.iteration, train.tensorboard)
        self.resume_hint = f"resume with --work-dir {self.work_dir} --resume"
        self.resume_hint_changed = self.resume_hint
        self._stop = self._validating = False
        self._failure: Exception | None = None

    # -- the loop ------------------------------------------------------------------------------------------

    def run(self) -> float:
        """Train to the configured iteration; returns the best validation mIoU in 0..1, in the first process.

        What stops it early (a request, damaged data, a lost worker, a full disk, a loss that is not finite)
        costs no step: `last.pt` is written first, if the disk takes it.

        Raises:
            DataError: an image cannot be read, or a worker that reads was killed.
            TrainingError: stopped for another reason.
        """
        train = self.config.train
        part = self.processes.rank, self.processes.count
        batches = iter(training_batches(self.dataset, self.config, self.iteration, train.iterations, part))
        self._set_training()
        bar = tqdm(
            total=train.iterations,
            initial=self.iteration,
            desc="train",
            dynamic_ncols=True,
            disable=not self.processes.is_first,
        )
        with signals_to(self._request_stop):
            try:
                self._catch_up()
                while True:
                    batch = None if self._failure else self._attempt(next, batches, None)
                    if self.processes.any(self._stop or self._failure is not None, self.device):
                        raise self._stopped()
                    if batch is None:
                        return self.best
                    self._attempt(self._advance, batch, bar)
            finally:
                with suppress(OSError):
                    bar.close()

    def _advance(self, batch: tuple[Tensor, Tensor], bar: tqdm[Any]) -> None:
        images, labels = batch
        loss = self._step(images.to(self.device), labels.to(self.device))
        self._after_step()
        bar.set_postfix(loss=f"{loss:.3f}", best=f"{max(self.best, 0):.4f}", refresh=False)
        bar.update()

    def _step(self, images: Tensor, labels: Tensor) -> float:
        train, undo = self.config.train, UndoPoint(self.model)
        rate = learning_rate(self.iteration, train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        try:
            value = self._gradients(images, labels)
        except (SparseSegError, OSError):
            undo.restore()
            raise
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            update_average(self.ema, self.model, train.ema_decay or 0.0, self.iteration)
        self.iteration += 1
        self.loss_sum, self.loss_count = self.loss_sum + value, self.loss_count + 1
        return value

    def _gradients(self, images: Tensor, labels: Tensor) -> float:
        """Compute the gradients of a batch; returns its loss."""
        train = self.config.train
        self.optimizer.zero_grad(set_to_none=True)
        with memory_named():
            loss = self._attempt(self._loss, images, labels)
            failed = torch.tensor(math.nan, device=self.device)
            mean_loss = self.processes.mean(failed if loss is None else loss)  # all stop where one failed
            self._require_finite(mean_loss, "loss")
            assert loss is not None
            self.scaler.scale(loss).backward()
        self.processes.average_gradients(self.model.parameters())
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if train.clip_grad_norm is None else train.clip_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        if not self.scaler.is_enabled():  # with float16 the scaler skips such a step and lowers its scale
            self._require_finite(norm, "gradient")
        return mean_loss.item()

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        train = self.config.train
        with (
            memory_named(),
            torch.autocast(self.device.type, getattr(torch, train.amp_dtype), enabled=train.amp),
        ):
            return self.objective(self.model, images, labels)

    def _set_training(self) -> None:
        """Training mode; a frozen network stays in eval mode, so that its statistics stay as they are."""
        self.model.train(not self.config.train.freeze)
        self.model.policy.train()

    def _after_step(self) -> None:
        """Log, validate and save when it is time: work of the first process."""
        if not self.processes.is_first:
            return
        self._report()
        if self._is_due(self.config.train.save_every):
            self.save()

    def _report(self) -> None:
        """Log and validate when it is time and not yet done."""
        train = self.config.train
        if self._is_due(train.log_every) and self.loss_count:
            rate = learning_rate(self.iteration - 1, train)
            self.log.write(self.iteration, loss=self.loss_sum / self.loss_count, lr=rate)
            self.loss_sum, self.loss_count = 0.0, 0
        if self._is_due(train.eval_every) and self.validated < self.iteration:
            self._validate()

    def _catch_up(self) -> None:
        """Log and validate what a run that was stopped meanwhile left undone."""
        before = self.validated, self.loss_count
        if self.processes.is_first:
            self._attempt(self._report)
            if before != (self.validated, self.loss_count):
                self._attempt(self.save)

    def _is_due(self, every: int) -> bool:
        return self.iteration % every == 0 or self.iteration == self.config.train.iterations

    def _validate(self) -> None:
        train = self.config.train
        way = Way.dense(train.output_stride) if train.network == "dense" else Way()
        model = self.ema or self.model
        self._validating = True
        try:
            result = evaluate(model, self.validation, self.config.data, way, limit=train.eval_images)
        except ValidationStopped:  # repeated when the run resumes
            return
        finally:
            self._validating = False
        metrics = result.metrics
        if math.isnan(metrics.miou):
            raise TrainingError(
                f"validation at iteration {self.iteration} found no labelled pixel; check the val labels or "
                "raise train.eval_images"
            )
        if metrics.miou > self.best:
            state = {"iteration": self.iteration, "miou": metrics.miou}
            save_best(self.work_dir, self.config, model.state_dict(), **state)
            self.best = metrics.miou
        self.log.write(
            self.iteration,
            miou=metrics.miou,
            boundary_miou=metrics.boundary_miou,
            pixel_accuracy=metrics.pixel_accuracy,
        )
        self.validated = self.iteration
        tqdm.write(
            f"iteration {self.iteration}: mIoU {metrics.miou:.4f}, boundary mIoU {metrics.boundary_miou:.4f}"
        )

    # -- stopping and going on -----------------------------------------------------------------------------

    def save(self) -> None:
        """Write `last.pt`, with everything that the next step depends on: the first process's, for all."""
        if not self.processes.is_first:
            return
        save_state(
            self.work_dir / LAST,
            self.config,
            self.model.state_dict(),
            ema=self.ema.state_dict() if self.ema is not None else None,
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            progress={
                "iteration": self.iteration,
                "best": self.best,
                "validated": self.validated,
                "loss_sum": self.loss_sum,
                "loss_count": self.loss_count,
            },
            random=torch.get_rng_state(),
        )
        self.saved = self.iteration

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        train = self.config.train
        if state["config"].train.optimizer != train.optimizer:
            raise CheckpointError(f"{path} was trained with another train.optimizer")
        load_weights(self.model, state["model"], path)
        if self.ema is not None:
            load_weights(self.ema, state["ema"] or state["model"], path)
        restore_optimizer(self.optimizer, train.optimizer, state["optimizer"], path)
        try:
            if state["scaler"] and self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(state["random"])
        except (RuntimeError, KeyError):
            raise CheckpointError(f"{path} is damaged: its random or scaler state is none") from None
        progress = state["progress"]
        self.iteration, self.best = progress["iteration"], progress["best"]
        self.loss_sum, self.loss_count = progress["loss_sum"], progress["loss_count"]
        self.validated = progress.get("validated", self.iteration)
        if not best_of(self.work_dir).exists():
            self.best = -1.0  # another folder's best is not here: the next validation writes this one's
            if self.iteration >= train.iterations:
                self.validated = 0

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        with suppress(OSError):  # the terminal may be gone
            tqdm.write("stopping after this step (once more to stop at once)")
        if self._validating:
            raise ValidationStopped

    def _attempt(self, work: Callable[..., _Result], *arguments: Any) -> _Result | None:
        """The work's result; None where it fails, and the first failure is kept."""
        try:
            return work(*arguments)
        except (SparseSegError, OSError) as error:
            self._failure = self._failure or error
            return None

    def _stopped(self) -> SparseSegError:
        """Save; returns the error that says what happened, what was saved and how to resume."""
        failure, last = self._failure, self.work_dir / "last.pt"
        if self._stop and isinstance(failure, DataError):
            failure = None  # workers were asked to stop, too
        what = reason(failure) if failure else f"stopped at iteration {self.iteration}"
        kind = DataError if isinstance(failure, DataError) else TrainingError
        if not self.processes.is_first:
            return kind(what)
        unsaved = None
        if self.iteration > 0:
            try:
                self.save()
            except OSError as error:
                unsaved = error
        kept = f"the last good checkpoint is {last}, of iteration {self.saved}" if self.saved else ""
        how = self.resume_hint_changed if isinstance(failure, Diverged) else self.resume_hint
        if failure is None and unsaved is None and kept:
            return kind(f"{what}; {how}")
        return kind(ending(what, failure, unsaved, kept, how))

    def _require_finite(self, value: Tensor, name: str) -> None:
        if not torch.isfinite(value):
            raise Diverged(f"{name} is {value.item()} at iteration {self.iteration}")
