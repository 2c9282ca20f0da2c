"""Files beside the clone, in `../shared`: no part of the repository, so the tests that read them may skip."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

SHARED = Path(__file__).parents[2] / "shared"
_Test = TypeVar("_Test", bound=Callable[..., object])


def needs_shared(name: str) -> Callable[[_Test], _Test]:
    """Mark a test `shared`, and skip it where `../shared/NAME` is missing."""
    missing = not (SHARED / name).exists()
    skip = pytest.mark.skipif(missing, reason=f"needs ../shared/{name}, which is not in the repository")
    return lambda test: pytest.mark.shared(skip(test))
