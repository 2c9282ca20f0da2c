"""Files that cannot be converted: one line names the file and the fault, exit code 1, nothing written."""

import argparse
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sparse_seg import load_model
from sparse_seg.cli import main
from sparse_seg.conversion import convert, read_source
from sparse_seg.errors import CheckpointError
from tests.conversion.cases import state_of


class Custom(nn.Module):
    """A class that a pickle would have to run."""


def torchvision():
    return state_of("torchvision deeplabv3")


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def fails(capsys, tmp_path, content, *options, suffix=".pth", code=1):
    """Convert a file that must be refused; returns the complaint."""
    source, target = tmp_path / f"source{suffix}", tmp_path / "out/target.safetensors"
    if isinstance(content, bytes):
        source.write_bytes(content)
    else:
        torch.save(content, source)
    capsys.readouterr()
    assert main(["convert", str(source), str(target), *options]) == code
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.count("\n") == 1
    assert "Traceback" not in errors
    assert not target.parent.exists() or not list(target.parent.iterdir())
    assert str(source) in errors
    return errors


def test_files_that_are_no_checkpoints(capsys, tmp_path):
    torch.save(torchvision(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for content in (
        whole[:1000],
        whole[: len(whole) // 2],
        whole[:-10],
        b"",
        b"a text\n",
        b"PK\x03\x04 rest",
    ):
        assert "truncated or no PyTorch checkpoint" in fails(capsys, tmp_path, content)
    torch.save(torchvision(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pth").read_bytes()
    assert "truncated or no PyTorch checkpoint" in fails(capsys, tmp_path, old[: len(old) // 2])
    save_file({"a": torch.zeros(100)}, tmp_path / "whole.safetensors")
    cut = (tmp_path / "whole.safetensors").read_bytes()[:-8]
    assert "truncated or no safetensors file" in fails(capsys, tmp_path, cut, suffix=".safetensors")
    assert "holds a list, not a state dict" in fails(capsys, tmp_path, [1, 2])
    assert "holds no state dict; its keys are: epoch" in fails(capsys, tmp_path, {"epoch": 3})
    assert "holds no state dict; its keys are: none" in fails(capsys, tmp_path, {})
    assert main(["convert", str(tmp_path / "none.pth"), str(tmp_path / "x.safetensors")]) == 1
    assert "none.pth is not there" in capsys.readouterr().err


def test_pickles_that_run_code_need_trust(capsys, tmp_path):
    content = {"state_dict": torchvision(), "config": Custom()}
    message = fails(capsys, tmp_path, content)
    assert re.search(r"holds a pickled \S*Custom, and loading it can run code; .* with --trust", message)
    torch.save(content, tmp_path / "source.pth")
    assert convert(tmp_path / "source.pth", trust=True).plan.arch.startswith("deeplabv3")


def test_what_training_scripts_save_beside_weights_needs_none(tmp_path):
    """VainF and CAD: numpy's number; torchvision: the options; mmsegmentation: classes."""
    content = {"model_state": torchvision(), "best_score": np.float64(0.7), "scores": np.float32(2)}
    content |= {"args": argparse.Namespace(lr=0.1), "cur_itrs": 30000}
    content |= {"meta": {"dataset_meta": {"classes": ("road", "sky")}}}
    torch.save(content, tmp_path / "source.pth")
    file = read_source(tmp_path / "source.pth")
    assert file.classes == ["road", "sky"]
    assert [candidate.way for candidate in file.candidates] == ["model_state"]


@pytest.mark.slow
def test_wrong_networks(capsys, tmp_path):
    state = torchvision()
    assert "are of no network that can be converted" in fails(capsys, tmp_path, {"a.weight": torch.zeros(3)})
    wrong = fails(capsys, tmp_path, state, "--from", "mmseg")
    assert "its tensors are not named like mmseg's but like torchvision's" in wrong
    message = fails(capsys, tmp_path, state, "--arch", "deeplabv3_resnet101")
    assert "it holds a deeplabv3_resnet50, not a deeplabv3_resnet101" in message
    assert "it has 21 classes, not 19" in fails(capsys, tmp_path, state, "--num-classes", "19")
    message = fails(capsys, tmp_path, state, "--output-stride", "16")
    assert "torchvision's segmentation networks have output stride 8" in message
    message = fails(capsys, tmp_path, state_of("cad edge mask 16"), "--output-stride", "8")
    assert "its names tell output stride 16, not 8" in message
    message = fails(capsys, tmp_path, state_of("timm resnet50d"))
    assert "it is the classifier resnet50d and has no segmentation head" in message
    assert "add --allow-missing head" in message
    message = fails(capsys, tmp_path, state, "--set", "bn_epsilon=1")
    assert "unknown key 'bn_epsilon'; did you mean 'bn_eps'?" in message
    message = fails(capsys, tmp_path, state, "--set", "aspp_rates=[12]")
    assert "it is no deeplabv3_resnet50: classifier.0.convs.2.1.weight is [6]" in message


def test_a_stride_is_not_assumed_against_the_name_of_the_file(tmp_path):
    path = tmp_path / "best_deeplabv3_resnet50_cityscapes_os16_seed1.pth"
    torch.save(state_of("vainf deeplabv3"), path)
    with pytest.raises(
        CheckpointError, match="cannot tell the output stride, and its name says 16: add --out"
    ):
        convert(path)
    assert convert(path, output_stride=16).config.trained_stride == 16
    torch.save(state_of("cad edge mask"), tmp_path / "os8_modeedges_os16till8.pth")
    assert convert(tmp_path / "os8_modeedges_os16till8.pth").config.trained_stride == 8


def test_backbones_that_pool_before_strides_are_refused_by_name_and_said(tmp_path):
    """timm's resnetaa and resnetblur have the tensors of plain ResNets."""
    state = state_of("torchvision resnet18")
    torch.save(state, tmp_path / "resnetblur18-0f21a2c3.pth")
    torch.save({"arch": "resnetaa18", "state_dict": state}, tmp_path / "model_best.pth.tar")
    torch.save({"arch": "resnet18", "state_dict": state}, tmp_path / "resnet18.pth")
    for file, name in (("resnetblur18-0f21a2c3.pth", "resnetblur18"), ("model_best.pth.tar", "resnetaa18")):
        with pytest.raises(CheckpointError, match=f"{file}: it is timm's {name} by its name: that it pools"):
            convert(tmp_path / file, allow_missing=["head"])
    (assumed,) = convert(tmp_path / "resnet18.pth", allow_missing=["head"]).plan.assumed
    assert "no anti-aliasing (timm's resnetaa and resnetblur have the same tensors" in assumed


def test_tensors_that_do_not_fit(capsys, tmp_path):
    state, name = torchvision(), "backbone.layer3.1.conv2.weight"
    grouped = state | {name: state[name][:, :4]}
    message = fails(capsys, tmp_path, grouped)
    assert f"it is no deeplabv3_resnet50: {name} is [32, 4, 3, 3], a deeplabv3_resnet50 has" in message
    assert f"{name} is missing" in fails(capsys, tmp_path, without(state, name))
    extra = state | {"classifier.5.weight": torch.zeros(2, 3), "other": torch.zeros(1)}
    message = fails(capsys, tmp_path, extra)
    assert "classifier.5.weight [2, 3] has no place in it (and 1 more faults)" in message
    twice = {f"module.{key}": value for key, value in state.items()} | {name: state[name]}
    assert f"holds {name} twice: as module.{name} and as {name}" in fails(capsys, tmp_path, twice)


def test_running_counts_may_be_missing(tmp_path):
    """Files from before PyTorch 0.4.1 have no num_batches_tracked."""
    state = {key: value for key, value in torchvision().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "old.pth")
    conversion = convert(tmp_path / "old.pth")
    conversion.write(tmp_path / "new.safetensors")
    model = load_model(tmp_path / "new.safetensors")
    assert model.state_dict()["module.backbone.bn1.num_batches_tracked"] == 0


@pytest.mark.parametrize(
    ("wrap", "notes"),
    [
        (lambda s: s, []),
        (lambda s: {"model": s, "epoch": 3}, ["unwrapped from model"]),
        (lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "hyper": [1]},
         ["unwrapped from state_dict", "prefix model. stripped"]),
        (lambda s: {"model_state": {f"module.{k}": v for k, v in s.items()}},
         ["unwrapped from model_state", "wrapper module stripped from names"]),
        (lambda s: {"model": {k: v * 2 for k, v in s.items()},
                    "model_ema": {"n_averaged": torch.tensor(3)} | {f"module.{k}": v for k, v in s.items()}},
         ["unwrapped from model_ema", "wrapper module stripped from names"]),
        (lambda s: {"state_dict": s, "ema_state_dict": {k: v * 2 for k, v in s.items()}},
         ["unwrapped from state_dict"]),
        (lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}, "state_dict_ema": None},
         ["unwrapped from state_dict", "wrapper _orig_mod, module stripped from names"]),
    ],
)  # fmt: skip
def test_wrappers(tmp_path, wrap, notes):
    state = torchvision()
    torch.save(wrap(state), tmp_path / "wrapped.ckpt")
    named = convert(tmp_path / "wrapped.ckpt").named
    assert named.notes == notes
    assert named.tensors.keys() == state.keys()
    assert all(torch.equal(named.tensors[key], value) for key, value in state.items())


def test_converted_files_that_do_not_load(tmp_path):
    torch.save(state_of("timm resnet18d"), tmp_path / "source.pth")
    convert(tmp_path / "source.pth", allow_missing=["head"]).write(tmp_path / "backbone.safetensors")
    with pytest.raises(CheckpointError, match=r"holds a backbone without a head; .* model\.pretrained="):
        load_model(tmp_path / "backbone.safetensors")
    with pytest.raises(CheckpointError, match="is converted already; --to-dense goes back"):
        convert(tmp_path / "backbone.safetensors")
    data = (tmp_path / "backbone.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="is truncated or no safetensors file"):
        load_model(tmp_path / "cut.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(
        CheckpointError, match="was not written by sparse_seg; convert it first: sparse-seg convert"
    ):
        load_model(tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "none.safetensors")
