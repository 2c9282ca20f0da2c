"""What the network is tested against: dense networks of `nn.Conv2d` alone, and the models that are tested.

`DenseSegmentor` uses none of our layers; its parts are written from torchvision's documentation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from sparse_seg import build_model
from sparse_seg.networks.encoder_decoder import EncoderDecoder, build_module
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.passes import Pass
from sparse_seg.sites import Grid, Mixed
from tests.conversion.networks import Aspp, ResNet, conv, conv_bn_relu, resize

if TYPE_CHECKING:
    from tests.slow_reference import SlowSites

SHALLOW = (1, 1, 2, 2)  # a stage's later blocks are all alike
NUM_CLASSES = 5


class DenseLite(nn.Module):
    def __init__(self, inside: int, channels: int, dilation: int = 1) -> None:
        super().__init__()
        depthwise = conv(channels, channels, 3, 1, dilation, channels), nn.BatchNorm2d(channels)
        pointwise = conv(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU()
        self.reduce, self.refine = conv_bn_relu(inside, channels, 1), nn.Sequential(*depthwise, *pointwise)
        self.classifier = nn.Conv2d(channels, NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.refine(self.reduce(x)))


class DenseDeepLabV3(nn.Module):
    """torchvision's DeepLabHead; `rates` are dilations at the stride it runs at."""

    def __init__(self, inside: int, channels: int, rates: Sequence[int], dilation: int = 1) -> None:
        super().__init__()
        self.aspp = Aspp(inside, channels, rates)
        self.refine = conv_bn_relu(channels, channels, 3, dilation)
        self.classifier = nn.Conv2d(channels, NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.refine(self.aspp(x)))


class DenseSegmentor(nn.Module):
    def __init__(self, backbone: ResNet, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def grid_logits(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)[3])

    def forward(self, images: Tensor) -> Tensor:
        return resize(self.grid_logits(images), images.shape[2:])


@torch.no_grad()
def randomise(model: SelectiveNetwork, seed: int = 0) -> None:
    """Random statistics and affine of every batch norm, near what keeps activations of order one."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return (torch.rand(like.shape, generator=generator) * (high - low) + low).to(like)

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        if norm.affine:
            norm.weight.copy_(uniform(norm.weight, 0.5, 1.5))
            norm.bias.copy_(uniform(norm.bias, -0.5, 0.5))
        norm.momentum = 1.0
    # the module itself: a graph keeps the momentum that it was captured with
    model.module.train()(torch.randn(4, 3, 64, 96, generator=generator).to(next(model.parameters())))
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_var.add_(0.05).mul_(uniform(norm.running_var, 0.7, 1.6))
        norm.running_mean.add_(norm.running_var.sqrt() * uniform(norm.running_mean, -0.4, 0.4))
        norm.momentum = 0.1
    model.eval()


@functools.cache
def random_model(
    backbone: str = "resnet18",
    head: str = "lite",
    width: float = 0.125,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    exchange: str = "linear",
    trained_stride: int = 8,
    strides: tuple[int, ...] = (8, 16),
    depths: tuple[int, ...] | None = SHALLOW,
) -> SelectiveNetwork:
    """A network with random weights and statistics, in eval mode. Shared between tests: do not change it."""
    torch.manual_seed(0)
    config = {"backbone": backbone, "head": head, "width": width, "exchange": exchange, "head_channels": 16}
    config |= {"num_classes": NUM_CLASSES, "trained_stride": trained_stride}
    config["aspp_rates"] = [rate * 8 // trained_stride for rate in (4, 8, 12)]
    config |= {"strides": list(strides), "depths": depths and list(depths)}
    model = build_model(config).to(device, dtype)
    randomise(model)
    return model


# settings that converted networks have, in the combinations of their sources
VARIANTS: dict[str, dict[str, Any]] = {
    "fcn": {"backbone": "resnet18", "head": "fcn"},
    "deep stem, pooled, separable": {
        "backbone": "resnet50", "depths": [1, 1, 2, 2], "stem": "deep", "shortcut": "avg_pool",
        "head": "deeplabv3", "aspp_separable": "linear", "separable": "linear",
    },
    "VainF's plus": {"backbone": "resnet18", "head": "deeplabv3plus", "refine": False},
    "smp's plus": {
        "backbone": "resnet18", "head": "deeplabv3plus", "aspp_separable": "linear", "separable": "linear",
        "align_corners": True, "trained_stride": 16, "entry_spacings": [4, 16, 32],
    },
    "mmsegmentation's": {
        "backbone": "resnet18", "head": "deeplabv3", "dilate_second": False, "aspp_projection": False,
    },
    "mmsegmentation's plus": {
        "backbone": "resnet18", "dilate_second": False, "stem": "deep", "head": "deeplabv3plus",
        "aspp_projection": False, "aspp_separable": "normed", "separable": "normed", "decoder_convs": 2,
        "bn_eps": 0.01,
    },
}  # fmt: skip


@functools.cache
def variant_model(name: str, dtype: torch.dtype = torch.float64) -> SelectiveNetwork:
    """A network of `VARIANTS` with random weights and statistics, in eval mode. Shared: do not change it."""
    torch.manual_seed(0)
    common = {"width": 0.125, "head_channels": 16, "low_level_channels": 6, "num_classes": NUM_CLASSES}
    model = build_model(common | {"aspp_rates": [4, 8, 12]} | VARIANTS[name]).to(dtype)
    randomise(model)
    return model


def dense_reference(
    model: SelectiveNetwork, output_stride: int, backbone: str, head: str = "lite", width: float = 0.125
) -> DenseSegmentor:
    """The `nn.Conv2d` network of the same weights at an output stride: no key is missing, none left over."""
    depth, rates = int(backbone.removeprefix("resnet")), [rate * 8 // output_stride for rate in (4, 8, 12)]
    resnet = ResNet(depth, output_stride, width=int(64 * width), depths=model.settings.depths)
    dilation = max(1, 8 // output_stride)  # of the head's last 3x3 convolution
    last: nn.Module = DenseLite(resnet.channels, 16, dilation)
    if head == "deeplabv3":
        last = DenseDeepLabV3(resnet.channels, 16, rates, dilation)
    reference = DenseSegmentor(resnet, last).to(next(model.parameters()))
    reference.load_state_dict(model.module.state_dict())
    return reference.train(model.training)


def plain_network(model: SelectiveNetwork, output_stride: int) -> EncoderDecoder:
    """The module that is built at an output stride, with the same weights and mode."""
    plain = build_module(model.settings, output_stride).to(next(model.parameters()))
    plain.load_state_dict(model.module.state_dict())
    return plain.train(model.training)


Network = TypeVar("Network", bound=nn.Module)


def without_dropout(network: Network) -> Network:
    """In training mode, but for dropout."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    return network


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over largest expected value; infinite for other shapes or values not finite."""
    if actual.shape != expected.shape or not bool(actual.isfinite().all()):
        return float("inf")
    scale = expected.abs().max().item() if expected.numel() else 1.0
    return ((actual - expected).abs().max().item() if expected.numel() else 0.0) / (scale or 1.0)


def block_mask(kind: str, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Fine blocks: empty, full, random, checkerboard, one (in the middle), corner (the last of the grid)."""
    mask = torch.zeros(shape, dtype=torch.bool)
    if kind == "full":
        mask[:] = True
    elif kind == "random":
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.35
    elif kind == "checkerboard":
        mask = (
            torch.arange(shape[1])[:, None]
            .add(torch.arange(shape[2]))
            .remainder(2)
            .bool()
            .expand(shape)
            .clone()
        )
        mask[-1] = ~mask[-1]
    elif kind == "one":
        mask[0, shape[1] // 2, shape[2] // 2] = True
    elif kind == "corner":
        mask[:, -1, -1] = True
    else:
        assert kind == "empty", kind
    return mask


MASKS = ("empty", "full", "random", "checkerboard", "one", "corner")


@torch.no_grad()
def stage_values(run: Pass) -> list[Grid | Mixed]:
    """What the backbone's stages give in a pass that `take` or `follow` has set up, finest first."""
    geometry, names = run.model.geometry, [n.name for n in run.model.graph.nodes if "natural" in n.options]
    if run._stride is not None:
        values = run._run.dense(run._stride, names)
    else:
        assert run._values is not None
        kept = geometry.kept_rows
        geometry.__dict__["kept_rows"] = kept | set(names)  # a cached property: so that the run keeps them
        early = {name for name in names if geometry.kind[name] == "early"}
        try:
            values = run._run.mixed(next(v.sites for v in run._values.values() if isinstance(v, Mixed)))
        finally:
            geometry.__dict__["kept_rows"] = kept
        values |= run._run.dense(geometry.strides[0], early)
    return [values[name] for name in names]


def at_sites(value: Mixed, sites: SlowSites) -> Tensor:
    """Rows `[N, C]` of a value at a reference's sites; elsewhere its grid, completed by `none`, is zero."""
    grid = value.densify("none").tensor
    rows = sites.read(grid)
    assert sites.rebuild(rows, "none").equal(grid), "a value where there is no site"
    return rows
