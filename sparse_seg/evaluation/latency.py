"""Time and memory of a run, measured so that a noisy machine misleads least."""

from __future__ import annotations

import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]
MIB = 2**20


@dataclass(frozen=True)
class Latency:
    """Milliseconds of repeated runs."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles (0 for fewer than 2 runs)."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2


def interleaved(
    runs: Mapping[str, Run], repeats: int, device: torch.device, warmup: int = 1
) -> dict[str, Latency]:
    """Time each run `repeats` times, in turns (A B C A B C), so that drift of the machine falls on all alike.

    On CUDA the time is that between two events on the stream; the host's share counts if it is the longer.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
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


def peak_memory(prepare: Callable[..., Run], arguments: tuple[Any, ...], device: torch.device) -> float:
    """MiB that the run `prepare(*arguments)` returns needs at its peak, beyond what stood before it.

    On CUDA by the allocator. On the CPU in a child process, by the kernel's high-water mark of resident memory:
    `prepare` and its arguments must be picklable, and one run warms up before the measured one.
    """
    if device.type == "cuda":
        run = prepare(*arguments)
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(
        target=_measure_in_child, args=(sender, torch.get_num_threads(), prepare, arguments)
    )
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("the memory measurement's process died; is there enough memory?") from None
    finally:
        child.join()


def _measure_in_child(
    sender: Any, threads: int, prepare: Callable[..., Run], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(threads)
    run = prepare(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status_kib("VmRSS")
    run()
    sender.send((_status_kib("VmHWM") - before) / 1024)


def _status_kib(key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert match is not None
    return int(match[1])
