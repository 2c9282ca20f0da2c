"""Files that cannot be converted: one line names the file and the fault, exit code 1, nothing written."""

import io
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparse_seg import load_model
from sparse_seg.cli import main
from sparse_seg.conversion import convert
from sparse_seg.errors import CheckpointError
from tests.conversion.cases import state_of

Fails = Callable[..., str]


class Custom(nn.Module):
    """A class that a pickle would have to run."""


def torchvision() -> dict[str, Tensor]:
    return dict(state_of("torchvision deeplabv3"))


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Fails]:
    """Convert a file that must be refused; the complaint."""
    target = tmp_path / "out/target.safetensors"

    def refused(content: Any, *options: str, suffix: str = ".pth") -> str:
        source = tmp_path / f"source{suffix}"
        if isinstance(content, bytes):
            source.write_bytes(content)
        else:
            torch.save(content, source)
        capsys.readouterr()
        assert main(["convert", str(source), str(target), *options]) == 1
        output, errors = capsys.readouterr()
        assert (output, errors.count("\n")) == ("", 1)
        assert str(source) in errors
        assert "Traceback" not in errors
        return errors

    yield refused
    assert not target.parent.exists() or not list(target.parent.iterdir())


def test_files_that_are_no_checkpoints(fails: Fails, tmp_path: Path) -> None:
    torch.save(torchvision(), tmp_path / "whole.pth")
    torch.save(torchvision(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file({"a": torch.zeros(100)}, tmp_path / "whole.safetensors")
    whole, old, other = ((tmp_path / n).read_bytes() for n in ("whole.pth", "old.pth", "whole.safetensors"))
    cut = (whole[:1000], whole[: len(whole) // 2], whole[:-10], old[: len(old) // 2])
    for content in (*cut, b"", b"a text\n", b"PK\x03\x04 rest"):
        assert "truncated or no PyTorch checkpoint" in fails(content)
    assert "truncated or no safetensors file" in fails(other[:-8], suffix=".safetensors")
    assert "holds a list, not a state dict" in fails([1, 2])
    assert "holds no state dict; its keys are: epoch" in fails({"epoch": 3})
    assert "holds no state dict; its keys are: none" in fails({})
    with pytest.raises(CheckpointError, match=r"none\.pth does not exist"):
        convert(tmp_path / "none.pth")


def test_pickles_that_run_code_need_trust(fails: Fails, tmp_path: Path) -> None:
    content = {"state_dict": torchvision(), "config": Custom()}
    message = fails(content)
    assert re.search(r"holds a pickled \S*Custom, and loading it can run code; .* with --trust", message)
    torch.save(content, tmp_path / "source.pth")
    assert convert(tmp_path / "source.pth", trust=True).checkpoint.origin.arch.startswith("deeplabv3")


def test_a_program_says_what_to_do(fails: Fails) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("a/data.pkl", "a/constants.pkl", "a/code/__torch__.py"):
            archive.writestr(name, b"")
    assert re.search(r"is a TorchScript archive.*torch\.jit\.load\(", fails(buffer.getvalue()))


def test_wrong_networks(fails: Fails) -> None:
    state = torchvision()
    assert "are of no network that can be converted" in fails({"a.weight": torch.zeros(3)})
    for options, message in (
        (("--from", "mmseg"), "its tensors are not named like mmseg's but like torchvision's"),
        (("--arch", "deeplabv3_resnet101"), "it holds a deeplabv3_resnet50, not a deeplabv3_resnet101"),
        (("--num-classes", "19"), "it has 21 classes, not 19"),
        (("--output-stride", "16"), "torchvision's segmentation networks have output stride 8"),
        (("--threshold", "0.4"), "--threshold is for networks of one logit, which it is not"),
        (("--set", "bn_epsilon=1"), "unknown key 'bn_epsilon'; did you mean 'bn_eps'?"),
        (("--set", "aspp_rates=[12]"), "it is no deeplabv3_resnet50: classifier.0.convs.2.1.weight is [6]"),
    ):
        assert message in fails(state, *options)
    message = fails(state_of("cad edge mask 16"), "--output-stride", "8")
    assert "its names tell output stride 16, not 8" in message
    message = fails(state_of("timm resnet50d"))
    assert "it is the classifier resnet50d and has no segmentation head" in message
    assert "add --allow-missing head" in message


def test_tensors_that_do_not_fit(fails: Fails) -> None:
    state, name = torchvision(), "backbone.layer3.1.conv2.weight"
    message = fails(state | {name: state[name][:, :4]})
    assert f"it is no deeplabv3_resnet50: {name} is [32, 4, 3, 3], a deeplabv3_resnet50 has" in message
    assert f"{name} is missing" in fails({key: one for key, one in state.items() if key != name})
    message = fails(state | {"classifier.5.weight": torch.zeros(2, 3), "other": torch.zeros(1)})
    assert "classifier.5.weight [2, 3] has no place in it (and 1 more faults)" in message
    message = fails({f"module.{key}": value for key, value in state.items()} | {name: state[name]})
    assert f"holds {name} twice: as module.{name} and as {name}" in message
    assert "torch.complex64; it must be a plain tensor" in fails(
        state | {name: state[name].to(torch.complex64)}
    )
    assert "it must be a plain tensor" in fails(state | {name: state[name].to_sparse()})
    assert "more values than the file" in fails(state | {name: torch.zeros(1).expand(2**30, 64)})


def test_a_stride_is_not_assumed_against_the_name_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "best_deeplabv3_resnet50_cityscapes_os16_seed1.pth"
    torch.save(state_of("vainf deeplabv3"), path)
    message = "cannot tell the output stride, and its name says 16: add --out"
    with pytest.raises(CheckpointError, match=message):
        convert(path)
    assert convert(path, output_stride=16).checkpoint.config.trained_stride == 16
    torch.save(state_of("cad edge mask"), tmp_path / "os8_modeedges_os16till8.pth")
    assert convert(tmp_path / "os8_modeedges_os16till8.pth").checkpoint.config.trained_stride == 8


def test_backbones_that_pool_before_strides_are_refused_by_name_and_said(tmp_path: Path) -> None:
    """timm's resnetaa and resnetblur have the tensors of plain ResNets."""
    state = state_of("torchvision resnet18")
    torch.save(state, tmp_path / "resnetblur18-0f21a2c3.pth")
    torch.save({"arch": "resnetaa18", "state_dict": state}, tmp_path / "model_best.pth.tar")
    torch.save({"arch": "resnet18", "state_dict": state}, tmp_path / "resnet18.pth")
    for file, name in (("resnetblur18-0f21a2c3.pth", "resnetblur18"), ("model_best.pth.tar", "resnetaa18")):
        with pytest.raises(CheckpointError, match=f"{file}: it is timm's {name} by its name: that it pools"):
            convert(tmp_path / file, allow_missing=["head"])
    (assumed,) = convert(tmp_path / "resnet18.pth", allow_missing=["head"]).checkpoint.origin.assumed
    assert "no anti-aliasing (timm's resnetaa and resnetblur have the same tensors" in assumed


def test_running_counts_may_be_missing(tmp_path: Path) -> None:
    """Files from before PyTorch 0.4.1 have no num_batches_tracked."""
    torch.save({k: one for k, one in torchvision().items() if "num_batches" not in k}, tmp_path / "old.pth")
    convert(tmp_path / "old.pth").write(tmp_path / "new.safetensors")
    model = load_model(tmp_path / "new.safetensors")
    assert model.state_dict()["module.backbone.bn1.num_batches_tracked"] == 0


def test_converted_files_that_do_not_load(tmp_path: Path) -> None:
    torch.save(state_of("timm resnet18d"), tmp_path / "source.pth")
    convert(tmp_path / "source.pth", allow_missing=["head"]).write(tmp_path / "backbone.safetensors")
    with pytest.raises(CheckpointError, match=r"holds a backbone without a head; .* model\.pretrained="):
        load_model(tmp_path / "backbone.safetensors")
    with pytest.raises(CheckpointError, match="is converted already; --to-dense goes back"):
        convert(tmp_path / "backbone.safetensors")
