"""`yuan migrate`: old command lines and scripts into recipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from launcher.console import wrapped
from launcher.errors import UserError
from launcher.migrate import verdict
from launcher.migrate.read import migrate as read
from launcher.migrate.result import Migration
from launcher.migrate.write import recipe_text, report
from launcher.recipe.find import package_folder

CONTEXT = {"ignore_unknown_options": True}  # the old command's own options are words of it, with and without `--` before


def migrate(
    command: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="-- COMMAND …", help="The old command, a script's path, or their text in quotes."),
    ] = None,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="The recipe to write; - is stdout. Default: recipes/NAME.yaml")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a recipe that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the recipe, write nothing.")] = False,
) -> None:
    """Turn an old command into a recipe, and say what became of each of its arguments.

    Read are Pai-Megatron-Patch's scripts for Llama-2, Megatron-LM's pretrain_gpt.py, preprocess_data.py and
    run_text_generation_server.py, Yuan 2.0's scripts, ckpt_convert.sh, and shell scripts that call one of them.
    Nothing of what is read is run.

    \b
    Examples:
      yuan migrate -- sh run_pretrain_megatron_llama.sh dsw …
      yuan migrate examples/pretrain_yuan2.0_51B.sh
      yuan migrate --dry-run -- torchrun pretrain_gpt.py --num-layers 24 …
    """
    found, notes = read(command or [])
    targets = [_target(one, output, len(found), dry_run) for one in found]
    if not force:
        for target in targets:
            if target and target.exists():
                raise UserError(f"{target} is there already", "", "give another file with --output, or --force to overwrite it")
    to_stdout = str(output) == "-"
    for one, target in zip(found, targets):
        if not to_stdout:
            print("\n".join(report(one)) + "\n")
        text = recipe_text(one)
        if target is None:
            print(text, end="" if to_stdout else "\n")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
            print(f"written    {target}\nuse it     {one.use}")
        if not to_stdout:
            print("\n".join(verdict.lines(one)))
    for note in [] if to_stdout else notes:
        print(wrapped(f"left out   {note}", sys.stdout))


def _target(one: Migration, output: Path | None, count: int, dry_run: bool) -> Path | None:
    """Where a recipe goes; None is stdout. Its name never hides a recipe that comes with yuan."""
    if (package_folder() / f"{one.name}.yaml").exists():
        one.name += "_migrated"
    if output and output.suffix in (".yaml", ".yml"):
        one.name = output.stem if output.parent == Path("recipes") else str(output)
    if dry_run or str(output) == "-":
        return None
    if output and count > 1:
        raise UserError(
            f"{count} commands make {count} recipes", "--output", "leave --output out, or migrate one command at a time"
        )
    if output and output.suffix not in (".yaml", ".yml"):
        raise UserError(f"{output} is no name for a recipe", "--output", f"--output {output}.yaml")
    return output or Path("recipes") / f"{one.name}.yaml"
