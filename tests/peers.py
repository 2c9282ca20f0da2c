"""Import other libraries beside a CPU build of PyTorch.

`requirements-peers.txt` installs them without their dependencies. Their compiled operators do not fit a CPU
build and no test needs them, so their registration is skipped.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from functools import cache
from typing import Any

import pytest
import torch


def package(name: str) -> Any:
    """The module, or skip the test: it is missing or does not fit this PyTorch."""
    outcome = _imported(name)
    if isinstance(outcome, str):
        pytest.skip(outcome)
    return outcome


_REGISTER = torch.library.register_fake


@cache
def _imported(name: str) -> types.ModuleType | str:
    register = _REGISTER

    def register_own(op: Any, *args: Any, **options: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register(op, *args, **options)

    torch.library.register_fake = register_own  # and stays: transformers imports torchvision when it needs it
    if name.startswith("mmseg"):
        sys.modules.setdefault("mmcv.ops", _Anything("mmcv.ops"))  # mmcv-lite comes without them
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception as error:  # a mismatched build fails in many ways
        return f"{name} cannot be imported: {error}"


class _Anything(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
