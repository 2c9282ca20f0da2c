"""docs/several-gpus.md, followed to the letter on two processes; and what a kill does."""

import os
import re
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from threading import Timer

import pytest
from torch.distributed import HashStore

from sparse_seg import processes
from sparse_seg.errors import TrainingError
from sparse_seg.processes import ProcessLost
from sparse_seg.training.checkpoint import load_state
from tests.training.kills import ENVIRONMENT, LIGHT, ROOT, TORCHRUN, kill, make_checkout, start_job

PAGE = (ROOT / "docs/several-gpus.md").read_text()
SHORT = [*LIGHT, "train.iterations=4", "train.eval_every=2"]


def commands() -> list[list[str]]:
    block = re.search(r"test_several_gpus\.py -->\n```bash\n(.*?)```", PAGE, re.S)
    assert block is not None
    return [line.split() for line in block[1].splitlines()]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path)


@pytest.mark.slow
def test_the_page_is_followed_to_the_letter(checkout: Path) -> None:
    said = []
    for name, *arguments in commands():
        assert name == "torchrun"
        light = [*SHORT, f"data.root={checkout / 'scenes'}"]
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


@pytest.mark.slow
def test_a_killed_process_ends_the_job_with_one_line_and_it_resumes(checkout: Path) -> None:
    settings = "train.iterations=100000", "train.eval_every=1000", "train.save_every=2"
    last, saved = checkout / "run/last.pt", 0
    for rank in (0, 1):
        job = start_job(checkout, *settings, resume=rank > 0)
        while not last.exists() or last.stat().st_mtime_ns == saved:
            assert job.poll() is None, job.communicate()[1]
            time.sleep(0.1)
        (said, found), saved = kill(job, rank), last.stat().st_mtime_ns
        assert found["code"] == 1
        (line,) = found["lines"]  # and none of torchrun, which after 30 s kills what does not end
        assert re.match(
            r"error: another process of this job has ended( or cannot be reached \(.*\))?; ", line
        )
        assert "run/last.pt" in line
        assert "resume with --work-dir run --resume" in line
        assert bool(re.search(r"^resuming at iteration \d+$", said, re.M)) == (rank > 0)
    assert load_state(last)["progress"]["iteration"] > 2


def test_a_process_that_waits_to_join_hears_that_another_one_has_ended() -> None:
    store, before = HashStore(), signal.signal(signal.SIGTERM, processes._end)
    try:
        Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        start = time.monotonic()
        with pytest.raises(ProcessLost, match="another process of this job has ended; start it again"):
            processes._interruptible(lambda: store.wait(["never"], timedelta(minutes=4)))
        assert time.monotonic() - start < 120, "before the wait ends by itself"
    finally:
        store.set("never", "")  # the thread ends
        signal.signal(signal.SIGTERM, before)


def test_a_signal_does_not_replace_an_error_that_is_on_its_way_out() -> None:
    """torchrun sends it once a process has ended, when the others may be about to say what they saved."""

    def stopped() -> None:
        try:
            raise TrainingError("what was saved")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, processes._end)
    try:
        with pytest.raises(TrainingError, match=r"^what was saved$"):
            stopped()
        with pytest.raises(ProcessLost, match="start it again"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_fails_in_a_thread_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        processes._interruptible(lambda: 1 // 0)


def test_of_several_processes_one_speaks_the_first_if_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    store, first = HashStore(), list[bool]()
    Timer(0.2, lambda: first.append(processes._speaks(store, waits=False))).start()
    assert [processes._speaks(store, waits) for waits in (True, False)] == [False, False]
    assert first == [True]
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    assert processes._speaks(HashStore(), waits=True)
