"""Does the model that answers fit? Its weights and its cache against a GPU's memory, or against this machine's on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from launcher.recipe import check_layout, check_stages
from launcher.recipe.check_memory import available, missing
from launcher.recipe.check_model import ranges
from launcher.recipe.estimate.answering import PARTS, Answering, answering_memory
from launcher.recipe.estimate.memory import BAND
from launcher.recipe.estimate.report import gib
from launcher.recipe.problem import Case, Problem
from launcher.recipe.resolve import padded_vocabulary
from launcher.recipe.schema import Recipe

TP = "parallel.tensor_model_parallel_size"
NEEDED = """model.num_layers model.hidden_size model.ffn_hidden_size model.num_attention_heads model.num_query_groups
    model.kv_channels model.max_position_embeddings generate.batch_size generate.max_new_tokens
    derived.padded_vocab_size derived.world_size derived.data_parallel_size""".split()


def memory(case: Case) -> Iterator[Problem]:
    """An error where not even one short prompt can be answered, a warning where a full batch of long ones cannot; on a CPU
    an error only where the processes are about to start. Nothing where a size of the model is in the checkpoint alone."""
    recipe, limit = case.recipe, available(case.recipe)
    if limit is None or not _reckonable(case):
        return
    stages = answering_memory(recipe)
    full, least = (_needed(recipe, [getattr(one, name) for one in stages]) for name in ("total", "least"))
    if full <= limit * (1 - BAND):
        return
    on_gpu = recipe.derived.device == "cuda"
    never = least > limit * (1 + BAND)
    bad = never and (on_gpu or case.launching)
    yield Problem(
        f"{_who(recipe)} {_parts(max(stages, key=lambda one: one.total))}; {'a GPU' if on_gpu else 'this machine'} has {gib(limit)}"
        + ("" if never else ": enough for fewer or shorter prompts side by side"),
        case.at(*(["launch.gpu_memory_gib"] if on_gpu else []), TP, "generate.batch_size", "model.max_position_embeddings"),
        _remedy(recipe, limit),
        "error" if bad else "warning",
    )


def _reckonable(case: Case) -> bool:
    """Whether the sizes are there and valid; where not, other rules say so."""
    rules = (ranges, check_layout.world, check_layout.machines, check_layout.tensor_parallel, check_stages.pipeline)
    return not missing(case, *NEEDED) and not any(one.severity == "error" for rule in rules for one in rule(case))


def _needed(recipe: Recipe, stages: list[int]) -> int:
    """Bytes to hold against `available`: the fullest GPU's, or the sum over this machine's processes."""
    launch, world = recipe.launch, recipe.derived.world_size
    if recipe.derived.device == "cuda":
        return max(stages)
    first = launch.node_rank * launch.nproc_per_node
    return sum(stages[rank * len(stages) // world] for rank in range(first, first + launch.nproc_per_node))


def _who(recipe: Recipe) -> str:
    each = "a process" if recipe.derived.world_size == 1 else f"each of {recipe.derived.world_size} processes"
    return f"{each} needs up to"


def _parts(one: Answering) -> str:
    return f"{gib(one.total)} GiB: " + ", ".join(f"{part} {gib(getattr(one, part))}" for part in PARTS)


def _remedy(recipe: Recipe, limit: float) -> str:
    """The largest batch that fits; else the least TP that does, of the whole number of machines' processes."""
    for rows in (2**power for power in range(10, -1, -1)):
        smaller = replace(recipe, generate=replace(recipe.generate, batch_size=rows))
        if rows < recipe.generate.batch_size and _fits(smaller, limit):
            return f"generate.batch_size={rows}"
    if recipe.derived.device == "cpu":
        return "a machine with more memory, or training.precision=bf16" if recipe.training.precision == "fp32" else "a machine with more memory"
    pp = recipe.parallel.pipeline_model_parallel_size
    for tp in (2, 4, 8, 16):
        wider = _wider(recipe, tp)
        if tp > recipe.parallel.tensor_model_parallel_size and wider and _fits(wider, limit):
            return f"{TP}={tp} launch.nproc_per_node={tp * pp}"
    return "more GPUs, by a larger TP or PP"


def _wider(recipe: Recipe, tp: int) -> Recipe | None:
    """The same model over so many tensor-parallel ranks of one machine; None where it cannot be cut so."""
    m, pp = recipe.model, recipe.parallel.pipeline_model_parallel_size
    if m.num_attention_heads % tp or m.ffn_hidden_size % tp:
        return None
    wider = replace(
        recipe,
        parallel=replace(recipe.parallel, tensor_model_parallel_size=tp),
        launch=replace(recipe.launch, nnodes=1, nproc_per_node=tp * pp),
        derived=replace(recipe.derived, world_size=tp * pp, data_parallel_size=1),
    )
    wider.derived.padded_vocab_size = padded_vocabulary(wider)
    return wider


def _fits(recipe: Recipe, limit: float) -> bool:
    return _needed(recipe, [one.total for one in answering_memory(recipe)]) <= limit * (1 - BAND)
