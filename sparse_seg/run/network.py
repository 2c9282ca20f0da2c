"""A network that a graph describes, with the interface of `build_model`'s."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparse_seg.config import MaskConfig, ModelConfig
from sparse_seg.graph import Geometry, fold_norms
from sparse_seg.masks import MaskPolicy
from sparse_seg.models.base import Segmentor
from sparse_seg.models.card import Card
from sparse_seg.models.way import Way
from sparse_seg.ops import Graph
from sparse_seg.run.passes import GraphPass, check_way
from sparse_seg.run.report import Report, report
from sparse_seg.sites import LevelPlan, plan_of


class SelectiveNetwork(Segmentor):
    """A captured network, run dense at any stride or selectively between its strides.

    Args:
        graph: its operators.
        module: holds the tensors that the graph names: the module that was captured, or `Tensors`.
        constants: tensors of the graph that the module has not.
        policy, strides, mask, card: see `Segmentor`.
        exchange: what an extra site reads where its level has no site: `linear`, `nearest` or `none`.

    Raises:
        NotSelective: nothing of it can run selectively at these strides.
    """

    def __init__(
        self,
        graph: Graph,
        module: nn.Module,
        constants: Mapping[str, Tensor],
        policy: MaskPolicy,
        strides: tuple[int, ...],
        mask: MaskConfig | None = None,
        exchange: str = "linear",
        card: Card | None = None,
        merge: str = "whole",
    ) -> None:
        super().__init__(policy, strides, mask, merge, card)
        self.geometry = Geometry(graph, strides)
        self.module, self.exchange = module, exchange
        self.constants = Tensors(constants)
        self.name, self.arguments = type(module).__qualname__, dict[str, Any]()  # of what made the module
        check_way(Way(merge=merge), exchange, self.geometry)

    @property
    def graph(self) -> Graph:
        return self.geometry.graph

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return self.graph.node(self.graph.output).shape[1]

    @property
    def dense_stride(self) -> int:  # type: ignore[override]
        return self.strides[0]

    @property
    def norms_vectors(self) -> bool:  # type: ignore[override]
        nodes = (node for node in self.graph.nodes if node.op == "batch_norm")
        return any(
            self.geometry.kind[node.name] == "vector" and "frozen" not in node.options for node in nodes
        )

    @property
    def has_undilated(self) -> bool:  # type: ignore[override]
        return not self.geometry.refines

    @property
    def settings(self) -> ModelConfig:
        """As a config has them."""
        return ModelConfig(
            module=self.name,
            module_args=self.arguments,
            strides=list(self.strides),
            exchange=self.exchange,
            num_classes=self.num_classes,
            mask=self.mask,
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The network's tensors by the graph's names."""
        found: dict[str, Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
        found.update(self.module.named_buffers(remove_duplicate=False))
        found.update(self.constants.named_buffers())
        return found

    def check_way(self, way: Way) -> None:
        """Raises a SparseSegError, of one line, where the network cannot run a way."""
        check_way(way, self.exchange, self.geometry)

    def start(self, images: Tensor, labels: Tensor | None = None) -> GraphPass:
        """Start a pass over images; nothing is computed yet.

        Args:
            labels: int64 `[B, H, W]`, for policies that read them (oracle).
        """
        return GraphPass(self, images, labels)

    def plans(self, batch: int, size: tuple[int, int], device: torch.device) -> dict[int, LevelPlan]:
        """The levels' plans by stride, coarsest first."""
        return {stride: plan_of(batch, size, stride, device) for stride in self.strides[-2::-1]}

    def for_inference(self) -> Self:
        if self.is_folded:
            return self
        self.require_eval()
        with torch.no_grad():
            graph, tensors = fold_norms(self.graph, self.tensors)
        folded = type(self)(
            graph,
            Tensors({name: tensor.detach().clone() for name, tensor in tensors.items()}),
            {},
            copy.deepcopy(self.policy),
            self.strides,
            self.mask,
            self.exchange,
            self.card,
            self.merge,
        )
        folded.is_folded = True
        return folded.eval()

    def report(self) -> Report:
        """Where each convolution runs, its spacing and its multiply-adds, and what limits the gain."""
        return report(self)

    def extra_repr(self) -> str:
        convolutions = [node for node in self.graph.nodes if node.op == "conv2d"]
        parts = [self.geometry.part(node.name) for node in convolutions]
        counts = ", ".join(f"{parts.count(part)} {part}" for part in ("early", "rows", "late"))
        return f"strides={list(self.strides)}, convolutions: {counts}"


class Tensors(nn.Module):
    """Tensors by dotted names, as buffers of nested modules: its state dict has just these."""

    def __init__(self, tensors: Mapping[str, Tensor], trained: frozenset[str] = frozenset()) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.enter(name, tensor, name in trained)

    def enter(self, name: str, tensor: Tensor, trained: bool = False) -> None:
        """Add one; `trained`: as a parameter."""
        *path, own = name.split(".")
        place: nn.Module = self
        for part in path:
            if part not in place._modules:
                place.add_module(part, Tensors({}))
            place = place._modules[part]  # type: ignore[assignment]
        if trained:
            place.register_parameter(own, nn.Parameter(tensor))
        else:
            place.register_buffer(own, tensor)
