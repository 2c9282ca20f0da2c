"""Several processes against one: the same gradients, the same evaluation, the same end.

Two processes do all that the tests look at, one thing after the other: starting them takes longest.
"""

import errno
import gc
import importlib
import os
import pickle
import re
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from sparse_seg import load_model
from sparse_seg import processes as processes_module
from sparse_seg.config import Config, load_config
from sparse_seg.data import build_dataset
from sparse_seg.errors import DataError, SparseSegError, TrainingError
from sparse_seg.evaluation.evaluate import Evaluation, evaluate
from sparse_seg.files import locked
from sparse_seg.processes import Processes, ProcessLost, joined_processes
from sparse_seg.run.build import build_model
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from sparse_seg.training.checkpoint import LOCK, load_state
from sparse_seg.training.trainer import Trainer
from tests import captured
from tests.training.test_trainer import log_of

SHORT = ["train.iterations=10", "train.lr=0.02"]
PADDED = ["data.on_device=true", "data.scale_range=[0.3,0.6]"]
TRAININGS = {
    "module": [f"model.module={captured.NAME}", "model.module_args.classes=19", "train.network=selective"],
    # with fixed statistics
    "plain": SHORT,
    "ohem": [*SHORT, "train.loss.ohem_threshold=1e-9", "train.loss.ohem_min_kept=1"],
    "inplace": [*SHORT, "train.loss.coarse_distill_weight=1", *PADDED],
}
FIXED = list(TRAININGS)[1:]
LIMITS = (1, 7)  # frames: fewer than processes, and a number that does not divide


@pytest.fixture(scope="module")
def configs(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    path = tmp_path_factory.mktemp("distributed") / "tiny.yaml"
    path.write_text(
        f"""
data: {{dataset: scenes, root: {scenes}, crop: [64, 64]}}
train: {{iterations: 3, batch_size: 4, lr: 0.1, log_every: 1, clip_grad_norm: 1.0, threads: 1}}
"""
    )
    own = ["model.width=0.125", "model.head_channels=16"]
    return {
        name: load_config(path, settings if name == "module" else [*own, *settings])
        for name, settings in TRAININGS.items()
    }


@pytest.fixture(scope="module")
def pair(configs: dict[str, Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes did."""
    folder = tmp_path_factory.mktemp("pair")
    with locked(folder / "held" / LOCK):
        torch.multiprocessing.spawn(_join, (str(folder / "store"), configs, folder), nprocs=2)
    return folder


def _join(rank: int, store: str, configs: dict[str, Config], folder: Path) -> None:
    torch.set_num_threads(1)
    importlib.import_module("torch.distributed.nn")  # first, see joined_processes: else threads outlive it
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    processes = Processes(rank, 2)
    agree(processes)
    found: dict[str, Any] = {"evaluations": evaluations(processes, configs["plain"])}
    for name, config in configs.items():
        train(processes, config, folder / name, name in FIXED)
    found["held"] = refusal(processes, configs["plain"], folder / "held")
    found["damaged"] = damage(processes, configs["plain"], folder / "damaged")
    found["full"] = full_disk(processes, configs["plain"], folder / "full")
    (folder / f"found{rank}").write_bytes(pickle.dumps(found))
    torch.distributed.destroy_process_group()


def agree(processes: Processes) -> None:
    rank = processes.rank
    assert processes.mean(torch.tensor(float(rank))) == 0.5
    assert processes.gather(lambda: rank) == [0, 1]
    assert processes.decided(lambda: rank) == 0
    norm: Any = torch.nn.BatchNorm1d(2)
    for parameter in norm.parameters():
        parameter.grad = torch.tensor([float(rank), 1.0])
    norm.running_mean += rank
    processes.average_gradients(norm.parameters())
    processes.share_buffers(norm)
    assert [parameter.grad.tolist() for parameter in norm.parameters()] == [[0.5, 1]] * 2
    assert norm.running_mean.tolist() == [0, 0], "the first one's"
    with pytest.raises(DataError, match="only here"):
        processes.gather(lambda: fail_in(processes, 1))
    for before in (0, 1, 2):  # the one that fails has agreed on fewer numbers than the other will ask for
        with pytest.raises(DataError, match="only here"):
            fail_after(processes, before)
    assert processes.mean(torch.ones(())) == 1, "and they are in step again"


def fail_in(processes: Processes, rank: int) -> None:
    if processes.rank == rank:
        raise DataError("only here")


def fail_after(processes: Processes, means: int) -> None:
    with processes.together(torch.device("cpu")):
        for number in range(2):
            if number == means:
                fail_in(processes, 1)
            processes.mean(torch.ones(()))
        fail_in(processes, 1)


def evaluations(processes: Processes, config: Config) -> list[Evaluation]:
    torch.manual_seed(0)
    model, dataset = build_model(config), build_dataset("scenes", config.data.root, "train")
    return [evaluate(model, dataset, config.data, Way(), limit, processes=processes) for limit in LIMITS]


def train(processes: Processes, config: Config, folder: Path, is_fixed: bool) -> None:
    trainer = Trainer(config, folder, processes=processes)
    if is_fixed:
        trainer._set_training = lambda: None  # type: ignore[method-assign]
        trainer.model.eval()
    trainer.run()


def refusal(processes: Processes, config: Config, folder: Path) -> str:
    with pytest.raises(TrainingError) as error:
        Trainer(config, folder, processes=processes)
    return str(error.value)


def damage(processes: Processes, config: Config, folder: Path) -> str:
    """An image that the second process alone reads is damaged."""
    trainer = Trainer(config, folder, processes=processes)
    load = trainer.dataset.load

    def refuse(index: int) -> Any:
        if trainer.iteration == 2 and not processes.is_first:
            raise DataError("label.png: damaged")
        return load(index)

    trainer.dataset.load = refuse  # type: ignore[method-assign]
    with pytest.raises(DataError) as error:
        trainer.run()
    return str(error.value)


def full_disk(processes: Processes, config: Config, folder: Path) -> list[str]:
    """How a run ends whose first process cannot save the best weights, and one that resumes it."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "best.safetensors")

    errors = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparse_seg.training.trainer.save_best", fail)
        for resume in (False, True):
            with pytest.raises(SparseSegError) as error:
                Trainer(config, folder, resume, processes=processes).run()
            errors.append(str(error.value))
    return errors


def found_by(pair: Path, rank: int) -> dict[str, Any]:
    return pickle.loads((pair / f"found{rank}").read_bytes())


@pytest.mark.slow
def test_a_full_disk_ends_all_processes_when_they_resume_too(pair: Path) -> None:
    for error in found_by(pair, 0)["full"]:
        assert "No space left on device" in error
        assert "of iteration 10" in error
        assert error.endswith("--resume")


@pytest.mark.slow
def test_evaluation_is_the_same_for_any_number_of_processes(pair: Path, configs: dict[str, Config]) -> None:
    for number, alone in enumerate(evaluations(Processes(), configs["plain"])):
        assert alone.images == LIMITS[number]
        assert alone.metrics.confusion.dtype == np.int64
        assert alone.metrics.confusion.sum() > 0
        for rank in (0, 1):
            shared = found_by(pair, rank)["evaluations"][number]
            assert (shared.metrics.confusion == alone.metrics.confusion).all()
            assert shared.metrics.as_dict() == alone.metrics.as_dict()
            assert (shared.fine_fraction, shared.images) == (alone.fine_fraction, alone.images)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXED)
def test_two_processes_train_as_one(
    pair: Path, configs: dict[str, Config], tmp_path: Path, name: str
) -> None:
    """With batch statistics fixed, the gradient of all labelled pixels is that of one process."""
    torch.manual_seed(configs[name].train.seed)
    start = build_model(configs[name])
    train(Processes(), configs[name], tmp_path, is_fixed=True)
    alone, shared = (load_state(folder / "last.pt")["model"] for folder in (tmp_path, pair / name))
    for key, before in start.state_dict().items():
        if before.is_floating_point():
            moved = (alone[key] - before).double().norm()
            assert (alone[key] - shared[key]).double().norm() <= 1e-3 * moved, key
    for one, two in zip(log_of(tmp_path), log_of(pair / name), strict=True):
        for key in {"loss", "val_loss", "miou"} & one.keys():
            assert one[key] == pytest.approx(two[key], rel=1e-4), key


@pytest.mark.slow
def test_all_processes_end_with_the_same_words(pair: Path) -> None:
    """Those of one that reads a damaged file, after the first one has saved; and where another trains."""
    damaged, held = ([found_by(pair, rank)[name] for rank in (0, 1)] for name in ("damaged", "held"))
    assert damaged[0] == damaged[1]
    assert damaged[0].startswith("label.png: damaged; the last good checkpoint is")
    assert load_state(pair / "damaged/last.pt")["progress"]["iteration"] == 2
    who = f"{pair / 'held'} is in use: process {os.getpid()} on {socket.gethostname()} trains there"
    assert held == [f"{who}; stop it first, or choose another --work-dir"] * 2
    assert not (pair / "held/config.yaml").exists()


@pytest.mark.slow
def test_several_processes_train_a_module(pair: Path) -> None:
    assert isinstance(load_model(pair / "module/best.safetensors"), SelectiveNetwork)


@pytest.mark.parametrize(("total", "count"), [(7, 3), (2, 3), (0, 2), (10, 1), (500, 7)])
def test_shares_are_whole_and_even(total: int, count: int) -> None:
    shares = [Processes(rank, count).share(total) for rank in range(count)]
    assert [item for share in shares for item in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_batch_that_cannot_be_shared_is_refused(configs: dict[str, Config], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"train\.batch_size 4 cannot be shared by 3 processes"):
        Trainer(configs["plain"], tmp_path / "run", processes=Processes(0, 3))
    assert not (tmp_path / "run").exists()


def gloo_threads() -> list[str]:
    names = []
    for number in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError):  # it has ended meanwhile
            names.append(Path(f"/proc/self/task/{number}/comm").read_text().strip())
    return [name for name in names if "gloo" in name]


@pytest.mark.parametrize("ending", [None, DataError("x"), ZeroDivisionError(), ProcessLost()], ids=repr)
def test_no_thread_of_the_group_is_left_on_any_way_out(
    ending: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that asks for the interpreter after its end aborts the process. Optimizers import what keeps it."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(HashStore(), 0, 1)]))
    monkeypatch.setattr(gc, "freeze", lambda: None)
    for name in [name for name in sys.modules if name.startswith("torch.distributed.nn")]:
        monkeypatch.delitem(sys.modules, name)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with (
            suppress(DataError, ZeroDivisionError, ProcessLost),
            joined_processes(torch.device("cpu")) as (processes, device),
        ):
            importlib.import_module("torch.distributed.nn")
            assert processes.count == 1
            torch.distributed.all_reduce(torch.zeros(1, device=device))
            if not gloo_threads():
                pytest.skip("this PyTorch does not name gloo's threads")
            if ending is not None:
                raise ending
    finally:
        signal.signal(signal.SIGTERM, before)
    assert gloo_threads() == []


def test_an_interface_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope0")
    with pytest.raises(TrainingError) as error:
        processes_module._join("gloo", HashStore(), 0, 1)
    start = "cannot join the processes of this job: "
    end = "; GLOO_SOCKET_IFNAME=nope0 must be this machine's interface"
    assert re.fullmatch(f"{start}.*{end}", str(error.value)), "one line"
    assert not torch.distributed.is_initialized()
