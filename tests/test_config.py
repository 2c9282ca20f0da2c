"""Strict configs: bases, overrides, and what a mistake is told."""

import dataclasses
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparse_seg.config import (
    Config,
    DataConfig,
    DistillConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    TrainConfig,
    all_keys,
    check_config,
    check_training,
    config_from_dict,
    load_config,
    model_config,
    num_classes,
    to_dict,
    to_yaml,
)
from sparse_seg.config.keys import type_name
from sparse_seg.errors import ConfigError
from sparse_seg.sites import ENGINES, EXCHANGES

SECTIONS = (Config, ModelConfig, MaskConfig, DataConfig, TrainConfig, LossConfig, DistillConfig)
ROOT = Path(__file__).parents[1]


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


# those of configs/ablation are grids, see tests/ablation/test_grid.py
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "ablation"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load(path):
    assert isinstance(load_config(path), Config)


def test_bases_then_file_then_overrides(tmp_path):
    write(tmp_path, "train: {lr: 0.1, momentum: 0.5}\nmodel: {width: 0.5}", "one.yaml")
    write(tmp_path, "_base_: one.yaml\ntrain: {lr: 0.2}", "two.yaml")
    path = write(tmp_path, "_base_: [one.yaml, two.yaml]\ndata: {root: here}")
    config = load_config(path, ["model.mask.fine_fraction=0.3", "data.mean=[0, 0.5, 1]", "train.lr=1"])
    assert (config.train.lr, config.train.momentum, config.model.width) == (1, 0.5, 0.5)
    assert (config.data.root, config.data.mean, config.model.mask.fine_fraction) == ("here", [0, 0.5, 1], 0.3)


def test_home_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "data: {root: ~/frames}\ntrain: {distill: {cache: ~/kept, teacher: ~/t.pt}}", "base.yaml")
    path = write(tmp_path, "_base_: ~/base.yaml\nmodel: {pretrained: ~/r18.pth}", "here.yaml")
    config = load_config(path, ["train.init=~/init.pt"])
    found = [config.data.root, config.train.distill.cache, config.train.distill.teacher, config.train.init]
    names = ["frames", "kept", "t.pt", "init.pt", "r18.pth"]
    assert [*found, config.model.pretrained] == [str(tmp_path / name) for name in names]
    assert load_config(path, ["data.root=a~b"]).data.root == "a~b"
    texts = {name: info for name, info, kind, _ in all_keys(Config) if kind in (str, str | None)}
    others = [name for name, info in texts.items() if not info.choices and not info.path]
    assert others == ["model.module"], "a text that names no path stands here"


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("5E-4", 5e-4), ("1.e+1", 10), ("2", 2)])
def test_numbers_with_an_exponent_are_numbers(tmp_path, text, value):
    path = write(tmp_path, f"train: {{lr: {text}}}")
    assert load_config(path, [f"train.weight_decay={text}"]).train.lr == value
    assert load_config(path, [f"train.weight_decay={text}"]).train.weight_decay == value


def test_resolved_yaml_comes_back_the_same(tmp_path):
    config = load_config(write(tmp_path, "train: {loss: {ohem_threshold: 0.7}}\ndata: {crop: [64, 96]}"))
    assert load_config(write(tmp_path, to_yaml(config), "again.yaml")) == config
    assert config_from_dict(to_dict(config), "dict") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {learning_rate: 1}", "unknown key 'train.learning_rate'"),
        ("train: {momentun: 1}", "unknown key 'train.momentun'; did you mean 'train.momentum'?"),
        ("fine_fraction: 0.2", "unknown key 'fine_fraction'; did you mean 'model.mask.fine_fraction'?"),
        ("train: {lr: fast}", "'train.lr' must be a number, not 'fast'"),
        ("train: {iterations: 1.5}", "'train.iterations' must be a whole number, not 1.5"),
        ("train: {amp: 1}", "'train.amp' must be true or false, not 1"),
        ("model: {backbone: 18}", "'model.backbone' must be a text, not 18"),
        ("data: {crop: [64, big]}", "'data.crop', item 2, must be a whole number, not 'big'"),
        ("model: edge", "'model' holds keys of its own"),
        ("model: {backbone: resnet19}", "model.backbone is 'resnet19'; did you mean 'resnet18'"),
        ("data: {crop: [64]}", "data.crop must be [height, width]"),
        ("train: {loss: {class_weights: [1, 2]}}", "class_weights has 2 values for 19 classes"),
        ("train: {lr: 1}\ntrain: {seed: 1}", "key 'train' is given twice"),
        ("- a list", "must hold keys and values"),
        ("a: [", "is not valid YAML"),
        ("a: 2020-99-99", "is not valid YAML"),
        ("_base_: missing.yaml", "missing.yaml does not exist"),
        ("_base_: config.yaml", "circle"),
        ("_base_: 3", "_base_ must be a file name or a list of them, not 3"),
        ("data: {root: '${HOME}/x'}", "'data.root' is '${HOME}/x'; write the text itself"),
        ("data: {root: '???'}", "'data.root' is '???'; write the text itself"),
        ("train: {lr: '${train.momentum}'}", "'train.lr' must be a number"),
        ("1: 2", "unknown key '1'"),
        ("[" * 999, "is not valid YAML: nested too deep"),
        ("model: &a {mask: *a}", "unknown key 'model.mask.mask'"),
        ('model: {head_options: {k: ["\\e[31m"]}}', r"'model.head_options' is '\x1b[31m'; write a text"),
        ("model: {head_options: &a {k: *a}}", "must be names with plain, finite values, not {'k': {...}}"),
        ("model: *a", "undefined alias"),
        ("#" * 2**18 + "#", "has more than 262144 bytes"),
        ("0", "must hold keys and values, not a int"),
        ("---\na: 1\n---\nb: 1", "expected a single document"),
        ("train:\n\tlr: 1", "cannot start any token in line 2"),
        ("a: !!bool x", "a value does not fit its tag"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("? [a]\n: 1", "found unhashable key"),
        ("train: {seed: " + "9" * 5000 + "}", "is not valid YAML: Exceeds the limit"),
        ("train: {seed: 0x" + "f" * 5000 + "}", "train.seed is a huge int; it must lie in"),
        ("train: {lr: 0x" + "f" * 5000 + "}", "train.lr is inf; it must lie in"),
        ("train: {seed: 1e20}", "'train.seed' must be a whole number"),
        ("data: {crop: [16384, 16384]}\ntrain: {batch_size: 9}", "makes more than 2147483648 pixels a step"),
        ("data: {mean: [123.675, 116.28, 103.53]}", "these look like 0..255; divide by 255"),
        ('data: {root: "a\\0b"}', r"'data.root' is 'a\x00b'; write a text"),
        ('data: {root: "\\ud800"}', r"'data.root' is '\ud800'; write a text"),
        ('_base_: "a\\0b"', "embedded null byte"),
        ('"\\e[31mred": 1', r"unknown key '\x1b[31mred'"),
        ("model: {head_options: {k: .nan}}", "must be names with plain, finite values, not {'k': nan}"),
        ("model: {head_options: {1: 2}}", "must be names with plain, finite values, not {1: 2}"),
        (
            "model: {mask: {options: {d: 2020-01-01}}}",
            "must be names with plain, finite values, not {'d': datetime.date(2020, 1, 1)}",
        ),
        ("model: {mask: {options: 3}}", "'model.mask.options' must be names with plain, finite values"),
    ],
)
def test_mistakes_and_hostile_files_are_named_in_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(write(tmp_path, text))
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()


def test_values_out_of_bounds_name_their_key():
    for name, info, kind, _ in all_keys(Config):
        low, high = info.interval if info.bounds else (0, 0)
        ends = [*([low] if info.bounds[:1] == "(" else []), *([high] if info.bounds[-1:] == ")" else [])]
        for value in [low - 1, high + 1, math.nan, *ends] if info.bounds else []:
            number = int(value) if "whole" in type_name(kind) and math.isfinite(value) else float(value)
            length = len(info.items) if isinstance(info.items, tuple) else 1
            tree: Any = [number] * length if "list" in type_name(kind) else number
            for part in reversed(name.split(".")):
                tree = {part: tree}
            with pytest.raises(ConfigError, match=re.escape(name)):
                config_from_dict(tree, "test")
    with pytest.raises(ConfigError, match=r"^train.warmup_iterations is 1000; it must be below"):
        config_from_dict({"train": {"warmup_iterations": 1000}}, "test")


LEARNED, MODULE = "model.mask.policy=learned", "model.module=a.b:c"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "model.merge=patch model.dilate_second=false",
            "needs a coarse pass that does not depend on the mask",
        ),
        ("model.merge=patch model.exchange=separate", "needs a coarse pass that does not depend on the mask"),
        (
            "model.head=deeplabv3 model.aspp_rates=[3,6]",
            "is [24, 48] px; run selective, each must divide by 16",
        ),
        ("data.on_device=true data.cache=true", "data.on_device keeps the frames"),
        (f"{LEARNED} train.distill.teacher=x.pt", "train the network first"),
        ("train.loss.boundary_weight=1 train.loss.ohem_threshold=0.7", "choose either ohem_threshold or"),
        ("model.mask.policy=gain", "then run sparse-seg fit-gain"),
        ("train.freeze=true", "leaves nothing to train but a learned mask"),
        (f"{LEARNED} train.mask_loss=supervised", "set train.freeze=true"),
        (f"{LEARNED} model.strides=[4,8,16]", "needs two strides and a budget"),
        (f"{LEARNED} model.mask.threshold=0.1", "needs two strides and a budget"),
        (f"{MODULE} model.auxiliary=true", "model.auxiliary=true is of sparse_seg's own networks"),
        (f"{MODULE} model.width=0.5", "model.width is of sparse_seg's own networks, not of model.module"),
        ("model.module_args.a=1", "model.module_args are arguments of model.module"),
    ],
)
def test_settings_that_exclude_each_other_are_named(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_training(load_config(write(tmp_path, ""), settings.split()))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "write key=value"),
        ("train.lrr=1", r"did you mean 'train\.lr'"),
        ("train.lr=[", "not valid YAML"),
    ],
)
def test_override_mistakes_are_named(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, ""), [override])


def test_missing_file_names_its_neighbour(tmp_path):
    write(tmp_path, "", "camvid_r18.yaml")
    with pytest.raises(ConfigError, match=r"does not exist; did you mean 'camvid_r18\.yaml'"):
        load_config(tmp_path / "camvid_r81.yaml")


def test_model_config_sources(tmp_path):
    from_path = model_config(write(tmp_path, "model: {width: 0.5}\ndata: {dataset: camvid}"))
    assert (from_path.width, from_path.num_classes) == (0.5, 11)
    assert model_config({"backbone": "resnet50", "num_classes": 7}).num_classes == 7
    assert model_config({"model": {"width": 2.0}, "data": {"dataset": "camvid"}}).num_classes == 11
    assert num_classes(Config()) == 19
    with pytest.raises(ConfigError, match=r"unknown key 'backbon'; did you mean 'backbone'"):
        model_config({"backbon": "resnet50"})


def test_every_number_is_bounded_and_every_default_valid():
    check_config(Config())
    for name, info, kind, _ in all_keys(Config):
        numbers = "number" in type_name(kind) and not info.choices
        assert bool(info.bounds) == numbers, name
        assert all(math.isfinite(bound) for bound in (info.interval if numbers else ())), name
    fields = sum(len(dataclasses.fields(schema)) for schema in SECTIONS)
    assert fields == len(list(all_keys(Config))) + len(SECTIONS) - 1  # one without `key` is not checked


def test_choices_are_those_of_the_parts():
    choices = {name: tuple(info.choices) for name, info, _, _ in all_keys(Config)}
    assert (choices["model.exchange"], choices["model.engine"]) == (EXCHANGES, ENGINES)


def test_configs_load_without_any_model_or_dataset():
    program = """
import sys
from sparse_seg.config import load_config
load_config("configs/camvid_mask.yaml", ["train.loss.class_weights=null"])
print(*sorted(name for name in sys.modules if name.startswith("sparse_seg.") or name in ("torch", "cv2")))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    others = [name for name in run.stdout.split() if not name.startswith("sparse_seg.config")]
    assert others == ["sparse_seg.errors", "sparse_seg.registry", "sparse_seg.version"]


def test_what_is_no_text_file_is_one_line(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(bytes(range(256)))
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for name in ("bytes.yaml", "pipe.yaml", "loop.yaml", "", "x" * 5000, "a\0b"):
        with pytest.raises(ConfigError) as caught:
            load_config(f"{tmp_path}/{name}")
        assert "\n" not in str(caught.value)


def test_utf16_and_marks_are_read(tmp_path):
    path = tmp_path / "config.yaml"
    for content in ("train: {seed: 3}\r\n".encode("utf-16"), b"\xef\xbb\xbftrain: {seed: 3}\r\n"):
        path.write_bytes(content)
        assert load_config(path).train.seed == 3


def test_options_of_parts_pass_through(tmp_path):
    path = write(tmp_path, "model: {head_options: {k: 1, deep: {a: [1, x, null]}}}")
    config = load_config(path, ["model.head_options.k=3", "model.mask.options.z=[0.5]"])
    assert config.model.head_options == {"k": 3, "deep": {"a": [1, "x", None]}}
    assert config.model.mask.options == {"z": [0.5]}
    assert load_config(write(tmp_path, to_yaml(config), "again.yaml")) == config
