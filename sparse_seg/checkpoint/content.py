"""What a checkpoint holds beside its weights, and the check that all of it is what it should be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from sparse_seg.config import ModelConfig, model_config, to_dict
from sparse_seg.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from sparse_seg.errors import CheckpointError, ConfigError
from sparse_seg.graph.file import from_json, to_json
from sparse_seg.ops import Graph
from sparse_seg.version import __version__

ASIDE = "source."  # our prefix of tensors that the network does not need, kept for the way back
MODULE, CONSTANTS, POLICY = "module.", "constants.", "policy."
AUXILIARY = "auxiliary."  # below MODULE, of ours: a head that only training uses
PARTS = (MODULE, CONSTANTS, POLICY, ASIDE)
EARLIER_PARTS = ("backbone.", "head.", AUXILIARY)  # of a module, up to format 2
MOST_NUMBER = 1e300
Test = Callable[[Any], bool]


@dataclass(frozen=True)
class Origin:
    """Where weights come from.

    Args:
        source: `sparse_seg` for those of our training, else a name in `conversion.SOURCES`.
        arch: the source's name for the network, as `deeplabv3_resnet50`.
        has_head: False for a backbone alone.
        learned_net: which net `policy.net.*` is, see `captured.NETS`.
        normalisation: how mean and std are known, in words; empty where nobody said, so that a config may
            have others.
        assumed: what the source's tensors could not tell and what was taken for it, one line each.
        back: what the way back to the source's names needs; `conversion/mapping.py` reads it.
    """

    source: str = "sparse_seg"
    arch: str = ""
    has_head: bool = True
    learned_net: str = "mask_net"
    normalisation: str = "as trained"
    assumed: list[str] = field(default_factory=list)
    back: dict[str, Any] = field(default_factory=dict)

    @property
    def is_trained_here(self) -> bool:
        return self.source == "sparse_seg"


@dataclass(frozen=True)
class Captured:
    """A network as a graph; parameters: those of the graph's tensors that training changes."""

    graph: Graph
    parameters: frozenset[str] = frozenset()

    def description(self) -> dict[str, Any]:
        return to_json(self.graph) | {"parameters": sorted(self.parameters)}

    @classmethod
    def of(cls, tree: Any) -> Captured:
        """From what a file says. Raises a ValueError for a graph that cannot be."""
        if not isinstance(tree, dict) or not isinstance(tree.get("parameters"), list):
            raise ValueError("its graph does not say which parameters it has")
        graph = from_json({name: value for name, value in tree.items() if name != "parameters"})
        return cls(graph, frozenset(map(str, tree["parameters"])))


@dataclass(frozen=True)
class Checkpoint:
    """A network's weights with all that is needed to run it on images.

    Args:
        path: the file.
        weights: `module.*`, by the module's own names, `constants.*` (of its graph), and, where there are
            such, `policy.*` (learned mask) and `source.*` (kept for the way back).
        config: the network; `num_classes` is set.
        classes, colours: name and RGB (0..255) of each class; None where the source does not tell.
        mean, std: of the input, RGB in units of 0..1.
        origin: where the weights come from.
        training: of our training: `config` (the whole one) and what it said about the weights; and, where
            they are known, `ids`, the values of the classes in labels, and `frame`, height and width of the
            training frames, px (their median).
        digest: of the weights.
        version: of the package that wrote the file.
        captured: its graph; None of a backbone alone, and in files of earlier formats.
    """

    path: Path
    weights: dict[str, Tensor]
    config: ModelConfig
    classes: tuple[str, ...] | None = None
    colours: tuple[tuple[int, int, int], ...] | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    origin: Origin = field(default_factory=Origin)
    training: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    version: str = __version__
    captured: Captured | None = None

    def description(self) -> dict[str, Any]:
        """All but path, weights and digest, as JSON has it."""
        return {
            "version": self.version,
            "model": to_dict(self.config),
            "classes": self.classes,
            "colours": self.colours,
            "mean": self.mean,
            "std": self.std,
            "origin": dataclasses.asdict(self.origin),
            "training": self.training,
        } | ({} if self.captured is None else {"graph": self.captured.description()})


def is_state_dict(value: Any) -> TypeGuard[Mapping[str, Tensor]]:
    """Whether a value is tensors by name."""
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def parse(description: Mapping[str, Any], weights: dict[str, Tensor], path: Path, digest: str) -> Checkpoint:
    """A checkpoint from what its file says, which may be anything.

    Raises:
        CheckpointError: an entry that is missing, unknown or impossible.
    """
    found, captured = dict(description), None
    try:
        if "graph" in found:
            captured = Captured.of(found.pop("graph"))
        _check(found, _ENTRIES)
        _check(found["origin"], _ORIGIN, "origin.")
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    try:
        config = model_config(found.pop("model"))
    except ConfigError as error:
        raise CheckpointError(f"{path}: its model settings are damaged: {error}") from None
    found["origin"] = Origin(**found["origin"])
    for name in ("classes", "colours", "mean", "std"):
        if found[name] is not None:
            found[name] = tuple(tuple(one) if isinstance(one, list) else one for one in found[name])
    checkpoint = Checkpoint(path, weights, config, **found, digest=digest, captured=captured)
    _check_sizes(checkpoint)
    return checkpoint


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Settings that go together, before anything is built of them."""
    config, count, captured = checkpoint.config, len(checkpoint.weights), checkpoint.captured
    strange = [name for name in checkpoint.weights if not name.startswith(PARTS + EARLIER_PARTS)]
    classes = config.num_classes
    parts = sum(config.depths or []) + len(config.aspp_rates) + config.decoder_convs
    given = classes if captured is None else captured.graph.node(captured.graph.output).shape[1]
    named, coloured = (one is None or len(one) == classes for one in (checkpoint.classes, checkpoint.colours))
    faults = {
        f"{strange[:1]} is of no part of a network": bool(strange),
        "it has no graph": captured is None and config.module is not None,
        f"its graph gives {given} logits for {classes} classes": given != classes,
        "it has no class count": classes is None and checkpoint.origin.has_head,
        "its class names are not as many as its classes": not named,
        "its colours are not as many as its classes": not coloured,
        # what has no tensors in the file need not be built to see that
        f"its settings ask for {parts} blocks and it holds {count} tensors": parts > count + 4,
    }
    for fault, found in faults.items():
        if found:
            raise CheckpointError(f"{checkpoint.path} is damaged: {fault}")


def _check(tree: Mapping[str, Any], tests: Mapping[str, Test], where: str = "") -> None:
    """Raises a ValueError unless the tree has exactly these keys, with values that pass."""
    for name in sorted(tree.keys() ^ tests.keys(), key=str):
        raise ValueError(f"{where}{name} is missing or unknown in what it says")
    for name, test in tests.items():
        if not test(tree[name]):
            raise ValueError(f"it says {where}{name} is {repr(tree[name])[:60]}")


def _is(kind: type) -> Test:
    return lambda value: isinstance(value, kind)


def _list_of(test: Test, count: int | None = None) -> Test:
    return lambda value: isinstance(value, list) and count in (None, len(value)) and all(map(test, value))


def _optional(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _number_above(lowest: float) -> Test:
    return lambda value: isinstance(value, (int, float)) and lowest < value < MOST_NUMBER


_texts, _colour = _list_of(_is(str)), _list_of(lambda one: isinstance(one, int) and 0 <= one <= 255, 3)
_ENTRIES: dict[str, Test] = {
    "version": _is(str),
    **dict.fromkeys(("model", "origin", "training"), _is(dict)),
    "classes": _optional(_texts),
    "colours": _optional(_list_of(_colour)),
    "mean": _list_of(_number_above(-MOST_NUMBER), 3),
    "std": _list_of(_number_above(0), 3),
}
_ORIGIN: dict[str, Test] = {
    **dict.fromkeys(("source", "arch", "learned_net", "normalisation"), _is(str)),
    "has_head": _is(bool),
    "assumed": _texts,
    "back": _is(dict),
}
