"""Exported files of captured networks give the network's own blocks, logits and classes."""

import numpy as np
import pytest
import torch

from sparse_seg import segment
from sparse_seg.errors import SparseSegError
from sparse_seg.export import ExportOptions, StaticNetwork, export_onnx, in_runtime, open_session, to_onnx
from tests.export.kinds import arrays, cases, compare
from tests.export.networks import NETWORKS, captured

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
    _check(name, "edge", ExportOptions((47, 101), given=True, logits=True))


@pytest.mark.parametrize(
    ("name", "policy", "options"),
    [
        ("low level", "entropy", {"size": (75, 101), "input": "uint8"}),
        ("low level", "gain", {"batch": 2, "input": "uint8"}),
        ("low level", "learned", {}),
        ("corners", "entropy", {"size": (47, 101)}),
        ("aspp", "entropy", {"ghosts": False, "tiles": False}),
        ("8 16 32", "entropy", {"size": (47, 101), "ghosts": False, "tiles": False}),
        ("aspp", "entropy", {"batch": 2, "merge": "patch"}),
        ("8 16 32", "entropy", {"batch": 2, "merge": "patch"}),
        ("low level", "edge", {"dense": 4}),
        ("low level", "edge", {"size": (47, 96), "dense": 32}),
        ("mixing", "edge", {"size": (47, 96), "batch": 2, "dense": 8}),
        ("mixing", "entropy", {"size": (47, 96)}),
    ],
    ids=str,
)
def test_policies_and_options(name, policy, options):
    _check(name, policy, ExportOptions(**{"size": (64, 96), "logits": True, **options}))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", NETWORKS)
def test_batches_under_policies(name, runtime):
    _check(name, "entropy", ExportOptions((96, 64), 3, logits=True), runtime)


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
    monkeypatch.setattr("sparse_seg.export.static._fold_std", lambda *_: True)  # std is lost
    with pytest.raises(SparseSegError, match="the exported graph differs from the model"):
        export_onnx(captured("aspp"), tmp_path / "net.onnx", ExportOptions((64, 96)))
    assert not list(tmp_path.iterdir())


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
