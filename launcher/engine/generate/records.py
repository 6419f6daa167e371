"""The lines of a file of prompts, and the lines of a file of answers. Every line keeps its place."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.conversations import Conversation, question
from data_tools.records import BadLine
from launcher.whole import write_whole

KEYS = ("query", "prompt", "text", "instruction")
_OURS = ("output", "finish_reason", "prompt_tokens", "completion_tokens", "error")
_BOM = b"\xef\xbb\xbf"
# All that ends a line for `str.splitlines`, and the backslash that announces them.
_ESCAPED = re.compile("[\\\\\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")
_SHORT = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}


@dataclass
class Line:
    """One line of the input and, once there is one, its answer.

    Attributes:
        number: from 1.
        record: the JSON object; what is no object is kept as {"line": its text}; None for a blank line.
        prompt: what is asked; None where the line is blank or bad.
        turns: the conversation that ends with it, for a chat template.
        error: why there is no answer.
        output: the answer.
    """

    number: int
    record: dict | None
    prompt: str | None = None
    turns: Conversation = ()
    error: str | None = None
    output: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def fail(self, error: str) -> None:
        self.error, self.finish_reason, self.output = error, "error", ""


def read_lines(path: Path, chat: bool = False) -> list[Line]:
    """Every line of a JSONL file, the bad ones with their error. `chat`: a chat template will write what is asked."""
    content = path.read_bytes().removeprefix(_BOM)
    texts = content.split(b"\n")
    if texts[-1] == b"":
        texts.pop()
    return [_read(number, text, chat) for number, text in enumerate(texts, start=1)]


def _read(number: int, raw: bytes, chat: bool) -> Line:
    text = raw.decode("utf-8", errors="backslashreplace").strip()
    if not text:
        return Line(number, None)
    line = Line(number, {"line": text})
    try:
        record = json.loads(raw)
        if not isinstance(record, dict):
            raise ValueError(f"not a JSON object such as {{\"query\": \"...\"}}: {text[:60]}")
        line.record = record
        line.turns = question(record) if chat else ()
        line.prompt = line.turns[-1].whole if chat else _prompt(record)
    except UnicodeDecodeError as error:
        line.fail(f"not UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        line.fail(f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        line.fail("not JSON that can be read: nested too deep")
    except BadLine as error:
        line.fail(error.what)
    except ValueError as error:
        line.fail(str(error))
    return line


def _prompt(record: dict) -> str:
    """The text of the first of KEYS; an instruction is joined with its `input`, where that is not empty, by a newline."""
    key = next((key for key in KEYS if key in record), None)
    if key is None:
        has = ", ".join(list(record)[:6]) or "none"
        raise ValueError(f"none of the keys {', '.join(KEYS)} (keys: {has})")
    parts = [key, "input"] if key == "instruction" and record.get("input") else [key]
    for part in parts:
        if not isinstance(record[part], str):
            raise ValueError(f"{part} is not text: {json.dumps(record[part])[:60]}")
    prompt = "\n".join(record[part] for part in parts)
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError(f"{key} has half of a surrogate pair, which no text can hold")
    return prompt


def write_lines(lines: Sequence[Line], path: Path) -> None:
    """Write one line per line: whole records into a .jsonl, else the answers alone. Beside it first, then renamed."""
    form = _as_record if path.suffix == ".jsonl" else _as_text
    write_whole(path, "".join(form(line) + "\n" for line in lines))


def _as_text(line: Line) -> str:
    """The answer, escaped; `[error] ...` where there is none; nothing for a blank line."""
    return escape(line.output if line.error is None else f"[error] line {line.number}: {line.error}")


def _as_record(line: Line) -> str:
    """The input record and what was made of it. A key of the record's own that has one of our names becomes `input_<name>`."""
    if line.record is None:
        return ""
    record = {f"input_{key}" if key in _OURS else key: value for key, value in line.record.items()}
    record |= {
        "output": line.output,
        "finish_reason": line.finish_reason,
        "prompt_tokens": line.prompt_tokens,
        "completion_tokens": line.completion_tokens,
    }
    if line.error is not None:
        record["error"] = line.error
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair in the input's record: JSON's own escape can say it
        text = json.dumps(record)
    return text


def escape(text: str) -> str:
    r"""`text` on one line: a backslash becomes `\\`, a line end `\n` or `\r`, rarer ones such as U+2028 `\u2028`."""
    return _ESCAPED.sub(lambda match: _SHORT.get(match[0]) or f"\\u{ord(match[0]):04x}", text)


def unescape(text: str) -> str:
    """The text that `escape` was given."""
    long = {short: character for character, short in _SHORT.items()}
    return re.sub(r"\\(?:u([0-9a-f]{4})|.)", lambda match: chr(int(match[1], 16)) if match[1] else long[match[0]], text)
