"""Parameters that `make test-fast` leaves out."""

from __future__ import annotations

from typing import Any

import pytest


def one_fast(fast: Any, *slow: Any) -> list[Any]:
    """All of them; the first alone is not marked slow."""
    return [fast, *(pytest.param(one, marks=pytest.mark.slow) for one in slow)]
