"""A second CUDA stream for extra sites: lattices never read them (P1), so they need not wait for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

FORK = ""  # what was computed before the lattices


class SideStream:
    """Extra sites on a stream of their own, each behind the lattices that it reads; also in a CUDA graph's
    capture. One run at a time.

    First `computed()`, then all lattices on the current stream, each told by `computed`; then, `beside`, what
    `needs` them. From the first operator beside to the join nothing is computed on the current stream, so no
    memory that the side reads is given away meanwhile; what is made beside is in memory that only the side
    takes anew, behind its next fork. So no tensor needs `record_stream`.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self._events: dict[str, torch.cuda.Event] = {}

    def computed(self, name: str = FORK) -> None:
        """Told behind what computes a value on the current stream."""
        self._events[name] = torch.cuda.current_stream(self.device).record_event()

    def needs(self, name: str) -> None:
        """What follows on the side waits for a value, if it comes behind the fork."""
        if name in self._events:
            self.stream.wait_event(self._events[name])

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Inside operators go to the side, behind the fork; afterwards the current stream waits for them."""
        current = torch.cuda.current_stream(self.device)
        self.needs(FORK)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)
