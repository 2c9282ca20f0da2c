"""Two processes on one batch, by torchrun, against one that computes both halves itself."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_seg.config import load_config
from sparse_seg.data.loader import ResumableSampler, training_batches
from sparse_seg.errors import TrainingError
from sparse_seg.training.checkpoint import load_state
from sparse_seg.training.distributed import Processes
from sparse_seg.training.schedule import learning_rate
from sparse_seg.training.trainer import Trainer
from tests.reference import relative_error

ROOT = Path(__file__).parents[2]


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tools/train.py"), *map(str, arguments), "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


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

    weights = load_state(tmp_path / "run/last.pt")["model"]
    for name, expected in model.state_dict().items():
        assert relative_error(weights[name].double(), expected.double()) < 1e-4, name
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(losses, rel=1e-4)


def agree(rank: int, store: str) -> None:
    """Run in each of two processes."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    processes, cpu = Processes(rank, 2), torch.device("cpu")
    assert processes.any(rank == 1, cpu), "one that is to stop stops both"
    assert not processes.any(False, cpu)
    assert processes.mean(torch.tensor([rank, float("nan") if rank else 1.0])).isfinite().tolist() == [
        True,
        False,
    ]
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_agree(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(agree, (str(tmp_path / "store"),), nprocs=2)


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
