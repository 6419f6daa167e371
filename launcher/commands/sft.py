"""`yuan sft`: fine-tune a model on questions and answers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from launcher.commands.pretrain import train, warn
from launcher.commands.rows import describe, prepare_rows
from launcher.errors import UserError
from launcher.recipe import Loaded, finetuning, load
from launcher.recipe.check import ensure


def sft(
    words: Annotated[Optional[list[str]], typer.Argument(metavar="recipe=NAME [KEY=VALUE]...", help="A recipe, and values that override its own.")] = None,  # noqa: UP007
    accept_changes: Annotated[bool, typer.Option("--accept-changes", help="Go on with a run whose recipe was another.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check; show the plan, the commands and the recipe; start nothing.")] = False,
) -> None:
    """Fine-tune on rows of questions and answers, with loss on the answers alone.

    Rows are tokenized once, before the processes start (or by `yuan preprocess` with the same words), and kept beside
    their file. Everything else goes into the run folder; the same command on the same folder resumes the run.

    \b
    Examples:
      yuan sft recipe=llama2_7b_sft checkpoint.load=data/llama2_7b data.train=train.json data.valid=valid.json
      yuan data inspect PREFIX --mask                  what is trained on, in colour
    """
    loaded = load(words or [], checked=True)
    warn(ensure(loaded, "sft", launching=not dry_run, accept_changes=accept_changes))
    if not dry_run or not finetuning.missing(loaded.recipe):
        _settle(loaded)
    train(loaded, "sft", accept_changes, dry_run)


def _settle(loaded: Loaded) -> None:
    """Prepare the rows where they are not, on the first machine, and see how many samples they give."""
    recipe = loaded.recipe
    if recipe.launch.node_rank == 0:
        prepare_rows(loaded)
    elif missing := finetuning.missing(recipe):
        typer.echo(f"waiting    for the first machine to prepare {missing[0]}", err=True)
        while finetuning.missing(recipe):
            time.sleep(1)
    samples = finetuning.packed(recipe, recipe.data.train)
    if samples is None or not len(samples):
        fix = f"a larger training.seq_length than {recipe.training.seq_length}, or rows with shorter questions"
        raise UserError("no row has an answer that begins within a sample", f"data.train={recipe.data.train}", fix)
    for line in describe(recipe):
        typer.echo(line, err=True)
    finetuning.settle_length(recipe, loaded.sources, len(samples))
