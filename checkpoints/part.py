"""A checkpoint that is being written: it gets its name when it is whole, and goes on where it was stopped.

    DST.part/
      .conversion         what is made of what: what another conversion left is not gone on with
      .written.0-of-1     a line for each tensor that is on the disk: its name, its checksum
      checkpoint/         the files themselves, in full size from the beginning, with holes; DST when it is whole

Several machines may each write a share: `.written.1-of-4` is the second of four's. All that is looked at and changed of more
than one's own share happens under one lock, `DST.lock`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32

from checkpoints.folder import CheckpointError, flush, flush_one
from checkpoints.journal import Journal, noted
from data_tools.errors import DataError
from data_tools.lock import Lock

MARK, _WRITTEN = ".conversion", ".written."
_WAIT_SECONDS = 10.0  # for another share that looks at the folder
_ANOTHER = "give another target"
_ALONE = "leave out --shard, or give a target on another file system"
_SAMPLE = 1 << 16  # bytes at the beginning, the middle and the end of a file, by which it is known
Shard = tuple[int, int]
WHOLE: Shard = (0, 1)
Tell = Callable[[str, str], None]  # told a word of what was found, and what


class Stopped(CheckpointError):
    """Nothing is wrong with the checkpoints: what was written is kept, and the same command goes on with it."""


class Busy(CheckpointError):
    """Another process is at it."""


class Damaged(CheckpointError):
    """Tensors are not as they were written: `names`."""

    def __init__(self, what: str, fix: str, names: Collection[str]):
        super().__init__(what, fix)
        self.names = names


class Part:
    """The folder `path`, under construction, and what is known of it."""

    def __init__(self, folder: Path, shard: Shard = WHOLE):
        self.folder, self.shard = folder, shard
        self.path = folder.with_name(folder.name + ".part")
        self.checkpoint = self.path / "checkpoint"
        self._lock = folder.with_name(folder.name + ".lock")
        self._journal: Journal | None = None

    def written(self) -> dict[str, dict[str, Any]]:
        """What is written already, by tensor, of all shares; but for what this process wrote last it is on the disk.

        Raises:
            CheckpointError: two shares say otherwise of one tensor.
        """
        found: dict[str, dict[str, Any]] = {}
        own = self._journal.noted if self._journal else []
        for lines in (own, *map(noted, sorted(self.path.glob(f"{_WRITTEN}*")))):
            for one in lines:
                if found.setdefault(one["name"], one) != one:
                    raise CheckpointError(
                        f"{one['name']} was read in two ways by two shares of this conversion",
                        f"remove {self.path}, and begin anew",
                    )
        return found

    @property
    def _noted(self) -> Path:
        return self.path / "{}{}-of-{}".format(_WRITTEN, *self.shard)

    def _of_others(self) -> list[str]:
        """The other shares that have written something."""
        paths = sorted(path for path in self.path.glob(f"{_WRITTEN}*") if path != self._noted and any(noted(path)))
        return [path.name.removeprefix(_WRITTEN).replace("-of-", "/") for path in paths]

    def journal(self, files: Iterable[Path]) -> Journal:
        """Where the tensors are noted that are in `files`, until `settle`."""
        self._journal = Journal(self._noted, files)
        return self._journal

    def settle(self) -> None:
        """What the journal noted is on the disk."""
        journal, self._journal = self._journal, None
        if journal:
            journal.close()

    def tidy(self, kept: Collection[Path]) -> None:
        """Remove all other files of the checkpoint, such as one that was half copied."""
        for path in sorted(self.checkpoint.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path not in kept:
                path.unlink()

    # ---- alone

    @contextmanager
    def alone(self, seconds: float = 0.0) -> Iterator[None]:
        """Under the lock; waits so long for it.

        Raises:
            Busy: another process has it.
        """
        until = time.monotonic() + seconds
        while True:
            try:
                lock = Lock(self._lock)
                break
            except DataError as error:
                if time.monotonic() >= until:
                    raise Busy(f"{self.folder}: {error.what}", f"wait for it, or {_ANOTHER}") from error
                time.sleep(0.1)
        try:
            yield
        finally:
            lock.release()

    def _share(self, shard: Shard) -> Path:
        return self.folder.with_name("{}.{}-of-{}.lock".format(self.folder.name, *shard))

    def _others(self) -> list[str]:
        """The shares that processes are writing now."""
        busy = []
        for path in self.folder.parent.glob(f"{escape(self.folder.name)}.*-of-*.lock"):
            if path != self._share(self.shard):
                try:
                    Lock(path).release()
                except DataError:
                    busy.append(path.name.removeprefix(f"{self.folder.name}.").removesuffix(".lock").replace("-of-", "/"))
        return busy

    # ---- beginning and ending

    @contextmanager
    def begun(self, plan: Mapping[str, Any], tell: Tell) -> Iterator[None]:
        """The folder is there: as a conversion of the same `plan` left it, else empty.

        Raises:
            CheckpointError: something is in the way that no conversion left, or others write it.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if self.shard == WHOLE:
            with self.alone():
                if busy := self._others():
                    raise CheckpointError(
                        f"{self.folder}: another process is writing share {' and '.join(busy)} of it",
                        f"wait for it, or {_ANOTHER}",
                    )
                self._begin(plan, tell)
                with self.kept_if_stopped():
                    try:
                        yield
                    finally:
                        self.settle()
            return
        with self.alone(_WAIT_SECONDS):
            try:
                lock = Lock(self._share(self.shard))
            except DataError as error:
                raise CheckpointError(
                    f"{self.folder}: {error.what}, share {self.shard[0]}/{self.shard[1]}",
                    "another --shard, or wait for it",
                ) from error
            try:
                if not lock.is_real:
                    raise CheckpointError(f"the file system of {self.folder} has no locks, without which shares get in each other's way", _ALONE)
                self._begin(plan, tell)
            except BaseException:
                lock.release()
                raise
        try:
            yield
        finally:
            try:
                self.settle()
            finally:
                lock.release()

    @contextmanager
    def kept_if_stopped(self) -> Iterator[None]:
        """What a refused conversion leaves is removed, but for other shares' work; what a stopped one leaves is kept, where any
        of it is of use."""
        try:
            yield
        except (KeyboardInterrupt, MemoryError, OSError, Stopped):
            if not self.written():
                self._remove()
            raise
        except BaseException:
            if not self._of_others():
                self._remove()
            raise

    def forget(self, names: Collection[str] | None = None) -> None:
        """These tensors are not written; by default none is, whoever wrote it."""
        self.settle()
        for path in self.path.glob(f"{_WRITTEN}*"):
            kept = "" if names is None else "".join(json.dumps(one) + "\n" for one in noted(path) if one["name"] not in names)
            if not kept:
                path.unlink()
                continue
            beside = path.with_name(f"{MARK}.{os.getpid()}")
            beside.write_text(kept, encoding="utf-8")
            flush_one(beside)
            beside.replace(path)

    def forget_own(self) -> None:
        """Nothing of this share is written."""
        self.settle()
        self._noted.unlink(missing_ok=True)

    def _remove(self) -> None:
        """Remove the folder, the mark last: what is left of it, should this be stopped, is known as a conversion's."""
        self.forget()
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        for path in sorted(self.path.glob(f"{MARK}*"), reverse=True):
            path.unlink()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _begin(self, plan: Mapping[str, Any], tell: Tell) -> None:
        part, mark = self.path, self.path / MARK
        expect_free(self.folder, ())  # others may have ended the conversion while this one waited for the lock
        if part.is_symlink() or part.exists():
            if part.is_symlink() or not part.is_dir() or not mark.is_file() and any(not one.name.startswith(MARK) for one in part.iterdir()):
                raise CheckpointError(f"{part} is in the way, and no conversion left it", f"move it away, or {_ANOTHER}")
            if why := _otherwise(mark, plan):
                if self.shard != WHOLE and (busy := self._others()):
                    what = f"{self.folder}: share {' and '.join(busy)} of it is being written of something else: {why}"
                    raise CheckpointError(what, f"wait for it, or {_ANOTHER}")
                if kept := self._of_others():
                    what = f"{self.folder}: share {' and '.join(kept)} of it is written of something else: {why}"
                    raise CheckpointError(what, f"the source and the options of these, or remove {part} and convert them anew")
                if self.written():
                    tell("anew", why)
                self._remove()
        part.mkdir(exist_ok=True)
        beside = part / f"{MARK}.{os.getpid()}"
        beside.write_text(json.dumps(plan, indent=1), encoding="utf-8")
        flush_one(beside)
        beside.replace(mark)
        self.checkpoint.mkdir(exist_ok=True)

    def commit(self) -> None:
        """Give it its name, when all of it is on the disk."""
        self.settle()
        flush(self.checkpoint)
        try:
            self.checkpoint.rename(self.folder)
        except OSError as error:
            inside = next(iter(sorted(self.folder.iterdir())), self.folder) if self.folder.is_dir() else self.folder
            what = f"all is written, and cannot get the name {self.folder}: {inside} is in the way" if inside.exists() else str(error)
            raise Stopped(what, "move that away; the same command goes on with what is written") from error
        flush_one(self.folder.parent)
        self._remove()
        self._others()  # of those that were killed the locks are removed


def _otherwise(mark: Path, plan: Mapping[str, Any]) -> str:
    """What another plan than this one wrote the folder; nothing where it is the same."""
    try:
        other = json.loads(mark.read_text(encoding="utf-8"))
        then = {group: dict(other[group]) for group in plan}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "what is there says no plan that is known"
    now = json.loads(json.dumps(plan))
    for group, what in (("source", "{} has changed since"), ("options", "{} was {}, and is {}"), ("files", "{} is planned otherwise")):
        keys = [key for key in {**then[group], **now[group]} if then[group].get(key) != now[group].get(key)]
        if keys:
            key = keys[0]
            return what.format(key, then[group].get(key), now[group].get(key)) + (f", and {len(keys) - 1} more" if len(keys) > 1 else "")
    return "" if then == now else "it was planned otherwise"


def expect_free(folder: Path, sources: Iterable[Path]) -> None:
    """A target that may be written.

    Raises:
        CheckpointError: it is there already and holds something, or is or lies in one of `sources` or the reverse.
    """
    if folder.name in ("", "..") or folder.is_symlink():
        kind = "a link" if folder.is_symlink() else "no name"
        raise CheckpointError(f"{folder} is {kind}: what is converted gets a folder of its own", _ANOTHER)
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is there already", f"{_ANOTHER}, or move that away")
    part = Part(folder).path
    for source in sources:
        whence, to, by = source.resolve(), folder.resolve(), part.resolve()
        if whence in (to, *to.parents) or to in whence.parents or by in (whence, *whence.parents):
            raise CheckpointError(f"{source} is what is read, and it would be written into: {folder} is written as {part} first", _ANOTHER)


def fingerprint(folders: Sequence[Path], files: Iterable[Path] = ()) -> dict[str, list[int]]:
    """Of every file of these folders its size in bytes, when it was last changed, in nanoseconds, and a checksum of some of it: by
    these a changed one is noticed. Names are relative: machines may have a folder at several places."""
    found = {}
    for number, folder in enumerate(folders):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            found[f"{number}:{path.relative_to(folder)}" if number else str(path.relative_to(folder))] = _known(path)
    for path in sorted(set(files)):
        if not any(path.is_relative_to(folder) for folder in folders):
            found[f"{path.parent.name}/{path.name}"] = _known(path)
    return found


def _known(path: Path) -> list[int]:
    known, crc = path.stat(), 0
    with open(path, "rb") as file:
        for at in (0, known.st_size // 2, known.st_size - _SAMPLE):
            file.seek(max(0, at))
            crc = crc32(file.read(_SAMPLE), crc)
    return [known.st_size, known.st_mtime_ns, crc]
