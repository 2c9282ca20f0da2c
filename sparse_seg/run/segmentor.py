"""What a captured network is made of, and what a pass over images reads of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_seg.config import MaskConfig, ModelConfig
from sparse_seg.errors import SparseSegError
from sparse_seg.graph import Geometry
from sparse_seg.masks import MaskPolicy
from sparse_seg.models.base import Segmentor
from sparse_seg.models.card import Card
from sparse_seg.models.way import Way
from sparse_seg.ops import OPERATORS, Graph
from sparse_seg.run.patch import check_patch
from sparse_seg.sites import ENGINES, EXCHANGES, LevelPlan, plan_of


class GraphSegmentor(Segmentor):
    """Graph, tensors and policy; `SelectiveNetwork` runs them.

    Args:
        graph: its operators.
        module: holds the tensors that the graph names: the module that was captured, or `Tensors`.
        constants: tensors of the graph that the module has not.
        policy, strides, mask, card: see `Segmentor`.
        exchange: what an extra site reads where its level has no site: `linear`, `nearest` or `none`; or
            `separate`: no site reads one of another level.
        engine: of 3x3 convolutions at extra sites: `gather`, `spconv`, or `auto`, see `Sites`.

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
        engine: str = "auto",
    ) -> None:
        super().__init__(policy, strides, mask, merge, card)
        self.geometry = Geometry(graph, strides)
        self.module, self.exchange, self.engine = module, exchange, engine
        self.constants = Tensors(constants)
        self.name, self.arguments = type(module).__qualname__, dict[str, Any]()  # of what made the module
        self.check_way(Way(merge=merge))

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
            engine=self.engine,
            merge=self.merge,
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

    @property
    def frozen(self) -> frozenset[str]:
        """Values of norms and dropout whose layers are in eval mode, though the network may train."""
        layers = dict(self.module.named_modules())
        joining = (node for node in self.graph.nodes if OPERATORS[node.op].joins and node.layer in layers)
        return frozenset(node.name for node in joining if not layers[node.layer].training)

    def check_way(self, way: Way) -> None:
        """Raises a SparseSegError, of one line, where the network cannot run a way; a ValueError where it has
        a rule or engine that is none."""
        rule, engine = way.exchange or self.exchange, way.engine or self.engine
        if rule not in EXCHANGES:
            raise ValueError(f"unknown exchange {rule!r}; choose one of {', '.join(EXCHANGES)}")
        if engine not in ENGINES:
            raise ValueError(f"unknown engine {engine!r}; choose one of {', '.join(ENGINES)}")
        if way.merge == "patch":
            check_patch(self.geometry)
        if self.separates(way) and (way.merge or self.merge) == "patch":
            raise SparseSegError(
                "exchange separate makes coarse sites depend on the mask: there is no coarse pass for merge "
                "patch; choose merge whole"
            )

    def plans(self, batch: int, size: tuple[int, int], device: torch.device) -> dict[int, LevelPlan]:
        """The levels' plans by stride, coarsest first."""
        return {stride: plan_of(batch, size, stride, device) for stride in self.strides[-2::-1]}

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
