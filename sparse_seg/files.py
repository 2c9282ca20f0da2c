"""Writing files: never over an input, and so that a reader sees old content or new, never half; and locks."""

import fcntl
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparse_seg.errors import SparseSegError

_HELD: set[int] = set()  # files of locks that this process holds


class OverwriteError(SparseSegError):
    """A file to write is one that is read, or the same as another one to write."""


def overwritten(outputs: Iterable[str | Path], inputs: Iterable[str | Path]) -> Path | None:
    """The first of the inputs that one of the outputs would replace; None if there is none. Links, symbolic
    and hard, are the file they lead to."""
    written = {_identity(Path(path)) for path in outputs} - {None}
    return next((Path(path) for path in inputs if written and _identity(Path(path)) in written), None)


def check_outputs(outputs: Iterable[str | Path], inputs: Iterable[str | Path]) -> None:
    """Compare what a command writes with what it reads, before its work starts.

    Raises:
        OverwriteError: an output is an input, or two outputs are one file.
    """
    files = [Path(path) for path in outputs]
    if (lost := overwritten(files, inputs)) is not None:
        raise OverwriteError(f"{lost} is an input and would be overwritten; name another output")
    places = set[object]()
    for file in files:
        place = _identity(file) or os.path.abspath(file)
        if place in places:
            raise OverwriteError(f"two outputs would be written to {file}; name another one")
        places.add(place)


def _identity(path: Path) -> tuple[int, int] | None:
    """What is the same for all names of a file; None if it does not exist."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path`, as `atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_path(path: str | Path, keep_suffix: bool = False) -> Iterator[Path]:
    """A temporary name to write to, in the folder of `path`, which is created if need be.

    On leaving, the content is forced to disk and replaces `path` in one step, so that not even a power
    failure leaves half of it. On failure it is removed and `path` is as it was. Each `path` has one temporary
    name, `.NAME.tmp`: a killed process leaves at most that, and the next write uses it again. Processes that
    write the same `path` take turns. Raises OSError where the folder cannot be written.

    Args:
        keep_suffix: for writers that go by it: the name is then `.STEM.tmp.SUFFIX`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}") if keep_suffix else temporary_name(path)
    try:
        file = _locked(temporary)
    except OSError as error:
        raise _named(error, path) from None
    try:
        yield temporary
        os.fsync(file)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise _named(error, path) from None
        raise
    finally:
        os.close(file)


def temporary_name(path: Path) -> Path:
    """What `atomic_path` writes to."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def locked(path: str | Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file inside the context; yields False if another holder has it, unless told to wait.

    Its folder is created if need be. The file names the process that holds it (`holder_of`), and is removed
    at the end. The lock ends with its process, however that ends: a file that a kill leaves behind locks
    nothing. Raises OSError where the folder cannot be written, or its file system does not lock.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = _locked(path, wait)
    except BlockingIOError:
        yield False
        return
    except OSError as error:
        raise _named(error, path) from None
    _HELD.add(file)
    try:
        with suppress(OSError):  # a full disk: the lock holds without a name
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield True
    finally:
        if file in _HELD:  # not in a process that was forked meanwhile
            path.unlink(missing_ok=True)
            _HELD.remove(file)
            os.close(file)


def holder_of(path: str | Path) -> str:
    """`process PID on HOST` of a lock file, whether it still runs or was killed; empty without one."""
    try:
        return Path(path).read_text(errors="replace")
    except FileNotFoundError:
        return ""


def _leave_locks() -> None:
    """In a forked process, a data worker for instance: it may outlive the one that holds the locks."""
    for file in _HELD:
        os.close(file)
    _HELD.clear()


os.register_at_fork(after_in_child=_leave_locks)


def _locked(path: Path, wait: bool = True) -> int:
    """Create or take over a file, and empty it; waits for another process that has it locked, or raises
    BlockingIOError."""
    while True:
        # not tempfile.mkstemp: its files are readable by their owner alone, whatever the umask
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(file)):
                    os.ftruncate(file, 0)
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the other one renamed or removed it meanwhile


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` permanent."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _named(error: OSError, path: Path) -> OSError:
    """The error with the name that the caller knows."""
    return OSError(error.errno, error.strerror, str(path))
