"""Reads a network's graph as it runs on an image without values: each call of PyTorch's becomes a node, by
what its family says (`ops.READERS`)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_seg.errors import SparseSegError
from sparse_seg.graph.call import Call, Constant, Ref, Unknown
from sparse_seg.ops import READERS, Graph, Node, UnknownOperator
from sparse_seg.ops.own_code import Part, standing_in

# operators of PyTorch's that change nothing that matters here
CASTS = {"to", "_to_copy", "type_as"}
SAME = {"contiguous", "clone", "alias", "detach", "detach_", "lift_fresh", "lift_fresh_copy"} | CASTS
SHAPES = {"view", "reshape", "flatten", "squeeze", "unsqueeze", "_unsafe_view", "unflatten"}
MOVES = {"permute", "transpose", "expand", "expand_as"}
PERHAPS_COPIES = SAME | {"reshape", "reshape_as", "flatten"}  # views of some tensors, copies of others
INPLACE_SHAPES = {"unsqueeze_", "squeeze_", "transpose_", "swapaxes_", "swapdims_", "t_"}
GROW = {"cat", "concat", "concatenate", "repeat", "tile", "repeat_interleave"}  # perhaps the batch
VALUES = {"item", "_local_scalar_dense", "is_nonzero", "equal"}  # tell Python what a tensor holds
# names of tensors that no state dict has
CONSTANT, COMPUTED = "constant.", "computed."  # the latter are computed of parameters


class CaptureFailed(SparseSegError):
    """No graph can be made of a module; the message says why, in one line."""


class _AtHome(TorchFunctionMode):
    """Tensors without values tell the module's device, where its code then makes tensors with values."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__ and args[0].is_meta:
            return self.device
        if func is torch.Tensor.new_tensor:
            kwargs = {"dtype": args[0].dtype, "device": self.device} | kwargs
            return torch.tensor(*args[1:], **kwargs)
        return func(*args, **kwargs)


class Reader(TorchDispatchMode):
    """Of one network. What depends on the image are tensors on the meta device, all else has its values.

    Args:
        parts: run by their own code.

    Attributes:
        nodes: what is read so far, by name; vectors: names of those that are vectors.
        constants: tensors that the state dict has not.
    """

    def __init__(self, module: nn.Module, parts: Iterable[Part]) -> None:
        super().__init__()
        self.module, self.parts = module, list(parts)
        self.nodes: dict[str, Node] = {}
        self.vectors: set[str] = set()
        self.constants: dict[str, Tensor] = {}
        self.home = next((one.device for one in module.parameters()), torch.device("cpu"))
        self.layers = [""]  # that are being called, the innermost last
        self.failed = ""  # the layer whose call failed
        self._known: dict[int, Ref | Constant | Unknown] = {}  # by the tensor's id
        self._of_image: set[int] = set()  # ids of tensors without values
        self._viewed: dict[int, Tensor] = {}  # of which a tensor without values is a view, by its id
        self._kept: list[Tensor] = []  # all of these, lest another one gets an id of theirs
        self._names = Counter[str]()
        self._parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        for named in (module.named_parameters, module.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                if id(tensor) not in self._known:
                    self._bind(tensor, Constant(name, tuple(tensor.shape)))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch's hook: True imports torch._dynamo and sympy at the first call."""
        return False

    def read(self, size: tuple[int, int]) -> Any:
        """Run the network on an image of `size` px. Returns its output."""
        dtype = next((one.dtype for one in self.module.parameters() if one.is_floating_point()), None)
        image = torch.empty(1, 3, *size, dtype=dtype, device="meta")
        self.nodes["images"] = Node("images", "image", shape=tuple(image.shape))
        self._bind(image, Ref("images"), of_image=True)
        # as in inference mode calls come whole; what the module keeps of its run can be trained with
        below_autograd = torch._C._AutoDispatchBelowAutograd()
        no_autocast = torch._C._DisableAutocast()  # which casts no tensors without values
        with (
            standing_in(self.parts, self._stand_in),
            self._naming(),
            torch.no_grad(),
            below_autograd,
            no_autocast,
            _AtHome(self.home),
            self,
        ):
            return self.module(image)

    def graph(self, logits: Tensor, size: tuple[int, int]) -> Graph:
        """The graph that ends with logits, less a last upsampling to the images' size.

        Raises:
            UnknownOperator: they depend on an operator that is not known.
            CaptureFailed: they are no logits.
        """
        found = self.known(logits)
        if isinstance(found, Unknown):
            error = UnknownOperator(found.message)
            error.layers = list(found.layers)
            raise error
        if not isinstance(found, Ref):
            raise CaptureFailed("the network's output does not depend on its images")
        last = self.nodes[found.name]
        if last.name in self.vectors or len(last.shape) != 4:
            raise CaptureFailed(f"the network gives {list(last.shape)}, not logits [B, K, h, w] of images")
        align_corners = False
        if last.op == "resize" and last.size == size and not last.options.get("nearest"):
            align_corners, last = last.options["align_corners"], self.nodes[last.inputs[0]]
        return Graph(list(self.nodes.values()), last.name, size, align_corners).pruned()

    def known(self, tensor: Any) -> Ref | Constant | Unknown | None:
        """What a tensor is; None for what is no tensor."""
        if not isinstance(tensor, Tensor):
            return None
        if id(tensor) not in self._known:  # an attribute of the module's, or made by torch.tensor
            self._bind(tensor, self._constant(tensor, CONSTANT))
        return self._known[id(tensor)]

    def named(self, tensor: str) -> bool:
        """Whether the module has a tensor of this name."""
        return any(isinstance(one, Constant) and one.name == tensor for one in self._known.values())

    def unique(self, name: str) -> str:
        """A node's name that no other has."""
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}_{self._names[name] - 1}"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, schema = kwargs or {}, func._schema
        arguments = {
            one.name: one.default_value if one.has_default_value() else None for one in schema.arguments
        }
        arguments |= dict(zip(arguments, args, strict=False)) | kwargs
        call = Call(self, schema.name.split("::")[1], arguments, self.layers[-1])
        of_image = [id(one) in self._of_image for one in call.tensors]
        if call.operator in CASTS and of_image == [False, True]:  # cast as the image is
            args, kwargs, of_image = (args[0], args[1].dtype), {}, [False]
            func = torch.ops.aten.to.dtype
        if not any(of_image):
            out = func(*map(self._at_home, args), **{k: self._at_home(v) for k, v in kwargs.items()})
            self._enter(call, out)
            return out
        if call.operator in VALUES:
            raise CaptureFailed("what it runs depends on the values of the images")
        is_inplace = call.operator.endswith("_") and not call.operator.startswith("_")
        try:
            if call.operator in INPLACE_SHAPES:
                out = func(*args, **kwargs)  # its shape changes, not its values
            else:
                out = args[0] if is_inplace else self._without_values(call, func, args, kwargs)
        except Exception:
            self.failed = call.layer
            raise
        self._enter(call, out, of_image=True)
        self._follow_views(call, func._schema, args[0] if args else None, out)
        return out

    def _follow_views(self, call: Call, schema: Any, source: Any, out: Any) -> None:
        """Note what a result is a view of; once a view is written to, no node has the value of the whole."""
        alias = schema.returns[0].alias_info if schema.returns else None
        if alias is None or not isinstance(source, Tensor):
            return
        if not alias.is_write and call.operator not in PERHAPS_COPIES:
            outs = out if isinstance(out, (list, tuple)) else [out]
            self._viewed |= {id(one): source for one in outs if one is not source}
        message = f"{call.where}: {call.operator} writes to a part of a tensor; make a new one, by torch.cat"
        while alias.is_write and (whole := self._viewed.get(id(source))) is not None:
            self._bind(whole, Unknown(message, (call.layer,) if call.layer else ()), of_image=True)
            source = whole

    def _without_values(self, call: Call, func: Any, args: Any, kwargs: Any) -> Any:
        """What a call gives, on the meta device."""
        first = call.tensors[0]
        if call.operator in CASTS:
            others = [one.dtype if isinstance(one, Tensor) else one for one in [*args[1:], *kwargs.values()]]
            dtype = next((one for one in others if isinstance(one, torch.dtype)), first.dtype)
            return first if dtype == first.dtype else torch.empty_like(first, dtype=dtype, device="meta")
        device = next((one.device for one in call.tensors if not one.is_meta), "cpu")

        def no_images(one: Tensor) -> Tensor:
            of_image = id(one) in self._of_image
            if not of_image and not one.is_meta:
                return one
            batched = of_image and one.ndim > 2 and one.shape[0] == 1 and call.operator not in GROW
            return torch.empty((0, *one.shape[1:]) if batched else one.shape, dtype=one.dtype, device=device)

        def one_image(one: Tensor) -> Tensor:
            return torch.empty([length or 1 for length in one.shape], dtype=one.dtype, device="meta")

        # many operators import sympy on the meta device, which takes two seconds
        first_error = None
        if call.operator not in SHAPES | MOVES:
            try:
                return _mapped(func(*_mapped(args, no_images), **_mapped(kwargs, no_images)), one_image)
            except (RuntimeError, IndexError) as error:
                first_error = error
        try:
            return func(*_mapped(args, _meta), **_mapped(kwargs, _meta))
        except Exception as error:  # the meta device's own messages tell less
            raise first_error or error from None

    def _at_home(self, value: Any) -> Any:
        """The module's device in place of that of tensors without values."""
        return self.home if isinstance(value, torch.device) and value.type == "meta" else value

    def _enter(self, call: Call, out: Any, of_image: bool = False) -> None:
        """Note what the results of a call are."""
        outs = [one for one in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(one, Tensor)]
        if not outs:
            return
        known = [self.known(one) for one in call.tensors]
        unknown = [one for one in known if isinstance(one, Unknown)]
        result: Any
        if unknown:
            layers = dict.fromkeys(layer for one in unknown for layer in one.layers)
            result = Unknown(unknown[0].message, tuple(layers))
        elif call.operator not in SAME | SHAPES and known and all(isinstance(one, Constant) for one in known):
            result = [self._computed(known, one) for one in outs]
        else:
            try:
                result = self._result(call, outs)
            except UnknownOperator as error:
                result = Unknown(str(error), (call.layer,) if call.layer else ())
        results = result if isinstance(result, list) else [result] * len(outs)
        for one, its in zip(outs, results, strict=True):
            self._bind(one, its, of_image)

    def _result(self, call: Call, outs: list[Tensor]) -> Any:
        call.shapes = [tuple(one.shape) for one in outs]
        name = call.operator
        if name in SAME:
            return self.known(call.tensors[0])
        if name in SHAPES | MOVES:
            return call.reshaped()
        read = READERS.get(name)
        if read is None:
            raise UnknownOperator(
                f"{call.where}: the operator {name} is not known to run on sites; replace the layer, or run "
                "the network dense"
            )
        return read(call)

    def _computed(self, known: list[Any], value: Tensor) -> Constant:
        """What is computed of the network's tensors alone, as a standardised weight is: a new constant."""
        trains = any(one.name in self._parameters or one.name.startswith(COMPUTED) for one in known)
        return self._constant(value, COMPUTED if trains else CONSTANT)

    def _constant(self, value: Tensor, kind: str) -> Constant:
        name = f"{kind}{len(self.constants)}"
        with torch.inference_mode(False):
            self.constants[name] = value.detach().clone()
        return Constant(name, tuple(value.shape))

    def _bind(self, tensor: Tensor, known: Ref | Constant | Unknown, of_image: bool = False) -> None:
        self._known[id(tensor)] = known
        self._kept.append(tensor)
        if of_image:
            self._of_image.add(id(tensor))

    def _stand_in(self, part: Part, *inputs: Tensor) -> Tensor:
        """The output of a part that runs by its own code."""
        first = inputs[0]
        out = first.new_empty(first.shape[0], part.channels, *first.shape[2:], device="meta")
        call = Call(self, "own_code", {"inputs": list(inputs), "part": part}, self.layers[-1])
        self._enter(call, out, of_image=True)
        return out

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Note which layer is being called."""

        reading = threading.get_ident()  # other threads may run the module

        def entering(name: str) -> Any:
            return lambda *_: self.layers.append(name) if threading.get_ident() == reading else None

        def leave(*_: Any) -> None:
            if threading.get_ident() == reading:
                self.layers.pop()

        hooks = []
        try:
            for name, layer in self.module.named_modules():
                if isinstance(layer, torch.jit.ScriptModule):
                    continue  # takes no hooks
                hooks.append(layer.register_forward_pre_hook(entering(name), prepend=True))
                hooks.append(layer.register_forward_hook(leave, always_call=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _mapped(values: Any, change: Any) -> Any:
    """The same arguments with other tensors."""
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, dict):
        return {name: _mapped(value, change) for name, value in values.items()}
    return (
        type(values)(_mapped(one, change) for one in values) if isinstance(values, (list, tuple)) else values
    )


def _meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")
