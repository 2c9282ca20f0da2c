"""Layers of the fast path: batch norm folded in, steps fused, the fastest kernel by trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.sparse.engines import gather
from sparse_seg.sparse.engines.undilated import every_site
from sparse_seg.sparse.features import grid_to_rows, lattice_grid
from sparse_seg.sparse.layout import SiteLayout
from sparse_seg.sparse.step import Step
from sparse_seg.sparse.tuning import Tuner
from sparse_seg.sparse.winograd import transform_weight, winograd_conv2d

# No value overflows float32, and so none becomes NaN, where inputs are at most LARGEST_INPUT and layers make
# them at most LARGEST_GAIN times as large (Winograd's sums take two more powers of ten).
LARGEST_INPUT, LARGEST_GAIN = 1e4, 1e30
Form = Callable[[Tensor | None], Tensor]  # residual, whose memory may be overwritten, to output
_MIN_WINOGRAD_CHANNELS = 96  # below, its transforms cost more than it saves: not worth a trial
_ONEDNN = torch.backends.mkldnn.is_available()


class FusedLayer(nn.Module):
    """Weight and bias with batch norm folded in; a kernel packs the weight on its first use.

    Args:
        tuner: what the layers of a network share.
        weight, bias: as the layer's engine reads them.
        relu: whether ReLU comes last.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, tuner: Tuner, weight: Tensor, bias: Tensor, relu: bool = True) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("bias", bias)
        self.relu, self.activation = relu, "relu" if relu else "none"
        self.tuner = tuner
        self._packed: dict[Any, Tensor] = {}

    @property
    def gain(self) -> float:
        """How many times as large as the largest input (or as 1) an output can be."""
        return largest_gain(self.weight, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": {}}  # packed weights can be neither copied nor saved

    def _apply(self, *arguments: Any, **options: Any) -> FusedLayer:
        self._packed.clear()
        return super()._apply(*arguments, **options)

    def _packed_once(self, key: Any, pack: Callable[[], Tensor]) -> Tensor:
        packed = self._packed.get(key)  # another thread may clear them meanwhile
        if packed is None:
            packed = self._packed[key] = pack()
        return packed

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

    def _runs_fused(self, values: Tensor) -> bool:
        """Whether oneDNN's fused kernels run: they do not hand NaN on."""
        return _runs_onednn(values) and not self.tuner.shows_nan

    def _finish(self, out: Tensor, residual: Tensor | None) -> Tensor:
        out = out if residual is None else out.add_(residual)
        return out.relu_() if self.relu else out


class FusedLinear(FusedLayer):
    """`SelectiveLinear` and batch norm on rows, then `+ residual` and ReLU."""

    def __init__(self, tuner: Tuner, weight: Tensor, norm: nn.Module, relu: bool = True) -> None:
        scale, bias = fold_norm(norm)
        super().__init__(tuner, weight * scale[:, None], bias, relu)

    def forward(
        self, rows: Tensor, src: Step | None = None, dst: Step | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """`[N, I]` to `[N, O]`; the memory of `residual` may be overwritten."""
        if not self._runs_fused(rows) or not rows.shape[0]:
            return self._finish(F.linear(rows, self.weight, self.bias), residual)
        linear = partial(self._linear, rows)
        if residual is None:
            return linear(None)
        return self._fastest(
            rows.shape, residual, {"linear": linear, "convolution": partial(self._convolution, rows)}
        )

    def sites(self, src: Step, dst: Step) -> Step:
        """Where its outputs stand."""
        return src

    def macs(self, src: Step, dst: Step | None = None) -> int:
        return src.num_run * self.weight.numel()

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

    def __init__(
        self,
        tuner: Tuner,
        weight: Tensor,
        spacing: int | None,
        exchange: str,
        norm: nn.Module,
        relu: bool = True,
    ) -> None:
        scale, bias = fold_norm(norm)
        super().__init__(tuner, weight * scale[:, None, None, None], bias, relu)
        self.spacing, self.exchange = spacing, exchange

    def forward(self, rows: Tensor, src: Step, dst: Step, residual: Tensor | None = None) -> Tensor:
        """`[src.num_run, I]` to `[dst.num_run, O]`; the memory of `residual` may be overwritten."""
        exchange = dst.exchange or self.exchange
        if self.spacing is None:
            return self._undilated(rows, dst.layout, exchange, residual)
        rows, first = dst.complete(rows, src, self), 0
        if dst.runs_lattice:
            lattice, first = self._lattice(rows, src.layout, dst, residual), dst.layout.num_lattice
            if dst.layout.num_extra == 0:
                return lattice
        out = rows.new_empty(dst.num_run, self.weight.shape[0])
        if dst.runs_lattice:
            out[:first] = lattice
        table = dst.neighbours(src, self.spacing, exchange)
        gather.multiply_neighbours(rows, self.weight, table, out=out[first:], bias=self.bias)
        self._finish(out[first:], None if residual is None else residual[first:])
        return out

    def sites(self, src: Step, dst: Step) -> Step:
        return dst

    def macs(self, src: Step, dst: Step) -> int:
        return dst.num_run * self.weight.numel()

    def _undilated(self, rows: Tensor, layout: SiteLayout, exchange: str, residual: Tensor | None) -> Tensor:
        if not layout.splits:
            grid_residual = None if residual is None else lattice_grid(residual, layout)
            return grid_to_rows(self._convolve(lattice_grid(rows, layout), grid_residual, 1, 1))
        out = rows.new_empty(layout.num_sites, self.weight.shape[0])
        table = every_site(layout, exchange)
        gather.multiply_neighbours(rows, self.weight, table, out=out, bias=self.bias)
        return self._finish(out, residual)

    def _lattice(self, rows: Tensor, src: SiteLayout, dst: Step, residual: Tensor | None) -> Tensor:
        """The lattice's rows of the output."""
        assert self.spacing is not None
        stride, dilation = gather.lattice_conv_geometry(src, dst.layout, self.spacing)
        if residual is not None:  # what is remembered must not be overwritten
            residual = lattice_grid(residual if dst.memory is None else residual.clone(), dst.layout)
        return grid_to_rows(self._convolve(lattice_grid(rows, src), residual, stride, dilation))

    def _convolve(self, grid: Tensor, residual: Tensor | None, stride: int, dilation: int) -> Tensor:
        """The plain convolution, on a channels_last grid; the memory of `residual` may be overwritten."""
        oihw = self.weight.permute(0, 3, 1, 2)
        if not self._runs_fused(grid):
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


def largest_gain(weight: Tensor, bias: Tensor) -> float:
    """How many times as large as the largest input (or as 1) an output of weights `[O, ...]` can be."""
    rows = weight.double().flatten(1).abs().sum(1) + bias.double().abs()
    return max(1.0, rows.max().item())


class Unbounded(Exception):
    """Values so large that a layer might make NaN, or NaN itself: run again by steps that hand it on."""


def require_bounded(values: Tensor, tuner: Tuner) -> None:
    """Raises Unbounded where oneDNN's ReLU might hide that values overflow (float32 on the CPU)."""
    if _runs_onednn(values) and values.numel() and not tuner.shows_nan:
        low, high = torch.aminmax(values)
        if not (low.item() >= -LARGEST_INPUT and high.item() <= LARGEST_INPUT):
            raise Unbounded


class FusedDepthwise(nn.Module):
    """A depthwise convolution on sites with batch norm folded in, then ReLU.

    Args:
        conv: a copy of its own: its weight is scaled in place.
    """

    conv: Any  # SelectiveDepthwiseConv2d
    bias: Tensor

    def __init__(self, conv: nn.Module, norm: nn.Module, relu: bool = True) -> None:
        super().__init__()
        scale, bias = fold_norm(norm)
        self.conv, self.relu = conv, relu
        self.conv.weight.mul_(scale[:, None, None, None])
        self.register_buffer("bias", bias)

    def forward(self, rows: Tensor, src: Step, dst: Step, residual: Tensor | None = None) -> Tensor:
        """`[src.num_run, C]` to `[dst.num_run, C]`."""
        out = self.conv(rows, src, dst).add_(self.bias)
        out = out if residual is None else out.add_(residual)
        return out.relu_() if self.relu else out

    @property
    def gain(self) -> float:
        """As `FusedLayer.gain`."""
        return largest_gain(self.conv.weight, self.bias)

    def sites(self, src: Step, dst: Step) -> Step:
        return dst

    def macs(self, src: Step, dst: Step) -> int:
        return self.conv.macs(src, dst)


def fold_norm(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and bias `[C]` of a batch norm in eval mode."""
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale
