"""A folder of checkpoints, laid out as Megatron-LM lays it out.

    checkpoints/
      latest_checkpointed_iteration.txt     the digits of the newest whole one
      best_checkpointed_iteration.txt       those of the best one, in a fine-tuning that keeps it
      iter_0001000/                         a whole checkpoint
      iter_0002000.part/                    one that is being written, or whose writer died

A checkpoint is written into its `.part` folder, renamed when it is whole, and named by the tracker last. Whoever reads
the tracker, or sees a folder without `.part`, sees a whole checkpoint.
"""

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

TRACKER = "latest_checkpointed_iteration.txt"
BEST = "best_checkpointed_iteration.txt"  # ours, of the same form
MANIFEST = "conversion.json"  # what a conversion writes beside the weights
RELEASE = "release"  # Megatron-LM's name for weights that no training of this folder made
_ASIDE = f"move {MANIFEST} elsewhere, if nothing else is wrong with the weights"
_NAME = re.compile(r"iter_(\d{7,})")


class CheckpointError(ValueError):
    """A checkpoint that is missing or cannot be used; the message names the path and what is wrong with it, `fix` the mend. Names out of
    files may hold what no terminal shows, or would take for a command: it is shown as Python would write it."""

    def __init__(self, what: str, fix: str = ""):
        super().__init__("".join(one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in what))
        self.fix = fix


class UnsaidError(CheckpointError):
    """Nothing is wrong with a checkpoint, but its files do not say something that nobody should guess."""


def name_of(iteration: int) -> str:
    """`iter_0001000` for 1000."""
    return f"iter_{iteration:07d}"


def iteration_of(checkpoint: Path) -> int:
    """1000 for `.../iter_0001000`; Megatron-LM's `release` counts as 0."""
    if checkpoint.name == RELEASE:
        return 0
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint} is no checkpoint: its name is not iter_ and digits")
    return int(match[1])


def holds_weights_alone(checkpoint: Path) -> bool:
    """Whether it is one that was converted or is another tool's, by its name: no optimizer, no random state, no step."""
    return _NAME.fullmatch(checkpoint.name) is None


def is_checkpoint(path: Path) -> bool:
    """Whether a folder has the name of a checkpoint, `iter_0001000` or `release`: what it is in holds a run or a model."""
    return bool(_NAME.fullmatch(path.name)) or path.name == RELEASE


def read_object(path: Path, fix: str) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        CheckpointError: it cannot be read, or is something else; `fix` is the mend.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", fix) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no object", fix)
    return found


def manifest(folder: Path) -> dict[str, Any]:
    """What a conversion wrote beside the weights: empty where none did.

    Raises:
        CheckpointError: what is there cannot be read, or is not of the form in which conversions write it.
    """
    path = folder / MANIFEST
    found = read_object(path, _ASIDE) if path.is_file() else {}
    if wrong := [key for key in ("model", "tensors", "left_out") if not isinstance(found.get(key, {}), dict)]:
        raise CheckpointError(f"{path} is damaged: its {wrong[0]} is no object", _ASIDE)
    if wrong := [name for name, one in found.get("tensors", {}).items() if not isinstance(one, dict)]:
        raise CheckpointError(f"{path} is damaged: {wrong[0]} is no object", _ASIDE)
    return found


def whole_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()), key=iteration_of)


def has_checkpoints(folder: Path) -> bool:
    """Whether anything was saved in a folder of checkpoints: it holds a tracker or a whole checkpoint."""
    return (folder / TRACKER).exists() or bool(whole_checkpoints(folder))


def newest_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: an iter_ folder itself, or the newest of a checkpoints folder or a run folder.

    Raises:
        CheckpointError: nothing is there, or the tracker names a checkpoint that is not there.
    """
    if is_checkpoint(path):
        if path.is_dir():
            return path
        raise CheckpointError(f"there is no checkpoint {path}")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    tracker, whole = folder / TRACKER, whole_checkpoints(folder)
    there = ", ".join(path.name for path in whole)
    fix = f"to go on from step {iteration_of(whole[-1])}: echo {iteration_of(whole[-1])} > {shlex.quote(str(tracker))}" if whole else ""
    if not tracker.is_file():
        without = f"nothing says which checkpoint is the newest in {folder}" if there else f"there is no whole checkpoint in {path}"
        lacks = f"it holds no {TRACKER}" if folder.is_dir() else "it is a file" if folder.exists() else "there is no such folder"
        raise CheckpointError(f"{without}: {lacks}" + (f" (there: {there})" if there else ""), fix)
    word = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if word != RELEASE and not word.isdecimal():
        raise CheckpointError(f"{tracker} should hold the number of an iteration, and holds {word[:40]!r}", fix)
    checkpoint = folder / (RELEASE if word == RELEASE else name_of(int(word)))
    if not checkpoint.is_dir():
        raise CheckpointError(f"{tracker} names {checkpoint.name}, which is not there (there: {there or 'none'})", fix)
    return checkpoint


def begin(folder: Path, iteration: int) -> Path:
    """An empty `.part` folder to write a checkpoint into; what dead writers left is removed (a run has one writer)."""
    part = folder / (name_of(iteration) + ".part")
    for left in folder.glob("iter_*.part"):
        shutil.rmtree(left)
    part.mkdir(parents=True)
    return part


def commit(part: Path) -> Path:
    """Make a written checkpoint count: flush it to the disk, rename it, then move the tracker. Returns its folder."""
    flush(part)
    checkpoint = part.with_name(part.name.removesuffix(".part"))
    before = None
    if checkpoint.exists():  # the same iteration saved again; renamed, so that removing it takes no time in which none is there
        before = checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.before.part"))
    part.rename(checkpoint)
    flush_one(checkpoint.parent)
    _track(checkpoint.parent / TRACKER, iteration_of(checkpoint))
    if before:
        shutil.rmtree(before)
    return checkpoint


def flush(folder: Path) -> None:
    """See to it that all that a folder holds is on the disk, not in memory alone."""
    for path in (*sorted(folder.rglob("*")), folder):
        if path.is_file() or path.is_dir():
            flush_one(path)


def mark_best(folder: Path, iteration: int) -> None:
    """Say which whole checkpoint is the best one."""
    _track(folder / BEST, iteration)


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `mark_best` named last; None where it never did, or where that is gone."""
    best = folder / BEST
    found = folder / name_of(int(best.read_text(encoding="utf-8"))) if best.is_file() else None
    return found if found and found.is_dir() else None


def _track(tracker: Path, iteration: int) -> None:
    beside = tracker.with_name(tracker.name + ".part")
    beside.write_text(str(iteration), encoding="utf-8")
    flush_one(beside)
    beside.replace(tracker)


def keep_last(folder: Path, count: int) -> list[Path]:
    """Remove all but the `count` newest whole checkpoints; never the one that the tracker names, nor the best. Returns what
    went."""
    kept = {newest_checkpoint(folder), best_checkpoint(folder)}
    gone = [path for path in whole_checkpoints(folder)[: -max(count, 1)] if path not in kept]
    for path in gone:
        # Renamed first, so that a reader never meets a checkpoint that is half removed.
        dying = path.rename(path.with_name(path.name + ".part"))
        shutil.rmtree(dying)
    return gone


def flush_one(path: Path) -> None:
    """See to it that a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
