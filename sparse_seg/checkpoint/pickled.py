"""PyTorch's own files, read without running code and with their checksums verified.

`torch.load` ignores the CRC-32 of each record of its zip archive, and with memory mapping also that records
may be compressed.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_seg.data.reading import IMAGE_SUFFIXES
from sparse_seg.errors import CheckpointError, first_line

MOST_NESTED = 20  # containers within containers that are looked into
ZIP = b"PK\x03\x04"


def load_pickled(path: Path, weights_only: bool = True) -> Any:
    """What `torch.save` wrote, on the CPU; tensors may be mapped from the file.

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
        with path.open("rb") as file, warnings.catch_warnings():
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


def _foreign(path: Path) -> str:
    """What a file without a readable pickle is."""
    if path.suffix.lower() == ".onnx":
        return "is an ONNX file, no checkpoint; examples/run_onnx.py runs it"
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return "is a picture, no checkpoint; the checkpoint comes before the pictures"
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
