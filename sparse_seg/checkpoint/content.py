"""What a checkpoint holds beside its weights, and the check that all of it is what it should be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_seg.config import ModelConfig, model_config, to_dict
from sparse_seg.errors import CheckpointError, ConfigError, printable
from sparse_seg.graph.file import from_json, to_json
from sparse_seg.ops import Graph
from sparse_seg.version import __version__

ASIDE = "source."  # our prefix of tensors that the network does not need, kept for the way back
MODULE, CONSTANTS, POLICY = "module.", "constants.", "policy."
AUXILIARY = "auxiliary."  # below MODULE, of ours: a head that only training uses
PARTS = (MODULE, CONSTANTS, POLICY, ASIDE)
EARLIER_PARTS = ("backbone.", "head.", AUXILIARY)  # of a module, up to format 2
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Origin:
    """Where weights come from.

    Args:
        source: `sparse_seg` for those of our training, else a name in `conversion.SOURCES`.
        arch: the source's name for the network, as `deeplabv3_resnet50`.
        has_head: False for a backbone alone.
        learned_net: which net `policy.net.*` is, see `network.NETS`.
        normalisation: how mean and std are known, in words; empty where nobody said, so that a config may
            have others.
        assumed: what the source's tensors could not tell and what was taken for it, one line each.
        back: what the way back to the source's names needs; `conversion/back.py` reads it.
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


def parse(description: Mapping[str, Any], weights: dict[str, Tensor], path: Path, digest: str) -> Checkpoint:
    """A checkpoint from what its file says, which may be anything.

    Raises:
        CheckpointError: an entry that is missing, unknown or impossible.
    """
    captured = None
    if "graph" in description:
        captured = _captured(description["graph"], path)
        description = {name: value for name, value in description.items() if name != "graph"}
    found = _entries(description, _PARTS, path, "")
    origin = Origin(**_entries(found.pop("origin"), _ORIGIN, path, "origin."))
    model = found.pop("model")
    try:
        config = model_config(model)
    except ConfigError as error:
        raise CheckpointError(f"{path}: its model settings are damaged: {error}") from None
    checkpoint = Checkpoint(path, weights, config, origin=origin, digest=digest, captured=captured, **found)
    _check_sizes(checkpoint)
    return checkpoint


def _captured(tree: Any, path: Path) -> Captured:
    try:
        if not isinstance(tree, dict) or not isinstance(tree.get("parameters"), list):
            raise ValueError("it does not say which parameters it has")
        graph = from_json({name: value for name, value in tree.items() if name != "parameters"})
        return Captured(graph, frozenset(map(str, tree["parameters"])))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: its graph cannot be: {printable(str(error))}") from None


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Settings that go together, before anything is built of them."""
    config, count = checkpoint.config, len(checkpoint.weights)
    strange = [name for name in checkpoint.weights if not name.startswith(PARTS + EARLIER_PARTS)]
    classes, captured = config.num_classes, checkpoint.captured
    given = classes if captured is None else captured.graph.node(captured.graph.output).shape[1]
    parts = sum(config.depths or []) + len(config.aspp_rates) + config.decoder_convs
    faults = {
        f"{strange[:1]} is of no part of a network": bool(strange),
        "it has no graph": captured is None and config.module is not None,
        f"its graph gives {given} logits for {classes} classes": given != classes,
        "it has no class count": classes is None and checkpoint.origin.has_head,
        "its class names are not as many as its classes": _differs(checkpoint.classes, classes),
        "its colours are not as many as its classes": _differs(checkpoint.colours, classes),
        # what has no tensors in the file need not be built to see that
        f"its settings ask for {parts} blocks and it holds {count} tensors": parts > count + 4,
    }
    for fault, found in faults.items():
        if found:
            raise CheckpointError(f"{checkpoint.path} is damaged: {fault}")


def _differs(values: tuple[Any, ...] | None, count: int | None) -> bool:
    return values is not None and len(values) != count


def _entries(tree: Any, parts: Mapping[str, Callable[[Any], Any]], path: Path, where: str) -> dict[str, Any]:
    """The values of exactly these keys, each through its check."""
    if not isinstance(tree, Mapping) or set(tree) != set(parts):
        names = sorted(set(tree) ^ set(parts), key=str) if isinstance(tree, Mapping) else [where or "all"]
        raise CheckpointError(f"{path} is damaged: {where}{names[0]} is missing or unknown in what it says")
    result = {}
    for name, check in parts.items():
        try:
            result[name] = check(tree[name])
        except (ValueError, TypeError, OverflowError):
            text = repr(tree[name])[:60]
            raise CheckpointError(f"{path} is damaged: it says {where}{name} is {text}") from None
    return result


def _of(kind: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, kind):
            raise ValueError
        return value

    return check


def _texts(value: Any) -> list[str]:
    return [_of(str)(text) for text in _of(list)(value)]


def _names(value: Any) -> tuple[str, ...] | None:
    return None if value is None else tuple(_texts(value))


def _colours(value: Any) -> tuple[tuple[int, ...], ...] | None:
    if value is None:
        return None
    colours = tuple(tuple(_of(int)(part) for part in _of(list)(colour)) for colour in _of(list)(value))
    if any(len(colour) != 3 or min(colour) < 0 or max(colour) > 255 for colour in colours):
        raise ValueError
    return colours


def _numbers(lowest: float) -> Callable[[Any], tuple[float, ...]]:
    def check(value: Any) -> tuple[float, ...]:
        numbers = tuple(float(_of((int, float))(number)) for number in _of(list)(value))  # type: ignore[arg-type]
        if len(numbers) != 3 or not all(math.isfinite(number) and number > lowest for number in numbers):
            raise ValueError
        return numbers

    return check


_PARTS: dict[str, Callable[[Any], Any]] = {
    "version": _of(str),
    "model": _of(dict),
    "classes": _names,
    "colours": _colours,
    "mean": _numbers(-math.inf),
    "std": _numbers(0),
    "origin": _of(dict),
    "training": _of(dict),
}
_ORIGIN: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("source", "arch", "learned_net", "normalisation"), _of(str)),
    "has_head": _of(bool),
    "assumed": _texts,
    "back": _of(dict),
}
