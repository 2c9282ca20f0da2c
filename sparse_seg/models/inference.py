"""The fast path for prediction: batch norm folded into weights; bias, ReLU and residual fused into the GEMM.

`for_inference(model)` has the model's interface and numbers (to 1e-5), without autograd. On the CPU in
float32 it runs oneDNN's fused kernels or Winograd's filtering, whichever is the faster for a shape by a trial
at its first use, on weights packed once; elsewhere the same steps in PyTorch.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sparse_seg.models.aspp import ASPP, SelectiveSeparableConv2d, beside, mean_by_area
from sparse_seg.models.fused import FusedConv, FusedLayer, FusedLinear, fold_norm
from sparse_seg.models.heads import DeepLabV3Head, DeepLabV3PlusHead, FCNHead, LiteHead
from sparse_seg.models.plain import channels_last
from sparse_seg.models.resnet import BasicBlock, Bottleneck, ResNet, Stage
from sparse_seg.models.segmentor import GridOutputs, SelectiveSegmentor
from sparse_seg.models.tuning import Tuner
from sparse_seg.sparse import SiteLayout, grid_to_rows, select_rows


def for_inference(model: SelectiveSegmentor) -> SelectiveSegmentor:
    """A copy of `model` for prediction only; the model itself stays as it is.

    Raises:
        ValueError: the model is in training mode (its batch statistics cannot be folded).
    """
    if model.training:
        raise ValueError("call model.eval() before for_inference(): batch statistics cannot be folded")
    with torch.no_grad():
        fuse = _FUSED_HEADS.get(type(model.head), copy.deepcopy)
        fused = FusedSegmentor(
            FusedResNet(model.backbone),
            fuse(model.head),
            copy.deepcopy(model.policy),
            model.trained_stride,
            strides=model.strides,
            align_corners=model.align_corners,
        )
    tuner = Tuner()
    for layer in fused.modules():
        if isinstance(layer, FusedLayer):
            layer.tuner = tuner
    return fused.eval().requires_grad_(False)


class FusedSegmentor(SelectiveSegmentor):
    """A network of fused layers. It runs in the dtype of its weights: autocast has no say in it."""

    def precision(self, images: Tensor) -> AbstractContextManager:
        return torch.autocast(images.device.type, enabled=False)

    def _run(self, images: Tensor, layouts: list[SiteLayout]) -> GridOutputs:
        """As in `SelectiveSegmentor`; where all blocks are fine, on dense layouts, which gather nothing."""
        last = layouts[-1]
        all_fine = last.num_sites == last.batch * last.size[0] * last.size[1]
        return super()._run(images, self.dense_layouts(images, last.stride) if all_fine else layouts)


class FusedBlock(nn.Module):
    """A residual block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        assert isinstance(block, (BasicBlock, Bottleneck))
        self.shortcut, self.pool = None, block.pool
        if block.downsample is not None:
            self.shortcut = FusedLinear(block.downsample[0], block.downsample[1], relu=False)
        if isinstance(block, BasicBlock):
            self.convs = nn.ModuleList([FusedConv(block.conv1, block.bn1)])
            self.last: nn.Module = FusedConv(block.conv2, block.bn2)
        else:
            self.convs = nn.ModuleList(
                [FusedLinear(block.conv1, block.bn1), FusedConv(block.conv2, block.bn2)]
            )
            self.last = FusedLinear(block.conv3, block.bn3)

    def forward(self, rows: Tensor, src: SiteLayout, dst: SiteLayout) -> Tensor:
        """Rows `[src.num_sites, I]` to `[dst.num_sites, O]`; the rows given may be overwritten."""
        out = rows
        for conv in self.convs:
            out = conv(out, src, dst) if isinstance(conv, FusedConv) else conv(out)
        shortcut = self.pool(rows, src, dst) if self.pool else select_rows(rows, src, dst, self)
        shortcut = shortcut if self.shortcut is None else self.shortcut(shortcut)
        if isinstance(self.last, FusedConv):
            return self.last(out, dst, dst, shortcut)
        return self.last(out, shortcut)


class FusedResNet(ResNet):
    """A `ResNet` of fused blocks."""

    def __init__(self, backbone: ResNet) -> None:
        nn.Module.__init__(self)  # the parts come from `backbone`, not from a stage table
        self.stage_channels = backbone.stage_channels
        deep = isinstance(backbone.conv1, nn.Sequential)
        parts = backbone.conv1.children() if deep else [backbone.conv1]
        self.conv1 = _fuse_sequence(nn.Sequential(*parts, backbone.bn1))
        stages = (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            Stage(FusedBlock(block) for block in stage) for stage in stages
        )

    def stem(self, images: Tensor) -> Tensor:
        """As `ResNet.stem`."""
        out = self.conv1(images.contiguous(memory_format=torch.channels_last))
        pooled = F.max_pool2d(out, 3, stride=2, padding=1)
        return grid_to_rows(pooled.relu_())  # after pooling it has less to do, and gives the same


class FusedLiteHead(LiteHead):
    """A `LiteHead` of fused parts."""

    def __init__(self, head: LiteHead) -> None:
        nn.Module.__init__(self)  # the parts come from `head`, not from widths
        self.reduce: Any = FusedLinear(head.reduce[0], head.reduce[1])
        self.refine, self.classifier = _fuse_sequence(head.refine), copy.deepcopy(head.classifier)


class FusedSeparableConv(nn.Module):
    """`SelectiveSeparableConv2d` and batch norm, then ReLU."""

    def __init__(self, conv: SelectiveSeparableConv2d, norm: nn.Module) -> None:
        super().__init__()
        self.depthwise, self.pointwise = copy.deepcopy(conv.depthwise), FusedLinear(conv.pointwise, norm)
        self.bias: Tensor | None
        self.register_buffer("bias", None)
        if conv.norm is not None:
            scale, self.bias = fold_norm(conv.norm)
            self.depthwise.weight.mul_(scale[:, None, None, None])

    def forward(self, rows: Tensor, src: SiteLayout, dst: SiteLayout) -> Tensor:
        out = self.depthwise(rows, src, dst)
        return self.pointwise(out if self.bias is None else out.add_(self.bias).relu_())


class FusedASPP(nn.Module):
    """The interface of `ASPP`."""

    def __init__(self, aspp: ASPP) -> None:
        super().__init__()
        branches: Any = zip(aspp.atrous, aspp.atrous_bn, strict=True)
        self.point = FusedLinear(aspp.point[0], aspp.point[1])
        self.atrous = nn.ModuleList(_fuse_atrous(conv, norm) for conv, norm in branches)
        self.pool = FusedLinear(aspp.pool[0], aspp.pool[1])
        self.project, channels = None, self.pool.weight.shape[0]
        self.pooled: Tensor | None
        self.register_buffer("pooled", None)
        if aspp.project is not None:
            self.project = FusedLinear(aspp.project[0], aspp.project[1], relu=False)
            self.pooled = self.project.weight[:, -channels:].clone()
            self.project.weight = self.project.weight[:, :-channels].contiguous()

    def forward(self, rows: Tensor, layout: SiteLayout) -> Tensor:
        local = torch.cat([self.point(rows), *(conv(rows, layout, layout) for conv in self.atrous)], 1)
        pooled = self.pool(mean_by_area(layout.complete(rows, layout, self), layout))
        if self.project is None or self.pooled is None:
            return beside(layout.complete(local, layout, self.pool), pooled, layout)
        local = layout.complete(self.project(local), layout, self.project)
        return (local + F.linear(pooled, self.pooled)[layout.image_of_row]).relu_()


def _fuse_atrous(conv: nn.Module, norm: nn.Module) -> nn.Module:
    if isinstance(conv, SelectiveSeparableConv2d):
        return FusedSeparableConv(conv, norm)
    return FusedConv(conv, norm)


class FusedDeepLabV3Head(DeepLabV3Head):
    """A `DeepLabV3Head` of fused parts."""

    def __init__(self, head: DeepLabV3Head) -> None:
        nn.Module.__init__(self)  # the parts come from `head`, not from options
        self.aspp: Any = FusedASPP(head.aspp)
        self.refine, self.classifier = _fuse_sequence(head.refine), copy.deepcopy(head.classifier)


class FusedDeepLabV3PlusHead(DeepLabV3PlusHead):
    """A `DeepLabV3PlusHead` of fused parts."""

    def __init__(self, head: DeepLabV3PlusHead) -> None:
        nn.Module.__init__(self)
        self.trained_stride, self.align_corners = head.trained_stride, head.align_corners
        self.aspp: Any = FusedASPP(head.aspp)
        self.refine, self.low_level = _fuse_sequence(head.refine), _fuse_sequence(head.low_level)
        self.decoder = nn.Sequential(*(_fuse_sequence(part) for part in head.decoder.children()))
        self.classifier = copy.deepcopy(head.classifier)


class FusedFCNHead(FCNHead):
    """An `FCNHead` of fused parts."""

    def __init__(self, head: FCNHead) -> None:
        nn.Module.__init__(self)
        self.refine, self.classifier = _fuse_sequence(head.refine), copy.deepcopy(head.classifier)
        self.dropout = copy.deepcopy(head.dropout)


def _fuse_sequence(modules: nn.Module) -> nn.Sequential:
    """A sequence with each batch norm folded into the convolution before it, without dropout."""
    fused: list[nn.Module] = []
    for module in modules.children():
        if isinstance(module, nn.BatchNorm2d):
            conv = fused.pop()
            assert isinstance(conv, nn.Conv2d)
            fused.append(fuse_conv_bn_eval(conv, module))
        elif not isinstance(module, nn.Dropout2d):
            fused.append(copy.deepcopy(module))
    return channels_last(nn.Sequential(*fused))


_FUSED_HEADS: dict[type[nn.Module], Any] = {
    LiteHead: FusedLiteHead,
    DeepLabV3Head: FusedDeepLabV3Head,
    DeepLabV3PlusHead: FusedDeepLabV3PlusHead,
    FCNHead: FusedFCNHead,
}
