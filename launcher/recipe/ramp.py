"""How the global batch grows under training.rampup_batch_size, by megatron-core's rule."""

from __future__ import annotations

from bisect import bisect_right

from launcher.recipe.problem import divisors
from launcher.recipe.schema import Recipe


def ramp(rampup: list[int] | None, batch: int, samples: int) -> list[tuple[int, int]]:
    """The phase in which the batch grows, as (batch size, steps of that size) in order.

    The size is `start` + one `increment` for each equal share of the ramp's samples that is behind; sizes that a long
    step jumps over do not appear. The phase ends where the ramp's samples are behind, or the training's `samples` do
    not fill another step. Empty where there is no ramp, or one that `check` refuses.
    """
    if rampup is None or len(rampup) != 3 or not batch:
        return []
    start, increment, length = rampup
    if increment <= 0 or start <= 0 or batch <= start or length <= 0:
        return []
    share = length / ((batch - start) // increment or 1)
    sizes, consumed = [], 0
    while consumed <= length:
        behind = int(consumed / share)
        size = start + behind * increment
        last = min(length, samples - size)  # a step of this size begins here at the latest
        begins = range(consumed, last + 1, size)
        steps = bisect_right(begins, behind, key=lambda begin: int(begin / share))
        if steps == 0:
            break
        sizes.append((size, steps))
        consumed += size * steps
    return sizes


def batch_sizes(recipe: Recipe) -> list[int]:
    """Every global batch size of the training, in order, the whole one last."""
    t = recipe.training
    samples = t.train_samples or (t.train_tokens or 0) // (t.seq_length or 1)
    growing = [size for size, _ in ramp(t.rampup_batch_size, t.global_batch_size or 0, samples)]
    return [*growing, *([t.global_batch_size] if t.global_batch_size else [])]


def whole_ramp(rampup: list[int], batch: int, unit: int) -> list[int] | None:
    """The ramp nearest to `rampup` whose sizes are multiples of `unit`; None where the whole batch is none."""
    start, increment, length = rampup
    if batch % unit or batch <= unit:
        return None
    starts = [value for value in (start // unit * unit, -(-start // unit) * unit) if 0 < value < batch] or [batch - unit]
    start = min(starts, key=lambda value: abs(value - start))
    return [start, unit * min(divisors((batch - start) // unit), key=lambda count: abs(count * unit - increment)), length]
