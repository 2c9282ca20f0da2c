"""Digests of nested values, tensors included: what tells a damaged file from a whole one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest_of(value: Any) -> str:
    """BLAKE2b of nested mappings, lists, numbers, texts and tensors: names, types, shapes and bytes.

    The order of a mapping's keys does not count, nor the difference of list and tuple, which JSON lacks.
    """
    content = hashlib.blake2b(digest_size=16)
    _feed(content, value)
    return content.hexdigest()


def _feed(content: hashlib.blake2b, value: Any) -> None:
    if isinstance(value, Tensor):
        content.update(f"tensor {value.dtype} {list(value.shape)} ".encode())
        content.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        content.update(f"mapping {len(value)} ".encode())
        for key in sorted(value, key=repr):
            _feed(content, key)
            _feed(content, value[key])
    elif isinstance(value, (list, tuple)):
        content.update(f"list {len(value)} ".encode())
        for item in value:
            _feed(content, item)
    else:
        content.update(f"{type(value).__name__} {value!r} ".encode("utf-8", "surrogatepass"))
