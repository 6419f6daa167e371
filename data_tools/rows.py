"""The first rows of a file of questions and answers: a JSON array, or one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.errors import InputError
from data_tools.sources import blocks, find_sources

QUESTION_KEYS = ("instruction", "query", "prompt", "question")
ANSWER_KEYS = ("output", "content", "response", "answer")
_ROW = 1  # bytes of a block, so that each row is one and nothing is read behind the last one asked for
_EXAMPLE = '{"instruction": "What is a list?", "output": "A sequence."}'


def first_rows(path: Path, count: int) -> Iterator[tuple[str, Any]]:
    """Up to `count` rows, each with its place: `file:3` for a line, `file[2]` for the third element of an array.

    Raises:
        InputError: no such file, one without rows, or one that is neither a JSON array nor JSON lines.
    """
    rows = ((block.place(i), line) for source in find_sources(path) for block in blocks(source, _ROW, ()) for i, line in enumerate(block.read()))
    number = 0
    filled = ((where, line) for where, line in rows if line.strip())
    for number, (where, line) in enumerate(islice(filled, count), start=1):
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            raise InputError(f"not UTF-8: {error.reason}", where, "convert the file to UTF-8 (iconv -t UTF-8)") from None
        except ValueError as error:
            raise InputError(f"not JSON: {error}", where, "one object per line, or one array of objects") from None
        yield where, row
    if not number:
        raise InputError("the file holds no rows", str(path), f"one object per row: {_EXAMPLE}")


def check_row(where: str, row: Any) -> None:
    """InputError if a row is no object with a question and an answer; a question may be empty, an answer not."""
    if not isinstance(row, dict):
        raise InputError(f"not an object but {json.dumps(row)[:60]}", where, f"one object per row: {_EXAMPLE}")
    for name, keys in (("question", QUESTION_KEYS), ("answer", ANSWER_KEYS)):
        found = [key for key in keys if isinstance(row.get(key), str)]
        if not found:
            there = ", ".join(list(map(str, row))[:8]) or "no keys"
            raise InputError(f"no {name} in this row, which has {there}", where, f"text under {', '.join(keys[:-1])} or {keys[-1]}")
        if name == "answer" and not row[found[0]].strip():
            raise InputError(f"an empty answer ({found[0]})", where, "give it one, or remove the row")
