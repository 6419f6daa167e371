"""A run's folder: what lies where, who may write there, and whether a recipe may go on with what is there."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import socket
import subprocess
from dataclasses import asdict
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from checkpoints.folder import TRACKER, CheckpointError, has_checkpoints, iteration_of, newest_checkpoint, whole_checkpoints
from launcher.errors import UserError
from launcher.recipe.frozen import read_frozen, write_frozen
from launcher.recipe.schema import Recipe

# What may differ between a run and its resumption: how fast, how long and how talkative it is, not what it computes.
SAFE_GROUPS = {"parallel", "preprocess", "logging", "launch", "slurm", "run", "generate", "convert", "serve"}
SAFE_KEYS = {
    "training.train_iters", "training.train_samples", "training.train_tokens", "training.micro_batch_size",
    "training.eval_interval", "training.eval_iters", "training.exit_duration_in_mins", "training.exit_interval",
    "data.num_workers", "data.data_cache_path", "checkpoint.save_interval", "checkpoint.keep_last",
}  # fmt: skip
# Checkpoints of format `torch` hold one file per rank of the layout that wrote them.
LAYOUT_KEYS = {
    "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size",
    "parallel.pipeline_model_parallel_layout", "parallel.num_layers_per_virtual_pipeline_stage",
    "parallel.decoder_first_pipeline_num_layers", "parallel.decoder_last_pipeline_num_layers",
    "parallel.use_distributed_optimizer",
}  # fmt: skip


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
            tracker, whole = self.checkpoints / TRACKER, whole_checkpoints(self.checkpoints)
            if whole:
                fix = f"to go on from step {iteration_of(whole[-1])}: echo {iteration_of(whole[-1])} > {shlex.quote(str(tracker))}"
            else:
                fix = f"bring the checkpoint back, or start anew: rm {shlex.quote(str(tracker))}, or run.name=NAME"
            raise UserError(str(error), str(tracker), fix) from error

    def latest_iteration(self) -> int | None:
        """The step of `newest_checkpoint`, with its errors; None where nothing was saved yet."""
        newest = self.newest_checkpoint()
        return None if newest is None else iteration_of(newest)

    def close(self) -> None:
        """Let another job write here. The end of the process does the same."""
        if self._lock:
            self._lock.release()
            self._lock = None


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
    folder = RunFolder(recipe.run.dir, "recipe.yaml" if node == 0 else f"recipe.node{node}.yaml")
    try:
        folder.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run folder cannot be made: {error.strerror}", str(folder.path), "run.dir=...") from error
    folder._lock = Lock(folder.path / (".lock" if node == 0 else f".lock.node{node}"))
    try:
        if folder.recipe.exists():
            folder.changes = _compare(folder, recipe, sources, accept_changes)
        write_frozen(recipe, folder.recipe)
        if node == 0:
            _record_start(folder, command)
    except BaseException:
        folder.close()
        raise
    return folder


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
            self._file.seek(0)
            owner = self._file.read().strip() or "pid unknown"
            self._file.close()
            raise UserError(
                f"another job is writing this run: {owner}",
                str(path.parent),
                "wait for it, or stop it (it saves a checkpoint on SIGTERM), or start another run with run.name=NAME",
            ) from None
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()} since {_now()}\n")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def _compare(folder: RunFolder, recipe: Recipe, sources: dict[str, str], accept_changes: bool) -> list[str]:
    """The changes since the run's last start, one line each; refuses unsafe ones unless accepted."""
    try:
        old = read_frozen(folder.recipe)
    except Exception as error:  # OmegaConf and PyYAML raise a dozen kinds
        if accept_changes:
            return [f"the whole recipe: {folder.recipe} could not be read ({str(error).splitlines()[0]})"]
        what = f"the run's recipe cannot be read: {str(error).splitlines()[0]}"
        raise UserError(what, str(folder.recipe), "give --accept-changes to replace it") from error
    changes = changed_keys(old, recipe)
    lines = {key: f"{key}: {_shown(a)} -> {_shown(b)}" for key, (a, b) in changes.items()}
    unsafe = [key for key in changes if not is_safe(key, old, recipe)]
    if unsafe and not accept_changes:
        diff = [lines[key] + (f"   ({sources[key]})" if key in sources else "") for key in unsafe]
        raise UserError(
            "this run was made with another recipe:\n" + "\n".join(f"    {line}" for line in diff),
            str(folder.recipe),
            "start another run with run.name=NAME, or go on with the new values: --accept-changes",
        )
    return list(lines.values())


def changed_keys(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old value, new value)} of what differs. Derived values are left out, all but the vocabulary:
    they follow from the rest, and the vocabulary from files that may have changed under the same name."""
    before, after = _flat(asdict(old)), _flat(asdict(new))
    keys = [key for key in after if not key.startswith("derived.") or key == "derived.vocab_size"]
    return {key: (before[key], after[key]) for key in keys if before[key] != after[key]}


def is_safe(key: str, old: Recipe, new: Recipe) -> bool:
    """May a run go on when `key` alone differs between its recipe and the new one?"""
    if key in LAYOUT_KEYS:
        return old.checkpoint.format == "torch_dist"
    if key in ("optimizer.lr_decay_iters", "optimizer.lr_decay_samples"):
        return all(_decays_to_the_end(key, recipe) for recipe in (old, new))
    return key in SAFE_KEYS or key.split(".")[0] in SAFE_GROUPS


def _decays_to_the_end(key: str, recipe: Recipe) -> bool:
    """Is the decay's length the training's own, and so no choice but what follows from train_iters or its like?"""
    unit = key.rsplit("_", 1)[1]
    length = getattr(recipe.optimizer, f"lr_decay_{unit}")
    return length in (None, getattr(recipe.training, f"train_{unit}"), getattr(recipe.derived, f"train_{unit}"))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value, default=str)


def _record_start(folder: RunFolder, command: list[str]) -> None:
    """Add the command to command.txt; environment.json tells of the newest start."""
    with folder.command.open("a", encoding="utf-8") as file:
        file.write(f"# {_now()}\n{shlex.join(command)}\n")
    part = folder.environment.with_name(folder.environment.name + ".part")
    part.write_text(json.dumps(_environment(), indent=2) + "\n", encoding="utf-8")
    part.replace(folder.environment)


def _environment() -> dict[str, Any]:
    import psutil

    return {
        "time": _now(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("yuan", "torch", "megatron-core", "transformer-engine", "numpy")},
        "git_commit": _git_commit(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
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
