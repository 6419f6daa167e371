"""Checks of how processes share a model and a batch: Megatron's rules on TP, PP, DP, and what each needs."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

from launcher.recipe.device import gpu_count
from launcher.recipe.pipeline import LayoutError, parse_layout
from launcher.recipe.estimate.stages import chunks
from launcher.recipe.problem import Case, Problem, divisors, nearest, nearest_divisors
from launcher.recipe.ramp import batch_sizes, whole_ramp

TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VP = "parallel.num_layers_per_virtual_pipeline_stage"
FIRST, LAST = "parallel.decoder_first_pipeline_num_layers", "parallel.decoder_last_pipeline_num_layers"
LAYOUT = "parallel.pipeline_model_parallel_layout"


def world(case: Case) -> Iterator[Problem]:
    """TP x PP processes hold one model; the whole must be a multiple of that."""
    p, processes = case.recipe.parallel, case.recipe.derived.world_size
    ranks = p.tensor_model_parallel_size * p.pipeline_model_parallel_size
    if ranks > 0 and processes > 0 and processes % ranks:
        nodes = case.recipe.launch.nnodes
        per_node = f"launch.nproc_per_node={nearest(processes // nodes, ranks // nodes if ranks % nodes == 0 else ranks)}"
        yield Problem(
            f"{processes} processes cannot be shared out over TP {p.tensor_model_parallel_size} x PP {p.pipeline_model_parallel_size} = {ranks}",
            case.at("launch.nnodes", "launch.nproc_per_node", TP, PP),
            f"{per_node}, or another TP or PP",
        )


def batch(case: Case) -> Iterator[Problem]:
    """The global batch is made of whole micro batches on every data-parallel rank."""
    t, dp = case.recipe.training, case.recipe.derived.data_parallel_size
    micro, total = t.micro_batch_size or 0, t.global_batch_size or 0
    if not dp or micro <= 0 or total <= 0 or total % (micro * dp) == 0:
        return
    fix = f"training.global_batch_size={nearest(total, micro * dp)}"
    if total % dp == 0:
        fix += f", or training.micro_batch_size={nearest_divisors(total // dp, micro)}"
    yield Problem(
        f"global_batch_size {total} is no multiple of micro_batch_size {micro} x data-parallel size {dp} = {micro * dp}",
        case.at("training.global_batch_size", "training.micro_batch_size"),
        fix,
    )


def tensor_parallel(case: Case) -> Iterator[Problem]:
    """Heads, groups and the feed-forward width are cut into TP parts; sequence parallelism also cuts the sequence."""
    m, p, t = case.recipe.model, case.recipe.parallel, case.recipe.training
    tp = p.tensor_model_parallel_size
    if tp < 1:
        return
    for key, value in (("model.num_attention_heads", m.num_attention_heads), ("model.ffn_hidden_size", m.ffn_hidden_size)):
        if value and value % tp:
            yield Problem(
                f"{key} {value} cannot be cut into TP {tp} parts",
                case.at(key, TP),
                f"{key}={nearest(value, tp)}, or {TP}={nearest_divisors(value, tp)}",
            )
    groups = m.num_query_groups if case.given("model.num_query_groups") else 0  # derived: the heads' fault, said above
    if groups > 0 and groups % tp and tp % groups:
        yield Problem(
            f"num_query_groups {groups} is neither a multiple nor a divisor of TP {tp}",
            case.at("model.num_query_groups", TP),
            f"{TP}={nearest_divisors(groups, tp)}, or model.num_query_groups={nearest(groups, tp)}",
        )
    keys = 2 * groups * (m.kv_channels or 0)
    if 0 < groups < tp and tp % groups == 0 and keys % tp:  # heads that several ranks share are cut all the same
        yield Problem(
            f"keys and values of {groups} groups x {m.kv_channels} channels cannot be cut into TP {tp} parts",
            case.at("model.num_query_groups", "model.kv_channels", TP),
            f"model.num_query_groups={tp}, or model.kv_channels={nearest(m.kv_channels, tp)}, or {TP}={groups}",
        )
    if not p.sequence_parallel:
        return
    if tp == 1:
        yield Problem(
            "sequence parallelism shares the sequence over tensor-parallel ranks, and there is one",
            case.at("parallel.sequence_parallel", TP),
            f"parallel.sequence_parallel=false, or {TP}=2",
            "warning",  # Megatron turns it off
        )
    elif t.seq_length and t.seq_length % tp:
        yield Problem(
            f"sequence parallelism cannot cut seq_length {t.seq_length} into TP {tp} parts",
            case.at("training.seq_length", TP),
            f"training.seq_length={nearest(t.seq_length, tp)}",
        )


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
            f"{layers} layers cannot be shared out over {pp} pipeline stages",
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
            f"the layout has {len(stages)} stages, no multiple of PP {pp}",
            case.at(LAYOUT, PP),
            f"{PP}={nearest_divisors(len(stages), pp)}, or {nearest(len(stages), pp)} stages",
        )
    if not flat.startswith("E") or not flat.endswith("L") or flat.count("E") != 1 or flat.count("L") != 1:
        yield Problem("a layout has one E, at its beginning, and one L, at its end", case.at(LAYOUT), "such as 'Et*3|t*3L'")
    if flat.count("t") != layers:
        yield Problem(
            f"the layout places {flat.count('t')} layers, and the model has {layers}",
            case.at(LAYOUT, "model.num_layers"),
            f"{layers} times t in the layout, or model.num_layers={flat.count('t')}",
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
    counts = [count for count in (case.value(FIRST), case.value(LAST)) if count is not None]
    left, stages = layers - sum(counts), pp - len(counts)
    if left < 0 or stages < 0 or bool(left) != bool(stages):
        yield Problem(
            f"{left} layers are left for the {stages} other stages",
            case.at("model.num_layers", PP, FIRST, LAST),
            ", or ".join(f"{key}=null" for key in (FIRST, LAST) if case.value(key) is not None)
            + ", or other counts: every stage needs a layer and every layer a stage",
        )
    elif stages and left % stages:
        yield Problem(
            f"the {left} layers between the first and last stage cannot be shared out over {stages} stages",
            case.at("model.num_layers", PP, FIRST, LAST),
            f"model.num_layers={' or '.join(str(int(n) + sum(counts)) for n in nearest(left, stages).split(' or '))}",
        )


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
                f"a stage's {per_stage} layers cannot be cut into virtual stages of {per_virtual}",
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
    uneven = sorted(count for count in counts if count % number)
    if uneven:
        fits = [d for d in divisors(gcd(*counts)) if d <= number]
        yield Problem(
            f"{number} layers are recomputed at once, and a stage has {' or '.join(map(str, uneven))}: that is no multiple",
            case.at(key, "parallel.recompute_method", PP),
            f"{key}={fits[-1]}, or parallel.recompute_method=block",
        )


def data_parallel(case: Case) -> Iterator[Problem]:
    """What the distributed optimizer and the overlaps need."""
    p = case.recipe.parallel
    if p.overlap_param_gather and not p.use_distributed_optimizer:
        yield Problem(
            "overlap_param_gather works with the distributed optimizer",
            case.at("parallel.overlap_param_gather"),
            "parallel.use_distributed_optimizer=true",
        )
    if p.overlap_param_gather and not p.overlap_grad_reduce:
        yield Problem(
            "overlap_param_gather works with overlap_grad_reduce",
            case.at("parallel.overlap_param_gather"),
            "parallel.overlap_grad_reduce=true",
        )


def machines(case: Case) -> Iterator[Problem]:
    """Several machines must find each other; Slurm tells them where by itself."""
    launch = case.recipe.launch
    if launch.kind == "torchrun" and launch.nnodes > 1 and not launch.rdzv_endpoint:
        yield Problem(
            f"{launch.nnodes} machines need a place to meet",
            case.at("launch.nnodes"),
            "launch.rdzv_endpoint=FIRST_MACHINE:29500, the same on every machine, or launch.kind=slurm",
            "error" if case.launching else "warning",
        )
    if 0 < launch.nnodes <= launch.node_rank:
        yield Problem(
            f"machine number {launch.node_rank} of {launch.nnodes}: numbers start at 0",
            case.at("launch.node_rank", "launch.nnodes"),
            "launch.node_rank=0" + (f" … {launch.nnodes - 1}" if launch.nnodes > 1 else ""),
        )


def gpus(case: Case) -> Iterator[Problem]:
    """A process needs a GPU of its own: here and now where it is about to start, else on the machine that will run it."""
    launch, present = case.recipe.launch, gpu_count()
    if case.recipe.derived.device != "cuda" or launch.kind == "slurm" or launch.nproc_per_node <= present:
        return
    yield Problem(
        f"{launch.nproc_per_node} processes want a GPU each, and on this machine torch can use {present}",
        case.at("launch.nproc_per_node", "launch.device"),
        f"launch.nproc_per_node={present}, or launch.device=cpu" if present else "launch.device=cpu, or a machine with GPUs",
        "error" if case.launching else "warning",
    )
