"""The worker of `yuan pretrain`: build, go on from the newest checkpoint where there is one, train."""

from __future__ import annotations

import time
from pathlib import Path

from launcher.recipe.schema import Recipe
from launcher.run.folder import RunFolder
from launcher.workers.entry import Stop, run_worker, terminal


def main(recipe: Recipe, folder: RunFolder, stop: Stop) -> None:
    """One rank of a training run."""
    from launcher.engine.initialize import finish, initialize

    initialize(recipe)
    import torch

    from launcher.engine import checkpoint
    from launcher.engine.train import Trainer, build
    from launcher.run.progress import Progress

    state = build(recipe)
    source = start(recipe, state, folder)
    progress = None
    if torch.distributed.get_rank() == 0:
        progress = Progress(folder, recipe, terminal(), state.iteration)
        progress.note(f"start      {source}")

    def save(state) -> None:
        started = time.monotonic()
        whole = checkpoint.save(recipe, state, folder.checkpoints)
        if progress is not None:
            progress.note(f"saved      {whole} ({time.monotonic() - started:.1f} s)")

    reason = Trainer(recipe, state, stop, progress, save).run()
    if progress is not None:
        if reason:
            progress.note(f"stopped    by {reason} after step {state.iteration} of {recipe.derived.train_iters}")
        progress.close()
    finish()


def start(recipe: Recipe, state, folder: RunFolder) -> str:
    """Fill the state from the run's newest checkpoint, or from checkpoint.load; says which.

    Raises:
        UserError: the checkpoint is damaged or does not fit the recipe.
    """
    from checkpoints.folder import CheckpointError, newest_checkpoint
    from launcher.engine import checkpoint
    from launcher.errors import UserError

    resume = folder.latest_iteration() is not None
    if not resume and recipe.checkpoint.load is None:
        return "fresh weights"
    path = folder.path if resume else Path(recipe.checkpoint.load)
    try:
        whole = newest_checkpoint(path)
        checkpoint.load(recipe, state, whole, resume)
    except CheckpointError as error:
        fix = "remove the damaged checkpoint and set the tracker to an older one" if resume else "checkpoint.load=RUN_OR_CHECKPOINT"
        raise UserError(str(error), str(path), fix) from error
    return f"{whole}, step {state.iteration}"


if __name__ == "__main__":
    run_worker(main)
