"""Whatever a network is wrapped in: other state dicts, prefixes, what training keeps beside it."""

import pathlib
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from sparse_seg import load_model, segment
from sparse_seg.checkpoint import load
from sparse_seg.cli import main
from sparse_seg.config import load_config
from sparse_seg.conversion import SOURCES, convert, find_source, to_dense
from sparse_seg.errors import CheckpointError
from tests.conversion.cases import network_of, state_of
from tests.reference import relative_error


def torchvision():
    return dict(state_of("torchvision fcn"))


def under(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def same(found, expected) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def converted(tmp_path, content, **options):
    torch.save(content, tmp_path / "source.pth")
    return convert(tmp_path / "source.pth", **options)


# -- several state dicts

LEARNT = {
    key: value for key, value in torchvision().items() if not key.endswith(("_mean", "_var", "tracked"))
}


@pytest.mark.parametrize(
    ("ema", "note"),
    [
        (
            {"decay": 0.9, "shadow_params": list(LEARNT.values())},
            "passed over ema: it holds no tensors by name",
        ),
        ({"decay": 0.9, "shadow": LEARNT}, "unwrapped from ema > shadow, with the buffers of model"),
        ({"module": torchvision(), "updates": 10}, "unwrapped from ema > module"),
        (LEARNT, "unwrapped from ema, with the buffers of model"),
        ({"head": torch.zeros(3)}, "passed over ema: its names (head, ...) are of no network"),
        (
            {k: t for k, t in torchvision().items() if k != "backbone.layer3.0.bn2.bias"},
            "passed over ema: it is no fcn_resnet50: ",
        ),
    ],
)
def test_an_average_of_any_form_beside_the_model(ema, note, tmp_path):
    conversion = converted(tmp_path, {"model": torchvision(), "ema": ema})
    assert same(conversion.named.tensors, torchvision())
    assert any(line.startswith(note) for line in conversion.named.notes), conversion.named.notes


def test_the_average_is_taken_where_it_is_whole(tmp_path):
    doubled = {key: value * 2 for key, value in LEARNT.items()}
    conversion = converted(tmp_path, {"model": torchvision(), "ema": doubled})
    assert same(conversion.named.tensors, torchvision() | doubled)


# -- names

NAMES = {
    "compiled part": lambda name: name.replace("backbone.", "backbone._orig_mod."),
    "checkpointed blocks": lambda name: name.replace("layer3.0.", "layer3.0._checkpoint_wrapped_module."),
    "FSDP": lambda name: "_fsdp_wrapped_module." + name.replace(".0.", ".0._fsdp_wrapped_module."),
    "parallel sub-module": lambda name: name.replace("backbone.", "backbone.module."),
    "deeper": lambda name: f"student.segmentor.{name}",
}


@pytest.mark.parametrize("rename", NAMES.values(), ids=NAMES)
def test_wrappers_and_prefixes_anywhere(rename, tmp_path):
    state = {rename(name): tensor for name, tensor in torchvision().items()}
    assert same(converted(tmp_path, {"state_dict": state}).named.tensors, torchvision())


def test_a_student_beside_its_teacher_is_chosen_by_prefix(tmp_path):
    doubled = {key: value * 2 for key, value in torchvision().items()}
    content = {"state_dict": under(torchvision(), "student.") | under(doubled, "teacher.")}
    with pytest.raises(
        CheckpointError, match=r"networks under student\. and teacher\.; choose one with --pre"
    ):
        converted(tmp_path, content)
    assert same(converted(tmp_path, content, prefix="teacher").named.tensors, doubled)
    assert same(converted(tmp_path, content, drop=["teacher."]).named.tensors, torchvision())
    with pytest.raises(CheckpointError, match="it has no tensor under the prefix 'pupil"):
        converted(tmp_path, content, prefix="pupil")


BESIDE = {
    "class weights of the loss": {"criterion.weight": torch.ones(21)},
    "a loss with a network": {"perceptual_loss.features.0.weight": torch.ones(3, 3, 3, 3)},
    "a metric's matrix": {"val_iou.confmat": torch.zeros(21, 21, dtype=torch.int64)},
    "counters": {"train_acc.total": torch.tensor(3), "metrics.f1.tp": torch.zeros(2)},
    "no tensors": {"epoch": 5, "best": None, "when": "today"},
}


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
def test_what_training_keeps_beside_a_network_is_left_out_and_reported(beside, tmp_path):
    prefix = "model." if "epoch" in beside else ""
    conversion = converted(tmp_path, under(torchvision(), prefix) | beside)
    assert same(conversion.named.tensors, torchvision())
    assert any("left out" in note and next(iter(beside)) in note for note in conversion.named.notes)


def test_what_is_of_no_known_use_is_named_with_the_way_to_leave_it_out(capsys, tmp_path):
    content = under(torchvision(), "model.") | {"projector.0.weight": torch.ones(3)}
    with pytest.raises(
        CheckpointError, match=r"projector\.0\.weight has no place in it; .* --drop projector"
    ):
        converted(tmp_path, content)
    command = ["convert", str(tmp_path / "source.pth"), str(tmp_path / "a.safetensors")]
    assert main([*command, "--drop", "projector"]) == 0
    assert "left out 1 tensors: projector.0.weight" in capsys.readouterr().out
    assert main([*command, "--prefix", "model"]) == 0
    assert same(to_dense(tmp_path / "a.safetensors"), torchvision())


@pytest.mark.parametrize(
    ("mean", "std", "known"),
    [
        ([0.0] * 3, [1.0] * 3, ((0.0,) * 3, (1.0,) * 3)),
        ([127.5] * 3, [255.0] * 3, ((0.5,) * 3, (1.0,) * 3)),
    ],
)
def test_mean_and_std_of_the_file_are_used(mean, std, known, capsys, tmp_path):
    buffers = {"mean": torch.tensor(mean).view(1, 3, 1, 1), "std": torch.tensor(std).view(1, 3, 1, 1)}
    conversion = converted(tmp_path, {"state_dict": under(state_of("smp deeplabv3plus"), "model.") | buffers})
    conversion.write(tmp_path / "a.safetensors")
    found = load(tmp_path / "a.safetensors")
    assert (found.mean, found.std) == known
    (tmp_path / "a.yaml").write_text(f"data: {{root: {tmp_path}}}")
    with pytest.raises(
        CheckpointError, match=r"trained with data\.mean .*; train again or use --set data\.mean="
    ):
        load_model(tmp_path / "a.safetensors", load_config(tmp_path / "a.yaml"))
    values = [f"data.mean={list(known[0])}", f"data.std={list(known[1])}"]
    load_model(tmp_path / "a.safetensors", load_config(tmp_path / "a.yaml", values))


def test_mean_and_std_may_be_told(capsys, tmp_path):
    torch.save(torchvision(), tmp_path / "source.pth")
    command = ["convert", str(tmp_path / "source.pth"), str(tmp_path / "a.safetensors")]
    assert main(command) == 0
    assert (
        "mean [0.485, 0.456, 0.406], std [0.229, 0.224, 0.225] (ImageNet's, the conv"
        in capsys.readouterr().out
    )
    assert main([*command, "--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25"]) == 0
    assert load(tmp_path / "a.safetensors").mean == (0.5, 0.5, 0.5)
    for wrong in ("--mean 0.5 0.5 0.5", "--mean 123 117 104 --std 58 57 57", "--mean 0 0 0 --std 0 1 1"):
        with pytest.raises(SystemExit) as stop:
            main([*command, *wrong.split()])
        assert stop.value.code == 2


# -- what stands beside a state dict in a file


class HistoryBuffer:
    """As mmengine's: a class of a package that is not here."""

    def __init__(self) -> None:
        self._log_history, self.max_length = np.zeros(3), 100


def test_a_training_checkpoint_of_mmengine_without_mmengine(tmp_path, monkeypatch):
    names = ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules[names[-1]], "HistoryBuffer", HistoryBuffer, raising=False)
    monkeypatch.setattr(HistoryBuffer, "__module__", names[-1])
    state = dict(state_of("mmseg deeplabv3 r50"))
    content = {"state_dict": state, "message_hub": {"log_scalars": {"loss": HistoryBuffer()}}}
    meta = {
        "dataset_meta": {"classes": tuple(map(str, range(19))), "palette": [[n, 0, 0] for n in range(19)]}
    }
    torch.save(content | {"meta": meta | {"iter": 3}}, tmp_path / "iter_3.pth")
    monkeypatch.undo()
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    conversion = convert(tmp_path / "iter_3.pth")
    assert same(conversion.named.tensors, state)
    conversion.write(tmp_path / "a.safetensors")
    found = load(tmp_path / "a.safetensors")
    assert found.classes == tuple(map(str, range(19)))
    assert found.colours == tuple((number, 0, 0) for number in range(19))


@pytest.mark.parametrize(
    "beside",
    [
        {
            "folder": pathlib.PurePosixPath("data"),
            "log": pathlib.PureWindowsPath("log"),
            "here": pathlib.Path("x"),
        },
        {
            "class_iou": np.zeros(3),
            "counts": np.arange(3),
            "names": np.array(["road"]),
            "best": np.float32(1),
        },
    ],
    ids=["paths", "arrays"],
)
def test_paths_and_arrays_run_no_code(beside, tmp_path):
    assert same(converted(tmp_path, {"state_dict": torchvision(), **beside}).named.tensors, torchvision())


def test_weights_as_arrays(tmp_path):
    arrays = {name: tensor.numpy() for name, tensor in torchvision().items()}
    assert same(converted(tmp_path, {"state_dict": arrays}).named.tensors, torchvision())


def test_a_program_says_what_to_do(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        for name in ("a/data.pkl", "a/constants.pkl", "a/code/__torch__.py"):
            archive.writestr(name, b"")
    with pytest.raises(CheckpointError, match=r"is a TorchScript archive.*torch\.jit\.load\("):
        convert(tmp_path / "a.pth")


def test_compressed_records_are_read_right(tmp_path):
    torch.save({"model_state": torchvision()}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as source,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert same(convert(tmp_path / "packed.pth").named.tensors, torchvision())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to(torch.complex64), r"torch\.complex64; it must be a plain tensor"),
        (lambda t: t.to_sparse(), "it must be a plain tensor"),
        (lambda t: torch.zeros(1).expand(2**30, 64), "more values than the file holds"),
    ],
)
def test_tensors_that_are_no_plain_ones(change, message, tmp_path):
    state, name = torchvision(), "backbone.layer3.0.conv2.weight"
    with pytest.raises(CheckpointError, match=message):
        converted(tmp_path, state | {name: change(state[name])})


def test_files_without_checksums_are_read(tmp_path):
    """PyTorch may be told to compute none."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        assert same(converted(tmp_path, torchvision()).named.tensors, torchvision())
    finally:
        torch.serialization.set_crc32_options(before)
    torch.save(torchvision(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(convert(tmp_path / "old.pth").named.tensors, torchvision())


# -- networks of one logit


ONE_LOGIT = {  # the classifier, and the probability above which the source takes a pixel for foreground
    "torchvision deeplabv3": ("classifier.4.", 0.5),
    "torchvision fcn": ("classifier.4.", 0.5),
    "vainf deeplabv3plus": ("classifier.classifier.3.", 0.5),
    "smp deeplabv3": ("segmentation_head.0.", 0.5),
    "mmseg deeplabv3 r18": ("decode_head.conv_seg.", 0.3),
    "cad fcn": ("classifier.classifier.4.", 0.5),
}


@pytest.mark.parametrize(("name", "told"), [*((name, None) for name in ONE_LOGIT), ("torchvision fcn", 0.8)])
@torch.no_grad()
def test_one_logit_becomes_two_classes_of_the_same_function(name, told, tmp_path):
    (classifier, usual), state = ONE_LOGIT[name], dict(state_of(name))
    state |= {key: value[:1].clone() for key, value in state.items() if key.startswith(classifier)}
    source = "cad" if name.startswith("cad") else "auto"
    conversion = converted(tmp_path, state, threshold=told, source=source)
    conversion.write(tmp_path / "a.safetensors")
    threshold = told or usual
    assert conversion.classes == ["background", "foreground"]
    said = f"foreground above probability {threshold:g} (else use --threshold)"
    assert (said in conversion.plan.assumed) == (told is None)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    logit, logits = network_of(name)(images)[:, :1], load_model(tmp_path / "a.safetensors").dense(images)
    assert relative_error(logits[:, 1:], logit) < 1e-5
    share = logit[:, 0].sigmoid()
    decided = (share - threshold).abs() > 1e-5
    assert torch.equal((logits.argmax(1) == 1)[decided], (share > threshold)[decided])
    assert same(to_dense(tmp_path / "a.safetensors"), state)
    seen = segment(tmp_path / "a.safetensors", np.full((64, 96, 3), 90, np.uint8))
    assert seen.names == ("background", "foreground")


def test_names_in_a_file_of_one_logit_are_its_classes(tmp_path):
    state = dict(state_of("mmseg deeplabv3 r18"))
    state |= {key: value[:1].clone() for key, value in state.items() if "decode_head.conv_seg" in key}
    names = ("ground", "building")
    conversion = converted(tmp_path, {"state_dict": state, "meta": {"dataset_meta": {"classes": names}}})
    assert conversion.classes == list(names)


def test_a_threshold_is_for_one_logit(tmp_path):
    with pytest.raises(CheckpointError, match="--threshold is for networks of one logit, which it is not"):
        converted(tmp_path, torchvision(), threshold=0.4)


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
def test_other_networks_of_smp_are_named(name):
    """smp's MAnet has Unet's names, too."""
    names = ["encoder.conv1.weight", DECODERS[name], "segmentation_head.0.weight"]
    names += ["decoder.blocks.1.conv1.0.weight"] if name == "MAnet" else []
    state = {key: torch.zeros(3) for key in names}
    assert find_source(state) == "smp"
    with pytest.raises(
        CheckpointError, match=f"it is a {name} of smp, which is not supported; of smp, DeepLabV3"
    ):
        SOURCES["smp"].plan(state, None)


def test_other_encoders_of_smp_are_named(tmp_path):
    state = {key.replace("layer1", "features"): value for key, value in state_of("smp deeplabv3").items()}
    with pytest.raises(CheckpointError, match=r"a network of smp whose encoder \(encoder\..*\) is no ResNet"):
        converted(tmp_path, state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision deeplabv3", "vainf deeplabv3plus", "mmseg deeplabv3plus r50"])
def test_any_tensor_may_be_missing(name, tmp_path):
    """One line, whichever it is."""
    state = dict(state_of(name))
    for missing in list(state)[:: len(state) // 30]:
        rest = {key: value for key, value in state.items() if key != missing}
        if missing.startswith("aux") or missing.endswith("num_batches_tracked"):
            continue
        with pytest.raises(CheckpointError):
            converted(tmp_path, rest)
