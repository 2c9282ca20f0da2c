"""Strict configs: bases, overrides, and what a mistake is told."""

from pathlib import Path

import pytest

from sparse_seg.config import (
    Config,
    config_from_dict,
    load_config,
    model_config,
    num_classes,
    to_dict,
    to_yaml,
)
from sparse_seg.errors import ConfigError

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
        ("train: {learning_rate: 1}", r"unknown key 'train\.learning_rate'"),
        ("train: {momentun: 1}", r"unknown key 'train\.momentun'; did you mean 'train\.momentum'\?"),
        ("fine_fraction: 0.2", r"unknown key 'fine_fraction'; did you mean 'model\.mask\.fine_fraction'\?"),
        ("train: {lr: fast}", r"'train\.lr' must be a number, not 'fast'"),
        ("train: {iterations: 1.5}", r"'train\.iterations' must be a whole number, not 1\.5"),
        ("train: {amp: 1}", r"'train\.amp' must be true or false, not 1"),
        ("model: {backbone: 18}", r"'model\.backbone' must be a text, not 18"),
        ("data: {crop: [64, big]}", r"'data\.crop' must be a list, each a whole number"),
        ("model: edge", r"'model' holds keys of its own"),
        ("model: {backbone: resnet19}", r"model\.backbone is 'resnet19'; did you mean 'resnet18'"),
        ("model: {engine: spcnov}", r"model\.engine is 'spcnov'; did you mean 'spconv'"),
        ("model: {mask: {policy: edges}}", r"model\.mask\.policy is 'edges'; did you mean 'edge'"),
        ("model: {mask: {fine_fraction: 2}}", r"fine_fraction is 2\.0; it must lie in \[0, 1\]"),
        ("data: {dataset: citiscapes}", r"data\.dataset is 'citiscapes'; did you mean 'cityscapes'"),
        ("data: {crop: [64]}", r"data\.crop must be \[height, width\]"),
        ("train: {batch_size: 0}", r"train\.batch_size is 0; it must lie in \[1, 65536\]"),
        ("train: {loss: {class_weights: [1, 2]}}", r"class_weights has 2 values for 19 classes"),
        ("model: {head: deeplabv3}\ntrain: {batch_size: 1}", r"batch_size must be 2 or more"),
        ("train: {lr: 1}\ntrain: {seed: 1}", r"key 'train' stands twice"),
        ("model: {width: 1, width: 2}", r"key 'width' stands twice"),
        ("- a list", "must hold keys and values"),
        ("a: [", "is not valid YAML"),
        ("a: 2020-99-99", "is not valid YAML"),
        ("_base_: missing.yaml", r"missing\.yaml does not exist"),
        ("_base_: config.yaml", "circle"),
        ("_base_: 3", r"_base_ must be a file name or a list of them, not 3"),
        ("_base_: [a.yaml, null]", r"_base_ must be a file name or a list of them"),
        ("_base_:", r"_base_ must be a file name or a list of them, not None"),
        ("data: {root: '${HOME}/x'}", r"'data\.root' is '\$\{HOME\}/x'; write the text itself"),
        ("data: {root: '${'}", r"'data\.root' is '\$\{'; write the text itself"),
        ("data: {root: '???'}", r"'data\.root' is '\?\?\?'; write the text itself"),
        ("train: {lr: '${train.momentum}'}", r"'train\.lr' must be a number"),
        ("1: 2", "unknown key '1'"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        *("data.jitter=1", "data.workers=-1", "data.std=[1, 0, 1]", "data.mean=[0, .nan, 0]"),
        *("train.seed=-1", "train.threads=0", "train.lr=0", "train.lr=.nan", "train.lr=.inf"),
        *("train.warmup_iterations=-1", "train.warmup_iterations=1000", "train.poly_power=-1"),
        *("train.weight_decay=-1e-4", "train.momentum=1", "train.clip_grad_norm=0", "train.ema_decay=1"),
        *("train.eval_images=0", "train.loss.ohem_threshold=1", "train.loss.ohem_min_kept=1.1"),
        *("train.loss.auxiliary_weight=-1", f"train.loss.class_weights={[-1] * 19}"),
        *("model.head_channels=0", "model.width=0", "model.width=.inf", "model.num_classes=1"),
        *("model.aspp_rates=[]", "model.aspp_rates=[0]", "model.mask.threshold=.inf"),
    ],
)
def test_impossible_values_name_their_key(tmp_path, override):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, ""), [override])
    assert str(caught.value).startswith(override.partition("=")[0])
    assert "\n" not in str(caught.value)


def test_rates_that_cannot_run_selective_are_refused(tmp_path):
    settings = ["model.head=deeplabv3", "model.aspp_rates=[3, 6]"]
    with pytest.raises(ConfigError, match=r"aspp_rates x trained_stride is \[24, 48\] px; .* divide by 16"):
        load_config(write(tmp_path, ""), settings)
    assert load_config(write(tmp_path, ""), [*settings, "model.trained_stride=16"])


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
