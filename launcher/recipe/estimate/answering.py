"""Memory of every pipeline stage's ranks while they answer: weights, the cache of keys and values, one pass through a layer.

The cache is that of a whole batch of prompts whose answers end at the model's last position: shorter ones take less. What
the passes work with is small beside it, and reckoned for a prompt of that length too.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.recipe.estimate.activations import BYTES
from launcher.recipe.estimate.memory import BASE, stage_parameters
from launcher.recipe.estimate.stages import Chunk, chunks
from launcher.recipe.schema import Recipe
from launcher.recipe.size import layer_parameters, widths

PARTS = ("weights", "cache", "work", "base")


@dataclass(frozen=True)
class Answering:
    """Bytes of one rank.

    Attributes:
        cache: keys and values of generate.batch_size rows, at every position of the model, in every layer of the rank.
        work: the widest part of a layer while the prompts are read, or the logits and what sampling makes of them.
        base: of a process without a model.
        least: of all this what the shortest prompt takes that is answered alone.
    """

    weights: int
    cache: int
    work: int
    base: int
    least: int

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in PARTS)


def answering_memory(recipe: Recipe) -> list[Answering]:
    """The memory of a rank on each pipeline stage. The layout must be a valid one."""
    return [_rank(recipe, stage) for stage in chunks(recipe)]


def _rank(recipe: Recipe, stage: list[Chunk]) -> Answering:
    rows, positions = recipe.generate.batch_size, recipe.model.max_position_embeddings
    layer = cached_position(recipe)
    layers = sum(chunk.layers for chunk in stage)
    weights = stage_parameters(recipe, stage) * BYTES[recipe.training.precision] - _saved(recipe, layers)
    shortest = min(positions, 1 + recipe.generate.max_new_tokens)
    base = BASE[recipe.derived.device]
    # rows that have ended leave the batch: a layer's cache is there twice then
    work = max(_reading(recipe, rows * positions), rows * positions * layer, _logits(recipe, rows) if stage[-1].output else 0)
    return Answering(weights, layers * rows * positions * layer, work, base, weights + base + layers * shortest * layer)


def _saved(recipe: Recipe, layers: int) -> int:
    """By how much int8 makes the matrices of so many layers smaller, less the copy of one that is there at a time."""
    if not recipe.model.quantize:
        return 0
    w, tp = widths(recipe), recipe.parallel.tensor_model_parallel_size
    size = BYTES[recipe.training.precision]
    return layers * layer_parameters(recipe)[0] // tp * (size - 1) - w.hidden * w.up // tp * size


def cached_position(recipe: Recipe) -> int:
    """Bytes of the keys and values of one position in one layer, on one rank; groups fewer than ranks are there on each."""
    m, tp = recipe.model, recipe.parallel.tensor_model_parallel_size
    return 2 * max(m.num_query_groups // tp, 1) * m.kv_channels * BYTES[recipe.training.precision]


def _reading(recipe: Recipe, tokens: int) -> int:
    """The feed-forward layer, with its input and the residual stream."""
    w, tp = widths(recipe), recipe.parallel.tensor_model_parallel_size
    return tokens * (2 * w.hidden + (w.up + w.ffn) // tp) * BYTES[recipe.training.precision]


def _logits(recipe: Recipe, rows: int) -> int:
    """A rank's own share, all of them, and three fp32 copies: scaled, sorted, summed up."""
    size, tp = BYTES[recipe.training.precision], recipe.parallel.tensor_model_parallel_size
    return rows * recipe.derived.padded_vocab_size * (size + size // tp + 3 * 4)
