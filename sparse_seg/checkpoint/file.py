"""The file: safetensors whose metadata hold one JSON text; earlier forms are read, too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_seg.checkpoint import earlier
from sparse_seg.checkpoint.content import Checkpoint, parse
from sparse_seg.checkpoint.digest import digest_of
from sparse_seg.checkpoint.pickled import ZIP, load_pickled
from sparse_seg.errors import CheckpointError, did_you_mean, first_line, shown
from sparse_seg.files import atomic_write

FORMAT, FORMAT_VERSION = "sparse_seg.checkpoint", 4
KEY = "sparse_seg"  # of the JSON text among the metadata
_ABOUT_FILE = ("format", "format_version", "weights", "digest")  # in that text; else of the checkpoint
SUFFIX = ".safetensors"
SHIPPED = Path(__file__).parents[1] / "weights"  # by name; a card beside each says what it is
MOST_HEADER = 10**8  # bytes, by the format


class ForeignCheckpoint(CheckpointError):
    """A file of another package's, which has to be converted first."""


def save(checkpoint: Checkpoint) -> None:
    """Write a checkpoint to its `path`. Raises OSError where the folder cannot be written."""
    content = {"format": FORMAT, "format_version": FORMAT_VERSION} | checkpoint.description()
    content["weights"] = digest_of(checkpoint.weights)
    content["digest"] = digest_of(content)
    write_safetensors(checkpoint.path, checkpoint.weights, {KEY: json.dumps(content)})


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint of ours onto the CPU, whatever version of the package wrote it.

    Nothing that the file holds is run, and its digest or checksums are verified. `best.pt` stands for
    `best.safetensors` where only that is there, and the other way round.

    Raises:
        CheckpointError: missing, damaged or foreign file (a `ForeignCheckpoint`).
    """
    return earlier.as_today(_load(find(path)))


def _load(path: Path) -> Checkpoint:
    if not is_safetensors(path):
        return earlier.from_training(load_pt(path), path)
    weights, metadata = read_safetensors(path)
    if not is_ours(metadata):
        raise _foreign(path)
    if KEY not in metadata:
        return earlier.from_conversion(metadata, weights, path)
    content: Any = None
    with suppress(ValueError, RecursionError):
        content = json.loads(metadata[KEY])
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: what it says of itself cannot be read")
    version = content.get("format_version")
    if content.get("format") == FORMAT and isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(f"{path} is of a later sparse_seg (format {version}); update the package")
    found = digest_of(weights)
    _check_digest(content | {"weights": found}, path)
    said = {name: value for name, value in content.items() if name not in _ABOUT_FILE}
    return parse(said, weights, path, found)


def load_pt(path: Path) -> dict[str, Any]:
    """The content of a `.pt` file of our training; its digest, if it has one, is verified.

    Raises:
        CheckpointError: damaged or foreign file.
    """
    content = load_pickled(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _foreign(path)
    if content.get("digest") is not None:
        _check_digest(content, path)
    return content


def _check_digest(content: Mapping[str, Any], path: Path) -> None:
    """Raises a CheckpointError unless a content's `digest` is that of the rest."""
    fits = False
    with suppress(RecursionError, RuntimeError, TypeError):  # nested without end, tensors of other devices
        rest = {name: value for name, value in content.items() if name != "digest"}
        fits = digest_of(rest) == content.get("digest")
    if not fits:
        raise CheckpointError(f"{path} is damaged: its digest is wrong; copy it again")


def find(path: str | Path) -> Path:
    """The file itself, or where there is none the one of the other suffix, `.pt` or `.safetensors`, or the
    weights of that name that come with the package.

    Raises:
        CheckpointError: there is none, or a folder, or one that may not be read.
    """
    names = sorted(file.stem for file in SHIPPED.glob(f"*{SUFFIX}"))
    if not str(path):
        raise CheckpointError(f"the checkpoint's name is empty; name a file, or one of {', '.join(names)}")
    try:
        path = found = _shipped(path) or Path(path)
        other = {SUFFIX: ".pt", ".pt": SUFFIX}.get(path.suffix)
        if other and not path.exists() and path.with_suffix(other).is_file():
            found = path.with_suffix(other)
        if found.is_dir():
            raise CheckpointError(
                f"{path} is a folder; name the checkpoint in it, such as {path / 'best.pt'}"
            )
        if not found.exists():
            known = f"{', '.join(names)}{did_you_mean(str(path), names)}"
            raise CheckpointError(f"checkpoint {path} does not exist; name a file, or one of {known}")
        if not found.is_file():
            raise CheckpointError(f"{path} is no regular file")
        found.open("rb").close()
    except PermissionError as error:
        raise CheckpointError(f"{path} may not be read ({error.strerror}); check its permissions") from None
    except (OSError, ValueError) as error:  # too long, or with a null character
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"checkpoint {shown(str(path))} cannot be read: {reason}") from None
    return found


def _shipped(name: str | Path) -> Path | None:
    """The file of weights that come with the package; None where a file has the name, or none of them."""
    file = SHIPPED / f"{name}{SUFFIX}"
    is_one = file.parent == SHIPPED and file.is_file()
    return file if is_one and not Path(name).exists() else None


def is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors, by its first bytes: a header's length, then the header's JSON."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < MOST_HEADER


def is_checkpoint(path: str | Path) -> bool:
    """Whether a file looks like a checkpoint of any kind, by its first bytes."""
    path = _shipped(path) or Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(4)
    return start == ZIP or start.startswith(b"\x80") or is_safetensors(path)


def is_ours(metadata: Mapping[str, str]) -> bool:
    """Whether a safetensors file was written by this package, by its metadata."""
    return KEY in metadata or metadata.get("format") == earlier.CONVERTED


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Raises OSError where it cannot be written, as on a full disk."""
    # with memory of their own, on which the safetensors library insists: a module has parameters by two names
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    atomic_write(path, safetensors.torch.save(own, metadata))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Tensors and metadata of any safetensors file.

    Raises:
        CheckpointError: a damaged file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({first_line(error)})") from None


def _foreign(path: Path) -> CheckpointError:
    return ForeignCheckpoint(
        f"{path} was not written by sparse_seg; convert it first: sparse-seg convert {path} DST.safetensors"
    )
