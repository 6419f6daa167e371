"""What a recipe says of the GPUs that it needs, against the estimate of memory."""

import re

import pytest

from launcher.recipe import load
from launcher.recipe.estimate.answering import answering_memory
from launcher.recipe.estimate.memory import BAND, GIB, stage_memory
from launcher.recipe.find import package_folder
from launcher.recipe.verb import verb_of
from tests.recipes.test_recipes import FILES, comments

USUAL = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141)  # GiB of the GPUs that there are
GPT2 = ["launch.device=cuda", "tokenizer.type=NullTokenizer", "tokenizer.vocab_size=50256", "tokenizer.vocab_file=null", "tokenizer.merge_file=null"]  # fmt: skip
ON_GPUS = ("pretrain", "sft", "generate", "serve")
WITHOUT = ("quickstart", "quickstart_sft", "generate")  # for a CPU; for any checkpoint


def needed(name: str) -> float:
    """GiB of the fullest GPU; of answers, those of a whole batch of the longest."""
    loaded = load([f"recipe={name}", *(GPT2 if "345m" in name else [])])
    recipe = loaded.recipe
    if verb_of(loaded) in ("pretrain", "sft"):
        return max(one.total for one in stage_memory(recipe)) / GIB
    if "345m" in name:  # its sizes are in the run that answers
        recipe = load(["recipe=345m_1dp", *GPT2, f"generate.batch_size={recipe.generate.batch_size}"]).recipe
    return max(one.total for one in answering_memory(recipe)) / GIB


@pytest.mark.parametrize("name", [name for name in FILES if name not in WITHOUT and verb_of(load([f"recipe={name}"])) in ON_GPUS])
def test_the_memory_that_a_recipe_asks_for_is_what_it_takes_and_little_more(name):
    told = re.search(r"\b(\d+) GPUs? of (\d+) GiB", "\n".join(comments(FILES[name])))
    assert told, "no memory per GPU in the header"
    recipe, estimate = load([f"recipe={name}"]).recipe, needed(name)
    assert int(told[1]) == recipe.derived.world_size
    assert recipe.launch.gpu_memory_gib in (None, int(told[2]))
    usual = next(size for size in USUAL if estimate <= size * (1 - BAND))
    assert estimate <= int(told[2]) * (1 - BAND) and int(told[2]) <= 1.5 * usual


@pytest.mark.parametrize("verb", ["generate", "serve"])
def test_the_small_yuan_answers_on_a_small_gpu(verb):
    words = re.search(r"of (\d+) with (generate.batch_size=1 launch.gpu_memory_gib=\1)", "\n".join(comments(package_folder() / f"{verb}_yuan2_2b.yaml")))
    recipe = load([f"recipe={verb}_yuan2_2b", *words[2].split()]).recipe
    assert answering_memory(recipe)[0].total / GIB <= recipe.launch.gpu_memory_gib * (1 - BAND)
