"""Map the names in a file to the source's: strip wrappers and what training adds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_seg.errors import CheckpointError
from sparse_seg.run.weights import part_of

# parts of names that wrappers put in: DataParallel and AveragedModel, torch.compile, checkpointing, FSDP
WRAPPING = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
ANCHOR = "layer1.0.conv1.weight"  # every ResNet of every source has it, behind a prefix
_WORDS = (
    "criteri(?:on|a)|loss(?:es)?|metrics?|m?iou|jaccard|dice|accuracy|acc|f1|precision|recall|"
    "conf(?:usion_)?mat(?:rix)?"
)
_BESIDE = re.compile(rf"(?:.*_)?(?:{_WORDS})(?:_.*)?", re.IGNORECASE)
_SCALING = re.compile(r"(?:.*_)?(?<!running_)(mean|std)", re.IGNORECASE)
MOST_EXPANDED = 2**20  # bytes of a tensor that repeats fewer values, as `expand` makes


@dataclass
class Named:
    """The tensors of one network by a source's names.

    Args:
        notes: what was stripped and left out, for the report.
        mean, std: that a training module kept, RGB in 0..1.
        outside: tensors that are of no known use, and not of the network.
    """

    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    outside: list[str] = field(default_factory=list)


def find_network(
    tensors: Mapping[str, Tensor],
    known: Callable[[Mapping[str, Tensor]], bool],
    prefix: str | None = None,
    drop: Sequence[str] = (),
) -> Named:
    """Strip wrapper prefixes and set aside a training module's other tensors.

    Args:
        tensors: by the file's names.
        known: whether names are those of a source.
        prefix: under which the network stands; None looks for it. All else is left out.
        drop: prefixes of further names to leave out.

    Raises:
        CheckpointError: two tensors of one name, two networks, or none under `prefix`.
    """
    unwrapped, notes = _unwrap(tensors)
    found = Named({}, notes)
    left = {name: tensor for name, tensor in unwrapped.items() if not name.startswith(tuple(drop))}
    gone = [*(name for name in unwrapped if name not in left), *_take_scaling(found, left)]
    gone += [name for name in left if any(map(_BESIDE.fullmatch, name.split(".")))]
    left = {name: tensor for name, tensor in left.items() if name not in gone}
    explicit = prefix is not None
    prefix = _find_prefix(left, known) if prefix is None else dotted(prefix)
    found.tensors = part_of(left, prefix)
    if not found.tensors:
        raise CheckpointError(f"it has no tensor under the prefix {prefix!r}")
    outside = [name for name in left if not name.startswith(prefix)]
    gone += outside if explicit else []
    found.outside = [] if explicit else outside
    if prefix:
        notes.append(f"prefix {prefix} stripped")
    if gone:
        more = ", ..." if len(gone) > 3 else ""
        notes.append(f"left out {len(gone)} tensors: {', '.join(gone[:3])}{more}")
    for name, tensor in found.tensors.items():
        _require_plain(name, tensor)
    return found


def _unwrap(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Names without the parts that wrappers put in, wherever they stand."""
    result: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    stripped = set[str]()
    for full, tensor in tensors.items():
        parts = full.split(".")
        name = ".".join(part for part in parts if part not in WRAPPING)
        stripped |= WRAPPING.intersection(parts)
        if name == "n_averaged":  # the counter of torch's AveragedModel
            continue
        if name in result:
            raise CheckpointError(f"it holds {name} twice: as {origin[name]} and as {full}")
        result[name], origin[name] = tensor, full
    return result, [f"wrapper {', '.join(sorted(stripped))} stripped from names"] if stripped else []


def dotted(prefix: str) -> str:
    return f"{prefix}." if prefix and not prefix.endswith(".") else prefix


def _find_prefix(tensors: Mapping[str, Tensor], known: Callable[[Mapping[str, Tensor]], bool]) -> str:
    """The shortest prefix under which the names are those of a source; empty where there is none.

    Raises:
        CheckpointError: networks stand under two, as a student and its teacher.
    """
    found = list[str]()
    for name in tensors:
        if not name.endswith(ANCHOR):
            continue
        parts = name.removesuffix(ANCHOR).split(".")[:-1]
        prefixes = ["".join(f"{part}." for part in parts[:count]) for count in range(len(parts) + 1)]
        shortest = next((prefix for prefix in prefixes if known(part_of(tensors, prefix))), None)
        if shortest is not None and shortest not in found:
            found.append(shortest)
    if len(found) > 1:
        raise CheckpointError(f"it holds networks under {' and '.join(found)}; choose one with --prefix")
    return found[0] if found else ""


def _take_scaling(found: Named, tensors: Mapping[str, Tensor]) -> list[str]:
    """Keep mean and std that a module normalises with; returns their names."""
    taken = []
    for name, tensor in tensors.items():
        kind = _SCALING.fullmatch(name.rpartition(".")[2])
        if kind is None or tensor.numel() not in (1, 3) or not tensor.is_floating_point():
            continue
        taken.append(name)
        values = tuple(tensor.double().flatten().expand(3).tolist())
        if getattr(found, kind[1].lower()) is None:
            setattr(found, kind[1].lower(), values)
    if found.mean is not None and found.std is not None:
        if max(*found.mean, *found.std) > 2:  # in units of 0..255
            found.mean = tuple(value / 255 for value in found.mean)
            found.std = tuple(value / 255 for value in found.std)
    else:
        found.mean = found.std = None
    return taken


def _require_plain(name: str, tensor: Tensor) -> None:
    """Raises CheckpointError for what is no array of numbers on the CPU."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.is_complex() or tensor.is_neg():
        raise CheckpointError(f"{name} is {tensor.layout} {tensor.dtype}; it must be a plain tensor")
    if tensor.nbytes > max(tensor.untyped_storage().nbytes(), MOST_EXPANDED):
        raise CheckpointError(f"{name} is {list(tensor.shape)}, more values than the file holds")
