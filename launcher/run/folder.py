"""A run's folder: what lies where, who may write there, and whether a recipe may go on with what is there."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import socket
import subprocess
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from checkpoints.folder import TRACKER, CheckpointError, has_checkpoints, iteration_of, newest_checkpoint
from data_tools.errors import TokenizerError
from launcher.errors import UserError, raise_all
from launcher.recipe.frozen import read_frozen, write_frozen
from launcher.recipe.keys import yaml_scalar
from launcher.recipe.schema import Recipe, Tokenizer
from launcher.recipe.tokenizer import tokenizer_of, with_copies
from launcher.run.changes import Change, classify
from launcher.whole import write_whole

_TOKENIZER_FILES = ("tokenizer_model", "vocab_file", "merge_file")


class UnreadableRecipe(UserError):
    """A frozen recipe that is damaged, or of another version of yuan."""


class RunFolder:
    """The paths of a run folder; nothing is created here. `open_run` makes, checks and locks one.

    Attributes:
        path: the folder itself.
        recipe: the frozen recipe that this machine's workers read.
        changes: after `open_run`, the safe changes a resumed run goes on with, one readable line each.
    """

    def __init__(self, path: Path | str, recipe_name: str = "recipe.yaml"):
        self.path = Path(path)
        self.recipe = self.path / recipe_name
        self.command = self.path / "command.txt"
        self.environment = self.path / "environment.json"
        self.logs = self.path / "logs"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.validation = self.path / "validation.jsonl"
        self.finished = self.path / "finished"  # there when the last start came to the training's end, early stops included
        self.changes: list[str] = []
        self._lock: Lock | None = None

    def rank_log(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.log"

    def rank_error(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.error.json"

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint that the run goes on from; None where nothing was saved yet.

        Raises:
            UserError: something was saved, and the tracker does not say what to go on from: starting anew would
                write over it.
        """
        if not has_checkpoints(self.checkpoints):
            return None
        try:
            return newest_checkpoint(self.checkpoints)
        except CheckpointError as error:
            tracker = self.checkpoints / TRACKER
            anew = f"bring the checkpoint back, or start anew: rm {shlex.quote(str(tracker))}, or run.name=NAME"
            raise UserError(str(error), str(tracker), error.fix or anew) from error

    def latest_iteration(self) -> int | None:
        """The step of `newest_checkpoint`, with its errors; None where nothing was saved yet."""
        newest = self.newest_checkpoint()
        return None if newest is None else iteration_of(newest)

    def changes_to(self, recipe: Recipe) -> list[Change]:
        """What changes when the run here goes on with `recipe`; nothing where there is no run.

        Raises:
            UserError: its newest checkpoint cannot be told, or a recipe in it cannot be read (`UnreadableRecipe`).
        """
        if not self.recipe.exists():
            return []
        old, newest = _read(self.recipe), self.newest_checkpoint()
        if _moved(old.tokenizer, recipe.tokenizer, self.path / "tokenizer"):
            for key in _TOKENIZER_FILES:
                setattr(old.tokenizer, key, getattr(recipe.tokenizer, key))
        own = newest and newest / "recipe.yaml"
        return classify(old, recipe, _read(own) if own and own.is_file() else old if newest else None)

    def close(self) -> None:
        """Let another job write here. The end of the process does the same."""
        if self._lock:
            self._lock.release()
            self._lock = None


def _moved(before: Tokenizer, after: Tokenizer, copies: Path) -> bool:
    """Whether a tokenizer is the one before, of which the run has `copies`, under other paths."""
    if before.type != after.type or all(getattr(before, key) == getattr(after, key) for key in _TOKENIZER_FILES):
        return False
    try:
        return tokenizer_of(with_copies(before, copies)).hash() == tokenizer_of(after).hash()
    except TokenizerError:
        return False


def open_run(recipe: Recipe, sources: dict[str, str], command: list[str], accept_changes: bool = False) -> RunFolder:
    """Make the recipe's run folder, or open it to go on with the run in it; lock it for this process.

    A machine other than the first (`launch.node_rank` > 0) freezes its recipe under a name of its own and leaves the
    rest to the first one: the folder may be shared among them or not.

    Args:
        recipe: resolved; `run.dir` says where.
        sources: where each key's value came from, shown in a diff.
        command: the words the user typed.
        accept_changes: go on with another recipe, whatever it changes.

    Raises:
        UserError: another job holds the folder, or the recipe is not the one of the run there.
    """
    node = recipe.launch.node_rank
    folder = RunFolder(recipe.run.dir, recipe_name(recipe))
    try:
        folder.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run folder cannot be made: {error.strerror}", str(folder.path), "run.dir=...") from error
    folder._lock = Lock(lock_path(recipe))
    try:
        folder.changes = _compare(folder, recipe, sources, accept_changes)
        write_frozen(recipe, folder.recipe)
        if node == 0:
            _record_start(folder, command)
    except BaseException:
        folder.close()
        raise
    return folder


def _read(path: Path) -> Recipe:
    try:
        return read_frozen(path)
    except Exception as error:  # OmegaConf and PyYAML raise a dozen kinds
        what = f"the run's recipe cannot be read: {str(error).splitlines()[0]}"
        raise UnreadableRecipe(what, str(path), "give --accept-changes to replace it") from error


class Lock:
    """A lock on a file that the kernel takes away with the process, however it dies.

    Raises:
        UserError: another process holds it.
    """

    def __init__(self, path: Path):
        self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  open as long as the lock is held
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            error = _in_use(path, self._file)
            self._file.close()
            raise error from None
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()} since {_now()}\n")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def recipe_name(recipe: Recipe) -> str:
    """The frozen recipe of this machine: each has its own, the folder may be shared among them."""
    node = recipe.launch.node_rank
    return "recipe.yaml" if node == 0 else f"recipe.node{node}.yaml"


def lock_path(recipe: Recipe) -> Path:
    """The lock that this machine's job holds while it writes the run."""
    node = recipe.launch.node_rank
    return Path(recipe.run.dir) / (".lock" if node == 0 else f".lock.node{node}")


def raise_if_in_use(lock: Path) -> None:
    """Look whether a job holds the lock, leaving no trace.

    Raises:
        UserError: one does.
    """
    if lock.is_file():
        with lock.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _in_use(lock, file) from None


def _in_use(path: Path, file: IO[str]) -> UserError:
    file.seek(0)
    return UserError(
        f"another job is writing this run: {file.read().strip() or 'pid unknown'}",
        str(path.parent),
        "wait for it, or stop it (it saves a checkpoint on SIGTERM), or start another run with run.name=NAME",
    )


def _compare(folder: RunFolder, recipe: Recipe, sources: dict[str, str], accept_changes: bool) -> list[str]:
    """The changes since the run's last start, one line each; refuses those that may not be, or that nobody accepted."""
    try:
        changes = folder.changes_to(recipe)
    except UnreadableRecipe as error:
        if accept_changes:
            return [f"the whole recipe: {error.what}"]
        raise
    raise_all([*refused_changes(folder, changes, sources, accept_changes), *too_short(folder, recipe, sources)])
    return [str(change) for change in changes]


def refused_changes(
    folder: RunFolder, changes: list[Change], sources: dict[str, str], accept_changes: bool = False
) -> list[UserError]:
    """Why a run cannot go on with these changes: what can never be, and what nobody has agreed to."""
    faults = []
    never = [change for change in changes if change.kind == "refused"]
    asked = [change for change in changes if change.kind == "consent"]
    if never:
        own = [f"{change.key}={yaml_scalar(change.before)}" for change in never if change.key in sources]
        fix = f"as the run was made: {shlex.join(own)}; or start another with run.name=NAME" if own else "start another run with run.name=NAME"
        faults.append(UserError("this run cannot go on with other values than its own:" + _diff(never, sources), str(folder.recipe), fix))
    if asked and not accept_changes:
        fix = "start another run with run.name=NAME, or go on with the new values: --accept-changes"
        faults.append(UserError("this run was made with another recipe:" + _diff(asked, sources), str(folder.recipe), fix))
    return faults


def too_short(folder: RunFolder, recipe: Recipe, sources: dict[str, str]) -> list[UserError]:
    """A run cannot end before the step that it goes on from: its processes would start, and do nothing."""
    done, last = folder.latest_iteration(), recipe.derived.train_iters
    if done is None or last is None or done <= last:
        return []
    key, value, enough = length(recipe, done + 1)
    where = f"{key}={value} ({sources.get(key, 'default')})"
    return [UserError(f"step {done} of this run is done, and the training is to end at step {last}", where, f"{key}={enough} or more")]


def length(recipe: Recipe, steps: int) -> tuple[str, int | None, int]:
    """The key that says how long the training is, its value, and the one that makes it at least so many steps."""
    t = recipe.training
    if t.epochs is not None and recipe.derived.train_iters:
        return "training.epochs", t.epochs, -(-steps * t.epochs // recipe.derived.train_iters)
    if t.train_iters is not None:
        return "training.train_iters", t.train_iters, steps
    if t.train_samples is not None:
        return "training.train_samples", t.train_samples, steps * t.global_batch_size
    return "training.train_tokens", t.train_tokens, steps * t.global_batch_size * t.seq_length


def _diff(changes: list[Change], sources: dict[str, str]) -> str:
    lines = [f"{change}" + (f"   ({sources[change.key]})" if change.key in sources else "") for change in changes]
    return "".join(f"\n    {line}" for line in lines)


def _record_start(folder: RunFolder, command: list[str]) -> None:
    """Add the command to command.txt; environment.json tells of the newest start."""
    with folder.command.open("a", encoding="utf-8") as file:
        file.write(f"# {_now()}\n{shlex.join(command)}\n")
    write_whole(folder.environment, json.dumps(_environment(), indent=2) + "\n")


def _environment() -> dict[str, Any]:
    import psutil

    return {
        "time": _now(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("yuan", "torch", "megatron-core", "transformer-engine", "numpy")},
        "git_commit": git_commit(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit this code runs from, with a + when files differ from it; None outside a checkout or without git."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        ask = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
