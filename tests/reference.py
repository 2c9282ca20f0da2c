"""What the network is tested against: dense networks of `nn.Conv2d` alone, and the models that are tested.

`DenseSegmentor` uses none of our layers; it is written from torchvision's documentation.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg import build_model
from sparse_seg.networks.encoder_decoder import EncoderDecoder, build_module
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.passes import Pass
from sparse_seg.sites import Grid, Mixed

if TYPE_CHECKING:
    from tests.slow_reference import SlowSites

DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
}
SHALLOW = (1, 1, 2, 2)  # a stage's later blocks are all alike
NUM_CLASSES = 5


def _conv(inside: int, outside: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(inside, outside, kernel, stride, padding, dilation, bias=False)


class DenseBasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inside: int, width: int, stride: int, first_dilation: int, dilation: int, down: bool):
        super().__init__()
        self.conv1, self.bn1 = _conv(inside, width, 3, stride, first_dilation), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, 1, dilation), nn.BatchNorm2d(width)
        self.downsample = (
            nn.Sequential(_conv(inside, width, 1, stride), nn.BatchNorm2d(width)) if down else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (self.downsample(x) if self.downsample else x))


class DenseBottleneck(nn.Module):
    expansion = 4

    def __init__(self, inside: int, width: int, stride: int, first_dilation: int, dilation: int, down: bool):
        super().__init__()
        outside = 4 * width
        self.conv1, self.bn1 = _conv(inside, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride, first_dilation), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, outside, 1), nn.BatchNorm2d(outside)
        self.downsample = (
            nn.Sequential(_conv(inside, outside, 1, stride), nn.BatchNorm2d(outside)) if down else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(out)) + (self.downsample(x) if self.downsample else x))


class DenseResNet(nn.Module):
    """torchvision's ResNet: `replace_stride_with_dilation` from the stage that would pass `output_stride`.

    A dilated stage's first 3x3 keeps the dilation before it. Basic blocks dilate both their convolutions.
    """

    def __init__(self, name: str, width: float, output_stride: int, depths: Sequence[int] | None) -> None:
        super().__init__()
        block = DenseBasicBlock if name in ("resnet18", "resnet34") else DenseBottleneck
        channels, stride_so_far, dilation = int(64 * width), 4, 1
        stages: list[nn.Sequential] = []
        self.conv1, self.bn1 = _conv(3, channels, 7, 2), nn.BatchNorm2d(channels)
        for number, depth in enumerate(depths or DEPTHS[name], start=1):
            stride, first_dilation = (1 if number == 1 else 2), dilation
            if stride_so_far * stride > output_stride:
                stride, dilation = 1, dilation * 2
            stride_so_far *= stride
            stage_width, blocks = int(64 * width) * 2 ** (number - 1), []
            for index in range(depth):
                down = index == 0 and (number > 1 or channels != stage_width * block.expansion)
                first = (stride, first_dilation) if index == 0 else (1, dilation)
                blocks.append(block(channels, stage_width, *first, dilation, down))
                channels = stage_width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.channels = channels

    def forward(self, images: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, 1)
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            features.append(x)
        return features


class DenseLite(nn.Module):
    def __init__(self, inside: int, channels: int, dilation: int = 1) -> None:
        super().__init__()
        depthwise = nn.Conv2d(channels, channels, 3, 1, dilation, dilation, groups=channels, bias=False)
        self.reduce = nn.Sequential(_conv(inside, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())
        self.refine = nn.Sequential(
            depthwise,
            nn.BatchNorm2d(channels),
            _conv(channels, channels, 1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
        self.classifier = nn.Conv2d(channels, NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.refine(self.reduce(x)))


class DenseDeepLabV3(nn.Module):
    """torchvision's DeepLabHead; `rates` are dilations at the stride it runs at."""

    def __init__(self, inside: int, channels: int, rates: Sequence[int], dilation: int = 1) -> None:
        super().__init__()

        def branch(kernel: int, rate: int) -> nn.Sequential:
            return nn.Sequential(
                _conv(inside, channels, kernel, 1, rate), nn.BatchNorm2d(channels), nn.ReLU()
            )

        pooled = nn.Sequential(nn.Identity(), *branch(1, 1))  # a mean in the place of the first
        self.convs = nn.ModuleList([branch(1, 1), *(branch(3, rate) for rate in rates), pooled])
        width = len(self.convs) * channels
        self.project = nn.Sequential(_conv(width, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())
        last = _conv(channels, channels, 3, 1, dilation)
        self.refine = nn.Sequential(last, nn.BatchNorm2d(channels), nn.ReLU())
        self.classifier = nn.Conv2d(channels, NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = [conv(x) for conv in self.convs[:-1]]
        pooled = self.convs[-1](x.mean((2, 3), keepdim=True))
        branches.append(pooled.expand(-1, -1, *x.shape[2:]))
        return self.classifier(self.refine(self.project(torch.cat(branches, 1))))


class DenseSegmentor(nn.Module):
    """`dilation` is that of the head's last 3x3 convolution."""

    def __init__(
        self,
        name: str,
        width: float,
        output_stride: int,
        head: str,
        channels: int,
        rates: Sequence[int],
        dilation: int,
        depths: Sequence[int] | None,
    ):
        super().__init__()
        self.backbone = DenseResNet(name, width, output_stride, depths)
        inside = self.backbone.channels
        if head == "lite":
            self.head: nn.Module = DenseLite(inside, channels, dilation)
        else:
            self.head = DenseDeepLabV3(inside, channels, rates, dilation)

    def grid_logits(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)[3])

    def forward(self, images: Tensor) -> Tensor:
        size = (images.shape[2], images.shape[3])
        return F.interpolate(self.grid_logits(images), size, mode="bilinear", align_corners=False)


def as_reference(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values by our names (weights, statistics, gradients) by the reference's."""
    names = {name: name.removeprefix("module.").replace("head.aspp.", "head.") for name in values}
    assert len(set(names.values())) == len(names), "two of them share a name"
    return {names[name]: value for name, value in values.items()}


def copy_weights(model: SelectiveNetwork, reference: DenseSegmentor) -> None:
    """Weights and statistics of our model into the reference: no key missing, none left over."""
    converted = as_reference(model.state_dict())
    expected = reference.state_dict()
    assert converted.keys() == expected.keys(), converted.keys() ^ expected.keys()
    wrong = [name for name, value in converted.items() if value.shape != expected[name].shape]
    assert not wrong, f"shapes differ: {wrong}"
    reference.load_state_dict(converted, strict=True)


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
    """The `nn.Conv2d` network of the same weights at an output stride."""
    rates = [rate * 8 // output_stride for rate in (4, 8, 12)]
    dilation = max(1, 8 // output_stride)
    depths = model.settings.depths
    reference = DenseSegmentor(backbone, width, output_stride, head, 16, rates, dilation, depths)
    reference.to(next(model.parameters()))
    copy_weights(model, reference)
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
