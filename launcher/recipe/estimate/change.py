"""Other layouts of one recipe: what follows from them anew, whether they are valid ones, the words that ask for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from launcher.recipe import check_layout, check_schedule, check_sharding, check_stages
from launcher.recipe.problem import Case, Check, Problem
from launcher.recipe.resolve import padded_vocabulary
from launcher.recipe.schema import Recipe

Change = dict[str, object]  # dotted keys and their new values

LAYOUT: tuple[Check, ...] = (  # the rules of `check` about how processes share a model and a batch
    check_layout.world,
    check_layout.batch,
    check_layout.tensor_parallel,
    check_stages.pipeline,
    check_stages.interleaving,
    check_stages.recompute,
    check_layout.data_parallel,
    check_sharding.zero,
    check_sharding.idle,
    check_sharding.offloading,
    check_layout.machines,
)
RULES = (*LAYOUT, check_schedule.rampup)  # those that another layout can break


def changed(recipe: Recipe, change: Change) -> Recipe:
    """A copy of a resolved recipe with other values under `parallel`, `training` or `launch`, its derived sizes anew.

    The global batch stays; where it is no whole number of micro-batches, or the processes no whole number of models,
    what would follow is None, as `resolve` has it.
    """
    groups: dict[str, dict[str, object]] = {}
    for key, value in change.items():
        group, leaf = key.split(".")
        groups.setdefault(group, {})[leaf] = value
    altered = replace(recipe, **{group: replace(getattr(recipe, group), **values) for group, values in groups.items()})
    p, t = altered.parallel, altered.training
    world = altered.launch.nnodes * altered.launch.nproc_per_node
    ranks = p.tensor_model_parallel_size * p.pipeline_model_parallel_size
    dp = world // ranks if world % ranks == 0 else None
    at_once = t.micro_batch_size * (dp or 0)
    altered.derived = replace(
        altered.derived,
        world_size=world,
        data_parallel_size=dp,
        num_microbatches=t.global_batch_size // at_once if at_once and t.global_batch_size % at_once == 0 else None,
        padded_vocab_size=padded_vocabulary(altered),
    )
    return altered


def broken_rules(recipe: Recipe, sources: dict[str, str]) -> Iterator[Problem]:
    """The errors of a layout."""
    case = Case(recipe, sources)
    return (problem for rule in RULES for problem in rule(case) if problem.severity == "error")


def as_words(change: Change, recipe: Recipe) -> str:
    """A change as words of the command line; what the recipe has already is left out."""
    case = Case(recipe, {})
    return " ".join(f"{key}={_shown(value)}" for key, value in change.items() if case.value(key) != value)


def _shown(value: object) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"'{text}'" if set(text) & set("|*()") else text
