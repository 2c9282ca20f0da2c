"""Resizing between grids, padding, and values that no other operator makes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_seg.ops.base import OPERATORS, Operator, function
from sparse_seg.ops.call import Call, Ref, reads

# `run/` makes the first two, `zeros` in the images' dtype; `graph/rewrite.py` gives the last to the window
# that reads it
OPERATORS["image"] = Operator()  # the network's input
OPERATORS["zeros"] = Operator()  # a vector `[1, C, 1, 1]`, the start of what stands outside a padded image
OPERATORS["pad"] = Operator()  # options pads, places left, right, above, below; value, what stands there


@function("constant")
def constant(*, value: Tensor) -> Tensor:
    """A tensor `[1, C, 1, 1]`, for every image alike; a rewritten graph has such."""
    return value


@function("resize", needs_grid=True)
def resize(x: Tensor) -> Tensor:
    """A vector, as it is; grids go to the stride that the captured size tells, by `run/`.

    Options: align_corners, and `nearest` in place of bilinear.
    """
    return x


@reads("upsample_bilinear2d", "upsample_nearest2d", "upsample_bicubic2d", "_upsample_nearest_exact2d")
def read_resize(call: Call) -> Ref:
    nearest: dict[str, Any] = {"nearest": True} if call.operator == "upsample_nearest2d" else {}
    if call.operator not in ("upsample_bilinear2d", "upsample_nearest2d") and not call.value().is_vector:
        raise call.error(f"resizing is known bilinear and nearest, not as {call.operator}")
    align_corners = call.operator == "upsample_bilinear2d" and bool(call.argument("align_corners"))
    return call.make("resize", align_corners=align_corners, **nearest)


@reads("pad", "constant_pad_nd")
def read_pad(call: Call) -> Ref:
    pads = [int(count) for count in call.argument("pad")]
    if call.argument("mode", "constant") != "constant":
        raise call.error(f"padding by {call.argument('mode')}")
    if len(pads) not in (2, 4) or call.value().is_last:
        raise call.error("padding of other axes than height and width")
    pads += [0] * (4 - len(pads))
    if not any(pads):
        return call.value()
    return call.make("pad", pads=pads, value=float(call.argument("value") or 0))
