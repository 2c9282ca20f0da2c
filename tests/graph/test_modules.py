"""Odd but real modules: what they give is what the graph gives, in evaluation and in training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg import load_model, save_model, selective
from sparse_seg.errors import TrainingError
from sparse_seg.run.way import Way
from tests.graph.toys import Gated, Toy, check_module
from tests.reference import relative_error

SIZE = (64, 64)


class Shared(Toy):
    """Activations in place on what others read."""

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu_(self.a(self.stem(images)))
        y = self.b(x).add_(x)
        z = F.relu_(y)
        return self.head(self.d(z) + y)


class Alias(Toy):
    def forward(self, images: Tensor) -> Tensor:
        x = self.a(self.stem(images))
        x.contiguous().relu_()
        return self.head(self.d(self.b(x)))


class Tied(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.d.weight = self.b.weight


class Normalising(Toy):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Any:
        std = torch.tensor([0.2, 0.3, 0.4]).to(images) * torch.linspace(1, 2, 3, device=images.device)
        return super().forward((images - self.mean) / std.view(1, 3, 1, 1) + torch.full((1,), 0.5))


class Summed(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(8, 8, 3, 1, rate, rate) for rate in (2, 4, 6)])

    def forward(self, images: Tensor) -> Tensor:
        x = self.a(self.stem(images))
        return self.head(sum(branch(x) for branch in self.branches))


class Scaled(Toy):
    def forward(self, images: Tensor) -> Tensor:
        return F.interpolate(
            self.head(self.body(images)), scale_factor=8, mode="bilinear", align_corners=True
        )


class First(Toy):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images), self.stem(images)


class Attended(Toy):
    """Selective kernels (Li et al., CVPR 2019), with efficient channel attention's convolution (Wang et al.,
    CVPR 2020) where they have two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Conv1d(1, 2, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.a(self.stem(images))
        paths = torch.stack([self.b(x), self.d(x)], 1)
        pooled = paths.sum(1).mean((2, 3))
        weights = self.attention(pooled[:, None]).softmax(1)[:, :, :, None, None]
        return self.head(self.b((paths * weights).sum(1)))


class Standardised(nn.Conv2d):
    """Weight standardisation (Qiao et al., 2019), as timm has it, with a scale for each channel."""

    def __init__(self) -> None:
        super().__init__(8, 8, 3, padding=2, dilation=2)
        self.gain = nn.Parameter(torch.rand(8, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = self.weight.reshape(1, 8, -1), (self.gain * 0.3).view(-1)
        weight = F.batch_norm(rows, None, None, weight=scale, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=2, dilation=2)


class Computed(Toy):
    """Weights that are computed of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.d = Standardised(), nn.utils.parametrizations.weight_norm(self.d)


class Halves(Toy):
    """Changes a half in place, and reads the halves."""

    def forward(self, images: Tensor) -> Tensor:
        one, other = self.a(self.stem(images)).chunk(2, 1)
        return self.head(self.d(self.b(torch.cat([one.mul_(3), other], 1))))


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, 2, 1),
        nn.Identity(), nn.Conv2d(8, 8, 3, 1, 2, 2), nn.Dropout(), nn.Conv2d(8, 5, 1),
        nn.Upsample(scale_factor=8, mode="bilinear"),
    )  # fmt: skip


def sync_norms() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(Toy())


@pytest.mark.parametrize(
    "build",
    [Shared, Alias, Gated, Tied, Normalising, Summed, Scaled, First, Attended, Computed, Halves,
     sequential, sync_norms,
     lambda: Toy(affine=False), lambda: Toy(momentum=None), lambda: Toy().requires_grad_(False)],
)  # fmt: skip
def test_modules(build: Any):
    check_module(build(), fine=0.01 if build is Attended else 1e-12)


def test_computed_weights_are_saved_and_do_not_train(tmp_path: Path):
    module = Computed().eval()
    network, images = selective(module, size=SIZE), torch.randn(1, 3, 64, 96)
    save_model(network, tmp_path / "net.safetensors")
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path / "net.safetensors")(images), network(images))
        assert relative_error(network.for_inference()(images), network(images)) < 1e-5
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
    class Dropping(Toy):
        def forward(self, images: Tensor) -> Tensor:
            return F.dropout2d(self.body(images) + 1, 0.5, self.training)

    module = Dropping().train()
    network = selective(module, size=SIZE)
    dense = network.start(torch.randn(2, 3, 64, 64)).follow(Way.dense(8)).grid_logits()
    dropped = (dense == 0).flatten(2)
    assert torch.equal(dropped.any(2), dropped.all(2))
    mixed = network.start(torch.randn(2, 3, 64, 64)).take(torch.rand(2, 4, 4) < 0.5).grid_logits()
    mixed.sum().backward()
    gradient = module.b.weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype):
    module = Toy().eval()
    images, blocks = torch.randn(1, 3, 64, 96), torch.rand(1, 4, 6) < 0.5
    with torch.no_grad():
        expected = selective(module, size=SIZE)(images, blocks)
        network = selective(copy.deepcopy(module).to(dtype), size=SIZE)
        for one in (network, network.for_inference()):
            assert relative_error(one(images.to(dtype), blocks), expected) < 0.05


def test_autocast_and_channels_last():
    module: nn.Module = Toy().eval()
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network, images = selective(module, size=SIZE), torch.randn(2, 3, 64, 96)
    blocks = torch.rand(2, 4, 6) < 0.5
    with torch.no_grad():
        expected = network(images, blocks)
        assert relative_error(network(images.to(memory_format=torch.channels_last), blocks), expected) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(network(images, blocks), expected) < 0.05
    network.train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = network.start(images).take(blocks).grid_logits()
    logits.float().square().sum().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in network.parameters())


@torch.no_grad()
def test_gates_of_what_comes_before_them_at_finer_strides():
    module = Gated().double().eval()
    network, images = selective(module, strides=(4, 8), size=SIZE), torch.randn(1, 3, 64, 96).double()
    run = network.start(images).follow(Way.dense(8))
    assert relative_error(run.grid_logits(), module(images)) < 1e-12
    assert network(images).isfinite().all()
