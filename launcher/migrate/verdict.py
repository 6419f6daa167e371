"""What the rules say of a migrated recipe by itself: of its values, not of files and not of this machine."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from launcher.console import wrapped
from launcher.errors import UserError
from launcher.migrate.result import Migration
from launcher.migrate.write import recipe_text
from launcher.recipe import check_answering, check_conversion, check_layout, check_memory, check_model, check_schedule, check_stages, load
from launcher.recipe.check import CHECKS, check
from launcher.recipe.problem import Case, Problem

OF_VALUES = {module.__name__ for module in (check_model, check_layout, check_stages, check_schedule)}
OF_VALUES_TOO = (check_memory.memory, check_answering.memory, check_conversion.layout)
OF_THIS_MACHINE = (check_layout.gpus,)


def verdict(migration: Migration) -> list[Problem]:
    """What is wrong or odd with the recipe, errors first; the paths in it need not be there."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recipe.yaml"
            path.write_text(recipe_text(migration), encoding="utf-8")
            loaded = load([f"recipe={path}"])
    except UserError as error:
        return [Problem(one.what, one.where, one.fix) for one in error.each]
    sources = {key: source if source in ("default", "derived") else "migrated" for key, source in loaded.sources.items()}
    case = Case(loaded.recipe, sources)
    others = [one for one in CHECKS[migration.verb] if not (one.__module__ in OF_VALUES or one in OF_VALUES_TOO) or one in OF_THIS_MACHINE]
    elsewhere = {problem.what for one in others for problem in one(case)}
    return [problem for problem in check(loaded.recipe, sources, migration.verb) if problem.what not in elsewhere]


def lines(migration: Migration) -> list[str]:
    """The verdict as it is printed below the report."""
    found = verdict(migration)
    if not found:
        return [wrapped(f"checked    the values go together; files and this machine: yuan check recipe={migration.name}", sys.stdout)]
    errors = sum(problem.severity == "error" for problem in found)
    said = f"it would not run: {errors} error{'s' * (errors > 1)}" if errors else "the values go together, and are odd in places"
    return [f"checked    {said}", *(wrapped(f"{problem.severity}: {problem.as_error()}", sys.stdout) for problem in found)]
