"""`convert --module`: any module and its weights to a file with its graph; strict, and told in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg import load_model
from sparse_seg.checkpoint import load
from sparse_seg.conversion import convert_module, to_dense
from sparse_seg.conversion.mapping import dense_tensors
from sparse_seg.conversion.verify import verify
from sparse_seg.errors import CheckpointError
from tests import captured
from tests.cli.commands import said as run
from tests.conversion.cases import same
from tests.peers import package
from tests.reference import relative_error

Weights = dict[str, Tensor]


def weights(classes: int = 3) -> Weights:
    return captured.trained(classes).state_dict()


def test_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SRC and DST may stand behind --args, as in docs/converting.md."""
    (tmp_path / "classes.yaml").write_text("names: [road, sky, tree]")
    torch.save(weights(), tmp_path / "net.pth")
    files, module = (tmp_path / "net.pth", tmp_path / "net.safetensors"), ("--module", captured.NAME)
    classes = ("--classes", tmp_path / "classes.yaml", "--verify")
    text = run(capsys, "convert", *classes, *module, "--args", "classes=3", "width=4", *files)
    assert (
        "3 classes, trained at output stride 8, strides [8, 16], convolutions: 2 early, 4 rows, 0 late"
        in text
    )
    assert "of dense OS8's multiply-adds are on rows" in text
    assert text.count("\nok ") == 4
    assert "P1: coarse sites" in text
    assert "P2: logits, all-fine" in text
    assert "P4: a refined" in text
    found, images = load_model(tmp_path / "net.safetensors"), torch.randn(1, 3, 65, 97)
    assert relative_error(found.dense(images, 8), captured.trained()(images)["out"]) < 1e-5
    assert found.card is not None
    assert found.card.names == ("road", "sky", "tree")
    assert (found.policy.name, found.settings.module) == ("confidence", captured.NAME)
    assert same(to_dense(tmp_path / "net.safetensors"), weights())
    run(capsys, "convert", *files, *module, "--set", "model.strides=[16,32]", "mask.policy=edge")
    changed = load_model(tmp_path / "net.safetensors")
    assert (changed.strides, changed.policy.name) == ((16, 32), "edge")


def renamed(change: Callable[[str], str]) -> Weights:
    return {change(name): tensor for name, tensor in weights().items()}


def without(name: str) -> Weights:
    return {key: tensor for key, tensor in weights().items() if key != name}


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "missing": (lambda: without("head.bias"), r"head\.bias is missing; check --args"),
    "left over": (lambda: {**weights(), "other.x": torch.ones(3)}, r"other\.x has no place"),
    "two left over": (lambda: weights() | {"a": torch.ones(1), "b": torch.ones(1)}, r"\(and 1 more\)"),
    "beside it": (
        lambda: renamed("net.{}".format) | {"other.x": torch.ones(3)},
        "place in it; .* --drop other",
    ),
    "another shape": (lambda: weights(5), r"head\.weight is \[5, 8, 1, 1\], the model's is \[3, 8, 1, 1\]"),
    "no numbers": (
        lambda: weights() | {"head.bias": torch.full((3,), float("nan"))},
        r"head\.bias holds NaN",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named(tmp_path: Path, what: str) -> None:
    make, message = WRONG[what]
    torch.save(make(), tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=message):
        convert_module(tmp_path / "net.pth", captured.NAME, {})


def test_a_part_of_a_file_is_taken(tmp_path: Path) -> None:
    beside = {"loss.x": torch.ones(3), "mean": torch.zeros(3), "std": torch.ones(3)}
    counted = {name: one for name, one in renamed("net.{}".format).items() if "num_batches" not in name}
    torch.save(counted | beside, tmp_path / "net.pth")  # older files have no counters
    found = convert_module(tmp_path / "net.pth", captured.NAME, {})
    assert "prefix net. stripped" in found.report
    assert "left out 3 tensors: mean, std, loss.x" in found.report
    assert (found.checkpoint.mean, found.checkpoint.std) == ((0.0,) * 3, (1.0,) * 3)
    torch.save(renamed("net.{}".format) | {"other.x": torch.ones(3)}, tmp_path / "net.pth")
    assert convert_module(tmp_path / "net.pth", captured.NAME, {}, prefix="net")
    assert convert_module(tmp_path / "net.pth", captured.NAME, {}, drop=["other."])


class Worded(captured.Net):
    """Its own names have the words of losses, scalings and wrappers."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.module, self.loss = self.late, self.head
        self.mean = nn.Buffer(torch.zeros(3, 1, 1))
        del self.late, self.head

    def forward(self, images: Tensor) -> Tensor:
        logits = self.loss(self.module(self.early(images - self.mean)) * self.scale)
        return F.interpolate(logits, images.shape[2:], mode="bilinear")


def test_names_of_the_modules_own_stay(tmp_path: Path) -> None:
    state = Worded().state_dict()
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "net.pth")
    found = convert_module(tmp_path / "net.pth", f"{__name__}:Worded", {}).checkpoint
    assert same(dense_tensors(found), state)


def test_errors_are_one_line_and_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(weights(), tmp_path / "net.pth")
    files = tmp_path / "net.pth", tmp_path / "net.safetensors"
    for arguments, code, message in (
        (("--module", "nothing:at_all"), 1, "nothing cannot be imported"),
        (("--module", captured.NAME, "--num-classes", 4), 1, "has 3 classes, not 4"),
        (("--module", captured.NAME, "--args", "classes=4"), 1, "head.weight is [3, 8, 1, 1]"),
        (("--module", captured.NAME, "--set", "width=2"), 1, "model.width is of sparse_seg's own networks"),
        (("--module", captured.NAME, "--set", "mask.policy=most"), 1, "mask.policy is 'most'"),
        (("--module", captured.NAME, "--set", "mask=3"), 1, "'mask' holds keys of its own"),
        (("--module", captured.NAME, "--set", "model=3"), 1, "'model' holds keys of its own"),
        (("--module", captured.NAME, "--args", "classes=[3"), 1, "--args 'classes=[3'"),
    ):
        error = run(capsys, "convert", *files, *arguments, code=code)
        assert message in error
        assert error.count("\n") == 1
    assert not files[1].exists()


def test_what_mixes_phases_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(captured.trained(mixing=True).state_dict(), tmp_path / "net.pth")
    files = tmp_path / "net.pth", tmp_path / "net.safetensors"
    module = ("--module", captured.NAME, "--verify", "--args", "mixing=true")
    text = run(capsys, "convert", *files, *module)
    assert "P1 does not hold: coarse sites depend on the mask" in text
    assert "conv2d in late.1.0 mixes phases" in text


@pytest.mark.slow
def test_a_real_network(tmp_path: Path) -> None:
    """torchvision's LR-ASPP, which pools inside the rows: P1 and P4 hold, P2 but for the pooled vectors."""
    segmentation = package("torchvision.models.segmentation")
    arguments = {"num_classes": 5, "weights": None, "weights_backbone": None}
    torch.manual_seed(0)
    module = segmentation.lraspp_mobilenet_v3_large(**arguments)
    torch.save(module.state_dict(), tmp_path / "net.pth")
    name = "torchvision.models.segmentation:lraspp_mobilenet_v3_large"
    conversion = convert_module(tmp_path / "net.pth", name, arguments)
    conversion.write(tmp_path / "net.safetensors")
    network = load_model(tmp_path / "net.safetensors")
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert relative_error(network.dense(images, 16), module.eval()(images)["out"]) < 1e-5
    assert all(one.agrees for one in verify(network) if one.must)
    assert load(tmp_path / "net.safetensors").config.module == name
