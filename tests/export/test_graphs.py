"""Exported files of captured networks give the network's own blocks, logits and classes."""

import json

import numpy as np
import pytest
import torch

from sparse_seg import segment
from sparse_seg.errors import SparseSegError
from sparse_seg.export import ExportOptions, StaticNetwork, export_onnx, in_runtime, open_session, to_onnx
from tests.export.kinds import arrays, cases, compare
from tests.export.networks import NETWORKS, captured
from tests.reference import block_mask, relative_error

onnx = pytest.importorskip("onnx", reason="needs the package onnx")
RUNTIMES = ["onnxruntime", "openvino"]


def _check(name: str, policy: str, options: ExportOptions, runtime: str = "onnxruntime") -> None:
    pytest.importorskip(runtime, reason=f"needs the package {runtime}")
    model = captured(name, policy)
    form = StaticNetwork(model, options)
    session = open_session(to_onnx(form).SerializeToString(), runtime, threads=1)
    for inputs, normalised in cases(form, 2):
        found = {key: torch.from_numpy(value) for key, value in session(**arrays(form, inputs)).items()}
        compare(model, form, inputs, normalised, found)


@pytest.mark.parametrize("name", NETWORKS)
def test_given_blocks(name):
    _check(name, "edge", ExportOptions((64, 96), given=True, logits=True))


@pytest.mark.parametrize("name", ["aspp", "low level"])
def test_batches_of_bytes_in_openvino(name):
    _check(name, "edge", ExportOptions((64, 96), 2, input="uint8", logits=True), "openvino")


@pytest.mark.parametrize("policy", ["entropy", "gain", "learned"])
def test_policies(policy):
    _check("low level", policy, ExportOptions((75, 101), 2, input="uint8", logits=True))


@pytest.mark.parametrize("name", ["aspp", "corners", "same padding", "8 16 32"])
def test_odd_sizes(name):
    _check(name, "entropy", ExportOptions((47, 101), logits=True))


@pytest.mark.parametrize("name", ["aspp", "8 16 32"])
def test_static_shapes(name):
    _check(name, "entropy", ExportOptions((64, 96), logits=True, ghosts=False, tiles=False))


@pytest.mark.parametrize("name", ["aspp", "8 16 32"])
def test_merge_patch(name):
    _check(name, "entropy", ExportOptions((64, 96), 2, merge="patch", logits=True))


@pytest.mark.parametrize("name", ["low level", "mixing"])
@pytest.mark.parametrize("stride", [4, 8, 32])
def test_dense(name, stride):
    _check(name, "edge", ExportOptions((47, 96), 2, dense=stride, logits=True))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "mixing"])
def test_batches_under_policies(name, runtime):
    _check(name, "entropy", ExportOptions((96, 64), 3, logits=True), runtime)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("aspp", {"size": (31, 64)}, "size 31x64 is too small"),
        ("aspp", {"dense": 12}, "dense output stride must be a power of two, not 12"),
        ("aspp", {"fine_fraction": 0.01}, "a fine fraction of 0.01 gives none of 24 blocks"),
    ],
)
def test_options_that_do_not_fit(name, change, message):
    options = ExportOptions(**{"size": (64, 96), **change})
    with pytest.raises(SparseSegError, match=message) as error:
        StaticNetwork(captured(name), options)
    assert "\n" not in str(error.value)


def test_a_policy_cannot_read_the_coarse_pass_of_a_network_that_mixes_phases():
    with pytest.raises(SparseSegError, match=r"body\.1\.0 makes the lattice depend on the mask") as error:
        StaticNetwork(captured("mixing", "entropy"), ExportOptions((64, 96)))
    assert "\n" not in str(error.value)


def test_file_is_checked_and_says_what_it_is(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
    path = tmp_path / "net.onnx"
    metadata = export_onnx(captured("aspp", "entropy"), path, ExportOptions((64, 96)), list("abcde"))
    graph = onnx.load(path)
    kept = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(kept["sparse_seg"]) == metadata
    assert (metadata["strides"], metadata["policy"], metadata["merge"]) == ([8, 16], "confidence", "whole")
    assert {one.domain for one in graph.opset_import} == {""}
    names = {node.name for node in graph.graph.node}
    assert {"body.1.depthwise.0/lattice", "neck.atrous.0.0/extra", "classifier/extra"} <= names
    kernels = [one for one in graph.graph.initializer if list(one.dims) == [16, 24, 3, 3]]
    assert len(kernels) == 2  # one copy for grids and rows


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
    monkeypatch.setattr("sparse_seg.export.static._fold_std", lambda *_: True)  # std is lost
    with pytest.raises(SparseSegError, match="the exported graph differs from the model"):
        export_onnx(captured("aspp"), tmp_path / "net.onnx", ExportOptions((64, 96)))
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_segmentor_in_a_runtime():
    pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
    model = captured("low level", "entropy")
    fast = in_runtime(model, "onnxruntime", threads=1)
    images, blocks = torch.randn(1, 3, 64, 96), block_mask("random", (1, 4, 6))
    assert relative_error(fast(images), model(images)) < 1e-5
    assert relative_error(fast(images, fine_blocks=blocks), model(images, fine_blocks=blocks)) < 1e-5
    assert relative_error(fast.dense(images, 16), model.dense(images, 16)) < 1e-5
    (_, found), (_, expected) = fast.classify(images), model.classify(images)
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)


def test_segment_takes_captured_networks_folded_and_in_a_runtime():
    pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
    model = captured("aspp", "entropy")
    image = torch.randint(0, 256, (64, 96, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    expected = segment(model, image)
    for other in (model.for_inference(), in_runtime(model, "onnxruntime", threads=1)):
        found = segment(other, image)
        assert (found.classes != expected.classes).mean() < 1e-3
        assert found.levels is not None
        assert expected.levels is not None
        assert np.array_equal(found.levels, expected.levels)
