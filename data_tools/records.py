"""A line of input → its texts. What is not that is refused with file and line.

A blank line of JSONL is refused too, as by Megatron-LM: line numbers and document numbers stay the same thing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import orjson

from data_tools.errors import InputError

Sentences = list[str]  # a document: one sentence for a plain text


class BadLine(ValueError):
    """A line that cannot be read: what is wrong with it, and what to do."""

    def __init__(self, what: str, fix: str):
        super().__init__(what, fix)
        self.what, self.fix = what, fix

    def at(self, place: str) -> InputError:
        """The same as an error that names the place."""
        return InputError(self.what, place, self.fix)


def parse_json(line: bytes, keys: Sequence[str]) -> list[Sentences]:
    """One JSON object's text under each key: one sentence for a string, several for a list of strings.

    Raises:
        BadLine: not UTF-8, not a JSON object, no such key, or something other than text there.
    """
    try:
        record = orjson.loads(line)
        texts = [record[key] for key in keys]
    except (orjson.JSONDecodeError, TypeError, KeyError):
        return _parse_slowly(line, keys)
    if all(type(text) is str for text in texts):
        return [[text] for text in texts]
    return [_sentences(record, key) for key in keys]


def parse_whole(lines: list[bytes], keys: Sequence[str]) -> list[list[str]] | None:
    """The texts under each key of many JSON objects at once, 5 times as fast for short lines; None where any of them is
    not a plain text and needs `parse_json`."""
    try:
        records = list(map(orjson.loads, lines))
        texts = [[record[key] for record in records] for key in keys]
    except (orjson.JSONDecodeError, TypeError, KeyError):
        return None
    return texts if all(set(map(type, column)) == {str} for column in texts) else None


def parse_text(line: bytes, keys: Sequence[str]) -> list[Sentences] | None:
    """A line of plain text is a document; its line end is not part of it. None for a blank line, which is none.

    Raises:
        BadLine: not UTF-8.
    """
    text = _decode(line).rstrip("\r\n")
    return [[text]] if text.strip() else None


def parse_yuan(line: bytes, keys: Sequence[str]) -> list[Sentences] | None:
    """A document by the rules of Yuan 2.0's preprocess_data_yuan.py: a leading `<n>` and white space at both ends go,
    `<n>` is a line end, `▃` goes, `[SEP]` is `<sep>`. None where nothing but line ends is left.

    Raises:
        BadLine: not UTF-8.
    """
    text = _decode(line).removeprefix("<n>").strip().replace("\r", "").replace("\n", "")
    text = text.replace("<n>", "\n").replace("▃", "").replace("[SEP]", "<sep>")
    return [[text]] if text.strip("\n") else None


JSON_FORMATS = ("jsonl", "json", "parquet")
PARSERS = {"jsonl": parse_json, "json": parse_json, "parquet": parse_json, "text": parse_text, "yuan": parse_yuan}


def _parse_slowly(line: bytes, keys: Sequence[str]) -> list[Sentences]:
    record = parse_value(line)
    if not isinstance(record, dict):
        raise BadLine(f"not a JSON object: {beginning(_decode(line))}", 'each line is an object such as {"text": "..."}')
    return [_sentences(record, key) for key in keys]


def parse_value(line: bytes) -> Any:
    """What the fast parser did not take: the standard library takes some of it (NaN), and says of the rest what is wrong.

    Raises:
        BadLine: not UTF-8, or not JSON.
    """
    text = _decode(line)
    if not text.strip():
        raise BadLine("a blank line, where a JSON object should be", "remove blank lines: sed -i '/^[[:space:]]*$/d' FILE")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise BadLine(f"not JSON ({reason}): {beginning(text)}", "mend or remove the line") from None


def _sentences(record: dict[str, object], key: str) -> Sentences:
    if key not in record:
        shown, keys = beginning(json.dumps(record, ensure_ascii=False)), ", ".join(list(record)[:8]) or "none"
        raise BadLine(f"no key {key!r}: {shown}", f"name the key with --json-keys; the line has {keys}")
    value: Any = record[key]
    sentences = value if isinstance(value, list) else [value]
    for sentence in sentences:
        if not isinstance(sentence, str):
            raise BadLine(f"{key!r} is not text but {json.dumps(sentence)[:80]}", "a string, or a list of strings")
        whole_text(sentence, repr(key))
    return sentences


def whole_text(text: str, name: str) -> str:
    """The text itself; BadLine where it holds half a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        fix = "mend the line: both halves of the pair, or U+FFFD in its place"
        raise BadLine(f"{name} has {half}, half of a surrogate pair, which no text can hold", fix) from None
    return text


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        shown = beginning(line.decode("utf-8", errors="backslashreplace"))
        fix = "convert the file to UTF-8 (iconv -t UTF-8), or mend the line"
        raise BadLine(f"not UTF-8 at byte {error.start + 1} of the line: {shown}", fix) from None


def beginning(text: str) -> str:
    """First 80 characters, with what a terminal would act upon escaped."""
    text = text.rstrip("\r\n")
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:80])
    return shown + (" ..." if len(text) > 80 else "")
