"""The estimate in words: the lines of `yuan check`."""

from __future__ import annotations

from itertools import groupby

from launcher.recipe.estimate.activations import fused_attention
from launcher.recipe.estimate.memory import BAND, GIB, PARTS, Memory, stage_memory
from launcher.recipe.estimate.stages import chunks
from launcher.recipe.estimate.time import total_flops, training_seconds
from launcher.recipe.schema import Recipe
from launcher.recipe.size import flops_per_token


def estimate(recipe: Recipe) -> dict[str, str]:
    """Name → text of every line about memory and time, for `yuan check`; the text of `memory` may have several lines."""
    return {"memory": _memory(recipe), "arithmetic": _arithmetic(recipe), "assumed": _assumed(recipe)}


def gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def duration(seconds: float) -> str:
    """In days, below two of them in hours, below two of those in minutes."""
    for unit, length in (("days", 86400), ("hours", 3600)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds / 60:,.1f} minutes"


def parts(memory: Memory) -> str:
    """`12.8 GiB: weights 1.2, gradients …`."""
    return f"{gib(memory.total)} GiB: " + ", ".join(f"{part} {gib(getattr(memory, part))}" for part in PARTS)


def _memory(recipe: Recipe) -> str:
    stages = stage_memory(recipe)
    fullest = max(stages, key=lambda one: one.total)
    limit = recipe.launch.gpu_memory_gib
    of = f" of {limit:g}" if limit and recipe.derived.device == "cuda" else ""
    saving = ", while it saves a checkpoint" if fullest.saving else ""
    if len({parts(one) for one in stages}) == 1:
        return f"{gib(fullest.total)}{of} GiB a process{saving}: " + parts(fullest).partition(": ")[2]
    return f"{gib(fullest.total)}{of} GiB a process on the fullest stage{saving}\n" + "\n".join(_table(recipe, stages))


def _table(recipe: Recipe, stages: list[Memory]) -> list[str]:
    """One row for consecutive stages that hold as much of the model: the fullest of them."""
    layers = [sum(chunk.layers for chunk in stage) for stage in chunks(recipe)]
    rows = [["stage", "layers", *PARTS, "GiB"]]
    for _, alike in groupby(range(len(stages)), key=lambda stage: (layers[stage], stages[stage].weights)):
        numbers = list(alike)
        most = max(numbers, key=lambda stage: stages[stage].total)
        name = f"{numbers[0]}-{numbers[-1]}" if numbers[1:] else str(most)
        rows.append([name, str(layers[most]), *(gib(getattr(stages[most], part)) for part in (*PARTS, "total"))])
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, columns, strict=True)) for row in rows]


def _arithmetic(recipe: Recipe) -> str:
    text = f"{flops_per_token(recipe) / 1e9:,.3g} GFLOP a token"
    if not recipe.derived.train_samples:
        return text
    text += f", {total_flops(recipe):.3g} FLOP in all"
    seconds = training_seconds(recipe)
    if seconds is None:
        return text
    launch = recipe.launch
    return f"{text}: {duration(seconds)} on {recipe.derived.world_size} at {launch.mfu:.0%} of {launch.gpu_peak_tflops:g} TFLOP/s"


def _assumed(recipe: Recipe) -> str:
    text = f"memory within {BAND:.0%}; " + ("" if fused_attention(recipe) else "the attention is not fused; ")
    if recipe.derived.device == "cpu":
        return text + "the fullest moment of a step and of a checkpoint"
    text += "fused attention; base: CUDA's context, cuBLAS, NCCL"
    return text if recipe.launch.gpu_memory_gib else f"{text}; no verdict without launch.gpu_memory_gib"
