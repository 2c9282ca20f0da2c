"""Benchmark rows: all runs compute the same, ratios are sane, what cannot run is told."""

import pickle
from typing import Any

import pytest
import torch

from sparse_seg.cli.benchmark import ENGINES
from sparse_seg.config import config_from_dict
from sparse_seg.errors import SparseSegError
from sparse_seg.lab.benchmark.measure import COLUMNS, Case, Subject, cases, measure_cases, peer_run
from sparse_seg.networks.encoder_decoder import build_module
from sparse_seg.run.passes import Pass
from sparse_seg.run.way import Way
from tests.reference import relative_error

TREE = {"model": {"backbone": "resnet50", "width": 0.125, "depths": [1, 1, 1, 2], "head": "deeplabv3"}}
STRIDES = (8, 16)
BASELINE = Case("network", Way.dense(8))
FRACTIONS = [0.1, 0.5, 1.0]


def selective(scope: str, fraction: float, engine: str = "gather") -> Case:
    return Case(scope, Way(None, None, fraction, engine=engine))


@pytest.fixture(scope="module")
def subject():
    return Subject(config_from_dict(TREE, "test"), size=(70, 100), batch=2)


def test_cases_start_with_the_baseline():
    rows = cases("network", [0.1], ["gather", "spconv"], STRIDES, ["given", "confidence"])
    assert ["{network}, {form}".format(**case.as_row()) for case in rows] == [
        "dense OS8, conv2d",
        "dense OS16, conv2d",
        "selective f=0.1, gather",
        "selective f=0.1, spconv",
        "given f=0.1, gather",
        "confidence f=0.1, gather",
    ]
    rows = cases("train", [0.1, 0.2], ["gather"], STRIDES, ["given"])
    assert [case.as_row()["network"] for case in rows] == ["dense OS8", "selective f=0.1", "selective f=0.2"]


@pytest.mark.slow
def test_cases_of_further_policies(subject):
    """A mask made beforehand, and a coarse pass that is refined: other costs, the network's numbers."""
    rows = cases("network", [0.3], ["gather"], STRIDES, ["given", "confidence"])[-2:]
    given, confidence = (subject.run(case)() for case in rows)
    with torch.inference_mode():
        assert relative_error(given, subject.model(subject.images, subject.fine_blocks(rows[0].way))) < 1e-4
        run = subject.model.start(subject.images).follow(Way.policy("confidence", 0.3))
        assert relative_error(confidence, run.logits()) < 1e-4
    assert run.mask is not None
    assert run.mask.float().mean() == pytest.approx(0.3, abs=0.02)
    results = measure_cases(subject, [BASELINE, *rows], repeats=1, memory=False)
    assert results[1]["stored_mib"] is None
    assert 0.1 < results[2]["stored_mib"] < 10
    assert results[2]["gmacs"] == pytest.approx(results[1]["gmacs"], rel=0.2), "other blocks, one more head"


def test_all_runs_compute_the_same_network(subject):
    """The baseline is the plain module's numbers, and all fine is the baseline's."""
    module: Any = build_module(subject.model.settings, 8)
    module.load_state_dict(subject.model.module.state_dict())
    module.eval().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        plain = module(subject.images.contiguous(memory_format=torch.channels_last))
        blocks = subject.fine_blocks(selective("network", 0.3).way)
        expected = subject.folded_model(subject.images, fine_blocks=blocks)
    assert relative_error(subject.model.dense(subject.images, 8), plain) < 1e-5
    dense = subject.run(BASELINE)()
    assert relative_error(dense, plain) < 1e-4, "folded"
    assert relative_error(subject.run(selective("network", 1.0))(), dense) < 1e-5
    assert torch.equal(subject.run(selective("network", 0.3))(), expected)
    assert blocks.float().mean() == pytest.approx(0.3, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["network", "train"])
def test_rows_are_sane(subject, scope, monkeypatch):
    """An engine that cannot run is noted, and the others are measured."""
    follow, notes = Pass.follow, list[str]()

    def refuse(self, way=None, policy=None):
        if way is not None and way.engine == "spconv":
            raise SparseSegError("spconv is not installed")
        return follow(self, way, policy)

    monkeypatch.setattr(Pass, "follow", refuse)
    rows = measure_cases(
        subject, cases(scope, FRACTIONS, ENGINES, STRIDES), 2, memory=False, notes=notes.append
    )
    assert set(notes) == {f"{scope}: spconv not measured: spconv is not installed"}
    baseline, selective = rows[0], [row for row in rows if row["kind"] == "selective"]
    assert (baseline["network"], baseline["speedup"], baseline["mac_ratio"]) == ("dense OS8", 1, 1)
    gmacs = [row["gmacs"] for row in selective]
    assert gmacs == sorted(gmacs)
    assert [row["fine_fraction"] for row in selective] == FRACTIONS
    assert gmacs[-1] == pytest.approx(baseline["gmacs"])  # all fine: dense OS8's work
    for row in rows:
        assert row["milliseconds"] > 0
        assert row["speedup_per_mac_ratio"] == pytest.approx(row["speedup"] / row["mac_ratio"])
        assert len(row["samples"]) == 2
    coarse = [row for row in rows if row["output_stride"] == 16]
    assert len(coarse) == (scope == "network")
    assert all(row["gmacs"] < gmacs[0] for row in coarse)
    assert all(any(key in row for row in rows) for key in COLUMNS)


@pytest.mark.slow
def test_peak_memory_of_rows(subject, monkeypatch):
    """A child process can make the same run."""

    def peak(prepare, arguments, device):
        prepare, arguments = pickle.loads(pickle.dumps((prepare, arguments)))
        assert torch.equal(prepare(*arguments)(), subject.run(BASELINE)())
        return 12.0

    monkeypatch.setattr("sparse_seg.lab.benchmark.measure.peak_memory", peak)
    assert [row["peak_mib"] for row in measure_cases(subject, [BASELINE], repeats=1)] == [12]


def test_training_steps_train_copies(subject):
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    subject.run(selective("train", 0.3))()
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())
    first = "module.backbone.conv1.weight"
    assert not torch.equal(subject.training_copy.state_dict()[first], before[first])


def test_peers_that_cannot_run_are_noted(subject, monkeypatch):
    def missing(model):
        raise ModuleNotFoundError("No module named 'fastest'\nmore")

    def wrong(model):
        return lambda images, stride: model.dense(images, stride) + 1

    found = {"missing": missing, "wrong": wrong, "right": lambda model: model.dense}
    monkeypatch.setattr("sparse_seg.lab.benchmark.measure.PEERS", found)
    names = ["missing", "wrong", "right"]
    todo = [BASELINE, *(Case("network", Way.dense(8), peer=name) for name in names)]
    notes: list[str] = []
    rows = measure_cases(subject, todo, repeats=1, memory=False, notes=notes.append)
    assert [row["form"] for row in rows] == ["conv2d", "right"]
    assert notes[0] == "network: missing not measured: ModuleNotFoundError: No module named 'fastest'"
    assert "wrong computes other numbers (relative error" in notes[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_peers(subject, name):
    """A runtime takes the dense network, whatever it is made of."""
    pytest.importorskip(name)
    with torch.inference_mode():
        expected = subject.folded_model.dense(subject.images, 8)
    found = peer_run(name, subject.folded_model, subject.images, 8)()
    assert relative_error(found, expected) < 1e-3
