"""Checkpoints: one file with weights, resolved config and version, written atomically."""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_seg.config import Config, config_from_dict, function_keys, model_config, to_dict
from sparse_seg.conversion.converted import is_safetensors
from sparse_seg.conversion.loading import load_converted
from sparse_seg.errors import CheckpointError
from sparse_seg.files import atomic_write
from sparse_seg.models.build import build_model
from sparse_seg.models.segmentor import SelectiveSegmentor
from sparse_seg.models.weights import load_weights
from sparse_seg.registry import POOLING_HEADS
from sparse_seg.version import __version__

FORMAT = "sparse_seg.checkpoint"


def save_checkpoint(path: str | Path, config: Config, weights: Mapping[str, Tensor], **state: Any) -> None:
    """Write `weights` (a state dict), the resolved config, our version and any further `state`."""
    content = {"format": FORMAT, "version": __version__, "config": to_dict(config), "model": dict(weights)}
    buffer = io.BytesIO()
    torch.save(content | state, buffer)
    atomic_write(path, buffer.getvalue())


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU, without running any code it may hold.

    Raises:
        CheckpointError: missing, truncated or foreign file.
    """
    path = Path(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist") from None
    except IsADirectoryError:
        raise CheckpointError(
            f"{path} is a folder; name the checkpoint in it, such as {path / 'best.pt'}"
        ) from None
    except PermissionError:
        raise CheckpointError(f"{path} may not be read; check its permissions") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
        raise CheckpointError(
            f"{path} is truncated or no PyTorch checkpoint; copy or train it again"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} was not written by sparse_seg's training; convert other checkpoints by tools/convert.py"
        )
    return content


def checkpoint_config(content: Mapping[str, Any], path: str | Path) -> Config:
    """The resolved config in a checkpoint.

    Raises:
        ConfigError: it does not fit this version's schema.
    """
    return config_from_dict(content["config"], f"config in {path}")


def load_model(path: str | Path, config: Config | None = None) -> SelectiveSegmentor:
    """The network of a checkpoint of training or of a converted file (`.safetensors`), in eval mode.

    Averaged weights are taken if training kept them.

    Args:
        config: in place of the one in the checkpoint. Mask, engine and exchange may differ, what else the
            network computes may not; of a converted file it stands in the file (see `load_converted`).

    Raises:
        CheckpointError: missing, truncated or foreign file, or one that does not fit the config.
    """
    if is_safetensors(path):
        return load_converted(path, config)
    content = load_checkpoint(path)
    trained = checkpoint_config(content, path)
    if config is not None:
        check_same_function(config, trained, path)
    model = build_model(config or trained)
    load_weights(model, _inference_weights(model, content, path), path)
    return model.eval()


def load_network(model: SelectiveSegmentor, path: str | Path, config: Config) -> None:
    """Start a network from a checkpoint's weights; a mask net and an auxiliary head stay as they are if the
    checkpoint has none.

    Raises:
        CheckpointError: missing, truncated or foreign file, or one that does not fit the config.
    """
    content = load_checkpoint(path)
    check_same_function(config, checkpoint_config(content, path), path)
    weights, own = dict(content.get("ema") or content["model"]), model.state_dict()
    extra = ("policy.", "auxiliary.")
    kept = {name: tensor for name, tensor in own.items() if name.startswith(extra)}
    weights = {name: tensor for name, tensor in weights.items() if name in own or not name.startswith(extra)}
    load_weights(model, kept | weights, path)


def check_same_function(config: Config, trained: Config, path: str | Path) -> None:
    """Compare settings that the weights' shapes do not tell, and those whose name tells more than a shape.

    Raises:
        CheckpointError: they differ.
    """
    asked, own = _function(config), _function(trained)
    for key, value in asked.items():
        if value != own[key]:
            text = str(own[key]).replace(" ", "")
            raise CheckpointError(
                f"{path} does not fit the config: it was trained with {key} {own[key]}, not {value}; "
                f"train again or use --set {key}={text}"
            )


def _function(config: Config) -> dict[str, Any]:
    config = dataclasses.replace(config, model=model_config(config))
    values = {name: attrgetter(name)(config) for name in function_keys(Config)}
    if config.model.head not in POOLING_HEADS:
        values["model.aspp_rates"] = None
    return values


def _inference_weights(
    model: nn.Module, content: Mapping[str, Any], path: str | Path
) -> Mapping[str, Tensor]:
    """Weights to predict with. An auxiliary head, which only training uses, may be missing on either side; a
    learned mask is left out where another is asked for.

    Raises:
        CheckpointError: a learned mask is asked for, and there is none.
    """
    weights = dict(content.get("ema") or content["model"])
    if not any(name.startswith("policy.") for name in model.state_dict()):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("policy.")}
    elif not any(name.startswith("policy.") for name in weights):
        raise CheckpointError(
            f"{path} holds no learned mask: train one with train.init={path} (see configs/camvid_mask.yaml), "
            "or choose another model.mask.policy"
        )
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("auxiliary.")}
    return own | {
        name: tensor for name, tensor in weights.items() if name in own or not name.startswith("auxiliary.")
    }
