"""What a user is told: one line that names the layer; and what capturing leaves as it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg import selective
from sparse_seg.errors import SparseSegError
from sparse_seg.run.check import GraphDiffers, check_graph
from sparse_seg.run.selective import build_network
from tests.graph.toys import Toy
from tests.reference import relative_error

SIZE = (64, 64)


class Cumulative(nn.Module):
    def forward(self, x: Tensor, axis: int) -> Tensor:
        return x.cumsum(axis)


class Unknown(Toy):
    """An operator that no family knows, in a layer that is called with more than grids."""

    def __init__(self) -> None:
        super().__init__()
        self.running = Cumulative()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.running(self.body(images), 1))


class Strange(Toy):
    def forward(self, images: Tensor) -> Any:
        return {"masks": super().forward(images)}


class Branching(Toy):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images if images.mean() > 0 else -images)


class Strided(Toy):
    """Strides in place of dilation: output stride 32."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.d = nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)


class Pyramid(Strided):
    """Two resolutions joined behind the last stage, whose stride is 32, the finer first."""

    def forward(self, images: Tensor) -> Tensor:
        fine = self.b(self.stem(images))
        coarse = self.d(fine)
        size = images.shape[2] // 8, images.shape[3] // 8
        return self.head(F.interpolate(fine, size) + F.interpolate(coarse, size))


class Branches(Strided):
    """A branch that goes on down after it was brought up for another one, as HRNet's."""

    def forward(self, images: Tensor) -> Tensor:
        stem = self.stem(images)
        coarse = self.b(stem)
        fine = stem + F.interpolate(coarse, stem.shape[2:])
        return self.head(fine + F.interpolate(self.d(coarse), stem.shape[2:]))


class Writing(Toy):
    """Writes to a part of a tensor."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        features[:, :4] *= 2
        return self.head(features)


class Whole(Toy):
    """Changes a half in place by a view, and reads the whole."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.a(self.stem(images))
        x.chunk(2, 1)[0].relu_()
        return self.head(self.d(self.b(x)))


class Stepping(Toy):
    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images)[:, :, ::2, ::2])


class Cutting(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Conv2d(8, 8, 3)


class Halving(Toy):
    def forward(self, images: Tensor) -> Tensor:
        x = self.body(images)
        return self.head(x + F.interpolate(F.adaptive_avg_pool2d(x, (x.shape[2] // 2, 2)), x.shape[2:]))


class Deciding(Toy):
    """Gives probabilities, or their logarithms."""

    def __init__(self, classes: int, by: Callable[[Tensor], Tensor]) -> None:
        super().__init__(classes)
        self.by = by

    def forward(self, images: Tensor) -> Tensor:
        return self.by(super().forward(images))


class Random(Toy):
    def body(self, images: Tensor) -> Tensor:
        return F.dropout(super().body(images), 0.5, True)


class Own(Tensor):
    """A kind of tensor that makes all that is computed of it one of its kind."""


class Wrapped(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(self.head.weight.detach().as_subclass(Own))


class Noisy(Toy):
    def body(self, images: Tensor) -> Tensor:
        return super().body(images) + torch.rand(1)


class Overflowing(Toy):
    def body(self, images: Tensor) -> Tensor:
        return super().body(images).mul(1e4).mul(1e4).mul(1e4)


class Sized(Toy):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * images.shape[2]


class Grouped(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.stem.append(nn.GroupNorm(2, 8))


class Padding(Toy):
    def forward(self, images: Tensor) -> Tensor:
        return F.pad(super().forward(images), (1, 1, 1, 1))


class Stacking(Toy):
    def forward(self, images: Tensor) -> Tensor:
        x = self.a(self.stem(images))
        return self.head(torch.stack([self.b(x), self.d(x)]).relu().sum(0))


class Vector(Toy):
    def forward(self, images: Tensor) -> Tensor:
        return self.body(images).mean((2, 3))


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (Unknown, r"^running: the operator cumsum is not known to run on sites; replace the layer"),
        (Strange, r"^the module returns a dict; it must return logits, or a dict with 'out' or 'logits'"),
        (Branching, r"Branching at 64x64: what it runs depends on the values of the images \(test_messages"),
        (Strided, r"nothing of this network can run selectively .* build it with dilation in place"),
        (Pyramid, r"at strides 32 and 64: .* taps lie at most 16 px apart \(conv2d in d\) .* must lie 64"),
        (Branches, r"conv2d in d is at 32 px, behind an upsampling from 16: a network of several branches"),
        (Stepping, r"^the network: every 2th of an axis$"),
        (Cutting, r"differs from the module by .*: conv2d in d gives \(6, 6\) of \(8, 8\) places; pad it"),
        (Sized, r"at 192x128 by .* of the logits, first in the network itself$"),
        (Random, r"^the module gives another result each time: it is random, or keeps what it has seen"),
        (Noisy, r"^the network: rand draws at random, another value at each run$"),
        (lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 3, 1), Toy()),
         r"^0: the operator pixel_unshuffle is not known to run on sites"),
        (lambda: Overflowing().half(), r"not finite in torch.float16 .*; capture it in float32, and"),
        (Halving, r"depends on the images' size: captured at 64x64, its graph differs at 192x128 by"),
        (lambda: Deciding(1, torch.sigmoid), r"the network ends in a sigmoid; give its logits, without it"),
        (lambda: Deciding(5, lambda x: x.softmax(1)), r"the network ends in a softmax; give its logits"),
        (lambda: Deciding(5, lambda x: x.log_softmax(1)), r"the network ends in a log_softmax; give its"),
        (Padding, r"^the network: padding that no window reads$"),
        (Stacking, r"^the network: relu of values stacked along another axis than the channels"),
        (Vector, r"the network gives \[1, 8, 1, 1\], not logits"),
        (Writing, r"^the network: copy_ writes to a part of a tensor; make a new one, by torch.cat"),
        (Whole, r"^the network: relu_ writes to a part of a tensor"),
        (lambda: nn.Sequential(nn.LazyConv2d(8, 3), Toy()), r"has lazy layers without weights: run"),
        (lambda: Toy().to("meta"), r"stem.0.weight is on the meta device .* load the weights first"),
        (Wrapped, r"head.weight is a Own: make it a plain tensor"),
        (lambda: selective(Toy().eval(), size=SIZE), r"runs selectively already: give selective"),
        (lambda: nn.Sequential(nn.Conv2d(4, 8, 3)), r"cannot trace Sequential at 64x64: .* have 4 channels"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_networks_that_cannot(build: Callable[[], nn.Module], says: str, capfd: pytest.CaptureFixture[str]):
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
        selective(Grouped().eval(), (4, 8), size=SIZE)
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
    module = Toy()
    module.d = nn.Sequential(module.d, nn.InstanceNorm2d(8))  # type: ignore[assignment]
    network = selective(module.to(dtype), size=SIZE)
    assert network(torch.randn(1, 3, *SIZE, dtype=dtype)).isfinite().all()


def test_what_it_tells():
    network = selective(Toy().eval(), fine_fraction=0.25, size=SIZE)
    report = network.report()
    rows = {row.layer: row for row in report.rows}
    assert [rows[name].part for name in ("stem.0", "stem.5", "a", "b", "head")] == ["early"] * 2 + [
        "rows"
    ] * 3
    assert [rows[name].spacing for name in ("stem.0", "stem.5", "a", "b", "head")] == [1, 4, 8, 16, 0]
    assert rows["b"].dense == 64 * 576
    assert rows["b"].selective == round((1 + 3 * 0.25) * 16) * 576
    assert "0.25 fine" in str(report)
    assert "16 px" in str(report)
    assert "convolutions: 3 early, 4 rows, 0 late" in repr(network)


def test_the_module_stays_as_it_was():
    module = Toy().train()
    module.stem.eval()  # someone's frozen stem
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    network = selective(module, size=SIZE)
    assert network.training
    assert module.training
    assert not module.stem.training
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(layer._forward_hooks for layer in module.modules())
    assert {name.removeprefix("module.") for name in network.state_dict()} == set(before)
    assert next(network.parameters()) is next(module.parameters())


def test_wrappers_are_taken_off():
    assert isinstance(selective(nn.DataParallel(Toy()), size=SIZE).module, Toy)


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


def test_any_size_from_32_px_up():
    network = selective(Toy().eval(), size=SIZE)
    with torch.no_grad():
        for size in ((32, 32), (75, 53), (64, 130)):
            assert network(torch.randn(1, 3, *size)).shape == (1, 5, *size)
            images = torch.randn(1, 3, *size)
            assert (
                relative_error(network.dense(images, 8), F.interpolate(network.module(images), size)) < 1e-4
            )
