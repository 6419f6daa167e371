"""`yuan plan`: which layouts of a recipe fit on so many GPUs, and which of them is fastest."""

from __future__ import annotations

import sys
from typing import Annotated, Optional

import typer

from launcher.console import columns, hanging
from launcher.errors import UserError, raise_all
from launcher.recipe import Loaded, load
from launcher.recipe.check import check
from launcher.recipe.check_memory import missing
from launcher.recipe.check_model import REQUIRED, ranges, shapes
from launcher.recipe.estimate.change import Change, as_words, changed
from launcher.recipe.estimate.layouts import Layout, Search, search
from launcher.recipe.estimate.report import duration, gib
from launcher.recipe.estimate.stages import chunks
from launcher.recipe.estimate.time import Step, peak_flops, training_seconds
from launcher.recipe.problem import Case, nearest, nearest_divisors
from launcher.recipe.schema import Recipe
from launcher.recipe.size import parameters
from launcher.recipe.verb import verb_of

WHY = {  # parts of a step that another layout could save
    "recompute": "recompute",
    "bubble": "bubble",
    "tensor": "TP",
    "pipeline": "PP",
    "data": "DP",
}
BROKEN = {  # rules of `check` → what they say of a layout
    "world": "GPUs not divisible by TP x PP",
    "batch": "global batch no whole number of micro-batches",
    "tensor_parallel": "heads, groups or widths not divisible by TP",
    "pipeline": "layers not divisible by PP",
    "interleaving": "micro-batches no multiple of PP, which interleaving asks for",
    "recompute": "recomputation",
    "data_parallel": "overlaps without the distributed optimizer",
    "rampup": "batch ramp-up no whole number of micro-batches",
    "zero": "ZeRO 2 and 3 beside what they do not go with",
    "offloading": "offloading without what it needs",
    "idle": "ranks that train nothing",
    "machines": "machines that do not meet",
}
NEEDED = ("launch.gpu_memory_gib", "training.global_batch_size", "derived.vocab_size")


def plan(
    words: Annotated[
        Optional[list[str]], typer.Argument(metavar="recipe=NAME [KEY=VALUE]...", help="The recipe, and values that override its own.")
    ] = None,
    gpus: Annotated[Optional[int], typer.Option(metavar="N", min=1, help="GPUs in all. Default: the recipe's.")] = None,
    gpus_per_node: Annotated[Optional[int], typer.Option(metavar="G", min=1, help="GPUs of one machine. Default: 8.")] = None,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Layouts to show.")] = 8,
) -> None:
    """Propose layouts (TP, PP, ZeRO, micro-batch, recomputation) that fit launch.gpu_memory_gib, the fastest first.

    Memory is estimated within 10 %, and a layout must leave that much free. Time is a simple model of machines of A100
    with NVLink and a 200 Gb/s adapter per GPU (launcher/recipe/estimate/time.py). The global batch stays what it is.

    \b
    Examples:
      yuan plan recipe=llama2_70b --gpus 64
      yuan plan recipe=llama2_7b --gpus 16 launch.gpu_memory_gib=40
    """
    loaded = loaded_on(words or [], gpus, gpus_per_node)
    found = search(loaded.recipe, loaded.sources)
    print(headline(loaded))
    if not found.fitting:
        print("\n".join(nothing_fits(loaded, found)))
        raise typer.Exit(2)
    print()
    print("\n".join(table(found.best_of_each()[:top])))
    print()
    print("\n".join(after(loaded, found)))


def loaded_on(words: list[str], gpus: int | None, per_node: int | None) -> Loaded:
    """The recipe on the machines that are asked for; its own where none are.

    Raises:
        UserError: the recipe does not say what the search needs, or the GPUs make no whole machines.
    """
    cuda: dict[str, tuple[object, str]] = {"launch.device": ("cuda", "yuan plan")}
    launch = load(words, cuda).recipe.launch
    total = gpus or launch.nnodes * launch.nproc_per_node
    each = min(per_node or (8 if gpus else launch.nproc_per_node), total)
    if total % each:
        fix = f"--gpus {nearest(total, each)}, or --gpus-per-node {nearest_divisors(total, each)}"
        raise UserError(f"{total} GPUs make no whole machines of {each}", "--gpus, --gpus-per-node", fix)
    loaded = load(words, cuda | {"launch.nnodes": (total // each, "--gpus"), "launch.nproc_per_node": (each, "--gpus-per-node")})
    case = Case(loaded.recipe, loaded.sources)
    raise_all([problem.as_error() for rule in (ranges, shapes) for problem in rule(case) if problem.severity == "error"])
    unknown = missing(case, *REQUIRED, *NEEDED)
    fixes = {"derived.vocab_size": "add tokenizer.vocab_size=…, or let the recipe name the tokenizer's files"}
    fixes["launch.gpu_memory_gib"] = "add launch.gpu_memory_gib=80, or what one of the GPUs has"
    why_needed = "a layout cannot be planned without it"
    raise_all([UserError(f"{key} is not known", why_needed, fixes.get(key, f"add {key}=…")) for key in unknown])
    return loaded


def headline(loaded: Loaded) -> str:
    """What is planned, in two lines."""
    r = loaded.recipe
    t, launch = r.training, r.launch
    machines = f"{launch.nnodes} x {launch.nproc_per_node} GPUs of {launch.gpu_memory_gib:g} GiB"
    peak = f"{peak_flops(r) / 1e12:g} TFLOP/s"
    if not launch.gpu_peak_tflops:
        peak += ", an A100's, as launch.gpu_peak_tflops is not given"
    batch = f"{t.global_batch_size:,} samples of {t.seq_length:,} tokens a step"
    return f"{loaded.name}: {parameters(r) / 1e9:,.1f} B parameters, {t.precision}, {batch}\non {machines}, {peak}"


def table(layouts: list[Layout]) -> list[str]:
    """A row for each layout, and where its time goes that is not the model's arithmetic."""
    rows = [["TP", "PP", "VP", "DP", "ZeRO", "micro", "recompute", "GiB", "time"]]
    for one in layouts:
        r, virtual = one.recipe, len(chunks(one.recipe)[0])
        rows.append(
            [
                str(r.parallel.tensor_model_parallel_size),
                str(r.parallel.pipeline_model_parallel_size),
                str(virtual) if virtual > 1 else "-",
                str(r.derived.data_parallel_size),
                str(r.parallel.zero or (1 if r.parallel.use_distributed_optimizer else "-")),
                str(r.training.micro_batch_size),
                recompute(r),
                gib(one.memory),
                f"{one.step.seconds / layouts[0].step.seconds:.2f}",
            ]
        )
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lost = ["lost to", *(why(one.step) for one in layouts)]
    return [
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, columns, strict=True)) + f"  {text}"
        for row, text in zip(rows, lost, strict=True)
    ]


def recompute(recipe: Recipe) -> str:
    """`all`, or `3 of 10` layers of a stage, or `-`."""
    p = recipe.parallel
    if p.recompute_granularity is None:
        return "-"
    most = max(sum(chunk.layers for chunk in stage) for stage in chunks(recipe))
    return "all" if p.recompute_method == "uniform" else f"{p.recompute_num_layers} of {most}"


def why(step: Step) -> str:
    """Where another layout could save time: every part of a step above 2 %, the largest first."""
    parts = sorted(((step.share(part), name) for part, name in WHY.items()), reverse=True)
    return ", ".join(f"{name} {share:.0%}" for share, name in parts if share >= 0.02) or "little"


def after(loaded: Loaded, found: Search) -> list[str]:
    """The words of the best, why the others fell, what else `yuan check` finds, and what all this rests on."""
    best = found.fitting[0]
    launch = loaded.recipe.launch
    machines = f"launch.nnodes={launch.nnodes} launch.nproc_per_node={launch.nproc_per_node}"
    asked = f"{as_words(best.change, loaded.recipe)} {machines}".strip()
    texts = {
        "best": asked,
        "others": f"{len(found.fitting):,} layouts fit, with {len(found.best_of_each())} TP and PP; {fell(loaded, found)}",
    }
    faults = [problem for problem in check(best.recipe, loaded.sources, verb_of(loaded)) if problem.severity == "error"]
    if faults:
        found_too = "; ".join(one.what for one in faults)
        texts["besides"] = f"yuan check finds {len(faults)} more error{'s' * (len(faults) > 1)}: {found_too}"
    seconds = training_seconds(best.recipe) if best.recipe.derived.train_samples else None
    whole = f"; the training takes {duration(seconds)} at launch.mfu, {launch.mfu:.0%} of the peak" if seconds else ""
    texts["time"] = f"as a multiple of the best's{whole}; lost to: layers recomputed, pipeline bubble, communication of TP, PP, DP"
    return [under(name, text) for name, text in texts.items()]


def under(name: str, text: str) -> str:
    """A text under its name, in lines of at most 100 columns."""
    return hanging(f"{name:<9}", text, min(100, columns(sys.stdout) or 100))


def fell(loaded: Loaded, found: Search) -> str:
    """How many layouts did not fit, and how many broke which rule."""
    texts = [f"{found.too_large:,} need more than {loaded.recipe.launch.gpu_memory_gib:g} GiB"] if found.too_large else []
    texts += [f"{count:,} not valid ({BROKEN[rule]})" for rule, count in found.broken.most_common()]
    return ", ".join(texts)


def nothing_fits(loaded: Loaded, found: Search) -> list[str]:
    """The layout that comes nearest, and how many GPUs would do."""
    lines = ["", under("nothing", f"fits: {fell(loaded, found)}")]
    if found.nearest is not None:
        r = found.nearest.recipe
        p = r.parallel
        lines.append(
            f"nearest  TP {p.tensor_model_parallel_size} x PP {p.pipeline_model_parallel_size}"
            f" x DP {r.derived.data_parallel_size}{f', ZeRO {p.zero}' if p.zero else ''}, micro-batch {r.training.micro_batch_size}, recomputing {recompute(r)}: {gib(found.nearest.memory)} GiB"
        )
    launch = loaded.recipe.launch
    for times in (2, 4, 8, 16):
        more: Change = {"launch.nnodes": launch.nnodes * times}
        if search(changed(loaded.recipe, more), loaded.sources).fitting:
            return [*lines, f"enough   {launch.nnodes * launch.nproc_per_node * times} GPUs of this size (--gpus)"]
    return lines
