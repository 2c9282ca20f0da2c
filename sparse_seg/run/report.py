"""What `SelectiveNetwork.report` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sparse_seg.graph import Geometry
from sparse_seg.masks import MaskPolicy
from sparse_seg.ops import OPERATORS, Node
from sparse_seg.sites import grid_size


@dataclass(frozen=True)
class Row:
    """A convolution.

    part: `early`, `rows` or `late`; spacing: px between its taps, 0 of a 1x1; dense, selective: multiply-adds
    of an image, dense at the finest stride, and selectively.
    """

    layer: str
    part: str
    spacing: int
    dense: int
    selective: int


@dataclass(frozen=True)
class Report:
    """Where a network's convolutions run. `print` it.

    size: of the image that multiply-adds are for, px; fraction: of fine blocks; mixing: layers that mix
    phases; own: layers that run by their own code; uneven: why results differ at sizes that are no multiples
    of so many px, if they do.
    """

    rows: list[Row]
    strides: tuple[int, ...]
    size: tuple[int, int]
    fraction: float
    mixing: list[str]
    own: list[str]
    uneven: tuple[str, int] | None = None

    def total(self, column: str, part: str | None = None) -> int:
        """Multiply-adds, `dense` or `selective`, of a part or of all."""
        return sum(getattr(row, column) for row in self.rows if part in (None, row.part))

    @property
    def limit(self) -> str:
        """What limits the gain, in one sentence."""
        dense = self.total("dense")
        shares = {part: self.total("dense", part) / dense for part in ("early", "rows", "late")}
        text = f"{100 * shares['rows']:.0f} % of dense OS{self.strides[0]}'s multiply-adds are on rows"
        for part, what in (("early", "before the rows"), ("late", "behind them")):
            if shares[part] > 0.05:
                text += f"; {100 * shares[part]:.0f} % {what} cost the same for every mask"
        if self.mixing:
            text += f"; {self.mixing[0]} mixes phases, so that no coarse pass is refined: policy confidence "
            text += "runs one in addition"
        if self.own:
            verb = "runs by its" if len(self.own) == 1 else "run by their"
            text += f"; {', '.join(self.own)} {verb} own code, on complete grids"
        return f"{text}; {self.inexact}" if self.uneven is not None else text

    @property
    def inexact(self) -> str:
        """The sizes at which the network is not the module, if there are such."""
        if self.uneven is None:
            return ""
        why, multiple = self.uneven
        return f"at sizes that are no multiples of {multiple} px results differ from the module's, {why}"

    def __str__(self) -> str:
        width = max(len(row.layer) for row in self.rows)
        lines = [f"{'layer':{width}}  part   spacing   dense MMACs   selective"]
        for row in self.rows:
            spacing = f"{row.spacing} px" if row.spacing else "1x1"
            figures = f"{row.dense / 1e6:13.2f}{row.selective / 1e6:12.2f}"
            lines.append(f"{row.layer:{width}}  {row.part:6} {spacing:>7} {figures}")
        dense, selective = self.total("dense"), self.total("selective")
        height, length = self.size
        lines.append(
            f"{height}x{length}, a share of {self.fraction:g} fine: {selective / 1e9:.2f} GMACs, "
            f"{selective / dense:.2f} of dense OS{self.strides[0]}'s {dense / 1e9:.2f}"
        )
        return "\n".join([*lines, self.limit])


def report(geometry: Geometry, tensors: Mapping[str, Tensor], policy: MaskPolicy) -> Report:
    """The report of a network for images of the size that it was captured with, under its policy's share."""
    size, strides, fraction = geometry.graph.size, geometry.strides, policy.fine_fraction
    fraction = 0.15 if fraction is None else fraction
    middle = (policy.middle_fraction or 0.0) if len(strides) == 3 else 0.0
    cells = geometry.cells(strides[0])
    rows = []
    for node in geometry.graph.nodes:
        macs = OPERATORS[node.op].macs(node, {role: tensors[name] for role, name in node.tensors.items()})
        if not macs:
            continue
        part = geometry.part(node.name)
        if not geometry.captured[node.name]:
            rows.append(Row(node.layer, part, 0, macs, macs))
            continue
        height, width = grid_size(size, cells[node.name])
        dense = selective = height * width * macs
        if geometry.kind[node.name] == "rows":
            lattice = grid_size(size, geometry.lattice(node.name))
            places = float(lattice[0] * lattice[1])
            shares = dict(zip(strides[-2::-1], (fraction + middle, fraction), strict=False))
            for stride, share in shares.items():
                if stride < geometry.lattice(node.name):
                    level = grid_size(size, 2 * stride)
                    places += 3 * share * level[0] * level[1]
            selective = round(places * macs)
        rows.append(Row(node.layer, part, geometry.spacing(node), dense, selective))
    mixing = [geometry.nodes[name].layer for name in geometry.mixing]
    return Report(rows, strides, size, fraction, sorted(mixing), geometry.graph.own_code, uneven(geometry))


def uneven(geometry: Geometry) -> tuple[str, int] | None:
    """Why the network's results differ from the module's at sizes that are no multiples of so many px: a
    strided window counts places otherwise than sites do; or, as seen by trying, something else."""
    windows = [node for node in geometry.graph.nodes if _is_uneven(geometry, node)]
    last = max(windows, key=lambda node: geometry.captured[node.name], default=None)
    halved = 1 if last is None else geometry.captured[last.name]
    seen = geometry.graph.nodes[0].options.get("multiple", 1)
    if seen > halved:
        return "which pads, crops or resizes otherwise there", seen
    return None if last is None else (f"whose {last.layer} halves them otherwise", halved)


def _is_uneven(geometry: Geometry, node: Node) -> bool:
    """Whether a strided window gives more or fewer places than every `stride`-th of what it reads."""
    window = geometry.window(node)
    if window is None or window.stride == (1, 1) or window.padding is None:
        return False
    axes = zip(window.kernel, window.dilation, window.padding, strict=True)
    return any(dilation * (kernel - 1) != 2 * padding for kernel, dilation, padding in axes)
