"""The fast path for prediction: batch norm folded into weights, bias, ReLU and residual fused into the GEMM.

`for_inference(model)` gives a network of the same interface and the same numbers (to 1e-5), without autograd.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sparse_seg.models.heads import ASPP, DeepLabV3Head, LiteHead, mean_by_area
from sparse_seg.models.resnet import BasicBlock, Bottleneck, ResNet
from sparse_seg.models.segmentor import SelectiveSegmentor
from sparse_seg.sparse import SelectiveConv2d, SiteLayout, densify, grid_to_rows, select_rows


def for_inference(model: SelectiveSegmentor) -> SelectiveSegmentor:
    """A copy of `model` for prediction only; the model itself stays as it is.

    Raises:
        ValueError: the model is in training mode (its batch statistics cannot be folded).
    """
    if model.training:
        raise ValueError("call model.eval() before for_inference(): batch statistics cannot be folded")
    heads = {LiteHead: FusedLiteHead, DeepLabV3Head: FusedDeepLabV3Head}
    head = heads[type(model.head)](model.head)
    fused = SelectiveSegmentor(FusedResNet(model.backbone), head, model.policy, model.trained_stride)
    return fused.eval().requires_grad_(False)


class FusedLinear(nn.Module):
    """Linear and batch norm on rows, then `+ residual` and ReLU where asked for."""

    def __init__(self, linear: nn.Linear, norm: nn.BatchNorm1d, relu: bool = True) -> None:
        super().__init__()
        scale, self.bias = _fold(norm)
        self.weight, self.relu = linear.weight.detach() * scale[:, None], relu

    def forward(self, rows: Tensor, residual: Tensor | None = None) -> Tensor:
        out = F.linear(rows, self.weight, self.bias)
        if residual is not None:
            out += residual
        return out.relu_() if self.relu else out


class FusedConv(nn.Module):
    """`SelectiveConv2d` and batch norm, then `+ residual` and ReLU."""

    def __init__(self, conv: SelectiveConv2d, norm: nn.BatchNorm1d) -> None:
        super().__init__()
        scale, self.bias = _fold(norm)
        self.conv = copy.deepcopy(conv)
        self.conv.weight.data *= scale[:, None, None, None]

    def forward(
        self, rows: Tensor, src: SiteLayout, dst: SiteLayout, residual: Tensor | None = None
    ) -> Tensor:
        out = self.conv(rows, src, dst)
        out += self.bias
        if residual is not None:
            out += residual
        return out.relu_()


def _fold(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Scale and bias `[C]` of a batch norm in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias.detach() - norm.running_mean * scale
