"""Multiply-adds of published figures and of policies; parameters; a file's bytes.

Exact counts: `tests/graph/test_random_networks.py`, and against PyTorch's own counter `tests/test_parts.py`.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparse_seg import build_model, selective
from sparse_seg.evaluation.cost import checkpoint_bytes, count_macs, count_parameters
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
