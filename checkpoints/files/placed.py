"""Files whose sizes are known before they are written: at any place, in any order, by any number of processes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from checkpoints.files.stored import Buffer

_MOST_OPEN = 200  # files: a process may usually have 1024


@dataclass(frozen=True)
class Place:
    """A byte of a file, by the file's name."""

    file: str
    at: int


class Placed:
    """The files of a folder, by their names relative to it, with their sizes in bytes."""

    def __init__(self, folder: Path, sizes: Mapping[str, int]):
        self.folder, self.sizes = folder, sizes
        self._open: dict[tuple[str, int], int] = {}
        self._lock = Lock()

    def paths(self) -> list[Path]:
        """Where they are."""
        return [self.folder / name for name in self.sizes]

    def create(self) -> None:
        """See to it that each is there in its full size. What is in it stays."""
        for name, size in self.sizes.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                path.chmod(path.stat().st_mode | 0o200)  # a file that was finished may be read-only
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                if os.fstat(descriptor).st_size != size:
                    os.ftruncate(descriptor, size)
            finally:
                os.close(descriptor)

    def absent(self) -> list[str]:
        """Those that are not there, or of another size."""
        return [name for name, size in self.sizes.items() if not (path := self.folder / name).is_file() or path.stat().st_size != size]

    def missing(self) -> int:
        """Bytes that the disk still has to hold: a file's holes take none."""
        there = {path: path.stat().st_blocks * 512 for name in self.sizes if (path := self.folder / name).is_file()}
        return sum(max(0, size - there.get(self.folder / name, 0)) for name, size in self.sizes.items())

    def write(self, place: Place, contents: Sequence[Buffer]) -> None:
        """Write one thing after another from a place on. Threads may do so side by side."""
        at, descriptor = place.at, self._descriptor(place.file, os.O_WRONLY)
        if at + sum(len(content) for content in contents) > self.sizes[place.file]:
            raise ValueError(f"{place.file} was announced with {self.sizes[place.file]} bytes")
        for content in contents:
            view = memoryview(content)
            while view:
                written = os.pwrite(descriptor, view, at)  # at most 2 GiB at once
                at, view = at + written, view[written:]

    def read(self, place: Place, size: int) -> bytes:
        """Bytes that were written."""
        return os.pread(self._descriptor(place.file, os.O_RDONLY), size, place.at)

    def _descriptor(self, file: str, mode: int) -> int:
        """For writing alone: NFS writes whole pages of a file that it may also read, with what other machines wrote beside."""
        with self._lock:
            if (file, mode) not in self._open:
                self._open[file, mode] = os.open(self.folder / file, mode)
            return self._open[file, mode]

    def relax(self) -> None:
        """Close all files where many are open; nobody may be writing."""
        if len(self._open) > _MOST_OPEN:
            self.close()

    def close(self) -> None:
        """Close all files; nobody may be writing."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
