"""The tool as a user meets it, from a source's file to evaluation, prediction, training, and back."""

import json
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file

from sparse_seg import load_model
from sparse_seg.checkpoint import load
from sparse_seg.cli import main
from sparse_seg.config import load_config
from sparse_seg.conversion import convert
from sparse_seg.data.class_file import read_classes
from sparse_seg.data.scenes import write_scenes
from sparse_seg.errors import CheckpointError
from sparse_seg.run.build import build_model
from sparse_seg.training.checkpoint import save_checkpoint
from sparse_seg.training.pretrained import load_own
from tests.cli.commands import said as run
from tests.conversion.cases import same, state_of

NAME = "vainf deeplabv3plus"  # 19 classes, as the scenes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tool")
    write_scenes(root / "scenes", 10, (64, 96), val_fraction=0.2)
    torch.save({"model_state": state_of(NAME)}, root / "source.pth")
    assert main(["convert", str(root / "source.pth"), str(root / "net.safetensors")]) == 0
    (root / "data.yaml").write_text(f"data: {{root: {root / 'scenes'}, crop: [64, 64]}}")
    return root


def test_the_report(capsys, tmp_path):
    torch.save(state_of("torchvision fcn"), tmp_path / "fcn.pth")
    options = ["--set", "strides=[8, 16, 32]", "--verify"]
    text = run(capsys, "convert", tmp_path / "fcn.pth", tmp_path / "fcn.safetensors", *options)
    for line in (
        "source    torchvision fcn_resnet50",
        "head fcn, 21 classes, trained at output stride 8",
        "set aside 8 tensors, aux_classifier.*: auxiliary head, used in training only",
        "left over none; missing: none",
        "mask      policy confidence, fine fraction 0.15; docs/masks.md tells how to choose them",
        "all-fine against dense OS8",
        "coarse sites of a random mask against dense OS32",
        "against dense OS8 at every fourth cell",
        "P1 holds: coarse sites compute what the dense network of output stride 32",
    ):
        assert line in text
    assert "DIFFERS" not in text


def test_verification_says_where_p1_does_not_hold(capsys, tmp_path):
    torch.save(state_of("mmseg deeplabv3 r18"), tmp_path / "r18.pth")
    text = run(capsys, "convert", tmp_path / "r18.pth", tmp_path / "r18.safetensors", "--verify")
    assert "P1 does not hold: coarse sites depend on the mask" in text
    assert "second 3x3 of each basic block is undilated" in text
    assert "DIFFERS" not in text
    torch.save(state_of("timm resnet18d"), tmp_path / "d.pth")
    options = ["--allow-missing", "head", "--verify"]
    text = run(capsys, "convert", tmp_path / "d.pth", tmp_path / "d.safetensors", *options)
    assert "timm's own dilated form keeps windows of one cell" in text
    assert "P1 holds" in text


def test_settings_that_tensors_cannot_tell(capsys, folder, tmp_path):
    """What was assumed stands last: verifying compares our forms with each other, so wrong rates pass."""
    text = run(capsys, "convert", folder / "source.pth", tmp_path / "net.safetensors", "--verify")
    assert "whether the source's network has the same settings, the file cannot tell" in text
    assert text.splitlines()[-1].startswith("assumed   output stride 8 (tensors cannot tell; else use --outp")
    conversion = convert(folder / "source.pth", output_stride=16, overrides={"bn_eps": 0.01})
    conversion.write(tmp_path / "net.safetensors")
    model = load_model(tmp_path / "net.safetensors")
    assert model.settings.trained_stride == 16
    nodes = {node.layer: node for node in model.graph.nodes if node.layer}
    assert nodes["backbone.bn1"].options["eps"] == 0.01
    rates = [nodes[f"head.aspp.convs.{index}.0"].options["dilation"] for index in (1, 2, 3)]
    assert rates == [[12, 12], [24, 24], [36, 36]]  # at output stride 8: 6, 12, 18 at 16


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_way_back(suffix, capsys, folder, tmp_path):
    path, state = tmp_path / f"back{suffix}", state_of(NAME)
    text = run(capsys, "convert", folder / "net.safetensors", path, "--to-dense")
    assert f"{len(state)} tensors written" in text
    assert same(load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True), state)
    message = run(capsys, "convert", folder / "source.pth", tmp_path / "x.pth", "--to-dense", code=1)
    assert "was not written by sparse_seg" in message
    assert not (tmp_path / "x.pth").exists()


# -- starting training from a checkpoint

SETTINGS = {"backbone": "resnet50", "width": 0.125, "depths": [2, 1, 2, 2], "num_classes": 19}
PLUS = {"head": "deeplabv3plus", "head_channels": 6, "low_level_channels": 5, "refine": False}


def start(path, **settings):
    model = build_model(SETTINGS | settings)
    return model, load_own(model, path)


@pytest.mark.slow
def test_pretrained_from_every_kind_of_file(folder, tmp_path):
    checkpoint = load(folder / "net.safetensors")
    own = load_config(folder / "data.yaml")
    own.model = checkpoint.config
    save_checkpoint(tmp_path / "own.pt", own, checkpoint.weights, checkpoint.captured)
    wanted = {name: one for name, one in checkpoint.weights.items() if name.startswith("module.")}
    for path in (folder / "source.pth", folder / "net.safetensors", tmp_path / "own.pt"):
        model, message = start(path, **PLUS)
        assert f"backbone and head of {path}" in message
        weights = model.state_dict()
        assert all(torch.equal(weights[key], tensor) for key, tensor in wanted.items())
    for settings in (PLUS | {"num_classes": 5}, {"head": "lite"}):
        model, message = start(path, **settings)
        assert message.endswith("the head starts fresh")
        weights = {key: one for key, one in model.state_dict().items() if key.startswith("module.backbone.")}
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in weights.items())


def test_pretrained_from_a_classifier(tmp_path):
    torch.save(state_of("timm resnet50d"), tmp_path / "timm.pth")
    with pytest.raises(CheckpointError, match=r"with model\.shortcut avg_pool, not conv; .* --set model\.sh"):
        start(tmp_path / "timm.pth")
    with pytest.raises(
        CheckpointError, match=r"\(it has model\.backbone=resnet50 model\.width=0\.125 model\.st"
    ):
        start(tmp_path / "timm.pth", shortcut="avg_pool")
    model, _ = start(tmp_path / "timm.pth", shortcut="avg_pool", stem="deep")
    state = state_of("timm resnet50d")
    assert torch.equal(model.module.backbone.bn1.running_var, state["bn1.running_var"])
    with pytest.raises(CheckpointError, match="does not exist"):
        start(tmp_path / "none.pth")


STEP = ["train.batch_size=2", "train.lr=1e-9", "model.backbone=resnet50", "model.width=0.125"]
STEP += ["model.depths=[2, 1, 2, 2]"]


def test_training_starts_there_and_resumes_from_its_own(capsys, folder, tmp_path):
    command = ["train", folder / "data.yaml", "--work-dir", tmp_path / "run"]
    settings = ["--set", *STEP, f"model.pretrained={folder / 'source.pth'}"]
    text = run(capsys, *command, *settings, "train.iterations=1")
    assert "pretrained: backbone of" in text
    weight = load(tmp_path / "run/best.pt").weights["module.backbone.conv1.weight"]
    assert torch.allclose(weight, state_of(NAME)["backbone.conv1.weight"], atol=1e-6)
    assert "pretrained" not in run(capsys, *command, "--resume", *settings, "train.iterations=2")


@pytest.mark.parametrize("name", ["back.pth", "back.safetensors"])
def test_a_full_disk_is_one_line(name, capsys, folder, tmp_path):
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        back = run(capsys, "convert", folder / "net.safetensors", tmp_path / name, "--to-dense", code=1)
        forth = run(capsys, "convert", folder / "source.pth", tmp_path / "a.safetensors", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert back == f"error: {tmp_path / name}: File too large\n"
    assert forth == f"error: {tmp_path / 'a.safetensors'}: File too large\n"
    assert not list(tmp_path.iterdir())


def test_classes_of_torchvisions_network(capsys, tmp_path):
    """By number, by name, from a file."""
    torch.save(state_of("torchvision fcn"), tmp_path / "fcn.pth")
    own = {"names": [f"kind {n}" for n in range(21)], "ids": list(range(100, 121))}
    (tmp_path / "own.yaml").write_text(json.dumps(own))
    for options, names, first in (
        ((), [f"class {n}" for n in range(21)], 0),
        (("--classes", "voc"), list(read_classes("voc").classes.names), 0),
        (("--classes", tmp_path / "own.yaml"), own["names"], 100),
    ):
        run(capsys, "convert", tmp_path / "fcn.pth", tmp_path / "fcn.safetensors", *options)
        card = load_model(tmp_path / "fcn.safetensors").card
        assert card is not None
        assert (list(card.names), card.colours) == (names, read_classes("voc").classes.palette)
        assert card.ids == tuple(range(first, first + 21))
    convert_it = ["convert", tmp_path / "fcn.pth", tmp_path / "x.safetensors", "--classes"]
    assert "has 21 classes, but 19 are given" in run(capsys, *convert_it, "cityscapes", code=1)
    known = "unknown classes 'coco'; choose one of voc, cityscapes, camvid, ade20k, coco-stuff, or a"
    assert known in run(capsys, *convert_it, "coco", code=1)
    assert not (tmp_path / "x.safetensors").exists()


def test_known_classes():
    ends = {"voc": (21, "tvmonitor", 20), "cityscapes": (19, "bicycle", 33), "camvid": (11, "Bicyclist", 10)}
    ends |= {"ade20k": (150, "flag", 150), "coco-stuff": (171, "wood", 170)}
    for name, (count, last, last_id) in ends.items():
        known = read_classes(name)
        assert len(set(known.classes.names)) == len(set(known.classes.palette)) == count
        assert (known.classes.names[-1], known.ids[-1]) == (last, last_id)
