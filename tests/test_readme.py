"""README.md cannot drift: its commands parse, its recipes and keys exist, what it lists is there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from launcher.cli import app
from launcher.recipe import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
DEFAULT_RECIPES = {"preprocess": "preprocess", "generate": "generate", "convert": ""} | dict.fromkeys(("show", "inspect"), "preprocess")  # of `tokenizer` and `data`


def typed() -> list[str]:
    """Every command line: all of a `sh` block, the lines behind `$ ` of any other."""
    lines = [line if kind == "sh" else line.removeprefix("$ ") for kind, text in BLOCKS for line in text.splitlines()
             if kind == "sh" or line.startswith("$ ")]  # fmt: skip
    return [line for line in dict.fromkeys(lines) if line]


YUAN = [line for line in typed() if line.startswith("yuan ")]


def parse(words: list[str]) -> tuple[str, dict]:
    """The verb that would run and its parameters, of types the command line checked; nothing runs."""
    command, name = typer.main.get_command(app), "yuan"
    while hasattr(command, "commands"):
        name, command, words = command.resolve_command(command.make_context(name, list(words)), words)
    return name, command.make_context(name, words).params


def test_the_readme_shows_every_verb():
    assert len(YUAN) > 20
    verbs = {line.split()[1] for line in YUAN} - {"--help"}
    assert verbs == set(typer.main.get_command(app).commands)


@pytest.mark.parametrize("line", [line for line in YUAN if "--help" not in line])
def test_a_command_parses_and_its_recipe_and_keys_exist(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, params = parse(shlex.split(line, comments=True)[1:])
    words = params.get("words")
    if words is not None or name in ("pretrain", "check", *DEFAULT_RECIPES):
        words = [word if "=" in word else f"recipe={word}" for word in words or [] if "=" in word or name not in ("convert", "inspect")]  # its places
        assert load(words, default=DEFAULT_RECIPES.get(name)).recipe


def test_a_typo_in_a_command_would_be_found():
    with pytest.raises(Exception, match="no such option"):
        parse(["generate", "--inptu", "x.jsonl"])
    with pytest.raises(Exception, match="No such command"):
        parse(["pretrian"])
    with pytest.raises(Exception, match="unknown key"):
        load(["recipe=345m_1dp", "training.trian_iters=2"])


def test_the_list_of_recipes_is_a_part_of_the_real_one(tmp_path):
    words = [sys.executable, "-m", "launcher.cli", "recipes", "list"]
    real = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    shown = README.split("$ yuan recipes list\n")[1].split("\n$ ")[0]
    parts = [part for part in shown.split("\n  ...") if part]  # "..." stands for lines left out
    found = [real.index(part) for part in parts]
    assert len(parts) > 1 and found == sorted(found)


def test_files_and_targets_named_are_there():
    for target in {line.split()[1] for line in typed() if line.startswith("make ")}:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for path in re.findall(r"(?<![/\w])(?:examples|launcher|data_tools|checkpoints)/[\w/]*\w\.(?:py|jsonl|yaml)", README):
        assert (ROOT / path).is_file(), path
    places = next(text for _, text in BLOCKS if text.startswith("launcher/"))
    for line in places.splitlines():
        assert (ROOT / line.split()[0]).is_dir(), line


def test_the_two_commands_come_first():
    assert all(README[: README.index(command)].count("\n") < 30 for command in ("make quickstart", "make test"))
