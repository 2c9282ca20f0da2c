"""The work folder of a training, which one training at a time writes."""

from __future__ import annotations

import logging
import socket
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from sparse_seg.errors import TrainingError
from sparse_seg.files import holder_of, locked
from sparse_seg.processes import Processes

CONFIG, LOCK = "config.yaml", ".training.lock"
_LOG = logging.getLogger(__name__)


class FolderLock:
    """Keeps other trainings out of a work folder inside its context, or until the process ends.

    The first of the processes that train together holds it for all, so all call `take` together.
    """

    def __init__(self, work_dir: Path, processes: Processes) -> None:
        self.work_dir, self.processes = work_dir, processes
        self._held: ExitStack | None = None
        self._left: object = None  # what the folder was like when it was last let go

    def take(self, create: bool) -> bool:
        """Take the lock where it is not held yet. Returns whether this call took it.

        Args:
            create: the folder; else one that is not there needs no lock yet.

        Raises:
            TrainingError: another training has it, on this machine or on another one, or had it since this
                one let it go.
            OSError: the folder cannot be written, or its file system does not lock.
        """
        return self.processes.decided(lambda: self._take(create))

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._held is not None:
            self._left = self._stamp()
            self._held.close()
            self._held = None

    def _take(self, create: bool) -> bool:
        if self._held is not None or not (create or self.work_dir.exists()):
            return False
        path = self.work_dir / LOCK
        before = holder_of(path)
        with ExitStack() as held:
            if not held.enter_context(locked(path)):
                who = holder_of(path) or "another process"
                raise TrainingError(
                    f"{self.work_dir} is in use: {who} trains there; stop it first, or choose another "
                    "--work-dir"
                )
            if self._left not in (None, self._stamp()):
                raise TrainingError(f"another training has begun in {self.work_dir} meanwhile")
            self._held = held.pop_all()
        if before and not before.endswith(f" on {socket.gethostname()}"):
            _LOG.warning("warning: %s trained in %s and was killed, it seems", before, self.work_dir)
        return True

    def _stamp(self) -> tuple[int, ...]:
        """Changes with each training that begins in the folder: each writes its config."""
        try:
            found = (self.work_dir / CONFIG).stat()
        except FileNotFoundError:
            return ()
        return found.st_ino, found.st_mtime_ns
