"""A network in onnxruntime or OpenVINO has the model's interface; what it refuses."""

import copy
import dataclasses

import pytest
import torch

from sparse_seg.errors import SparseSegError
from sparse_seg.export import cuda_graph, in_runtime, onnx_segmentor, open_session
from sparse_seg.masks import ConfidencePolicy
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from tests.export.kinds import kind_model
from tests.fast import one_fast
from tests.reference import block_mask, relative_error

pytest.importorskip("onnx", reason="needs the package onnx")


@pytest.mark.slow
def test_graphs_are_made_once_and_their_number_is_bounded(made):
    pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
    fast = onnx_segmentor.OnnxSegmentor(kind_model("tiny", "edge"), "onnxruntime", 1, most=2)
    sizes = [(32, 32), (32, 48), (32, 32), (48, 48), (32, 32), (32, 48)]
    for size in sizes:
        assert fast.classify(torch.randn(1, 3, *size))[0].shape == (1, *size)
    assert [network.options.size for network in made] == [(32, 32), (32, 48), (48, 48), (32, 48)]
    for fraction in (0.2, 0.2, 0.4):  # equal policies share a graph
        fast.classify(torch.randn(1, 3, 32, 48), policy=ConfidencePolicy(fraction))
    assert len(made) == 4 + 2


@pytest.mark.parametrize("runtime", ["onnxruntime", "auto"])
def test_a_model_that_has_changed_is_told(runtime):
    """Its old graphs would give the old results, and new ones go by the old name in the cache on disk."""
    pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
    images = torch.randn(1, 3, 64, 96)

    def train(model):
        with torch.no_grad():
            next(model.parameters()).mul_(1.05)

    def choose(model):
        model.policy.fine_fraction = 0.5

    def exchange(model):
        model.settings = dataclasses.replace(model.settings, exchange="nearest")

    def assign(model):
        model.load_state_dict({name: value * 1.05 for name, value in model.state_dict().items()}, assign=True)

    def replace(model):
        model.module.head = torch.nn.Conv2d(8, 5, 1)

    for change in (train, choose, exchange, SelectiveNetwork.half, assign, replace):
        model = copy.deepcopy(kind_model("tiny", "edge"))
        fast = in_runtime(model, runtime, 1)
        fast.start(images)
        change(model)
        with pytest.raises(SparseSegError, match="has changed since its graphs were made: call in_runtime"):
            fast(images)


@pytest.mark.parametrize("runtime", ["onnxruntime", "auto"])
def test_images_that_ask_for_gradients_are_told(runtime):
    pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
    fast, images = in_runtime(kind_model("tiny", "edge"), runtime, 1), torch.randn(1, 3, 64, 96)
    images.requires_grad_()
    with pytest.raises(ValueError, match=r"gives no gradients, .*: pass images\.detach\(\)"):
        fast(images)
    with torch.no_grad():
        fast.start(images)


@torch.no_grad()
def test_a_call_warns_of_bytes_once():
    fast = in_runtime(kind_model("tiny", "edge"), "auto", 1)
    with pytest.warns(UserWarning, match=r"look like 0\.\.255") as told:
        fast.dense(torch.rand(1, 3, 64, 96) * 255)
    assert len(told) == 1


def test_what_a_runtime_refuses():
    pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
    model, images = kind_model("tiny", "edge"), torch.randn(2, 3, 64, 96)
    fast, blocks = in_runtime(model, "onnxruntime", 1), torch.zeros(2, 4, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="must be a network of this package, not Conv2d: load_model reads a"):
        in_runtime(torch.nn.Conv2d(3, 3, 1), "onnxruntime")  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"look like 0\.\.255"):
        fast.start(images.abs() * 100)
    with pytest.raises(ValueError, match="a dense run has no mask: give output_stride or fine_blocks"):
        fast.classify(images, output_stride=8, fine_blocks=blocks)
    for wrong, message in (
        (images.double(), "float32 images, not torch.float64"),
        (images[..., :16], "32x32"),
    ):
        with pytest.raises(ValueError, match=message):
            fast(wrong)
    fast.dense(images, 8)
    for stride in (8.0, "8"):  # as the model says it
        for place in (model, fast, in_runtime(model, "auto", 1)):
            with pytest.raises(ValueError, match=f"output_stride must be a power of two, px, not {stride!r}"):
                place.dense(images, stride)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads must be a whole number from 1, not '2'"):
        in_runtime(model, "onnxruntime", "2")  # type: ignore[arg-type]
    blocks[0, 0, 0] = True
    for mask in (blocks, blocks & False):
        with pytest.raises(ValueError, match="need the same number of fine blocks, and some"):
            fast(images, fine_blocks=mask)
    with pytest.raises(ValueError, match="must be bool"):
        fast(images, fine_blocks=blocks.long())
    with pytest.raises(ValueError, match=r"must be \[2, 4, 6\], not \[2, 6, 4\]"):
        fast(images, fine_blocks=blocks.transpose(1, 2))
    with pytest.raises(SparseSegError, match="exchange rule, not none"):
        fast.start(images).take(blocks, Way(exchange="none"))
    with pytest.raises(ValueError, match="a dense run has no mask"):
        _ = fast.start(images).follow(Way.dense(8)).levels
    for way, message in (
        (Way.policy("previous", 0.2), "mask policy previous needs more than the image"),
        (Way.policy("random", 0.2), "mask policy random needs more than the image"),
        (Way.policy("oracle", 0.2), "mask policy oracle reads what no mask can know"),
        (Way(exchange="nearest"), "a graph has the model's exchange rule, not nearest"),
        (Way.policy("edge", 0.001), "gives none of 24 blocks"),
    ):
        with pytest.raises(SparseSegError, match=message):
            fast.start(images).follow(way).classes()
    with pytest.raises(SparseSegError, match="not for three strides"):
        in_runtime(kind_model("8 16 32", "edge"), "onnxruntime", 1)(images)
    with pytest.raises(SparseSegError, match="not for three strides"):
        in_runtime(kind_model("8 16 32", "edge"), "onnxruntime", 1)(images, blocks)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_cuda_graphs(dtype):
    model = copy.deepcopy(kind_model("lite", "entropy")).cuda().to(dtype)
    fast, images = cuda_graph.CudaGraphSegmentor(model), torch.randn(3, 1, 3, 64, 96).to("cuda", dtype)
    first, second, _ = (fast(each) for each in images)
    assert not torch.equal(first, second), "each call gives tensors of its own"
    mask = block_mask("random", (1, 4, 6)).cuda()
    for each in images:
        ours = fast(each, fine_blocks=mask), fast.dense(each, 8)
        expected = model(each, fine_blocks=mask), model.dense(each, 8)
        assert max(map(relative_error, ours, expected)) < 2e-2
    assert fast.made == 3


def test_cuda_graphs_need_a_cuda_device():
    with pytest.raises(SparseSegError, match="needs a model on a CUDA device; this one is on the cpu"):
        in_runtime(kind_model("tiny", "edge"), "cuda-graph")


@pytest.mark.parametrize("policy", one_fast("learned", "edge", "entropy"))
@torch.no_grad()
def test_cuda_graphs_in_half_precision(policy, replayed_here):
    torch.manual_seed(0)
    model, images = copy.deepcopy(kind_model("lite", policy)), torch.randn(1, 3, 64, 96)
    expected = model.dense(images, 8)
    for one in (model.bfloat16(), model.for_inference().bfloat16()):
        fast = cuda_graph.CudaGraphSegmentor(one)
        assert relative_error(fast.dense(images.bfloat16(), 8).float(), expected) < 0.05
        assert fast(images.bfloat16()).dtype == one(images.bfloat16()).dtype == torch.float32


def test_a_cuda_graph_that_differs_is_refused(replayed_here, monkeypatch):
    monkeypatch.setattr(cuda_graph, "graphed", lambda module, *_: lambda images: module(images.flip(-1)))
    with pytest.raises(SparseSegError, match="gives other results than PyTorch"):
        in_runtime(kind_model("tiny", "edge"), "cuda-graph")(torch.randn(1, 3, 64, 96))


def test_what_no_cuda_graph_captures_is_one_line(replayed_here, monkeypatch):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nMore lines")

    monkeypatch.setattr(cuda_graph, "graphed", fail)
    with pytest.raises(SparseSegError, match=r"^cuda-graph cannot capture this network: op.* is capturing$"):
        in_runtime(kind_model("tiny", "edge"), "cuda-graph")(torch.randn(1, 3, 64, 96))


def test_unknown_runtime():
    with pytest.raises(SparseSegError, match="unknown runtime 'tflite'; choose one of onnxruntime, openvino"):
        open_session(b"", "tflite")
    with pytest.raises(SparseSegError, match="unknown runtime 'cuda_graph'; did you mean 'cuda-graph'"):
        in_runtime(kind_model("tiny", "edge"), "cuda_graph")
