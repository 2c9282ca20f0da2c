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

from sparse_seg.checkpoint.content import Captured, Checkpoint
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
_STATE_KEYS = {"sgd": {"momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}


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
        CheckpointError: missing, damaged or foreign file, or one of weights alone.
    """
    path = find(path)
    state = {} if is_safetensors(path) else load_pt(path)
    if "progress" not in state:
        raise CheckpointError(f"{path} holds weights only; resume from {LAST}")
    for name, check in _PARTS.items():
        if name not in state or not check(state[name]):
            raise CheckpointError(f"{path} is damaged: its {name!r} cannot be resumed from")
    state["config"] = state_config(state, path)
    return state


def state_config(state: Mapping[str, Any], path: str | Path) -> Config:
    """The resolved config in a state.

    Raises:
        CheckpointError: it does not fit this version's schema.
    """
    try:
        return config_from_dict(state["config"], "its config")
    except ConfigError as error:
        raise CheckpointError(f"{path} cannot be resumed from: {error}") from None


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
    groups, momenta = state.get("param_groups"), state.get("state")
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    fits = (
        isinstance(groups, list)
        and isinstance(momenta, Mapping)
        and [_params(group) for group in groups] == [_params(group) for group in own]
        and all(index in range(len(shapes)) for index in momenta)
        and all(_fits(entry, _STATE_KEYS[kind], shapes[index]) for index, entry in momenta.items())
    )
    if not fits:
        raise CheckpointError(f"{path}: its optimizer's state is damaged or of another network")
    settings = [{key: value for key, value in group.items() if key != "params"} for group in own]
    optimizer.load_state_dict({"state": momenta, "param_groups": own})
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def _params(group: Any) -> Any:
    return group.get("params") if isinstance(group, Mapping) else None


def _fits(entry: Any, keys: set[str], shape: torch.Size) -> bool:
    """Whether one parameter's momenta are whole; plain SGD has none."""
    if not isinstance(entry, Mapping) or set(entry) not in (keys, set()):
        return False
    for name, value in entry.items():
        if value is None and name == "momentum_buffer":
            continue
        whole = isinstance(value, Tensor) and value.is_floating_point()
        if not whole or value.shape != (torch.Size() if name == "step" else shape):
            return False
        if not torch.isfinite(value).all() or (name in ("step", "exp_avg_sq") and (value < 0).any()):
            return False
    return True


def check_same_function(config: Config, trained: Config, path: str | Path) -> None:
    """Compare settings that the weights' shapes do not tell, and those whose name tells more than a shape.

    Raises:
        CheckpointError: they differ.
    """
    check_same(_function(config), _function(trained), path)


def _function(config: Config) -> dict[str, Any]:
    settings: dict[str, Any] = {"model.num_classes": num_classes(config)}
    settings |= {"data.mean": config.data.mean, "data.std": config.data.std}
    return function_of(config.model) | settings


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def _is_scaler(value: Any) -> bool:
    """Of a loss scaler that is switched off, nothing."""
    return isinstance(value, Mapping) and all(_is_number(number, 0) for number in value.values())


_COUNTS = ("iteration", "loss_count", "validated")  # earlier versions did not say when they validated


def _is_progress(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and set(value) - {"validated"} == {"iteration", "best", "loss_sum", "loss_count"}
        and all(type(value.get(name, 0)) is int and value.get(name, 0) >= 0 for name in _COUNTS)
        and all(_is_number(value[name], -math.inf) for name in ("best", "loss_sum"))
    )


def _is_number(value: Any, lowest: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= lowest


def _is_random(value: Any) -> bool:
    own = torch.get_rng_state()
    return isinstance(value, Tensor) and value.dtype == own.dtype and value.shape == own.shape


_PARTS: dict[str, Callable[[Any], bool]] = {
    "config": lambda value: isinstance(value, Mapping),
    "model": _is_state_dict,
    "ema": lambda value: value is None or _is_state_dict(value),
    "optimizer": lambda value: isinstance(value, Mapping),
    "scaler": _is_scaler,
    "progress": _is_progress,
    "random": _is_random,
}
