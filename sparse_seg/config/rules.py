"""Rules across config keys, beyond the bounds and choices of each: settings that must fit each other."""

from __future__ import annotations

from sparse_seg.config.build import check_values
from sparse_seg.config.keys import function_keys
from sparse_seg.config.schema import Config, ModelConfig
from sparse_seg.errors import ConfigError
from sparse_seg.registry import DATASETS, POOLING_HEADS

MAX_PIXELS = 2**31  # of a training step's crops
ENTRY_STRIDES = (4, 8, 16)  # natural strides of the stages before layer2..layer4, px


def num_classes(config: Config) -> int:
    """The model's class count: its own if set, else the dataset's."""
    return config.model.num_classes or _dataset_count(config)


def _dataset_count(config: Config) -> int:
    return len(DATASETS[config.data.dataset].known_in(config.data.root).classes)


def check_classes(config: Config) -> None:
    """The model's classes are the dataset's.

    Raises:
        ConfigError: their counts differ.
    """
    count, own = _dataset_count(config), num_classes(config)
    _require(
        own == count,
        f"model.num_classes is {own} but {config.data.dataset} has {count} classes; choose the data.dataset "
        "that the model was trained on",
    )


def check_model(model: ModelConfig) -> None:
    """Check a model's values, one by one and together.

    Raises:
        ConfigError: an impossible value, with the key.
    """
    check_values(model, "model.")
    _check_module(model)
    mask, strides = model.mask, model.own_strides
    _require(
        model.merge != "patch" or (model.dilate_second and model.exchange != "separate"),
        "model.merge=patch needs a coarse pass that does not depend on the mask, which "
        "model.exchange=separate and model.dilate_second=false make it do: set model.merge=whole",
    )
    entries = zip(model.entry_spacings, ENTRY_STRIDES, strict=True)
    _require(
        all(entry % least == 0 for entry, least in entries),
        f"model.entry_spacings is {model.entry_spacings}; it must have multiples of {list(ENTRY_STRIDES)} px",
    )
    _require(
        model.refine or model.aspp_projection or model.head != "deeplabv3",
        "model.aspp_projection and model.refine cannot both be false for deeplabv3",
    )
    _require(
        len(strides) == 2 or mask.threshold is None or mask.middle_threshold is not None,
        "model.mask.threshold with three strides needs model.mask.middle_threshold too",
    )
    spacings, coarsest = [rate * model.trained_stride for rate in model.aspp_rates], strides[-1]
    _require(
        model.head not in POOLING_HEADS or all(spacing % coarsest == 0 for spacing in spacings),
        f"model.aspp_rates x trained_stride is {spacings} px; run selective, each must divide by {coarsest}",
    )


def _check_module(model: ModelConfig) -> None:
    """What a network of others has not."""
    if model.module is None:
        _require(not model.module_args, "model.module_args are arguments of model.module: name one")
        return
    default = ModelConfig()
    for key in function_keys(ModelConfig):
        _require(
            key in ("module", "module_args", "num_classes") or getattr(model, key) == getattr(default, key),
            f"model.{key} is of sparse_seg's own networks, not of model.module: remove it; what the module "
            "takes stands in model.module_args",
        )
    _require(
        not model.auxiliary,
        "model.auxiliary=true is of sparse_seg's own networks, not of model.module: set it to false",
    )


def check_config(config: Config) -> None:
    """Check a whole config's values, one by one and together.

    Raises:
        ConfigError: an impossible value, with the key.
    """
    check_model(config.model)
    check_values(config.data, "data.")
    check_values(config.train, "train.")
    data, train, loss = config.data, config.train, config.train.loss
    _require(data.scale_range[0] <= data.scale_range[1], "data.scale_range must be [low, high], low first")
    _require(
        train.batch_size * data.crop[0] * data.crop[1] <= MAX_PIXELS,
        f"train.batch_size {train.batch_size} with data.crop {data.crop} makes more than {MAX_PIXELS} pixels "
        "a step; lower one of them",
    )
    _require(
        train.warmup_iterations < train.iterations,
        f"train.warmup_iterations is {train.warmup_iterations}; it must be below train.iterations "
        f"({train.iterations})",
    )
    _require(
        loss.ohem_threshold is None or not (loss.class_weights or loss.boundary_weight or loss.fine_weight),
        "train.loss: choose either ohem_threshold or class_weights, boundary_weight and fine_weight",
    )
    if loss.class_weights is not None:
        given, count = len(loss.class_weights), num_classes(config)
        _require(given == count, f"train.loss.class_weights has {given} values for {count} classes")


def check_training(config: Config) -> None:
    """What training needs beyond a valid config.

    Raises:
        ConfigError: settings of a learned mask that exclude each other, with the fix.
    """
    train, mask = config.train, config.model.mask
    learned, supervised = mask.policy == "learned", train.mask_loss == "supervised"
    _require(
        mask.policy != "gain",
        "the gain mask is fitted to a trained network: train with another model.mask.policy, then run "
        "sparse-seg fit-gain",
    )
    _require(
        learned or not train.freeze,
        "train.freeze leaves nothing to train but a learned mask: set model.mask.policy=learned",
    )
    distilled, loss = train.distill.teacher is not None, train.loss
    coarse = loss.reads_coarse_logits
    named = "train.loss." + ("coarse_weight" if loss.coarse_weight > 0 else "coarse_distill_weight")
    _require(
        not (config.data.on_device and config.data.cache),
        "data.on_device keeps the frames, and data.cache would once more: set one of them to false",
    )
    _require(
        not (learned and (distilled or coarse or train.loss.fine_weight > 0)),
        f"a learned mask is trained without train.distill, {named} and fine_weight: train "
        "the network first, then the mask with train.init and train.freeze",
    )
    _require(
        not coarse or train.network == "dense" or config.model.exchange != "separate",
        f"{named} needs a coarse lattice that does not depend on the mask: not with "
        "train.network=selective and model.exchange=separate",
    )
    is_module, strides = config.model.module is not None, config.model.own_strides
    finest = None if is_module and config.model.strides is None else strides[0]
    dense = train.output_stride or (None if is_module else 8)
    _require(
        not coarse or train.network == "selective" or dense in (None, finest),
        f"{named} needs train.output_stride={finest or 'null'}: the coarse lattice is part of it",
    )
    _require(
        train.freeze or not (learned and supervised),
        "train.mask_loss=supervised trains the mask alone: set train.freeze=true",
    )
    _require(
        not learned or supervised or (len(strides) == 2 and mask.threshold is None),
        "train.mask_loss=straight_through needs two strides and a budget: set model.mask.threshold=null "
        "and model.strides=[8,16], or train.mask_loss=supervised with train.freeze=true",
    )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
