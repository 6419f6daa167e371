"""A row of fine-tuning data → who says what. Each row is read by itself, whatever the rows before it were like.

    {"instruction": …, "input": …, "output" | "response" | "content" | "answer" | "completion": …}     Alpaca, WuDao, Dolly
    {"prompt": …, "completion": …}
    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}            OpenAI
    {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}                ShareGPT
    instruction<sep>response                                                                          Yuan 2.0, a line
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from data_tools.records import BadLine, whole_text

Role = Literal["system", "user", "assistant"]
QUESTION_KEYS = ("instruction", "prompt", "query", "question")
INPUT_KEYS = ("input", "context")
ANSWER_KEYS = ("output", "response", "completion", "content", "answer")
_ROLES: dict[object, Role] = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# What other tools write beside a text, and train: no template here has a place for it.
_UNREAD = ("tools", "functions", "tool_calls", "function_call", "reasoning_content", "thinking")
_EXAMPLE = 'one object per row: {"instruction": "What is a list?", "output": "A sequence."}'


@dataclass(frozen=True)
class Turn:
    """What one says; `input` is what an Alpaca row gives besides its instruction."""

    role: Role
    text: str
    input: str = ""

    @property
    def whole(self) -> str:
        """Text and input, for templates that have no place of its own for the input."""
        return f"{self.text}\n{self.input}" if self.text and self.input else self.text + self.input


Conversation = tuple[Turn, ...]  # perhaps a system's turn, then user and assistant by turns, an assistant's last


def conversation(row: Any) -> Conversation:
    """The turns of a row: an object in one of the forms above, or a line of Yuan's.

    Raises:
        BadLine: none of the forms, an empty answer, or turns out of order.
    """
    if isinstance(row, str):
        turns = _yuan(row)
    elif not isinstance(row, Mapping):
        raise BadLine(f"not an object but {_shown(row)}", _EXAMPLE)
    elif turns := _listed(row):
        _refuse_beside_messages(row)
    else:
        turns = _question_and_answer(row)
    if isinstance(row, Mapping):
        _refuse_unread(row, "the row")
    _check(turns)
    return turns


def question(record: Any) -> Conversation:
    """The turns of a record that asks: the forms of a row without their answer, or a prompt under `text`.

    Raises:
        BadLine: none of the forms, or the last message is an answer already.
    """
    if not isinstance(record, Mapping):
        raise BadLine(f"not an object but {_shown(record)}", 'such as {"query": "..."}')
    if turns := _listed(record):
        if turns[-1].role != "user":
            raise BadLine("the last message is no question", "end the conversation with the user's message")
        _check((*turns, Turn("assistant", "answered")))
        return turns
    asked = {key: value for key, value in record.items() if key not in ANSWER_KEYS}
    if not any(key in asked for key in QUESTION_KEYS) and "text" in asked:
        asked["prompt"] = asked.pop("text")
    return _question_and_answer({**asked, "output": "answered"})[:-1]


def _yuan(line: str) -> Conversation:
    parts = line.split("<sep>")
    if len(parts) != 2:
        what = "no <sep> between question and answer" if len(parts) == 1 else f"{len(parts) - 1} times <sep>, and one stands before the answer"
        raise BadLine(f"{what}: {_shown(line)}", "question<sep>answer on each line")
    return Turn("user", parts[0]), Turn("assistant", parts[1])


def _listed(row: Mapping[str, Any]) -> Conversation | None:
    """The turns of a list of messages; None where the row has none."""
    for key, role_key, text_key in (("messages", "role", "content"), ("conversations", "from", "value")):
        if row.get(key) is not None:
            turns = _messages(row[key], key, role_key, text_key)
            if system := row.get("system"):
                if turns[0].role == "system":
                    raise BadLine(f"the system's words stand under 'system' and in {key!r}", "leave them in one of the two")
                turns = (Turn("system", _text(system, "'system'")), *turns)
            return turns
    return None


def _refuse_beside_messages(row: Mapping[str, Any]) -> None:
    """Nothing of another form is passed over."""
    other = [key for key in (*QUESTION_KEYS, *INPUT_KEYS, *ANSWER_KEYS, "history") if row.get(key)]
    if other:
        raise BadLine(f"{', '.join(map(repr, other))} beside a list of messages", "put it into the messages, or leave it out")


def _refuse_unread(given: Mapping[str, Any], where: str) -> None:
    if unread := [key for key in _UNREAD if given.get(key)]:
        raise BadLine(f"{where} has {', '.join(map(repr, unread))}, which is not read", "write it into the text as the model is to see it, or leave it out")


def _messages(messages: Any, key: str, role_key: str, text_key: str) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise BadLine(f"{key!r} is no list of messages but {_shown(messages)}", f'[{{"{role_key}": ..., "{text_key}": ...}}, ...]')
    turns: list[Turn] = []
    for number, message in enumerate(messages, start=1):
        role = message.get(role_key) if isinstance(message, Mapping) else None
        if not isinstance(role, str) or role not in _ROLES:
            raise BadLine(f"message {number} is by {_shown(role)}", f"{role_key!r} is one of {', '.join(map(str, _ROLES))}")
        _refuse_unread(message, f"message {number}")
        if message.get("weight") not in (None, 1):
            raise BadLine(f"message {number} has a weight, which is not read", "every answer is trained; with data.mask_history=true the last alone")
        turns.append(Turn(_ROLES[role], _text(message.get(text_key), f"{text_key!r} of message {number}")))
    return tuple(turns)


def _text(value: Any, name: str) -> str:
    """A string, or OpenAI's list of parts, all of them text."""
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        value = "".join(str(part.get("text", "")) for part in value)
    if not isinstance(value, str):
        raise BadLine(f"{name} is not text but {_shown(value)}", "a string")
    return whole_text(value, name)


def _question_and_answer(row: Mapping[str, Any]) -> Conversation:
    question, given, answer = (_one(row, keys) for keys in (QUESTION_KEYS, INPUT_KEYS, ANSWER_KEYS))
    for name, keys, found in (("question", QUESTION_KEYS, question), ("answer", ANSWER_KEYS, answer)):
        if found is None:
            there = ", ".join(list(map(str, row))[:8]) or "no keys"
            raise BadLine(f"no {name} in this row, which has {there}", f"text under {', '.join(keys[:-1])} or {keys[-1]}; or messages")
    turns = [Turn("system", _text(row["system"], "'system'"))] if row.get("system") else []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise BadLine(f"'history' is no list but {_shown(history)}", '[["question", "answer"], ...]')
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadLine(f"'history' has no pair at {number} but {_shown(pair)}", '[["question", "answer"], ...]')
        turns += [Turn("user", _text(pair[0], "a question of 'history'")), Turn("assistant", _text(pair[1], "an answer of 'history'"))]
    return (*turns, Turn("user", question or "", given or ""), Turn("assistant", answer or ""))


def _one(row: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """The text under one of the keys; which one is told by what the row has, and two of them is no answer."""
    found = {key: _text(row[key], repr(key)) for key in keys if row.get(key) is not None}
    filled = [key for key, text in found.items() if text.strip()]
    if len(filled) > 1:
        raise BadLine(f"text under {' and '.join(map(repr, filled))}, which mean the same", "leave one of them in the row")
    return found[filled[0]] if filled else next(iter(found.values()), None)


def _check(turns: Conversation) -> None:
    spoken = [turn.role for turn in turns if turn.role != "system"]
    if "system" in [turn.role for turn in turns[1:]]:
        raise BadLine("a system's message after the first", "put it first, and once")
    if not spoken or spoken[-1] != "assistant":
        raise BadLine("the last message is no answer", "end each conversation with the assistant's message, or leave its end out")
    if spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise BadLine(f"user and assistant do not take turns: {', '.join(spoken[:6])}", "a question before each answer, and one answer to each")
    if empty := next((number for number, turn in enumerate(turns, start=1) if turn.role == "assistant" and not turn.text.strip()), 0):
        raise BadLine("an empty answer" + (f" (message {empty})" if len(turns) > 2 else ""), "give it one, or remove the row")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
