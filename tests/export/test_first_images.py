"""A graph's first images are compared with PyTorch; threads share a network; the model says the device."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sparse_seg.errors import SparseSegError
from sparse_seg.export import StaticNetwork, in_runtime, open_session
from sparse_seg.export import runner as rules
from sparse_seg.export.onnx_segmentor import OnnxSegmentor
from sparse_seg.export.runner import Runner
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from tests.export.kinds import kind_model
from tests.reference import relative_error

pytest.importorskip("onnx", reason="needs the package onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")


def own_cut() -> SelectiveNetwork:
    model = copy.deepcopy(kind_model("tiny", "edge"))
    policy = type(model.policy)

    class Lowest(policy):  # type: ignore[misc, valid-type]
        def cut(self, scores):
            return super().cut(-scores)

    model.policy.__class__ = Lowest
    return model


def negated(network: StaticNetwork, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    logits, chosen = grid_logits(network, *inputs)
    return -logits, chosen


grid_logits = StaticNetwork.grid_logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("is_negated", "ways", "wrong"),
    [
        (True, [Way(), Way.dense(8)], r"(logits|\d.* % of the classes) differ"),
        (False, [Way()], r"\d blocks are chosen otherwise"),
    ],
)
def test_a_wrong_graph_is_noticed(is_negated, ways, wrong, images, monkeypatch):
    model = kind_model("tiny", "edge") if is_negated else own_cut()
    if is_negated:
        monkeypatch.setattr(StaticNetwork, "grid_logits", negated)
    fast = in_runtime(model, "onnxruntime", 1)
    for way, result in zip(ways, ("classes", "logits"), strict=False):
        with pytest.raises(SparseSegError, match=rf"than PyTorch: {wrong}.*\(--runtime torch\)$"):
            getattr(fast.start(images).follow(way), result)()
    for name in ("NODE_SECONDS", "RUNS"):
        monkeypatch.setattr(rules, name, 0)
    runner = Runner(model, "auto", ways[0])
    for _ in range(4):
        assert torch.equal(
            runner.start(images).follow(ways[0]).classes(),
            model.for_inference().start(images).follow(ways[0]).classes(),
        )
    assert runner.runs == {"torch": 4}
    assert runner.report().startswith("runtime: torch (the graph gives other results than PyTorch: ")


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["edge, cad", "entropy", "boundary"])
def test_an_empty_first_image_is_no_difference(policy):
    """Its blocks have the same scores."""
    kind = "deep" if policy == "boundary" else "lite"  # whose logits are nowhere equal to rounding
    fast = in_runtime(kind_model(kind, policy), "onnxruntime", 1)
    assert fast.classify(torch.zeros(1, 3, 64, 96))[0].shape == (1, 64, 96)


def test_it_runs_on_the_models_device_and_autocast_outside_changes_nothing(images, monkeypatch):
    asked = []

    def opened(*arguments):
        asked.append(arguments[-1])
        return open_session(*arguments)

    monkeypatch.setattr("sparse_seg.export.onnx_segmentor.open_session", opened)
    model = kind_model("tiny", "edge")
    with torch.autocast("cpu", torch.bfloat16):
        logits = in_runtime(model, "onnxruntime", 1)(images)
    assert asked == [torch.device("cpu")]
    with torch.no_grad():
        assert relative_error(logits, model(images)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_threads_get_their_own_results(runtime):
    """The first ones find no graph."""
    pytest.importorskip(runtime, reason=f"needs the package {runtime}")
    model, count = kind_model("tiny", "entropy"), 4
    images = torch.randn(count, 1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    fast, alone = OnnxSegmentor(model, runtime, 1), in_runtime(model, runtime, 1)
    expected = [alone.classify(one)[0] for one in images]
    together = threading.Barrier(count)

    def work(number: int) -> bool:
        together.wait()
        found = [fast.classify(images[number])[0] for _ in range(30)]
        return all(torch.equal(one, expected[number]) for one in found)

    with ThreadPoolExecutor(count) as threads:
        assert all(threads.map(work, range(count)))
    assert fast.made == 1


def test_threads_share_the_dictionary_of_graphs(tmp_path, monkeypatch):
    """A graph for each of more sizes than are kept, asked for by several threads; the first images are empty,
    so that all their blocks have the same score."""
    monkeypatch.setenv("SPARSE_SEG_CACHE", str(tmp_path))  # what was dropped is opened again
    monkeypatch.setattr("sparse_seg.export.segmentor.GRAPHS", 1)
    fast = in_runtime(kind_model("tiny", "edge"), "onnxruntime", 1)

    def work(width: int) -> bool:
        return all(fast.classify(torch.zeros(1, 3, 32, width))[0].shape[2] == width for _ in range(3))

    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(work, (32, 48)))


@pytest.mark.parametrize(
    ("device", "listed", "taken"),
    [
        ("cpu", ["CUDAExecutionProvider", "CPUExecutionProvider"], ["CPUExecutionProvider"]),
        ("cuda:1", ["CPUExecutionProvider"], ["CPUExecutionProvider"]),
        (
            "cuda:1",
            ["CUDAExecutionProvider", "CPUExecutionProvider"],
            [("CUDAExecutionProvider", {"device_id": 1, "use_tf32": 0}), "CPUExecutionProvider"],
        ),
    ],
)
def test_onnxruntime_runs_on_the_device_that_is_asked_for(device, listed, taken, monkeypatch):
    opened = []

    class Session:
        def __init__(self, graph, options, providers):
            opened.append(providers)

        def get_outputs(self):
            return []

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    open_session(b"", "onnxruntime", device=device)
    assert opened == [taken]
