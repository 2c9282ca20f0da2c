"""YAML texts and files to plain keys and values; `_base_` files below them. A bad file is one ConfigError."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sparse_seg.errors import ConfigError, did_you_mean, shown

MAX_BYTES = 2**18  # of a file

Tree = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1, where `1e-3` is a text; here it is a number, as in YAML 1.2. A key that stands
    twice, of which PyYAML takes the last, is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[Any]()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node)
            if key in seen:
                message = f"key {shown(key)} is given twice; merge the two"
                raise yaml.MarkedYAMLError(None, None, message, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: bytes | str, where: str) -> Any:
    """A YAML text's value; bytes are UTF-8, or UTF-16 with its mark.

    Raises:
        ConfigError: it is not valid YAML; `where` names it.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = f"{error.context or ''} {error.problem or ''}{f' in line {mark.line + 1}' if mark else ''}"
    except (yaml.YAMLError, ValueError) as error:  # the latter for dates such as 2020-99-99
        reason = str(error)
    except RecursionError:
        reason = "nested too deep"
    except (LookupError, AttributeError, TypeError):  # PyYAML's own for `!!bool x`
        reason = "a value does not fit its tag"
    raise ConfigError(f"{where} is not valid YAML: {' '.join(reason.split())}")


def read_yaml(path: str | Path) -> Tree:
    """A file's keys and values over those of its `_base_` files (one path or a list, relative to the file).

    Raises:
        ConfigError: missing or unreadable file, `_base_` files that form a circle.
    """
    return _read(Path(path), (), {})


def config_files(path: str | Path) -> list[Path]:
    """A file and its `_base_` files, resolved. Raises as `read_yaml` does."""
    done: dict[Path, Tree] = {}
    _read(Path(path), (), done)
    return list(done)


def _read(path: Path, parents: tuple[Path, ...], done: dict[Path, Tree]) -> Tree:
    try:
        path = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; a null character
        raise ConfigError(f"config {shown(str(path))} cannot be read: {error}") from None
    if path in parents:
        raise ConfigError(f"{path}: _base_ files form a circle")
    if path in done:
        return done[path]
    tree = parse_yaml(_read_bytes(path), f"config {path}")
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path} must hold keys and values, not a {type(tree).__name__}")
    bases = tree.pop("_base_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise ConfigError(f"config {path}: _base_ must be a file name or a list of them, not {shown(bases)}")
    result: Tree = {}
    for base in bases:
        result = merged_trees(result, _read(path.parent / os.path.expanduser(base), (*parents, path), done))
    done[path] = merged_trees(result, tree)
    return done[path]


def _read_bytes(path: Path) -> bytes:
    try:
        if not path.exists():
            others = [other.name for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
            raise ConfigError(f"config {path} does not exist{did_you_mean(path.name, others)}")
        if not path.is_file():  # a pipe would wait for ever
            raise ConfigError(f"config {path} is no file; name a YAML file")
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"config {shown(str(path))} cannot be read: {error.strerror}") from None
    if len(text) > MAX_BYTES:
        raise ConfigError(f"config {path} has more than {MAX_BYTES} bytes; name a YAML file of settings")
    return text


def merged_trees(base: Mapping[str, Any], top: Mapping[str, Any]) -> Tree:
    """Merge two trees section by section; `top` wins."""
    merged = dict(base)
    for key, value in top.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merged_trees(merged[key], value) if nested else value
    return merged


def parse_settings(settings: Sequence[str], option: str = "--set") -> Tree:
    """`key=value` texts, values in YAML, as one tree.

    Raises:
        ConfigError: a text of another form.
    """
    tree: Tree = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{option} {shown(setting)}: write key=value, for instance data.root=../camvid")
        value = parse_yaml(text, f"{option} {shown(setting)}: the value")
        for part in reversed(key.strip().split(".")):
            value = {part: value}
        tree = merged_trees(tree, value)
    return tree
