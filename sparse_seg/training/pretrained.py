"""Starting weights for training (`model.pretrained`), from any file that can be converted."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sparse_seg.config import ModelConfig, model_config
from sparse_seg.conversion import convert, is_converted, read_converted
from sparse_seg.conversion.converted import network_tensors
from sparse_seg.errors import CheckpointError
from sparse_seg.models.segmentor import SelectiveSegmentor
from sparse_seg.models.weights import load_weights, part_of
from sparse_seg.training.checkpoint import FORMAT

# settings of the backbone that its tensors' shapes do not tell
SAME = ("shortcut", "bn_eps")


def load_pretrained(model: SelectiveSegmentor, settings: ModelConfig, path: str | Path) -> str:
    """Copy the weights of a file into `model`: the backbone, and the head where it is the very same.

    Args:
        settings: those that `model` was built from.
        path: a dense checkpoint of any source (see `conversion`), a converted file, or one of our training.

    Returns:
        A line that says what was taken.

    Raises:
        CheckpointError: the file cannot be read, or its backbone is another.
    """
    weights, own, origin = _read(Path(path))
    for key in SAME:
        if getattr(own, key) != getattr(settings, key):
            raise CheckpointError(
                f"{path} was trained with model.{key} {getattr(own, key)}, not {getattr(settings, key)}; "
                f"use --set model.{key}={getattr(own, key)}"
            )
    try:
        load_weights(model.backbone, part_of(weights, "backbone."), path)
    except CheckpointError as error:
        found = " ".join(f"model.{key}={getattr(own, key)}" for key in ("backbone", "width", "stem"))
        raise CheckpointError(f"{error} (it has {found})") from None
    head, wanted = part_of(weights, "head."), model.head.state_dict()
    shapes = {name: tensor.shape for name, tensor in head.items()}
    same = own.head == settings.head and shapes == {name: tensor.shape for name, tensor in wanted.items()}
    if same:
        load_weights(model.head, head, path)
    return f"pretrained: backbone{' and head' if same else ''} of {path} ({origin})" + (
        "" if same else "; the head starts fresh"
    )


def _read(path: Path) -> tuple[Mapping[str, Tensor], ModelConfig, str]:
    """Weights by our names, the settings they were trained with, and where they come from."""
    if is_converted(path):
        tensors, description = read_converted(path)
        return network_tensors(tensors), description.config, f"{description.source} {description.arch}"
    if path.is_file() and zipfile.is_zipfile(path):
        own = _own_checkpoint(path)
        if own is not None:
            return own.get("ema") or own["model"], model_config(own["config"]), "trained by sparse_seg"
    conversion = convert(path, allow_missing=("head",))
    return conversion.network(), conversion.description.config, f"{conversion.source} {conversion.plan.arch}"


def _own_checkpoint(path: Path) -> dict | None:
    try:
        content = torch.load(path, "cpu", weights_only=True, mmap=True)
    except Exception:  # `convert` says what is wrong
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None
