"""A network that runs dense or selectively, as a graph describes it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparse_seg.config import MaskConfig, ModelConfig
from sparse_seg.config.keys import choices
from sparse_seg.errors import ConfigError, SparseSegError, TrainingError, choose_one
from sparse_seg.graph import Geometry, fold_norms
from sparse_seg.masks import POLICIES, MaskPolicy, block_levels, build_policy
from sparse_seg.networks.encoder_decoder import EncoderDecoder
from sparse_seg.ops import OPERATORS, Graph
from sparse_seg.ops.call import COMPUTED
from sparse_seg.run.card import Card
from sparse_seg.run.passes import Pass
from sparse_seg.run.patch import check_patch
from sparse_seg.run.predicting import Predicting
from sparse_seg.run.refinement import refine
from sparse_seg.run.report import Report, report
from sparse_seg.run.way import Way
from sparse_seg.run.weights import Tensors
from sparse_seg.sites import ENGINES, EXCHANGES, SEPARATE, LevelPlan, plan_of

MERGES = choices(ModelConfig, "merge")


class SelectiveNetwork(Predicting, nn.Module):
    """A segmentation network that runs coarse everywhere and fine where a mask asks for it.

    One set of weights serves `net(images)` (mask by the policy), `net(images, fine_blocks=mask)` and
    `net.dense(images, output_stride=8)`; `net.start(images)` gives the pass behind them.

    Args:
        graph: its operators.
        module: holds the tensors that the graph names: the dense network that was captured, or `Tensors`.
        constants: tensors of the graph that the module has not.
        policy: chooses the fine blocks.
        settings: as a config has them: what made the module, and how it runs. `strides`, in pixels, are those
            between which the mask chooses, finest first, each twice the one before; a block is one cell of
            the coarsest grid.
        card: what input and output mean; of a checkpoint's network.

    Raises:
        NotSelective: nothing of it can run selectively at these strides.
    """

    module: Any  # an nn.Module, whose parts mypy does not know

    def __init__(
        self,
        graph: Graph,
        module: nn.Module,
        constants: Mapping[str, Tensor],
        policy: MaskPolicy,
        settings: ModelConfig,
        card: Card | None = None,
    ) -> None:
        super().__init__()
        trained = settings.trained_stride if settings.module is None else None
        self.geometry = Geometry(graph, settings.strides, trained)
        self.module, self.constants = module, Tensors(constants)
        self.policy, self.card = policy, card
        self.settings = dataclasses.replace(settings, num_classes=graph.node(graph.output).shape[1])
        self.is_folded = False  # whether it was made by `for_inference`
        self.check_way(Way())

    @property
    def strides(self) -> tuple[int, ...]:
        return self.geometry.strides

    @property
    def mask(self) -> MaskConfig:
        """Settings of the policies that a `Way` names."""
        return self.settings.mask

    @property
    def exchange(self) -> str:
        """Rule of what is read where there is no site."""
        return self.settings.exchange

    @property
    def engine(self) -> str:
        """Of convolutions at extra sites: `gather`, `spconv`, `triton` or `auto`, see `Sites`."""
        return self.settings.engine

    @property
    def merge(self) -> str:
        """What pixels of coarse blocks get: `whole`, late values are computed everywhere from densified
        rows; or `patch`, see `run/patch.py`."""
        return self.settings.merge

    @property
    def num_classes(self) -> int:
        """K."""
        return self.graph.node(self.graph.output).shape[1]

    @property
    def dense_stride(self) -> int:
        """Output stride of a dense training, where none is set."""
        return self.strides[0] if self.settings.module is not None else 8

    @property
    def device(self) -> torch.device:
        """Where its tensors are; a folded network may have no parameters."""
        return next(itertools.chain(self.parameters(), self.buffers()), torch.empty(0)).device

    @property
    def graph(self) -> Graph:
        return self.geometry.graph

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The network's tensors by the graph's names."""
        found: dict[str, Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
        found.update(self.module.named_buffers(remove_duplicate=False))
        found.update(self.constants.named_buffers())
        return found

    @property
    def norms_vectors(self) -> bool:
        """Whether a norm sees one value of each image."""
        nodes = (node for node in self.graph.nodes if node.op == "batch_norm")
        return any(
            self.geometry.kind[node.name] == "vector" and "frozen" not in node.options for node in nodes
        )

    @property
    def frozen(self) -> frozenset[str]:
        """Values of norms and dropout whose layers are in eval mode, though the network may train."""
        layers = dict(self.module.named_modules())
        joining = (node for node in self.graph.nodes if OPERATORS[node.op].joins and node.layer in layers)
        return frozenset(node.name for node in joining if not layers[node.layer].training)

    @property
    def auxiliary(self) -> tuple[Any, ...]:
        """The auxiliary head, and the name of the value that it reads, the last feature but one; or none."""
        if not isinstance(self.module, EncoderDecoder) or self.module.auxiliary is None:
            return ()
        features = [node.name for node in self.graph.nodes if "natural" in node.options]
        return self.module.auxiliary, features[-2]

    # -- ways ----------------------------------------------------------------------------------------------

    def policy_for(self, way: Way) -> MaskPolicy:
        """The policy of a selective way: the model's own, or the one that the way names, in eval mode.

        Raises:
            ConfigError: an unknown policy or option, or a learned one where the network has none.
        """
        if way.mask is None and way.fine_fraction is None and way.middle_fraction is None:
            return self.policy
        settings = way.mask_config(self.mask)
        net = getattr(self.policy, "net", None) if type(self.policy) is POLICIES[settings.policy] else None
        try:
            policy = build_policy(settings, self.strides, net)
        except ValueError as error:
            raise ConfigError(f"{way.name}: {error}") from None
        return policy.to(self.device).eval()

    def separates(self, way: Way) -> bool:
        """Whether levels do not read each other."""
        return (way.exchange or self.exchange) == SEPARATE

    def refines(self, way: Way) -> bool:
        """Whether a coarse pass can be refined (P4): it stays as it is when blocks become fine (P1)."""
        return self.geometry.refines and not self.separates(way)

    def check_way(self, way: Way) -> None:
        """Raises a SparseSegError, of one line, where the network cannot run a way; a ValueError where it has
        an exchange rule, engine or merge that is none."""
        stride = way.output_stride
        if stride is not None and self.settings.module is None and stride not in (4, 8, 16, 32):
            raise ValueError(f"output_stride must be 4, 8, 16 or 32, not {stride!r}")
        if stride is not None and (not isinstance(stride, int) or stride < 1 or stride & (stride - 1)):
            raise ValueError(f"output_stride must be a power of two, px, not {stride!r}")
        for name, valid in (("exchange", EXCHANGES), ("engine", ENGINES), ("merge", MERGES)):
            value = getattr(way, name) or getattr(self, name)
            if value not in valid:
                raise ValueError(f"unknown {name} {choose_one(value, valid)}")
        if (way.merge or self.merge) == "patch":
            check_patch(self.geometry)
        if self.separates(way) and (way.merge or self.merge) == "patch":
            raise SparseSegError(
                "exchange separate makes coarse sites depend on the mask: there is no coarse pass for merge "
                "patch; choose merge whole"
            )

    def plans(self, batch: int, size: tuple[int, int], device: torch.device) -> dict[int, LevelPlan]:
        """The levels' plans by stride, coarsest first."""
        return {stride: plan_of(batch, size, stride, device) for stride in self.strides[-2::-1]}

    def start(self, images: Tensor, labels: Tensor | None = None) -> Pass:
        """Start a pass over images; nothing is computed yet.

        Args:
            labels: int64 `[B, H, W]`, for policies that read them (oracle).
        """
        return Pass(self, images, labels)

    def refine(
        self,
        images: Tensor,
        fractions: Iterable[float] | None = None,
        milliseconds: float | None = None,
    ) -> Iterator[Tensor]:
        """Anytime prediction: ever better logits `[B, K, H, W]`; each step computes its new sites only.

        Args:
            fractions: rising shares of fine blocks, a result for each; 0 is the dense network at the coarsest
                stride. With three strides the policy's `middle_fraction` follows in rank.
            milliseconds: the time to spend, instead of fractions. The first result is the coarse network's,
                later ones come as long as a further step fits, by the cost measured so far.

        Blocks are ranked once, by the coarse pass (the model's policy if it reads that, else confidence with
        its defaults). Results after the first differ from one-shot ones only where new sites lie next to
        those of an earlier step.

        Raises:
            ValueError: both or neither given, fractions that do not rise, a time that is no number, or a
                model in training mode.
        """
        return (step.logits for step in refine(self, images, fractions, milliseconds))

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`.

        Raises:
            ValueError, TrainingError: see `check_trains`.
        """
        if mode:
            self.check_trains()
        return super().train(mode)

    def check_trains(self) -> None:
        """Raises an error of one line where the network cannot train: a ValueError of a folded one, a
        TrainingError of one with computed weights."""
        if self.is_folded:
            raise ValueError("a network made by for_inference() cannot train: train the one it was made of")
        for node in self.graph.nodes:
            if any(name.startswith(COMPUTED) for name in node.tensors.values()):
                raise TrainingError(
                    f"{node.where} computes its weight of parameters, and its values were taken once: call "
                    "module.eval() before selective(); to train, train the module itself"
                )

    def for_inference(self) -> Self:
        """A copy for prediction only: batch norm folded into weights, no autograd, no auxiliary head.

        The same interface and numbers (to 1e-5). Of such a network, itself. An exported network is faster
        (`sparse_seg.export`).

        Raises:
            ValueError: the model is in training mode (its batch statistics cannot be folded).
        """
        if self.is_folded:
            return self
        if self.training:
            raise ValueError("call model.eval() first: batch norm in training mode cannot be folded")
        with torch.no_grad():
            graph, tensors = fold_norms(self.graph, self.tensors)
        folded = type(self)(
            graph,
            Tensors({name: tensor.detach().clone() for name, tensor in tensors.items()}),
            {},
            copy.deepcopy(self.policy),
            self.settings,
            self.card,
        )
        folded.is_folded = True
        return folded.eval()

    def report(self) -> Report:
        """Where each convolution runs, its spacing and its multiply-adds, and what limits the gain."""
        return report(self.geometry, self.tensors, self.policy)

    def fine_pixels(self, fine_blocks: Tensor, images: Tensor) -> Tensor:
        """The pixels of the blocks `[B, Hc, Wc]` that are at the finest stride, bool `[B, H, W]`."""
        fine, block = block_levels(fine_blocks, self.strides) == len(self.strides) - 1, self.strides[-1]
        height, width = images.shape[2:]
        return fine.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :height, :width]

    def extra_repr(self) -> str:
        convolutions = [node for node in self.graph.nodes if node.op == "conv2d"]
        parts = [self.geometry.part(node.name) for node in convolutions]
        counts = ", ".join(f"{parts.count(part)} {part}" for part in ("early", "rows", "late"))
        return f"strides={list(self.strides)}, convolutions: {counts}"
