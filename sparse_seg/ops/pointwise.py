"""Activations and arithmetic: each place and channel by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.ops.base import OPERATORS, Function, Tensors, function
from sparse_seg.ops.call import READERS, Call, Ref, reads
from sparse_seg.ops.node import Node

UNARY = {  # options have PyTorch's names
    "relu": Function(F.relu, overwrite=lambda node, inputs: inputs[0].relu_()),
    "relu6": Function(F.relu6),
    "hardtanh": Function(F.hardtanh, "min_val", "max_val"),
    "hardswish": Function(F.hardswish),
    "hardsigmoid": Function(F.hardsigmoid),
    "sigmoid": Function(torch.sigmoid),
    "silu": Function(F.silu),
    "gelu": Function(F.gelu, "approximate"),
    "leaky_relu": Function(F.leaky_relu, "negative_slope"),
    "elu": Function(F.elu, "alpha"),
    "tanh": Function(torch.tanh),
    "mish": Function(F.mish),
    "softplus": Function(F.softplus, "beta", "threshold"),
    "clamp": Function(torch.clamp, "min", "max"),
    "neg": Function(torch.neg),
    "exp": Function(torch.exp),
    "sqrt": Function(torch.sqrt),
    "abs": Function(torch.abs),
}
OPERATORS.update(UNARY)


@reads(*UNARY, *(f"{name}_" for name in UNARY))
def read_unary(call: Call) -> Ref:
    name = call.operator.removesuffix("_")
    return call.make(name, **{key: call.argument(key) for key in UNARY[name].options})


@function("prelu")
def prelu(x: Tensor, *, weight: Tensor) -> Tensor:
    """weight: `[C]` or `[1]`."""
    return F.prelu(x, weight)


@reads("prelu")
def read_prelu(call: Call) -> Ref:
    return call.make("prelu", tensors=call.named("weight"))


# -- two values, or a value and a constant -----------------------------------------------------------------

BINARY: dict[str, Callable[[Any, Any], Tensor]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "pow": lambda a, b: a**b,
}


class Arithmetic(Function):
    """Of two values; or of one and a number (`number`) or a tensor of a value for each channel (`tensor`,
    whose channel axes are `axes`), before it where `first` says so."""

    def apply(self, node: Node, tensors: Tensors, inputs: list[Tensor], training: bool) -> Tensor:
        if len(inputs) == 2:
            return self.function(*inputs)
        other: Any = node.options.get("number")
        if "tensor" in tensors:
            axes, x = node.options["axes"], inputs[0]
            other = tensors["tensor"].reshape(1, *axes, *[1] * (x.ndim - 1 - len(axes)))
        pair = (other, inputs[0]) if node.options.get("first") else (inputs[0], other)
        return self.function(*pair)

    def overwrite(self, node: Node, inputs: list[Tensor]) -> Tensor | None:
        first, *others = inputs
        same = all((one.shape, one.dtype) == (first.shape, first.dtype) for one in others)
        return first.add_(*others) if node.op == "add" and others and same else None


OPERATORS.update({name: Arithmetic(call) for name, call in BINARY.items()})


def _read_binary(name: str, first: str = "self", second: str = "other") -> Callable[[Call], Ref]:
    def read(call: Call) -> Ref:
        values = [key for key in (first, second) if call.is_value(key)]
        if float(call.argument("alpha", 1)) != 1:
            raise call.error(f"arithmetic with alpha={call.argument('alpha')}")
        if call.argument("rounding_mode") is not None:
            raise call.error("a division that rounds")
        if len(values) == 2:
            return call.make(name, *values)
        constant = second if values == [first] else first
        options: dict[str, Any] = {"first": True} if constant == first else {}
        number = call.argument(constant)
        if isinstance(number, (int, float)):
            return call.make(name, *values, number=number, **options)
        tensor = call.tensor(constant)
        assert tensor is not None
        axes = call.channel_axes(tensor.shape, call.value(values[0]))
        return call.make(name, *values, tensors={"tensor": tensor.name}, axes=axes, **options)

    return read


for _name in ("add", "sub", "mul", "div", "maximum", "minimum"):
    READERS[_name] = READERS[f"{_name}_"] = _read_binary(_name)
READERS["rsub"] = _read_binary("sub", "other", "self")
READERS["pow"] = READERS["pow_"] = _read_binary("pow", "self", "exponent")


# -- dropout -----------------------------------------------------------------------------------------------


@function("dropout", joins=True)
def dropout(x: Tensor, *, p: float, whole: bool, training: bool) -> Tensor:
    """whole: whole channels of an image at once."""
    if not training or p == 0:
        return x
    return F.dropout2d(x, p) if whole and x.ndim == 4 else F.dropout(x, p)


@reads("dropout", "dropout_", "feature_dropout", "feature_dropout_")
def read_dropout(call: Call) -> Ref:
    return call.make("dropout", p=call.argument("p"), whole=call.operator.startswith("feature"))
