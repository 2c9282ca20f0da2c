"""What tests of the spconv engine share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sparse_seg.sites import spconv


@pytest.fixture
def imported() -> None:
    """Its first import warns of what it uses; tests that import it themselves must not be the first."""
    spconv.available("cpu")


@pytest.fixture
def fresh() -> Iterator[None]:
    """What the engine found out about the library is forgotten before and after."""

    def forget() -> None:
        spconv._outcome.cache_clear()
        spconv._layer.cache_clear()

    forget()
    yield
    forget()
