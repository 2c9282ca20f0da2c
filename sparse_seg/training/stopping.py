"""How a training ends early without losing its state."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

import torch

from sparse_seg.errors import DataError, SparseSegError, TrainingError, first_line
from sparse_seg.processes import FailedElsewhere, Processes, ProcessLost
from sparse_seg.progress import say

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a batch system's, a lost terminal's
_Result = TypeVar("_Result")


class AlreadyTrained(TrainingError):
    """The run in the folder is finished; there is nothing to resume."""


class Diverged(TrainingError):
    """Loss or gradient is not finite: other settings are needed."""


class DeviceFailed(TrainingError):
    """A GPU gave up, and with it all that this process keeps there."""


class _Interrupted(BaseException):
    """Raised into long work by a request to stop."""


@contextmanager
def signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Give signals that end a process to `handler`; one that is ignored (nohup) stays ignored."""
    taken = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in taken}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


class Stop:
    """Whether and why a training ends early: a request, or the first failure, in any process.

    Args:
        processes: that train together.
        device: of their common flags.
    """

    def __init__(self, processes: Processes, device: torch.device) -> None:
        self.processes, self.device = processes, device
        self.requested = self.interrupts = False
        self.failure: Exception | None = None

    def request(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler: stop after this step, or at once in long work or if asked twice."""
        alone = self.processes.count == 1
        if self.requested:
            if alone:
                raise KeyboardInterrupt
            return  # torchrun passes on what the terminal has sent already
        self.requested = True
        if alone:
            with suppress(OSError):  # the terminal may be gone
                say("stopping after this step (once more to stop at once)")
        if self.interrupts:
            raise _Interrupted

    def interruptible(self, work: Callable[[], _Result]) -> _Result | None:
        """The result of work that may take long; None where a request ends it."""
        self.interrupts = True
        try:
            return work()
        except _Interrupted:
            return None
        finally:
            self.interrupts = False

    def attempt(self, work: Callable[..., _Result], *arguments: Any) -> _Result | None:
        """The work's result; None where it fails, and the first failure is kept."""
        try:
            return work(*arguments)
        except (SparseSegError, OSError) as error:
            self.failure = self.failure or error
        except RuntimeError as error:
            if not device_failed(error):
                raise
            self.failure = self.failure or DeviceFailed(f"the GPU failed: {first_line(error)}")
        return None

    def is_due(self) -> bool:
        """Whether any process has to stop; all ask together."""
        if isinstance(self.failure, ProcessLost):
            return True
        own = self.requested or self.failure is not None
        return self.attempt(self.processes.any, own, self.device) is not False

    def cause(self) -> Exception | None:
        """The first process's failure that is the cause, the same in all; None for a request alone."""
        own = self.failure
        if isinstance(own, ProcessLost):
            return own
        if isinstance(own, FailedElsewhere) or (self.requested and isinstance(own, DataError)):
            own = None  # workers were asked to stop, too
        try:
            return next((one for (one,) in self.processes.gather(lambda: (own,)) if one is not None), None)
        except ProcessLost as lost:
            return own or lost


def device_failed(error: RuntimeError) -> bool:
    """Whether an error is the GPU's, and not of what it was asked for: an index that is too large, say."""
    text = str(error)
    told = any(name in text for name in ("CUDA error", "cudaError", "cuDNN error"))
    return told and not any(fault in text for fault in ("device-side assert", "no kernel image"))


def reason(error: Exception) -> str:
    """An error in one line."""
    if not isinstance(error, OSError):
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    room = "; make room on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{where}{error.strerror or error}{room}"
