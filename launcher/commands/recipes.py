"""`yuan recipes`: list, show, copy, and the documentation of every key."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Optional

import typer

from launcher.console import columns, hanging
from launcher.errors import UserError
from launcher.migrate.emit import as_megatron
from launcher.recipe import Loaded, load
from launcher.recipe.find import available, describe, find, label, package_folder
from launcher.recipe.keys import groups, table, yaml_scalar

STORY = ("preprocess", "pretrain", "sft", "convert", "generate", "serve")

app = typer.Typer(help="List, show and copy recipes; print every key.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list", short_help="Every recipe, by the verb that uses it.")
def list_recipes(
    part: Annotated[Optional[str], typer.Argument(metavar="[TEXT]", help="Only names with this in them, such as llama2.")] = None,
) -> None:
    """List every recipe that recipe=NAME finds, by the verb that uses it; of your own, the file too."""
    rows: dict[str, list[tuple[str, str]]] = {verb: [] for verb in (*STORY, "other")}
    for name, path in available().items():
        text, verb = describe(path)
        place = "" if path.resolve().parent == package_folder() else f"  ({label(path)})"
        if part is None or part in name:
            rows[verb if verb in STORY else "other"].append((name, text + place))
    for verb, named in rows.items():
        if named:
            there = verb == "other" or find_spec(f"launcher.commands.{verb}")
            print(verb + ("" if there else "  (to look at and to check: this version has no such verb yet)"))
        width = max((len(name) for name, _ in named), default=0)
        for name, text in named:
            print(hanging(f"  {name:<{width}}  ", text, columns(sys.stdout)).rstrip())


@app.command(short_help="A resolved recipe, each value with its source.")
def show(
    words: Annotated[
        list[str], typer.Argument(metavar="NAME [KEY=VALUE]...", help="A recipe's name, or recipe=NAME; then values that override its own.")
    ],
    everything: Annotated[bool, typer.Option("--all", help="Defaults and empty values too.")] = False,
    form: Annotated[
        str, typer.Option("--as", metavar="FORM", help="yaml, or megatron: the command of Megatron-LM that trains the same.")
    ] = "yaml",
) -> None:
    """Print a recipe resolved, each value with where it came from; the output is YAML and can be saved as a recipe.

    \b
    Examples:
      yuan recipes show 345m_1dp
      yuan recipes show recipe=345m_1dp training.train_tokens=1e9 --all
      yuan recipes show 345m_4dp --as megatron
    """
    if form not in ("yaml", "megatron"):
        raise UserError(f"a recipe is not shown as {form!r}", "--as", "yaml or megatron")
    loaded = load([f"recipe={word}" if "=" not in word else word for word in words])
    print("\n".join((as_megatron if form == "megatron" else as_yaml)(loaded, everything)))


def as_yaml(loaded: Loaded, everything: bool) -> list[str]:
    """The lines of a resolved recipe as YAML with a comment behind each value.

    Derived values are comments themselves, so that what is saved derives them anew after an edit.
    """
    lines = [f"# {loaded.name}, resolved"]
    for group in groups():
        shown, live = [], False
        for name in [name for name in table() if name.startswith(f"{group}.")]:
            source, leaf = loaded.sources[name], name.split(".")[1]
            value = getattr(getattr(loaded.recipe, group), leaf)
            derived = source == "derived"
            if source != "default" or (everything and group != "derived"):
                text = f"{'# ' if derived else ''}{leaf}: {yaml_scalar(value)}"
                shown.append(f"  {text:<44}  # {source}")
                live = live or not derived
        if shown:
            lines += [f"{group}:" if live else f"# {group}:", *shown]
    return lines


@app.command(short_help="A copy of a recipe to edit.")
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The recipe to copy.")],
    dest: Annotated[Optional[Path], typer.Argument(metavar="[FILE]", help="A .yaml file, a folder, or a name for ./recipes/NAME.yaml.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Copy a recipe to edit it; the copy hides the packaged recipe of that name."""
    source = find(name)
    target = dest or Path("recipes") / (source.name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")  # bases/ stays
    if target.is_dir():
        target = target / source.name
    elif target.suffix not in (".yaml", ".yml"):  # a name, which recipe=NAME is to find
        target = (Path("recipes") if target.parent == Path() else target.parent) / f"{target.name}.yaml"
    if target.exists() and target.samefile(source):
        raise UserError(f"{target} is that recipe already", "", "give another file to copy it to")
    if target.exists() and not force:
        raise UserError(f"{target} is there already", "", "give another file, or --force to overwrite it")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    print(f"{label(source)} copied to {target}")


@app.command(short_help="Every key with its type, default and meaning.")
def keys(group: Annotated[Optional[str], typer.Argument(metavar="[GROUP]", help="One group, such as training, or one key.")] = None) -> None:
    """Print every key with its type, default and meaning."""
    chosen = [key for name, key in table().items() if group is None or name == group or name.startswith(f"{group}.")]
    if not chosen:
        near = get_close_matches(group, [*groups(), *table()], n=3, cutoff=0.6)
        fix = f"did you mean {' or '.join(near)}?" if near else "groups: " + ", ".join(groups())
        raise UserError(f"no group or key {group!r}", "", fix)
    width = columns(sys.stdout)
    for key in chosen:
        default = "" if key.default is None else f", default {yaml_scalar(key.default)}"
        print(hanging("", f"{key.name}  ({key.expected}{default})", width, indent=4))
        print(hanging("    ", key.doc, width))
