"""Greedy and sampled decoding with the cache, against whole forward passes of the training model, at TP and PP."""

import json
from pathlib import Path

import pytest

from launcher.launch.torchrun import launch
from launcher.recipe.frozen import write_frozen
from launcher.recipe.resolve import resolve
from launcher.recipe.schema import Recipe
from launcher.run.folder import RunFolder
from tests.launcher.engine.generate_worker import FAMILIES, LIMITS, PROMPTS

WORKER = Path(__file__).with_name("generate_worker.py")
LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}


def tiny(name: str, tp: int = 1, pp: int = 1) -> Recipe:
    recipe = Recipe()
    m, t = recipe.model, recipe.training
    m.num_layers, m.hidden_size, m.num_attention_heads, m.init_method_std = 4, 32, 4, 0.3  # large: answers that vary
    m.attention_dropout = m.hidden_dropout = 0.0
    m.make_vocab_size_divisible_by = 64  # of 50 ids: 14 are padding
    t.seq_length = m.max_position_embeddings = 24
    t.micro_batch_size, t.train_iters, recipe.optimizer.lr = 1, 1, 1e-3
    recipe.tokenizer.type, recipe.tokenizer.vocab_size = "NullTokenizer", 49
    recipe.parallel.tensor_model_parallel_size, recipe.parallel.pipeline_model_parallel_size = tp, pp
    recipe.launch.device, recipe.launch.nproc_per_node, recipe.launch.cpu_threads = "cpu", tp * pp, 1
    recipe.run.name = name
    resolve(recipe, {}, name)
    recipe.derived.padded_vocab_size = 64
    return recipe


def run(path: Path, recipe: Recipe) -> dict:
    folder = RunFolder(path)
    folder.logs.mkdir(parents=True)
    write_frozen(recipe, folder.recipe)
    assert launch(recipe, folder, WORKER, "test") == 0
    return json.loads((path / "result.json").read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("generate")


@pytest.fixture(scope="module")
def references(base):
    return run(base / "make", tiny("make"))


@pytest.fixture(scope="module")
def results(base, references):
    return {name: run(base / name, tiny("answer", *layout)) for name, layout in LAYOUTS.items()}


def stopped(ids: list[int]) -> tuple[list[int], str]:
    """What an answer must be when the uncached model goes on to say `ids`."""
    return (ids[: ids.index(49)], "stop") if 49 in ids else (ids, "length")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_is_the_uncached_model_token_for_token(references, results, layout, family):
    expected = [stopped(ids) for ids in references[family]]
    answers = results[layout][family]["greedy"]
    assert [(answer["ids"], answer["finish_reason"]) for answer in answers] == expected
    assert len({token for ids, _ in expected for token in ids}) > 5  # a model that repeats one token would prove little
