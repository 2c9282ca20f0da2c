"""What a user is told: one line that names the layer; and what reading leaves as it was."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg import load_model, save_model, selective
from sparse_seg.errors import SparseSegError
from sparse_seg.graph import logits_of
from sparse_seg.run.check import GraphDiffers, check_graph
from sparse_seg.run.selective import build_network
from tests.graph.toys import Doing, Toy, conv
from tests.reference import relative_error

SIZE = (64, 64)


class Cumulative(nn.Module):
    """An operator that no family knows, in a layer that is called with more than grids."""

    def forward(self, x: Tensor, axis: int) -> Tensor:
        return x.cumsum(axis)


def pyramid(toy: Any, images: Tensor) -> Tensor:
    """Two resolutions joined behind the last stage, whose stride is 32, the finer first."""
    fine = toy.b(toy.stem(images))
    coarse, size = toy.d(fine), (images.shape[2] // 8, images.shape[3] // 8)
    return toy.head(F.interpolate(fine, size) + F.interpolate(coarse, size))


def branches(toy: Any, images: Tensor) -> Tensor:
    """A branch that goes on down after it was brought up for another one, as HRNet's."""
    stem = toy.stem(images)
    coarse = toy.b(stem)
    fine = stem + F.interpolate(coarse, stem.shape[2:])
    return toy.head(fine + F.interpolate(toy.d(coarse), stem.shape[2:]))


def writes_a_part(toy: Any, images: Tensor) -> Tensor:
    features = toy.body(images)
    features[:, :4] *= 2
    return toy.head(features)


def reads_the_whole(toy: Any, images: Tensor) -> Tensor:
    """Changes a half in place by a view."""
    x = toy.a(toy.stem(images))
    x.chunk(2, 1)[0].relu_()
    return toy.head(toy.d(toy.b(x)))


def halves(toy: Any, images: Tensor) -> Tensor:
    x = toy.body(images)
    return toy.head(x + F.interpolate(F.adaptive_avg_pool2d(x, (x.shape[2] // 2, 2)), x.shape[2:]))


class Own(Tensor):
    """A kind of tensor that makes all that is computed of it one of its kind."""


def wrapped() -> Toy:
    toy = Toy()
    toy.head.weight = nn.Parameter(toy.head.weight.detach().as_subclass(Own))
    return toy


def strided(does: Any = Toy.forward) -> Doing:
    """Strides in place of dilation: output stride 32."""
    return Doing(does, b=conv(1, 2), d=conv(1, 2))


def grouped() -> Doing:
    toy = Doing()
    toy.stem.append(nn.GroupNorm(2, 8))
    return toy


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Doing(lambda toy, x: toy.head(toy.running(toy.body(x), 1)), running=Cumulative()),
         r"^running: the operator cumsum is not known to run on sites; replace the layer"),
        (lambda: Doing(lambda toy, x: {"masks": toy.head(toy.body(x))}),
         r"^the module returns a dict; it must return logits, or a dict with 'out' or 'logits'"),
        (lambda: Doing(lambda toy, x: toy.head(toy.body(x if x.mean() > 0 else -x))),
         r"Doing at 64x64: what it runs depends on the values of the images \(test_messages"),
        (strided, r"nothing of this network can run selectively .* build it with dilation in place"),
        (lambda: strided(pyramid),
         r"at strides 32 and 64: .* taps lie at most 16 px apart \(conv2d in d\) .* must lie 64"),
        (lambda: strided(branches),
         r"conv2d in d is at 32 px, behind an upsampling from 16: a network of several branches"),
        (lambda: Doing(lambda toy, x: toy.head(toy.body(x)[:, :, ::2, ::2])),
         r"^the network: every 2th of an axis$"),
        (lambda: Doing(d=nn.Conv2d(8, 8, 3)),
         r"differs from the module by .*: conv2d in d gives \(6, 6\) of \(8, 8\) places; pad it"),
        (lambda: Doing(halves),
         r"depends on the images' size: captured at 64x64, its graph differs at 192x128 by"),
        (lambda: Doing(lambda toy, x: Toy.forward(toy, x) * x.shape[2]),
         r"at 192x128 by .* of the logits, first in the network itself$"),
        (lambda: Doing(lambda toy, x: toy.head(F.dropout(toy.body(x), 0.5, True))),
         r"^the module gives another result each time: it is random, or keeps what it has seen"),
        (lambda: Doing(lambda toy, x: toy.head(toy.body(x) + torch.rand(1))),
         r"^the network: rand draws at random, another value at each run$"),
        (lambda: Doing(lambda toy, x: toy.head(toy.body(x) * 1e4 * 1e4 * 1e4)).half(),
         r"not finite in torch.float16 .*; capture it in float32, and"),
        (lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 3, 1), Toy()),
         r"^0: the operator pixel_unshuffle is not known to run on sites"),
        (lambda: Doing(lambda toy, x: Toy.forward(toy, x).sigmoid()),
         r"the network ends in a sigmoid; give its logits, without it"),
        (lambda: Doing(lambda toy, x: Toy.forward(toy, x).softmax(1)), r"ends in a softmax; give its logits"),
        (lambda: Doing(lambda toy, x: Toy.forward(toy, x).log_softmax(1)), r"ends in a log_softmax; give"),
        (lambda: Doing(lambda toy, x: F.pad(Toy.forward(toy, x), (1, 1, 1, 1))),
         r"^the network: padding that no window reads$"),
        (lambda: Doing(lambda toy, x: toy.head(torch.stack([toy.body(x), toy.stem(x)]).relu().sum(0))),
         r"^the network: relu of values stacked along another axis than the channels"),
        (lambda: Doing(lambda toy, x: toy.body(x).mean((2, 3))),
         r"the network gives \[1, 8, 1, 1\], not logits"),
        (lambda: Doing(writes_a_part),
         r"^the network: copy_ writes to a part of a tensor; make a new one, by torch.cat"),
        (lambda: Doing(reads_the_whole), r"^the network: relu_ writes to a part of a tensor"),
        (lambda: nn.Sequential(nn.LazyConv2d(8, 3), Toy()), r"has lazy layers without weights: run"),
        (lambda: Toy().to("meta"), r"stem.0.weight is on the meta device .* load the weights first"),
        (wrapped, r"head.weight is a Own: make it a plain tensor"),
        (lambda: selective(Toy().eval(), size=SIZE), r"runs selectively already: give selective"),
        (lambda: nn.Sequential(nn.Conv2d(4, 8, 3)), r"cannot trace Sequential at 64x64: .* have 4 channels"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_networks_that_cannot(build: Any, says: str, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(SparseSegError, match=says) as caught:
        selective(build(), size=SIZE)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_what_is_no_module_size_stride_or_policy():
    with pytest.raises(SparseSegError, match=r"takes a torch.nn.Module, not function"):
        selective(lambda x: x)  # type: ignore[arg-type]
    for size in ((100, 100), (512.0, 512.0), ("64", "64")):
        with pytest.raises(SparseSegError, match=r"multiples of 64 px, not \("):
            selective(Toy(), size=size)  # type: ignore[arg-type]
    with pytest.raises(SparseSegError, match=r"a mask policy is a name, .* not None"):
        selective(Toy(), policy=None)  # type: ignore[arg-type]
    with pytest.raises(SparseSegError, match=r"fine_fraction must lie in 0..1, not 'a'"):
        selective(Toy(), fine_fraction="a", size=SIZE)  # type: ignore[arg-type]
    for strides, told in (((8, 32), "32"), (8, "8"), ("auto", "'auto'"), ((8, None), "None")):
        with pytest.raises(SparseSegError, match=rf"each twice the one before, .* not .*{told}"):
            selective(Toy(), strides, size=SIZE)  # type: ignore[arg-type]
    says = r"group_norm in stem.7 reads all places .* at 8 px: at the strides \[4, 8\] .* finest may be 8"
    with pytest.raises(SparseSegError, match=says):
        selective(grouped().eval(), (4, 8), size=SIZE)
    network, images = selective(Toy().eval(), size=SIZE), torch.randn(1, 3, 64, 64)
    for stride in (0, -8, 12, "8", None):
        with pytest.raises(ValueError, match=r"output_stride must be a power of two|needs an output stride"):
            network.dense(images, stride)  # type: ignore[arg-type]


def test_a_graph_that_differs_names_the_first_layer():
    module = Toy().eval()
    network = selective(module, size=SIZE)
    wrong = copy.deepcopy(network.graph)
    for node in wrong.nodes:
        if node.layer == "b":
            node.options["dilation"], node.options["padding"] = [4, 4], [4, 4]
    with pytest.raises(GraphDiffers, match=r"of the logits, first in b"):
        check_graph(build_network(wrong, module, {}, network.settings), module, SIZE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_no_difference(dtype: torch.dtype):
    module = Doing(d=nn.Sequential(conv(2), nn.InstanceNorm2d(8))).to(dtype)
    assert selective(module, size=SIZE)(torch.randn(1, 3, *SIZE, dtype=dtype)).isfinite().all()


def test_what_it_tells():
    network = selective(Toy().eval(), fine_fraction=0.25, size=SIZE)
    report = network.report()
    rows = {row.layer: row for row in report.rows}
    places = {"stem.0": ("early", 1), "stem.5": ("early", 4), "a": ("rows", 8), "b": ("rows", 16)}
    for name, place in (places | {"head": ("rows", 0)}).items():
        assert (rows[name].part, rows[name].spacing) == place
    assert rows["b"].dense == 64 * 576
    assert rows["b"].selective == round((1 + 3 * 0.25) * 16) * 576
    assert "0.25 fine" in str(report)
    assert "16 px" in str(report)
    assert "multiples" not in str(report)
    assert "convolutions: 3 early, 4 rows, 0 late" in repr(network)


def test_the_module_stays_as_it_was_and_wrappers_are_taken_off():
    module = Toy().train()
    module.stem.eval()  # someone's frozen stem
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    network = selective(nn.DataParallel(module), size=SIZE)
    assert network.module is module
    assert (network.training, module.training, module.stem.training) == (True, True, False)
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name.removeprefix("module.") for name in network.state_dict()} == set(before)
    assert next(network.parameters()) is next(module.parameters())


def test_a_logit_is_two_classes():
    module = Toy(1).eval()
    network, images = selective(module, size=SIZE), torch.randn(1, 3, 64, 96)
    assert network.num_classes == 2
    assert torch.equal(network.dense(images, 8).argmax(1), (module(images)[:, 0] > 0).long())


@torch.no_grad()
def test_copies_and_threads():
    network = selective(Toy().eval(), size=SIZE)
    several = [torch.randn(1, 3, 64, 64 + 32 * number) for number in range(3)]
    expected = [network(images) for images in several]
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), network.for_inference()):
        assert relative_error(copied(several[0]), expected[0]) < 1e-5

    @torch.no_grad()  # which each thread asks for
    def error(number: int) -> float:
        return max(relative_error(network(several[number]), expected[number]) for _ in range(3))

    with ThreadPoolExecutor() as threads:
        assert max(threads.map(error, range(3))) < 1e-5


# -- what its code may do when it is read --------------------------------------------------------------------


def keeps_what_it_computes(toy: Any, images: Tensor) -> Tensor:
    """Of its parameters, at the first call."""
    if not hasattr(toy, "kept"):
        toy.kept = toy.scale * 2
    return toy.head(toy.body(images) * toy.kept)


def makes_and_moves_tensors(toy: Any, images: Tensor) -> Tensor:
    """Where the images are; and casts them as the images are."""
    std = torch.tensor([0.5, 0.25, 0.5], device=images.device, dtype=images.dtype).view(3, 1, 1)
    images = (images - toy.mean.to(images.device) * 2) / std * images.new_tensor([2.0])
    with torch.autocast(images.device.type, enabled=False):
        return toy.head(toy.body(images + toy.mean.type_as(images).exp()))


def attends_to_channels(toy: Any, images: Tensor) -> Tensor:
    """By their maximum (CBAM), and by a convolution over them (ECA)."""
    x = toy.body(images)
    x = x * F.adaptive_max_pool2d(x, 1).sigmoid()
    return toy.head(x * toy.over(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1).sigmoid())


def attending() -> Doing:
    return Doing(attends_to_channels, over=nn.Conv1d(1, 1, 3, padding=1, bias=False))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Doing(keeps_what_it_computes, scale=torch.rand(8, 1, 1)),
        lambda: Doing(makes_and_moves_tensors, mean=nn.Buffer(torch.rand(3, 1, 1))),
        attending,
        lambda: Doing(b=torch.jit.script(conv(2))),
    ],
    ids=["keeping", "placing", "attending", "scripted"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_its_code_may_do_this_and_it_trains_afterwards(build: Any):
    module, images = build().double().eval(), torch.randn(1, 3, 64, 96).double()
    with torch.autocast("cpu", torch.bfloat16):
        network = selective(module, size=SIZE)
    with torch.no_grad():
        run = network.dense(images, 8)
        expected = F.interpolate(logits_of(module(images)), run.shape[2:], mode="bilinear")
        assert relative_error(run, expected) < 1e-12
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
    module.train()(images).square().sum().backward()


def test_files_of_convolutions_over_channels_and_of_norms_of_another_size(tmp_path):
    network, images = selective(attending().eval(), size=SIZE), torch.randn(1, 3, 64, 96)
    save_model(network, tmp_path / "net.safetensors")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "net.safetensors")(images), network(images))
    for name in ("weight", "running_var"):
        setattr(network.module.norm, name, nn.Parameter(torch.ones(16), requires_grad=False))
    save_model(network, tmp_path / "net.safetensors")
    with pytest.raises(SparseSegError, match=r"is \[16\], not \[8\]"):
        load_model(tmp_path / "net.safetensors")


def test_another_thread_may_run_the_module_meanwhile():
    module, ended = Toy().eval(), threading.Event()
    layers = [node.layer for node in selective(module, size=SIZE).graph.nodes]

    def run() -> None:
        with torch.no_grad():
            while not ended.is_set():
                module(torch.zeros(1, 3, 64, 64))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(5):
            assert [node.layer for node in selective(module, size=SIZE).graph.nodes] == layers
    finally:
        ended.set()
        thread.join()
