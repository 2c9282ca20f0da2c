"""Reads a network's graph as it runs on an image without values: each call of PyTorch's becomes a node, by
what its family says (`ops.READERS`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sparse_seg.errors import SparseSegError
from sparse_seg.ops import READERS, Graph, Node, UnknownOperator
from sparse_seg.ops.call import MOVES, SHAPES, Call, Constant, Known, Record, Ref
from sparse_seg.ops.own_code import Part, standing_in

# operators of PyTorch's that change nothing that matters here
CASTS = {"to", "_to_copy", "type_as"}
SAME = {"contiguous", "clone", "alias", "detach", "detach_", "lift_fresh", "lift_fresh_copy"} | CASTS
PERHAPS_COPIES = SAME | {"reshape", "reshape_as", "flatten"}  # views of some tensors, copies of others
INPLACE_SHAPES = {"unsqueeze_", "squeeze_", "transpose_", "swapaxes_", "swapdims_", "t_"}
GROW = {"cat", "concat", "concatenate", "repeat", "tile", "repeat_interleave"}  # perhaps the batch
UNEVALUATED = SHAPES | MOVES | {"pixel_unshuffle"}  # the latter gives no images as they are
VALUES = {"item", "_local_scalar_dense", "is_nonzero", "equal"}  # tell Python what a tensor holds


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
        record: what is read so far.
    """

    def __init__(self, module: nn.Module, parts: Iterable[Part]) -> None:
        super().__init__()
        self.module, self.parts, self.record = module, list(parts), Record(module)
        self.home = next((one.device for one in module.parameters()), torch.device("cpu"))
        self.layers = [""]  # that are being called, the innermost last
        self.failed = ""  # the layer whose call failed
        self._of_image: set[int] = set()  # ids of tensors without values
        self._viewed: dict[int, Tensor] = {}  # of which a tensor without values is a view, by its id

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch's hook: True imports torch._dynamo and sympy at the first call."""
        return False

    def read(self, size: tuple[int, int]) -> Any:
        """Run the network on an image of `size` px. Returns its output."""
        dtype = next((one.dtype for one in self.module.parameters() if one.is_floating_point()), None)
        image = torch.empty(1, 3, *size, dtype=dtype, device="meta")
        self.record.nodes.append(Node("images", "image", shape=tuple(image.shape)))
        self._bind(image, Ref(self.record.nodes[0]))
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
        found = self.record.known(logits)
        if isinstance(found, UnknownOperator):
            raise found
        if not isinstance(found, Ref):
            raise CaptureFailed("the network's output does not depend on its images")
        last, output, align_corners = found.node, found.node.name, False
        if found.is_vector or len(last.shape) != 4:
            raise CaptureFailed(f"the network gives {list(last.shape)}, not logits [B, K, h, w] of images")
        if last.op == "resize" and last.size == size and not last.options.get("nearest"):
            align_corners, (output,) = last.options["align_corners"], last.inputs
        return Graph(self.record.nodes, output, size, align_corners).pruned()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, schema = kwargs or {}, func._schema
        arguments = {
            one.name: one.default_value if one.has_default_value() else None for one in schema.arguments
        }
        arguments |= dict(zip(arguments, args, strict=False)) | kwargs
        call = Call(self.record, schema.name.split("::")[1], arguments, self.layers[-1])
        of_image = [id(one) in self._of_image for one in call.tensors]
        if call.operator in CASTS and of_image == [False, True]:  # cast as the image is
            args, kwargs, of_image = (args[0], args[1].dtype), {}, [False]
            func = torch.ops.aten.to.dtype
        if not any(of_image):
            out = func(*map(self._at_home, args), **{k: self._at_home(v) for k, v in kwargs.items()})
            is_random = torch.Tag.nondeterministic_seeded in func.tags
            self._enter(call, out, of_image=False, is_random=is_random)
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
        self._enter(call, out)
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
        error = call.error(f"{call.operator} writes to a part of a tensor; make a new one, by torch.cat")
        while alias.is_write and (whole := self._viewed.get(id(source))) is not None:
            self._bind(whole, error)
            source = whole

    def _without_values(self, call: Call, func: Any, args: Any, kwargs: Any) -> Any:
        """What a call gives, on the meta device."""
        first = call.tensors[0]
        if call.operator in CASTS:
            others = [one.dtype if isinstance(one, Tensor) else one for one in [*args[1:], *kwargs.values()]]
            dtype = next((one for one in others if isinstance(one, torch.dtype)), first.dtype)
            return first if dtype == first.dtype else torch.empty_like(first, dtype=dtype, device="meta")
        device = next((one.device for one in call.tensors if not one.is_meta), "cpu")

        def run_on(change: Callable[[Tensor], Tensor]) -> Any:
            return func(*tree_map_only(Tensor, change, args), **tree_map_only(Tensor, change, kwargs))

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
        if call.operator not in UNEVALUATED:
            try:
                return tree_map_only(Tensor, one_image, run_on(no_images))
            except (RuntimeError, IndexError) as error:
                first_error = error
        try:
            return run_on(lambda one: one if one.is_meta else torch.empty_like(one, device="meta"))
        except Exception as error:  # the meta device's own messages tell less
            raise first_error or error from None

    def _at_home(self, value: Any) -> Any:
        """The module's device in place of that of tensors without values."""
        return self.home if isinstance(value, torch.device) and value.type == "meta" else value

    def _enter(self, call: Call, out: Any, of_image: bool = True, is_random: bool = False) -> None:
        """Note what the results of a call are."""
        outs = [one for one in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(one, Tensor)]
        if not outs:
            return
        call.shapes = [tuple(one.shape) for one in outs]
        try:
            if is_random:
                raise call.error(f"{call.operator} draws at random, another value at each run")
            result = self._result(call, outs)
        except UnknownOperator as error:
            result = error.with_traceback(None)
        results = result if isinstance(result, list) else [result] * len(outs)
        for one, its in zip(outs, results, strict=True):
            self._bind(one, its, of_image)

    def _result(self, call: Call, outs: list[Tensor]) -> Any:
        known, name = [self.record.known(one) for one in call.tensors], call.operator
        unknown = [one for one in known if isinstance(one, UnknownOperator)]
        if unknown:
            raise UnknownOperator(
                str(unknown[0]), dict.fromkeys(layer for one in unknown for layer in one.layers)
            )
        if name not in SAME | SHAPES and all(isinstance(one, Constant) for one in known):
            return [self.record.constant(one, known) for one in outs]
        if name in SAME:
            return known[0]
        if name in READERS:
            return READERS[name](call)
        raise call.error(
            f"the operator {name} is not known to run on sites; replace the layer, or run the network dense"
        )

    def _bind(self, tensor: Tensor, known: Known, of_image: bool = True) -> None:
        self.record.bind(tensor, known)
        if of_image:
            self._of_image.add(id(tensor))

    def _stand_in(self, part: Part, *inputs: Tensor) -> Tensor:
        """The output of a part that runs by its own code."""
        first = inputs[0]
        out = first.new_empty(first.shape[0], part.channels, *first.shape[2:], device="meta")
        arguments = {"inputs": list(inputs), "part": part}
        self._enter(Call(self.record, "own_code", arguments, self.layers[-1]), out)
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
