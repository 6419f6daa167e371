"""The memory of what answers: weights, cache and logits against a GPU, before 138 GB are read onto one of 80."""

from dataclasses import replace

import pytest

from launcher.recipe import check_answering, load
from launcher.recipe.check import CHECKS, check
from launcher.recipe.check_answering import memory
from launcher.recipe.estimate.answering import answering_memory
from launcher.recipe.problem import Case

ONE = ["recipe=generate_llama2_70b", "parallel.tensor_model_parallel_size=1", "launch.nproc_per_node=1", "launch.gpu_memory_gib=80"]


def said(*words: str, **options: bool):
    loaded = load([*words])
    return list(memory(Case(loaded.recipe, loaded.sources, **options)))


@pytest.mark.parametrize("verb", ["generate", "serve"])
def test_a_model_too_large_for_its_gpus_is_refused(workspace, verb):
    loaded = load([f"recipe={verb}_llama2_70b", *ONE[1:]])
    (problem,) = [one for one in check(loaded.recipe, loaded.sources, verb) if "weights" in one.what]
    assert problem.severity == "error" and problem.what.startswith("a process needs up to 132.0 GiB: weights 128.5, cache 1.2")
    assert problem.fix == "parallel.tensor_model_parallel_size=2 launch.nproc_per_node=2"
    assert said(*ONE, *problem.fix.split()) == []


@pytest.mark.parametrize("model", ["llama2_7b", "llama2_13b", "llama2_70b", "yuan2_2b", "yuan2_51b", "yuan2_102b"])
def test_every_recipe_for_generation_fits_its_gpus(workspace, model):
    assert said(f"recipe=generate_{model}") == []


def test_weights_and_cache_are_those_of_the_published_sizes(workspace):
    """Llama-2 70B: 68,976,648,192 parameters; 8 groups of 128 channels, keys and values, in each of 80 layers."""
    (one,) = answering_memory(load([*ONE, "generate.batch_size=3"]).recipe)
    assert one.weights == 2 * 68_976_648_192
    assert one.cache == 2 * 3 * 4096 * 80 * 2 * 8 * 128
    assert one.least == one.weights + one.base + 2 * 513 * 80 * 2 * 8 * 128
    halves = answering_memory(load([*ONE, "parallel.pipeline_model_parallel_size=2", "launch.nproc_per_node=2"]).recipe)
    assert sum(half.cache for half in halves) * 3 == one.cache and sum(half.weights for half in halves) == one.weights


def test_int8_matrices_take_a_byte_a_number(workspace):
    """Llama-2 70B: 68.5 billion numbers in its layers' matrices, of which a copy of the widest is in bf16 at a time."""
    (whole,), (int8,) = (answering_memory(load([*ONE, *words]).recipe) for words in ((), ("model.quantize=int8",)))
    matrices = 80 * (8192 * (8192 + 2 * 1024) + 8192 * 8192 + 3 * 8192 * 28672)
    assert whole.weights - int8.weights == matrices - 2 * 8192 * 2 * 28672


def test_groups_fewer_than_ranks_are_cached_on_each(workspace):
    eight, sixteen = (
        answering_memory(load([*ONE, f"parallel.tensor_model_parallel_size={tp}", f"launch.nproc_per_node={tp}"]).recipe)[0].cache
        for tp in (8, 16)
    )
    assert eight == sixteen


def test_a_batch_that_may_not_fit_is_a_warning_with_the_largest_that_does(workspace):
    (problem,) = said("recipe=generate_llama2_7b", "generate.batch_size=64")
    assert problem.severity == "warning" and "fewer or shorter prompts" in problem.what
    assert said("recipe=generate_llama2_7b", problem.fix) == []
    rows = int(problem.fix.partition("=")[2])
    assert said("recipe=generate_llama2_7b", f"generate.batch_size={2 * rows}") != []


def test_on_a_cpu_it_is_the_machines_memory_and_an_error_at_the_start(workspace, monkeypatch):
    monkeypatch.setattr(check_answering, "available", lambda recipe: 16 * 2**30)
    cpu = ["recipe=generate_llama2_7b", "launch.device=cpu", "training.precision=fp32"]
    assert [one.severity for one in said(*cpu)] == ["warning"]
    assert [one.severity for one in said(*cpu, launching=True)] == ["error"]


def test_sizes_that_only_the_checkpoint_has_are_not_guessed(workspace):
    assert said("recipe=generate_345m") == []
    loaded = load(ONE)
    broken = replace(loaded.recipe, model=replace(loaded.recipe.model, num_attention_heads=-8))
    assert list(memory(Case(broken, loaded.sources))) == []
    assert said(*ONE, "launch.device=cpu", "launch.node_rank=3") == []  # no such machine, which `machines` says
    assert all(memory in CHECKS[verb] for verb in ("generate", "serve"))
