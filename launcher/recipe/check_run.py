"""Checks of the run folder: is it free, may the run in it go on with this recipe, and is there room for its checkpoints?"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from checkpoints.folder import whole_checkpoints
from launcher.console import plural
from launcher.errors import UserError
from launcher.recipe.check_layout import gpus
from launcher.recipe.problem import Case, Problem
from launcher.recipe.sample_index import is_whole, note_path, words
from launcher.recipe.schema import Recipe
from launcher.recipe.size import trained_parameters
from launcher.run.folder import RunFolder, UnreadableRecipe, length, lock_path, raise_if_in_use, recipe_name, refused_changes, too_short


def folder(case: Case) -> Iterator[Problem]:
    """It can be written, no other job writes it, and the run in it may go on with this recipe.

    Not where processes are about to start: `open_run` sees to it then, with the lock in its hand.
    """
    if case.launching and case.recipe.launch.kind == "torchrun":
        return
    run = RunFolder(case.recipe.run.dir, recipe_name(case.recipe))
    there = existing(run.path)
    if not writable(there):
        yield Problem(f"the run folder cannot be made: {there} cannot be written", case.at("run.dir"), "run.dir=…")
        return
    try:
        raise_if_in_use(lock_path(case.recipe))
        changes = run.changes_to(case.recipe)
        ends = too_short(run, case.recipe, case.sources)
    except UnreadableRecipe as error:
        yield _as_problem(error, "warning" if case.accept_changes else "error")
        return
    except UserError as error:
        yield _as_problem(error)
        return
    for error in [*refused_changes(run, changes, case.sources, case.accept_changes), *ends]:
        yield _as_problem(error)


def _as_problem(error: UserError, severity: str = "error") -> Problem:
    return Problem(error.what, error.where, error.fix, severity)  # type: ignore[arg-type]


def existing(path: Path) -> Path:
    """The nearest of a path and its parents that is there."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())


def writable(folder: Path) -> bool:
    """Whether a file can be made there: root may write everywhere, and yet not to /proc or a disk mounted read-only."""
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return False
    try:
        with tempfile.TemporaryFile(dir=folder):  # without a name: nobody sees it
            return True
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)  # a full disk is another fault


def cache(case: Case) -> Iterator[Problem]:
    """The folder of the sample index can be written, where the index is still to be built."""
    data = case.recipe.data
    sources = (data.data_path, data.train_data_path, data.valid_data_path, data.test_data_path)
    found = [word for source in sources for word in words(source) or [] if Path(f"{word}.idx").is_file()]
    if not found:
        return  # told by `check_data.data`
    folder = Path(data.data_cache_path) if data.data_cache_path else Path(found[0]).parent / "cache"
    there = existing(folder)
    if writable(there) or _index_is_whole(case.recipe):
        return
    what = f"the sample index cannot be built in {folder}: {there} cannot be written"
    yield Problem(what, case.at("data.data_cache_path"), "data.data_cache_path=A_FOLDER, or the index built before: yuan data index")


def _index_is_whole(recipe: Recipe) -> bool:
    from data_tools.errors import DataError

    try:
        return is_whole(note_path(recipe))
    except (DataError, OSError, TypeError, ValueError):
        return False  # something that it is made of is missing, which other rules say


def going_on(recipe: Recipe) -> list[str]:
    """What a start on the run's folder would go on from, and with which changes, in readable lines; none for a new run."""
    run = RunFolder(recipe.run.dir, recipe_name(recipe))
    try:
        step, changes = run.latest_iteration(), run.changes_to(recipe)
    except UserError:
        return []  # told by `folder`
    if step is not None and step == recipe.derived.train_iters:
        return [complete(recipe, step), *(f"changed {change}" for change in changes)]
    lines = [] if step is None else [f"resuming from step {step}"]
    return lines + [f"changed {change}" for change in changes]


def complete(recipe: Recipe, step: int) -> str:
    """What a start does with a run that is at its last step."""
    again = "only its evaluations are made again" if recipe.training.eval_iters else "there is nothing to do"
    key, _, more = length(recipe, step + 1)
    return f"the run is complete: step {step:,} is its last, and {again}; to train on: {key}={more} or more"


def checkpoint_bytes(recipe: Recipe) -> int:
    """Size of one checkpoint: what is trained, Adam's two moments in fp32, and fp32 copies of 16-bit weights, which the distributed
    optimizer keeps of fp32 weights too. The parts that are no tensors of the model (0.4 MB, tokenizer) are left out.

    Measured with 23.6 M parameters, in either format: 12.0 bytes each in fp32, 14.0 in bf16, and with the distributed
    optimizer 16.0 and 14.0.
    """
    weights = 4 if recipe.training.precision == "fp32" else 2
    copies = 4 if weights == 2 or recipe.parallel.use_distributed_optimizer else 0
    return trained_parameters(recipe) * (weights + copies + 8)


def disk(case: Case) -> Iterator[Problem]:
    """The free disk holds the checkpoints that the run will keep, and one more while it is written."""
    r = case.recipe
    try:
        size = checkpoint_bytes(r)
    except TypeError:
        return  # a size of the model is missing, which `required` says
    path = Path(r.run.dir)
    if not writable(existing(path)):
        return  # told by `folder`, or by `open_run`
    there = len(whole_checkpoints(path / "checkpoints"))
    steps = r.derived.train_iters or 0
    saves = -(-steps // r.checkpoint.save_interval) if r.checkpoint.save_interval else 1
    at_once = saves if r.checkpoint.keep_last is None else min(saves, r.checkpoint.keep_last + 1)
    more = max(at_once - there, 1)
    free = shutil.disk_usage(existing(path)).free
    if more * size <= free:
        return
    fits = int(free // size)
    hopeless = fits < min(2, more)  # a checkpoint is written beside the one before it
    here = r.launch.kind == "torchrun" and not any(gpus(case))  # else another machine's disk is meant
    keep = max(1, there + fits - 1)
    fix = f"run.dir on a larger disk ({gib(more * size)})"
    if not hopeless and (r.checkpoint.keep_last is None or keep < r.checkpoint.keep_last):
        fix = f"checkpoint.keep_last={keep}, or {fix}"
    yield Problem(
        f"{plural(more, 'more checkpoint')} of {gib(size)}{' each' if more > 1 else ''} must have room at once, and the disk has {gib(free)} free",
        case.at("run.dir", "checkpoint.save_interval", "checkpoint.keep_last"),
        fix,
        "error" if hopeless and here else "warning",
    )


def gib(size: float) -> str:
    """Bytes in GiB, with three digits at least; below a tenth of one in MiB."""
    if size < 2**30 / 10:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / 2**30:,.0f} GiB" if size >= 100 * 2**30 else f"{size / 2**30:.3g} GiB"
