"""Write safetensors tensor by tensor, so that a conversion never holds a second copy of a network.

The library's own writer wants all tensors at once: with those of the source mapped into memory, that was
three times the file's size. The format (https://github.com/huggingface/safetensors#format): 8 bytes of header
length, a JSON header with dtype, shape and place of each tensor, then the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL"},
}
ALIGNMENT = 8  # bytes, of the data


class Pending(NamedTuple):
    """A tensor that is made when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Pending:
        """A tensor that is there already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def write_safetensors(path: Path, tensors: Mapping[str, Pending], metadata: Mapping[str, str]) -> None:
    """Write `tensors` in their order. Raises OSError where the file cannot be written."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (shape, dtype, _) in tensors.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, (shape, dtype, make) in tensors.items():
            tensor = make()
            assert tuple(tensor.shape) == shape, name
            assert tensor.dtype == dtype, name
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
