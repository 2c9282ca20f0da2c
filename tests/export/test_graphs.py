"""Static networks, and their graphs in runtimes, give the model's own blocks, logits and classes."""

import importlib.util
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_seg.config import MaskConfig, ModelConfig
from sparse_seg.errors import SparseSegError
from sparse_seg.export import ExportOptions, StaticNetwork, export_onnx, open_session, to_onnx
from sparse_seg.graph import capture
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.selective import build_network
from tests.export.kinds import KINDS, POLICIES, arrays, cases, compare, kind_model
from tests.fast import one_fast
from tests.graph.drawn import FAMILIES, draw_network
from tests.graph.test_random_networks import few

needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="needs the package onnx")
RUNTIMES = [one for one in ("onnxruntime", "openvino") if importlib.util.find_spec(one) is not None]
RUNTIMES = RUNTIMES if importlib.util.find_spec("onnx") is not None else []


def check(model: SelectiveNetwork, options: ExportOptions, runtimes: list[str] = RUNTIMES) -> None:
    """In PyTorch, and in runtimes."""
    network = StaticNetwork(model, options)
    inputs_of, names = cases(network, 2), network.interface()[1]
    for inputs, images in inputs_of:
        with torch.no_grad():
            compare(model, network, inputs, images, dict(zip(names, network(*inputs), strict=True)))
    graph = to_onnx(network).SerializeToString() if runtimes else b""
    for runtime in runtimes:
        session = open_session(graph, runtime, threads=1)
        for inputs, images in inputs_of:
            found = session(**arrays(network, inputs)).items()
            compare(model, network, inputs, images, {key: torch.from_numpy(one) for key, one in found})


@pytest.mark.parametrize(
    "kind",
    [one if one == "undilated" else pytest.param(one, marks=pytest.mark.slow) for one in KINDS],
)
def test_networks_of_ours(kind):
    """With given blocks; and in a batch under a policy, every shape fixed."""
    check(kind_model(kind), ExportOptions((47, 101), given=True, logits=True))
    fixed = ExportOptions((47, 101), 3, logits=True, ghosts=False, tiles=False)
    check(kind_model(kind, "entropy"), fixed, [])


@pytest.mark.parametrize("family", one_fast("resizing", *FAMILIES))
@settings(few, max_examples=2)
@given(st.data())
def test_networks_drawn_at_random(family, data):
    module = draw_network(data.draw, family).float()
    graph, constants = capture(module, (64, 64))
    mask = MaskConfig(policy="edge", fine_fraction=0.3)
    for strides in ([8, 16], [8, 16, 32]):
        chosen = ModelConfig(module="drawn", strides=strides, mask=mask)
        network = build_network(graph, module, constants, chosen).eval()
        check(
            network,
            ExportOptions((47, 101), given=True, logits=True),
            RUNTIMES[:1] if strides == [8, 16] else [],
        )


OPTIONS: list[tuple[str, str, dict[str, Any]]] = [
    *(("lite", policy, {}) for policy in POLICIES if policy != "boundary"),
    *((kind, "gain", {"size": (47, 101), "batch": 3}) for kind in ("plus", "8 16 32", "4 8 16")),
    *((kind, "entropy", {"size": (75, 64), "batch": 3, "input": "uint8"}) for kind in ("plus", "8 16 32")),
    *(("deeplabv3", "edge", {"batch": 2, "dense": stride}) for stride in (8, 16)),
    *((kind, "edge", {"size": (47, 96), "dense": 32}) for kind in ("lite", "smp's plus", "4 8 16")),
    ("undilated", "entropy", {"size": (47, 101), "batch": 2}),
    ("8 16 32", "entropy", {"size": (47, 101), "ghosts": False, "tiles": False}),
    ("plus", "edge", {"dense": 4}),
    ("deeplabv3", "entropy", {"size": (75, 101), "batch": 2, "merge": "patch"}),
    ("8 16 32", "gain", {"size": (75, 101), "batch": 2, "merge": "patch"}),
    ("4 8 16", "entropy", {"size": (75, 101), "batch": 2, "merge": "patch"}),
    ("plus", "entropy", {"size": (75, 91), "merge": "patch"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "policy", "options"), OPTIONS, ids=str)
def test_policies_and_options(name, policy, options):
    check(kind_model(name, policy), ExportOptions(**{"size": (64, 96), "logits": True, **options}))


@pytest.mark.parametrize(
    ("name", "policy", "options"),
    [
        ("lite", "entropy", {}),
        ("deep", "boundary", {"size": (47, 101), "batch": 3}),
        ("4 8 16", "entropy", {"input": "uint8"}),
        ("8 16 32", "entropy", {"merge": "patch"}),
        *(
            (kind, "edge", {"batch": 1, "merge": "patch", "given": True, "fine_fraction": 1.0})
            for kind in ("lite", "4 8 16")  # dense, by P2
        ),
        ("plus", "entropy", {"dense": 16}),
        *(
            (kind, "entropy", {"size": (96, 160), "batch": 1, "fine_fraction": fraction, "given": True})
            for kind in ("deeplabv3", "8 16 32")
            for fraction in (0.07, 1.0)  # one block, and all
        ),
    ],
    ids=str,
)
def test_a_few_of_them_in_pytorch(name, policy, options):
    options = ExportOptions(**{"size": (47, 96), "batch": 2, "logits": True, **options})
    check(kind_model(name, policy), options, [])


@pytest.mark.slow
@torch.no_grad()
def test_it_is_one_graph_of_fixed_shapes():
    """torch.export and torch.compile take it whole: no branch and no shape depends on the data."""
    network = StaticNetwork(
        kind_model("8 16 32", "entropy"), ExportOptions((64, 96), ghosts=False, tiles=False)
    )
    inputs, _ = cases(network, 1)[0]
    expected = network(*inputs)
    program = torch.export.export(network, network.example())
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    for outputs in (program.module()(*inputs), compiled(*inputs)):
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    values = [node.meta.get("val") for node in program.graph.nodes]
    assert not [value for value in values if isinstance(value, torch.SymInt)]


@needs_onnx
def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
    monkeypatch.setattr("sparse_seg.export.static._fold_std", lambda *_: True)  # std is lost
    with pytest.raises(SparseSegError, match="the exported graph differs from the model"):
        export_onnx(kind_model("lite"), tmp_path / "net.onnx", ExportOptions((64, 96)))
    assert not list(tmp_path.iterdir())
