"""Resizing between grids, padding, and values that no other operator makes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_seg.ops.base import Operator, Tensors, UnknownOperator, function, operator, reads
from sparse_seg.ops.node import Node


@operator("resize")
class Resize(Operator):
    """To the stride that its captured size tells; options align_corners, and `nearest` in place of bilinear.

    `run/` gives it its geometry.
    """

    needs_grid = True

    def apply(self, node: Node, tensors: Tensors, inputs: list[Tensor], training: bool) -> Tensor:
        return inputs[0]  # of a vector


@reads("upsample_bilinear2d")
def read_bilinear(call: Any) -> Any:
    return call.make("resize", [call.first], {}, align_corners=bool(call.argument("align_corners")))


@reads("upsample_nearest2d")
def read_nearest(call: Any) -> Any:
    return call.make("resize", [call.first], {}, align_corners=False, nearest=True)


@reads("upsample_bicubic2d", "_upsample_nearest_exact2d")
def read_other(call: Any) -> Any:
    if call.is_vector(call.first):
        return call.make("resize", [call.first], {}, align_corners=False)
    raise UnknownOperator(f"{call.where}: resizing is known bilinear and nearest, not as {call.operator}")


@operator("image")
class Image(Operator):
    """The network's input."""


@operator("zeros")
class Zeros(Operator):
    """A vector `[1, C, 1, 1]` of zeros, the start of what stands outside a padded image."""

    def apply(self, node: Node, tensors: Tensors, inputs: list[Tensor], training: bool) -> Tensor:
        raise NotImplementedError  # it is made in the images' dtype, see `run/`


@function("constant")
def constant(*, value: Tensor) -> Tensor:
    """A tensor `[1, C, 1, 1]`, for every image alike; a rewritten graph has such."""
    return value


@operator("pad")
class Pad(Operator):
    """As a layer of its own: `graph/rewrite.py` gives it to the window that reads it.

    Options: pads, places left, right, above, below; value, what stands there.
    """


@reads("pad", "constant_pad_nd")
def read_pad(call: Any) -> Any:
    pads = [int(count) for count in call.argument("pad")]
    if call.argument("mode", "constant") != "constant":
        raise UnknownOperator(f"{call.where}: padding by {call.argument('mode')}")
    if len(pads) not in (2, 4) or call.is_last(call.first):
        raise UnknownOperator(f"{call.where}: padding of other axes than height and width")
    pads += [0] * (4 - len(pads))
    if not any(pads):
        return call.same(call.first)
    return call.make("pad", [call.first], {}, pads=pads, value=float(call.argument("value") or 0))
