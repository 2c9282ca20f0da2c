"""A captured network as one static module: the graph's own run (`run/values.py`) with the blocks' numbers in
place of a mask."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from sparse_seg.errors import SparseSegError
from sparse_seg.export.static import ExportOptions, StaticForm, check_policy, check_size
from sparse_seg.graph import Geometry
from sparse_seg.run.way import Way
from sparse_seg.ops import Graph
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.patch import patched
from sparse_seg.run.segmentor import Tensors
from sparse_seg.run.values import Run
from sparse_seg.sites import LevelPlan, Sites


class GraphNetwork(StaticForm):
    """Copies of a captured network's tensors, named after their layers, and its folded graph.

    Args:
        model: in eval mode; stays as it is.

    Raises:
        SparseSegError: options that do not fit the model.
    """

    def __init__(self, model: SelectiveNetwork, options: ExportOptions) -> None:
        check_options(model, options)
        folded = model.for_inference()
        super().__init__(folded, options)
        graph, tensors = _named_by_layer(folded.graph, folded.tensors)
        self.has_std = not _fold_std(graph, tensors, self.std)
        self.weights = Tensors({name: tensor.float() for name, tensor in tensors.items()})
        self.geometry = geometry = Geometry(graph, self.strides)
        last = geometry.trained(geometry.graph.output), graph.align_corners
        if options.dense is None:
            self._prepare_choice(model, self._output_stride(self.strides[-1]), *last)
            self.plans = {
                stride: LevelPlan(options.batch, options.size, stride) for stride in self.strides[-2::-1]
            }
        self._prepare_outputs(self._output_stride(options.dense or self.strides[0]), *last)

    def grid_logits(self, images: Tensor, *blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        centred, geometry = self._centred(images), self.geometry
        tensors = dict(self.weights.named_buffers())
        run = Run(geometry, tensors, centred / self.std if self.has_std else centred)
        if self.options.dense is not None:
            return run.output(run.dense(self.options.dense)).tensor, None
        patches = self.merge == "patch"
        kept = geometry.kept_lattices | (geometry.kept_late if patches else set())
        coarse = run.dense(self.strides[-1], kept)
        features = run.early()[geometry.features].thinned(self.strides[0])

        def coarse_logits() -> Tensor:
            if not geometry.refines:
                raise SparseSegError(
                    f"{geometry.where_mixing} makes the lattice depend on the mask, so no policy can read a "
                    "coarse pass: export with --policy edge or given, or with --dense"
                )
            return run.output(coarse).tensor

        chosen = self._choose(centred / self.std, features, coarse_logits, blocks)
        near = geometry.near(self.options.size) if self.options.ghosts else {}
        sites = Sites.of_numbers(chosen, self.ranking.fine, self.plans, self.exchange, near)
        values = run.mixed(sites, coarse if geometry.refines else None, late=not patches)
        if patches:
            return patched(run, sites, coarse, values).tensor, chosen
        return run.output(values).tensor, chosen

    def _output_stride(self, stride: int) -> int:
        """Of the logits where the network runs dense at a stride, or at most at it, px."""
        return self.geometry.cells(stride)[self.geometry.graph.output]


def check_options(model: SelectiveNetwork, options: ExportOptions) -> None:
    """Raises a SparseSegError, of one line, where a static network cannot be made."""
    check_size(options)
    if options.dense is not None:
        if options.dense < 1 or options.dense & (options.dense - 1):
            raise SparseSegError(f"dense output stride must be a power of two, not {options.dense}")
        return
    coarsest, (height, width) = model.strides[-1], options.size
    model.check_way(Way(merge=options.merge))
    if model.separates(Way()):
        raise SparseSegError(
            "exchange separate makes the coarse lattice depend on the mask; such a network can be exported "
            "with --dense only, or with another rule (--set model.exchange=linear)"
        )
    if len(model.strides) == 3 and (height % coarsest or width % coarsest):
        raise SparseSegError(
            f"size {height}x{width} with three strides: export a captured network for multiples of "
            f"{coarsest} px, or with two strides"
        )
    check_policy(model, options)


def _named_by_layer(graph: Graph, tensors: dict[str, Tensor]) -> tuple[Graph, dict[str, Tensor]]:
    """The same with each tensor named `LAYER.ROLE`; what several nodes read is there once."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    nodes = []
    for node in graph.nodes:
        own = {}
        for role, old in node.tensors.items():
            if old not in names:
                layer, number = node.layer or node.name.replace(".", "_"), 1
                while (name := f"{layer}{f'_{number}' if number > 1 else ''}.{role}") in taken:
                    number += 1
                names[old] = name
                taken.add(name)
            own[role] = names[old]
        nodes.append(dataclasses.replace(node, tensors=own))
    return dataclasses.replace(graph, nodes=nodes), {new: tensors[old] for old, new in names.items()}


def _fold_std(graph: Graph, tensors: dict[str, Tensor], std: Tensor) -> bool:
    """Make the division by the standard deviation part of the first weights; whether that was possible."""
    users = graph.users()[graph.nodes[0].name]
    names = {node.tensors.get("weight", "") for node in users}
    if any(node.op != "conv2d" or node.options["groups"] != 1 for node in users):
        return False
    if any(set(node.tensors.values()) & names for node in graph.nodes if node not in users):
        return False
    for name in names:
        tensors[name] = tensors[name] / std.to(tensors[name])
    return True
