"""Writing files so that a reader sees the old content or the new, never half of it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path`, as `atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name to write to, in the folder of `path`, which is created if need be.

    On leaving, the content is forced to disk and replaces `path` in one step, so that not even a power
    failure leaves half of it. On failure it is removed and `path` is as it was. Each `path` has one temporary
    name, `.NAME.tmp`: a killed process leaves at most that, and the next write uses it again. Processes that
    write the same `path` take turns. Raises OSError where the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
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


def _locked(temporary: Path) -> int:
    """Create or take over a temporary file; waits for another process that is writing to it."""
    while True:
        # not tempfile.mkstemp: its files are readable by their owner alone, whatever the umask
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is(temporary, file):
                os.ftruncate(file, 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the other one renamed or removed it meanwhile


def _is(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


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
