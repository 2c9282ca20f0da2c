"""Benchmark rows: all runs compute the same, ratios are sane, what cannot run is told."""

import dataclasses
import json

import pytest
import torch

from sparse_seg import build_model
from sparse_seg.cli import main
from sparse_seg.config import config_from_dict
from sparse_seg.errors import ConfigError
from sparse_seg.lab.benchmark import peers
from sparse_seg.lab.benchmark.measure import cases, check_training, engine_fault, measure
from sparse_seg.lab.benchmark.peers import peer_run
from sparse_seg.lab.benchmark.profile import profile_network
from sparse_seg.lab.benchmark.subject import Case, Setup, Subject
from sparse_seg.lab.benchmark.tables import benchmark_table, profile_table
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from sparse_seg.sparse import grid_to_rows
from sparse_seg.sparse.engines import spconv
from sparse_seg.training.checkpoint import save_checkpoint
from tests.reference import relative_error

TREE = {"model": {"backbone": "resnet50", "width": 0.125, "head": "deeplabv3", "num_classes": 19}}
SETUP = Setup(config_from_dict(TREE, "test"), size=(70, 100), batch=2)
FRACTIONS = [0.1, 0.5, 1.0]


def selective(scope: str, fraction: float, engine: str = "gather") -> Case:
    return Case(scope, "selective", Way(None, None, fraction, engine=engine))


@pytest.fixture(scope="module")
def subject():
    return Subject(SETUP)


def test_cases_start_with_the_baseline():
    rows = cases("network", [0.1], ["gather", "spconv"], folded=True)
    assert [f"{case.name}, {case.form}" for case in rows] == [
        "plain OS8, nn.Conv2d",
        "plain OS16, nn.Conv2d",
        "dense OS8, gather",
        "dense OS8, gather, folded",
        "selective f=0.1, gather",
        "selective f=0.1, spconv",
        "selective f=0.1, gather, folded",
    ]
    assert [case.name for case in cases("train", [0.1, 0.2], ["gather"], folded=True)] == [
        "plain OS8",
        "selective f=0.1",
        "selective f=0.2",
    ]


@pytest.mark.slow
def test_cases_of_further_policies(subject):
    """A mask made beforehand, and a coarse pass that is refined: other costs, the network's numbers."""
    rows = cases("network", [0.3], ["gather"], True, ["given", "confidence"])[-2:]
    assert [f"{case.name}, {case.form}" for case in rows] == [
        "given f=0.3, gather, folded",
        "confidence f=0.3, gather, folded",
    ]
    assert not cases("stages", [0.3], ["gather"], True, ["given"])[-1].given
    given, confidence = (subject.run(case)() for case in rows)
    with torch.inference_mode():
        assert relative_error(given, subject.model(subject.images, subject.fine_blocks(rows[0].way))) < 1e-4
        run = subject.model.start(subject.images).follow(Way.policy("confidence", 0.3))
        assert relative_error(confidence, run.logits()) < 1e-4
    assert run.mask is not None
    assert run.mask.float().mean() == pytest.approx(0.3, abs=0.02)
    results = measure(subject, [Case("network", "plain"), *rows], repeats=1, memory=False)
    assert results[1]["stored_mib"] is None
    assert 0.1 < results[2]["stored_mib"] < 10
    assert results[2]["gmacs"] == pytest.approx(results[1]["gmacs"], rel=0.2), "other blocks, one more head"


def test_all_runs_compute_the_same_network(subject):
    for scope in ("stages", "network"):
        plain, dense, fine = (
            subject.run(case)()
            for case in (Case(scope, "plain"), Case(scope, "dense"), selective(scope, 1.0))
        )
        plain = grid_to_rows(plain) if scope == "stages" else plain
        assert relative_error(dense, plain) < 1e-5
        if scope == "stages":  # the same sites in another order
            fine, dense = fine.sort(0).values, dense.sort(0).values
        assert relative_error(fine, dense) < 1e-5
    with torch.inference_mode():
        blocks = subject.fine_blocks(selective("network", 0.3).way)
        expected = subject.model(subject.images, fine_blocks=blocks)
    assert torch.equal(subject.run(selective("network", 0.3))(), expected)
    assert blocks.float().mean() == pytest.approx(0.3, abs=0.02)


def test_a_child_would_measure_the_same_network(subject):
    other = Subject(SETUP)
    case = selective("network", 0.3)
    assert torch.equal(subject.run(case)(), other.run(case)())
    assert not subject.images.isnan().any()
    assert set(subject.labels.unique().tolist()) <= {*range(19), 255}


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["stages", "network", "train"])
def test_rows_are_sane(subject, scope):
    rows = measure(subject, cases(scope, FRACTIONS, ["gather"], folded=False), repeats=2, memory=False)
    baseline, selective = rows[0], [row for row in rows if row["kind"] == "selective"]
    assert (baseline["network"], baseline["speedup"], baseline["mac_ratio"]) == ("plain OS8", 1, 1)
    gmacs = [row["gmacs"] for row in selective]
    assert gmacs == sorted(gmacs)
    assert [row["fine_fraction"] for row in selective] == FRACTIONS
    assert gmacs[-1] == pytest.approx(baseline["gmacs"])  # all fine: dense OS8's work
    for row in rows:
        assert row["milliseconds"] > 0
        assert row["speedup_per_mac_ratio"] == pytest.approx(row["speedup"] / row["mac_ratio"])
        assert (row["layout_share"] is not None) == (row["kind"] == "selective")
        assert len(row["samples"]) == 2
    coarse = [row for row in rows if row["output_stride"] == 16]
    assert all(row["gmacs"] < gmacs[0] for row in coarse)
    assert rows[-1]["network"] in benchmark_table(rows).to_text()


@pytest.mark.slow
def test_peak_memory_of_rows(subject):
    rows = measure(subject, [Case("stages", "plain"), Case("stages", "dense")], repeats=1)
    assert all(0 < row["peak_mib"] < 500 for row in rows)


def test_layout_run_builds_the_tables_of_a_forward(subject):
    way = selective("network", 0.3).way
    tables, blocks = subject.tables(way), subject.fine_blocks(way)
    prepared = subject.prepare(blocks, tables)
    with torch.inference_mode():
        run = subject.model.start(subject.images).take(blocks)
        run.logits()
    for number in (1, 2):
        built = run.layouts[number].known_tables(run.layouts[2])
        assert prepared[number].known_tables(prepared[2]) == built
        assert built
    assert len(tables) == 6, "ASPP has three spacings of its own"


@pytest.mark.slow
def test_the_fast_form_is_measured_where_there_is_one(monkeypatch):
    monkeypatch.setattr(SelectiveNetwork, "for_inference", lambda self: self, raising=False)
    subject = Subject(SETUP)
    assert subject.folded_model is subject.model
    rows = measure(subject, cases("stages", [0.1], ["gather"], folded=True), repeats=1, memory=False)
    assert [row["form"] for row in rows if row["folded"]] == ["gather, folded"] * 2


def test_training_steps_train_copies(subject):
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    subject.run(selective("train", 0.3))()
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())
    assert not torch.equal(subject.training_copy.backbone.conv1.weight, before["backbone.conv1.weight"])
    with pytest.raises(ConfigError, match="needs --batch 2 or more"):
        check_training(dataclasses.replace(SETUP, batch=1))


def test_peers_that_cannot_run_are_noted(subject, monkeypatch):
    def missing(module, given):
        raise ModuleNotFoundError("No module named 'fastest'\nmore")

    def wrong(module, given):
        return lambda: module(given) + 1

    def right(module, given):
        return lambda: module(given).detach().numpy()

    monkeypatch.setattr(peers, "PEERS", {"missing": missing, "wrong": wrong, "right": right})
    names = ["missing", "wrong", "right"]
    todo = [Case("network", "plain"), *(Case("network", "peer", peer=name) for name in names)]
    notes: list[str] = []
    rows = measure(subject, todo, repeats=1, memory=False, notes=notes.append)
    assert [row["form"] for row in rows] == ["nn.Conv2d", "right"]
    assert notes[0] == "network: missing not measured: ModuleNotFoundError: No module named 'fastest'"
    assert "wrong computes other numbers (relative error" in notes[1]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_peers(subject, name):
    pytest.importorskip(name)
    grid = torch.randn(1, 3, 64, 64)
    assert peer_run(name, torch.nn.Conv2d(3, 4, 3), grid)().shape == (1, 4, 62, 62)


def test_engines_that_cannot_run_say_why(monkeypatch):
    """The real ones: spconv has no gradients on the CPU, and here it is missing, or of another kind."""
    cpu = torch.device("cpu")
    assert engine_fault("gather", cpu, torch.float32, train=True) is None
    monkeypatch.setattr(spconv, "_outcome", lambda device: spconv._Fails("spconv is not installed"))
    assert engine_fault("spconv", cpu, torch.float32, train=False) == "spconv is not installed"
    assert "no gradients on the CPU" in str(engine_fault("spconv", cpu, torch.float32, train=True))
    assert "cannot run torch.float64" in str(engine_fault("spconv", cpu, torch.float64, train=False))


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_the_tool_notes_an_engine_that_cannot_run(train, monkeypatch, capsys, tmp_path):
    """With the default engines, where spconv is missing, and for a training step on the CPU."""
    monkeypatch.setattr(spconv, "_outcome", lambda device: spconv._Fails("spconv is not installed"))
    config = tmp_path / "small.yaml"
    config.write_text(json.dumps(TREE))
    scopes = ["--scopes", "--train"] if train else ["--scopes", "network"]
    sizes = ["--size", "64x96", "--batch", "2", "--fine-fraction", "0.2", "--repeats", "1", "--no-memory"]
    assert main(["benchmark", str(config), *sizes, *scopes]) == 0
    out = capsys.readouterr().out
    assert "spconv not measured: spconv" in out
    assert "selective f=0.2" in out


@pytest.mark.slow
@pytest.mark.parametrize("head", ["lite", "deeplabv3"])
def test_profile(head):
    tree = {"model": TREE["model"] | {"head": head}}
    subject = Subject(dataclasses.replace(SETUP, config=config_from_dict(tree, "test")))
    parts = ["layout", "stem", "layer1", "layer2", "layer3", "layer4", "neck", "densify", "head", "upsample"]
    for case in (Case("network", "dense"), selective("network", 0.3)):
        rows = profile_network(subject, case, repeats=1)
        assert [row["part"] for row in rows] == (["mask", *parts] if case.kind == "selective" else parts)
        layer3 = next(row for row in rows if row["part"] == "layer3")
        assert {"conv", "GEMM", "norm"} <= layer3["kinds"].keys()
        assert ("gather" in layer3["kinds"]) == (case.kind == "selective")
        assert "100.0" in profile_table(rows).to_text()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.model.modules())


def test_checkpoints(tmp_path):
    model = build_model(SETUP.config)
    save_checkpoint(tmp_path / "weights.pt", SETUP.config, model.state_dict())
    subject = Subject(dataclasses.replace(SETUP, checkpoint=str(tmp_path / "weights.pt")))
    assert torch.equal(subject.model.backbone.conv1.weight, model.backbone.conv1.weight)
