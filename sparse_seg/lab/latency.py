"""Time and memory of a run, measured so that a noisy machine misleads least."""

import ctypes
import gc
import itertools
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from sparse_seg.errors import MeasurementError

Run = Callable[[], Any]
K = TypeVar("K")
T = TypeVar("T")
SPAWN = multiprocessing.get_context("spawn")
MIB = 2**20
_M_MMAP_THRESHOLD, _MMAP_THRESHOLD = -3, 2**16  # mallopt(3); bytes
_run: Run  # of a process that times one


@dataclass(frozen=True)
class Latency:
    """Milliseconds of repeated runs."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles."""
        low, high = self.quartiles
        return (high - low) / 2

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the runs took less than the first, a quarter more than the second."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


def interleaved(
    runs: Mapping[K, Run], repeats: int, device: torch.device, warmup: int = 1
) -> dict[K, Latency]:
    """Time each run `repeats` times, in turns (A B C A B C), so that drift of the machine falls on all alike.

    Warm-up rounds come before and are not timed. On CUDA the time is that between two events on the stream;
    the host's share counts if it is the longer. Uses `torch.get_num_threads()` threads.
    """
    samples: dict[K, list[float]] = {name: [] for name in runs}
    for repeat in range(warmup + repeats):
        for name, run in runs.items():
            milliseconds = _cuda_time(run) if device.type == "cuda" else _cpu_time(run)
            if repeat >= warmup:
                samples[name].append(milliseconds)
    return {name: Latency(tuple(values)) for name, values in samples.items()}


def _cpu_time(run: Run) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def _cuda_time(run: Run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def timed_apart(
    prepares: Mapping[str, Callable[[], Run]], threads: int, turns: int, repeats: int
) -> dict[str, Latency]:
    """Time runs, each in a process of its own: in one, their threads disturb each other. The processes take
    turns, so that drift of the machine falls on all alike.

    Args:
        prepares: what makes the runs there; picklable.
        repeats: of a turn, after a run that does not count.

    Raises:
        MeasurementError: a run failed.
    """
    pools = {name: ProcessPoolExecutor(1, SPAWN) for name in prepares}
    samples: dict[str, list[float]] = {name: [] for name in prepares}
    try:
        for name, pool in pools.items():
            in_child(pool, f"{name} cannot be timed", _prepare, prepares[name], threads)
        for _, (name, pool) in itertools.product(range(turns), pools.items()):
            samples[name] += in_child(pool, f"{name} cannot be timed", _time, repeats)
    finally:
        for pool in pools.values():
            pool.shutdown()
    return {name: Latency(tuple(values)) for name, values in samples.items()}


def _prepare(prepare: Callable[[], Run], threads: int) -> None:
    """In a process of its own: make ready what `_time` runs."""
    global _run
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    _run = prepare()
    _run()


def _time(repeats: int) -> tuple[float, ...]:
    return interleaved({"": _run}, repeats, torch.device("cpu"))[""].samples


def peak_memory(
    prepare: Callable[..., Run],
    arguments: tuple[Any, ...],
    device: torch.device,
    pool: ProcessPoolExecutor | None = None,
) -> float:
    """MiB that the run `prepare(*arguments)` returns needs at its peak, beyond what `prepare` left (weights).

    On CUDA by the allocator. On the CPU in a child process of its own, by the kernel's high-water mark of
    resident memory; `prepare` and its arguments must be picklable. What the run keeps for later runs counts.

    Args:
        pool: of one spawned process, which measures one run after the other; then `prepare` must call its run
            once, lest only the first one counts what libraries keep.

    Raises:
        MeasurementError: the run failed or was killed (too little memory), or there is no Linux /proc.
    """
    if device.type == "cuda":
        return _cuda_peak(prepare(*arguments))
    with nullcontext(pool) if pool else ProcessPoolExecutor(1, SPAWN) as child:
        failure = "memory cannot be measured"
        return in_child(child, failure, _cpu_peak, torch.get_num_threads(), prepare, arguments)


def in_child(pool: ProcessPoolExecutor, failure: str, work: Callable[..., T], *arguments: Any) -> T:
    """What `work(*arguments)` gives in a process of the pool; all must be picklable.

    Raises:
        MeasurementError: `failure`, and why: the work failed, or its process was killed.
    """
    try:
        return pool.submit(work, *arguments).result()
    except BrokenProcessPool:
        reason = "its process died; is there enough memory?"
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise MeasurementError(f"{failure}: {reason}")


def _cuda_peak(run: Run) -> float:
    before = torch.cuda.memory_allocated()
    run()  # the first run may try convolution algorithms, which takes memory of its own
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def _cpu_peak(threads: int, prepare: Callable[..., Run], arguments: tuple[Any, ...]) -> float:
    torch.set_num_threads(threads)
    # freed tensors go back to the kernel at once, so that what is resident is what is in use
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
    run = prepare(*arguments)
    _load_libraries()
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before) / 1024


def _load_libraries() -> None:
    """A small convolution and product: code and threads that every run needs are in memory afterwards."""
    grid = torch.randn(1, 8, 16, 16).contiguous(memory_format=torch.channels_last)
    torch.nn.functional.conv2d(grid, torch.randn(8, 8, 3, 3))
    torch.randn(64, 64) @ torch.randn(64, 64)


def _status_kib(key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert match is not None
    return int(match[1])
