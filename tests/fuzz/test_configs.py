"""Damaged and random configs: each is valid and usable, or refused in one line.

`run(seed, count)` counts outcomes, for the table in docs/reliability.md.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from sparse_seg.config import (
    Config,
    MaskConfig,
    all_keys,
    config_from_dict,
    load_config,
    model_config,
    to_dict,
    to_yaml,
)
from sparse_seg.config.keys import Key, item_type, plain_type
from sparse_seg.data.transforms import TrainTransform
from sparse_seg.errors import SparseSegError
from sparse_seg.masks import build_policy
from sparse_seg.run.build import build_model
from sparse_seg.training.losses import SegmentationLoss
from sparse_seg.training.schedule import build_optimizer, learning_rate

SHIPPED = [
    path
    for path in sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
    if path.parent.name != "ablation"
]
KEYS = [(name, info, kind) for name, info, kind, _ in all_keys(Config)]
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**32, 2**63, 10**20, 10**400, -(10**400)),
    *(0.0, -0.0, 0.5, 1.5, -1e-9, 1e-300, 5e-324, 1e9, 1e20, 1e300, math.nan, math.inf, -math.inf),
    *("", "x", "18", "none", "null", "edge", "${HOME}", "???", "a\0b", "\ud800", "\x1b[31m", "x" * 10000),
    *([], [1], [8, 16], [16, 8], [0, 0, 0], ["a"], [None], [[1]], [1e300] * 3, [True, False], [1] * 10000),
    *({}, {"k": 1}, {1: 2}, {"k": {"k": [math.nan]}}, b"bytes", (1, 2), {1, 2}, 1j, object()),
]
TEXTS = ["", "[", "{a: 1}", "*a", "&a [*a]", "!!bool x", "1e400", "0x" + "f" * 400, ".nan", "2020-99-99"]
PIECES = [b"\t", b"\n", b":", b"- ", b"[", b"{", b"*x", b"&x ", b"!!int ", b"\0"]


Attempt = tuple[Callable[[], Config], dict[str, Any]]  # and values that the config must have


def run(seed: int = 0, count: int = 600) -> dict[str, int]:
    """How many configs were tried, right, refused in one line, ended in a traceback, or were wrong."""
    rng, counts = random.Random(seed), Counter[str]()
    ways = (damaged_file, odd_values, random_tree, random_setting, valid_values)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            attempt, given = ways[number % len(ways)](rng, Path(folder))
            counts[outcome(attempt, given)] += 1
    return {"tried": count, **{name: counts[name] for name in ("right", "refused", "traceback", "wrong")}}


def outcome(attempt: Callable[[], Config], given: dict[str, Any]) -> str:
    """What becomes of a config; `given` are values that it must have if it is accepted."""
    try:
        config = attempt()
        if not is_valid(config) or any(attrgetter(key)(config) != value for key, value in given.items()):
            return "wrong"
        if config_from_dict(to_dict(config), "again") != config:
            return "wrong"
        return "right" if is_usable(config) else "wrong"
    except SparseSegError as error:
        return "refused" if str(error).isprintable() and len(str(error)) < 1000 else "wrong"
    except Exception:
        return "traceback"


def is_valid(config: Config) -> bool:
    """Types, bounds and choices, checked in another way than the package does."""
    for name, info, kind in KEYS:
        value = attrgetter(name)(config)
        plain, optional = plain_type(kind)
        if value is None and optional:
            continue
        items = value if item_type(plain) else [value]
        expected = item_type(plain) or plain
        if expected in (int, float, str, bool) and any(type(item) is not expected for item in items):
            return False
        if info.choices and value not in list(info.choices):
            return False
        low, high = info.interval if info.bounds else (-math.inf, math.inf)
        if any(not low <= item <= high for item in items if type(item) in (int, float)):
            return False
    return True


def is_usable(config: Config) -> bool:
    """Network (its weights on the meta device), optimiser, loss, transform and seeds take it.

    Raises:
        SparseSegError: the network refuses it.
    """
    train, data = config.train, config.data
    if sum(config.model.depths or [0]) < 64:
        model = model_config(config)
        build_on_meta(json.dumps(to_dict(dataclasses.replace(model, mask=MaskConfig(fine_fraction=0.0)))))
        build_policy(model.mask, model.own_strides, nn.Identity())
    layer = nn.Linear(2, 2)
    optimiser = build_optimizer(layer, train)
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(train.iterations - 1, train)
    layer(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    SegmentationLoss(train.loss)
    transform = TrainTransform(dataclasses.replace(data, crop=[64, 64]))
    frame = np.full((64, 80, 3), 99, np.uint8)
    image, _ = transform(frame, frame[..., 0], np.random.default_rng([train.seed, 0]))
    torch.Generator().manual_seed(config.model.mask.seed)
    range(train.iterations + train.batch_size)
    return bool(image.isfinite().all())


@functools.cache
def build_on_meta(settings: str) -> None:
    """A network, whatever its mask is: most configs differ in other keys."""
    with torch.device("meta"):
        build_model(json.loads(settings))


def damaged_file(rng: random.Random, folder: Path) -> Attempt:
    """A shipped config, resolved, with a few bytes changed, taken out, put in or doubled."""
    text = bytearray(to_yaml(load_config(rng.choice(SHIPPED))).encode())
    for _ in range(rng.choice([1, 1, 1, 1, 2, 20])):
        place, action = rng.randrange(len(text)), rng.randrange(8)
        if action == 0:
            text[place] = rng.randrange(256)
        elif action == 1:
            del text[place : place + rng.choice([1, 3, 100])]
        elif action == 2:
            text[place:place] = rng.choice(PIECES)
        elif action == 3:
            text[place:place] = text[place : place + rng.choice([10, 200])]
        else:
            place = rng.choice([place for place, byte in enumerate(text) if chr(byte).isdigit()])
            text[place] = ord(rng.choice("0123456789.-e"))
    path = folder / "config.yaml"
    path.write_bytes(text)
    return lambda: load_config(path), {}


def odd_values(rng: random.Random, folder: Path) -> Attempt:
    """One to three keys with values of any type, as a dict."""
    chosen = {key[0]: rng.choice(ODD) for key in rng.choices(KEYS, k=rng.choice([1, 1, 3]))}
    tree = nested(chosen)
    return lambda: config_from_dict(tree, "odd"), chosen


def random_tree(rng: random.Random, folder: Path) -> Attempt:
    """A YAML file of random structure, with known and unknown names, odd keys, aliases and deep nests."""
    path, node = folder / "config.yaml", random_node(rng, 4)
    if rng.random() < 0.3:
        text = rng.choice(["[", "{a: ", "- ", "? "]) * rng.choice([3, 20, 500, 1000])
    else:
        tree = rng.choice([node, {"model": node, "train": [node, node]}])
        try:
            text = yaml.dump(tree, Dumper=rng.choice([yaml.Dumper, yaml.SafeDumper]))
        except (yaml.YAMLError, TypeError, ValueError):  # YAML cannot write it
            text = rng.choice(TEXTS)
    path.write_bytes(text.encode(errors="replace"))
    return lambda: load_config(path), {}


def random_node(rng: random.Random, depth: int) -> Any:
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(ODD)
    names = ["model", "data", "train", "mask", "loss", "distill", "_base_", "<<", 1, None, "x", "lr", "width"]
    return {rng.choice(names): random_node(rng, depth - 1) for _ in range(rng.randrange(4))}


def random_setting(rng: random.Random, folder: Path) -> Attempt:
    """`--set` texts on a shipped config, some of them good."""
    settings = []
    for _ in range(rng.choice([1, 1, 3])):
        name, info, kind = rng.choice(KEYS)
        value = json.dumps(allowed(rng, info, kind))
        if rng.random() < 0.6:
            name = rng.choice([name, name, name.upper(), name[1:], f"{name}.x", ".", "", "a." * 50])
            value = rng.choice([*TEXTS, *(str(odd)[:500] for odd in ODD if not isinstance(odd, int))])
        settings.append(rng.choice(["", " "]) + name + rng.choice(["=", "=", "=", "=", "", "=="]) + value)
    path = rng.choice(SHIPPED)
    return lambda: load_config(path, settings), {}


def valid_values(rng: random.Random, folder: Path) -> Attempt:
    """Up to four keys with values that their own bounds and choices allow, ends included."""
    chosen = {name: allowed(rng, info, kind) for name, info, kind in rng.sample(KEYS, rng.choice([1, 2, 4]))}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(nested(chosen)))
    return lambda: load_config(path), chosen


def allowed(rng: random.Random, info: Key, kind: Any) -> Any:
    plain, optional = plain_type(kind)
    if optional and rng.random() < 0.2:
        return None
    if info.choices:
        return rng.choice(list(info.choices))
    if item := item_type(plain):
        length = len(info.items) if isinstance(info.items, tuple) else rng.randint(1, min(info.items, 5))
        return [allowed(rng, dataclasses.replace(info, items=1), item) for _ in range(length)]
    if plain is bool:
        return rng.random() < 0.5
    if plain is str:
        return rng.choice(["runs/x", "täst", "a b"])
    if plain not in (int, float):
        return {}
    low, high = info.interval
    share = rng.choice([0, 1, rng.random(), rng.random() ** 8])
    number = plain(low + share * (high - low))
    return number if info.allows(number) else plain(1)


def nested(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return tree


@pytest.mark.slow
def test_every_config_is_usable_or_refused_in_one_line() -> None:
    counts = run(count=150)  # a quarter of what docs/reliability.md counts
    assert counts["traceback"] == counts["wrong"] == 0, counts
    assert counts["right"] >= counts["tried"] // 10, counts
    assert counts["refused"] >= counts["tried"] // 3, counts
