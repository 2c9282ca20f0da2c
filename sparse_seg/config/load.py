"""Configs from files, overrides and dicts, strict: an unknown key, wrong type or bad value is an error.

Every function here raises a `ConfigError` that names the file, the key or the override.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sparse_seg.config.build import build, check_values
from sparse_seg.config.keys import all_keys
from sparse_seg.config.reading import merged_trees, parse_settings, read_yaml
from sparse_seg.config.rules import check_config, check_model, num_classes
from sparse_seg.config.schema import Config, ModelConfig
from sparse_seg.errors import shown

_T = TypeVar("_T")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, its `_base_` files below it, `key=value` overrides above (values in YAML)."""
    tree = read_yaml(path)
    build(Config, tree, str(path))
    for override in overrides:
        settings = parse_settings([override])
        build(Config, settings, f"--set {shown(override)}")
        tree = merged_trees(tree, settings)
    return config_from_dict(tree, str(path))


def config_from_dict(tree: Mapping[str, Any], where: str) -> Config:
    """A config from a plain dict, checked as strictly as a file; `where` names it in errors."""
    config = build(Config, tree, where)
    check_config(config)
    return config


def model_config(config: str | Path | Mapping[str, Any] | Config | ModelConfig) -> ModelConfig:
    """The model part of a file, of a config, or of a plain dict of model settings (or with a `model` key)."""
    if isinstance(config, ModelConfig):
        return config
    if isinstance(config, (str, Path)):
        config = load_config(config)
    elif isinstance(config, Mapping) and "model" in config:
        config = config_from_dict(config, "config")
    if isinstance(config, Config):
        return dataclasses.replace(config.model, num_classes=num_classes(config))
    model = build(ModelConfig, config, "config")
    check_model(model)
    return model


def parse_tree(schema: type[_T], tree: Mapping[str, Any], where: str) -> _T:
    """A dataclass of any schema from keys and values, as strict as `load_config` except for its rules."""
    result = build(schema, tree, where)
    check_values(result, f"{where}: ")
    return result


def to_dict(config: Config | ModelConfig) -> dict[str, Any]:
    """The resolved config as plain dicts and lists."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def changes(old: Config, new: Config) -> list[str]:
    """Settings of `new` that differ from those of `old`, as `train.lr 0.02 (was 0.01)`."""
    values = ((name, *map(attrgetter(name), (old, new))) for name, *_ in all_keys(Config))
    return [f"{name} {short_yaml(new)} (was {short_yaml(old)})" for name, old, new in values if new != old]


def short_yaml(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("...\n").strip()
