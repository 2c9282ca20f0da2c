"""The fast path for prediction: batch norm folded into weights; bias, ReLU and residual fused into the GEMM.

`for_inference(model)` has the model's interface and numbers (to 1e-5), without autograd. On the CPU in
float32 it runs oneDNN's fused convolutions on weights packed once; elsewhere the same steps in PyTorch.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sparse_seg.models.heads import DeepLabV3Head, LiteHead, mean_by_area
from sparse_seg.models.resnet import BasicBlock, Bottleneck, ResNet, Stage
from sparse_seg.models.segmentor import SelectiveSegmentor
from sparse_seg.sparse import SelectiveConv2d, SiteLayout, densify, grid_to_rows, lattice_grid, select_rows
from sparse_seg.sparse.engines import gather

Module = TypeVar("Module", bound=nn.Module)


def for_inference(model: SelectiveSegmentor) -> SelectiveSegmentor:
    """A copy of `model` for prediction only; the model itself stays as it is.

    Raises:
        ValueError: the model is in training mode (its batch statistics cannot be folded).
    """
    if model.training:
        raise ValueError("call model.eval() before for_inference(): batch statistics cannot be folded")
    with torch.no_grad():
        head = {LiteHead: FusedLiteHead, DeepLabV3Head: FusedDeepLabV3Head}[type(model.head)](model.head)
        fused = SelectiveSegmentor(FusedResNet(model.backbone), head, model.policy, model.trained_stride)
    return fused.eval().requires_grad_(False)


class _Packed:
    """A convolution with bias whose weight is packed for oneDNN where that applies.

    Args:
        weight: `[O, I, k, k]`, channels_last.
    """

    def __init__(self, weight: Tensor, bias: Tensor, stride: int = 1, dilation: int = 1) -> None:
        self.weight, self.bias = weight, bias
        padding = dilation * (weight.shape[2] // 2)
        self.geometry = [padding] * 2, [stride] * 2, [dilation] * 2
        self.packed: Tensor | None = None
        if (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
        ):
            self.packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *self.geometry, 1)

    def __call__(self, grid: Tensor, residual: Tensor | None = None, relu: bool = True) -> Tensor:
        """`relu(conv(grid) + bias + residual)`; the residual's memory may be overwritten."""
        activation = "relu" if relu else "none"
        if self.packed is None or grid.dtype != torch.float32:
            out = F.conv2d(grid, self.weight, self.bias, self.geometry[1], self.geometry[0], self.geometry[2])
            out = out if residual is None else out.add_(residual)
            return out.relu_() if relu else out
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(
                grid, self.packed, self.bias, *self.geometry, 1, activation, [], ""
            )
        return torch.ops.mkldnn._convolution_pointwise_(
            residual, grid, self.packed, self.bias, *self.geometry, 1, "add", 1.0, activation, [], ""
        )


class FusedLinear(nn.Module):
    """Linear and batch norm on rows, then `+ residual` and ReLU."""

    def __init__(self, linear: nn.Module, norm: nn.Module, relu: bool = True) -> None:
        super().__init__()
        assert isinstance(linear, nn.Linear)
        scale, bias = _fold(norm)
        self.conv, self.relu = _Packed((linear.weight * scale[:, None])[:, :, None, None], bias), relu

    def forward(self, rows: Tensor, residual: Tensor | None = None) -> Tensor:
        """`[N, I]` to `[N, O]`; the memory of `residual` may be overwritten."""
        # as a 1x1 convolution: it fuses the residual, which a matrix product does not
        return grid_to_rows(self.conv(_line(rows), None if residual is None else _line(residual), self.relu))


class FusedConv(nn.Module):
    """`SelectiveConv2d` and batch norm, then `+ residual` and ReLU."""

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        assert isinstance(conv, SelectiveConv2d)
        scale, self.bias = _fold(norm)
        self.weight = conv.weight * scale[:, None, None, None]
        self.spacing, self.exchange = conv.spacing, conv.exchange
        self.packed: dict[tuple[int, int], _Packed] = {}

    def forward(
        self, rows: Tensor, src: SiteLayout, dst: SiteLayout, residual: Tensor | None = None
    ) -> Tensor:
        """`[src.num_sites, I]` to `[dst.num_sites, O]`; the memory of `residual` may be overwritten."""
        geometry = gather.lattice_conv_geometry(src, dst, self.spacing)
        if geometry not in self.packed:
            self.packed[geometry] = _Packed(self.weight.permute(0, 3, 1, 2), self.bias, *geometry)
        lattice_residual = None if residual is None else lattice_grid(residual, dst)
        lattice = grid_to_rows(self.packed[geometry](lattice_grid(rows, src), lattice_residual))
        if dst.num_extra == 0:
            return lattice
        out = rows.new_empty(dst.num_sites, lattice.shape[1])
        out[: dst.num_lattice] = lattice
        extra = out[dst.num_lattice :]
        table = src.neighbours(dst, self.spacing, self.exchange)
        gather.multiply_neighbours(rows, self.weight, table, out=extra, bias=self.bias)
        if residual is not None:
            extra += residual[dst.num_lattice :]
        extra.relu_()
        return out


class FusedBlock(nn.Module):
    """A residual block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        assert isinstance(block, (BasicBlock, Bottleneck))
        self.shortcut = None
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
        shortcut = select_rows(rows, src, dst)
        shortcut = shortcut if self.shortcut is None else self.shortcut(shortcut)
        if isinstance(self.last, FusedConv):
            return self.last(out, dst, dst, shortcut)
        return self.last(out, shortcut)


class FusedResNet(ResNet):
    """A `ResNet` of fused blocks."""

    def __init__(self, backbone: ResNet) -> None:
        nn.Module.__init__(self)  # the parts come from `backbone`, not from a stage table
        self.stage_channels = backbone.stage_channels
        self.conv1 = _channels_last(fuse_conv_bn_eval(backbone.conv1, backbone.bn1))
        stages = (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            Stage(FusedBlock(block) for block in stage) for stage in stages
        )

    def stem(self, images: Tensor) -> Tensor:
        """As `ResNet.stem`."""
        out = self.conv1(images.contiguous(memory_format=torch.channels_last)).relu_()
        return grid_to_rows(F.max_pool2d(out, 3, stride=2, padding=1))


class FusedLiteHead(nn.Module):
    """The interface of `LiteHead`."""

    def __init__(self, head: LiteHead) -> None:
        super().__init__()
        self.reduce = FusedLinear(head.reduce[0], head.reduce[1])
        self.refine, self.classifier = _fuse_sequence(head.refine), copy.deepcopy(head.classifier)

    def forward(self, rows: Tensor, layout: SiteLayout) -> Tensor:
        return self.classifier(self.refine(densify(self.reduce(rows), layout)))


class FusedDeepLabV3Head(nn.Module):
    """The interface of `DeepLabV3Head`."""

    def __init__(self, head: DeepLabV3Head) -> None:
        super().__init__()
        aspp = head.aspp
        self.point = FusedLinear(aspp.point[0], aspp.point[1])
        self.atrous = nn.ModuleList(map(FusedConv, aspp.atrous, aspp.atrous_bn))
        self.pool = FusedLinear(aspp.pool[0], aspp.pool[1])
        self.project = FusedLinear(aspp.project[0], aspp.project[1])
        self.refine, self.classifier = _fuse_sequence(head.refine), copy.deepcopy(head.classifier)

    def forward(self, rows: Tensor, layout: SiteLayout) -> Tensor:
        branches = [self.point(rows), *(conv(rows, layout, layout) for conv in self.atrous)]
        branches.append(self.pool(mean_by_area(rows, layout))[layout.image_of_row])
        return self.classifier(self.refine(densify(self.project(torch.cat(branches, 1)), layout)))


def _fold(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and bias `[C]` of a batch norm in eval mode."""
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def _fuse_sequence(modules: nn.Sequential) -> nn.Sequential:
    """A sequence with each batch norm folded into the convolution before it, without dropout."""
    fused: list[nn.Module] = []
    for module in modules:
        if isinstance(module, nn.BatchNorm2d):
            conv = fused.pop()
            assert isinstance(conv, nn.Conv2d)
            fused.append(fuse_conv_bn_eval(conv, module))
        elif not isinstance(module, nn.Dropout2d):
            fused.append(copy.deepcopy(module))
    return _channels_last(nn.Sequential(*fused))


def _channels_last(module: Module) -> Module:
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _line(rows: Tensor) -> Tensor:
    """`[N, C]` as a channels_last image of one line, `[1, C, 1, N]`; a view."""
    return rows[None, None].permute(0, 3, 1, 2)
