"""`yuan sft`: fine-tune a model on questions and answers."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from launcher.commands.pretrain import train, warn
from launcher.commands.rows import describe, prepare_rows
from launcher.console import labelled
from launcher.errors import UserError, raise_all
from launcher.recipe import Loaded, check_schedule, finetuning, load
from launcher.recipe.check import ensure
from launcher.recipe.problem import Case
from launcher.recipe.schema import Recipe


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
      yuan sft recipe=llama2_7b_sft checkpoint.load=data/Llama-2-7b-hf
      yuan sft recipe=mine data.train=train.json data.valid=valid.json
      yuan data inspect PREFIX --mask                what is trained on, in colour
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
        _wait(recipe, next(iter(missing)))
    samples = finetuning.settle_rows(recipe, loaded.sources)
    for name, one in samples.items():
        if not len(one):
            fix = f"a larger training.seq_length than {recipe.training.seq_length}, or rows with shorter questions"
            raise UserError("no row has an answer that begins within a sample", f"data.{name}={getattr(recipe.data, name)}", fix)
    for line in describe(recipe, samples):
        typer.echo(labelled(line, sys.stderr), err=True)
    if recipe.training.epochs is not None:
        typer.echo(labelled(finetuning.epoch(recipe, len(samples["train"])), sys.stderr), err=True)
        finetuning.settle_length(recipe, loaded.sources, len(samples["train"]))
        problems = list(check_schedule.of_epochs(Case(recipe, loaded.sources)))
        raise_all([problem.as_error() for problem in problems if problem.severity == "error"])
        warn(problems)


def _wait(recipe: Recipe, path: Path) -> None:
    """Until the first machine has prepared the rows."""
    minutes = recipe.parallel.distributed_timeout_minutes
    typer.echo(f"waiting    for the first machine to prepare {path}, {minutes} minutes at most", err=True)
    until = time.monotonic() + 60 * minutes
    while finetuning.missing(recipe):
        if time.monotonic() > until:
            what = f"the first machine has not prepared {path} in {minutes} minutes"
            raise UserError(what, "launch.node_rank=0", "see what it says; the file must be the same one, on a disk that all machines share")
        time.sleep(5)
