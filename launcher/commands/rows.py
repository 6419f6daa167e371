"""Rows of questions and answers made ready for `yuan sft`: by it, and by `yuan preprocess` with its recipe."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import typer

from launcher.console import plural
from launcher.errors import UserError, of_system
from launcher.launch.torchrun import STOPPED
from launcher.recipe import Loaded, finetuning
from launcher.recipe.schema import Recipe
from launcher.recipe.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from data_tools.packing import Packed


def prepare_rows(loaded: Loaded) -> None:
    """Tokenize the rows of data.train and data.valid that are not ready yet.

    Raises:
        DataError: rows that are none, the first of them with its place; a template that the tokenizer cannot write.
        UserError: the folder beside a file cannot be written.
    """
    from data_tools.sft import prepare
    from launcher.commands.preprocess import Meter

    recipe, asked = loaded.recipe, loaded.recipe.preprocess
    tokenizer = tokenizer_of(recipe.tokenizer)
    for path, prefix in finetuning.missing(recipe).items():
        started = time.monotonic()
        try:
            with Meter(path.stat().st_size) as meter:
                count = prepare(path, prefix, tokenizer, finetuning.form(recipe), asked.workers or 1, asked.max_bad, meter.show)
        except KeyboardInterrupt:
            typer.echo(f"stopped    what is prepared is kept in {prefix.parent}; the same command goes on", err=True)
            raise typer.Exit(STOPPED) from None
        except OSError as error:
            raise of_system(error, str(prefix.parent)) from None
        left = f", {plural(count.bad, 'bad row')} left out" if count.bad else ""
        typer.echo(f"prepared   {path}: {plural(count.documents, 'row')}, {count.tokens:,} tokens{left} ({time.monotonic() - started:.1f} s)", err=True)


def describe(recipe: Recipe, sets: dict[str, Packed]) -> list[str]:
    """A line for each set: rows, samples, what of them is filled and trained, what does not fit.

    Raises:
        UserError: rows were left out when they were prepared, more than may be now.
    """
    lines = []
    for name, samples in sets.items():
        where, *more = getattr(recipe.derived, f"{name}_rows")
        if samples.rows.left_out > recipe.preprocess.max_bad:
            what = f"{plural(samples.rows.left_out, 'bad row')} of data.{name} were left out when the others were prepared"
            raise UserError(what, f"{where}_sft_document.json", f"mend them, or allow as many: preprocess.max_bad={samples.rows.left_out}")
        lines.append(
            f"{name}      {plural(len(samples.rows), 'row')} in {plural(len(samples), 'sample')} of {samples.seq_length}, "
            f"{samples.efficiency:.1%} filled, {samples.supervised:,} supervised tokens ({where}_sft_document"
            f"{f' and {len(more)} more' if more else ''})"
        )
        if samples.rows.left_out:
            lines.append(f"           left out, bad: {plural(samples.rows.left_out, 'row')}; the first are in {where}_sft_document.json")
        if samples.rows_cut or samples.rows_left_out:
            lines.append(
                f"           cut at {samples.seq_length} tokens: {plural(samples.rows_cut, 'row')}; "
                f"left out, no answer before that: {plural(samples.rows_left_out, 'row')}"
            )
    return lines
