"""A migration as a recipe's text, and as the report of what became of each argument."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from launcher.migrate.result import Line, Migration
from launcher.recipe.keys import groups, table, yaml_scalar

WIDTH = 100  # of a recipe's comments, and of the report where there is no terminal
BECAME = 45  # columns that the last column of the report keeps at least
COMMENTS = {"launch.gpu_memory_gib": "  # assumed, as of an A100 or H100: write what yours have"}


def recipe_text(migration: Migration) -> str:
    """The recipe as YAML: a header that says what it was made from and how to use it, then the keys in the schema's order."""
    lines = [f"# {migration.title}", f"#   {migration.use}"]
    lines += _comment("needs: ", migration.needs) if migration.needs else []
    lines += _comment("made by `yuan migrate` from: ", migration.command)
    for line in migration.lost:
        lines += _comment("missing: ", f"{f'{line.name} {line.value}'.rstrip()}: {line.lost}")
    values = migration.values
    for group in groups():
        given = [key for key in table() if key.startswith(f"{group}.") and key in values]
        if given:
            lines.append(f"{group}:")
            lines += [f"  {key.split('.')[1]}: {yaml_scalar(values[key])}{COMMENTS.get(key, '')}" for key in given]
    return "\n".join(lines) + "\n"


def _comment(label: str, text: str) -> list[str]:
    flat = " ".join(text.split())
    rows = textwrap.wrap(label + flat, WIDTH - 6, break_long_words=False, break_on_hyphens=False)
    return [f"#   {rows[0]}", *(f"#     {row}" for row in rows[1:])]


def report(migration: Migration) -> list[str]:
    """What became of each argument, one line each; then the traps; then what could not be carried over.

    No line is longer than the terminal is wide.
    """
    lines = [*_wrapped(migration.origin), *_table(migration, columns())]
    for line in migration.traps:
        lines += ["", *_wrapped(f"trap: {_title(line)}: {line.trap}")]
    if migration.lost:
        count = len(migration.lost)
        lines += ["", f"{count} argument{'s' * (count > 1)} could not be carried over:"]
        for line in migration.lost:
            lines += _wrapped(f"  {_title(line)}: {line.lost}")
    return lines


def columns() -> int:
    """The terminal's width; WIDTH where the report goes to a file."""
    return max(60, shutil.get_terminal_size((WIDTH, 24)).columns)


def _table(migration: Migration, columns: int) -> list[str]:
    """Where a value is too long for its column, or the terminal too narrow, what became of it stands below."""
    places, names = (max((len(getattr(line, part)) for line in migration.lines), default=0) for part in ("place", "name"))
    room = columns - places - names - 6
    longest = max((len(_short(line.value)) for line in migration.lines), default=0)
    values = min(longest, max(8, room - BECAME))
    start = places + names + values + 6
    if columns - start < BECAME:
        start = places + 4
    lines = []
    for line in migration.lines:
        head = f"{line.place:>{places}}  {line.name:<{names}}  {_short(line.value, room + 2):<{values}}  "
        became = _became(line)
        if len(head) > start and len(head + became) > columns:
            lines.append(head.rstrip())
            head = " " * start
        rows = [became] if len(head + became) <= columns else _rows(became, columns - start - 2)
        lines += [head + rows[0], *(" " * (start + 2) + row for row in rows[1:])]
    return lines


def _rows(text: str, width: int) -> list[str]:
    """Text cut at blanks; a word that is longer than a row begins one."""
    words = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return [row[at : at + width] for row in words for at in range(0, len(row), width)]


def _title(line: Line) -> str:
    return " ".join(filter(None, (line.place if line.place.isdigit() else "", line.name, _short(line.value))))


def _short(value: str, most: int = 40) -> str:
    flat, most = " ".join(value.split()), max(8, min(40, most))
    return flat if len(flat) <= most else f"…{flat[1 - most:]}"


def _became(line: Line) -> str:
    given = " ".join(f"{key}={_plain(value)}" for key, value in line.became.items())
    text = "missing, see below" if line.lost and not given else line.note
    return f"{given}  ({text})" if given and text else given or text or "nothing"


def _plain(value: Any) -> str:
    return yaml_scalar(value) if value is not None else "null"


def _wrapped(text: str) -> list[str]:
    indent = " " * (len(text) - len(text.lstrip()) + 6)
    first = indent[:-6]
    return [(indent if at else first) + row for at, row in enumerate(_rows(text.strip(), columns() - len(indent)))]
