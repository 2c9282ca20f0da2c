"""Jobs of two processes, one of which is killed: `python -m tests.training.kills NUMBER ...`.

Each number is a seed, of the process and the moment: after all have joined or, of odd numbers, after the
first checkpoint. Adds a row for each to `docs/results/kills.json`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sparse_seg.data.scenes import write_scenes
from sparse_seg.files import atomic_write
from sparse_seg.lab.provenance import provenance
from sparse_seg.training.checkpoint import load_state

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "docs/results/kills.json"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
LIGHT = ["--device", "cpu", "--set", "train.batch_size=2", "data.crop=[64,64]", "data.workers=0"]
LIGHT += ["model.width=0.125", "train.threads=1", "train.log_every=1", "train.warmup_iterations=0"]
LONGEST = 15.0  # seconds


def make_checkout(folder: Path) -> Path:
    """A folder in which commands of the docs find what they name."""
    for name in ("tools", "configs"):
        (folder / name).symlink_to(ROOT / name)
    write_scenes(folder / "scenes", 10, (64, 96), val_fraction=0.3)
    return folder


def start_job(checkout: Path, *settings: str, resume: bool = False) -> subprocess.Popen[str]:
    run = ["--standalone", "--nproc_per_node=2", "tools/train.py", "configs/demo.yaml", "--work-dir", "run"]
    more = ["--resume"] if resume else []
    light = [*LIGHT, f"data.root={checkout / 'scenes'}", *settings]
    pipe = subprocess.PIPE
    command = [*TORCHRUN, *run, *more, *light]
    return subprocess.Popen(command, cwd=checkout, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True)


def processes_of(job: subprocess.Popen[str]) -> list[int]:
    """By rank, those that listen to SIGTERM, as they do from when they join on."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    found = [int(pid) for pid in children if b"tools/train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    caught = [Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0] for pid in found]
    return [pid for pid, mask in zip(found, caught, strict=True) if int(mask, 16) >> signal.SIGTERM - 1 & 1]


def kill(job: subprocess.Popen[str], rank: int) -> tuple[str, dict[str, Any]]:
    """Kill a process of a job. Returns what the job has said, and the seconds from then to its end, its code,
    and our lines and torchrun's of kills of its own."""
    os.kill(processes_of(job)[rank], signal.SIGKILL)
    killed = time.monotonic()
    said, errors = job.communicate(timeout=600)
    seconds = time.monotonic() - killed
    lines = [one for one in errors.splitlines() if one.startswith("error: ") or "forcefully exiting" in one]
    return said, {"seconds": seconds, "code": job.returncode, "lines": lines}


def resume(checkout: Path) -> str:
    """Resume a job that saves in `run` for one more step; returns what it says."""
    last = checkout / "run/last.pt"
    reached = load_state(last)["progress"]["iteration"] if last.exists() else 0
    job = start_job(checkout, f"train.iterations={reached + 1}", resume=last.exists())
    said, problem = job.communicate(timeout=600)
    assert job.returncode == 0, problem
    return said


def kill_at_random(number: int) -> dict[str, Any]:
    rng = random.Random(number)
    moment, rank = rng.uniform(0, LONGEST), rng.randrange(2)
    with tempfile.TemporaryDirectory() as folder:
        checkout = make_checkout(Path(folder))
        settings = "train.iterations=100000", "train.eval_every=20", "train.save_every=5"
        job = start_job(checkout, *settings)
        while len(processes_of(job)) < 2 or (number % 2 and not (checkout / "run/last.pt").exists()):
            time.sleep(0.05)
        time.sleep(moment)
        found = kill(job, rank)[1] | {"resumed": resume(checkout)}
    return {"number": number, "moment": moment, "rank": rank} | found


if __name__ == "__main__":
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    for argument in sys.argv[1:]:
        rows = [row for row in rows if row["number"] != int(argument)] + [kill_at_random(int(argument))]
        print(rows[-1], flush=True)
        result = provenance() | {"command": "python -m tests.training.kills NUMBER ...", "rows": rows}
        atomic_write(RESULT, json.dumps(result, indent=1) + "\n")
