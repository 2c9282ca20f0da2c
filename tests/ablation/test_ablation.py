"""A whole ablation: resumed cell by cell, shared between processes, summed up, and written as tables."""

import csv
import dataclasses
import fcntl
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from sparse_seg import load_model
from sparse_seg.cli import main
from sparse_seg.data import build_dataset
from sparse_seg.errors import CheckpointError, TrainingError
from sparse_seg.evaluation.evaluate import evaluate
from sparse_seg.lab.ablation import runner
from sparse_seg.lab.ablation.costs import cost_key
from sparse_seg.lab.ablation.grid import Cell, Run, load_grid
from sparse_seg.lab.ablation.report import class_table, seed_table, summarise
from sparse_seg.lab.ablation.runner import Ablation
from sparse_seg.processes import Processes
from sparse_seg.run.way import Way
from tests.cli.commands import fails

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ablation(grid_file: Path, finished: Path) -> Ablation:
    return Ablation(load_grid(grid_file), finished)


@pytest.mark.slow
def test_all_is_written_and_true(ablation: Ablation, finished: Path) -> None:
    content = json.loads((finished / "results.json").read_text())
    assert {"command", "commit", "commits", "machine", "date"} <= set(content)
    rows = content["rows"]
    assert [(row["network"], row["run"], row["exchange"]) for row in rows[:4]] == [
        ("baseline", "dense OS8", None),
        ("baseline", "dense OS16", None),
        ("baseline", "random, f=0", "linear"),
        ("baseline", "random, f=1", "linear"),
    ]
    cell = ablation.grid.cells[0]
    config = ablation.cell_config(cell)
    dataset = build_dataset(config.data.dataset, config.data.root, "val")
    model = load_model(ablation.checkpoint("baseline", 1), config)
    expected = 100 * evaluate(model, dataset, config.data, Way.dense(8)).metrics.miou
    assert rows[0]["mious"] == [pytest.approx(expected, rel=1e-6)]
    assert rows[0]["miou"] == pytest.approx(statistics.fmean(rows[0]["mious"]))
    # all fine is the dense network (P2), and costs what it costs
    assert rows[3]["mious"] == pytest.approx(rows[0]["mious"], rel=1e-3)
    assert rows[3]["gmacs"] == pytest.approx(rows[0]["gmacs"], rel=1e-6)
    assert rows[0]["gmacs"] > rows[2]["gmacs"] > 0
    assert (rows[0]["gmacs_share"], rows[0]["miou_change"]) == (100, 0)
    assert 0 < rows[4]["parameters_share"] < 50
    assert [(row["distillation"], row["boundary"]) for row in rows[4:8:2]] == [(False, False), (True, True)]


@pytest.mark.slow
def test_tables_and_report(finished: Path) -> None:
    rows = json.loads((finished / "results.json").read_text())["rows"]
    table = (finished / "table.md").read_text()
    assert len(table.splitlines()) == 2 + len(rows)
    with (finished / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["mIoU %"]) for line in lines] == [row["miou"] for row in rows]
    page = (finished / "report.html").read_text()
    # two plots; of both validation frames three pictures, the baseline, the best network with its blocks,
    # and the baseline again, where the slider ends
    assert page.count("<img") == 2 + 2 * (3 + 1 + 2 + 1)
    assert page.count('href="#step-') == 2
    assert "http" not in page.replace("http://www.w3.org", ""), "self-contained"
    for name in ("pareto_gmacs.png", "pareto_milliseconds.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_training_starts_from_the_network_named(ablation: Ablation) -> None:
    student, tuned = (
        dict(load_model(ablation.checkpoint(name, 1)).named_parameters()) for name in ("student", "tuned")
    )
    change = max((tuned[name] - student[name]).abs().max().item() for name in student)
    assert 0 < change < 1e-4, "one step at a rate of 1e-6"


def test_seeds_and_differences_by_class() -> None:
    common = {"run": "r", "exchange": None, "seeds": [0, 3], "mious": [50.0, 51.5], "miou": 50.75}
    rows = [
        common | {"network": "a", "class_iou": [50.0, 60.0]},
        common | {"network": "b", "class_iou": [49.0, 62.5]},
    ]
    lines = list(csv.reader(seed_table(rows).to_csv().splitlines()))
    assert [lines[0][3:], lines[1][3:]] == [["seed 0", "seed 3", "mean"], ["50.0", "51.5", "50.75"]]
    lines = list(csv.reader(class_table(rows, ["road", "sky"]).to_csv().splitlines()))
    assert [lines[1][3:], lines[2][3:]] == [["50.0", "60.0"], ["-1.0", "+2.5"]]


@pytest.mark.slow
def test_only_what_is_missing_or_out_of_date_is_done(
    grid_file: Path, ablation: Ablation, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of the cells, trainings and costs that are finished is done again; copies of other sources are."""

    def changed() -> set[str]:
        before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.*")}
        assert main(["ablate", str(grid_file), "--work-dir", str(finished), "--device", "cpu"]) == 0
        found = {path for path in finished.rglob("*.*") if path.stat().st_mtime_ns != before.get(path)}
        return {path.name for path in found if path.suffix in (".json", ".pt", ".safetensors")}

    assert changed() == {"results.json"}
    gone, damaged = (ablation._cell_path(ablation.grid.cells[number]) for number in (2, -1))
    gone.unlink()
    damaged.write_text(json.dumps(json.loads(damaged.read_text()) | {"key": "of other weights"}))
    assert changed() == {"results.json", gone.name, damaged.name}
    assert len(ablation.results()) == len(ablation.grid.cells)
    copy = ablation.grid.networks["student again"]
    assert ablation.is_trained("student again", 1)
    with monkeypatch.context() as patch:
        patch.setattr(copy, "statistics", "dense")
        assert not ablation.is_trained("student again", 1)
    source = ablation.checkpoint("student", 1)
    content = source.read_bytes()
    source.write_bytes(content + b"other weights")
    assert not ablation.is_trained("student again", 1)
    source.write_bytes(content)
    assert ablation.is_trained("student again", 1)


@pytest.mark.slow
def test_dry_run_lists_what_is_left(grid_file: Path, tmp_path: Path, finished: Path, capsys) -> None:
    arguments = ["ablate", str(grid_file), "--device", "cpu", "--dry-run", "--work-dir"]
    assert main([*arguments, str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert "train taught, seed 1" in out
    assert "16 of 16 left, about" in out
    assert not (tmp_path / "new").exists()
    assert main([*arguments, str(finished)]) == 0
    assert "0 of 16 left" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_share_evaluations(grid_file: Path, finished: Path) -> None:
    alone = (finished / "results.json").read_text().partition('"rows"')[2]
    for cell in (finished / "cells").glob("baseline*.json"):
        cell.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tools/ablate.py"), str(grid_file), "--work-dir", str(finished), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert (finished / "results.json").read_text().partition('"rows"')[2] == alone


def test_a_killed_ablation_goes_on(grid_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = grid_file.with_name("small.yaml")
    small.write_text("networks: {n: {config: tiny.yaml}}\nruns: [{networks: [n], dense: [8, 16, 32]}]\n")
    ablation = Ablation(load_grid(small, ["train.iterations=1"]), tmp_path)
    evaluate_cell, left = ablation.evaluate, [2]

    def dies(cell: Cell) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        evaluate_cell(cell)

    monkeypatch.setattr(ablation, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        ablation.run()
    assert sum(ablation.result(cell) is not None for cell in ablation.grid.cells) == 2
    with pytest.raises(CheckpointError, match="run it again"):
        ablation.results()
    monkeypatch.setattr(ablation, "evaluate", evaluate_cell)
    ablation.run()
    assert len(ablation.results()) == len(ablation.grid.cells)
    with pytest.raises(TrainingError, match="holds a run of another config"):
        Ablation(load_grid(small, ["train.iterations=1", "train.lr=0.5"]), tmp_path).run()


def test_what_another_process_has_in_hand_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "WAIT", 0.01)
    lock, finished = tmp_path / "b.lock", threading.Event()

    def other_process() -> None:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            holding.set()
            time.sleep(0.2)
            finished.set()

    holding = threading.Event()
    thread = threading.Thread(target=other_process)
    thread.start()
    holding.wait()
    done: list[str] = []
    runner._finish(
        Processes(),
        ["a", "b", "c"],
        lambda job: tmp_path / f"{job}.lock",
        lambda job: job == "b" and finished.is_set(),
        done.append,
        lambda job: job != "a" or "c" in done,
    )
    thread.join()
    assert done == ["c", "a"], "a waits for c, and b was done by the other"


@pytest.mark.slow
def test_a_given_checkpoint_takes_the_first_networks_place(
    grid_file: Path, finished: Path, tmp_path: Path
) -> None:
    given = finished / "training/baseline-seed1/best.safetensors"
    ablation = Ablation(load_grid(grid_file), tmp_path, given)
    assert ablation.checkpoint("baseline", 0) == ablation.checkpoint("baseline", 1) == given
    assert ablation.is_trained("baseline", 0)
    assert ablation.config("taught", 0).train.distill.teacher == str(given)
    assert not ablation.is_trained("student", 0)


@pytest.mark.slow
def test_cells_of_one_size_and_run_share_a_cost(ablation: Ablation) -> None:
    by_name = {(cell.network, cell.run): cell for cell in ablation.grid.cells}
    edge = Run(None, "edge", 0.25, exchange="linear")
    keys = {network: cost_key(ablation, by_name[network, edge]) for network in ("student", "taught")}
    assert keys["student"] == keys["taught"]
    none = dataclasses.replace(edge, exchange="none")
    assert cost_key(ablation, by_name["student", none]) != keys["student"]


@pytest.mark.slow
def test_spread_is_the_standard_deviation(ablation: Ablation, finished: Path) -> None:
    ablation.grid.spec.seeds = [0, 1]
    results = [
        {"metrics": {"miou": 0.5 + 0.1 * cell.seed, "boundary_miou": 0.3, "class_iou": [0.2, None]}}
        for cell in ablation.grid.cells
    ]
    rows = summarise(ablation, results, json.loads((finished / "costs.json").read_text()))
    assert rows[0]["miou"] == pytest.approx(55)
    assert rows[0]["miou_std"] == pytest.approx(10 / 2**0.5)
    assert rows[0]["class_iou"][0] == pytest.approx(20)


@pytest.mark.slow
def test_errors_of_the_tool(grid_file: Path, tmp_path: Path, capsys) -> None:
    assert "does not exist" in fails(capsys, "ablate", tmp_path / "nowhere.yaml")
    line = fails(capsys, "ablate", grid_file, "--checkpoint", tmp_path / "none.pt")
    assert "none.pt does not exist" in line
    torch.save({}, tmp_path / "foreign.pt")
    line = fails(capsys, "ablate", grid_file, "--checkpoint", tmp_path / "foreign.pt", "--work-dir", tmp_path)
    assert "was not written by sparse_seg" in line
    line = fails(capsys, "ablate", grid_file, "--set", "data.root=/nowhere", "--work-dir", tmp_path / "w")
    assert "/nowhere" in line
    line = fails(capsys, "ablate", grid_file, "--set", "train.lrr=1", "--work-dir", tmp_path / "w")
    assert "did you mean 'train.lr'" in line
    fails(capsys, "ablate", code=2)
