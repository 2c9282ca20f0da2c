"""Strict configs: the schema, and how to read and check them. Imports no model and no dataset."""

from sparse_seg.config.keys import all_keys, function_keys, key
from sparse_seg.config.load import (
    changes,
    config_from_dict,
    load_config,
    model_config,
    parse_tree,
    to_dict,
    to_yaml,
)
from sparse_seg.config.reading import config_files, parse_settings, parse_yaml, read_yaml
from sparse_seg.config.rules import check_classes, check_config, check_model, check_training, num_classes
from sparse_seg.config.schema import (
    RUN_SETTINGS,
    Config,
    DataConfig,
    DistillConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    TrainConfig,
)

__all__ = [
    "RUN_SETTINGS",
    "Config",
    "DataConfig",
    "DistillConfig",
    "LossConfig",
    "MaskConfig",
    "ModelConfig",
    "TrainConfig",
    "all_keys",
    "changes",
    "check_classes",
    "check_config",
    "check_model",
    "check_training",
    "config_files",
    "config_from_dict",
    "function_keys",
    "key",
    "load_config",
    "model_config",
    "num_classes",
    "parse_settings",
    "parse_tree",
    "parse_yaml",
    "read_yaml",
    "to_dict",
    "to_yaml",
]
