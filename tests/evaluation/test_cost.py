"""Multiply-adds, parameters, a file's bytes, time and memory; no figure depends on the machine's speed.

Exact counts: `tests/graph/test_random_networks.py`, and against PyTorch's own counter `tests/test_parts.py`.
"""

import copy
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparse_seg import build_model, selective
from sparse_seg.errors import MeasurementError
from sparse_seg.evaluation.cost import checkpoint_bytes, count_macs, count_parameters
from sparse_seg.lab import latency
from sparse_seg.lab.latency import SPAWN, Latency, interleaved, peak_memory
from sparse_seg.networks.encoder_decoder import build_module
from sparse_seg.run.way import Way
from tests import captured
from tests.reference import random_model

PARTS = ["early", "rows", "late"]


@pytest.mark.slow
@torch.no_grad()
def test_published_figures_of_deeplabv3_resnet101(monkeypatch):
    """1024x2048, 19 classes: convolutions alone, padding counted. On meta tensors: only shapes."""
    settings = {"backbone": "resnet101", "head": "deeplabv3", "num_classes": 19}
    model = build_model(settings).eval().to("meta")
    images = torch.empty(1, 3, 1024, 2048, device="meta")
    with torch.device("meta"):
        module = build_module(model.settings, 8).eval()
    with FlopCounterMode(display=False) as counter:
        module(images)
    flops = counter.get_flop_counts()
    parts = "EncoderDecoder", "EncoderDecoder.backbone"
    counts = {part: flops[part][torch.ops.aten.convolution] // 2 for part in parts}
    assert [round(count / 1e9, 2) for count in counts.values()] == [1929.24, 1417.98]
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta tensors
    assert sum(count_macs(model, images, Way.dense(8)).values()) == counts["EncoderDecoder"]


def test_a_policy_counts_with_the_passes_it_asks_for():
    model, images = copy.deepcopy(random_model()).train(), torch.randn(1, 3, 64, 64)
    given = count_macs(model, images)
    assert model.training, "its mode is kept"
    assert sorted(given) == sorted(["mask", *PARTS])
    assert given["mask"] == 0, "an edge policy multiplies nothing that counts"
    coarse = count_macs(model, images, Way.dense(16))
    counts = count_macs(model, images, Way.policy("confidence", 0.25))
    assert counts["early"] == coarse["early"], "run once"
    assert coarse["rows"] < counts["rows"] < count_macs(model, images, Way.dense(8))["rows"]
    assert counts["late"] == coarse["late"] + given["late"], "on the coarse and on the fine grid"


def test_parameters_are_those_of_inference():
    plain = build_model({"width": 0.125})
    assert count_parameters(plain) == sum(p.numel() for p in plain.parameters())
    assert count_parameters(build_model({"width": 0.125, "auxiliary": True})) == count_parameters(plain)
    module = captured.trained()
    without = sum(p.numel() for name, p in module.named_parameters() if not name.startswith("auxiliary."))
    assert count_parameters(selective(module, size=(64, 64))) == without


def test_checkpoint_bytes_are_those_of_a_file(tmp_path):
    model = build_model({"width": 0.125})
    with (tmp_path / "weights.pt").open("wb") as file:
        torch.save(dict(model.state_dict()), file)
    assert checkpoint_bytes(model) == (tmp_path / "weights.pt").stat().st_size
    assert checkpoint_bytes(build_model({"width": 0.125, "auxiliary": True})) == checkpoint_bytes(model)
    assert checkpoint_bytes(model) > 4 * count_parameters(model)


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
