"""Conversation → pieces of text and special tokens, each with or without loss: the one form that fine-tuning, generation and
serving share. What the model reads before an answer is, token for token, what it read in training.

A user's text never becomes a special token, whatever it spells. Every answer and the token that ends it are trained.
Sources: stanford_alpaca's prompts; Meta's Llama-2 chat format; OpenAI's ChatML; Yuan 2.0's instruct_tuning and data_process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np

from data_tools.conversations import Conversation, Turn
from data_tools.errors import TokenizerError
from data_tools.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Piece:
    """Some text, or the name of one special token."""

    text: str
    trained: bool = False
    special: bool = False


@dataclass(frozen=True)
class Rendered:
    """Ids and, of each, whether it is trained on; both int32[n] and bool[n]."""

    ids: np.ndarray
    trained: np.ndarray


class Template(ABC):
    """How conversations are written. `name` is that of tokenizer.chat_template."""

    name: str

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._end = name_of(tokenizer, tokenizer.eod)

    @abstractmethod
    def pieces(self, turns: Conversation) -> Iterator[Piece]:
        """The pieces of turns; where a user's is the last, up to where the answer begins.

        Raises:
            BadLine: the form has no place for one of the turns.
        """

    def render(self, turns: Conversation, last_only: bool = False) -> Rendered:
        """A whole conversation; with `last_only` its last answer alone is trained."""
        ids: list[int] = []
        trained: list[bool] = []
        for is_special, run in groupby(self.pieces(turns), lambda piece: piece.special):
            for token, of_an_answer in map(self._named, run) if is_special else self._run(list(run), begins=not ids):
                ids.append(token)
                trained.append(of_an_answer)
        mask = np.array(trained, dtype=bool)
        if last_only and mask.any():
            between = np.flatnonzero(~mask[: np.flatnonzero(mask)[-1]])
            mask[: between[-1] + 1 if len(between) else 0] = False
        return Rendered(np.array(ids, dtype=np.int32), mask)

    def _named(self, piece: Piece) -> tuple[int, bool]:
        return self.tokenizer.special_tokens[piece.text], piece.trained

    def _run(self, pieces: list[Piece], begins: bool) -> Iterator[tuple[int, bool]]:
        """Texts between two special tokens, encoded as the one text that they are; but what stands before an answer is
        encoded as if nothing followed, for so the model reads it when it answers."""
        text, ids = "", []
        for is_answer, same in groupby(pieces, lambda piece: piece.trained):
            more = "".join(piece.text for piece in same)
            joint = self.tokenizer.encode_plain(text + more, begins) if more else ids
            joint = joint if joint[: len(ids)] == ids else ids + self.tokenizer.encode_plain(more, begins and not text)
            yield from ((token, is_answer) for token in joint[len(ids) :])
            text, ids = text + more, joint

    @cached_property
    def end(self) -> int:
        """The token that ends an answer."""
        rendered = self.render((Turn("user", "q"), Turn("assistant", "a")))
        return int(rendered.ids[rendered.trained][-1])

    def prompt(self, turns: Conversation) -> list[int]:
        """Ids up to where the model answers the last turn, which is a user's."""
        return self.render(turns).ids.tolist()

    def _special(self, token: str, trained: bool = False) -> Piece:
        if token not in self.tokenizer.special_tokens:
            there = ", ".join(list(self.tokenizer.special_tokens)[:8])
            fix = f"another template, or the tokenizer that the model was made with; this one has {there}"
            raise TokenizerError(f"the template {self.name} needs the special token {token}, which this tokenizer has not", "tokenizer.chat_template", fix)
        return Piece(token, trained, special=True)

    def _begin(self) -> Iterator[Piece]:
        """The beginning of sentence, where the tokenizer has one."""
        if self.tokenizer.bos is not None:
            yield Piece(name_of(self.tokenizer, self.tokenizer.bos), special=True)


class Alpaca(Template):
    """Stanford's: a preamble, then the instruction, perhaps an input, and the answer under headings."""

    name = "alpaca"
    WITH_INPUT = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
    )
    WITHOUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

    def pieces(self, turns: Conversation) -> Iterator[Piece]:
        yield from self._begin()
        system, rest = split_system(turns)
        default = self.WITH_INPUT if rest and rest[0].input else self.WITHOUT
        yield Piece((system.text if system else default) + "\n\n")
        for number, turn in enumerate(rest):
            if turn.role == "user":
                given = f"### Input:\n{turn.input}\n\n" if turn.input else ""
                yield Piece(f"{'' if number == 0 else chr(10) * 2}### Instruction:\n{turn.text}\n\n{given}### Response:")
            else:
                yield Piece(turn.text, trained=True)
                yield Piece(self._end, trained=True, special=True)


class Yuan(Template):
    """Yuan 2.0's: earlier turns on lines of their own, one <sep> before the last answer, <eod> behind it. Earlier answers are
    part of the question, and not trained."""

    name = "yuan"

    def pieces(self, turns: Conversation) -> Iterator[Piece]:
        system, rest = split_system(turns)
        asked = rest[:-1] if rest and rest[-1].role == "assistant" else rest
        yield Piece("\n".join(turn.whole for turn in ([system] if system else []) + list(asked)))
        yield self._special("<sep>", trained=True)  # the released models answer with it first
        if len(asked) < len(rest):
            yield Piece(rest[-1].text, trained=True)
            yield self._special("<eod>", trained=True)


class Llama2(Template):
    """Llama 2 chat: [INST] and [/INST] around what the user says, the system's words within the first of them."""

    name = "llama2"

    def pieces(self, turns: Conversation) -> Iterator[Piece]:
        system, rest = split_system(turns)
        for number, turn in enumerate(rest):
            if turn.role == "user":
                before = f"<<SYS>>\n{system.text}\n<</SYS>>\n\n" if system and number == 0 else ""
                yield self._special("<s>")
                yield Piece(f"[INST] {before}{turn.whole.strip()} [/INST]")
            else:
                yield Piece(f" {turn.text.strip()} ", trained=True)
                yield self._special("</s>", trained=True)


class ChatML(Template):
    """OpenAI's: <|im_start|>, the role on a line, the text, <|im_end|>."""

    name = "chatml"

    def pieces(self, turns: Conversation) -> Iterator[Piece]:
        for turn in turns:
            answer = turn.role == "assistant"
            yield self._special("<|im_start|>")
            yield Piece(f"{turn.role}\n")
            yield Piece(turn.whole, trained=answer)
            yield self._special("<|im_end|>", trained=answer)
            yield Piece("\n")
        if turns[-1].role == "user":
            yield self._special("<|im_start|>")
            yield Piece("assistant\n")


class Plain(Template):
    """Question, answer, end of document, and nothing around them; turns and input on lines of their own."""

    name = "plain"

    def pieces(self, turns: Conversation) -> Iterator[Piece]:
        yield from self._begin()
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                yield Piece(turn.text, trained=True)
                yield Piece(self._end, trained=True, special=True)
            else:
                yield Piece(turn.whole + "\n")


def split_system(turns: Conversation) -> tuple[Turn | None, Conversation]:
    """The system's turn, where there is one that says something, and the others."""
    if not turns or turns[0].role != "system":
        return None, turns
    return turns[0] if turns[0].text else None, turns[1:]


def name_of(tokenizer: Tokenizer, token: int) -> str:
    """The name of a special token's id."""
    return next(name for name, i in tokenizer.special_tokens.items() if i == token)


TEMPLATES: dict[str, type[Template]] = {one.name: one for one in (Alpaca, Yuan, Llama2, ChatML, Plain)}
OWN = "tokenizer"  # the template that lies with the tokenizer


def build_template(name: str, tokenizer: Tokenizer) -> Template:
    """The template of that name.

    Raises:
        TokenizerError: the tokenizer lacks a special token of it, or has no template of its own.
    """
    if name == OWN:
        from data_tools.jinja import JinjaTemplate

        return JinjaTemplate(tokenizer)
    template = TEMPLATES[name](tokenizer)
    list(template.pieces((Turn("system", "s"), Turn("user", "q"), Turn("assistant", "a"))))  # asks for its special tokens
    return template
