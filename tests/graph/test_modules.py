"""Odd but real modules: what they give is what the graph gives, in evaluation, in training, from a file, and
exported."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg import load_model, save_model, selective
from sparse_seg.errors import TrainingError
from sparse_seg.export import ExportOptions, StaticNetwork, export_onnx, to_onnx
from sparse_seg.run.values import Interpreter
from sparse_seg.run.way import Way
from sparse_seg.sites import Taps
from tests.graph.toys import Doing, Toy, check_module, conv
from tests.reference import relative_error

SIZE = (64, 64)
EVERY_CHOICE = (None, (8, 16), (4, 8, 16), (8, 16, 32))  # of strides; None: the module's own


def resized(logits: Tensor, images: Tensor) -> Tensor:
    return F.interpolate(logits, images.shape[2:], mode="bilinear")


def in_place_on_what_others_read(toy: Any, images: Tensor) -> Tensor:
    x = F.relu_(toy.a(toy.stem(images)))
    y = toy.b(x).add_(x)
    z = F.relu_(y)
    return toy.head(toy.d(z) + y)


def in_place_by_another_name(toy: Any, images: Tensor) -> Tensor:
    x = toy.a(toy.stem(images))
    x.contiguous().relu_()
    return toy.head(toy.d(toy.b(x)))


def in_place_on_a_half(toy: Any, images: Tensor) -> Tensor:
    one, other = toy.a(toy.stem(images)).chunk(2, 1)
    return toy.head(toy.d(toy.b(torch.cat([one.mul_(3), other], 1))))


def gated(toy: Any, images: Tensor) -> Tensor:
    """An early value is gated by what is computed from it."""
    early = toy.stem[:3](images)
    gate = toy.body(images).mean((2, 3), keepdim=True).sigmoid()
    return toy.head(toy.d(toy.b(toy.stem[5](toy.stem[3](early * gate)))))


def normalising(toy: Any, images: Tensor) -> Any:
    std = torch.tensor([0.2, 0.3, 0.4]).to(images) * torch.linspace(1, 2, 3, device=images.device)
    return Toy.forward(toy, (images - toy.mean) / std.view(1, 3, 1, 1) + torch.full((1,), 0.5))


def padding(toy: Any, images: Tensor) -> Any:
    """Pads images to multiples of 32 itself, and cuts the logits."""
    height, width = images.shape[2:]
    padded = F.pad(images, (0, -width % 32, 0, -height % 32))
    return Toy.forward(toy, padded)[:, :, :height, :width]


def cropping(toy: Any, images: Tensor) -> Tensor:
    logits = F.interpolate(toy.head(toy.body(images)), scale_factor=8, mode="bilinear")
    return logits[:, :, : images.shape[2], : images.shape[3]]


def scaled(toy: Any, images: Tensor) -> Tensor:
    logits = toy.head(toy.body(images))
    return F.interpolate(logits, scale_factor=8, mode="bilinear", align_corners=True)


def nearest(toy: Any, images: Tensor) -> Tensor:
    return F.interpolate(toy.head(toy.body(images)), images.shape[2:])


def selecting(toy: Any, images: Tensor) -> Tensor:
    """Selective kernels (Li et al., CVPR 2019): two convolutions, stacked, and weights of both."""
    x = toy.stem(images)
    both = torch.stack([toy.a(x), toy.norm(x)], 1)
    weights = toy.weigh(both.sum(1)).unflatten(1, (2, 8)).softmax(1)
    x = toy.d(F.relu(toy.b(toy.down((both * weights).sum(1)))))
    return resized(toy.head(x), images)


def adding(toy: Any, images: Tensor) -> Tensor:
    """A sum of stacked values, as in smp's FPN."""
    x = toy.a(toy.stem(images))
    return resized(toy.head(F.relu(torch.stack([x, toy.b(x), toy.d(x)]).sum(dim=0))), images)


def striding(toy: Any, images: Tensor) -> Tensor:
    """A dilated window at 8 px, then a stride to 16."""
    x = F.relu(toy.b(toy.down(F.relu(toy.wide(toy.stem(images))))))
    return resized(toy.head(toy.d(x)), images)


class Standardised(nn.Conv2d):
    """Weight standardisation (Qiao et al., 2019), as timm has it, with a scale for each channel."""

    def __init__(self) -> None:
        super().__init__(8, 8, 3, padding=2, dilation=2)
        self.gain = nn.Parameter(torch.rand(8, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = self.weight.reshape(1, 8, -1), (self.gain * 0.3).view(-1)
        weight = F.batch_norm(rows, None, None, weight=scale, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=2, dilation=2)


def computed() -> Doing:
    """Weights that are computed of parameters."""
    return Doing(b=Standardised(), d=nn.utils.parametrizations.weight_norm(conv(2)))


def tied() -> Toy:
    toy = Toy()
    toy.d.weight = toy.b.weight
    return toy


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, 2, 1),
        nn.Identity(), nn.Conv2d(8, 8, 3, 1, 2, 2), nn.Dropout(), nn.Conv2d(8, 5, 1),
        nn.Upsample(scale_factor=8, mode="bilinear"),
    )  # fmt: skip


def summed() -> Doing:
    branches = nn.ModuleList([conv(rate) for rate in (2, 4, 6)])
    return Doing(
        lambda toy, x: toy.head(sum(one(toy.a(toy.stem(x))) for one in toy.branches)), branches=branches
    )


@pytest.mark.parametrize(
    ("build", "strides"),
    [
        *((lambda does=does: Doing(does), (None,))
          for does in (in_place_on_what_others_read, in_place_by_another_name, in_place_on_a_half, gated,
                       scaled, lambda toy, x: (Toy.forward(toy, x), toy.stem(x)))),
        (lambda: Doing(normalising, mean=nn.Buffer(torch.rand(1, 3, 1, 1))), (None,)),
        *((lambda does=does: Doing(does), (None, (4, 8, 16))) for does in (adding, nearest)),
        (lambda: Doing(selecting, weigh=nn.Conv2d(8, 16, 1), down=conv(1, 2)), EVERY_CHOICE),
        (lambda: Doing(striding, wide=conv(2), down=conv(1, 2)), EVERY_CHOICE),
        *((build, (None,)) for build in (computed, tied, sequential, summed)),
        (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(Toy()), (None,)),
        (lambda: Toy(affine=False), (None,)),
        (lambda: Toy(momentum=None), (None,)),
        (lambda: Toy().requires_grad_(False), (None,)),
    ],
)  # fmt: skip
def test_modules(build: Any, strides: Any):
    torch.manual_seed(0)
    for choice in strides:
        check_module(build(), choice)


@torch.no_grad()
def test_gates_of_what_comes_before_them_at_finer_strides():
    module = Doing(gated).double().eval()
    network, images = selective(module, strides=(4, 8), size=SIZE), torch.randn(1, 3, 64, 96).double()
    run = network.start(images).follow(Way.dense(8))
    assert relative_error(run.grid_logits(), module(images)) < 1e-12
    assert network(images).isfinite().all()


@torch.no_grad()
def test_files_of_computed_weights_and_of_finer_strides_than_the_modules(tmp_path: Path):
    coarse = Doing(
        lambda toy, x: toy.head(toy.body(x) * torch.arange(8).view(1, 8, 1, 1)),
        a=conv(1, 2), b=conv(), d=conv(),
    )  # fmt: skip
    for module, strides in ((computed(), None), (coarse, (8, 16))):
        network, images = selective(module.eval(), strides, size=SIZE), torch.randn(1, 3, 64, 96)
        save_model(network, tmp_path / "net.safetensors")
        assert torch.equal(load_model(tmp_path / "net.safetensors")(images), network(images))
        assert relative_error(network.for_inference()(images), network(images)) < 1e-5


def test_computed_weights_do_not_train():
    module = computed().eval()
    network = selective(module, size=SIZE)
    for refused in (network.train, lambda: selective(module.train(), size=SIZE)):
        with pytest.raises(TrainingError, match=r"^conv2d in b computes its weight of parameters"):
            refused()


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}])
def test_statistics_move_as_the_modules_do(options: dict[str, Any]):
    module = Toy(**options).double().train()
    module.norm.eval()  # a norm that someone has frozen stays as it is
    twin = copy.deepcopy(module)
    network = selective(module, size=SIZE)
    for _ in range(3):
        images = torch.randn(2, 3, 64, 64).double()
        assert relative_error(network.dense(images, 8), twin(images)) < 1e-12
    for (name, ours), theirs in zip(module.named_buffers(), twin.buffers(), strict=True):
        assert relative_error(ours.double(), theirs.double()) < 1e-12, name
    assert module.norm.num_batches_tracked == 0


def test_dropout_drops_whole_channels_of_sites():
    module = Doing(lambda toy, x: F.dropout2d(toy.body(x) + 1, 0.5, toy.training)).train()
    network = selective(module, size=SIZE)
    dense = network.start(torch.randn(2, 3, 64, 64)).follow(Way.dense(8)).grid_logits()
    dropped = (dense == 0).flatten(2)
    assert torch.equal(dropped.any(2), dropped.all(2))
    mixed = network.start(torch.randn(2, 3, 64, 64)).take(torch.rand(2, 4, 4) < 0.5).grid_logits()
    mixed.sum().backward()
    gradient = module.b.weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()


@torch.no_grad()
def test_channels_last():
    module: nn.Module = Toy().eval()
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network, images = selective(module, size=SIZE), torch.randn(2, 3, 64, 96)
    blocks, last = torch.rand(2, 4, 6) < 0.5, images.to(memory_format=torch.channels_last)
    assert relative_error(network(last, blocks), network(images, blocks)) < 1e-5


def pooling(toy: Any, images: Tensor) -> Tensor:
    """A pyramid of poolings (Zhao et al., CVPR 2017), whose places do not divide the grid."""
    x = toy.body(images)
    pooled = [F.interpolate(F.adaptive_avg_pool2d(x, n), x.shape[2:], mode="bilinear") for n in (3, 6)]
    return resized(toy.head(toy.joined(torch.cat([x, *pooled], 1))), images)


def normed(toy: Any, images: Tensor) -> Tensor:
    x = toy.b(toy.stem(images))
    x = toy.d(toy.over(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    return resized(toy.head(x), images)


def with_layer_norm() -> Doing:
    """Behind a pooling whose size the exporter does not tell."""
    toy = Doing(normed, over=nn.LayerNorm(8))
    toy.stem[3], toy.stem[4] = conv(), nn.MaxPool2d(2, 2, ceil_mode=True)
    return toy


def patches() -> Toy:
    toy = Toy()
    toy.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 2, 2))
    return toy


@pytest.mark.parametrize(
    ("build", "size"),
    [(lambda: Doing(pooling, joined=nn.Conv2d(24, 8, 1)), (64, 96)), (with_layer_norm, (33, 47))],
)
def test_exports_are_the_model(build: Any, size: tuple[int, int], tmp_path: Path):
    pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    network = selective(build().eval(), (8, 16), "edge", 0.4, SIZE)
    export_onnx(network, tmp_path / "net.onnx", ExportOptions(size, logits=True))  # checks itself


@pytest.mark.parametrize(
    ("build", "told", "warned"),
    [
        (
            with_layer_norm,
            "no multiples of 4 px results differ from the module's, whose stem.4 halves",
            False,
        ),
        (patches, "no multiples of 8 px results differ from the module's, whose stem.1 halves them", False),
        (lambda: Doing(padding), "no multiples of 32 px results differ from the module's, which pads,", True),
        (lambda: Doing(cropping), "no multiples of 8 px results differ from the module's, which pads,", True),
    ],
)
def test_where_sizes_matter_is_told(build: Any, told: str, warned: bool, tmp_path: Path):
    with pytest.warns(UserWarning, match=told) if warned else nullcontext():
        network = check_module(build())
    save_model(network.float(), tmp_path / "net.safetensors")
    for one in (network, load_model(tmp_path / "net.safetensors")):
        assert told in str(one.report())


def far_reaching(far: int = 40) -> Doing:
    """An atrous branch of which small images hold one tap alone: 320 px at 40 cells."""
    return Doing(
        lambda toy, x: resized(toy.head(F.relu(toy.near(y := toy.body(x)) + toy.far(y))), x),
        near=conv(7), far=conv(far),
    )  # fmt: skip


@pytest.mark.parametrize("size", [(64, 96), (47, 200)])
@torch.no_grad()
def test_taps_that_are_always_outside_are_left_out(size: tuple[int, int]):
    """Where they are early, on rows, and behind the rows: 328 px mix phases, so that the window is late."""
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    for far, merge in ((40, "whole"), (41, "patch")):
        network = check_module(far_reaching(far), (8, 16), size=size)
        run = Interpreter(network.geometry, network.tensors, images)
        assert [run.taps[node.name].number for node in network.graph.nodes if node.layer == "far"] == [1]
        blocks = torch.ones(2, -(-size[0] // 16), -(-size[1] // 16), dtype=torch.bool)
        found = network.start(images).take(blocks, Way(merge=merge)).logits()
        assert relative_error(found, network.dense(images, 8)) < 1e-12


def test_which_taps_reach_an_image():
    taps = Taps((-64, 0, 64), (-32, 0, 32))
    assert taps.part(taps.inside((65, 33))) == taps
    assert taps.part(taps.inside((64, 33))) == Taps((0,), (-32, 0, 32))
    assert taps.part(taps.inside((64, 32))) == Taps((0,), (0,))
    assert Taps((64, 128), (0,)).inside((64, 64)) == (slice(0, 1), slice(0, 1))


def test_uneven_padding_is_part_of_the_exported_convolution():
    pytest.importorskip("onnx")
    module = Doing(lambda toy, x: resized(toy.head(toy.body(F.pad(x, (0, 1, 0, 1)))), x))
    module.stem[0] = nn.Conv2d(3, 8, 3, 2)
    network = selective(module.eval(), (8, 16), "edge", size=SIZE)
    nodes = to_onnx(StaticNetwork(network, ExportOptions((64, 96), given=True))).graph.node
    pads = [list(one.ints) for node in nodes for one in node.attribute if one.name == "pads"]
    assert [0, 0, 1, 1] in pads
    assert not any(node.op_type == "Pad" for node in nodes)
