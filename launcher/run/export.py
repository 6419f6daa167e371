"""A finished run as a Hugging Face folder: checkpoint.export_hf."""

from __future__ import annotations

from pathlib import Path

from checkpoints.folder import CheckpointError, best_checkpoint, manifest
from launcher.recipe.frozen import own_recipe
from launcher.recipe.schema import Recipe
from launcher.run.folder import RunFolder


def final_checkpoint(recipe: Recipe) -> Path | None:
    """What a finished run has come to: its best checkpoint where it keeps that, else its newest; None where nothing was saved."""
    run = RunFolder(recipe.run.dir)
    return (best_checkpoint(run.checkpoints) if recipe.checkpoint.keep_best else None) or run.newest_checkpoint()


def trains_on(recipe: Recipe) -> bool:
    """Whether a start now would go past the step that the run has come to. Unknown counts as no where the run is finished: an early
    stop is the end until the recipe is another, and steps of rows are counted when these are prepared."""
    run = RunFolder(recipe.run.dir)
    done, last = run.latest_iteration(), recipe.derived.train_iters
    if done is None or last is not None and done >= last:
        return False
    before = own_recipe(run.path) if run.finished.is_file() else None
    if before is None:
        return True
    longer = last is not None and before.derived.train_iters not in (None, last)
    return longer or any(getattr(before.training, key) != getattr(recipe.training, key) for key in ("epochs", "early_stop_patience"))


def is_exported(recipe: Recipe) -> bool:
    """Whether checkpoint.export_hf was written already, of the checkpoint that it would be written of."""
    target, final = Path(recipe.checkpoint.export_hf or ""), final_checkpoint(recipe)
    try:
        source = manifest(target).get("source")
    except CheckpointError:
        return False
    return final is not None and isinstance(source, str) and Path(source).resolve() == final.resolve()
