"""Activations and arithmetic: each place and channel by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.ops.base import (
    OPERATORS,
    READERS,
    Function,
    Operator,
    Tensors,
    UnknownOperator,
    function,
    operator,
    reads,
)
from sparse_seg.ops.node import Node


class Activation(Function):
    """A function of one value; options have PyTorch's names."""

    def overwrite(self, node: Node, inputs: list[Tensor]) -> Tensor | None:
        return inputs[0].relu_() if node.op == "relu" else None


UNARY = {
    "relu": Activation(F.relu, ()),
    "relu6": Activation(F.relu6, ()),
    "hardtanh": Activation(F.hardtanh, ("min_val", "max_val")),
    "hardswish": Activation(F.hardswish, ()),
    "hardsigmoid": Activation(F.hardsigmoid, ()),
    "sigmoid": Activation(torch.sigmoid, ()),
    "silu": Activation(F.silu, ()),
    "gelu": Activation(F.gelu, ("approximate",)),
    "leaky_relu": Activation(F.leaky_relu, ("negative_slope",)),
    "elu": Activation(F.elu, ("alpha",)),
    "tanh": Activation(torch.tanh, ()),
    "mish": Activation(F.mish, ()),
    "softplus": Activation(F.softplus, ("beta", "threshold")),
    "clamp": Activation(torch.clamp, ("min", "max")),
    "neg": Activation(torch.neg, ()),
    "exp": Activation(torch.exp, ()),
    "sqrt": Activation(torch.sqrt, ()),
    "abs": Activation(torch.abs, ()),
}
OPERATORS.update(UNARY)


@reads(*UNARY, *(f"{name}_" for name in UNARY))
def read_unary(call: Any) -> Any:
    name = call.operator.removesuffix("_")
    return call.make(name, [call.first], {}, **{key: call.argument(key) for key in UNARY[name].options})


@function("prelu")
def prelu(x: Tensor, *, weight: Tensor) -> Tensor:
    """weight: `[C]` or `[1]`."""
    return F.prelu(x, weight)


@reads("prelu")
def read_prelu(call: Any) -> Any:
    return call.make("prelu", ["self"], {"weight": call.tensor("weight")})


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


class Arithmetic(Operator):
    """Of two values; or of one and a number (`number`) or a tensor of a value for each channel (`tensor`,
    whose channel axes are `axes`), before it where `first` says so."""

    def __init__(self, function: Callable[[Any, Any], Tensor]) -> None:
        self.function = function

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


for _name, _function in BINARY.items():
    OPERATORS[_name] = Arithmetic(_function)


def _read_binary(name: str, first: str = "self", second: str = "other") -> Callable[[Any], Any]:
    def read(call: Any) -> Any:
        values = [key for key in (first, second) if call.is_value(key)]
        if float(call.argument("alpha", 1)) != 1:
            raise UnknownOperator(f"{call.where}: arithmetic with alpha={call.argument('alpha')}")
        if call.argument("rounding_mode", None) is not None:
            raise UnknownOperator(f"{call.where}: a division that rounds")
        if len(values) == 2:
            return call.make(name, values, {})
        constant = second if values == [first] else first
        options: dict[str, Any] = {"first": True} if constant == first else {}
        number = call.argument(constant)
        if isinstance(number, (int, float)):
            return call.make(name, values, {}, number=number, **options)
        tensor = call.tensor(constant)
        axes = call.channel_axes(call.shape_of(tensor), values[0])
        return call.make(name, values, {"tensor": tensor}, axes=axes, **options)

    return read


for _name in ("add", "sub", "mul", "div", "maximum", "minimum"):
    READERS[_name] = READERS[f"{_name}_"] = _read_binary(_name)
READERS["rsub"] = _read_binary("sub", "other", "self")
READERS["pow"] = READERS["pow_"] = _read_binary("pow", "self", "exponent")


# -- dropout -----------------------------------------------------------------------------------------------


@operator("dropout")
class Dropout(Operator):
    """Options: p; `whole`: whole channels of an image at once."""

    joins = True

    def apply(self, node: Node, tensors: Tensors, inputs: list[Tensor], training: bool) -> Tensor:
        (x,), p, whole = inputs, node.options["p"], node.options["whole"]
        if not training or p == 0:
            return x
        return F.dropout2d(x, p) if whole and x.ndim == 4 else F.dropout(x, p)


@reads("dropout", "dropout_")
def read_dropout(call: Any) -> Any:
    return call.make("dropout", ["input"], {}, p=call.argument("p"), whole=False)


@reads("feature_dropout", "feature_dropout_")
def read_feature_dropout(call: Any) -> Any:
    return call.make("dropout", ["input"], {}, p=call.argument("p"), whole=True)
