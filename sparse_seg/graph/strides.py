"""Where a graph's values and taps lie as it was captured, in pixels."""

from __future__ import annotations

import functools
import operator

from sparse_seg.ops import OPERATORS, Graph, Node, UnknownOperator, Window
from sparse_seg.sites import Taps

ANY = 1 << 20  # px; a distance or stride that nothing bounds


class Strides:
    """Strides and taps of a graph.

    Args:
        graph: without padding layers.

    Attributes:
        captured: each value's stride as captured, px; 0 of vectors.
        own: output stride of the network as captured, px: the largest up to its first upsampling.
        distances: of each window, px: the largest power of two that its taps' distances are multiples of.

    Raises:
        UnknownOperator: a geometry that cannot be.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph, self.nodes = graph, graph.by_name
        self.users = graph.users()
        self.captured = self._captured()
        self.own = self._own()
        windows = (node for node in graph.nodes if self.window(node) is not None)
        self.distances = {node.name: _power_of_two(self.taps(node)) for node in windows}

    def _captured(self) -> dict[str, int]:
        strides: dict[str, int] = {}
        for node in self.graph.nodes:
            operator, window = OPERATORS[node.op], OPERATORS[node.op].window(node)
            grids = [name for name in node.inputs if strides[name]]
            if node.op == "image":
                strides[node.name] = 1
            elif node.op == "resize" and self.nodes[node.inputs[0]].size != (1, 1):
                strides[node.name] = self._resized(node)
            elif operator.is_pool or not grids:
                strides[node.name] = 0
            elif window is not None:
                down, across = window.stride
                if down != across:
                    raise UnknownOperator(f"{node.where}: strides {down} and {across} along the two axes")
                strides[node.name] = strides[grids[0]] * down
            else:
                found = {strides[name] for name in grids}
                if len(found) > 1:
                    raise UnknownOperator(f"{node.where}: joins values at strides {sorted(found)} px")
                strides[node.name] = found.pop()
        return strides

    def _resized(self, node: Node) -> int:
        (height, width), size = node.size, self.graph.size
        stride = round(size[0] / height)
        if (-(-size[0] // stride), -(-size[1] // stride)) != (height, width) or stride & (stride - 1):
            raise UnknownOperator(
                f"{node.where}: resizes to {height}x{width} for images of {size[0]}x{size[1]}, which is no "
                "stride; capture the network with images whose sides are multiples of 64"
            )
        return stride

    def _own(self) -> int:
        own = 1
        for node in self.graph.nodes:
            own = max(own, self.captured[node.name])
            if node.op == "resize" and self.captured[node.inputs[0]] > self.captured[node.name]:
                break
        return own

    def window(self, node: Node) -> Window | None:
        """A node's window, if it reads more than one place of a grid."""
        window = OPERATORS[node.op].window(node)
        is_one = window is not None and window.kernel != (1, 1) and self.captured[node.name]
        return window if is_one else None

    def taps(self, node: Node, size: tuple[int, int] | None = None) -> Taps:
        """Where a window reads, for images of `size` px."""
        window, unit = self.window(node), self.captured[node.inputs[0]]
        assert window is not None
        axes = []
        for axis in range(2):
            kernel, stride, dilation = window.kernel[axis], window.stride[axis], window.dilation[axis]
            if window.padding is not None:
                before = window.padding[axis]
            else:
                length = -(-(size or self.graph.size)[axis] // unit)
                missing = (-(-length // stride) - 1) * stride + (kernel - 1) * dilation + 1 - length
                before = max(missing, 0) // 2
            axes.append(tuple((tap * dilation - before) * unit for tap in range(kernel)))
        return Taps(*axes)

    def inside(self, node: Node, size: tuple[int, int]) -> tuple[Taps, tuple[slice, slice] | None]:
        """Where a window reads, without taps that are always outside images of `size` px and add nothing; and
        the part of its kernel that these are, None if it is all.

        Large atrous rates reach beyond small images: of torchvision's 36, at stride 16, one tap of nine reads
        inside 512x512.
        """
        taps = self.taps(node, size)
        if not OPERATORS[node.op].skips_outside:
            return taps, None
        parts = taps.inside(size)
        return taps.part(parts), None if taps.part(parts) == taps else parts

    def spacing(self, node: Node) -> int:
        """Px between a window's taps; 0 of a node without."""
        window = self.window(node)
        if window is None:
            return 0
        far = [d for d, k in zip(window.dilation, window.kernel, strict=True) if k > 1]
        return min(far) * self.captured[node.inputs[0]]

    def _grids(self, node: Node) -> list[str]:
        return [name for name in node.inputs if self.captured[name]]


def _power_of_two(taps: Taps) -> int:
    bits = functools.reduce(operator.or_, map(abs, taps.y + taps.x))
    return bits & -bits if bits else ANY
