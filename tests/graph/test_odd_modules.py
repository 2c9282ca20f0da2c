"""Modules of odd forms: values of two channel axes, windows that stride late, sizes that do not divide."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg import load_model, save_model, selective
from sparse_seg.export import ExportOptions, export_onnx
from tests.graph.toys import Toy, check_module

SIZE = (64, 64)
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(one) is None for one in ("onnx", "onnxruntime")),
    reason="needs the packages onnx and onnxruntime",
)


class Selecting(Toy):
    """Selective kernels (Li et al., CVPR 2019): two convolutions, stacked, and weights of both."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh, self.down = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        both = torch.stack([self.a(x), self.norm(x)], 1)
        weights = self.weigh(both.sum(1)).unflatten(1, (2, 8)).softmax(1)
        x = self.d(F.relu(self.b(self.down((both * weights).sum(1)))))
        return F.interpolate(self.head(x), images.shape[2:], mode="bilinear")


class Adding(Toy):
    """A sum of stacked values, as in smp's FPN."""

    def body(self, images: Tensor) -> Tensor:
        x = self.a(self.stem(images))
        return F.relu(torch.stack([x, self.b(x), self.d(x)]).sum(dim=0))


class Striding(Toy):
    """A dilated window at 8 px, then a stride to 16."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.down = nn.Conv2d(8, 8, 3, 1, 2, 2), nn.Conv2d(8, 8, 3, 2, 1)

    def body(self, images: Tensor) -> Tensor:
        return self.d(F.relu(self.b(self.down(F.relu(self.wide(self.stem(images)))))))


class Nearest(Toy):
    def forward(self, images: Tensor) -> Tensor:
        return F.interpolate(self.head(self.body(images)), images.shape[2:])


@pytest.mark.parametrize(
    ("kind", "strides"),
    [
        *((Selecting, strides) for strides in (None, (8, 16), (4, 8, 16), (8, 16, 32))),
        *((Adding, strides) for strides in (None, (4, 8, 16))),
        *((Striding, strides) for strides in (None, (8, 16), (4, 8, 16), (8, 16, 32))),
        *((Nearest, strides) for strides in (None, (4, 8, 16))),
    ],
)
def test_dense_and_all_fine(kind: type[Toy], strides: tuple[int, ...] | None):
    torch.manual_seed(0)
    check_module(kind(), strides)


@torch.no_grad()
def test_finer_strides_than_its_own_and_whole_numbers_are_saved(tmp_path: Path):
    class Coarse(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(8, 8, 3, 2, 1)
            self.b, self.d = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)

        def body(self, images: Tensor) -> Tensor:
            return super().body(images) * torch.arange(8).view(1, 8, 1, 1)

    network, images = selective(Coarse().eval(), (8, 16), size=SIZE), torch.randn(1, 3, 64, 96)
    save_model(network, tmp_path / "net.safetensors")
    assert torch.equal(load_model(tmp_path / "net.safetensors")(images), network(images))


class Pooling(Toy):
    """A pyramid of poolings (Zhao et al., CVPR 2017), whose places do not divide the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = nn.Conv2d(24, 8, 1)

    def body(self, images: Tensor) -> Tensor:
        x = super().body(images)
        pooled = [F.interpolate(F.adaptive_avg_pool2d(x, n), x.shape[2:], mode="bilinear") for n in (3, 6)]
        return self.joined(torch.cat([x, *pooled], 1))


class Normed(Toy):
    """A layer norm behind a pooling whose size the exporter does not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.stem[3], self.stem[4] = nn.Conv2d(8, 8, 3, 1, 1), nn.MaxPool2d(2, 2, ceil_mode=True)
        self.over = nn.LayerNorm(8)

    def body(self, images: Tensor) -> Tensor:
        x = self.b(self.stem(images))
        return self.d(self.over(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@needs_onnx
@pytest.mark.parametrize(
    ("kind", "policy", "strides", "size"),
    [
        (Pooling, "edge", (8, 16), (64, 96)),
        (Normed, "edge", (8, 16), (33, 47)),
        (Toy, "edge:cad", (8, 16), (70, 101)),
        (Toy, "edge", (8, 16, 32), (33, 47)),
    ],
)
def test_exports_are_the_model(kind: Any, policy: str, strides: Any, size: tuple[int, int], tmp_path: Path):
    network = selective(kind().eval(), strides, policy, 0.4, SIZE)
    export_onnx(network, tmp_path / "net.onnx", ExportOptions(size, logits=True))  # checks itself


class Padding(Toy):
    """Pads images to multiples of 32 itself, and cuts the logits."""

    def forward(self, images: Tensor) -> Any:
        height, width = images.shape[2:]
        padded = F.pad(images, (0, -width % 32, 0, -height % 32))
        return super().forward(padded)[:, :, :height, :width]


class Scaling(Toy):
    def forward(self, images: Tensor) -> Tensor:
        logits = F.interpolate(self.head(self.body(images)), scale_factor=8, mode="bilinear")
        return logits[:, :, : images.shape[2], : images.shape[3]]


class Patches(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 2, 2))


@pytest.mark.parametrize(
    ("kind", "told", "warned"),
    [
        (Toy, "", False),
        (Normed, "no multiples of 4 px results differ from the module's, whose stem.4 halves them", False),
        (Patches, "no multiples of 8 px results differ from the module's, whose stem.1 halves them", False),
        (Padding, "no multiples of 32 px results differ from the module's, which pads, crops or", True),
        (Scaling, "no multiples of 8 px results differ from the module's, which pads, crops or", True),
    ],
)
def test_where_sizes_matter_is_told(kind: type[Toy], told: str, warned: bool, tmp_path: Path):
    with pytest.warns(UserWarning, match=told) if warned else nullcontext():
        network = check_module(kind())
    save_model(network.float(), tmp_path / "net.safetensors")
    for one in (network, load_model(tmp_path / "net.safetensors")):
        assert told in str(one.report()) if told else "multiples" not in str(one.report())
