"""A source's checkpoint to one of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_seg.checkpoint import Checkpoint, Origin, save
from sparse_seg.checkpoint.captured import own_captured
from sparse_seg.config import ModelConfig, model_config
from sparse_seg.conversion.mapping import Mapped, map_tensors
from sparse_seg.conversion.naming import Named, find_network
from sparse_seg.conversion.plan import Plan, as_two_classes
from sparse_seg.conversion.reading import SourceFile, StateDict, read_source
from sparse_seg.conversion.sources import (
    SOURCES,
    asked_source,
    check_expected,
    check_file_name,
    check_head,
    find_source,
    is_known,
)
from sparse_seg.conversion.told import Scaling, check_classes, scaling_of
from sparse_seg.data.class_file import ClassFile
from sparse_seg.errors import CheckpointError, ConfigError, SparseSegError

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class Conversion:
    """A dense network and how it becomes ours; nothing is written yet.

    Args:
        source: name in `SOURCES`.
        file: what was read.
        named: the tensors of the network, and notes of what was stripped and left out.
        plan: what the source tells about it.
        config: model settings with all values.
        scaling: of the input.
        mapped: which tensor is which, and their values.
        told: the classes, by the caller.
    """

    source: str
    file: SourceFile
    named: Named
    plan: Plan
    config: ModelConfig
    scaling: Scaling
    mapped: Mapped
    told: ClassFile | None = None

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, where the caller, the file or the source tells as many as there are."""
        told = self.told.classes.names if self.told is not None else None
        for names in (told, self.file.classes, self.plan.classes):
            if names is not None and len(names) == self.config.num_classes:
                return list(names)
        return None

    def write(self, path: str | Path) -> None:
        """Write the checkpoint: the network with its graph, and what it does not need as the source has it.

        Raises OSError where the folder cannot be written.
        """
        aside = [entry for part in self.mapped.aside.values() for entry in part]
        order = {theirs: place for place, theirs in enumerate(self.named.tensors)}
        entries = sorted([*self.mapped.network, *aside], key=lambda entry: order[entry.theirs])
        classes = self.classes
        colours: Sequence[Sequence[int]] | None = self.file.colours if classes == self.file.classes else None
        if self.told is not None:
            colours = self.told.classes.palette
        origin = Origin(
            self.source,
            self.plan.arch,
            self.plan.has_head,
            self.plan.learned_net,
            self.scaling.known,
            self.plan.assumed,
            {"entries": entries, "aliases": self.plan.aliases},
        )
        save(
            Checkpoint(
                Path(path),
                self.mapped.weights,
                self.config,
                None if classes is None else tuple(classes),
                None if colours is None else tuple((red, green, blue) for red, green, blue in colours),
                self.scaling.mean,
                self.scaling.std,
                origin,
                {} if self.told is None else {"ids": list(self.told.ids)},
                captured=own_captured(self.config) if self.plan.has_head else None,
            )
        )


def convert(
    path: str | Path,
    source: str = "auto",
    arch: str | None = None,
    num_classes: int | None = None,
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
    """Read a dense checkpoint and find each of its tensors a place.

    Where a file holds several state dicts, the preferred one that gives a complete network is taken.

    Args:
        path: `.pth`, `.pt`, `.ckpt` or `.safetensors`.
        source: name in `SOURCES`, or `auto`: by the names of the tensors.
        arch, num_classes: what the file must hold, as `deeplabv3_resnet50` and 19; None takes what it does.
        output_stride: that the network was trained at, where its tensors cannot tell.
        overrides: model settings that cannot be inferred from the tensors, such as `bn_eps`.
        allow_missing: `("head",)` converts a backbone that has none.
        trust: see `read_source`.
        prefix, drop: see `find_network`.
        mean, std: of the network's input, RGB in units of 0..1; None takes those in the file, else the
            source's convention.
        classes: what the classes are, as `read_classes` reads them; None takes what the file or its source
            tells.
        threshold: of a network of one logit, the probability in (0, 1) above which a pixel is foreground;
            None takes the source's, 0.5 or mmsegmentation's 0.3.

    Raises:
        CheckpointError: the file cannot be read, is of no known source, or a tensor of it has no place, is
            missing, or has another shape. One line that names the file.
        ConfigError: overrides that are impossible.
    """
    file = read_source(path, trust)
    failed: list[tuple[StateDict, SparseSegError]] = []
    for candidate in _with_buffers(file.candidates):
        try:
            named = find_network(candidate.tensors, is_known, prefix, drop)
            name, plan = _plan(named, source, output_stride, threshold)
            check_expected(plan, arch, num_classes)
            check_file_name(file, plan, output_stride)
            check_head(plan, named, "head" in allow_missing)
            conversion = _convert(file, named, name, plan, overrides or {})
        except (CheckpointError, ConfigError) as error:
            failed.append((candidate, error))
            continue
        conversion.named.notes[:0] = _notes(file, candidate, failed)
        check_classes(classes, conversion.config.num_classes, path)
        conversion.told, conversion.scaling = classes, scaling_of(mean, std, conversion.scaling)
        return conversion
    _, fault = max(failed, key=lambda pair: len(pair[0].tensors))
    raise type(fault)(f"{path}: {fault}") from None


def _plan(named: Named, source: str, output_stride: int | None, threshold: float | None) -> tuple[str, Plan]:
    """The source, and what it tells."""
    name = find_source(named.tensors) if source == "auto" else asked_source(named.tensors, source)
    plan: Plan = SOURCES[name].plan(named.tensors, output_stride)
    if plan.config.get("num_classes") == 1:
        as_two_classes(plan, threshold)
    elif threshold is not None:
        raise CheckpointError("--threshold is for networks of one logit, which it is not")
    return name, plan


def _convert(
    file: SourceFile, named: Named, source: str, plan: Plan, overrides: Mapping[str, Any]
) -> Conversion:
    config = model_config({**plan.config, **overrides})
    mapped = map_tensors(named.tensors, plan, config)
    if named.outside:
        more = f" (and {len(named.outside) - 1} more)" if len(named.outside) > 1 else ""
        raise CheckpointError(
            f"{named.outside[0]}{more} has no place in it; leave it out with --drop "
            f"{named.outside[0].partition('.')[0]}"
        )
    scaling = Scaling(known=f"ImageNet's, the convention of {source}")
    if named.mean is not None and named.std is not None:
        scaling = Scaling(named.mean, named.std, "from the file")
    return Conversion(source, file, named, plan, config, scaling, mapped)


def _with_buffers(candidates: Sequence[StateDict]) -> list[StateDict]:
    """Averaged parameters without buffers take those of another state dict in the file."""
    result = []
    for candidate in candidates:
        own = candidate.tensors
        donors = [other for other in candidates if own.keys() < other.tensors.keys()]
        missing = [(donor, donor.tensors.keys() - own.keys()) for donor in donors]
        donor = next((d for d, names in missing if all(name.endswith(BUFFERS) for name in names)), None)
        if donor is not None:
            way = f"{candidate.way}, with the buffers of {donor.way}"
            candidate = StateDict(way, donor.tensors | own, candidate.others)
        result.append(candidate)
    return result


def _notes(
    file: SourceFile, taken: StateDict, failed: Sequence[tuple[StateDict, SparseSegError]]
) -> list[str]:
    notes = [f"unwrapped from {taken.way}"] if taken.way else []
    notes += [f"passed over {candidate.way or 'the rest'}: {error}" for candidate, error in failed]
    notes += [f"passed over {key}: it holds no tensors by name" for key in file.nameless]
    if taken.others:
        notes.append(f"left out, as no tensors: {', '.join(taken.others[:5])}")
    return notes
