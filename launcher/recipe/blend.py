"""What data_path and split say: prefixes and weights, and the shares of the three sets."""

from __future__ import annotations

import math
import re
from typing import Any


class BlendError(ValueError):
    """A data_path that is neither a prefix nor a blend."""


def parse_blend(value: Any) -> tuple[list[str], list[float] | None]:
    """A data_path as prefixes and weights, read as Megatron-LM reads its --data-path words.

    A prefix, or a list of prefixes (no weights: by their sizes), or weight, prefix, weight, prefix, …

    Raises:
        BlendError: it is none of these.
    """
    words = value if isinstance(value, (list, tuple)) else [value]
    if not words or any(isinstance(word, (dict, list, tuple, bool)) or word is None for word in words):
        raise BlendError("it is neither a prefix nor a list of weights and prefixes")
    numbers = [_number(word) for word in words]
    if all(number is None for number in numbers) or len(words) == 1:
        return [str(word) for word in words], None
    weights, prefixes = numbers[::2], [str(word) for word in words[1::2]]
    if len(words) % 2 or any(weight is None for weight in weights):
        raise BlendError("a blend is weight, prefix, weight, prefix, …")
    if any(not weight > 0 or math.isinf(weight) for weight in weights):
        raise BlendError("every weight of a blend is above 0: leave out what is not to be read")
    return prefixes, weights


def _number(word: Any) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def parse_split(split: str) -> list[tuple[float, float] | None]:
    """A split such as '969,30,1' as the shares (begin, end) of train, validation and test; None where one has no share.

    The arithmetic is megatron-core's to the last bit, because rounding decides which documents a share gets.

    Raises:
        ValueError: it is not made of one to three numbers that add up to something.
    """
    if "-" in split:  # megatron-core passes over the sign: -1 would be a share of 1
        raise ValueError(f"{split!r} has a share below 0")
    shares = [float(number) for number in re.findall(r"[.0-9]+", split)]
    if not 1 <= len(shares) <= 3 or sum(shares) <= 0:
        raise ValueError(f"{split!r} is not up to three shares")
    ends = [0.0]
    for share in shares + [0.0] * (3 - len(shares)):
        ends.append(ends[-1] + share / sum(shares))
    return [(begin, end) if end > begin else None for begin, end in zip(ends, ends[1:])]
