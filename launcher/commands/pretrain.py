"""`yuan pretrain`: train a model from random weights, or go on with a run."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

import launcher.workers
from checkpoints.models.tensor import padded
from checkpoints.recognise import checkpoint_in
from launcher.console import labelled, plural
from launcher.errors import UserError, raise_all
from launcher.launch.dry_run import dry_run as show_launch
from launcher.launch.slurm import submit
from launcher.launch.torchrun import STOPPED, launch
from launcher.recipe import Loaded, load
from launcher.recipe.check import ensure
from launcher.recipe.check_run import complete
from launcher.recipe.frozen import own_recipe
from launcher.recipe.problem import Problem
from launcher.recipe.resolve import keep_padded_vocabulary
from launcher.recipe.sample_index import described
from launcher.recipe.schema import Recipe
from launcher.recipe.size import parameters, trained_parameters
from launcher.run.export import final_checkpoint, is_exported
from launcher.run.folder import RunFolder, open_run

WORKER = Path(launcher.workers.__file__).with_name("pretrain.py")


def pretrain(
    words: Annotated[Optional[list[str]], typer.Argument(metavar="recipe=NAME [KEY=VALUE]...", help="A recipe, and values that override its own.")] = None,  # noqa: UP007
    accept_changes: Annotated[bool, typer.Option("--accept-changes", help="Go on with a run whose recipe was another.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check; show the plan, the commands and the recipe; start nothing.")] = False,
) -> None:
    """Train. Everything goes into the run folder, runs/NAME; the same command on the same folder resumes the run.

    checkpoint.load=FOLDER starts from trained weights: a run, a Hugging Face folder, any format that `yuan convert` reads.

    \b
    Examples:
      yuan pretrain recipe=345m_1dp
      yuan pretrain recipe=345m_1dp run.name=lr3e-4 optimizer.lr=3e-4
      yuan pretrain recipe=345m_4dp parallel.tensor_model_parallel_size=2
    """
    loaded = load(words or [], checked=True)
    warn(ensure(loaded, "pretrain", launching=not dry_run, accept_changes=accept_changes))
    train(loaded, "pretrain", accept_changes, dry_run)


def warn(warnings: list[Problem]) -> None:
    """Tell what is odd, a line each."""
    for warning in warnings:
        typer.echo(f"warning: {warning.what}" + (f" ({warning.where})" if warning.where else ""), err=True)


def train(loaded: Loaded, verb: str, accept_changes: bool, dry_run: bool) -> None:
    """Run a checked recipe in its run folder; ends the process with the run's exit code."""
    keep_padded_vocabulary(loaded.recipe, _trained_padding(loaded.recipe))
    typer.echo(labelled(plan(loaded.recipe), sys.stderr), err=True)
    if dry_run:
        typer.echo(show_launch(loaded, RunFolder(loaded.recipe.run.dir), WORKER, verb))
        return
    folder = open_run(loaded.recipe, loaded.sources, ["yuan", *sys.argv[1:]], accept_changes)
    if _say_what_is_there(folder, loaded.recipe) and not loaded.recipe.training.eval_iters:
        _export(loaded.recipe)
        return
    if loaded.recipe.launch.kind == "slurm":
        typer.echo(submit(loaded, folder, verb), err=True)
        return
    folder.finished.unlink(missing_ok=True)
    code = launch(loaded.recipe, folder, WORKER, verb)
    if code == STOPPED and _complete(folder, loaded.recipe):  # by a signal that came after the last step
        code = 0
    if code == 0 and _complete(folder, loaded.recipe):
        _export(loaded.recipe)
        typer.echo(f"next       {_next_command(folder)}", err=True)
    raise typer.Exit(code)


def _export(recipe: Recipe) -> None:
    """Write checkpoint.export_hf, where it is asked for and not written yet; the first machine does it for all."""
    if recipe.checkpoint.export_hf is None or recipe.launch.node_rank or is_exported(recipe):
        return
    from launcher.commands.convert import carry_out

    key, target = "checkpoint.export_hf", recipe.checkpoint.export_hf
    typer.echo(f"export     {target}", err=True)
    words = {"convert.source": str(final_checkpoint(recipe)), "convert.target": target, "convert.to": "hf"}
    try:
        carry_out(load([], {name: (value, key) for name, value in words.items()}, default="", checked=True))
    except UserError as error:
        raise_all([UserError(one.what, f"{key}={target}", one.fix.replace("convert.target", key)) for one in error.each])


def plan(recipe: Recipe) -> str:
    """What is about to be trained, in some lines."""
    model, parallel, training, derived = recipe.model, recipe.parallel, recipe.training, recipe.derived
    layout = f"{derived.world_size} x {derived.device}: TP {parallel.tensor_model_parallel_size}"
    layout += f", PP {parallel.pipeline_model_parallel_size}, DP {derived.data_parallel_size}"
    steps = f"{derived.train_iters:,} steps, " if derived.train_iters else ""
    steps = f"{plural(training.epochs, 'epoch')}, {steps}" if training.epochs else steps
    batch = f"{training.global_batch_size} samples of {training.seq_length} tokens"
    batch += f" ({plural(derived.num_microbatches, 'micro-batch')} of {training.micro_batch_size} per rank)"
    index = described(recipe)
    return "\n".join(
        [
            f"run        {recipe.run.dir}",
            f"model      {model.family}: {model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads,"
            f" vocabulary {derived.vocab_size}, {parameters(recipe) / 1e6:,.1f} M parameters",
            *([f"adapters   {trained(recipe)}"] if recipe.lora.rank else []),
            f"processes  {layout}, {training.precision}",
            f"batch      {batch}",
            f"training   {steps}{_samples(recipe)}",
            *([f"index      {index}"] if index else []),
        ]
    )


def trained(recipe: Recipe) -> str:
    """What of a model with adapters is trained."""
    r, count = recipe.lora, trained_parameters(recipe)
    share = f"{count / 1e6:,.2f} M of {parameters(recipe) / 1e6:,.1f} M parameters are trained"
    return f"LoRA of rank {r.rank}, alpha {r.alpha:g}, in {', '.join(r.target_modules)}: {share}"


def _samples(recipe: Recipe) -> str:
    samples = recipe.derived.train_samples
    if samples is None:  # of rows that are not prepared yet
        return "as many samples as the rows fill"
    return f"{samples:,} samples, {samples * recipe.training.seq_length:,} tokens"


def _trained_padding(recipe: Recipe) -> int | None:
    """The padded vocabulary of the checkpoint that the training starts from; None with fresh weights."""
    start = RunFolder(recipe.run.dir).newest_checkpoint()
    if start is None and recipe.checkpoint.load:
        start = checkpoint_in(Path(recipe.checkpoint.load))
    if start is None or recipe.derived.vocab_size is None:
        return None
    if own := own_recipe(start):
        return own.derived.padded_vocab_size
    # Another tool's, padded as it would be if it were converted first.
    return padded(recipe.derived.vocab_size, recipe.model.make_vocab_size_divisible_by)


def _say_what_is_there(folder: RunFolder, recipe: Recipe) -> bool:
    """Where the run goes on, and with what changes; True where it is complete."""
    iteration = folder.latest_iteration()
    at_end = iteration is not None and iteration == recipe.derived.train_iters
    if iteration is not None:
        typer.echo(f"resuming   from step {iteration}", err=True)
    for change in folder.changes:
        typer.echo(f"changed    {change}", err=True)
    if at_end:
        typer.echo(complete(recipe, iteration), err=True)
    return at_end


def _complete(folder: RunFolder, recipe: Recipe) -> bool:
    """Is the newest checkpoint the last one? Unknown (with a batch size ramp) counts as yes, and so does an early stop. Of rows
    the last weights must be judged, too: they may be the best."""
    if folder.finished.is_file() or recipe.data.train is not None:
        return folder.finished.is_file()
    iteration, last = folder.latest_iteration(), recipe.derived.train_iters
    return iteration is not None and (last is None or iteration >= last)


def _next_command(folder: RunFolder) -> str:
    command = "yuan generate --input pred_input.jsonl"
    if Path(os.path.abspath(folder.path)).parent == Path.cwd() / "runs":
        return command
    return f"{command} --load {shlex.quote(str(folder.path))}"
