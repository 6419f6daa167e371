"""Rows of fine-tuning data as they stand in their files: a JSON array, one JSON object per line, or lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from data_tools.errors import InputError
from data_tools.records import JSON_FORMATS, PARSERS, BadLine, parse_value
from data_tools.sources import Format, Source, blocks, find_sources

_ROW = 1  # bytes of a block, so that each row is one and nothing is read behind the last one asked for
_EXAMPLE = '{"instruction": "What is a list?", "output": "A sequence."}'


def parse_row(format: Format, line: bytes) -> Any:
    """The JSON value of a line, or its text; None for a line that is blank where that is no fault.

    Raises:
        BadLine: not UTF-8, not JSON, or null.
    """
    if format not in JSON_FORMATS:
        document = PARSERS[format](line, ())
        return document and document[0][0]
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        value = parse_value(line)
    if value is None:
        raise BadLine("not an object but null", f"one object per row: {_EXAMPLE}")
    return value


def row_sources(paths: str | Path | Sequence[str | Path], format: Format | None = None) -> list[Source]:
    """The files of `find_sources`; rows in text files are Yuan's, with <n> for a line end, where nothing else is said."""
    found = find_sources(paths, format)
    return found if format else [replace(source, format="yuan") if source.format == "text" else source for source in found]


def first_rows(path: Path, count: int, format: Format | None = None) -> Iterator[tuple[str, Any]]:
    """Up to `count` rows, each with its place: `file:3` for a line, `file[2]` for the third element of an array.

    Raises:
        InputError: no such file, one without rows, or one that is neither a JSON array nor JSON lines.
    """
    found = ((source.format, block) for source in row_sources(path, format) for block in blocks(source, _ROW, ()))
    lines = ((kind, block.place(i), line) for kind, block in found for i, line in enumerate(block.read()))
    number = 0
    for number, (kind, where, line) in enumerate(islice((one for one in lines if one[2].strip()), count), start=1):
        try:
            yield where, parse_row(kind, line)
        except BadLine as bad:
            raise bad.at(where) from None
    if not number:
        raise InputError("the file holds no rows", str(path), f"one object per row: {_EXAMPLE}")
