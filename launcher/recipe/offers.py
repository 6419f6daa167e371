"""The values that an error offers instead: only those with which the recipe really passes.

A rule knows the values nearest to its own; whether they suit the other rules is found by asking these again. Where a
rule's own do not, further values of its keys are tried, then two changes at once: one, and what the rules offer for
the faults that it makes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import islice

import yaml

from launcher.recipe.problem import Case, Check, Problem, standing
from launcher.recipe.resolve import resolve
from launcher.recipe.schema import Tokenizer

_PART = re.compile(r"(?P<key>[a-z]+\.\w+)=(?P<values>[^\s,]+|\[[^]]*\])(?P<more>( or (?!less|more)[^\s,]+)*)(?P<rest>( or (less|more)\b.*)?)")
_WHOLE = re.compile(r"(?P<key>[a-z]+\.\w+)=(?P<value>\d+)\b(?!\.)")
_REACH = 16  # steps to either side: a size that 2 x 8 ranks share is within them
_PAIRS = 150  # trials of two changes, of 1 ms each: an answer should not be waited for

Change = dict[str, str]


def keep_sound(case: Case, problems: Sequence[Problem], checks: Sequence[Check], wrong: set[str]) -> list[Problem]:
    """`problems`, which `checks` found in `case`, with fixes that help. What is said of `wrong` keys does not count.

    A change helps that mends its problem and makes no new one. Where none is found the fix says so, and names the keys.
    """
    known = {problem.what for problem in problems if problem.severity == "error"}
    return [_Search(case, problem, known, checks, wrong).mended() if problem.severity == "error" else problem for problem in problems]


class _Search:
    """For changes that mend one problem of a case and make no other."""

    def __init__(self, case: Case, problem: Problem, known: set[str], checks: Sequence[Check], wrong: set[str]):
        self.case, self.problem, self.known = case, problem, known
        self.checks, self.wrong = checks, wrong
        self.tried: dict[str, list[Problem]] = {}

    def mended(self) -> Problem:
        """The problem with the changes in its fix that help, or with further ones that do."""
        parts = _parsed(self.problem.fix)
        if not any(isinstance(part, list) for part in parts):
            return self.problem
        kept = [part if isinstance(part, str) else self._sound(part) for part in parts]
        if not any(text for text, part in zip(kept, parts) if isinstance(part, list)):
            kept += self._elsewhere() or self._pairs(parts) or [self._several()]
        return replace(self.problem, fix=", or ".join(text for text in kept if text))

    def helps(self, change: Change) -> bool:
        after = {problem.what for problem in self.errors(change)}
        return self.problem.what not in after and after <= self.known

    def errors(self, change: Change) -> list[Problem]:
        written = _written(change)
        if written not in self.tried:
            self.tried[written] = standing(_errors(self.case, change, self.checks), self.wrong - change.keys())
        return self.tried[written]

    def _sound(self, part: list[re.Match[str]]) -> str:
        """What of one part of a fix helps: of several values for a key those that do, or else further ones."""
        if len(part) > 1:
            change = {one["key"]: one["values"] for one in part}
            return _written(change) if self.helps(change) else ""
        (one,) = part
        key, values = one["key"], _values(one)
        sound = [value for value in values if "…" in value or value.isupper() or self.helps({key: value})]
        if not sound and not one["rest"] and all(value.isdigit() for value in values):
            sound = self._beside(key, sorted(map(int, values)))
        return f"{key}={' or '.join(sound)}{one['rest']}" if sound else ""

    def _beside(self, key: str, offered: Sequence[int] = ()) -> list[str]:
        """The nearest values of a whole number that help, one below and one above where there are."""
        value = self.case.value(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            return []
        further = _further(value, offered)
        below = (str(one) for one in further[::-1] if one < value and self.helps({key: str(one)}))
        above = (str(one) for one in further if one > value and self.helps({key: str(one)}))
        return [*islice(below, 1), *islice(above, 1)]

    def _elsewhere(self) -> list[str]:
        """Changes of the other keys that the problem names, where somebody gave them."""
        keys = {one["key"] for one in _WHOLE.finditer(self.problem.where)} - {one["key"] for one in _WHOLE.finditer(self.problem.fix)}
        found = {key: self._beside(key) for key in sorted(keys) if self.case.given(key)}
        return [f"{key}={' or '.join(values)}" for key, values in found.items() if values]

    def _pairs(self, parts: Sequence[str | list[re.Match[str]]]) -> list[str]:
        """Two changes that help together: of the first found those that leave the fewest errors, the model's shape last;
        at most two, of different keys."""
        firsts = {_written(change): change for change in [*_changes(parts), *self._near_changes()]}.values()
        ordered = sorted(firsts, key=lambda change: any(key.startswith("model.") for key in change))
        pairs = (first | then for first in ordered for then in self._mending(first))
        found = sorted(islice((pair for pair in islice(pairs, _PAIRS) if self.helps(pair)), 6), key=lambda pair: len(self.errors(pair)))
        return [_written(pair) for pair in {tuple(pair): pair for pair in found[::-1]}.values()][::-1][:2]

    def _near_changes(self) -> Iterator[Change]:
        """Other values, the nearest first, of the whole numbers that the problem names."""
        keys = dict.fromkeys(one["key"] for one in _WHOLE.finditer(f"{self.problem.fix} {self.problem.where}"))
        for distance in range(1, 5):
            for key in keys:
                value = self.case.value(key)
                if isinstance(value, int) and not isinstance(value, bool):
                    yield from ({key: str(near)} for near in (value - distance, value + distance) if near > 0)

    def _mending(self, first: Change) -> Iterator[Change]:
        """What the rules offer for the faults that a change makes, where it mends the problem itself."""
        after = self.errors(first)
        if self.problem.what in (one.what for one in after):
            return
        for new in after:
            if new.what not in self.known:
                yield from (then for then in _changes(_parsed(new.fix)) if not then.keys() & first.keys())

    def _several(self) -> str:
        keys = dict.fromkeys(one["key"] for one in _WHOLE.finditer(f"{self.problem.where} {self.problem.fix}"))
        return f"no near value of {', '.join(keys) or 'these keys'} would do by itself: change several"


def _parsed(fix: str) -> list[str | list[re.Match[str]]]:
    """The parts of a fix `a=1 or 2, or b=3, and c=4, or else`: each the changes that it says, or its text."""
    parts: list[str | list[re.Match[str]]] = []
    for part in fix.split(", or "):
        each = [_PART.fullmatch(word) for word in part.split(", and ")]
        matched = [one for one in each if one]
        parts.append(matched if len(matched) == len(each) else part)
    return parts


def _values(one: re.Match[str]) -> list[str]:
    return [one["values"], *one["more"].split(" or ")[1:]]


def _changes(parts: Sequence[str | list[re.Match[str]]]) -> Iterator[Change]:
    for part in parts:
        if isinstance(part, str):
            continue
        if len(part) > 1:
            yield {one["key"]: one["values"] for one in part}
        else:
            yield from ({part[0]["key"]: value} for value in _values(part[0]))


def _written(change: Change) -> str:
    return ", and ".join(f"{key}={value}" for key, value in change.items())


def _further(value: int, offered: Sequence[int]) -> list[int]:
    """Whole numbers about `value`, ascending: the next ones, and the multiples of what the offered ones are multiples of."""
    numbers = {value + distance for distance in range(-_REACH, _REACH + 1)}
    step = offered[-1] - offered[0] if offered else 0
    for count in range(_REACH * (step > 0)):
        numbers |= {offered[0] - count * step, offered[-1] + count * step}
    return sorted(number for number in numbers if number > 0)


def _errors(case: Case, change: Change, checks: Sequence[Check]) -> Iterator[Problem]:
    """The errors that `checks` find in the recipe with other values, all that follows from them derived anew."""
    recipe, sources = deepcopy(case.recipe), dict(case.sources)
    if recipe.derived.vocab_size:  # no need to build a tokenizer to know the size of its vocabulary
        recipe.tokenizer = Tokenizer(type="NullTokenizer", vocab_size=recipe.derived.vocab_size - 1)
        sources["tokenizer.vocab_size"] = "default"
    for key in [key for key, source in sources.items() if source == "derived"]:
        group, leaf = key.split(".")
        setattr(getattr(recipe, group), leaf, None)
    for key, text in change.items():
        group, leaf = key.split(".")
        if not hasattr(getattr(recipe, group, None), leaf):
            return
        setattr(getattr(recipe, group), leaf, yaml.safe_load(text))
        sources[key] = "command line"
    resolve(recipe, sources, recipe.run.name or "recipe")
    again = Case(recipe, sources, case.launching, case.accept_changes)
    yield from (problem for one in checks for problem in one(again) if problem.severity == "error")
