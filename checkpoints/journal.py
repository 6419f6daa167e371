"""The tensors that a conversion has written, a line of JSON each."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from checkpoints.folder import flush_one

SYNC_SECONDS = 10.0  # between two flushings of what is written to the disk: so much work a kill or a lost machine costs


class Journal:
    """The tensors that are written, a line each, which comes after the tensor is on the disk. Flushing is done beside."""

    def __init__(self, path: Path, files: Iterable[Path]):
        self._file = open(path, "a+b")  # noqa: SIM115  closed by `close`
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)  # a line that was cut off is none
        self._files, self._lines = tuple(files), []
        self.noted: list[dict[str, Any]] = []  # all of its own, on the disk or not yet
        self._beside, self._since = ThreadPoolExecutor(1), time.monotonic()
        self._syncing: Future[None] = self._beside.submit(self._sync, [])

    def note(self, line: Mapping[str, Any]) -> None:
        """A tensor is written."""
        self._lines.append(json.dumps(line) + "\n")
        self.noted.append(json.loads(self._lines[-1]))
        if self._syncing.done() and time.monotonic() - self._since >= SYNC_SECONDS:
            self._syncing.result()  # raises what went wrong
            self.flush()

    def flush(self) -> None:
        """Have all that is written flushed to the disk, and noted; it is when `close` returns."""
        lines, self._lines, self._since = self._lines, [], time.monotonic()
        self._syncing = self._beside.submit(self._sync, lines, self._syncing)

    def _sync(self, lines: list[str], before: Future[None] | None = None) -> None:
        if before:
            before.result()  # raises what went wrong
        for path in self._files if lines else ():
            flush_one(path)
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Note the last."""
        try:
            self.flush()
            self._syncing.result()
        finally:
            self._beside.shutdown()
            self._file.close()


def noted(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal, up to one that its writer did not end."""
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            one = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            return
        if not isinstance(one, dict):
            return
        yield one
