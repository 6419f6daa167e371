"""One writer at a time for an output."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from data_tools.errors import DataError


class Lock:
    """A lock file that is there while its holder writes; the kernel frees it with the process, however that dies.

    Raises:
        DataError: another process holds it.
    """

    def __init__(self, path: Path):
        self._path, self.is_real = path, True  # false where the file system has no locks, and others may be at it all the same
        while True:
            self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  open as long as the lock is held
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._taken() from None
            except OSError:
                self.is_real = False  # some mounts of Lustre and NFS: go on as if alone
            if self._is_there():
                break
            self._file.close()  # its holder removed it between our opening and our locking it
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()}\n")
        self._file.flush()

    def _taken(self) -> DataError:
        self._file.seek(0)
        owner = self._file.read().strip() or "pid unknown"
        self._file.close()
        return DataError(f"another process is writing this output: {owner}", str(self._path), "wait until it is done, or write somewhere else")

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the file, then let go of it. Harmless when done twice."""
        if not self._file.closed:
            self._path.unlink(missing_ok=True)
            self._file.close()
