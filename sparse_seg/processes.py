"""Processes that work together, usually with a GPU each, as torchrun starts them.

All take the same steps in the same order. What they have to agree on goes through here, so that an error in
one reaches all of them, and a process that is gone is an error rather than an endless wait.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_seg.errors import SparseSegError, TrainingError, first_line

PATIENCE = 5.0  # seconds in which the first of three processes or more says what happened
TIMEOUT = timedelta(minutes=30)  # of a process that waits for the others
_T = TypeVar("_T")


class ProcessLost(TrainingError):
    """Another process has ended, or this one is told to, as torchrun does then."""

    def __init__(self, how: str = "") -> None:
        super().__init__(f"another process of this job has ended{how}")


class _FailedElsewhere(TrainingError):
    """Another process could not do its part."""


@dataclass(frozen=True)
class Processes:
    """This process's `rank` among `count`; with one process, everything below does nothing."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> range:
        """This process's part of `total` items: contiguous, and as long as any other but for one item."""
        return range(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def seed(self, seed: int, iteration: int) -> None:
        """Seed this process differently from the first, which keeps torch's state."""
        if not self.is_first:
            sequence = np.random.SeedSequence([seed, iteration, self.rank])
            torch.manual_seed(int(sequence.generate_state(1)[0]))

    # -- what all do at the same time ----------------------------------------------------------------------

    @contextmanager
    def together(self, device: torch.device) -> Iterator[None]:
        """Work that succeeds in all processes or fails in all, at the latest where it ends.

        It may ask for a `mean`, but for nothing else that all do at the same time.

        Raises:
            SparseSegError, OSError: as of the work in the first process where it failed.
        """
        zero = torch.zeros((), device=device)
        try:
            yield
            self.mean(zero)
        except ProcessLost:
            raise
        except _FailedElsewhere:
            self._exchange(None)
        except (SparseSegError, OSError) as error:
            self.mean(zero, failed=True)
            self._exchange(error)

    def mean(self, value: Tensor, failed: bool = False) -> Tensor:
        """The mean of a number over all processes, the same in each.

        Args:
            failed: end the work of the others that ask for a mean, see `together`.
        """
        if self.count == 1:
            return value
        total = torch.stack([value.detach().double(), torch.full_like(value, failed, dtype=torch.float64)])
        with _loss_named():
            dist.all_reduce(total)
        if not failed and total[1] > 0:
            raise _FailedElsewhere
        return (total[0] / self.count).to(value.dtype)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their mean over all processes; the same parameters have one in all."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        with _loss_named():
            dist.all_reduce(flat)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            torch.div(mean.view_as(gradient), self.count, out=gradient)

    def share_buffers(self, model: nn.Module) -> None:
        """Give all the first process's batch statistics."""
        if self.count > 1:
            with _loss_named():
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)

    def gather(self, work: Callable[[], _T]) -> list[_T]:
        """What the work gives in each process, by rank.

        Raises:
            SparseSegError, OSError: as of the work in the first process where it failed.
        """
        try:
            own: Any = work()
        except ProcessLost:
            raise
        except (SparseSegError, OSError) as error:
            own = error
        return self._exchange(own)

    def decided(self, decide: Callable[[], _T]) -> _T:
        """What the first process decides."""
        return self.gather(lambda: decide() if self.is_first else None)[0]  # type: ignore[return-value]

    def _exchange(self, own: Any) -> list[Any]:
        """What each process has, by rank. Raises the first of the errors among that."""
        found = [own] * self.count
        if self.count > 1:
            with _loss_named():
                dist.all_gather_object(found, own)
        for one in found:
            if isinstance(one, Exception):
                raise one
        return found


@contextmanager
def _loss_named() -> Iterator[None]:
    """Raises ProcessLost where a connection to another process breaks, with what gloo or NCCL says."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(f" or cannot be reached ({first_line(error)})") from None


@contextmanager
def joined_processes(device: torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """Join the processes that torchrun started, if it did; resolves `cuda` to this process's GPU.

    Of an error, one process raises the one line, and the others exit with code 1.

    Raises:
        TrainingError: a GPU is named, there are fewer of them than processes on this machine, or this process
            cannot join the others.
    """
    if not dist.is_torchelastic_launched():
        yield Processes(), device
        return
    if device.type == "cuda":
        if device.index is not None:
            raise TrainingError(f"torchrun gives each process its GPU: --device cuda, not {device}")
        number, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= found:
            raise TrainingError(f"{found} GPUs are fewer than processes: lower --nproc_per_node")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    # It keeps the group that is there when it is first imported, as optimizers do: the group's threads would
    # then outlive the interpreter, and one that asks for it aborts the process.
    importlib.import_module("torch.distributed.nn")
    signal.signal(signal.SIGTERM, _end)
    store, rank, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    backend = "nccl" if device.type == "cuda" else "gloo"
    ends = backend == "gloo"  # NCCL only where all went well: others may be inside a collective
    try:
        _interruptible(lambda: _join(backend, store, rank, count))
        yield Processes(rank, count), device
        ends = True
    except (SparseSegError, OSError):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it once a process has ended
        gc.freeze()  # the last collection, of all that torch imports, takes a second while torchrun waits
        if not dist.is_initialized():
            atexit.register(_leave)  # a thread may still wait to join, and nothing can end it
        if not _speaks(store, rank > 0 and count > 2):
            raise SystemExit(1) from None
        raise
    finally:
        if ends and dist.is_initialized():
            dist.destroy_process_group()


def _join(backend: str, store: Any, rank: int, count: int) -> None:
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    except RuntimeError as error:
        name = f"{backend.upper()}_SOCKET_IFNAME"
        hint = f"; {name}={os.environ[name]} must be this machine's interface" if name in os.environ else ""
        raise TrainingError(f"cannot join the processes of this job: {first_line(error)}{hint}") from None


def _interruptible(work: Callable[[], object]) -> None:
    """Work that waits in C++, in a thread: Python hears no signal before such a call returns."""
    done: Future[object] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)

    Thread(target=run, daemon=True).start()
    done.result()


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _end(number: int, frame: FrameType | None) -> None:
    if not isinstance(sys.exc_info()[1], SparseSegError):  # an error on its way out says more
        raise ProcessLost("; start it again")


def _speaks(store: Any, waits: bool) -> bool:
    """Whether this process is the one that tells the error: of several that end, whoever comes first.

    Args:
        waits: leave the word to another one for a while: the first knows what was saved.
    """
    said, end = f"sparse_seg/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}/said", time.monotonic() + PATIENCE
    try:  # torchrun's store, anew after each restart
        while waits and time.monotonic() < end and store.add(said, 0) == 0:
            time.sleep(0.1)
        return store.add(said, 1) == 1
    except RuntimeError:  # the store has gone, too
        return True
