"""Which layers lie on which pipeline rank, and how many micro-batches it holds at once."""

from __future__ import annotations

from typing import NamedTuple

from launcher.recipe.pipeline import parse_layout
from launcher.recipe.schema import Recipe


class Chunk(NamedTuple):
    """Consecutive layers on one rank; under interleaving a rank has several chunks."""

    layers: int
    embedding: bool
    output: bool


def chunks(recipe: Recipe) -> list[list[Chunk]]:
    """The chunks of every pipeline rank, in the order of the forward pass. The recipe's layout must be a valid one."""
    pp = recipe.parallel.pipeline_model_parallel_size
    stages = _layers(recipe)
    last = len(stages) - 1
    # megatron-core deals stages out in rounds: stage i lies on rank i % PP
    return [[Chunk(stages[i], i == 0, i == last) for i in range(rank, len(stages), pp)] for rank in range(pp)]


def _layers(recipe: Recipe) -> list[int]:
    """Layers of every stage of the forward pass, virtual ones included."""
    p, layers = recipe.parallel, recipe.model.num_layers
    pp = p.pipeline_model_parallel_size
    if p.pipeline_model_parallel_layout is not None:
        return [stage.count("t") for stage in parse_layout(p.pipeline_model_parallel_layout)]
    first, last = p.decoder_first_pipeline_num_layers, p.decoder_last_pipeline_num_layers
    if first is not None or last is not None:
        between = pp - (first is not None) - (last is not None)
        each = (layers - (first or 0) - (last or 0)) // max(between, 1)
        return [first] * (first is not None) + [each] * between + [last] * (last is not None)
    virtual = layers // pp // (p.num_layers_per_virtual_pipeline_stage or layers // pp)
    return [layers // pp // virtual] * (pp * virtual)


def in_flight(recipe: Recipe, rank: int, virtual: int) -> list[int]:
    """For each chunk of a pipeline rank, how many micro-batches' activations it holds at the fullest moment.

    1F1B: a rank runs ahead by as many micro-batches as there are ranks behind it. Interleaved: it runs ahead by twice
    that, counted in chunks, and by PP for every chunk but the last; PP micro-batches go through a chunk, then the next
    (Narayanan et al. 2021, arXiv 2104.04473; megatron-core's schedules).
    """
    pp, micro_batches = recipe.parallel.pipeline_model_parallel_size, recipe.derived.num_microbatches
    behind = pp - rank - 1
    if virtual == 1:
        return [min(behind + 1, micro_batches)]
    ahead = min(2 * behind + (virtual - 1) * pp + 1, virtual * micro_batches)
    held = [0] * virtual
    for number in range(ahead):
        held[number // pp % virtual] += 1
    return held
