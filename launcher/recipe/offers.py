"""The values that an error offers instead: only those with which the recipe really passes.

A rule knows the values nearest to its own; whether they suit the other rules is found by asking these again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import yaml

from launcher.recipe.problem import Case, Check, Problem
from launcher.recipe.resolve import resolve
from launcher.recipe.schema import Tokenizer

_PART = re.compile(r"(?P<key>[a-z]+\.\w+)=(?P<values>[^\s,]+|\[[^]]*\])(?P<more>( or (?!less|more)[^\s,]+)*)(?P<rest>( or (less|more)\b.*)?)")


def keep_sound(case: Case, problems: Sequence[Problem], checks: Sequence[Check]) -> list[Problem]:
    """`problems`, which `checks` found in `case`, with what does not help left out of their fixes.

    A change helps that mends its problem and makes no new one. Where nothing helps by itself the fix stays as it is.
    """
    known = {problem.what for problem in problems if problem.severity == "error"}

    def helps(problem: Problem, change: dict[str, str]) -> bool:
        after = _errors(case, change, checks)
        return problem.what not in after and after <= known

    return [replace(problem, fix=_filtered(problem, helps)) if problem.severity == "error" else problem for problem in problems]


def _filtered(problem: Problem, helps) -> str:
    parts = []
    for part in problem.fix.split(", or "):
        each = [_PART.fullmatch(word) for word in part.split(", and ")]
        if not all(each):
            parts.append(part)
        elif len(each) > 1:
            parts += [part] if helps(problem, {one["key"]: one["values"] for one in each}) else []
        else:
            key, values = each[0]["key"], [each[0]["values"], *each[0]["more"].split(" or ")[1:]]
            values = [value for value in values if "…" in value or value.isupper() or helps(problem, {key: value})]
            parts += [f"{key}={' or '.join(values)}{each[0]['rest']}"] if values else []
    return ", or ".join(parts) or problem.fix


def _errors(case: Case, change: dict[str, str], checks: Sequence[Check]) -> set[str]:
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
            return set()
        setattr(getattr(recipe, group), leaf, yaml.safe_load(text))
        sources[key] = "command line"
    resolve(recipe, sources, recipe.run.name or "recipe")
    again = Case(recipe, sources, case.launching, case.accept_changes)
    return {problem.what for one in checks for problem in one(again) if problem.severity == "error"}
