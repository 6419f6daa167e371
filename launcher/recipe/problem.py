"""What a check says, and the view of a recipe that the checks share."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal

from launcher.errors import UserError
from launcher.recipe.schema import Recipe

KEY = re.compile(r"\b[a-z]+\.[a-z]\w*")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong (`error`: it must not start) or odd (`warning`: it may) with a recipe.

    `by_itself`: it is wrong whatever the other values are, so that no rule can judge how it suits them.
    """

    what: str
    where: str
    fix: str
    severity: Literal["error", "warning"] = "error"
    by_itself: bool = False

    @property
    def keys(self) -> set[str]:
        """The keys that it speaks of."""
        return set(KEY.findall(f"{self.what} {self.where} {self.fix}"))

    def as_error(self) -> UserError:
        """The same, to be raised."""
        return UserError(self.what, self.where, self.fix)


def standing(problems: Iterable[Problem], wrong: set[str]) -> list[Problem]:
    """The problems that do not follow from keys that are `wrong` by themselves."""
    return [problem for problem in problems if problem.by_itself or not problem.keys & wrong]


@dataclass(frozen=True)
class Case:
    """A resolved recipe with the sources of its values.

    Attributes:
        launching: the processes are about to start on this machine, which must then have what they need; otherwise
            (`yuan check`, `--dry-run`) the recipe may be meant for another one.
        accept_changes: a run in the folder may be gone on with although the recipe is another (`--accept-changes`).
    """

    recipe: Recipe
    sources: dict[str, str]
    launching: bool = False
    accept_changes: bool = False

    def value(self, key: str) -> Any:
        """The value of a dotted key."""
        group, leaf = key.split(".")
        return getattr(getattr(self.recipe, group), leaf)

    def given(self, key: str) -> bool:
        """Whether someone asked for this value: it is neither a default nor derived."""
        return self.sources.get(key) not in (None, "default", "derived") and self.value(key) is not None

    def at(self, *keys: str) -> str:
        """The keys with their values and sources: `training.seq_length=1024 (recipes/345m.yaml)`."""
        return ", ".join(f"{key}={self._shown(key)} ({self.sources.get(key, 'default')})" for key in keys)

    def _shown(self, key: str) -> str:
        value = self.value(key)
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def typed(source: str) -> bool:
    """Whether a value's source is what the user typed, an option or a word, and no recipe and no default."""
    return source.startswith(("--", "command line"))


Check = Callable[[Case], Iterator[Problem]]


def nearest(value: int, divisor: int) -> str:
    """The multiples of `divisor` beside `value`: `28 or 32`."""
    below, above = value // divisor * divisor, -(-value // divisor) * divisor
    return str(above) if below <= 0 or below == above else f"{below} or {above}"


def divisors(value: int) -> list[int]:
    """The divisors of a positive number, ascending."""
    small = [d for d in range(1, isqrt(value) + 1) if value % d == 0]
    return sorted({*small, *(value // d for d in small)})


def beside(values: Collection[int], wanted: int) -> list[int]:
    """Of several numbers the nearest below and the nearest above `wanted`, where there are."""
    below, above = [one for one in values if one < wanted], [one for one in values if one > wanted]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


def nearest_divisors(value: int, wanted: int) -> str:
    """The divisors of `value` beside `wanted`: `2 or 4`."""
    return " or ".join(map(str, beside(divisors(value), wanted)))
