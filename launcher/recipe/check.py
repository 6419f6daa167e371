"""Would this recipe run? Every rule that Megatron asserts after the processes are up, asked before, all faults at once."""

from __future__ import annotations

import re
from collections.abc import Sequence

from launcher.errors import UserError, raise_all
from launcher.recipe import (
    check_answering,
    check_answers,
    check_checkpoint,
    check_conversion,
    check_data,
    check_finetuning,
    check_layout,
    check_lora,
    check_memory,
    check_model,
    check_run,
    check_schedule,
    check_sharding,
    check_slurm,
    check_stages,
)
from launcher.recipe.estimate.change import LAYOUT
from launcher.recipe.keys import table
from launcher.recipe.load import Loaded
from launcher.recipe.offers import keep_sound
from launcher.recipe.problem import Case, Check, Problem, standing
from launcher.recipe.schema import Recipe

_TRAINING: tuple[Check, ...] = (
    check_model.required,
    check_model.ranges,
    check_model.names,
    check_model.shapes,
    check_model.precision,
    check_model.family,
    *LAYOUT,
    check_layout.gpus,
    check_layout.compiler,
    check_slurm.slurm,
    check_schedule.units,
    check_schedule.learning_rate,
    check_schedule.first_step,
    check_schedule.weight_decay,
    check_schedule.rampup,
    check_data.tokenizer,
    check_checkpoint.load,
    check_checkpoint.export,
    check_lora.lora,
    check_lora.base,
    check_run.folder,
    check_run.disk,
    check_memory.memory,
)
_ANSWERING: tuple[Check, ...] = (
    check_model.ranges,
    check_model.generation_ranges,
    check_model.family,
    check_layout.world,
    check_layout.tensor_parallel,
    check_stages.pipeline,
    check_layout.machines,
    check_layout.gpus,
    check_answers.checkpoint,
    check_answering.memory,
)
CHECKS: dict[str, tuple[Check, ...]] = {
    "pretrain": (*_TRAINING, check_schedule.length, check_data.data, check_run.cache, check_finetuning.in_vain),
    "sft": (*_TRAINING, check_finetuning.length, check_finetuning.rows, check_finetuning.packing, check_finetuning.template, check_finetuning.weights),
    "rows": (check_model.ranges, check_data.tokenizer, check_finetuning.rows, check_finetuning.template),  # of `yuan preprocess`
    "tokenizer": (check_data.tokenizer,),
    "preprocess": (check_model.ranges, check_data.preprocess_input, check_data.tokenizer),
    "convert": (check_model.ranges, check_model.shapes, check_conversion.places, check_conversion.layout),
    "generate": (*_ANSWERING, check_answers.files),
    "serve": (*_ANSWERING, check_answers.address),
}


# The checks that look at the recipe alone, at no file: asked again about every change that they offer.
_OF_THE_RECIPE = {module.__name__ for module in (check_model, check_layout, check_sharding, check_stages, check_schedule)}


# What the number of data-parallel ranks follows from, and what is judged by it.
_LAYOUT = {check_layout.TP, check_layout.PP, "launch.nnodes", "launch.nproc_per_node"}
_OF_LAYOUT = {"training.micro_batch_size", "training.global_batch_size", "training.rampup_batch_size"}


def check(recipe: Recipe, sources: dict[str, str], verb: str = "pretrain", faults: Sequence[UserError] = (), **options: bool) -> list[Problem]:
    """Everything that is wrong or odd with a resolved recipe for `verb` (a key of CHECKS), errors first.

    `faults` are those of `Loaded`: nothing is said of keys that they name, and there are no warnings beside them.
    `options` are those of `Case`: launching, accept_changes.
    """
    case = Case(recipe, sources, **options)
    by_itself = [one for one in CHECKS[verb] if one.__module__ in _OF_THE_RECIPE]
    found = [problem for one in by_itself for problem in one(case)]
    wrong = _named(faults).union(*(problem.keys for problem in found if problem.by_itself))
    wrong |= _OF_LAYOUT if wrong & _LAYOUT else set()
    problems = keep_sound(case, standing(found, wrong), by_itself, wrong)
    problems += standing([problem for one in CHECKS[verb] if one not in by_itself for problem in one(case)], wrong)
    told = [problem for problem in problems if problem.severity == "error" or not faults]
    return sorted(told, key=lambda problem: problem.severity)


def _named(faults: Sequence[UserError]) -> set[str]:
    """The keys that faults name, those that were meant included; of a group, all."""
    words = {word for fault in faults for word in re.findall(r"[a-z]+(?:\.\w+)?", f"{fault.what} {fault.fix}")}
    meant = {fault.fix.removeprefix("did you mean ").removesuffix("?") for fault in faults}
    return {key for key in table() if key in words or key.split(".")[0] in meant}


def ensure(loaded: Loaded, verb: str = "pretrain", launching: bool = True, accept_changes: bool = False) -> list[Problem]:
    """The warnings of a recipe without errors. `launching=False` is for a dry run: this machine need not have the GPUs.

    Raises:
        UserError: the recipe has errors; all of them are in it.
    """
    faults = loaded.faults
    problems = check(loaded.recipe, loaded.sources, verb, faults, launching=launching, accept_changes=accept_changes)
    raise_all([*faults, *(problem.as_error() for problem in problems if problem.severity == "error")])
    return problems
