"""How a training ends early without losing its state."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeVar

from sparse_seg.errors import DataError, TrainingError, first_line
from sparse_seg.progress import say

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a batch system's, a lost terminal's
_Result = TypeVar("_Result")


class AlreadyTrained(TrainingError):
    """The run in the folder is finished; there is nothing to resume."""


class Diverged(TrainingError):
    """Loss or gradient is not finite: other settings are needed."""


class Stopped(TrainingError):
    """A signal asked for the end."""


class _Interrupted(BaseException):
    """Raised into long work by a request to stop."""


class Stop:
    """Whether a signal asked a training to end.

    Args:
        alone: whether no other process trains with this one.
    """

    def __init__(self, alone: bool) -> None:
        self.alone, self.requested, self.interrupts = alone, False, False

    @contextmanager
    def signals_heard(self) -> Iterator[None]:
        """Take the signals that end a process; one that is ignored (nohup) stays ignored."""
        taken = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self.request) for number in taken}
        try:
            yield
        finally:
            for number, own in before.items():
                signal.signal(number, own)

    def request(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler: stop after this step, or at once in long work or if asked twice."""
        if self.requested:
            if self.alone:
                raise KeyboardInterrupt
            return  # torchrun passes on what the terminal has sent already
        self.requested = True
        if self.alone:
            with suppress(OSError):  # the terminal may be gone
                say("stopping after this step (once more to stop at once)")
        if self.interrupts:
            raise _Interrupted

    def interruptible(self, work: Callable[[], _Result]) -> _Result:
        """The result of work that reads data and may take long.

        Raises:
            Stopped: a request came before it or ended it.
        """
        self.interrupts = True
        try:
            if self.requested:
                raise _Interrupted
            return work()
        except (_Interrupted, DataError):
            if self.requested:  # workers were asked to stop, too
                raise Stopped from None
            raise
        finally:
            self.interrupts = False


def device_failed(error: BaseException) -> bool:
    """Whether an error is the GPU's, and not of what it was asked for: an index that is too large, say."""
    text = str(error) if isinstance(error, RuntimeError) else ""
    told = any(name in text for name in ("CUDA error", "cudaError", "cuDNN error"))
    return told and not any(fault in text for fault in ("device-side assert", "no kernel image"))


def reason(error: Exception) -> str:
    """An error in one line."""
    if device_failed(error):
        return f"the GPU failed: {first_line(error)}"
    if not isinstance(error, OSError):
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    room = "; make room on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{where}{error.strerror or error}{room}"
