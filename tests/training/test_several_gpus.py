"""docs/several-gpus.md, followed to the letter on two processes; and what a kill does."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_seg.data.scenes import write_scenes
from sparse_seg.training.checkpoint import load_state

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/several-gpus.md").read_text()
LIGHT = ["--device", "cpu", "--set", "train.iterations=4", "train.batch_size=2", "data.crop=[64,64]"]
LIGHT += ["data.workers=0", "model.width=0.125", "train.threads=1", "train.eval_every=2", "train.log_every=1"]
LIGHT += ["train.warmup_iterations=0"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def commands() -> list[list[str]]:
    block = re.search(r"test_several_gpus\.py -->\n```bash\n(.*?)```", PAGE, re.S)
    assert block is not None
    return [line.split() for line in block[1].splitlines()]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder in which the page's commands find what they name."""
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_scenes(tmp_path / "scenes", 10, (64, 96), val_fraction=0.3)
    return tmp_path


@pytest.mark.slow
def test_the_page_is_followed_to_the_letter(checkout: Path) -> None:
    said = []
    for name, *arguments in commands():
        assert name == "torchrun"
        light = [*LIGHT, f"data.root={checkout / 'scenes'}"]
        done = subprocess.run(
            [*TORCHRUN, *arguments, *light],
            cwd=checkout,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    train, resumed, evaluated = said
    assert train.count("best validation mIoU") == 1, "the first process alone speaks"
    assert "is already trained to iteration 4" in resumed
    best = re.search(r"best validation mIoU (\S+);", train)
    measured = re.search(r"^mIoU (\S+)  .* 3 images", evaluated, re.M)
    assert best is not None
    assert measured is not None
    assert float(measured[1]) == pytest.approx(100 * float(best[1]), abs=0.01)


def workers_of(parent: int) -> list[int]:
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in found if b"tools/train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_job_with_one_line_and_it_resumes(checkout: Path, rank: int) -> None:
    run = ["--standalone", "--nproc_per_node=2", "tools/train.py", "configs/demo.yaml", "--work-dir", "run"]
    settings = [*LIGHT, f"data.root={checkout / 'scenes'}", "train.eval_every=1000", "train.save_every=2"]
    settings[settings.index("train.iterations=4")] = "train.iterations=100000"
    command = [*TORCHRUN, *run, *settings]
    pipe = subprocess.PIPE
    job = subprocess.Popen(command, cwd=checkout, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True)
    last = checkout / "run/last.pt"
    while not last.exists():
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.1)
    os.kill(workers_of(job.pid)[rank], signal.SIGKILL)
    killed = time.monotonic()
    _, errors = job.communicate(timeout=120)
    assert time.monotonic() - killed < 45, "15 s where nothing else runs"
    assert job.returncode == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: another process of this job has ended; ")
    assert "run/last.pt" in line
    assert "resume with --work-dir run --resume" in line
    reached = load_state(last)["progress"]["iteration"]
    settings[settings.index("train.iterations=100000")] = f"train.iterations={reached + 1}"
    again = subprocess.run(
        [*TORCHRUN, *run, "--resume", *settings],
        cwd=checkout,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert (
        f"resuming at iteration {reached}; changed: train.iterations {reached + 1} (was 100000)"
        in again.stdout
    )
