"""How runs are timed and their memory measured; no figure here depends on the machine's speed."""

import os
import signal
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from sparse_seg.errors import MeasurementError
from sparse_seg.lab import latency
from sparse_seg.lab.latency import SPAWN, Latency, interleaved, peak_memory

CPU = torch.device("cpu")


def test_median_and_spread():
    assert Latency((3.0, 1.0, 2.0)).median == 2
    assert Latency((1.0, 2.0, 3.0, 4.0, 100.0)).median == 3
    assert Latency((1.0, 2.0, 3.0, 4.0, 100.0)).quartiles == (2, 4)
    assert Latency((1.0, 2.0, 3.0, 4.0, 100.0)).spread == 1
    assert Latency((7.0,)).median == 7
    assert Latency((7.0,)).spread == 0


def test_runs_take_turns_and_warm_up_is_not_counted(monkeypatch):
    order: list[str] = []
    clock = iter(range(1000))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock) ** 2)
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    result = interleaved(runs, 3, CPU, warmup=2)
    assert order == list("abc") * 5
    # run n starts at (2n)^2 s and ends at (2n+1)^2: 4n + 1 s
    assert result["a"].samples == (25000, 37000, 49000)
    assert result["c"].median == 1000 * (4 * 11 + 1)
    assert list(result) == list("abc")


def allocate(mib: int, times: int = 1):
    """A run that holds `mib` MiB at once, `times` times in a row, beside 100 MiB of standing memory."""
    standing = torch.ones(100 * latency.MIB // 4)

    def run() -> float:
        return sum(torch.ones(mib * latency.MIB // 4).sum().item() for _ in range(times)) + standing[0].item()

    return run


def allocate_first(mib: int):
    """What is allocated and freed before the run, many times larger, does not count."""
    allocate(4 * mib, times=2)()
    return allocate(mib)


def die(mib: int):
    return lambda: os.kill(os.getpid(), signal.SIGKILL)


def fail(mib: int):
    raise ValueError("no such\nnetwork")


@pytest.mark.slow
def test_peak_memory_in_a_child():
    """What fails there, or kills it, is one clear error."""
    with ProcessPoolExecutor(1, SPAWN) as pool:

        def peak(prepare, *arguments):
            return peak_memory(prepare, arguments, CPU, pool)

        # the kernel counts resident pages in batches: it may be off by some 100 KiB
        assert 199.5 <= peak(allocate, 200, 3) < 260
        assert 199.5 <= peak(allocate_first, 200) < 260
        with pytest.raises(MeasurementError, match="ValueError: no such network"):
            peak(fail, 1)
        with pytest.raises(MeasurementError, match="its process died; is there enough memory"):
            peak(die, 1)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    def run():
        torch.ones(200 * latency.MIB // 4, device="cuda").sum()

    assert 200 <= peak_memory(lambda: run, (), torch.device("cuda")) < 260
    assert interleaved({"a": run}, 3, torch.device("cuda"))["a"].median > 0
