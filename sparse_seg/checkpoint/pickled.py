"""PyTorch's own files, read without running code and with their checksums verified.

`torch.load` ignores the CRC-32 of each record of its zip archive, and with memory mapping also that records
may be compressed.
"""

from __future__ import annotations

import argparse
import io
import pathlib
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_seg.data.reading import IMAGE_SUFFIXES
from sparse_seg.errors import CheckpointError, first_line
from sparse_seg.files import atomic_write

MOST_NESTED = 20  # containers within containers that are looked into
ZIP = b"PK\x03\x04"


class _Inert:
    """Stands for a class that is not needed, such as mmengine's history of losses: takes any state, does
    nothing."""

    def __setstate__(self, state: Any) -> None:
        pass


def _harmless_types() -> Any:
    """Lets weights-only loading make what training scripts commonly save beside weights: options, paths,
    numpy arrays and numbers, mmengine's history of losses. None of them runs code when unpickled."""
    scalar: Any = np.float64(0).__reduce__()[0]  # numpy's constructors of scalars and of arrays
    array: Any = np.zeros(0).__reduce__()[0]
    kinds = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool", "str")
    allowed = [argparse.Namespace, np.dtype, np.ndarray, scalar, array]
    allowed += [type(np.dtype(name)) for name in kinds]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # of numpy 1 and 2
        allowed += [(scalar, f"{module}.scalar"), (array, f"{module}._reconstruct")]
    for kind, name in ((pathlib.PurePosixPath, "PosixPath"), (pathlib.PureWindowsPath, "WindowsPath")):
        for module in ("pathlib", "pathlib._local"):
            allowed += [(kind, f"{module}.{name}"), (kind, f"{module}.Pure{name}")]
    allowed.append((_Inert, "mmengine.logging.history_buffer.HistoryBuffer"))
    return torch.serialization.safe_globals(allowed)


def load_pickled(path: Path, weights_only: bool = True) -> Any:
    """What `torch.save` wrote, on the CPU; tensors may be mapped from the file.

    Args:
        weights_only: run no code: plain data and the harmless types above load, anything else is refused.

    Files of PyTorch before 1.6 are no zip archives and have no checksums.

    Raises:
        CheckpointError: a damaged or foreign file, or one that wants to run code.
    """
    with path.open("rb") as file:
        is_zip = file.read(len(ZIP)) == ZIP
    records = _checked_records(path) if is_zip else []
    stored = is_zip and all(record.compress_type == zipfile.ZIP_STORED for record in records)
    try:
        # torch.load would go by the name `.safetensors`
        with path.open("rb") as file, warnings.catch_warnings(), _harmless_types():
            warnings.simplefilter("ignore")  # what is wrong, the error says
            by_name = path.suffix != ".safetensors"
            source, mapped = (path, stored) if by_name else (file, False)
            content = torch.load(source, "cpu", weights_only=weights_only, mmap=mapped)
        if is_zip:
            _check_sizes(content, records, path)
        return content
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error)) if weights_only else None
        problem = _foreign(path)
        if wanted is not None:
            problem = (
                f"holds a pickled {wanted[1]}, and loading it can run code; if you trust its author "
                "convert it with --trust, else ask for its state dict alone"
            )
        raise CheckpointError(f"{path} {problem}") from None
    except ImportError as error:
        needed = f"the package {error.name}" if error.name else first_line(error)
        raise CheckpointError(f"{path} needs {needed}; install it, or save the state dict alone") from None
    except MemoryError:
        raise CheckpointError(f"{path} does not fit into memory, or claims to be larger than it is") from None
    except Exception as error:  # a broken pickle fails in many ways
        raise CheckpointError(f"{path} {_foreign(path)} ({first_line(error)})") from None


def save_pickled(path: str | Path, content: Any) -> None:
    """Write what `load_pickled` reads. Raises OSError where it cannot be written: on a full disk torch.save
    itself raises a RuntimeError that tells nothing."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(path, buffer.getvalue())


def _foreign(path: Path) -> str:
    """What a file without a readable pickle is."""
    if path.suffix.lower() == ".onnx":
        return "is an ONNX file, no checkpoint; examples/run_onnx.py runs it"
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return "is a picture, no checkpoint; name one (to predict, before the pictures)"
    return "is truncated or no PyTorch checkpoint"


def _checked_records(path: Path) -> list[zipfile.ZipInfo]:
    """The records of a zip archive, after their checksums are verified.

    Raises:
        CheckpointError: it is damaged, or a program instead of data.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            # PyTorch can be told to write none (`set_crc32_options`): then all are 0
            bad = archive.testzip() if any(record.CRC for record in records) else None
    except Exception as error:  # a broken archive, too
        raise CheckpointError(f"{path} is truncated or no PyTorch checkpoint ({first_line(error)})") from None
    names = {record.filename for record in records}
    if bad is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of its record {bad} is wrong; copy it again")
    if len(names) < len(records) or min((record.header_offset for record in records), default=1) > 0:
        raise CheckpointError(f"{path} is truncated or no PyTorch checkpoint (its records do not fit)")
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            f"{path} is a TorchScript archive, a program rather than weights; save its state dict: "
            f"torch.save(torch.jit.load('{path}').state_dict(), 'weights.pth')"
        )
    return records


def _check_sizes(content: Any, records: list[zipfile.ZipInfo], path: Path) -> None:
    """Every storage has a record of its size: PyTorch would read on behind a shorter one.

    Raises:
        CheckpointError: there is none.
    """
    sizes = Counter(record.file_size for record in records if "/data/" in record.filename)
    storages = {storage._cdata: storage.nbytes() for storage in _storages(content, 0) if storage.nbytes()}
    if Counter(storages.values()) - sizes:
        raise CheckpointError(f"{path} is damaged: its records are shorter than its tensors")


def _storages(content: Any, depth: int) -> Iterator[torch.UntypedStorage]:
    if isinstance(content, Tensor):
        if content.layout == torch.strided and content.device.type == "cpu":
            yield content.untyped_storage()
        return
    values = content.values() if isinstance(content, Mapping) else content
    if depth < MOST_NESTED and isinstance(content, (Mapping, list, tuple)):
        for value in values:
            yield from _storages(value, depth + 1)
