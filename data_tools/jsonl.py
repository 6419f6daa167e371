"""JSONL corpora: one JSON object per line, its text under a key. What is not that is refused with file and line.

A blank line is refused too, as by Megatron-LM: line numbers and document numbers stay the same thing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import InputError

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gzip -dk"),
    b"\xfd7zXZ\x00": ("xz", "xz -dk"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d"),
    b"BZh": ("bzip2", "bzip2 -dk"),
}
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Chunk:
    """Some consecutive lines of a file, as bytes. `first` is the number of the first one, from 1."""

    path: str
    first: int
    lines: list[bytes]


def read_chunks(path: Path, chunk_bytes: int) -> Iterator[Chunk]:
    """The lines of `path`, some `chunk_bytes` at a time; a longer line is a chunk of its own.

    Raises:
        InputError: no such file, or a compressed one.
    """
    check_readable(path)
    with open(path, "rb") as file:
        lines: list[bytes] = []
        first, size = 1, 0
        for number, line in enumerate(file, start=1):
            lines.append(line.removeprefix(_BOM) if number == 1 else line)
            size += len(line)
            if size >= chunk_bytes:
                yield Chunk(str(path), first, lines)
                first, lines, size = number + 1, [], 0
        if lines:
            yield Chunk(str(path), first, lines)


def check_readable(path: Path) -> None:
    """InputError if `path` is not a file, or holds compressed data."""
    if not path.is_file():
        raise InputError(f"no such file: {path}" if not path.exists() else f"not a file: {path}", "", "give a JSONL file")
    with open(path, "rb") as file:
        start = file.read(6)
    for magic, (name, command) in _COMPRESSED.items():
        if start.startswith(magic):
            raise InputError(f"the input is compressed with {name}", str(path), f"{command} {path}, and give the file that this makes")


def parse_chunk(chunk: Chunk, keys: Sequence[str]) -> Iterator[tuple[str, list[list[str]]]]:
    """Each line as (its place as `file:line`, for each key the text as a list of sentences: one for a plain string).

    Raises:
        InputError: a line that is not UTF-8, not a JSON object, has no such key or something other than text there.
    """
    for where, line in decode_lines(chunk):
        record = _parse_line(line, where)
        yield where, [_sentences(record, key, where) for key in keys]


def decode_lines(chunk: Chunk) -> Iterator[tuple[str, str]]:
    """Each line as (its place as `file:line`, its text).

    Raises:
        InputError: a line that is not UTF-8.
    """
    for number, line in enumerate(chunk.lines, start=chunk.first):
        where = f"{chunk.path}:{number}"
        try:
            yield where, line.decode("utf-8")
        except UnicodeDecodeError as error:
            fix = "convert the file to UTF-8 (iconv -t UTF-8), or mend the line"
            shown = _beginning(line.decode("utf-8", errors="backslashreplace"))
            raise InputError(f"not UTF-8 at byte {error.start + 1} of the line: {shown}", where, fix) from None


def _parse_line(text: str, where: str) -> dict[str, object]:
    if not text.strip():
        raise InputError("a blank line, where a JSON object should be", where, "remove blank lines: sed -i '/^[[:space:]]*$/d' FILE")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"not JSON ({reason}): {_beginning(text)}", where, "mend or remove the line") from None
    if not isinstance(record, dict):
        raise InputError(f"not a JSON object: {_beginning(text)}", where, 'each line is an object such as {"text": "..."}')
    return record


def _sentences(record: dict[str, object], key: str, where: str) -> list[str]:
    if key not in record:
        shown, keys = _beginning(json.dumps(record, ensure_ascii=False)), ", ".join(list(record)[:8]) or "none"
        raise InputError(f"no key {key!r}: {shown}", where, f"name the key with --json-keys; the line has {keys}")
    value: Any = record[key]
    sentences = value if isinstance(value, list) else [value]
    for sentence in sentences:
        if not isinstance(sentence, str):
            raise InputError(f"{key!r} is not text but {json.dumps(sentence)[:80]}", where, "a string, or a list of strings")
        try:
            sentence.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(sentence[error.start]):04x}"
            fix = "mend the line: both halves of the pair, or U+FFFD in its place"
            raise InputError(f"{key!r} has {half}, half of a surrogate pair, which no text can hold", where, fix) from None
    return sentences


def _beginning(text: str) -> str:
    """First 80 characters, with what a terminal would act upon escaped."""
    text = text.rstrip("\r\n")
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:80])
    return shown + (" ..." if len(text) > 80 else "")
