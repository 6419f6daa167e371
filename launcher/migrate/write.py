"""A migration as a recipe's text, and as the report of what became of each argument."""

from __future__ import annotations

import textwrap
from typing import Any

from launcher.migrate.result import Line, Migration
from launcher.recipe.keys import groups, table, yaml_scalar

WIDTH = 100
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
    rows = textwrap.wrap(label + flat, WIDTH, break_long_words=False, break_on_hyphens=False)
    return [f"#   {rows[0]}", *(f"#     {row}" for row in rows[1:])]


def report(migration: Migration) -> list[str]:
    """What became of each argument, one line each; then the traps; then what could not be carried over."""
    rows = [(line.place, line.name, _short(line.value), _became(line)) for line in migration.lines]
    widths = [max((len(row[at]) for row in rows), default=0) for at in range(3)]
    lines = [migration.origin]
    for place, name, value, became in rows:
        head = f"{place:>{widths[0]}}  {name:<{widths[1]}}  {value:<{widths[2]}}  "
        wrapped = textwrap.wrap(became, 80, break_long_words=False, break_on_hyphens=False)
        lines += [head + wrapped[0], *(" " * (len(head) + 2) + row for row in wrapped[1:])]
    for line in migration.traps:
        lines += ["", *_wrapped(f"trap: {_title(line)}: {line.trap}")]
    if migration.lost:
        count = len(migration.lost)
        lines += ["", f"{count} argument{'s' * (count > 1)} could not be carried over:"]
        for line in migration.lost:
            lines += _wrapped(f"  {_title(line)}: {line.lost}")
    return lines


def _title(line: Line) -> str:
    return " ".join(filter(None, (line.place if line.place.isdigit() else "", line.name, _short(line.value))))


def _short(value: str) -> str:
    flat = " ".join(value.split())
    return flat if len(flat) <= 40 else f"…{flat[-39:]}"


def _became(line: Line) -> str:
    given = " ".join(f"{key}={_plain(value)}" for key, value in line.became.items())
    text = "missing, see below" if line.lost and not given else line.note
    return f"{given}  ({text})" if given and text else given or text or "nothing"


def _plain(value: Any) -> str:
    return yaml_scalar(value) if value is not None else "null"


def _wrapped(text: str) -> list[str]:
    indent = " " * (len(text) - len(text.lstrip()) + 6)
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
