"""Lines for people: at a terminal as wide as that is, in a pipe or a file as they are."""

from __future__ import annotations

import os
import textwrap
from typing import TextIO

NARROWEST = 60
UNKNOWN = 80  # of a terminal that does not tell its width


def columns(stream: TextIO, least: int = NARROWEST) -> int | None:
    """The width of the terminal that `stream` is, `least` of them at least; None where it is none."""
    try:
        if not stream.isatty():
            return None
        width = int(os.environ.get("COLUMNS") or os.get_terminal_size(stream.fileno()).columns)
    except (OSError, ValueError):
        width = UNKNOWN
    return max(least, width or UNKNOWN)


def hanging(head: str, text: str, width: int | None, indent: int | None = None) -> str:
    """`head` and behind it `text`, in lines of `width` that begin below the text, or at `indent`; words stay whole, so that they
    can be copied. None is any width: one line."""
    if width is None or not text:
        return head + text
    below = " " * (len(head) if indent is None else indent)
    return textwrap.fill(text, width, initial_indent=head, subsequent_indent=below, break_long_words=False, break_on_hyphens=False)


def labelled(text: str, stream: TextIO) -> str:
    """The lines of `text`, each behind a label of 11 columns."""
    width = columns(stream)
    return "\n".join(hanging(line[:11], line[11:], width) for line in text.splitlines())


def plural(count: int, noun: str) -> str:
    """`1 process`, `2 processes`, `3 micro-batches`, `4 epochs`, `1,024 documents`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "es" if noun.endswith(("s", "tch")) else "s")


def human_size(count: int) -> str:
    """`1,234 bytes`, `1.2 MB`, `1.2 GB`."""
    if count < 1e5:
        return f"{count:,} bytes"
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def wrapped(text: str, stream: TextIO) -> str:
    """The lines of an error (`launcher.errors`), below its `  where: ` and `  fix:   `."""
    width = columns(stream)
    return "\n".join(hanging("", line, width, 9 if line.startswith(("  where: ", "  fix:   ")) else 2) for line in text.splitlines())
