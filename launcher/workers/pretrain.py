"""The worker of `yuan pretrain` and `yuan sft`: build, go on from the newest checkpoint where there is one, train."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.workers.entry import Stop, run_worker, terminal

if TYPE_CHECKING:  # importing them takes 0.5 s, in which no signal is answered
    from launcher.recipe.schema import Recipe
    from launcher.run.folder import RunFolder


def main(recipe: Recipe, folder: RunFolder, stop: Stop) -> None:
    """One rank of a training run."""
    from launcher.engine.initialize import finish, initialize

    initialize(recipe)
    import torch

    from launcher.engine import checkpoint
    from launcher.engine.parts import parts
    from launcher.engine.train import Trainer, build
    from launcher.run.progress import Progress

    first = torch.distributed.get_rank() == 0
    if first:
        checkpoint.keep_files(recipe, folder.path)
    state = build(recipe)
    source = start(recipe, state, folder)
    progress = None
    if first:
        progress = Progress(folder, recipe, terminal(), state.iteration)
        progress.note(f"parts      {parts(recipe, state.optimizer)}")
        progress.note(f"start      {source}")

    def save(state, best: bool) -> None:
        started = time.monotonic()
        whole = checkpoint.save(recipe, state, folder.checkpoints, folder.path / "tokenizer", best)
        if progress is not None:
            of = ", the best so far" if best else ""
            progress.note(f"saved      {whole} ({time.monotonic() - started:.1f} s{of})")

    reason = Trainer(recipe, state, stop, progress, save).run()
    if progress is not None:
        if reason is None:
            folder.finished.write_text(f"{state.iteration}\n", encoding="utf-8")
        else:
            progress.note(f"stopped    by {reason} after step {state.iteration} of {recipe.derived.train_iters}")
        progress.close()
    finish()


def start(recipe: Recipe, state, folder: RunFolder) -> str:
    """Fill the state from the run's newest checkpoint, or from checkpoint.load; says which.

    Raises:
        UserError: the checkpoint is damaged, does not fit the recipe, or is not there for every rank.
    """
    from checkpoints.folder import CheckpointError
    from launcher.engine import checkpoint
    from launcher.errors import UserError

    whole, resume = agreed_checkpoint(recipe, folder)
    if whole is None:
        return "fresh weights"
    try:
        checkpoint.load(recipe, state, whole, resume)
    except CheckpointError as error:
        older = "a damaged one: write the number of an older one into latest_checkpointed_iteration.txt"
        fix = older if resume else "checkpoint.load=ANOTHER; `yuan inspect` tells what is in this one"
        raise UserError(str(error), str(whole), error.fix or fix) from error
    beside = f", beside {state.adapters.base}" if resume and state.adapters else ""
    return f"{whole}, step {state.iteration}{beside}"


def agreed_checkpoint(recipe: Recipe, folder: RunFolder) -> tuple[Path | None, bool]:
    """The checkpoint that rank 0 sees, for all ranks, and whether it is the run's own."""
    import torch

    from checkpoints.folder import CheckpointError
    from checkpoints.recognise import checkpoint_in
    from launcher.errors import UserError

    found: list = [None, False, None]
    if torch.distributed.get_rank() == 0:
        load = recipe.checkpoint.load
        try:
            own = folder.newest_checkpoint()
            found = [own or (checkpoint_in(Path(load)) if load else None), own is not None, None]
        except UserError as error:
            found[2] = (error.what, error.where, error.fix)
        except CheckpointError as error:
            found[2] = (str(error), "checkpoint.load", "checkpoint.load=RUN_OR_CHECKPOINT")
    torch.distributed.broadcast_object_list(found, src=0)
    whole, resume, fault = found
    if fault is not None:
        raise UserError(*fault)
    if whole is not None and not whole.is_dir():
        what = f"rank {torch.distributed.get_rank()} does not see {whole}"
        raise UserError(what, str(folder.path), "the run folder must lie on a disk that all machines share")
    return whole, resume


if __name__ == "__main__":
    run_worker(main)
