"""Checks of the checkpoint that a training starts from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from checkpoints.folder import CheckpointError, has_checkpoints, newest_checkpoint
from launcher.recipe.problem import Case, Problem


def load(case: Case) -> Iterator[Problem]:
    """checkpoint.load names a checkpoint; a run that has its own goes on from that one, and does not ask."""
    path = case.recipe.checkpoint.load
    if path is None or has_checkpoints(Path(case.recipe.run.dir) / "checkpoints"):
        return
    try:
        newest_checkpoint(Path(path))
    except CheckpointError as error:
        yield Problem(str(error), case.at("checkpoint.load"), "checkpoint.load=RUN_OR_CHECKPOINT, or null for fresh weights")
