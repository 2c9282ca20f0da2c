"""The same network as plain dense PyTorch: `nn.Conv2d` and `nn.BatchNorm2d` alone, for export and as the
baseline that selective runs are measured against."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparse_seg.models.forms import channels_last
from sparse_seg.models.heads import LOW_LEVEL_STRIDE
from sparse_seg.models.resnet import ResNet
from sparse_seg.models.upsample import at_least_float32, upsample_logits

if TYPE_CHECKING:
    from sparse_seg.models.segmentor import SelectiveSegmentor


def plain_network(model: SelectiveSegmentor, output_stride: int = 8) -> PlainSegmentor:
    """Logits of `model.dense(images, output_stride)` from plain modules with copies of its weights."""
    return channels_last(PlainSegmentor(model, output_stride)).train(model.training)


class PlainSegmentor(nn.Module):
    """Backbone, head, upsampling, dense at `output_stride`."""

    def __init__(self, model: SelectiveSegmentor, output_stride: int) -> None:
        super().__init__()
        head = model.head
        self.stem = plain_stem(model.backbone)
        self.layer1, *later = plain_stages(model.backbone, output_stride)
        self.later = nn.Sequential(*later)
        self.head, self.align_corners = head.plain(output_stride), model.align_corners
        self.strides = output_stride, model.trained_stride
        if head.reads_low_level:
            self.strides = LOW_LEVEL_STRIDE, LOW_LEVEL_STRIDE

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]` to logits `[B, K, H, W]`."""
        low_level = self.layer1(self.stem(images.contiguous(memory_format=torch.channels_last)))
        logits = self.head(self.later(low_level), low_level)
        size = (images.shape[2], images.shape[3])
        return upsample_logits(at_least_float32(logits), size, *self.strides, self.align_corners)


def plain_stem(backbone: ResNet) -> nn.Sequential:
    """Images to the grid at stride 4."""
    conv, norm = copy.deepcopy(backbone.conv1), copy.deepcopy(backbone.bn1)
    return nn.Sequential(conv, norm, nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))


def plain_stages(backbone: ResNet, output_stride: int, first: int = 0) -> nn.Sequential:
    """The stages from index `first` on, dense at `output_stride`: grid to grid."""
    strides = [min(stage.stride, output_stride) for stage in backbone.stages]
    before = [strides[0], *strides]  # the stem's is the first stage's
    stages = zip(backbone.stages, before, strides, strict=False)
    return nn.Sequential(*(stage.module.plain(src, dst) for stage, src, dst in list(stages)[first:]))
