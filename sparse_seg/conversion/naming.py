"""Map the names in a file to the network's own: strip wrappers and what training adds."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_seg.errors import CheckpointError
from sparse_seg.run.weights import part_of

# parts of names that wrappers put in: DataParallel and AveragedModel, torch.compile, checkpointing, FSDP
WRAPPING = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_WORDS = (
    "criteri(?:on|a)|loss(?:es)?|metrics?|m?iou|jaccard|dice|accuracy|acc|f1|precision|recall|"
    "conf(?:usion_)?mat(?:rix)?"
)
_BESIDE = re.compile(rf"(?:.*_)?(?:{_WORDS})(?:_.*)?", re.IGNORECASE)
_SCALING = re.compile(r"(?:.*_)?(?<!running_)(mean|std)", re.IGNORECASE)
MOST_EXPANDED = 2**20  # bytes of a tensor that repeats fewer values, as `expand` makes
Known = Callable[[Mapping[str, Tensor]], bool]


@dataclass(frozen=True)
class Named:
    """The tensors of one network by its own names.

    Args:
        notes: what was stripped and left out, for the report.
        scaling: mean and std that a training module kept, RGB in 0..1.
        outside: tensors that are of no known use, and not of the network.
    """

    tensors: dict[str, Tensor]
    notes: list[str]
    scaling: tuple[tuple[float, ...], tuple[float, ...]] | None
    outside: list[str]


def find_network(
    tensors: Mapping[str, Tensor],
    known: Known,
    prefix: str | None = None,
    drop: Sequence[str] = (),
    own: Collection[str] = (),
) -> Named:
    """Strip wrapper prefixes and set aside a training module's other tensors.

    Args:
        tensors: by the file's names.
        known: whether names are those of a network.
        prefix: under which the network stands; None looks for it. All else is left out.
        drop: prefixes of further names to leave out.
        own: names that are the network's, whatever words or wrappers they seem to name.

    Raises:
        CheckpointError: two tensors of one name, two networks, or none under `prefix`.
    """
    unwrapped, notes = _unwrap(tensors, own)
    gone = [name for name in unwrapped if name.startswith(tuple(drop))]
    foreign = [name for name in unwrapped if name not in gone and not name.endswith(tuple(own))]
    scaling = [name for name in foreign if _is_scaling(name, unwrapped[name])]
    gone += dict.fromkeys([*scaling, *(n for n in foreign if any(map(_BESIDE.fullmatch, n.split("."))))])
    left = {name: tensor for name, tensor in unwrapped.items() if name not in gone}
    found = _find_prefix(left, known) if prefix is None else prefix and f"{prefix.removesuffix('.')}."
    network = part_of(left, found)
    if not network:
        raise CheckpointError(f"it has no tensor under the prefix {found!r}")
    outside = [name for name in left if not name.startswith(found)]
    gone += [] if prefix is None else outside
    if found:
        notes.append(f"prefix {found} stripped")
    if gone:
        more = ", ..." if len(gone) > 3 else ""
        notes.append(f"left out {len(gone)} tensors: {', '.join(gone[:3])}{more}")
    for name, tensor in network.items():
        _require_plain(name, tensor)
    means = _scaling_of({name: unwrapped[name] for name in scaling})
    return Named(network, notes, means, outside if prefix is None else [])


def _unwrap(tensors: Mapping[str, Tensor], own: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Names without the parts that wrappers put in, wherever they stand."""
    result: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    wrapping = WRAPPING - {part for name in own for part in name.split(".")}
    stripped = set[str]()
    for full, tensor in tensors.items():
        parts = full.split(".")
        name = ".".join(part for part in parts if part not in wrapping)
        stripped |= wrapping.intersection(parts)
        if name == "n_averaged":  # the counter of torch's AveragedModel
            continue
        if name in result:
            raise CheckpointError(f"it holds {name} twice: as {origin[name]} and as {full}")
        result[name], origin[name] = tensor, full
    return result, [f"wrapper {', '.join(sorted(stripped))} stripped from names"] if stripped else []


def _find_prefix(tensors: Mapping[str, Tensor], known: Known) -> str:
    """The shortest prefix under which the names are those of a network; empty where there is none.

    Raises:
        CheckpointError: networks stand under two, as a student and its teacher.
    """
    parts: dict[str, dict[str, Tensor]] = {"": dict(tensors)}
    for name, tensor in tensors.items():
        for dot in re.finditer(r"\.", name):
            parts.setdefault(name[: dot.end()], {})[name[dot.end() :]] = tensor
    found = list[str]()
    for prefix in sorted(parts, key=lambda one: (len(one), one)):
        if not prefix.startswith(tuple(found)) and known(parts[prefix]):
            found.append(prefix)
    if len(found) > 1:
        raise CheckpointError(f"it holds networks under {' and '.join(found)}; choose one with --prefix")
    return found[0] if found else ""


def _is_scaling(name: str, tensor: Tensor) -> bool:
    """Whether a module normalises with it."""
    is_one = tensor.numel() in (1, 3) and tensor.is_floating_point()
    return is_one and _SCALING.fullmatch(name.rpartition(".")[2]) is not None


def _scaling_of(tensors: Mapping[str, Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The first mean and std, in units of 0..1."""
    found = dict[str, Tensor]()
    for name, tensor in tensors.items():
        kind = "mean" if name.lower().endswith("mean") else "std"
        found.setdefault(kind, tensor.double().flatten().expand(3))
    if len(found) < 2:
        return None
    unit = 255 if max(one.max() for one in found.values()) > 2 else 1
    mean, std = (tuple((found[name] / unit).tolist()) for name in ("mean", "std"))
    return mean, std


def _require_plain(name: str, tensor: Tensor) -> None:
    """Raises CheckpointError for what is no array of numbers on the CPU."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.is_complex() or tensor.is_neg():
        raise CheckpointError(f"{name} is {tensor.layout} {tensor.dtype}; it must be a plain tensor")
    if tensor.nbytes > max(tensor.untyped_storage().nbytes(), MOST_EXPANDED):
        raise CheckpointError(f"{name} is {list(tensor.shape)}, more values than the file holds")
