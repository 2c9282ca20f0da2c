"""Strict YAML configs over `schema.py`: `_base_` files, `key=value` overrides, messages that help.

An unknown key or a wrong type is a `ConfigError` that names the nearest valid key. OmegaConf does the merging
and type checks; this file adds `_base_` and the messages, `checks.py` what goes beyond keys and types.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparse_seg.checks import check_config, check_model, num_classes
from sparse_seg.errors import ConfigError, did_you_mean
from sparse_seg.schema import Config, ModelConfig

_T = TypeVar("_T")


class _Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1, where `1e-3` is a text; here it is a number, as in YAML 1.2. A key that stands
    twice, of which PyYAML takes the last, is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[Any]()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"key {key!r} stands twice; write its settings in one place",
                    key_node.start_mark,
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _parse_yaml(text: str) -> Any:
    """Raises yaml.YAMLError."""
    try:
        return yaml.load(text, _Loader)
    except ValueError as error:  # PyYAML's own for dates such as 2020-99-99
        raise yaml.YAMLError(str(error)) from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file with its `_base_` files and `key=value` overrides (`data.root=...`, values in YAML).

    Raises:
        ConfigError: missing or unreadable file, circular `_base_`, unknown key, wrong type, impossible value.
    """
    tree = _read(Path(path), ())
    merged = _merge(Config, tree, str(path))
    for override in overrides:
        merged = _merge(merged, _parse_override(override), f"--set {override}")
    config = cast(Config, OmegaConf.to_object(merged))
    check_config(config)
    return config


def model_config(config: str | Path | Mapping[str, Any] | Config | ModelConfig) -> ModelConfig:
    """The model part of a file, of a config, or of a plain dict of model settings (or with a `model` key).

    Raises:
        ConfigError: as `load_config`.
    """
    if isinstance(config, ModelConfig):
        return config
    if isinstance(config, (str, Path)):
        config = load_config(config)
    if isinstance(config, Config):
        return dataclasses.replace(config.model, num_classes=num_classes(config))
    if "model" in config:
        return model_config(config_from_dict(config, "config"))
    result = parse_tree(ModelConfig, config, "config")
    check_model(result)
    return result


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's keys and values, over those of its `_base_` files.

    Raises:
        ConfigError: missing or unreadable file, circular `_base_`.
    """
    return _read(path, ())


def parse_tree(schema: type[_T], tree: Mapping[str, Any], where: str) -> _T:
    """A dataclass from keys and values, as strict as `load_config`; `where` names the place in errors.

    Raises:
        ConfigError: unknown key or wrong type.
    """
    return cast(_T, OmegaConf.to_object(_merge(schema, tree, where)))


def config_from_dict(tree: Mapping[str, Any], where: str) -> Config:
    """A config from a plain dict, checked as strictly as a file; `where` names it in errors."""
    config = parse_tree(Config, dict(tree), where)
    check_config(config)
    return config


def to_dict(config: Config | ModelConfig) -> dict[str, Any]:
    """The resolved config as plain dicts and lists."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def parse_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts, values in YAML, as one tree.

    Raises:
        ConfigError: a text of another form.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        tree = _overlay(tree, _parse_override(override))
    return tree


def _read(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    """A file's tree over those of its `_base_` files (one path or a list, relative to the file)."""
    path = path.resolve()
    if path in parents:
        raise ConfigError(f"{path}: _base_ files form a circle")
    try:
        tree = _parse_yaml(path.read_text()) or {}
    except FileNotFoundError:
        raise ConfigError(f"config {path} does not exist{_nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path} must hold keys and values, not a {type(tree).__name__}")
    bases = tree.pop("_base_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not _fits(bases, list[str]):
        raise ConfigError(f"config {path}: _base_ must be a file name or a list of them, not {bases!r}")
    result: dict[str, Any] = {}
    for base in bases:
        result = _overlay(result, _read(path.parent / base, (*parents, path)))
    return _overlay(result, tree)


def _overlay(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlay(merged[key], value) if nested else value
    return merged


def _nearest_file(path: Path) -> str:
    others = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    return did_you_mean(path.name, others)


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override!r}: write key=value, for instance data.root=../camvid")
    try:
        value = _parse_yaml(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML") from None
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return value


def _merge(base: Any, tree: Mapping[str, Any], where: str) -> Any:
    """Merge a plain tree into the schema, with one-line errors."""
    base = OmegaConf.structured(base) if isinstance(base, type) else base
    _check_keys(base, tree, where, "")
    try:
        return OmegaConf.merge(base, dict(tree))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{where}: {key}: {reason}") from None


def _check_keys(schema: Any, tree: Mapping[str, Any], where: str, prefix: str) -> None:
    for key, value in tree.items():
        if key not in schema:
            near = did_you_mean(f"{prefix}{key}", [f"{prefix}{name}" for name in schema])
            hint = near or _did_you_mean_elsewhere(str(key))
            raise ConfigError(f"{where}: unknown key '{prefix}{key}'{hint}")
        child = schema._get_node(key)
        if OmegaConf.is_dict(child):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: '{prefix}{key}' holds keys of its own, not the value {value!r}")
            _check_keys(child, value, where, f"{prefix}{key}.")
        else:
            _check_type(value, child, where, f"{prefix}{key}")


def _check_type(value: Any, node: Any, where: str, key: str) -> None:
    """OmegaConf would take '18' for a number and 18 for a text; a config should say what it means."""
    if value is None and node._is_optional():
        return
    expected = node._metadata.ref_type
    name = _type_name(expected)
    if not _fits(value, expected):
        raise ConfigError(f"{where}: '{key}' must be {name}, not {value!r}")
    if isinstance(value, str) and ("${" in value or value == "???"):  # OmegaConf would fill these in
        raise ConfigError(f"{where}: '{key}' is {value!r}; write the text itself, nothing is filled in here")


def _fits(value: Any, expected: Any) -> bool:
    if expected is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if expected in (str, bool):
        return isinstance(value, expected)
    element = expected.__args__[0]
    return isinstance(value, list) and all(_fits(item, element) for item in value)


def _type_name(expected: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return names.get(expected) or f"a list, each {_type_name(expected.__args__[0])}"


def _did_you_mean_elsewhere(key: str) -> str:
    """The full key of the same or a close last part anywhere in the schema."""
    full = {name.split(".")[-1]: name for name in _all_keys(OmegaConf.structured(Config), "")}
    near = difflib.get_close_matches(key, full, n=1)
    return f"; did you mean '{full[near[0]]}'?" if near else ""


def _all_keys(schema: Any, prefix: str) -> list[str]:
    names: list[str] = []
    for key in schema:
        child = schema._get_node(key)
        names += _all_keys(child, f"{prefix}{key}.") if OmegaConf.is_dict(child) else [f"{prefix}{key}"]
    return names
