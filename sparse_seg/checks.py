"""What a config must fulfil beyond keys and types: known names, bounds, and settings that fit each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sparse_seg.data import DATASETS
from sparse_seg.errors import ConfigError, did_you_mean
from sparse_seg.masks import ORACLES, POLICIES, REDUCTIONS, RULES, UNCERTAINTIES
from sparse_seg.models.aspp import SEPARABLE
from sparse_seg.models.heads import HEADS, POOLING_HEADS
from sparse_seg.models.resnet import ARCHITECTURES, SHORTCUTS, STAGE_STRIDES, STEMS
from sparse_seg.schema import Config, ModelConfig
from sparse_seg.sparse import ENGINES, EXCHANGES


def num_classes(config: Config) -> int:
    """The model's class count: its own if set, else the dataset's."""
    if config.model.num_classes is not None:
        return config.model.num_classes
    return len(DATASETS[config.data.dataset].classes)


def check_classes(config: Config) -> None:
    """The model's classes are the dataset's.

    Raises:
        ConfigError: their counts differ.
    """
    count, own = len(DATASETS[config.data.dataset].classes), num_classes(config)
    _require(
        own == count,
        f"model.num_classes is {own} but {config.data.dataset} has {count} classes; choose the data.dataset "
        "that the model was trained on",
    )


def _choose(key: str, value: Any, valid: Iterable[Any]) -> None:
    valid = list(valid)
    if value not in valid:
        hint = did_you_mean(str(value), [str(v) for v in valid])
        raise ConfigError(f"{key} is {value!r}{hint or '; choose'} one of {', '.join(map(str, valid))}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


_MODEL_BOUNDS = {
    "width": "(0, inf)",
    "head_channels": "[1, inf)",
    "num_classes": "[2, 255]",
    "aspp_rates": "[1, inf)",
    "depths": "[1, inf)",
    "bn_eps": "(0, inf)",
    "low_level_channels": "[1, inf)",
    "decoder_convs": "[1, inf)",
}
_MASK_BOUNDS = {
    "fine_fraction": "[0, 1]",
    "threshold": "(-inf, inf)",
    "middle_fraction": "[0, 1]",
    "middle_threshold": "(-inf, inf)",
}
STRIDES = ([8, 16], [8, 16, 32], [4, 8, 16])
_DATA_BOUNDS = {
    "scale_range": "(0, inf)",
    "jitter": "[0, 1)",
    "mean": "(-inf, inf)",
    "std": "(0, inf)",
    "workers": "[0, inf)",
}
_TRAIN_BOUNDS = {
    "budget_weight": "[0, inf)",
    "iterations": "[1, inf)",
    "batch_size": "[1, inf)",
    "lr": "(0, inf)",
    "momentum": "[0, 1)",
    "weight_decay": "[0, inf)",
    "warmup_iterations": "[0, inf)",
    "poly_power": "[0, inf)",
    "clip_grad_norm": "(0, inf)",
    "ema_decay": "[0, 1)",
    "seed": "[0, inf)",
    "threads": "[1, inf)",
    "log_every": "[1, inf)",
    "eval_every": "[1, inf)",
    "save_every": "[1, inf)",
    "eval_images": "[1, inf)",
}
_LOSS_BOUNDS = {
    "class_weights": "[0, inf)",
    "ohem_threshold": "(0, 1)",
    "ohem_min_kept": "[0, 1]",
    "auxiliary_weight": "[0, inf)",
    "boundary_weight": "[0, inf)",
    "boundary_width": "[1, inf)",
    "fine_weight": "[0, inf)",
    "coarse_weight": "[0, inf)",
}
_DISTILL_BOUNDS = {
    "logits_weight": "[0, inf)",
    "temperature": "(0, inf)",
    "features_weight": "[0, inf)",
    "fine_weight": "[0, inf)",
}


def _check_bounds(section: Any, name: str, bounds: Mapping[str, str]) -> None:
    """Each key's value, or each of its list, lies in the interval; a bracket includes the bound."""
    for key, interval in bounds.items():
        value = getattr(section, key)
        low, high = map(float, interval[1:-1].split(","))
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            inside = low < number < high
            on_bound = (number == low and interval[0] == "[") or (number == high and interval[-1] == "]")
            _require(inside or on_bound, f"{name}.{key} is {value}; it must lie in {interval}")


def check_config(config: Config) -> None:
    """Checks across and beyond types.

    Raises:
        ConfigError: an impossible value, with the key.
    """
    check_model(config.model)
    data, train = config.data, config.train
    _choose("data.dataset", data.dataset, DATASETS)
    _require(len(data.crop) == 2 and min(data.crop) >= 32, "data.crop must be [height, width], each >= 32")
    _check_bounds(config.data, "data", _DATA_BOUNDS)
    _check_bounds(config.train, "train", _TRAIN_BOUNDS)
    _check_bounds(config.train.loss, "train.loss", _LOSS_BOUNDS)
    _check_bounds(config.train.distill, "train.distill", _DISTILL_BOUNDS)
    low_high = len(data.scale_range) == 2 and 0 < data.scale_range[0] <= data.scale_range[1]
    _require(low_high, "data.scale_range must be [low, high] with 0 < low <= high")
    _require(len(data.mean) == len(data.std) == 3, "data.mean and data.std need three numbers each")
    _choose("train.network", train.network, ("dense", "selective"))
    _choose("train.output_stride", train.output_stride, (8, 16, 32))
    _choose("train.mask_loss", train.mask_loss, ("straight_through", "supervised"))
    _choose("train.optimizer", train.optimizer, ("sgd", "adamw"))
    _choose("train.amp_dtype", train.amp_dtype, ("bfloat16", "float16"))
    _require(
        train.warmup_iterations < train.iterations,
        f"train.warmup_iterations is {train.warmup_iterations}; it must be below train.iterations "
        f"({train.iterations})",
    )
    both = train.loss.class_weights is not None and train.loss.ohem_threshold is not None
    _require(not both, "train.loss: choose either class_weights or ohem_threshold")
    emphasis = train.loss.boundary_weight > 0 or train.loss.fine_weight > 0
    _require(
        not (emphasis and train.loss.ohem_threshold is not None),
        "train.loss: choose either ohem_threshold or boundary_weight and fine_weight",
    )
    weights = train.loss.class_weights
    if weights is not None:
        count = num_classes(config)
        _require(
            len(weights) == count, f"train.loss.class_weights has {len(weights)} values for {count} classes"
        )
    head = config.model.head
    pooled = head in POOLING_HEADS
    _require(
        not pooled or train.batch_size >= 2, f"train.batch_size must be 2 or more: {head} pools each image"
    )


def check_training(config: Config) -> None:
    """What training needs beyond a valid config.

    Raises:
        ConfigError: settings of a learned mask that exclude each other, with the fix.
    """
    train, mask = config.train, config.model.mask
    learned, supervised = mask.policy == "learned", train.mask_loss == "supervised"
    _require(
        learned or not train.freeze,
        "train.freeze leaves nothing to train but a learned mask: set model.mask.policy=learned",
    )
    distilled, coarse = train.distill.teacher is not None, train.loss.coarse_weight > 0
    _require(
        not (learned and (distilled or coarse or train.loss.fine_weight > 0)),
        "a learned mask is trained without train.distill, train.loss.coarse_weight and fine_weight: train "
        "the network first, then the mask with train.init and train.freeze",
    )
    _require(
        config.model.head != "deeplabv3plus" or not (distilled or coarse),
        "model.head=deeplabv3plus has no rows before densify for train.distill and train.loss.coarse_weight; "
        "choose another head",
    )
    finest = config.model.strides[0]
    _require(
        not coarse or train.network == "selective" or train.output_stride == finest,
        f"train.loss.coarse_weight needs train.output_stride={finest}: the coarse lattice is part of it",
    )
    if learned and supervised:
        _require(train.freeze, "train.mask_loss=supervised trains the mask alone: set train.freeze=true")
    elif learned:
        _require(
            config.model.head != "deeplabv3plus",
            "train.mask_loss=straight_through cannot train through the skip of model.head=deeplabv3plus: set "
            "train.mask_loss=supervised with train.freeze=true",
        )
        fits = len(config.model.strides) == 2 and mask.threshold is None
        _require(
            fits,
            "train.mask_loss=straight_through needs two strides and a budget: set model.mask.threshold=null "
            "and model.strides=[8,16], or train.mask_loss=supervised with train.freeze=true",
        )


def check_model(model: ModelConfig) -> None:
    _choose("model.backbone", model.backbone, ARCHITECTURES)
    _choose("model.head", model.head, HEADS)
    _choose("model.stem", model.stem, STEMS)
    _choose("model.shortcut", model.shortcut, SHORTCUTS)
    _choose("model.aspp_separable", model.aspp_separable, SEPARABLE)
    _choose("model.separable", model.separable, SEPARABLE)
    _choose("model.exchange", model.exchange, EXCHANGES)
    _choose("model.engine", model.engine, ENGINES)
    _choose("model.trained_stride", model.trained_stride, (8, 16, 32))
    _choose("model.strides", model.strides, STRIDES)
    _choose("model.mask.policy", model.mask.policy, POLICIES)
    _choose("model.mask.edge", model.mask.edge, RULES)
    _choose("model.mask.oracle", model.mask.oracle, ORACLES)
    _choose("model.mask.uncertainty", model.mask.uncertainty, UNCERTAINTIES)
    _choose("model.mask.reduce", model.mask.reduce, REDUCTIONS)
    _choose("model.mask.stored_dtype", model.mask.stored_dtype, (None, "float16", "bfloat16"))
    _require(
        model.dilate_second or model.mask.policy != "confidence",
        "model.mask.policy=confidence needs a coarse pass that does not depend on the mask, which "
        "model.dilate_second=false makes it do: choose another policy",
    )
    _check_bounds(model, "model", _MODEL_BOUNDS)
    _check_bounds(model.mask, "model.mask", _MASK_BOUNDS)
    _require(
        model.depths is None or len(model.depths) == len(STAGE_STRIDES),
        f"model.depths is {model.depths}; it must have the blocks of four stages",
    )
    entries = zip(model.entry_spacings, STAGE_STRIDES, strict=False)
    _require(
        len(model.entry_spacings) == 3 and all(entry > 0 and entry % least == 0 for entry, least in entries),
        f"model.entry_spacings is {model.entry_spacings}; it must have px for layer2..layer4, multiples of "
        f"{list(STAGE_STRIDES[:3])}",
    )
    _require(
        model.refine or model.aspp_projection or model.head != "deeplabv3",
        "model.aspp_projection and model.refine cannot both be false for deeplabv3",
    )
    _require(bool(model.aspp_rates), "model.aspp_rates needs at least one rate")
    if len(model.strides) == 3:
        _require(
            model.mask.threshold is None or model.mask.middle_threshold is not None,
            "model.mask.threshold with three strides needs model.mask.middle_threshold too",
        )
    spacings, coarsest = [rate * model.trained_stride for rate in model.aspp_rates], model.strides[-1]
    _require(
        model.head not in POOLING_HEADS or all(spacing % coarsest == 0 for spacing in spacings),
        f"model.aspp_rates x trained_stride is {spacings} px; run selective, each must divide by {coarsest}",
    )
