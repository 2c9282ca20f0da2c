"""The work folder of a training: one training at a time writes it, its best weights and its full state."""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_seg.checkpoint.content import Captured, Checkpoint, is_state_dict
from sparse_seg.checkpoint.digest import digest_of
from sparse_seg.checkpoint.file import FORMAT, find, is_safetensors, load_pt, save
from sparse_seg.checkpoint.loading import check_same, function_of
from sparse_seg.checkpoint.pickled import save_pickled
from sparse_seg.config import (
    Config,
    config_from_dict,
    model_config,
    num_classes,
    read_yaml,
    to_dict,
    to_yaml,
)
from sparse_seg.data import dataset_classes
from sparse_seg.errors import CheckpointError, ConfigError, TrainingError
from sparse_seg.files import holder_of, locked
from sparse_seg.version import __version__

BEST, LAST, CONFIG, LOCK = "best.safetensors", "last.pt", "config.yaml", ".training.lock"
LOG = "log.jsonl"  # of `report.py`
# a trainer's attributes that a state keeps, at their start
PROGRESS = {"iteration": 0, "best": -1.0, "validated": 0, "loss_sum": 0.0, "loss_count": 0}
_LOG = logging.getLogger(__name__)


@contextmanager
def own_folder(work_dir: Path) -> Iterator[None]:
    """Keep other trainings out of a work folder inside the context, or until the process ends.

    The folder is made where it is not there, and removed if it is still empty at the end.

    Raises:
        TrainingError: another training has it, on this machine or on another one.
        OSError: the folder cannot be written, or its file system does not lock.
    """
    new = [folder for folder in (work_dir, *work_dir.parents) if not folder.exists()]
    before = holder_of(work_dir / LOCK)
    try:
        with locked(work_dir / LOCK) as free:
            if not free:
                who = holder_of(work_dir / LOCK) or "another process"
                raise TrainingError(
                    f"{work_dir} is in use: {who} trains there; stop it first, or choose another --work-dir"
                )
            if before and not before.endswith(f" on {socket.gethostname()}"):
                _LOG.warning("warning: %s trained in %s and was killed, it seems", before, work_dir)
            yield
    finally:
        with suppress(OSError):
            for folder in new:
                folder.rmdir()


def run_files(work_dir: Path) -> list[Path]:
    """The files that a training which starts in a folder would write; none where its own are there, to be
    resumed from."""
    if (work_dir / LAST).exists():
        return []
    return [work_dir / name for name in (BEST, LAST, CONFIG, LOG)]


def check_work_dir(work_dir: Path) -> None:
    """Raises a TrainingError where a training would replace a `config.yaml` that no training wrote."""
    file = work_dir / CONFIG
    if (work_dir / LAST).exists() or not file.exists():
        return
    with suppress(ConfigError, UnicodeDecodeError):
        if to_yaml(config_from_dict(read_yaml(file), CONFIG)) == file.read_text():
            return
    raise TrainingError(f"{file} is not of a run and would be overwritten; choose another --work-dir")


def save_checkpoint(
    path: str | Path,
    config: Config,
    weights: Mapping[str, Tensor],
    captured: Captured | None = None,
    **said: Any,
) -> None:
    """Write weights and the network's graph (`content_of`) as a checkpoint; `said` stands in its `training`,
    beside the config and the ids that the classes have in labels."""
    labels = dataset_classes(config.data.dataset, config.data.root)
    known = len(labels.classes) == num_classes(config)
    ids = {"ids": list(labels.ids)} if known else {}
    save(
        Checkpoint(
            Path(path),
            dict(weights),
            model_config(config),
            labels.classes.names if known else None,
            labels.classes.palette if known else None,
            tuple(config.data.mean),
            tuple(config.data.std),
            training={"config": to_dict(config)} | ids | said,
            captured=captured,
        )
    )


def save_best(
    work_dir: Path,
    config: Config,
    weights: Mapping[str, Tensor],
    captured: Captured | None = None,
    **said: Any,
) -> None:
    """Write the folder's best weights, replacing a file of an earlier version."""
    save_checkpoint(work_dir / BEST, config, weights, captured, **said)
    (work_dir / BEST).with_suffix(".pt").unlink(missing_ok=True)


def best_of(work_dir: Path) -> Path:
    """A folder's best weights: `best.safetensors`, or `best.pt` where only an earlier version trained."""
    best = work_dir / BEST
    earlier = best.with_suffix(".pt")
    return earlier if earlier.exists() and not best.exists() else best


def save_state(path: str | Path, config: Config, weights: Mapping[str, Tensor], **state: Any) -> None:
    """Write all that the next step depends on (see `load_state`), with a digest."""
    content = {"format": FORMAT, "version": __version__, "config": to_dict(config), "model": dict(weights)}
    content |= state
    save_pickled(path, content | {"digest": digest_of(content)})


def load_state(path: str | Path) -> dict[str, Any]:
    """Read a state: `config`, `model`, `ema`, `optimizer`, `scaler`, `progress`, `random`.

    Raises:
        CheckpointError: missing, damaged or foreign file, one of weights alone, or one whose config does not
            fit this version's schema.
    """
    path = find(path)
    state = {} if is_safetensors(path) else load_pt(path)
    if "progress" not in state:
        raise CheckpointError(f"{path} holds weights only; resume from {LAST}")
    faults = [name for name, fits in _PARTS.items() if name not in state or not fits(state[name])]
    if faults:
        raise CheckpointError(f"{path} is damaged: its {faults[0]!r} cannot be resumed from")
    try:
        return state | {"config": config_from_dict(state["config"], "its config")}
    except ConfigError as error:
        raise CheckpointError(f"{path} cannot be resumed from: {error}") from None


def is_complete(state: Mapping[str, Any], iterations: int, work_dir: Path) -> bool:
    """Whether the state of a run in `work_dir` is its end, with its last validation done."""
    progress = state["progress"]
    done = progress["iteration"]
    return done >= iterations and progress.get("validated", done) >= done and best_of(work_dir).exists()


def restore_optimizer(
    optimizer: torch.optim.Optimizer, kind: str, state: Mapping[str, Any], path: str | Path
) -> None:
    """Restore the momenta; the config's settings of `optimizer` stay.

    Args:
        kind: `train.optimizer`.

    Raises:
        CheckpointError: momenta of other parameters, or damaged ones.
    """
    own = optimizer.state_dict()["param_groups"]
    parameters = dict(enumerate(one for group in optimizer.param_groups for one in group["params"]))
    try:
        fits = [group["params"] for group in state["param_groups"]] == [group["params"] for group in own]
        for index, entry in state["state"].items():
            found = {name: one for name, one in entry.items() if one is not None}  # plain SGD has none
            like = {name: torch.zeros(()) if name == "step" else parameters[index] for name in _MOMENTA[kind]}
            fits = fits and (not found or _is_like(found, like))
            fits = fits and all(bool((found[name] >= 0).all()) for name in _POSITIVE & found.keys())
    except (LookupError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise CheckpointError(f"{path}: its optimizer's state is damaged or of another network")
    optimizer.load_state_dict({"state": state["state"], "param_groups": own})


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


_PARTS: dict[str, Callable[[Any], bool]] = {  # of a state, checked as far as can be without the network
    "config": _is_mapping,
    "model": is_state_dict,
    "ema": lambda value: value is None or is_state_dict(value),
    "optimizer": _is_mapping,
    "scaler": lambda value: (
        _is_mapping(value) and all(_is_like(one, 0.0) and one >= 0 for one in value.values())
    ),
    "progress": lambda value: _is_mapping(value) and _is_like({"validated": 0, **value}, PROGRESS),
    "random": lambda value: _is_like(value, torch.get_rng_state()),
}
_MOMENTA = {"sgd": ("momentum_buffer",), "adamw": ("step", "exp_avg", "exp_avg_sq")}
_POSITIVE = {"step", "exp_avg_sq"}


def _is_like(value: Any, own: Any) -> bool:
    """Whether a value has the keys, types and shapes of another one, and finite numbers; counts have no
    sign."""
    if isinstance(own, Mapping):
        same = isinstance(value, Mapping) and value.keys() == own.keys()
        return same and all(_is_like(value[name], one) for name, one in own.items())
    if isinstance(own, Tensor):
        same = isinstance(value, Tensor) and value.shape == own.shape
        same = same and (value.dtype == own.dtype or (value.is_floating_point() and own.is_floating_point()))
        return same and bool(value.isfinite().all())
    if isinstance(own, int):
        return type(value) is int and value >= 0
    return type(value) in (int, float) and math.isfinite(value)


def check_same_function(config: Config, trained: Config, path: str | Path) -> None:
    """Compare settings that the weights' shapes do not tell, and those whose name tells more than a shape.

    Raises:
        CheckpointError: they differ.
    """
    asked, own = (
        function_of(one.model)
        | {"model.num_classes": num_classes(one), "data.mean": one.data.mean, "data.std": one.data.std}
        for one in (config, trained)
    )
    check_same(asked, own, path)
