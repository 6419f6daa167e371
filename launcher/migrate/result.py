"""What became of an old command: one line per argument, and from the lines the recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Line:
    """One argument of the old command and what became of it.

    Attributes:
        place: the argument's number, `line 7` of a script, or `fixed`: the script adds it by itself.
        name, value: as the old command has them.
        became: dotted recipe key → value; empty where nothing came of it.
        note: how it was read, or why it was dropped.
        trap: what it did in the old command that its user hardly meant, and how to have that again.
        lost: what the result misses because this could not be carried over.
    """

    place: str
    name: str
    value: str
    became: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    trap: str = ""
    lost: str = ""


@dataclass
class Migration:
    """An old command as a recipe.

    Attributes:
        verb: the yuan verb that does what the command did.
        name: a name for the recipe.
        title: what it is, for the recipe's first line.
        origin: how the command was read, for the report's first line.
        command: the old command, one string.
        lines: what became of every argument, in their order.
        needs: what must be there to run it.
    """

    verb: str
    name: str
    title: str
    origin: str
    command: str
    lines: list[Line]
    needs: str = ""

    def __post_init__(self) -> None:
        self.name = re.sub(r"[^A-Za-z0-9._-]+", "_", self.name).strip("._") or "migrated"

    @property
    def use(self) -> str:
        """The command that uses the recipe."""
        return f"yuan {self.verb} recipe={self.name}"

    @property
    def values(self) -> dict[str, Any]:
        """Dotted key → value; of a key that two lines give, the last counts, as the old parsers had it."""
        values: dict[str, Any] = {}
        for line in self.lines:
            values |= line.became
        return values

    @property
    def traps(self) -> list[Line]:
        """The lines with a trap."""
        return [line for line in self.lines if line.trap]

    @property
    def lost(self) -> list[Line]:
        """The lines of which the result misses something."""
        return [line for line in self.lines if line.lost]
