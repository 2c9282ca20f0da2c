"""Several processes against one: the same gradients, the same evaluation, the same end."""

import copy
import gc
import importlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from sparse_seg import processes as processes_module
from sparse_seg.config import Config, load_config
from sparse_seg.data import build_dataset
from sparse_seg.data.batches import ResumableSampler, training_batches
from sparse_seg.errors import DataError, TrainingError
from sparse_seg.evaluation.evaluate import evaluate
from sparse_seg.processes import FailedElsewhere, Processes, ProcessLost, joined_processes
from sparse_seg.run.build import build_model
from sparse_seg.run.way import Way
from sparse_seg.training.checkpoint import load_state
from sparse_seg.training.schedule import learning_rate
from sparse_seg.training.trainer import Trainer
from tests.reference import relative_error

ROOT = Path(__file__).parents[2]


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tools/train.py"), *map(str, arguments), "--device", "cpu"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}  # for networks that tests define
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


@pytest.fixture(scope="session")
def config_file(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distributed") / "tiny.yaml"
    path.write_text(
        f"""
model: {{width: 0.125, head_channels: 16}}
data: {{dataset: scenes, root: {scenes}, crop: [64, 64]}}
train: {{iterations: 3, batch_size: 4, lr: 0.1, log_every: 1, clip_grad_norm: 1.0, threads: 1}}
"""
    )
    return path


@pytest.mark.slow
def test_weights_are_those_of_the_mean_gradient(config_file: Path, tmp_path: Path) -> None:
    done = torchrun(config_file, "--work-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best validation mIoU") == 1, "the first process alone speaks"

    config = load_config(config_file)
    trainer = Trainer(config, tmp_path / "alone")
    trainer._set_training()
    model, losses, random = trainer.model, [], [torch.get_rng_state()]  # dropout's, in either process
    Processes(1, 2).seed(config.train.seed, 0)
    random.append(torch.get_rng_state())
    for iteration, (images, labels) in enumerate(training_batches(trainer.dataset, config, 0, 3)):
        gradients, halves, copies = [], [], []
        labelled = (labels != 255).sum()
        trainer.objective.loss.across = lambda weight: labelled / 2  # noqa: B023 (called in this iteration)
        for part in (0, 1):
            torch.set_rng_state(random[part])
            own = copy.deepcopy(model)
            loss = trainer.objective(own, images[part::2], labels[part::2])
            loss.backward()
            random[part] = torch.get_rng_state()
            halves.append(loss.item())
            gradients.append([parameter.grad for parameter in own.parameters()])
            copies.append(own)
        for parameter, *both in zip(model.parameters(), *gradients, strict=True):
            parameter.grad = sum(both) / 2
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in trainer.optimizer.param_groups:
            group["lr"] = learning_rate(iteration, config.train)
        trainer.optimizer.step()
        for buffer, new in zip(model.buffers(), copies[0].buffers(), strict=True):
            buffer.copy_(new)  # the file has the first process's batch statistics
        losses.append(sum(halves) / 2)

    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(losses, rel=1e-4)
    weights = load_state(tmp_path / "run/last.pt")["model"]
    for name, expected in model.state_dict().items():
        assert relative_error(weights[name].double(), expected.double()) < 1e-4, name


def in_processes(count: int, work: Callable[..., None], folder: Path, *arguments: object) -> None:
    """Run `work(processes, *arguments)` in `count` processes."""
    if count == 1:
        work(Processes(), *arguments)
        return
    store = str(folder / f"store{count}")
    torch.multiprocessing.spawn(_join, (store, count, work, arguments), nprocs=count)


def _join(rank: int, store: str, count: int, work: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    importlib.import_module("torch.distributed.nn")  # first, see joined_processes: else threads outlive it
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    work(Processes(rank, count), *arguments)
    torch.distributed.destroy_process_group()


def agree(processes: Processes) -> None:
    rank, cpu = processes.rank, torch.device("cpu")
    assert processes.any(rank == 1, cpu), "one that is to stop stops both"
    assert not processes.any(False, cpu)
    assert processes.mean(torch.tensor(float(rank))) == 0.5
    assert processes.gather(lambda: rank) == [0, 1]
    assert processes.decided(lambda: rank) == 0
    with pytest.raises(DataError, match="only here"):
        processes.gather(lambda: fail_in(processes, 1))
    for before in (0, 1, 2):  # the one that fails has agreed on fewer numbers than the other will ask for
        with pytest.raises(DataError if rank else FailedElsewhere):
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


@pytest.mark.slow
def test_two_processes_agree(tmp_path: Path) -> None:
    in_processes(2, agree, tmp_path)


def evaluate_share(processes: Processes, config_file: Path, out: Path) -> None:
    config = load_config(config_file, ["model.mask.policy=edge"])
    torch.manual_seed(0)
    model, dataset = build_model(config), build_dataset("scenes", config.data.root, "train")
    for limit in (2, 7):  # fewer than processes, and a number that does not divide
        result = evaluate(model, dataset, config.data, Way(), limit, processes=processes)
        (out / f"{processes.count}-{processes.rank}-{limit}").write_bytes(pickle.dumps(result))


@pytest.mark.slow
def test_evaluation_is_the_same_for_any_number_of_processes(config_file: Path, tmp_path: Path) -> None:
    for count in (1, 2, 3):
        in_processes(count, evaluate_share, tmp_path, config_file, tmp_path)
    for limit in (2, 7):
        alone = pickle.loads((tmp_path / f"1-0-{limit}").read_bytes())
        assert alone.images == limit
        assert alone.metrics.confusion.dtype == np.int64
        assert alone.metrics.confusion.sum() > 0
        for count, rank in ((2, 0), (2, 1), (3, 0), (3, 1), (3, 2)):
            shared = pickle.loads((tmp_path / f"{count}-{rank}-{limit}").read_bytes())
            assert (shared.metrics.confusion == alone.metrics.confusion).all()
            assert shared.metrics.as_dict() == alone.metrics.as_dict()
            assert (shared.fine_fraction, shared.images) == (alone.fine_fraction, limit)


@pytest.mark.parametrize(("total", "count"), [(7, 3), (2, 3), (0, 2), (10, 1), (500, 7)])
def test_shares_are_whole_and_even(total: int, count: int) -> None:
    shares = [Processes(rank, count).share(total) for rank in range(count)]
    assert [item for share in shares for item in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def train_with_fixed_statistics(processes: Processes, config: Config, folder: Path) -> None:
    trainer = Trainer(config, folder, processes=processes)
    trainer._set_training = lambda: None  # type: ignore[method-assign]
    trainer.model.eval()
    trainer.run()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["train.loss.ohem_threshold=1e-9", "train.loss.ohem_min_kept=1"],
        ["train.loss.coarse_distill_weight=1", "data.on_device=true", "data.scale_range=[0.3,0.6]"],
    ],
    ids=["plain", "ohem", "inplace, padded"],
)
def test_two_processes_train_as_one(config_file: Path, tmp_path: Path, settings: list[str]) -> None:
    """With batch statistics fixed, the gradient of all labelled pixels is that of one process."""
    config = load_config(config_file, ["train.iterations=20", "train.lr=0.02", *settings])
    for count in (1, 2):
        in_processes(count, train_with_fixed_statistics, tmp_path, config, tmp_path / str(count))
    alone, shared = (load_state(tmp_path / f"{count}/last.pt")["model"] for count in (1, 2))
    start = Trainer(config, tmp_path / "start").model.state_dict()
    for name, weight in alone.items():
        if weight.is_floating_point():
            moved = (weight - start[name]).double().norm()
            assert (weight - shared[name]).double().norm() <= 1e-3 * moved, name
    logs = [
        [json.loads(line) for line in (tmp_path / f"{count}/log.jsonl").read_text().splitlines()]
        for count in (1, 2)
    ]
    for one, two in zip(*logs, strict=True):
        for key in {"loss", "val_loss", "miou"} & one.keys():
            assert one[key] == pytest.approx(two[key], rel=1e-4), key


def test_parts_make_up_the_batches() -> None:
    whole = list(ResumableSampler(10, 6, 0, 2, 7))
    parts = [list(ResumableSampler(10, 6, 0, 2, 7, (number, 3))) for number in range(3)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert all(len(share) == 2 for share in shares)
        assert sorted(key for share in shares for key in share) == sorted(batch)


def test_a_batch_that_cannot_be_shared_is_refused(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"train\.batch_size 4 cannot be shared by 3 processes"):
        Trainer(load_config(config_file), tmp_path / "run", processes=Processes(0, 3))
    assert not (tmp_path / "run").exists()


def gloo_threads() -> list[str]:
    found = [Path(f"/proc/self/task/{number}/comm").read_text() for number in os.listdir("/proc/self/task")]
    return [name.strip() for name in found if "gloo" in name]


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
    settings = {"store": HashStore(), "rank": 0, "world_size": 1}
    with pytest.raises(TrainingError) as error:
        processes_module._join("gloo", settings)
    start = "cannot join the processes of this job: "
    end = "; GLOO_SOCKET_IFNAME=nope0 must be this machine's interface"
    assert re.fullmatch(f"{start}.*{end}", str(error.value)), "one line"
    assert not torch.distributed.is_initialized()
