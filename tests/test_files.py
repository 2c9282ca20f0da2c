"""Atomic writes: whole files, parent folders, on disk before they are seen, nothing left; and locks."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from sparse_seg.files import (
    OverwriteError,
    atomic_path,
    atomic_write,
    check_outputs,
    holder_of,
    locked,
    overwritten,
)


@pytest.mark.parametrize(("data", "content"), [(b"\x00\xff", b"\x00\xff"), ("é\n", "é\n".encode())])
def test_writes_bytes_or_text_and_creates_folders(tmp_path: Path, data: bytes | str, content: bytes) -> None:
    path = tmp_path / "new" / "folder" / "file"
    atomic_write(path, data)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_replaces_and_honours_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "file"
    previous = os.umask(0o027)
    try:
        atomic_write(path, "old")
        atomic_write(str(path), "new")
    finally:
        os.umask(previous)
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_failure_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(failure)):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_errors_name_the_file_asked_for(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as caught:
        atomic_write(tmp_path, "a folder is there")
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path), None)


def test_failed_encoding_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        atomic_write(tmp_path / "file", "\ud800")
    assert not list(tmp_path.iterdir())


def test_content_is_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def note_sync(file: int) -> None:
        done.append("folder" if os.path.samestat(os.fstat(file), tmp_path.stat()) else "content")
        sync(file)

    def note_replace(source: Path, target: Path) -> None:
        assert Path(source).read_text() == "whole"
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    atomic_write(tmp_path / "file", "whole")
    assert done == ["content", "rename", "folder"]


FORK = multiprocessing.get_context("fork")  # processes that need not import all this again


def write_slowly(path: Path, seconds: float, content: str, half: Event) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        half.set()
        time.sleep(seconds)
        temporary.write_text(content)


def start_writer(path: Path, seconds: float, content: str) -> ForkProcess:
    half = FORK.Event()
    process = FORK.Process(target=write_slowly, args=(path, seconds, content, half))
    process.start()
    assert half.wait(60)
    return process


@pytest.mark.slow
def test_kills_leave_one_hidden_file_at_most_which_the_next_write_uses(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")
    for _ in range(3):
        process = start_writer(path, 600, "new")
        process.kill()
        process.join()
        assert path.read_text() == "old"
        assert {entry.name for entry in tmp_path.iterdir()} == {"file", ".file.tmp"}
    atomic_write(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_writers_of_one_file_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "file"
    process, started = start_writer(path, 0.5, "first"), time.monotonic()
    with atomic_path(path) as temporary:  # waits
        assert time.monotonic() - started > 0.2
        assert path.read_text() == "first"
        temporary.write_text("second")
    process.join()
    assert process.exitcode == 0
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_outputs_and_inputs(tmp_path, monkeypatch):
    """A file is the same under all its names; what does not exist is no input."""
    monkeypatch.chdir(tmp_path)
    Path("a").write_text("")
    Path("folder").mkdir()
    os.link("a", "hard")
    os.symlink("../a", "folder/soft")
    os.symlink("nothing", "dangling")
    for name in ("a", "hard", "folder/soft", tmp_path / "folder/../a"):
        assert overwritten([name, "b"], ["c", "a"]) == Path("a")
    assert overwritten(["b", "dangling"], ["b", "a", "dangling"]) is None
    with pytest.raises(
        OverwriteError, match=r"^hard is an input and would be overwritten; name another output$"
    ):
        check_outputs(["a"], ["hard"])
    for names in (["b", "folder/../b"], ["a", "folder/soft"]):
        with pytest.raises(OverwriteError, match="two outputs would be written to folder"):
            check_outputs(names, [])
    check_outputs(["a", "b"], ["c"])


def hold(path: Path, told: Connection) -> None:
    """A lock, past a forked process that ends; another one lives on."""
    with locked(path):
        gone = FORK.Process(target=int)
        gone.start()
        gone.join()
        child = FORK.Process(target=time.sleep, args=(600,))
        child.start()
        told.send(child.pid)
        time.sleep(600)


@pytest.mark.slow
def test_a_lock_ends_with_its_process_though_a_forked_one_lives_on(tmp_path: Path) -> None:
    """As data workers do for some seconds; nor does one that ends take the lock away."""
    path = tmp_path / "folder/lock"
    told, tells = FORK.Pipe(duplex=False)
    holder = FORK.Process(target=hold, args=(path, tells))
    holder.start()
    child = told.recv()
    try:
        with locked(path) as free:
            assert not free
        assert holder_of(path) == f"process {holder.pid} on {socket.gethostname()}"
        holder.kill()
        holder.join()
        assert path.exists(), "what a kill leaves behind"
        with locked(path) as free:
            assert free
            assert holder_of(path) == f"process {os.getpid()} on {socket.gethostname()}"
            with locked(path) as second:
                assert not second
        assert list(path.parent.iterdir()) == []
        assert holder_of(path) == ""
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_whoever_waits_for_a_lock_gets_it_when_it_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    order: list[object] = []

    def second() -> None:
        with locked(path, wait=True) as free:
            order.append(free)

    thread = threading.Thread(target=second)
    with locked(path):
        thread.start()
        order.append("first")
    thread.join(60)
    assert order == ["first", True]
    assert not path.exists()
