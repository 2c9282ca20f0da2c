"""Files that training writes: the weights of the best validation, and the full state to resume from."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_seg.checkpoint.content import Captured, Checkpoint, is_state_dict
from sparse_seg.checkpoint.digest import digest_of
from sparse_seg.checkpoint.file import FORMAT, find, is_safetensors, load_pt, save
from sparse_seg.checkpoint.loading import check_same, function_of
from sparse_seg.config import (
    Config,
    config_from_dict,
    model_config,
    num_classes,
    read_yaml,
    to_dict,
    to_yaml,
)
from sparse_seg.data import dataset_classes, dataset_ids
from sparse_seg.errors import CheckpointError, ConfigError, TrainingError
from sparse_seg.files import atomic_write
from sparse_seg.training.folder import CONFIG
from sparse_seg.version import __version__

BEST, LAST = "best.safetensors", "last.pt"
LOG = "log.jsonl"  # beside them


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
    dataset, root = config.data.dataset, config.data.root
    classes = dataset_classes(dataset, root)
    known = len(classes) == num_classes(config)
    ids = {"ids": list(dataset_ids(dataset, root))} if known else {}
    save(
        Checkpoint(
            Path(path),
            dict(weights),
            model_config(config),
            classes.names if known else None,
            classes.palette if known else None,
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
    buffer = io.BytesIO()
    torch.save(content | {"digest": digest_of(content)}, buffer)
    atomic_write(path, buffer.getvalue())


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
    for name, check in _PARTS.items():
        if name not in state or not check(state[name]):
            raise CheckpointError(f"{path} is damaged: its {name!r} cannot be resumed from")
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
    shapes = dict(enumerate(one.shape for group in optimizer.param_groups for one in group["params"]))
    try:
        fits = [group["params"] for group in state["param_groups"]] == [group["params"] for group in own]
        for index, entry in state["state"].items():
            fits = fits and set(entry) in (_MOMENTA[kind], set())  # plain SGD has none
            fits = fits and all(_is_momentum(name, one, shapes[index]) for name, one in entry.items())
    except (LookupError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise CheckpointError(f"{path}: its optimizer's state is damaged or of another network")
    optimizer.load_state_dict({"state": state["state"], "param_groups": own})


def _is_momentum(name: str, value: Any, shape: torch.Size) -> bool:
    """Whether a value is one parameter's momentum, finite and of its shape."""
    if value is None:
        return name == "momentum_buffer"
    whole = isinstance(value, Tensor) and value.is_floating_point() and bool(value.isfinite().all())
    shape, may_be_negative = (torch.Size() if name == "step" else shape), name not in ("step", "exp_avg_sq")
    return whole and value.shape == shape and (may_be_negative or not (value < 0).any())


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


def _is_progress(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    counts = {"validated": 0} | {name: one for name, one in value.items() if name not in ("best", "loss_sum")}
    return (  # earlier versions did not say when they validated
        value.keys() | {"validated"} == {"iteration", "best", "validated", "loss_sum", "loss_count"}
        and all(type(count) is int and count >= 0 for count in counts.values())
        and all(_is_number(value[name], -math.inf) for name in ("best", "loss_sum"))
    )


def _is_number(value: Any, lowest: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= lowest


def _is_random(value: Any) -> bool:
    own = torch.get_rng_state()
    return isinstance(value, Tensor) and value.dtype == own.dtype and value.shape == own.shape


_MOMENTA = {"sgd": {"momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}
_PARTS: dict[str, Callable[[Any], bool]] = {
    "config": lambda value: isinstance(value, Mapping),
    "model": is_state_dict,
    "ema": lambda value: value is None or is_state_dict(value),
    "optimizer": lambda value: isinstance(value, Mapping),
    # of a loss scaler that is switched off, nothing
    "scaler": lambda value: isinstance(value, Mapping) and all(_is_number(one, 0) for one in value.values()),
    "progress": _is_progress,
    "random": _is_random,
}
