"""`yuan convert A B --verify`: two checkpoints, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from checkpoints.adapters import read_note
from checkpoints.folder import CheckpointError, holds_weights_alone
from checkpoints.recognise import Found, recognise
from launcher.errors import UserError, raise_all
from launcher.recipe import Loaded
from launcher.recipe.check_conversion import TRAINED
from launcher.recipe.converted import open_checkpoint, source_fused
from launcher.recipe.frozen import own_recipe

if TYPE_CHECKING:  # it imports torch
    from checkpoints.formats.base import Source

_SHOWN = 20  # differences, of thousands there may be


def compare(loaded: Loaded) -> int:
    """Compare the recipe's convert.source with its convert.target, and say what differs. Returns the exit code.

    Raises:
        CheckpointError: one of them cannot be read.
        UserError: one is not given, or values are no good.
    """
    asked = loaded.recipe.convert
    raise_all(loaded.faults)
    if not asked.source or not asked.target:
        raise UserError("two checkpoints are wanted", "command line", "yuan convert A B --verify")
    places = [recognise(Path(path)) for path in (asked.source, asked.target)]
    from checkpoints import verify  # torch takes 3 s to import
    from checkpoints.optimizer import NoStateError

    fused = (source_fused(asked), asked.fused_layout)
    states, unread = all(map(_trains, places)), False

    def opened(states: bool) -> list[Source]:
        return [open_checkpoint(loaded, found, own_recipe(found.path), how, states) for found, how in zip(places, fused, strict=True)]

    try:
        first, second = opened(states)
    except CheckpointError as error:
        if not states:
            raise
        unread = not isinstance(error, NoStateError)
        first, second = opened(False)
        typer.echo(f"optimizer  not compared: {error}")
    typer.echo(f"first      {first.path}: {first.format}, {first.model}\nsecond     {second.path}: {second.format}, {second.model}")
    said = verify.models(first, second)
    said |= verify.trainings(first, second) if first.state else {}
    for key, (ours, theirs) in said.items():
        typer.echo(f"differs    {key}: {ours} and {theirs}")
    zeroed: dict[str, int] = {}
    counts = {"same": 0, "rounded": 0, "different": 0, "missing": 0}
    for one in verify.compare(first, second):
        counts[one.kind] += 1
        zeroed |= {one.name: one.zeroed} if one.zeroed else {}
        if one.kind in ("different", "missing") and counts["different"] + counts["missing"] <= _SHOWN:
            typer.echo(f"differs    {one.name}: {one.what}")
    wrong = counts["different"] + counts["missing"]
    if wrong > _SHOWN:
        typer.echo(f"           and {wrong - _SHOWN:,} more")
    if zeroed:
        typer.echo(f"rounded    {sum(zeroed.values()):,} numbers are 0 in one alone, in {len(zeroed):,} tensors, such as {next(iter(zeroed))}")
    if first.state:
        typer.echo(f"training   step {first.state.iteration:,}: with Adam's tensors and its schedule")
    alike = [f"{counts['same']:,} the same bit for bit"] + ([f"{counts['rounded']:,} but for rounding"] if counts["rounded"] else [])
    typer.echo(f"tensors    {sum(counts.values()):,}: {', '.join([*alike, f'{wrong:,} differ'])}")
    return 1 if wrong or said or unread else 0


def _trains(found: Found) -> bool:
    """Whether a checkpoint may hold a training's state."""
    return found.format in TRAINED and not holds_weights_alone(found.path) and read_note(found.path) is None
