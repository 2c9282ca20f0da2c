"""Exported files: what stands in them, what is refused, and that nothing half-written is left."""

import copy
import dataclasses
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch

from sparse_seg import build_model
from sparse_seg.cli import main
from sparse_seg.errors import ConfigError, MeasurementError, SparseSegError
from sparse_seg.export import ExportOptions, StaticNetwork, export_onnx, open_session
from sparse_seg.lab.benchmark.runtimes import open_run, peer_graphs, rows, time_network
from sparse_seg.lab.latency import Latency, timed_apart
from sparse_seg.run.card import Card
from tests.export.kinds import kind_model
from tests.reference import relative_error

onnx = pytest.importorskip("onnx", reason="needs the package onnx")
pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
SIZE = (64, 96)
SMALL = {"width": 0.125, "head_channels": 16, "num_classes": 5}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "net.onnx"
    metadata = export_onnx(
        kind_model("lite", "entropy"), path, ExportOptions(SIZE), list("abcde"), [(1, 2, 3)] * 5
    )
    return path, metadata


@pytest.mark.slow
def test_interface_and_metadata(exported):
    path, metadata = exported
    graph = onnx.load(path)
    assert [one.name for one in graph.graph.input] == ["images"]
    assert [one.name for one in graph.graph.output] == ["classes", "fine_blocks"]
    kept = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(kept["sparse_seg"]) == metadata
    assert metadata["names"] == list("abcde")
    assert metadata["colours"] == [[1, 2, 3]] * 5
    assert (metadata["size"], metadata["strides"], metadata["blocks"]) == ([64, 96], [8, 16], [4, 6])
    assert (metadata["policy"], metadata["exchange"]) == ("confidence", "linear")
    assert metadata["fine_fraction"] == 7 / 24
    found = open_session(path, "onnxruntime", 1)(images=np.zeros((1, 3, *SIZE), np.float32))
    assert (found["classes"].dtype, found["classes"].shape) == (np.uint8, (1, 64, 96))
    assert (found["fine_blocks"].dtype, found["fine_blocks"].shape) == (bool, (1, 4, 6))
    assert found["fine_blocks"].sum() == 7


def test_normalisation_and_names_are_those_of_the_models_card(tmp_path):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    model = copy.deepcopy(kind_model("tiny"))
    model.card = dataclasses.replace(Card.unnamed(5), names=tuple("abcde"), mean=mean, std=std)
    options = ExportOptions(SIZE, dense=8, logits=True)
    told = export_onnx(model, tmp_path / "net.onnx", options)
    assert (told["names"], told["mean"], told["std"]) == (list("abcde"), list(mean), list(std))
    images = torch.rand(1, 3, *SIZE)
    found = open_session(tmp_path / "net.onnx", "onnxruntime", 1)(images=images.numpy())["logits"]
    centred, scale = (torch.tensor(one).reshape(1, 3, 1, 1) for one in (mean, std))
    with torch.no_grad():
        assert relative_error(torch.from_numpy(found), model.dense((images - centred) / scale, 8)) < 1e-5


def test_stock_operators_with_readable_names_and_one_copy_of_the_weights(exported):
    graph = onnx.load(exported[0])
    assert {one.domain for one in graph.opset_import} == {""}
    assert not graph.functions
    names = [node.name for node in graph.graph.node]
    assert len(set(names)) == len(names)
    assert {"backbone.layer3.0.conv2/lattice", "backbone.layer3.0.conv2/extra", "head.reduce.0/extra"} <= set(
        names
    )
    weights = [
        one for one in graph.graph.initializer if one.name.startswith("weights.backbone.layer4.1.conv2")
    ]
    assert sum(len(one.dims) == 4 for one in weights) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (31, 64)}, "size 31x64 is too small; images must have at least 32x32 px"),
        ({"fine_fraction": 0.01}, "a fine fraction of 0.01 gives none of 24 blocks; choose a larger one"),
        ({"dense": 7}, "output_stride must be a power of two, px, not 7"),
        ({"merge": "blend"}, "unknown merge 'blend'; choose one of whole, patch"),
    ],
)
def test_options_that_do_not_fit(change, message):
    options = {"size": SIZE, **change}
    with pytest.raises((SparseSegError, ValueError), match=message) as error:
        StaticNetwork(kind_model("tiny", "entropy"), ExportOptions(**options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"exchange": "separate"}, {}, r"exchange separate .* with --dense only"),
        ({"mask": {"policy": "random"}}, {}, "random draws anew each time, which no graph does"),
        (
            {"head": "deeplabv3", "dilate_second": False},
            {"merge": "patch"},
            "the coarse pass depend on the mask",
        ),
    ],
)
def test_networks_that_cannot_be_exported(change, options, message):
    model = build_model(SMALL | {"mask": {"policy": "edge"}} | change).eval()
    with pytest.raises(SparseSegError, match=message):
        StaticNetwork(model, ExportOptions(SIZE, **options))
    StaticNetwork(model, ExportOptions(SIZE, dense=8))


@pytest.mark.slow
def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        export_onnx(kind_model("tiny"), tmp_path / "file" / "net.onnx", ExportOptions(SIZE), check=False)


def test_missing_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(SparseSegError, match=r"needs the package onnx: pip install 'sparse_seg\[export\]'"):
        export_onnx(kind_model("tiny"), tmp_path / "net.onnx", ExportOptions(SIZE))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(SparseSegError, match="openvino is not installed: pip install openvino"):
        open_session(b"", "openvino")


@pytest.mark.slow
def test_command_line(tmp_path, capsys):
    config = tmp_path / "net.yaml"
    config.write_text("model: {width: 0.125, head_channels: 16, mask: {policy: edge}}\n")
    from sparse_seg.config import load_config
    from sparse_seg.run.build import build_model
    from sparse_seg.training.checkpoint import save_checkpoint

    loaded = load_config(config)
    save_checkpoint(tmp_path / "net.pt", loaded, build_model(loaded).state_dict(), frame=[256, 384])
    out = tmp_path / "net.onnx"
    arguments = ["export", str(config), str(tmp_path / "net.pt"), str(out), "--size", "64x96"]
    assert main([*arguments, "--fine-fraction", "0.2", "--policy", "confidence"]) == 0
    said = capsys.readouterr().out
    assert "equal to the model in onnxruntime" in said
    assert "note: trained on frames of about 256x384 px; a --size near that suits it best" in said
    about = json.loads(onnx.load(out).metadata_props[0].value)
    assert (about["policy"], about["frame"]) == ("confidence", [256, 384])
    assert len(about["names"]) == len(about["colours"])
    assert main([*arguments, "--policy", "given", "--input", "uint8"]) == 0
    assert [one.name for one in onnx.load(out).graph.input] == ["images", "blocks"]
    assert main([*arguments, "--set", "model.mask.threshold=0.5"]) == 1
    assert capsys.readouterr().err.startswith("error: a threshold gives another number of blocks")


@pytest.mark.slow
def test_timing_of_a_network():
    image, model = np.zeros((1, 3, *SIZE), np.float32), kind_model("lite", "entropy")
    timed = time_network(model, image, 1, ("torch",), ("patch",), turns=2, repeats=2)
    assert set(timed) == {"fine torch", "coarse torch", "selective torch patch"}
    assert all(len(run.samples) == 4 and min(run.samples) > 0 for run in timed.values())
    with pytest.raises(MeasurementError, match="missing cannot be timed"):
        timed_apart({"missing": partial(open_run, "none.onnx", "onnxruntime", image)}, 1, 10, 5)


def write_peer(path, shape=(1, 3, *SIZE), inputs=("x",), dtype=onnx.TensorProto.FLOAT):
    """A graph that passes its first input on."""
    given = [onnx.helper.make_tensor_value_info(name, dtype, shape) for name in inputs]
    found = onnx.helper.make_tensor_value_info("y", dtype, shape)
    node = onnx.helper.make_node("Identity", [inputs[0]], ["y"])
    graph = onnx.helper.make_graph([node], "peer", given, [found])
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return str(path)


@pytest.mark.slow
def test_peers_take_turns_with_a_network(tmp_path, capsys):
    peer, out = write_peer(tmp_path / "light one.onnx", (1, 3, "H", "W")), tmp_path / "times.json"
    arguments = ["benchmark", "configs/camvid_light.yaml", "--size", "64x96", "--scopes", "--repeats", "1"]
    assert main([*arguments, "--peer-onnx", peer, "--runtimes", "onnxruntime", "--json", str(out)]) == 0
    assert "peer onnxruntime light one" in capsys.readouterr().out
    found = {row["run"]: row for row in json.loads(out.read_text())["runtimes"]}
    assert found["peer onnxruntime light one"].keys() == {
        "threads", "run", "milliseconds", "least", "of_fine"
    }  # fmt: skip
    assert found["peer onnxruntime light one"]["of_fine"] < found["selective onnxruntime whole"]["of_fine"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--peer-onnx", peer, "--runtimes", "torch"])
    assert stop.value.code == 2
    assert "needs --runtimes with onnxruntime or openvino" in capsys.readouterr().err


def test_peers_that_cannot_be_timed(tmp_path):
    def refused(path, message):
        with pytest.raises(ConfigError, match=message):
            peer_graphs([str(path)], ["onnxruntime"], (1, 3, *SIZE))

    refused(tmp_path / "none.onnx", "none.onnx: no such file")
    (tmp_path / "text.onnx").write_text("no graph")
    refused(tmp_path / "text.onnx", "text.onnx is no ONNX file")
    refused(write_peer(tmp_path / "two.onnx", inputs=("x", "z")), "has 2 inputs")
    refused(write_peer(tmp_path / "wide.onnx", (1, 3, 64, 64)), r"x is FLOAT \[1, 3, 64, 64\]")
    refused(write_peer(tmp_path / "half.onnx", dtype=onnx.TensorProto.FLOAT16), "x is FLOAT16")
    (tmp_path / "b").mkdir()
    twins = [write_peer(tmp_path / "a.onnx"), write_peer(tmp_path / "b" / "a.onnx")]
    with pytest.raises(ConfigError, match="another peer is called a"):
        peer_graphs(twins, ["onnxruntime"], (1, 3, *SIZE))


def test_rows_of_timings():
    times = {
        "fine a": 40.0,
        "fine b": 30.0,
        "coarse a": 10.0,
        "selective a patch": 15.0,
        "selective b whole": 20.0,
    }
    timed = {name: Latency((value, value + 1, value - 1)) for name, value in times.items()}
    found = {row["run"]: row for row in rows(timed, (60.0, 64.0, {"patch": 63.0}))}
    assert found["selective a patch"]["of_fine"] == 0.5
    assert found["selective a patch"]["time_share"] == 0.25
    assert found["selective a patch"]["lift"] == 0.5
    assert "lift" not in found["selective b whole"]
