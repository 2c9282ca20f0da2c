"""Padding as a layer of its own: `graph/rewrite.py` gives it to the window that reads it."""

from __future__ import annotations

from typing import Any

from sparse_seg.ops.base import Operator, UnknownOperator, operator, reads


@operator("pad")
class Pad(Operator):
    """Options: pads, places left, right, above, below; value, what stands there."""


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
