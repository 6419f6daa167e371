"""The recipes through the command line: `yuan check` knows what each is for."""

from importlib.util import find_spec

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from launcher.recipe import load


def yuan(*words: str):
    return CliRunner().invoke(app, words, catch_exceptions=False)


@pytest.mark.parametrize("name, verb", [("llama2_70b_sft", "sft"), ("convert_yuan2_51b_4tp", "convert"), ("generate_llama2_7b", "generate")])
def test_check_takes_the_verb_from_the_recipe(stand_in, name, verb):
    stand_in(load([f"recipe={name}"]))
    result = yuan("check", f"recipe={name}")
    assert result.exit_code == 0 and f"{name} would run with `yuan {verb}`" in result.stdout
    assert ("this version of yuan can only check it" in result.stdout) is (find_spec(f"launcher.commands.{verb}") is None)


def test_check_tells_the_sizes_of_a_fine_tuning(stand_in):
    stand_in(load(["recipe=yuan2_51b_sft"]))
    text = yuan("check", "recipe=yuan2_51b_sft").stdout
    for words in ("51,842.1 M parameters", "TP 1 x PP 16 x DP 2", "4 epochs over data/yuan2_sft.jsonl", "padded to 135,040"):
        assert words in text


def test_check_for_another_verb_than_the_recipes_own(stand_in):
    stand_in(load(["recipe=llama2_7b_sft"]))
    result = yuan("check", "--for", "pretrain", "recipe=llama2_7b_sft")
    assert result.exit_code == 2 and "nothing says how long to train" in result.stdout and "no training data" in result.stdout
