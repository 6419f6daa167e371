"""The first rows of a file of questions and answers: a JSON array, or one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.errors import InputError
from data_tools.jsonl import check_readable, decode_lines, read_chunks

QUESTION_KEYS = ("instruction", "query", "prompt", "question")
ANSWER_KEYS = ("output", "content", "response", "answer")
_READ = 1 << 20  # characters at a time: a row is rarely longer, and the first ones come at once from a file of any size
_EXAMPLE = '{"instruction": "What is a list?", "output": "A sequence."}'


def first_rows(path: Path, count: int) -> Iterator[tuple[str, Any]]:
    """Up to `count` rows, each with its place: `file:3` for a line, `file, row 3` for an element of an array.

    Raises:
        InputError: no such file, an empty one, or one that is neither a JSON array nor JSON lines.
    """
    check_readable(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            start = file.read(_READ).lstrip()
            if start.startswith("["):
                yield from _of_array(path, file, start[1:], count)
                return
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: {error.reason}", str(path), "convert the file to UTF-8 (iconv -t UTF-8)") from None
    if not start:
        raise InputError("the file holds no rows", str(path), f"one object per row: {_EXAMPLE}")
    left = count
    for chunk in read_chunks(path, _READ):
        for where, line in decode_lines(chunk):
            if left == 0:
                return
            left -= 1
            try:
                yield where, json.loads(line)
            except ValueError as error:
                raise InputError(f"not JSON: {error}", where, "one object per line, or one array of objects") from None


def _of_array(path: Path, file: Any, text: str, count: int) -> Iterator[tuple[str, Any]]:
    """The elements of an array whose beginning is `text`, read on from `file` only while an element is incomplete."""
    decoder = json.JSONDecoder()
    for number in range(1, count + 1):
        text = text.lstrip(" \t\r\n,")
        while True:
            if text.startswith("]"):
                if number == 1:
                    raise InputError("the file holds no rows", str(path), f"one object per row: {_EXAMPLE}")
                return
            try:
                row, end = decoder.raw_decode(text)
                break
            except ValueError as error:
                more = file.read(_READ)
                if not more:
                    raise InputError(f"not JSON: {error.args[0]}", f"{path}, row {number}", "mend or remove the row") from None
                text = (text + more).lstrip(" \t\r\n,")
        yield f"{path}, row {number}", row
        text = text[end:]


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
