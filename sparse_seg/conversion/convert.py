"""A dense checkpoint to one of ours: of a known source, or of any module that can be made and captured.

Strict either way: each tensor of the file finds its place in the network, and the other way round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from sparse_seg.checkpoint import Checkpoint, Origin, save
from sparse_seg.checkpoint.captured import checkpoint_of, own_captured
from sparse_seg.config import model_config
from sparse_seg.config.reading import merged_trees
from sparse_seg.conversion.mapping import COUNTER, map_tensors
from sparse_seg.conversion.naming import Named, find_network
from sparse_seg.conversion.plan import Plan, Tensors, as_two_classes
from sparse_seg.conversion.reading import SourceFile, StateDict, read_source
from sparse_seg.conversion.report import report_module, report_source
from sparse_seg.conversion.sources import SOURCES, check_file_name, find_source, is_known, unknown
from sparse_seg.data.class_file import ClassFile
from sparse_seg.errors import CheckpointError, ConfigError, SparseSegError, and_more, shown
from sparse_seg.run.build import capture_module, import_module
from sparse_seg.run.weights import load_weights, shape_faults

BY_DEFAULT = {"mask": {"policy": "confidence"}}  # settings of a model
_T = TypeVar("_T")


@dataclass(frozen=True)
class Conversion:
    """A dense network as a checkpoint of ours, which is not written yet: its path is the source's, and one of
    a known source has no graph.

    Args:
        report: lines for the terminal: every tensor is mapped, set aside for a reason, or a twin.
    """

    checkpoint: Checkpoint
    report: str

    def write(self, path: str | Path) -> None:
        """With the graph, whose capture takes a second. Raises OSError where the folder cannot be written."""
        found = dataclasses.replace(self.checkpoint, path=Path(path))
        if found.captured is None and found.origin.has_head:
            found = dataclasses.replace(found, captured=own_captured(found.config))
        save(found)


def convert(
    path: str | Path,
    source: str = "auto",
    output_stride: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    allow_missing: Sequence[str] = (),
    trust: bool = False,
    prefix: str | None = None,
    drop: Sequence[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: ClassFile | None = None,
    threshold: float | None = None,
) -> Conversion:
    """Read a dense checkpoint of a known source and find each of its tensors a place.

    Where a file holds several state dicts, the preferred one that gives a complete network is taken.

    Args:
        path: `.pth`, `.pt`, `.ckpt` or `.safetensors`.
        source: name in `SOURCES`, or `auto`: by the names of the tensors.
        output_stride: that the network was trained at, where its tensors cannot tell.
        overrides: model settings that cannot be inferred from the tensors, such as `bn_eps`, and how it runs;
            by default the mask's policy is `confidence`.
        allow_missing: `("head",)` converts a backbone that has none.
        trust: see `read_source`.
        prefix, drop: see `find_network`.
        mean, std: of the input, RGB in units of 0..1; None takes those in the file, else ImageNet's.
        classes: what the classes are; None takes what the file or its source tells.
        threshold: of a network of one logit, the probability in (0, 1) above which a pixel is foreground;
            None takes the source's, 0.5 or mmsegmentation's 0.3.

    Raises:
        CheckpointError: the file cannot be read, is of no known source, or a tensor of it has no place, is
            missing, or has another shape. One line that names the file.
        ConfigError: overrides that are impossible.
    """
    file = read_source(path, trust)

    def use(found: Tensors) -> tuple[Named, tuple[Checkpoint, Plan]]:
        named = find_network(found, is_known, prefix, drop)
        name = find_source(named.tensors, source)
        plan = SOURCES[name].plan(named.tensors, output_stride)
        if plan.config.get("num_classes") == 1:
            as_two_classes(plan, threshold)
        elif threshold is not None:
            raise CheckpointError("--threshold is for networks of one logit, which it is not")
        check_file_name(file, plan, output_stride)
        _check_head(plan, named, "head" in allow_missing)
        config = model_config(merged_trees(BY_DEFAULT, {**plan.config, **(overrides or {})}))
        weights, entries = map_tensors(named.tensors, plan, config)
        known, net = f"ImageNet's, the convention of {name}", "cad_mask_net" if plan.fresh else "mask_net"
        back = {"entries": entries, "aliases": plan.aliases}
        origin = Origin(name, plan.arch, plan.has_head, net, known, plan.assumed, back)
        return named, (Checkpoint(file.path, weights, config, origin=origin), plan)

    named, notes, (checkpoint, plan) = _first(file, use)
    for names, colours in ((plan.classes, None), (file.classes, file.colours)):  # the file's count for more
        if names is not None and len(names) == checkpoint.config.num_classes:
            checkpoint = dataclasses.replace(checkpoint, classes=tuple(names), colours=colours)
    checkpoint = _told(checkpoint, named, mean, std, classes)
    return Conversion(checkpoint, report_source(checkpoint, plan, named.tensors, notes))


def convert_module(
    path: str | Path,
    name: str,
    arguments: Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    trust: bool = False,
    prefix: str | None = None,
    drop: Sequence[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: ClassFile | None = None,
) -> Conversion:
    """Make a module, load its weights, and capture it.

    Args:
        path: of a file with the module's state dict, see `convert`; there, too, what is not said here.
        name, arguments: `PACKAGE:CALLABLE` that makes the module, and what it takes.
        overrides: model settings, as `strides` and `mask`; by default the policy is `confidence`.

    Raises:
        CheckpointError: the file cannot be read, or does not fit; names the first tensor.
        ConfigError: the module cannot be made, or impossible settings.
        NotSelective, UnknownOperator, CaptureFailed, GraphDiffers: see `selective`.
    """
    given = dict(overrides or {})
    nested = given.pop("model", {})
    if not isinstance(nested, Mapping):
        raise ConfigError(f"'model' holds keys of its own, not the value {shown(nested)}")
    given = merged_trees(BY_DEFAULT, merged_trees(given, nested))
    settings = model_config({**given, "module": name, "module_args": dict(arguments)})
    module = import_module(name, arguments).eval()
    own = module.state_dict()
    needed = {key for key in own if not key.endswith(COUNTER)}

    def use(found: Tensors) -> tuple[Named, Tensors]:
        named = find_network(found, lambda tensors: needed <= tensors.keys(), prefix, drop, own)
        fresh = {key: torch.zeros_like(one) for key, one in own.items() if key.endswith(COUNTER)}
        weights = fresh | named.tensors  # older files lack the counters
        if faults := shape_faults(own, weights):
            raise CheckpointError(
                f"it does not fit the module: {and_more(faults)}; check --args, --prefix and --drop"
            )
        return named, weights

    file = read_source(path, trust)
    named, notes, weights = _first(file, use)
    load_weights(module, weights, path)
    network = capture_module(module, settings)
    checkpoint = dataclasses.replace(checkpoint_of(network), path=file.path)
    checkpoint = _told(checkpoint, named, mean, std, classes)
    return Conversion(checkpoint, report_module(checkpoint, network, notes))


def _first(file: SourceFile, use: Callable[[Tensors], tuple[Named, _T]]) -> tuple[Named, list[str], _T]:
    """The first network of a file that `use` finds and takes, notes of what was passed over and left out, and
    what `use` makes of it.

    Raises:
        CheckpointError, ConfigError: it takes none; of the fullest state dict, with the file.
    """
    failed: list[tuple[StateDict, SparseSegError]] = []
    for candidate in file.candidates:
        try:
            named, result = use(candidate.tensors)
            if named.outside:
                raise CheckpointError(
                    f"{and_more(named.outside)} has no place in it; leave it out with --drop "
                    f"{named.outside[0].partition('.')[0]}"
                )
        except (CheckpointError, ConfigError) as error:
            failed.append((candidate, error))
            continue
        notes = [f"unwrapped from {candidate.way}"] if candidate.way else []
        notes += [f"passed over {one.way or 'the rest'}: {error}" for one, error in failed]
        notes += [f"passed over {key}: it holds no tensors by name" for key in file.nameless]
        if candidate.others:
            notes.append(f"left out, as no tensors: {', '.join(candidate.others[:5])}")
        return named, [*notes, *named.notes], result
    _, fault = max(failed, key=lambda pair: len(pair[0].tensors))
    raise type(fault)(f"{file.path}: {fault}") from None


def _told(
    checkpoint: Checkpoint,
    named: Named,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    classes: ClassFile | None,
) -> Checkpoint:
    """With what the caller says of input and classes, or the file of its input.

    Raises:
        CheckpointError: more or fewer classes than the network has.
    """
    said = dict[str, Any]()
    known, scaling = "from the file", named.scaling
    if mean is not None and std is not None:
        known, scaling = "as told", (tuple(mean), tuple(std))
    if scaling is not None:
        origin = dataclasses.replace(checkpoint.origin, normalisation=known)
        said = {"mean": scaling[0], "std": scaling[1], "origin": origin}
    if classes is not None:
        count = checkpoint.config.num_classes
        if len(classes.classes) != count:
            raise CheckpointError(
                f"{checkpoint.path} has {count or 'no'} classes, but {len(classes.classes)} are given; name "
                "its own"
            )
        said |= {"classes": classes.classes.names, "colours": classes.classes.palette}
        said["training"] = {"ids": list(classes.ids)}
    return dataclasses.replace(checkpoint, **said)


def _check_head(plan: Plan, named: Named, is_optional: bool) -> None:
    """Raises a CheckpointError for a backbone alone, unless that is asked for and all that the file holds."""
    if not plan.has_head and named.outside:
        raise unknown([*named.outside, *named.tensors])
    if not plan.has_head and not is_optional:
        raise CheckpointError(
            f"it is the classifier {plan.arch} and has no segmentation head; to convert its backbone "
            "alone add --allow-missing head"
        )
