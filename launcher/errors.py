"""Mistakes that a user can mend."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from typing import TextIO


class UserError(Exception):
    """A mistake that the user can mend: printed in a few plain lines, exit code 2, no traceback.

    Args:
        what: what is wrong, naming the thing (`training.lr is negative: -1.0`).
        where: the place to look at: a file with its line, a recipe key, an option. May be empty.
        fix: what to do about it, best as a line to type. May be empty.
    """

    def __init__(self, what: str, where: str = "", fix: str = ""):
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    @property
    def each(self) -> Sequence[UserError]:
        """The mistakes one by one; here only this one."""
        return (self,)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)


class UserErrors(UserError):
    """Several mistakes found at once, so that a user mends them in one go."""

    def __init__(self, errors: Sequence[UserError]):
        super().__init__(f"{len(errors)} mistakes")
        self.errors = tuple(errors)

    @property
    def each(self) -> Sequence[UserError]:
        return self.errors

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


def raise_all(errors: Sequence[UserError]) -> None:
    """Raise the one error as it is, several as one `UserErrors`, and nothing where there is none."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise UserErrors(errors)


def wrapped(text: str, stream: TextIO) -> str:
    """An error's lines as they are shown on `stream`: at a terminal wrapped at its width, of 60 columns at least; for a
    pipe or a file as they are."""
    if not stream.isatty():
        return text
    try:
        columns = int(os.environ.get("COLUMNS") or os.get_terminal_size(stream.fileno()).columns)
    except (OSError, ValueError):
        columns = 80
    return "\n".join(_folded(line, max(60, columns)) for line in text.splitlines())


def _folded(line: str, columns: int) -> str:
    """Further lines begin below the text after `  where: ` or `  fix:   `."""
    indent = " " * 9 if line.startswith(("  where: ", "  fix:   ")) else "  "
    return textwrap.fill(line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
