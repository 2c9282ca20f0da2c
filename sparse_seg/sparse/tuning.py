"""The fastest of several forms of one computation, found by timing them once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sparse_seg.sparse.winograd import Workspace

_RUNS = 3
_MAX_SHAPES = 16  # tried per layer; with ever new numbers of rows (a threshold's masks) trials must end


class Tuner:
    """What a network's layers share: which form was fastest for a shape on this machine, and work buffers.

    The forms compute the same to rounding (1e-6), so the choice may show in the last digits of a result.
    """

    def __init__(self) -> None:
        self.fastest: dict[Hashable, dict[Hashable, str]] = {}  # by kind of layer, by shape of its input
        self.workspace = Workspace()
        self._thread = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"fastest": self.fastest}  # buffers stay with their threads

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.fastest, self.workspace = state["fastest"], Workspace()
        self._thread = threading.local()

    @property
    def shows_nan(self) -> bool:
        """Whether this thread's layers must hand NaN on, which oneDNN's fused ReLU makes 0."""
        return getattr(self._thread, "shows_nan", False)

    @contextmanager
    def showing_nan(self) -> Iterator[None]:
        """Run by steps that hand NaN on: slower."""
        self._thread.shows_nan = True
        try:
            yield
        finally:
            self._thread.shows_nan = False

    def wants_trial(self, layer: Hashable, shape: Hashable) -> bool:
        known = self.fastest.setdefault(layer, {})
        return shape not in known and len(known) < _MAX_SHAPES

    def try_forms(self, layer: Hashable, shape: Hashable, forms: Mapping[str, Callable[[], Any]]) -> None:
        """Time each form, the first run of each apart, and remember the one with the shortest run."""
        self.fastest[layer][shape] = min(forms, key=lambda name: _shortest_run(forms[name]))

    def choice(self, layer: Hashable, shape: Hashable, default: str) -> str:
        return self.fastest[layer].get(shape, default)


def _shortest_run(form: Callable[[], Any]) -> float:
    form()  # packs weights
    seconds = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        form()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
