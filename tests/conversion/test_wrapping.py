"""Whatever a network is wrapped in: other state dicts, prefixes, what training keeps beside it."""

import argparse
import pathlib
import sys
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_seg import load_model
from sparse_seg.checkpoint import load
from sparse_seg.cli import main
from sparse_seg.config import load_config
from sparse_seg.conversion import Conversion, convert, to_dense
from sparse_seg.conversion.mapping import dense_tensors
from sparse_seg.errors import CheckpointError
from tests.conversion.cases import network_of, same, state_of
from tests.reference import relative_error

State = dict[str, Tensor]
WHOLE: State = dict(state_of("torchvision fcn"))
LEARNT = {key: value for key, value in WHOLE.items() if not key.endswith(("_mean", "_var", "tracked"))}
DOUBLED = {key: value * 2 for key, value in WHOLE.items()}


def under(prefix: str, state: Mapping[str, Tensor] = WHOLE) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def named(before: str, after: str, first: str = "") -> State:
    return {first + name.replace(before, after): tensor for name, tensor in WHOLE.items()}


def converted(folder: Path, content: Any, **options: Any) -> Conversion:
    torch.save(content, folder / "source.pth")
    return convert(folder / "source.pth", **options)


def tensors(conversion: Conversion) -> State:
    """By the way back."""
    return dense_tensors(conversion.checkpoint)


BESIDE: Any = {"state_dict": WHOLE, "folder": pathlib.PurePosixPath("data"), "here": pathlib.Path("x")}
BESIDE |= {"log": pathlib.PureWindowsPath("log"), "class_iou": np.zeros(3), "names": np.array(["road"])}
BESIDE |= {
    "best": np.float32(1),
    "score": np.float64(0.7),
    "args": argparse.Namespace(lr=0.1),
    "iteration": 3,
}
CUT = {key: one for key, one in WHOLE.items() if key != "backbone.layer3.0.bn2.bias"}
METRICS = {"val_iou.confmat": torch.zeros(21, 21), "metrics.f1.tp": torch.zeros(2)}
WRAPPED: dict[str, tuple[Any, str]] = {  # what stands in a file, and what the report says
    "plain": (WHOLE, "left over none; missing: none"),
    "Lightning": ({"state_dict": under("model."), "hyper": [1]}, "prefix model. stripped"),
    "DataParallel": ({"model_state": under("module.")}, "wrapper module stripped from names"),
    "two wrappers": (
        {"model": under("module._orig_mod."), "ema": None},
        "wrapper _orig_mod, module stripped",
    ),
    "compiled part": (named("backbone.", "backbone._orig_mod."), "wrapper _orig_mod"),
    "checkpointed": (named("r3.0.", "r3.0._checkpoint_wrapped_module."), "wrapper _checkpoint"),
    "FSDP": (named(".0.", ".0._fsdp_wrapped_module.", "_fsdp_wrapped_module."), "wrapper _fsdp"),
    "deeper": (under("student.segmentor."), "prefix student.segmentor. stripped"),
    "arrays": ({"net": {name: one.numpy() for name, one in WHOLE.items()}}, "unwrapped from net"),
    "values beside": (BESIDE, "unwrapped from state_dict"),
    "an average": (
        {"model": DOUBLED, "model_ema": {"n_averaged": torch.tensor(3), **under("module.")}},
        "unwrapped from model_ema",
    ),
    "mmengine's": ({"state_dict": WHOLE, "ema_state_dict": DOUBLED}, "unwrapped from state_dict"),
    "deeper average": ({"model": DOUBLED, "ema": {"module": WHOLE}}, "unwrapped from ema > module"),
    "a list": (
        {"model": WHOLE, "ema": {"shadow": list(LEARNT.values())}},
        "over ema: it holds no tensors by name",
    ),
    "no network": (
        {"model": WHOLE, "ema": {"head": torch.zeros(3)}},
        "over ema: its names (head, ...) are of no",
    ),
    "incomplete": ({"model": WHOLE, "ema": CUT}, "passed over ema: it is no fcn_resnet50: "),
    "a loss": (WHOLE | {"criterion.weight": torch.ones(21)}, "left out 1 tensors: criterion.weight"),
    "a loss's network": (
        WHOLE | {"percep_loss.f.0.weight": torch.ones(3)},
        "out 1 tensors: percep_loss.f.0.weight",
    ),
    "metrics": (WHOLE | METRICS, "left out 2 tensors: val_iou.confmat, metrics.f1.tp"),
    "no tensors": ({**under("model."), "epoch": 5}, "left out, as no tensors: epoch (int)"),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_network_is_found_in_what_it_is_wrapped(how: str, tmp_path: Path) -> None:
    content, note = WRAPPED[how]
    conversion = converted(tmp_path, content)
    assert same(tensors(conversion), WHOLE)
    assert note in conversion.report


def test_an_average_without_buffers_takes_those_of_the_model(tmp_path: Path) -> None:
    average = {key: DOUBLED[key] for key in LEARNT}
    conversion = converted(tmp_path, {"model": WHOLE, "ema": average})
    assert same(tensors(conversion), WHOLE | average)
    assert "unwrapped from ema, with the buffers of model" in conversion.report


def test_a_student_beside_its_teacher_is_chosen_by_prefix(tmp_path: Path) -> None:
    content = {"state_dict": under("student.") | under("teacher.", DOUBLED)}
    message = r"networks under student\. and teacher\.; choose one with --prefix"
    with pytest.raises(CheckpointError, match=message):
        converted(tmp_path, content)
    assert same(tensors(converted(tmp_path, content, prefix="teacher")), DOUBLED)
    assert same(tensors(converted(tmp_path, content, drop=["teacher."])), WHOLE)
    with pytest.raises(CheckpointError, match="it has no tensor under the prefix 'pupil"):
        converted(tmp_path, content, prefix="pupil")


def test_what_is_of_no_known_use_is_named_with_the_way_to_leave_it_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = r"projector\.0\.weight has no place in it; .* --drop projector"
    with pytest.raises(CheckpointError, match=message):
        converted(tmp_path, under("model.") | {"projector.0.weight": torch.ones(3)})
    command = ["convert", str(tmp_path / "source.pth"), str(tmp_path / "a.safetensors")]
    assert main([*command, "--drop", "projector"]) == 0
    assert "left out 1 tensors: projector.0.weight" in capsys.readouterr().out
    assert main([*command, "--prefix", "model"]) == 0
    assert same(to_dense(tmp_path / "a.safetensors"), WHOLE)


@pytest.mark.parametrize(
    ("mean", "std", "known"),
    [([0.0] * 3, [1.0] * 3, (0.0, 1.0)), ([127.5] * 3, [255.0] * 3, (0.5, 1.0))],
)
def test_mean_and_std_of_the_file_are_used(
    mean: list[float], std: list[float], known: tuple[float, float], tmp_path: Path
) -> None:
    buffers = {"mean": torch.tensor(mean).view(1, 3, 1, 1), "std": torch.tensor(std).view(1, 3, 1, 1)}
    converted(tmp_path, {"state_dict": under("model.") | buffers}).write(tmp_path / "a.safetensors")
    found = load(tmp_path / "a.safetensors")
    assert (found.mean, found.std) == ((known[0],) * 3, (known[1],) * 3)
    (tmp_path / "a.yaml").write_text(f"data: {{root: {tmp_path}, dataset: voc}}")
    message = r"trained with data\.mean .*; train again or use --set data\.mean="
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "a.safetensors", load_config(tmp_path / "a.yaml"))
    values = [f"data.mean={[known[0]] * 3}", f"data.std={[known[1]] * 3}"]
    load_model(tmp_path / "a.safetensors", load_config(tmp_path / "a.yaml", values))


def test_mean_and_std_may_be_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.save(WHOLE, tmp_path / "source.pth")
    command = ["convert", str(tmp_path / "source.pth"), str(tmp_path / "a.safetensors")]
    assert main(command) == 0
    said = "mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225] (ImageNet's, the conv"
    assert said in capsys.readouterr().out
    assert main([*command, "--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25"]) == 0
    assert load(tmp_path / "a.safetensors").mean == (0.5, 0.5, 0.5)
    for wrong in ("--mean 0.5 0.5 0.5", "--mean 123 117 104 --std 58 57 57", "--mean 0 0 0 --std 0 1 1"):
        with pytest.raises(SystemExit) as stop:
            main([*command, *wrong.split()])
        assert stop.value.code == 2


class HistoryBuffer:
    """As mmengine's: a class of a package that is not here."""

    def __init__(self) -> None:
        self._log_history, self.max_length = np.zeros(3), 100


def test_a_training_checkpoint_of_mmengine_without_mmengine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules[names[-1]], "HistoryBuffer", HistoryBuffer, raising=False)
    monkeypatch.setattr(HistoryBuffer, "__module__", names[-1])
    content = {"state_dict": WHOLE, "message_hub": {"log_scalars": {"loss": HistoryBuffer()}}}
    classes = {"classes": tuple(map(str, range(21))), "palette": [[n, 0, 0] for n in range(21)]}
    torch.save(content | {"meta": {"dataset_meta": classes, "iter": 3}}, tmp_path / "iter_3.pth")
    monkeypatch.undo()
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    found = convert(tmp_path / "iter_3.pth")
    assert same(tensors(found), WHOLE)
    assert found.checkpoint.classes == classes["classes"]
    assert found.checkpoint.colours == tuple((number, 0, 0) for number in range(21))


def test_compressed_records_and_files_without_checksums_are_read_right(tmp_path: Path) -> None:
    """PyTorch may be told to compute none."""
    torch.save({"model_state": WHOLE}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as source,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    torch.save(WHOLE, tmp_path / "unchecked.pth")
    torch.serialization.set_crc32_options(before)
    torch.save(WHOLE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for file in ("packed.pth", "unchecked.pth", "old.pth"):
        assert same(tensors(convert(tmp_path / file)), WHOLE)


# -- networks of one logit


ONE_LOGIT = {  # the classifier, and the probability above which the source takes a pixel for foreground
    "vainf deeplabv3plus": ("classifier.classifier.3.", None, 0.5),
    "smp deeplabv3": ("segmentation_head.0.", 0.8, 0.8),
    "mmseg deeplabv3 r18": ("decode_head.conv_seg.", None, 0.3),
}


@pytest.mark.parametrize("name", ONE_LOGIT)
@torch.no_grad()
def test_one_logit_becomes_two_classes_of_the_same_function(name: str, tmp_path: Path) -> None:
    (classifier, told, threshold), state = ONE_LOGIT[name], dict(state_of(name))
    state |= {key: value[:1].clone() for key, value in state.items() if key.startswith(classifier)}
    conversion = converted(tmp_path, state, threshold=told)
    conversion.write(tmp_path / "a.safetensors")
    assert conversion.checkpoint.classes == ("background", "foreground")
    said = f"foreground above probability {threshold:g} (else use --threshold)"
    assert (said in conversion.checkpoint.origin.assumed) == (told is None)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    logit, logits = network_of(name)(images)[:, :1], load_model(tmp_path / "a.safetensors").dense(images)
    assert relative_error(logits[:, 1:], logit) < 1e-5
    share = logit[:, 0].sigmoid()
    decided = (share - threshold).abs() > 1e-5
    assert torch.equal((logits.argmax(1) == 1)[decided], (share > threshold)[decided])
    assert same(to_dense(tmp_path / "a.safetensors"), state)
    meta = {"dataset_meta": {"classes": ("ground", "building")}}
    named = converted(tmp_path, {"state_dict": state, "meta": meta}, threshold=told)
    assert named.checkpoint.classes == ("ground", "building")


# -- networks of smp


DECODERS = {
    "Unet": "decoder.blocks.0.conv1.0.weight",
    "UnetPlusPlus": "decoder.blocks.x_0_0.conv1.0.weight",
    "MAnet": "decoder.center.top_conv.weight",
    "Linknet": "decoder.blocks.0.block.0.0.weight",
    "FPN": "decoder.p5.weight",
    "PSPNet": "decoder.psp.blocks.0.pool.1.0.weight",
    "PAN": "decoder.gau3.conv1.0.weight",
    "UPerNet": "decoder.psp.out_conv.0.weight",
}


@pytest.mark.parametrize("name", DECODERS)
def test_other_networks_of_smp_are_named(name: str, tmp_path: Path) -> None:
    """smp's MAnet has Unet's names, too."""
    names = ["encoder.conv1.weight", DECODERS[name], "segmentation_head.0.weight"]
    names += ["decoder.blocks.1.conv1.0.weight"] if name == "MAnet" else []
    message = f"it is a {name} of smp, which is not supported; of smp, DeepLabV3"
    with pytest.raises(CheckpointError, match=message):
        converted(tmp_path, {key: torch.zeros(3) for key in names})


def test_other_encoders_of_smp_are_named(tmp_path: Path) -> None:
    state = {key.replace("layer1", "features"): value for key, value in state_of("smp deeplabv3").items()}
    with pytest.raises(CheckpointError, match=r"a network of smp whose encoder \(encoder\..*\) is no ResNet"):
        converted(tmp_path, state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision deeplabv3", "vainf deeplabv3plus", "mmseg deeplabv3plus r50"])
def test_any_tensor_may_be_missing(name: str, tmp_path: Path) -> None:
    """One line, whichever it is."""
    state = state_of(name)
    needed = [key for key in state if not key.startswith("aux") and not key.endswith("num_batches_tracked")]
    for missing in needed[:: len(needed) // 12]:
        with pytest.raises(CheckpointError):
            converted(tmp_path, {key: value for key, value in state.items() if key != missing})
