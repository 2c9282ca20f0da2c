"""The same network as plain dense PyTorch: `nn.Conv2d` and `nn.BatchNorm2d` alone, for export and as the
baseline that selective runs are measured against."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.models.aspp import ASPP, SelectiveSeparableConv2d
from sparse_seg.models.heads import (
    FINEST_DENSE_STRIDE,
    LOW_LEVEL_STRIDE,
    DeepLabV3Head,
    DeepLabV3PlusHead,
    FCNHead,
    LiteHead,
)
from sparse_seg.models.resnet import STAGE_STRIDES, BasicBlock, Bottleneck, ResNet
from sparse_seg.models.segmentor import SelectiveSegmentor
from sparse_seg.models.upsample import at_least_float32, upsample_logits
from sparse_seg.sparse import SelectiveConv2d, SelectiveDepthwiseConv2d
from sparse_seg.sparse.depthwise import window_mean

Module = TypeVar("Module", bound=nn.Module)


def plain_network(model: SelectiveSegmentor, output_stride: int = 8) -> PlainSegmentor:
    """Logits of `model.dense(images, output_stride)` from plain modules with copies of its weights."""
    return channels_last(PlainSegmentor(model, output_stride)).train(model.training)


def channels_last(module: Module) -> Module:
    """The module with its convolutions' weights in channels_last memory."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class PlainSegmentor(nn.Module):
    """Backbone, head, upsampling, dense at `output_stride`."""

    def __init__(self, model: SelectiveSegmentor, output_stride: int) -> None:
        super().__init__()
        self.output_stride, self.trained_stride = output_stride, model.trained_stride
        stages, blocks = plain_stages(model.backbone, output_stride), len(model.backbone.layer1)
        self.stem = plain_stem(model.backbone)
        self.stages = nn.Sequential(stages[:blocks], stages[blocks:])  # layer1, whose grid a skip may read
        self.head, self.align_corners = _head(model.head, output_stride), model.align_corners

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]` to logits `[B, K, H, W]`."""
        layer1, later = self.stages
        low_level = layer1(self.stem(images.contiguous(memory_format=torch.channels_last)))
        grid = later(low_level)
        if isinstance(self.head, PlainDeepLabV3Plus):
            logits, strides = self.head(grid, low_level), (LOW_LEVEL_STRIDE, LOW_LEVEL_STRIDE)
        else:
            logits, strides = self.head(grid), (self.output_stride, self.trained_stride)
        size = (images.shape[2], images.shape[3])
        return upsample_logits(at_least_float32(logits), size, *strides, self.align_corners)


def plain_stem(backbone: ResNet) -> nn.Sequential:
    """Images to the grid at stride 4."""
    conv, norm = copy.deepcopy(backbone.conv1), copy.deepcopy(backbone.bn1)
    return nn.Sequential(conv, norm, nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))


def plain_stages(backbone: ResNet, output_stride: int, first: int = 1) -> nn.Sequential:
    """The stages from `layer{first}` on, dense at `output_stride`: grid to grid."""
    blocks: list[nn.Module] = []
    stage_strides = [min(stride, output_stride) for stride in STAGE_STRIDES]
    for number in range(first, 5):
        src, dst = stage_strides[max(number - 2, 0)], stage_strides[number - 1]
        for block in backbone.get_submodule(f"layer{number}").children():
            blocks.append(PlainBlock(block, src, dst))
            src = dst
    return nn.Sequential(*blocks)


class PlainBlock(nn.Module):
    """A residual block from stride `src` to stride `dst` (pixels)."""

    def __init__(self, block: Any, src: int, dst: int) -> None:
        super().__init__()
        relu = nn.ReLU(inplace=True)
        if isinstance(block, BasicBlock):
            self.branch = nn.Sequential(
                _conv3x3(block.conv1, src, dst),
                _norm(block.bn1),
                relu,
                _conv3x3(block.conv2, dst, dst),
                _norm(block.bn2),
            )
        else:
            assert isinstance(block, Bottleneck)
            self.branch = nn.Sequential(
                _conv1x1(block.conv1), _norm(block.bn1), relu,
                _conv3x3(block.conv2, src, dst), _norm(block.bn2), relu,
                _conv1x1(block.conv3), _norm(block.bn3),
            )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if block.downsample is not None:
            linear, norm = block.downsample
            stride = dst // src
            self.shortcut = nn.Sequential(_conv1x1(linear, stride), _norm(norm))
            if block.pool is not None:
                pool = PlainAvgPool(stride, block.pool.spacing // src)
                self.shortcut = nn.Sequential(pool, _conv1x1(linear), _norm(norm))

    def forward(self, grid: Tensor) -> Tensor:
        out = self.branch(grid)
        out += self.shortcut(grid)
        return F.relu(out, inplace=True)


class PlainAvgPool(nn.Module):
    """2x2 mean with a window that grows with the dilation."""

    def __init__(self, stride: int, dilation: int) -> None:
        super().__init__()
        self.stride, self.dilation = stride, dilation

    def forward(self, grid: Tensor) -> Tensor:
        return window_mean(grid, self.stride, self.dilation)


class PlainASPP(nn.Module):
    """Atrous spatial pyramid pooling on a grid."""

    def __init__(self, aspp: ASPP, stride: int) -> None:
        super().__init__()
        branches: Any = zip(aspp.atrous, aspp.atrous_bn, strict=True)
        self.point = _rows_to_grid(aspp.point)
        self.atrous = nn.ModuleList(
            nn.Sequential(*_atrous(conv, stride), _norm(norm), nn.ReLU(inplace=True))
            for conv, norm in branches
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_rows_to_grid(aspp.pool))
        self.project = nn.Sequential() if aspp.project is None else _rows_to_grid(aspp.project)

    def forward(self, grid: Tensor) -> Tensor:
        pooled = self.pool(grid).expand(-1, -1, *grid.shape[2:])
        return self.project(
            torch.cat([self.point(grid), *(branch(grid) for branch in self.atrous), pooled], 1)
        )


class PlainDeepLabV3Plus(nn.Module):
    """`DeepLabV3PlusHead` on grids: the same parts, but for ASPP."""

    def __init__(self, head: DeepLabV3PlusHead, stride: int) -> None:
        super().__init__()
        self.stride, self.aspp = stride, PlainASPP(head.aspp, stride)
        self.rest = copy.deepcopy(head)
        self.rest.aspp = None  # type: ignore[assignment]
        self.rest.refine = _refine(head, stride)

    def forward(self, grid: Tensor, low_level: Tensor) -> Tensor:
        joined = self.rest.join(self.rest.refine(self.aspp(grid)), self.stride, low_level)
        return self.rest.classifier(self.rest.decoder(joined))


def _head(head: nn.Module, stride: int) -> nn.Module:
    if isinstance(head, LiteHead):
        return nn.Sequential(
            _rows_to_grid(head.reduce), _refine(head, stride), copy.deepcopy(head.classifier)
        )
    if isinstance(head, FCNHead):
        return nn.Sequential(_refine(head, stride), *map(copy.deepcopy, (head.dropout, head.classifier)))
    if isinstance(head, DeepLabV3PlusHead):
        return PlainDeepLabV3Plus(head, stride)
    assert isinstance(head, DeepLabV3Head)
    return nn.Sequential(PlainASPP(head.aspp, stride), _refine(head, stride), copy.deepcopy(head.classifier))


def _refine(head: Any, stride: int) -> nn.Sequential:
    """The head's dense convolutions; see `at_dense_spacing`."""
    refine = copy.deepcopy(head.refine)
    for conv in refine.children():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = (max(1, FINEST_DENSE_STRIDE // stride),) * 2
    return refine


def _atrous(conv: nn.Module, stride: int) -> list[nn.Module]:
    if isinstance(conv, SelectiveSeparableConv2d):
        between = [] if conv.norm is None else [_norm(conv.norm), nn.ReLU(inplace=True)]
        return [_depthwise(conv.depthwise, stride), *between, _conv1x1(conv.pointwise)]
    assert isinstance(conv, SelectiveConv2d)
    return [_conv3x3(conv, stride, stride)]


def _rows_to_grid(modules: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*(_as_plain(module) for module in modules))


def _as_plain(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Linear):
        return _conv1x1(module)
    return _norm(module) if isinstance(module, nn.BatchNorm1d) else copy.deepcopy(module)


def _conv3x3(conv: SelectiveConv2d, src: int, dst: int) -> nn.Conv2d:
    dilation = 1 if conv.spacing is None else conv.spacing // src
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, 3, dst // src, dilation, dilation, bias=False)
    plain.to(conv.weight).weight.data.copy_(conv.weight.data.permute(0, 3, 1, 2))
    return plain


def _depthwise(conv: SelectiveDepthwiseConv2d, stride: int) -> nn.Conv2d:
    dilation, channels = conv.spacing // stride, conv.channels
    plain = nn.Conv2d(channels, channels, 3, 1, dilation, dilation, groups=channels, bias=False)
    plain.to(conv.weight).weight.data.copy_(conv.weight.data.permute(0, 3, 1, 2))
    return plain


def _conv1x1(linear: nn.Linear, stride: int = 1) -> nn.Conv2d:
    plain = nn.Conv2d(linear.in_features, linear.out_features, 1, stride, bias=False).to(linear.weight)
    plain.weight.data.copy_(linear.weight.data[:, :, None, None])
    return plain


def _norm(norm: nn.BatchNorm1d) -> nn.BatchNorm2d:
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum).to(norm.weight)
    plain.load_state_dict(norm.state_dict())
    return plain
