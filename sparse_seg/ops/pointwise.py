"""Activations and arithmetic: each place and channel by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.ops.base import OPERATORS, READERS, Operator, Tensors, UnknownOperator, operator, reads
from sparse_seg.ops.node import Node


class Unary(NamedTuple):
    """A function of one value, and its options by name with PyTorch's names of them."""

    function: Callable[..., Tensor]
    options: tuple[str, ...] = ()


UNARY = {
    "relu": Unary(F.relu),
    "relu6": Unary(F.relu6),
    "hardtanh": Unary(lambda x, min_val, max_val: F.hardtanh(x, min_val, max_val), ("min_val", "max_val")),
    "hardswish": Unary(F.hardswish),
    "hardsigmoid": Unary(F.hardsigmoid),
    "sigmoid": Unary(torch.sigmoid),
    "silu": Unary(F.silu),
    "gelu": Unary(lambda x, approximate: F.gelu(x, approximate=approximate), ("approximate",)),
    "leaky_relu": Unary(lambda x, negative_slope: F.leaky_relu(x, negative_slope), ("negative_slope",)),
    "elu": Unary(lambda x, alpha: F.elu(x, alpha), ("alpha",)),
    "tanh": Unary(torch.tanh),
    "mish": Unary(F.mish),
    "softplus": Unary(lambda x, beta, threshold: F.softplus(x, beta, threshold), ("beta", "threshold")),
    "clamp": Unary(lambda x, min, max: torch.clamp(x, min, max), ("min", "max")),
    "neg": Unary(torch.neg),
    "exp": Unary(torch.exp),
    "sqrt": Unary(torch.sqrt),
    "abs": Unary(torch.abs),
}


class Activation(Operator):
    def __init__(self, unary: Unary) -> None:
        self.unary = unary

    def apply(self, node: Node, tensors: Tensors, inputs: list[Tensor], training: bool) -> Tensor:
        return self.unary.function(inputs[0], *(node.options[name] for name in self.unary.options))

    def overwrite(self, node: Node, inputs: list[Tensor]) -> Tensor | None:
        return inputs[0].relu_() if node.op == "relu" else None

    def check(self, node: Node, tensors: Tensors) -> None:
        for name in self.unary.options:
            value = node.options.get(name, "")
            if not (value is None or isinstance(value, (int, float)) or value in ("none", "tanh")):
                raise ValueError(f"{name} is {value!r}")


def _read_unary(name: str) -> Callable[[Any], Any]:
    def read(call: Any) -> Any:
        options = {key: call.argument(key) for key in UNARY[name].options}
        return call.make(name, [call.first], {}, **options)

    return read


for _name, _unary in UNARY.items():
    OPERATORS[_name] = Activation(_unary)
    READERS[_name] = READERS[f"{_name}_"] = _read_unary(_name)


@operator("prelu")
class PReLU(Operator):
    """Tensors: weight `[C]` or `[1]`."""

    def apply(self, node: Node, tensors: Tensors, inputs: list[Tensor], training: bool) -> Tensor:
        return F.prelu(inputs[0], tensors["weight"])


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

    def check(self, node: Node, tensors: Tensors) -> None:
        number = node.options.get("number", 0.0)
        if not isinstance(number, (int, float)):
            raise ValueError(f"number is {number!r}")
        if "tensor" in tensors and tensors["tensor"].numel() != math.prod(node.options["axes"]):
            raise ValueError(f"tensor {list(tensors['tensor'].shape)} has not {node.options['axes']} values")


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
        (x,), p = inputs, node.options["p"]
        if not training or p == 0:
            return x
        if node.options["whole"] and x.ndim == 4:
            return F.dropout2d(x, p)
        return F.dropout(x, p)

    def check(self, node: Node, tensors: Tensors) -> None:
        if not 0 <= node.options["p"] <= 1:
            raise ValueError(f"p is {node.options['p']}")


@reads("dropout", "dropout_")
def read_dropout(call: Any) -> Any:
    return call.make("dropout", ["input"], {}, p=call.argument("p"), whole=False)


@reads("feature_dropout", "feature_dropout_")
def read_feature_dropout(call: Any) -> Any:
    return call.make("dropout", ["input"], {}, p=call.argument("p"), whole=True)
