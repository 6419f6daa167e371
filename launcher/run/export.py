"""A finished run as a Hugging Face folder: checkpoint.export_hf."""

from __future__ import annotations

from pathlib import Path

from checkpoints.folder import CheckpointError, best_checkpoint, manifest
from launcher.recipe.schema import Recipe
from launcher.run.folder import RunFolder


def final_checkpoint(recipe: Recipe) -> Path | None:
    """What a finished run has come to: its best checkpoint where it keeps that, else its newest; None where nothing was saved."""
    run = RunFolder(recipe.run.dir)
    return (best_checkpoint(run.checkpoints) if recipe.checkpoint.keep_best else None) or run.newest_checkpoint()


def is_exported(recipe: Recipe) -> bool:
    """Whether checkpoint.export_hf was written already, of the checkpoint that it would be written of."""
    target, final = Path(recipe.checkpoint.export_hf or ""), final_checkpoint(recipe)
    try:
        source = manifest(target).get("source")
    except CheckpointError:
        return False
    return final is not None and isinstance(source, str) and Path(source).resolve() == final.resolve()
