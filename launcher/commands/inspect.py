"""`yuan inspect`: what a checkpoint is, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from checkpoints.adapters import read_note
from checkpoints.folder import CheckpointError, UnsaidError, manifest
from checkpoints.recognise import Found, recognise
from launcher.errors import UserError, raise_all
from launcher.recipe import Loaded
from launcher.recipe import load as load_recipe
from launcher.recipe.converted import find_tokenizer, open_checkpoint, source_fused
from launcher.recipe.frozen import own_recipe
from launcher.recipe.schema import Recipe

if TYPE_CHECKING:  # it imports torch
    from checkpoints.formats.base import Source

_WORDS_HELP = "The checkpoint's folder, or a run's; a recipe that says what the files do not."
_DEEP_HELP = "Read every number: NaN, infinity, checksums. Takes as long as copying the files."
_HF_HELP = "A Hugging Face folder whose config.json says what the model is, for files that do not."
_FUSED_HELP = "MindSpore: how query, key and value lie in one matrix, concat or grouped."
_GIVE = "give the folder of a checkpoint, or of a run"
_SHOWN = 20  # problems, of thousands there may be


def inspect(
    words: Annotated[list[str], typer.Argument(metavar="CKPT | [recipe=NAME] [KEY=VALUE]...", help=_WORDS_HELP, show_default=False)],
    deep: Annotated[bool, typer.Option("--deep", help=_DEEP_HELP)] = False,
    hf_config: Annotated[Optional[str], typer.Option("--hf-config", help=_HF_HELP)] = None,
    vocab_size: Annotated[Optional[int], typer.Option("--vocab-size", help="Ids of the vocabulary, for files that do not say.")] = None,
    fused_layout: Annotated[Optional[str], typer.Option("--fused-layout", help=_FUSED_HELP)] = None,
) -> None:
    """Tell a checkpoint's format, model, layout, size and tokenizer, and what is wrong with it.

    Names, shapes and sizes are looked at; with --deep every number. Exit code 1 where something is wrong.

    \b
    Examples:
      yuan inspect runs/345m_1dp
      yuan inspect data/Llama-2-7b-hf --deep
    """
    places = [word for word in words if "=" not in word]
    if len(places) != 1:
        raise UserError(f"one folder is wanted, and {len(places)} given", "command line", "yuan inspect CKPT")
    path = Path(places[0])
    if not path.is_dir():
        what = f"no such folder: {path}" if not path.exists() else f"{path} is a file, and a checkpoint is a folder"
        raise UserError(what, "command line", _GIVE)
    options: dict[str, tuple[object, str]] = {
        "convert.source": (places[0], "command line"), "convert.hf_config": (hf_config, "--hf-config"),
        "convert.vocab_size": (vocab_size, "--vocab-size"), "convert.fused_layout": (fused_layout, "--fused-layout"),
    }  # fmt: skip
    loaded = load_recipe([word for word in words if "=" in word], options, default="")
    raise_all(loaded.faults)
    try:
        problems = _inspect(loaded, path, deep)
    except OSError as error:
        raise UserError(f"cannot read: {error}", str(path), "see to the disk and the rights there") from error
    for problem in problems[:_SHOWN]:
        typer.echo(f"problem    {problem}")
        typer.echo(f"  fix      {problem.fix or _GIVE}")
    if len(problems) > _SHOWN:
        typer.echo(f"           and {len(problems) - _SHOWN:,} more")
    if not problems:
        typer.echo("problems   none" + ("" if deep else " in names, shapes and sizes; --deep reads every number"))
    raise typer.Exit(1 if problems else 0)


def _inspect(loaded: Loaded, path: Path, deep: bool) -> list[CheckpointError]:
    """Show what there is. Returns what is wrong."""
    try:
        found = recognise(path)
    except CheckpointError as error:
        return [error]
    from checkpoints.inspect import damaged, unsound  # torch takes 3 s to import

    ranks = f", {found.tensor * found.pipeline} files" if found.tensor * found.pipeline > 1 else ""
    typer.echo(f"checkpoint {found.path}: {found.format}{ranks}, {_size(found.size)}")
    try:
        note = read_note(found.path)
    except CheckpointError as error:
        return [error]
    if note:
        typer.echo(f"adapters   {note}\nbase       {note.base}")
    if faults := damaged(found):
        return faults
    base = own_recipe(found.path)
    try:
        source = open_checkpoint(loaded, found, base, source_fused(loaded.recipe.convert))
    except UnsaidError as error:
        typer.echo(f"model      not known: {error}\n  fix      {error.fix}")
        return []
    except CheckpointError as error:
        return [error]
    for head, text in _lines(loaded, source, found, base):
        typer.echo(f"{head:<10} {text}")
    return list(unsound(source, found)) if deep else []


def _lines(loaded: Loaded, source: Source, found: Found, base: Recipe | None) -> list[tuple[str, str]]:
    from checkpoints.inspect import parameters, sizes

    types = sizes(source)
    share = f" ({', '.join(f'{name} {_size(size)}' for name, size in types.items())})" if len(types) > 1 else ""
    lines = [("format", source.format), ("model", str(source.model))] if source.format != found.format else [("model", str(source.model))]
    if source.layout:
        lines.append(("layout", source.layout))
    lines += [("parameters", f"{parameters(source):,}"), ("dtype", " and ".join(types) + share)]
    settings = source.training
    if settings.get("iteration"):
        samples = f", {settings['consumed_train_samples']:,} samples" if settings.get("consumed_train_samples") else ""
        lines.append(("training", f"iteration {settings['iteration']:,}{samples}"))
    tokenizer = find_tokenizer(loaded, source, base)
    ids = f", {tokenizer.settings.vocab_size:,} ids" if tokenizer.settings.vocab_size else ""
    files = f" ({', '.join(path.name for path in tokenizer.files)})" if tokenizer.files else ""
    why = tokenizer.why or ("ids alone" if tokenizer.settings.type == "NullTokenizer" else "")
    lines.append(("tokenizer", f"none: {why}" if why else f"{tokenizer.settings.type}{ids}{files}"))
    for why in dict.fromkeys(source.left_out.values()):
        names = [name for name, reason in source.left_out.items() if reason == why]
        lines.append(("besides", f"{names[0]}{f' and {len(names) - 1:,} more' if len(names) > 1 else ''}: {why}"))
    if made := manifest(found.path):
        lines.append(("made of", f"{made.get('source')}: {made.get('from')}"))
    return lines


def _size(count: int) -> str:
    """1,234 bytes, 1.2 MB, 1.2 GB."""
    if count < 100_000:
        return f"{count:,} bytes"
    return f"{count / 1e9:,.1f} GB" if count > 1e9 else f"{count / 1e6:,.1f} MB"
