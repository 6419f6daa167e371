"""Layouts of a recipe on a number of GPUs: all that come into question, which of them fit, and how long each takes a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, product

from launcher.recipe.estimate.change import RULES, Change, changed
from launcher.recipe.estimate.memory import BAND, GIB, stage_memory
from launcher.recipe.estimate.time import Step, step
from launcher.recipe.problem import Case, divisors
from launcher.recipe.schema import Recipe

MICRO_BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Layout:
    """One layout that fits: what it changes, what it makes of the recipe, its fullest GPU in bytes, its step."""

    change: Change
    recipe: Recipe
    memory: int
    step: Step


@dataclass
class Search:
    """What came of the search.

    Attributes:
        fitting: the layouts that fit, the fastest first.
        broken: name of a rule of `check` → how many layouts break it first.
        too_large: layouts that are valid and do not fit.
        nearest: of those the one that needs the least memory; None where there is none.
    """

    fitting: list[Layout] = field(default_factory=list)
    broken: Counter[str] = field(default_factory=Counter)
    too_large: int = 0
    nearest: Layout | None = None

    def best_of_each(self) -> list[Layout]:
        """The fastest of every TP and PP, the fastest first."""
        seen: set[tuple[int, int]] = set()
        best = []
        for one in self.fitting:
            p = one.recipe.parallel
            if (key := (p.tensor_model_parallel_size, p.pipeline_model_parallel_size)) not in seen:
                seen.add(key)
                best.append(one)
        return best


def search(recipe: Recipe, sources: dict[str, str]) -> Search:
    """Try every layout of a resolved recipe on its launch.nnodes x launch.nproc_per_node GPUs of launch.gpu_memory_gib."""
    found = Search()
    limit = recipe.launch.gpu_memory_gib * GIB * (1 - BAND)
    for shape in shapes(recipe):
        plain = changed(recipe, shape)
        broken = _first_broken(plain, sources)
        if broken:
            found.broken[broken] += 1
            continue
        for recompute in recomputations(plain):
            one = changed(plain, recompute)
            needed = max(stage.total for stage in stage_memory(one))
            if needed <= limit:
                found.fitting.append(Layout(shape | recompute, one, needed, step(one)))
                break  # those that follow recompute more, and take longer
            found.too_large += 1
            if found.nearest is None or needed < found.nearest.memory:
                found.nearest = Layout(shape | recompute, one, needed, step(one))
    found.fitting.sort(key=lambda one: one.step.seconds)
    return found


def _first_broken(recipe: Recipe, sources: dict[str, str]) -> str | None:
    case = Case(recipe, sources)
    for rule in RULES:
        if any(problem.severity == "error" for problem in rule(case)):
            return rule.__name__
    return None


def shapes(recipe: Recipe) -> Iterator[Change]:
    """Every TP within a machine, PP, interleaving, micro-batch and stage of ZeRO, without recomputation."""
    layers, world = recipe.model.num_layers, recipe.derived.world_size
    for tp in divisors(recipe.launch.nproc_per_node):
        if world % tp:
            continue
        for pp in divisors(world // tp):
            if pp > layers:
                continue
            dp = world // tp // pp
            for micro, stages, zero in product(MICRO_BATCHES, pipelines(layers, pp), (None, 2, 3) if dp > 1 and pp == 1 else (None,)):
                yield {
                    "parallel.tensor_model_parallel_size": tp,
                    "parallel.pipeline_model_parallel_size": pp,
                    **stages,
                    "parallel.sequence_parallel": tp > 1,
                    "parallel.use_distributed_optimizer": dp > 1 and zero is None,
                    "parallel.zero": zero,
                    "parallel.recompute_granularity": None,
                    "parallel.recompute_method": None,
                    "parallel.recompute_num_layers": None,
                    "training.micro_batch_size": micro,
                }


def pipelines(layers: int, pp: int) -> Iterator[Change]:
    """The ways to share out layers: evenly, interleaved, or where they cannot be shared evenly by an explicit layout."""
    even: Change = {
        "parallel.pipeline_model_parallel_layout": None,
        "parallel.num_layers_per_virtual_pipeline_stage": None,
        "parallel.decoder_first_pipeline_num_layers": None,
        "parallel.decoder_last_pipeline_num_layers": None,
    }
    if layers % pp:
        yield even | {"parallel.pipeline_model_parallel_layout": uneven_layout(layers, pp)}
        return
    yield even
    if pp > 1:
        for each in divisors(layers // pp)[:-1]:
            yield even | {"parallel.num_layers_per_virtual_pipeline_stage": each}


def uneven_layout(layers: int, pp: int) -> str:
    """Megatron's notation of stages that differ by one layer: the last, which has the logits, and the first ones, which
    hold most micro-batches, get the fewer. Yuan 2.0's published layouts are of this kind."""
    counts = [layers // pp] * pp
    more = layers % pp
    for stage in [*range(pp - 2, -1, -1), pp - 1][:more]:
        counts[stage] += 1
    runs = [(count, len(list(same))) for count, same in groupby(counts)]
    text = "".join("t" * count + "|" if times == 1 else f"({'t' * count}|)*{times}" for count, times in runs[:-1])
    count, times = runs[-1]
    text += (f"({'t' * count}|)*{times - 1}" if times > 1 else "") + "t" * count
    return f"E{text}L"


def recomputations(recipe: Recipe) -> Iterator[Change]:
    """No recomputation, that of some layers of each stage, that of all: ever less memory and more time.

    `selective` is left out: on a GPU the attention is fused, and there is hardly anything to recompute in it.
    """
    keys = ("parallel.recompute_granularity", "parallel.recompute_method", "parallel.recompute_num_layers")
    yield dict.fromkeys(keys)
    p = recipe.parallel
    if p.cpu_offloading_num_layers:  # activations are computed again or wait in the host's memory, not both
        return
    if p.num_layers_per_virtual_pipeline_stage is None:  # `block` counts layers of a whole stage
        most = -(-recipe.model.num_layers // p.pipeline_model_parallel_size)
        for number in range(max(1, most // 8), most, max(1, most // 8)):
            yield dict(zip(keys, ("full", "block", number), strict=True))
    yield dict(zip(keys, ("full", "uniform", 1), strict=True))
