"""A line of many MB, whose texts are read piece by piece: a str takes four times the bytes of a text with one emoji in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

_PIECE = 1 << 20  # bytes turned into a str at a time
_KEPT = 1 << 16  # bytes of a string above which it is not read with the rest of its object
# Where UTF-8 and the escapes of JSON may be cut: before a space or a character of several bytes, which are part of no escape,
# and before an escape, but not between the halves of a surrogate pair.
_CUT = re.compile(rb"[ \xc2-\xf4]|(?<!\\)\\(?!u[dD][c-fC-F])")
_LONG = "\0long"  # the key of what stands for a long string


@dataclass(frozen=True)
class LongText:
    """A text in a line, from byte `start` to before `stop`; iterating gives it in pieces."""

    line: bytes
    start: int
    stop: int
    is_json: bool

    def __iter__(self) -> Iterator[str]:
        at = self.start
        while at < self.stop:
            cut = _CUT.search(self.line, at + _PIECE, self.stop)
            end = cut.start() if cut else self.stop
            piece = self.line[at:end]
            yield orjson.loads(b'"%b"' % piece) if self.is_json else piece.decode()
            at = end


def json_texts(line: bytes, keys: Sequence[str]) -> list[LongText | list[str]] | None:
    """The text under each key of a JSON object; None where something is wrong with the line, or there is no plain text under one."""
    short, long = _without_long_strings(line)
    try:
        values = [orjson.loads(short)[key] for key in keys]
        texts = [_text(value, long) for value in values]
        for text in long:  # of other keys too: a bad line is one wherever the fault is
            for _ in text:
                pass
    except (ValueError, TypeError, LookupError):
        return None
    return texts


def line_text(line: bytes) -> list[LongText] | None:
    """A line of plain text without its line end; None where it is blank or not UTF-8."""
    stop = len(line)
    while stop and line[stop - 1] in b"\r\n":
        stop -= 1
    text = LongText(line, 0, stop, is_json=False)
    try:
        return [text] if sum(len(piece.strip()) for piece in text) else None
    except UnicodeDecodeError:
        return None


def _without_long_strings(line: bytes) -> tuple[bytes, list[LongText]]:
    """The line with something short in the place of each of its long strings, and these."""
    kept, long, copied, at = [], [], 0, 0
    while (opening := line.find(b'"', at)) >= 0:
        if not (at := _end_of_string(line, opening)):
            break  # no JSON, which its reader will find
        if at - opening > _KEPT:
            kept += [line[copied:opening], orjson.dumps({_LONG: len(long)})]
            long.append(LongText(line, opening + 1, at - 1, is_json=True))
            copied = at
    return b"".join([*kept, line[copied:]]), long


def _end_of_string(line: bytes, opening: int) -> int:
    """Behind the quote that closes the string; 0 where there is none."""
    at, size = opening + 1, 64  # more each time: most strings are short
    while at < len(line):
        piece = line[at : at + size].replace(b"\\\\", b"..").replace(b'\\"', b"..")  # escaped ones out of the way
        if (quote := piece.find(b'"')) >= 0:
            return at + quote + 1
        at += max(1, len(piece) - piece.endswith(b"\\"))  # what it escapes is the next piece's first
        size = min(4 * size, _PIECE)
    return 0


def _text(value: Any, long: list[LongText]) -> LongText | list[str]:
    if isinstance(value, str):
        return [value]
    return long[value[_LONG]]  # LookupError or TypeError for any other value
