"""Checks of pipeline stages: layers over them, explicit layouts, virtual stages, and what is recomputed of each."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

from launcher.console import plural
from launcher.recipe.estimate.stages import chunks
from launcher.recipe.pipeline import LayoutError, parse_layout
from launcher.recipe.problem import Case, Problem, beside, divisors, nearest, nearest_divisors
from launcher.recipe.ramp import batch_sizes, whole_ramp

PP = "parallel.pipeline_model_parallel_size"
VP = "parallel.num_layers_per_virtual_pipeline_stage"
FIRST, LAST = "parallel.decoder_first_pipeline_num_layers", "parallel.decoder_last_pipeline_num_layers"
LAYOUT = "parallel.pipeline_model_parallel_layout"


def pipeline(case: Case) -> Iterator[Problem]:
    """Layers are shared out over the stages evenly, or by first/last counts, or by an explicit layout."""
    p, layers = case.recipe.parallel, case.recipe.model.num_layers or 0
    pp = p.pipeline_model_parallel_size
    if layers <= 0 or pp < 1:
        return
    uneven = p.decoder_first_pipeline_num_layers is not None or p.decoder_last_pipeline_num_layers is not None
    if p.pipeline_model_parallel_layout is not None:
        yield from _layout(case, layers, pp)
        for key in (VP, FIRST, LAST):
            if case.value(key) is not None:
                yield Problem(
                    f"{LAYOUT} says all about the stages, so {key} cannot be given too",
                    case.at(LAYOUT, key),
                    f"{key}=null, or {LAYOUT}=null",
                )
    elif uneven:
        yield from _uneven(case, layers, pp)
    elif layers % pp:
        yield Problem(
            f"{plural(layers, 'layer')} cannot be shared out over {plural(pp, 'pipeline stage')}",
            case.at("model.num_layers", PP),
            f"model.num_layers={nearest(layers, pp)}, or {PP}={nearest_divisors(layers, pp)}, or stages of your own with {LAYOUT}",
        )


def _layout(case: Case, layers: int, pp: int) -> Iterator[Problem]:
    try:
        stages = parse_layout(case.recipe.parallel.pipeline_model_parallel_layout)
    except LayoutError as error:
        yield Problem(
            str(error), case.at(LAYOUT), "such as 'Et*3|t*3L': E embedding, t layer, L loss, | between stages, *n repeats"
        )
        return
    flat = "".join(stages)
    yield from _empty_stages(case, stages)
    if len(stages) % pp:
        yield Problem(
            f"the layout has {plural(len(stages), 'stage')}, no multiple of PP {pp}",
            case.at(LAYOUT, PP),
            f"{PP}={nearest_divisors(len(stages), pp)}, or a layout of {nearest(len(stages), pp)} stages",
        )
    if not flat.startswith("E") or not flat.endswith("L") or flat.count("E") != 1 or flat.count("L") != 1:
        yield Problem("a layout has one E, at its beginning, and one L, at its end", case.at(LAYOUT), "such as 'Et*3|t*3L'")
    if flat.count("t") != layers:
        yield Problem(
            f"the layout places {plural(flat.count('t'), 'layer')}, and the model has {layers}",
            case.at(LAYOUT, "model.num_layers"),
            f"a layout with {layers} times t, or model.num_layers={flat.count('t')}",
        )


def _empty_stages(case: Case, stages: list[str]) -> Iterator[Problem]:
    """Megatron computes the embedding on the first stage and the loss on the last, whatever a layout says."""
    for letter, name, end, stage in (("E", "embedding", "first", stages[0]), ("L", "loss", "last", stages[-1])):
        if letter not in stage and letter in "".join(stages):
            what = f"the layout has {letter} not on the {end} stage, where the {name} is computed all the same"
            yield Problem(what, case.at(LAYOUT), "such as 'Et*3|t*3L'", "warning")
    empty = [str(number) for number, stage in enumerate(stages, 1) if not stage]
    if empty:
        what = f"stage {' and '.join(empty)} of {len(stages)} holds nothing: its ranks only pass on what they get"
        yield Problem(what, case.at(LAYOUT), "fewer | in the layout, or a t between them", "warning")


def _uneven(case: Case, layers: int, pp: int) -> Iterator[Problem]:
    if case.value(VP) is not None:
        yield Problem(
            "stages with counts of their own cannot be cut into virtual stages by layers",
            case.at(VP, FIRST, LAST),
            f"{VP}=null, or {LAYOUT}, which can say both",
        )
    counts = [number for number in (case.value(FIRST), case.value(LAST)) if number is not None]
    left, stages = layers - sum(counts), pp - len(counts)
    if left < 0 or stages < 0 or bool(left) != bool(stages):
        fixes = _other_counts(case, layers, stages)
        fixes += [f"{key}=null" for key in (FIRST, LAST) if case.value(key) is not None]
        yield Problem(
            f"{plural(left, 'layer')} {'is' if left == 1 else 'are'} left for the {plural(stages, 'other stage')}",
            case.at("model.num_layers", PP, FIRST, LAST),
            ", or ".join(fixes),
        )
    elif stages and left % stages:
        fixes = [f"model.num_layers={' or '.join(str(int(n) + sum(counts)) for n in nearest(left, stages).split(' or '))}"]
        yield Problem(
            f"the {plural(left, 'layer')} between the first and last stage cannot be shared out over {plural(stages, 'stage')}",
            case.at("model.num_layers", PP, FIRST, LAST),
            ", or ".join(_other_counts(case, layers, stages) + fixes),
        )


def _other_counts(case: Case, layers: int, stages: int) -> list[str]:
    """The counts for the first or the last stage, nearest to the given ones, that leave every other of `stages` as many layers."""
    fixes = []
    for key, other in ((FIRST, case.value(LAST)), (LAST, case.value(FIRST))):
        if case.value(key) is not None and stages >= 0:
            rest = layers - (other or 0)
            fits = [rest - each * stages for each in range(1, layers + 1) if 0 < rest - each * stages < layers]
            values = beside(fits, case.value(key))
            fixes += [f"{key}={' or '.join(map(str, values))}"] if values else []
    return fixes


def interleaving(case: Case) -> Iterator[Problem]:
    """Virtual stages: whole ones on each rank, more than one rank, and micro batches in groups of PP.

    One virtual stage per rank is the ordinary schedule, as with Megatron-LM, and asks for nothing.
    """
    p, layers = case.recipe.parallel, case.recipe.model.num_layers or 0
    pp, per_virtual = p.pipeline_model_parallel_size, p.num_layers_per_virtual_pipeline_stage
    virtual, key = 1, VP
    if p.pipeline_model_parallel_layout is not None:
        try:
            virtual, key = len(parse_layout(p.pipeline_model_parallel_layout)) / max(pp, 1), LAYOUT
        except LayoutError:
            return  # reported by `pipeline`
    elif per_virtual and per_virtual > 0 and pp > 0 and layers % pp == 0:
        per_stage = layers // pp
        if per_stage % per_virtual:
            yield Problem(
                f"a stage's {plural(per_stage, 'layer')} cannot be cut into virtual stages of {per_virtual}",
                case.at("model.num_layers", PP, VP),
                f"{VP}={nearest_divisors(per_stage, per_virtual)}",
            )
            return
        virtual = per_stage // per_virtual
    if virtual <= 1:
        return
    if pp < 2:
        yield Problem("virtual stages need a pipeline of at least 2 stages", case.at(key, PP), f"{PP}=2, or {key}=null")
    else:
        yield from _groups_of_micro_batches(case, pp)


def _groups_of_micro_batches(case: Case, pp: int) -> Iterator[Problem]:
    t, ramp = case.recipe.training, "training.rampup_batch_size"
    at_once = (t.micro_batch_size or 0) * (case.recipe.derived.data_parallel_size or 0)
    sizes = batch_sizes(case.recipe)[::-1]  # the whole batch first: mending it may mend the others
    wrong = [size for size in sizes if at_once > 0 and size > 0 and size % at_once == 0 and size // at_once % pp]
    if wrong:
        whole = wrong[0] == t.global_batch_size
        mended = None if whole else whole_ramp(t.rampup_batch_size, t.global_batch_size, at_once * pp)
        fix = f"{ramp}={str(mended).replace(' ', '') if mended else 'null'}"
        yield Problem(
            f"the interleaved schedule takes micro batches in groups of PP {pp}, and a step of {wrong[0]} samples has "
            f"{wrong[0] // at_once}",
            case.at("training.global_batch_size" if whole else ramp, PP),
            f"training.global_batch_size={nearest(wrong[0], at_once * pp)}" if whole else fix,
        )


def recompute(case: Case) -> Iterator[Problem]:
    """selective takes no method; full needs one, and a number of layers."""
    p = case.recipe.parallel
    method, number = "parallel.recompute_method", "parallel.recompute_num_layers"
    if p.recompute_granularity == "full":
        if p.recompute_method is None:
            yield Problem(
                "full recomputation needs a method", case.at("parallel.recompute_granularity"), f"{method}=uniform or block"
            )
        if p.recompute_num_layers is None:
            yield Problem("full recomputation needs a number of layers", case.at("parallel.recompute_granularity"), f"{number}=1")
        elif p.recompute_method == "uniform":
            yield from _uniform_chunks(case, number)
        return
    state = "selective recomputation" if p.recompute_granularity else "no recomputation"
    for key in (method, number):
        if case.value(key) is not None:
            fix = f"{key}=null, or parallel.recompute_granularity=full"
            severity = "error" if p.recompute_granularity else "warning"
            yield Problem(f"{key} says nothing with {state}", case.at(key), fix, severity)


def _uniform_chunks(case: Case, key: str) -> Iterator[Problem]:
    """megatron-core walks a stage in steps of so many layers, and over its end where they do not divide it."""
    number = case.value(key)
    if number < 1 or not case.recipe.model.num_layers or any(problem.severity == "error" for problem in pipeline(case)):
        return
    counts = {chunk.layers for rank in chunks(case.recipe) for chunk in rank if chunk.layers}
    uneven = sorted(layers for layers in counts if layers % number)
    if uneven:
        fits = [d for d in divisors(gcd(*counts)) if d <= number]
        yield Problem(
            f"{plural(number, 'layer')} {'is' if number == 1 else 'are'} recomputed at once, and a stage has {' or '.join(map(str, uneven))}: that is no multiple",
            case.at(key, "parallel.recompute_method", PP),
            f"{key}={fits[-1]}, or parallel.recompute_method=block",
        )
