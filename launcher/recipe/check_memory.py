"""Does the training fit? The estimate of memory against a GPU's, or against this machine's on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from launcher.recipe.check_model import REQUIRED, ranges
from launcher.recipe.estimate.change import Change, as_words, broken_rules, changed
from launcher.recipe.estimate.memory import BAND, GIB, Memory, stage_memory
from launcher.recipe.estimate.report import gib, parts
from launcher.recipe.problem import Case, Problem, divisors
from launcher.recipe.schema import Recipe

DERIVED = """model.ffn_hidden_size model.num_query_groups model.kv_channels model.max_position_embeddings
    training.global_batch_size derived.padded_vocab_size derived.world_size
    derived.data_parallel_size derived.num_microbatches""".split()
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory(case: Case) -> Iterator[Problem]:
    """An error beyond the estimate's band, a warning within it, nothing where the GPU's memory is not known.

    A CPU's is an error only where the processes are about to start: a recipe that is looked at may be for another machine.
    """
    recipe = case.recipe
    limit = available(recipe)
    if limit is None or not reckonable(case):
        return
    stages = stage_memory(recipe)
    needed = need(recipe, stages)
    if needed <= limit * (1 - BAND):
        return
    on_gpu = recipe.derived.device == "cuda"
    fullest = max(range(len(stages)), key=lambda stage: stages[stage].total)
    who = f"a process of stage {fullest}" if len(stages) > 1 else "a process"
    what = f"{who} needs {parts(stages[fullest])}; "
    if not on_gpu and recipe.launch.nproc_per_node > 1:
        what += f"{recipe.launch.nproc_per_node} processes need {gib(needed)}; "
    fits = needed <= limit * (1 + BAND)
    what += ("a GPU has " if on_gpu else "this machine has ") + gib(limit) + (", which may be just enough" if fits else "")
    keys = [*(["launch.gpu_memory_gib"] if on_gpu else []), "training.micro_batch_size", "parallel.recompute_granularity"]
    bad = not fits and (on_gpu or case.launching)
    yield Problem(what, case.at(*keys), remedy(case, limit), "error" if bad else "warning")


def reckonable(case: Case) -> bool:
    """Whether all that the estimate is made of is there and valid; where not, other rules say so."""
    return not missing(case, *REQUIRED, *DERIVED) and not any(ranges(case)) and not any(broken_rules(case.recipe, case.sources))


def missing(case: Case, *keys: str) -> list[str]:
    """Those of the keys that have no value, or one that is no size."""
    return [key for key in keys if not (case.value(key) or 0) > 0]


def available(recipe: Recipe) -> float | None:
    """Bytes that there are: of one GPU, or of this machine, or this container, for all its processes."""
    if recipe.derived.device == "cuda":
        return recipe.launch.gpu_memory_gib * GIB if recipe.launch.gpu_memory_gib else None
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    said = [Path(path).read_text().strip() for path in CGROUP_LIMITS if Path(path).is_file()]
    return min([machine, *(int(limit) for limit in said if limit.isdigit())])


def need(recipe: Recipe, stages: list[Memory]) -> int:
    """Bytes to hold against `available`: the fullest GPU's, or the sum over this machine's processes."""
    if recipe.derived.device == "cuda":
        return max(one.total for one in stages)
    launch, d, tp = recipe.launch, recipe.derived, recipe.parallel.tensor_model_parallel_size
    others = stage_memory(recipe, saves=False)
    first = launch.node_rank * launch.nproc_per_node
    ranks = range(first, first + launch.nproc_per_node)  # Megatron's order: TP, then DP, then PP
    each = [(others if rank // tp % d.data_parallel_size else stages)[rank * len(stages) // d.world_size] for rank in ranks]
    return sum(one.total for one in each)


def remedy(case: Case, limit: float) -> str:
    """The first of the usual changes, the cheapest first, that fits; each is tried with the rules and the estimate."""
    tried = 0
    for change in changes(case.recipe):
        altered = changed(case.recipe, change)
        if any(broken_rules(altered, case.sources)):
            continue
        tried += 1
        if need(altered, stage_memory(altered)) <= limit * (1 - BAND):
            return as_words(change, case.recipe)
    on_gpu = case.recipe.derived.device == "cuda"
    more = "more GPUs: `yuan plan recipe=… --gpus N`" if on_gpu else "a smaller model or fewer processes"
    return f"{more}; none of {tried} changes to sharing, micro-batch and recomputation fits"


def changes(recipe: Recipe) -> Iterator[Change]:
    """Changes that save memory and keep the training's results, the cheapest first, then together."""
    p, t = recipe.parallel, recipe.training
    sharing: list[Change] = []
    if recipe.derived.data_parallel_size > 1 and not p.use_distributed_optimizer and not p.zero:
        sharing.append({"parallel.use_distributed_optimizer": True})
    if p.tensor_model_parallel_size > 1 and not p.sequence_parallel:
        sharing.append({"parallel.sequence_parallel": True})
    smaller: list[Change] = [{"training.micro_batch_size": size} for size in divisors(t.micro_batch_size)[-2::-1]]
    again: list[Change] = [] if p.recompute_granularity else [{"parallel.recompute_granularity": "selective"}]
    if (p.recompute_granularity, p.recompute_method) != ("full", "uniform"):
        keys = ("parallel.recompute_granularity", "parallel.recompute_method", "parallel.recompute_num_layers")
        again.append(dict(zip(keys, ("full", "uniform", 1), strict=True)))
    yield from (*sharing, *smaller, *again)
    most: Change = {}
    for one in [*sharing, *smaller[-1:], *again[-1:]]:
        most |= one
        yield dict(most)
    for tp in (2, 4, 8):  # the same processes, more of them for one model
        if p.tensor_model_parallel_size < tp <= recipe.launch.nproc_per_node:
            wider: Change = {"parallel.tensor_model_parallel_size": tp}
            yield wider
            yield {**most, **wider, "parallel.sequence_parallel": True}
