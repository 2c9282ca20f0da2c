"""The fast path for prediction: batch norm folded into weights; bias, ReLU and residual fused into the GEMM.

`for_inference(model)` has the model's interface and numbers (to 1e-5), without autograd. On the CPU in
float32 it runs oneDNN's fused kernels or Winograd's filtering, whichever is the faster for a shape by a trial
at its first use, on weights packed once; elsewhere the same steps in PyTorch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sparse_seg.models.aspp import ASPP, SelectiveSeparableConv2d, mean_by_area
from sparse_seg.models.heads import DeepLabV3Head, DeepLabV3PlusHead, FCNHead, LiteHead
from sparse_seg.models.resnet import BasicBlock, Bottleneck, ResNet, Stage
from sparse_seg.models.segmentor import Outputs, SelectiveSegmentor
from sparse_seg.models.tuning import Tuner
from sparse_seg.sparse import SelectiveConv2d, SiteLayout, densify, grid_to_rows, lattice_grid, select_rows
from sparse_seg.sparse.engines import gather
from sparse_seg.sparse.engines.undilated import every_site
from sparse_seg.sparse.winograd import transform_weight, winograd_conv2d

Module = TypeVar("Module", bound=nn.Module)
Form = Callable[[Tensor | None], Tensor]  # residual, whose memory may be overwritten, to output
_MIN_WINOGRAD_CHANNELS = 96  # below, its transforms cost more than it saves: not worth a trial
_ONEDNN = torch.backends.mkldnn.is_available()


def for_inference(model: SelectiveSegmentor) -> SelectiveSegmentor:
    """A copy of `model` for prediction only; the model itself stays as it is.

    Raises:
        ValueError: the model is in training mode (its batch statistics cannot be folded).
    """
    if model.training:
        raise ValueError("call model.eval() before for_inference(): batch statistics cannot be folded")
    with torch.no_grad():
        head = _FUSED_HEADS[type(model.head)](model.head) if type(model.head) in _FUSED_HEADS else model.head
        fused = FusedSegmentor(
            FusedResNet(model.backbone),
            head,
            model.policy,
            model.trained_stride,
            align_corners=model.align_corners,
        )
    tuner = Tuner()
    for layer in fused.modules():
        if isinstance(layer, FusedLayer):
            layer.tuner = tuner
    return fused.eval().requires_grad_(False)


class FusedSegmentor(SelectiveSegmentor):
    """A network of fused layers. It runs in the dtype of its weights: autocast has no say in it."""

    def outputs(self, images: Tensor, layouts: list[SiteLayout]) -> Outputs:
        """As `SelectiveSegmentor.outputs`."""
        with torch.autocast(images.device.type, enabled=False):
            return super().outputs(images, layouts)


class FusedLayer(nn.Module):
    """Weight and bias with batch norm folded in; a kernel packs the weight on its first use.

    Args:
        weight, bias: as the layer's engine reads them.
        relu: whether ReLU comes last.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, relu: bool = True) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("bias", bias)
        self.relu, self.activation = relu, "relu" if relu else "none"
        self.tuner = Tuner()  # for_inference gives all layers the same
        self._packed: dict[Any, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": {}}  # packed weights can be neither copied nor saved

    def _apply(self, *arguments: Any, **options: Any) -> FusedLayer:
        self._packed.clear()
        return super()._apply(*arguments, **options)

    def _packed_once(self, key: Any, pack: Callable[[], Tensor]) -> Tensor:
        if key not in self._packed:
            self._packed[key] = pack()
        return self._packed[key]

    def _fastest(self, shape: tuple[int, ...], residual: Tensor | None, forms: Mapping[str, Form]) -> Tensor:
        """What the fastest form returns; the memory of `residual` may be overwritten."""
        layer = (*self.weight.shape, self.relu, residual is not None)
        if self.tuner.wants_trial(layer, shape):
            spare = None if residual is None else residual.clone()
            self.tuner.try_forms(layer, shape, {name: partial(form, spare) for name, form in forms.items()})
            self._packed.clear()  # of the forms that lost
        return forms[self.tuner.choice(layer, shape, next(iter(forms)))](residual)

    def _onednn_conv(
        self, grid: Tensor, oihw: Tensor, residual: Tensor | None, stride: int, dilation: int, padding: int
    ) -> Tensor:
        """On a channels_last grid, with bias, residual and ReLU, written to the memory of `residual`."""
        geometry = [padding] * 2, [stride] * 2, [dilation] * 2
        packed = self._packed_once(
            (stride, dilation),
            lambda: torch._C._nn.mkldnn_reorder_conv2d_weight(oihw.to_mkldnn(), *geometry, 1),
        )
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(
                grid, packed, self.bias, *geometry, 1, self.activation, [], ""
            )
        return torch.ops.mkldnn._convolution_pointwise_(
            residual, grid, packed, self.bias, *geometry, 1, "add", 1.0, self.activation, [], ""
        )

    def _finish(self, out: Tensor, residual: Tensor | None) -> Tensor:
        out = out if residual is None else out.add_(residual)
        return out.relu_() if self.relu else out


class FusedLinear(FusedLayer):
    """Linear and batch norm on rows, then `+ residual` and ReLU."""

    def __init__(self, linear: nn.Module, norm: nn.Module, relu: bool = True) -> None:
        assert isinstance(linear, nn.Linear)
        scale, bias = _fold(norm)
        super().__init__(linear.weight * scale[:, None], bias, relu)

    def forward(self, rows: Tensor, residual: Tensor | None = None) -> Tensor:
        """`[N, I]` to `[N, O]`; the memory of `residual` may be overwritten."""
        if not _runs_onednn(rows):
            return self._finish(F.linear(rows, self.weight, self.bias), residual)
        linear = partial(self._linear, rows)
        if residual is None:
            return linear(None)
        return self._fastest(
            rows.shape, residual, {"linear": linear, "convolution": partial(self._convolution, rows)}
        )

    def _linear(self, rows: Tensor, residual: Tensor | None) -> Tensor:
        packed = self._packed_once("linear", lambda: torch.ops.mkldnn._reorder_linear_weight(self.weight))
        # oneDNN's own "add" was up to twice as slow for some shapes
        activation = self.activation if residual is None else "none"
        out = torch.ops.mkldnn._linear_pointwise(rows, packed, self.bias, activation, [], "")
        return out if residual is None else self._finish(out, residual)

    def _convolution(self, rows: Tensor, residual: Tensor | None) -> Tensor:
        """As a 1x1 convolution, which adds the residual as it goes: faster at some numbers of rows."""
        grid = None if residual is None else _column(residual)
        out = self._onednn_conv(
            _column(rows), self.weight[:, :, None, None], grid, stride=1, dilation=1, padding=0
        )
        return grid_to_rows(out)


class FusedConv(FusedLayer):
    """`SelectiveConv2d` and batch norm, then `+ residual` and ReLU."""

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        assert isinstance(conv, SelectiveConv2d)
        scale, bias = _fold(norm)
        super().__init__(conv.weight * scale[:, None, None, None], bias)
        self.spacing, self.exchange = conv.spacing, conv.exchange

    def forward(
        self, rows: Tensor, src: SiteLayout, dst: SiteLayout, residual: Tensor | None = None
    ) -> Tensor:
        """`[src.num_sites, I]` to `[dst.num_sites, O]`; the memory of `residual` may be overwritten."""
        if self.spacing is None:
            return self._undilated(rows, dst, residual)
        stride, dilation = gather.lattice_conv_geometry(src, dst, self.spacing)
        lattice_residual = None if residual is None else lattice_grid(residual, dst)
        lattice = grid_to_rows(self._lattice(lattice_grid(rows, src), lattice_residual, stride, dilation))
        if dst.num_extra == 0:
            return lattice
        out = rows.new_empty(dst.num_sites, lattice.shape[1])
        out[: dst.num_lattice] = lattice
        extra = out[dst.num_lattice :]
        table = src.neighbours(dst, self.spacing, self.exchange)
        gather.multiply_neighbours(rows, self.weight, table, out=extra, bias=self.bias)
        self._finish(extra, None if residual is None else residual[dst.num_lattice :])
        return out

    def _undilated(self, rows: Tensor, layout: SiteLayout, residual: Tensor | None) -> Tensor:
        if not layout.splits:
            grid_residual = None if residual is None else lattice_grid(residual, layout)
            return grid_to_rows(self._lattice(lattice_grid(rows, layout), grid_residual, 1, 1))
        out = rows.new_empty(layout.num_sites, self.weight.shape[0])
        table = every_site(layout, self.exchange)
        gather.multiply_neighbours(rows, self.weight, table, out=out, bias=self.bias)
        return self._finish(out, residual)

    def _lattice(self, grid: Tensor, residual: Tensor | None, stride: int, dilation: int) -> Tensor:
        """The plain convolution, on a channels_last grid; the memory of `residual` may be overwritten."""
        oihw = self.weight.permute(0, 3, 1, 2)
        if not _runs_onednn(grid):
            return self._finish(F.conv2d(grid, oihw, self.bias, stride, dilation, dilation), residual)

        def direct(residual: Tensor | None) -> Tensor:
            return self._onednn_conv(grid, oihw, residual, stride, dilation, padding=dilation)

        def winograd(residual: Tensor | None) -> Tensor:
            weight = self._packed_once("winograd", lambda: transform_weight(self.weight))
            values = grid.permute(0, 2, 3, 1)
            out = winograd_conv2d(values, weight, self.bias, dilation, self.tuner.workspace)
            return self._finish(out.permute(0, 3, 1, 2), residual)

        if stride > 1 or min(oihw.shape[:2]) < _MIN_WINOGRAD_CHANNELS:
            return direct(residual)
        forms = {"direct": direct, "winograd": winograd}
        return self._fastest((*grid.shape, dilation), residual, forms)


def _column(rows: Tensor) -> Tensor:
    """`[N, C]` as a channels_last grid `[1, C, N, 1]`, the same memory."""
    return rows[None, :, None].permute(0, 3, 1, 2)


def _runs_onednn(values: Tensor) -> bool:
    return values.device.type == "cpu" and values.dtype == torch.float32 and _ONEDNN


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
        shortcut = self.pool(rows, src, dst) if self.pool else select_rows(rows, src, dst)
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


class FusedSeparableConv(nn.Module):
    """`SelectiveSeparableConv2d` and batch norm, then ReLU."""

    def __init__(self, conv: SelectiveSeparableConv2d, norm: nn.Module) -> None:
        super().__init__()
        self.depthwise, self.pointwise = copy.deepcopy(conv.depthwise), FusedLinear(conv.pointwise, norm)
        self.bias: Tensor | None
        self.register_buffer("bias", None)
        if conv.norm is not None:
            scale, self.bias = _fold(conv.norm)
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
        self.project = None if aspp.project is None else FusedLinear(aspp.project[0], aspp.project[1])

    def forward(self, rows: Tensor, layout: SiteLayout) -> Tensor:
        branches = [self.point(rows), *(conv(rows, layout, layout) for conv in self.atrous)]
        branches.append(self.pool(mean_by_area(rows, layout))[layout.image_of_row])
        out = torch.cat(branches, 1)
        return out if self.project is None else self.project(out)


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


def _fold(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and bias `[C]` of a batch norm in eval mode."""
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


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
    return _channels_last(nn.Sequential(*fused))


def _channels_last(module: Module) -> Module:
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


_FUSED_HEADS: dict[type[nn.Module], Any] = {
    LiteHead: FusedLiteHead,
    DeepLabV3Head: FusedDeepLabV3Head,
    DeepLabV3PlusHead: FusedDeepLabV3PlusHead,
    FCNHead: FusedFCNHead,
}
