"""One format of ours: what stands in it, files of version 0.1, and damage that is noticed."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from sparse_seg import load_model
from sparse_seg.checkpoint import Checkpoint, Origin, load, network_settings, save
from sparse_seg.checkpoint.captured import content_of
from sparse_seg.checkpoint.loading import initial_weights
from sparse_seg.config import config_from_dict, load_config, to_dict
from sparse_seg.conversion import convert, to_dense
from sparse_seg.data.cityscapes import CITYSCAPES_CLASSES, CITYSCAPES_IDS
from sparse_seg.errors import CheckpointError, ConfigError
from sparse_seg.run.build import build_model
from sparse_seg.run.weights import load_weights
from sparse_seg.training.checkpoint import best_of, save_best, save_checkpoint
from tests.checkpoint.earlier import write_converted, write_format_2, write_training
from tests.checkpoint.stored import header_of, opened, write_changed
from tests.conversion.cases import same, state_of
from tests.fast import one_fast
from tests.reference import relative_error

FILES, HALF = Path(__file__).with_name("files"), "torchvision fcn"

MODEL = {"width": 0.0625, "depths": [1, 1, 1, 1], "head_channels": 4}


@pytest.fixture
def config():
    return config_from_dict({"model": dict(MODEL)}, "test")


@pytest.fixture
def weights(config):
    torch.manual_seed(0)
    return build_model(config).eval().state_dict()


def test_a_checkpoint_alone_is_enough(config, weights, tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", config, weights, miou=0.5)
    found = load(tmp_path / "a.safetensors")
    assert same(found.weights, weights)
    assert found.classes == CITYSCAPES_CLASSES.names
    assert found.colours == CITYSCAPES_CLASSES.palette
    assert (list(found.mean), list(found.std)) == (config.data.mean, config.data.std)
    assert found.config == dataclasses.replace(config.model, num_classes=19)
    assert found.origin.is_trained_here
    assert found.training == {"config": to_dict(config), "ids": list(CITYSCAPES_IDS.values()), "miou": 0.5}
    assert same(load_model(tmp_path / "a.safetensors").state_dict(), weights)
    metadata = opened(tmp_path / "a.safetensors")[1]
    assert list(metadata) == ["sparse_seg"]
    assert json.loads(metadata["sparse_seg"])["weights"] == found.digest


def test_the_training_frames_size_is_in_the_file_or_bounded_by_the_crop(config, weights, tmp_path):
    def known(path):
        card = load_model(path).card
        assert card is not None
        return card.frame, card.at_most

    path, twice = tmp_path / "a.safetensors", tuple(2 * side for side in config.data.crop)
    save_checkpoint(path, config, weights, frame=[360, 480])
    assert known(path) == ((360, 480), twice)
    for told in (None, [360], [360, 10**400], "a"):
        save_checkpoint(path, config, weights, frame=told)
        assert known(path) == (None, twice)
    write_training(tmp_path / "old.pt", config, weights)
    assert known(tmp_path / "old.pt") == (None, twice)
    for nothing in ({}, {"config": None}, {"config": {"data": {"crop": "256"}}}):
        save(dataclasses.replace(load(path), training=nothing))
        assert known(path) == (None, None), "as of a converted file"


def test_files_are_told_apart_by_content(config, weights, tmp_path):
    save_checkpoint(tmp_path / "new.safetensors", config, weights)
    write_training(tmp_path / "old.pt", config, weights)
    for source, copy in (("new.safetensors", "a.pt"), ("old.pt", "a"), ("old.pt", "old.safetensors")):
        (tmp_path / copy).write_bytes((tmp_path / source).read_bytes())
        assert same(load_model(tmp_path / copy).state_dict(), weights)


def test_the_best_weights_by_either_name(config, weights, tmp_path):
    write_training(tmp_path / "best.pt", config, weights)
    assert best_of(tmp_path) == tmp_path / "best.pt"
    assert load(tmp_path / "best.safetensors").path == tmp_path / "best.pt"
    better = {name: tensor + 1 for name, tensor in weights.items()}
    save_best(tmp_path, config, better)
    assert [path.name for path in tmp_path.iterdir()] == ["best.safetensors"], "no worse weights stay"
    assert best_of(tmp_path) == tmp_path / "best.safetensors"
    assert same(load(tmp_path / "best.pt").weights, better)


def test_training_files_of_version_0_1(config, weights, tmp_path):
    raw = {name: tensor + 1 for name, tensor in weights.items()}
    write_training(tmp_path / "last.pt", config, raw, ema=weights, progress={"iteration": 3})
    found = load(tmp_path / "last.pt")
    assert same(found.weights, weights), "averaged ones"
    assert (found.config.num_classes, found.classes) == (19, CITYSCAPES_CLASSES.names)
    assert same(load_model(tmp_path / "last.pt", config).state_dict(), weights)


@pytest.mark.parametrize("name", one_fast("cad learned mask", "smp deeplabv3plus", "mmseg deeplabv3plus r18"))
def test_converted_files_of_earlier_formats(name, tmp_path):
    """Also, version 0.1 does not know the scaling."""
    torch.save(state_of(name), tmp_path / "source.pth")
    conversion = convert(tmp_path / "source.pth")
    paths = [tmp_path / f"{version}.safetensors" for version in ("today", "2", "0.1")]
    conversion.write(paths[0])
    write_format_2(paths[1], conversion)
    write_converted(paths[2], conversion)
    today, format_2, version_0_1 = map(load, paths)
    origins = (dataclasses.replace(one.origin, back={}) for one in (format_2, today))
    assert len(set(map(repr, origins))) == 1
    assert format_2.captured is None
    for path, old in zip(paths[1:], (format_2, version_0_1), strict=True):
        assert old.config == today.config
        stored = {key for key in today.weights if key in old.weights or not key.startswith("source.")}
        assert same(old.weights, {key: today.weights[key] for key in stored})
        assert same(to_dense(path), state_of(name))
    networks = load_model(paths[1]), load_model(paths[0])
    assert networks[0].graph == networks[1].graph
    assert same(*(network.state_dict() for network in networks))
    (tmp_path / "run.yaml").write_text(f"data: {{root: {tmp_path}, mean: [0.5, 0.5, 0.5]}}")
    config = load_config(tmp_path / "run.yaml")
    network_settings(version_0_1, config)
    message = r"trained with data\.mean \[0\.485, .* --set data\.mean=\[0\.485,"
    with pytest.raises(CheckpointError, match=message):
        network_settings(today, config)


def test_a_file_that_format_2_wrote():
    """A file of an earlier commit, with the logits that it gave there."""
    found, expected = (
        load_model(FILES / "format_2.safetensors"),
        load_file(FILES / "format_2_logits.safetensors"),
    )
    images = torch.randn(1, 3, 45, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for name, logits in (
            ("dense", found.dense(images, 8)),
            ("coarse", found.dense(images, 16)),
            ("mixed", found(images, torch.arange(12).reshape(1, 3, 4) % 3 == 0)),
        ):
            assert relative_error(logits, expected[name]) < 1e-6


def test_half_precision_is_computed_with_as_single(tmp_path):
    state = {key: one.half() if one.is_floating_point() else one for key, one in state_of(HALF).items()}
    torch.save(state, tmp_path / "source.pth")
    convert(tmp_path / "source.pth").write(tmp_path / "net.safetensors")
    found = load_model(tmp_path / "net.safetensors")
    assert {tensor.dtype for tensor in found.state_dict().values()} == {torch.float32, torch.int64}
    assert same(to_dense(tmp_path / "net.safetensors"), state)


def test_an_auxiliary_head_serves_training_alone(weights, tmp_path):
    config = config_from_dict({"model": MODEL | {"auxiliary": True}}, "test")
    model = build_model(config).eval()
    files = {"new": content_of(model), "none": (model.state_dict(), None)}
    for name, (stored, captured) in files.items():
        save_checkpoint(tmp_path / f"{name}.safetensors", config, stored, captured)
    write_training(tmp_path / "old.pt", config, model.state_dict())
    for file in ("new.safetensors", "none.safetensors", "old.pt"):
        found = load_model(tmp_path / file, config)
        assert found.state_dict().keys() == weights.keys()
        assert same(initial_weights(load(tmp_path / file), model, config), model.state_dict())


def test_a_dataset_that_is_not_known_here(config, weights, tmp_path):
    strange = to_dict(config) | {"data": to_dict(config)["data"] | {"dataset": "kitti"}}
    checkpoint = Checkpoint(
        tmp_path / "a.safetensors",
        weights,
        dataclasses.replace(config.model, num_classes=19),
        tuple(f"class {number}" for number in range(19)),
        tuple((number, 0, 0) for number in range(19)),
        (0.0, 0.0, 0.0),
        (1.0, 1.0, 1.0),
        training={"config": strange},
    )
    save(checkpoint)
    assert same(load_model(tmp_path / "a.safetensors").state_dict(), weights)
    found = load(tmp_path / "a.safetensors")
    assert (found.classes, found.colours) == (checkpoint.classes, checkpoint.colours)
    assert (found.mean, found.std) == (checkpoint.mean, checkpoint.std)
    write_training(tmp_path / "old.pt", config, weights)
    content = torch.load(tmp_path / "old.pt", weights_only=True)
    torch.save(content | {"config": strange}, tmp_path / "old.pt")
    assert same(load_model(tmp_path / "old.pt").state_dict(), weights)
    assert load(tmp_path / "old.pt").classes is None


def flip(path: Path, content: bytes) -> None:
    """One bit of one value."""
    data = bytearray(path.read_bytes())
    place = data.find(content)
    assert place > 0
    data[place + 3] ^= 0x40
    path.write_bytes(data)


def test_damage_is_noticed(config, weights, tmp_path):
    """One bit of a value, and what the file says of itself."""
    value = weights["module.head.classifier.weight"].numpy().tobytes()
    save_checkpoint(tmp_path / "a.safetensors", config, weights)
    data = (tmp_path / "a.safetensors").read_bytes()
    assert data.count(b"1e-05") == 2  # bn_eps, of the network and in training's config
    (tmp_path / "c.safetensors").write_bytes(data.replace(b"1e-05", b"1e-04"))
    write_training(tmp_path / "b.pt", config, weights)
    flip(tmp_path / "a.safetensors", value)
    flip(tmp_path / "b.pt", value)
    for name, message in (
        ("a.safetensors", r"a\.safetensors is damaged: its digest is wrong"),
        ("b.pt", r"b\.pt is damaged: the checksum of its record"),
        ("c.safetensors", "its digest is wrong"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": MODEL | {"num_classes": 19, "depths": [10**9] * 4}}, r"depths is .* must lie in"),
        ({"model": MODEL | {"num_classes": 19, "depths": [60] * 4}}, "ask for 244 blocks and it holds"),
        ({"model": MODEL | {"num_classes": 19, "width": 8.0}}, r"backbone\.conv1\.weight is \[4, "),
        ({"model": MODEL | {"num_classes": 19, "width": 1e300}}, "width is 1e.300; it must lie in"),
        ({"model": MODEL | {"num_classes": "19"}}, "its model settings are damaged: .*'num_classes' must be"),
        ({"model": None}, "it says model is None"),
        ({"std": [1.0, 0.0, 1.0]}, r"it says std is \[1\.0, 0\.0, 1\.0\]"),
        ({"classes": ["road"]}, "class names are not as many as its classes"),
        ({"colours": [[0, 0, 300]] * 19}, "it says colours is"),
        ({"origin": {}}, "damaged: origin.* is missing or unknown"),
        ({"extra": 1}, "extra is missing or unknown"),
    ],
)
def test_all_that_a_file_says_is_checked_before_anything_is_built(
    changes, message, config, weights, tmp_path
):
    save_checkpoint(tmp_path / "a.safetensors", config, weights)
    write_changed(tmp_path / "a.safetensors", tmp_path / "a.safetensors", lambda said: said.update(changes))
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        load_model(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


def test_a_later_format_is_named(config, weights, tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, config, weights)
    assert header_of(path)["format_version"] == 4
    write_changed(path, path, lambda said: said.update(format_version=5))
    with pytest.raises(CheckpointError, match=r"of a later sparse_seg \(format 5\); update the package"):
        load(path)


def test_the_way_back_needs_all_its_entries(tmp_path):
    torch.save(state_of("torchvision fcn"), tmp_path / "source.pth")
    path = tmp_path / "a.safetensors"
    convert(tmp_path / "source.pth").write(path)
    whole = load(path)
    first, *rest = whole.origin.back["entries"]
    odd = [[first[0], 7, *first[2:]], [*first[:2], [-1, *first[2][1:]], *first[3:]], [*first[:4], -1]]
    for entries in ([], None, 3, [["a", "b", [1], None, 0]], [[1] * 5], *([one, *rest] for one in odd)):
        origin = dataclasses.replace(whole.origin, back=whole.origin.back | {"entries": entries})
        save(dataclasses.replace(whole, origin=origin))
        with pytest.raises(CheckpointError, match="of the way back does not fit its tensors"):
            to_dense(path)
    load_model(path)
    save(dataclasses.replace(whole, origin=Origin()))
    with pytest.raises(CheckpointError, match="trained by sparse_seg: there is no source to go back to"):
        to_dense(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to(torch.complex64), r"is torch\.complex64, where a floating-point type is needed"),
        (lambda t: t.to(torch.int8), r"is torch\.int8, where a floating-point type is needed"),
        (lambda t: t * float("nan"), "holds NaN or infinite values"),
        (lambda t: t.double() + 1e300, "holds NaN or infinite values"),  # in float32
    ],
)
def test_weights_must_be_finite_numbers_of_their_kind(change, message, config, weights):
    name = "module.backbone.conv1.weight"
    with pytest.raises(CheckpointError, match=f"x: {name} {message}"):
        load_weights(build_model(config), weights | {name: change(weights[name])}, "x")
    counter = "module.backbone.bn1.num_batches_tracked"
    with pytest.raises(CheckpointError, match=r"is torch\.float32, where a whole-number type is needed"):
        load_weights(build_model(config), weights | {counter: torch.zeros(())}, "x")
    load_weights(build_model(config), weights | {name: weights[name].double()}, "x")


def test_other_things_than_checkpoints(tmp_path):
    (tmp_path / "text.pt").write_text("model: {width: 1}\n")
    with pytest.raises(CheckpointError, match="is truncated or no PyTorch checkpoint"):
        load(tmp_path / "text.pt")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    torch.save({"model": {}, "args": argparse.Namespace(lr=0.1)}, tmp_path / "foreign.pth")
    for name in ("foreign.safetensors", "foreign.pth"):
        with pytest.raises(CheckpointError, match="not written by sparse_seg; convert it first: sparse-seg "):
            load(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"best\.pt does not exist"):
        load(tmp_path / "best.pt")


def test_escape_codes_do_not_reach_the_terminal(tmp_path):
    torch.save({"\x1b[2Jlayer\n.weight": torch.zeros(3)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"its names \(\\x1b\[2Jlayer\\n\.weight") as caught:
        convert(tmp_path / "a.pth")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", r"^\. is a folder; name the checkpoint in it"),
        ("..", r"^\.\. is a folder; name the checkpoint in it"),
        ("/", r"^/ is a folder; name the checkpoint in it"),
        (Path(), r"^\. is a folder; name the checkpoint in it"),
        ("", r"^the checkpoint's name is empty; name a file, or one of camvid-slim, street-lite0$"),
        ("x" * 300, r"^checkpoint 'x+\.\.\. cannot be read: File name too long$"),
        ("a\0b", r"^checkpoint a\\x00b does not exist"),
        ("camvid-slimm", r"^checkpoint camvid-slimm does not exist; name .*; did you mean 'camvid-slim'\?$"),
        ("CamVid", r"^checkpoint CamVid does not exist; name a file, or one of camvid-slim, street-lite0$"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(CheckpointError, match=message):
        load_model(name)
