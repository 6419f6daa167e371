"""A tokenizer's own chat template: the Jinja text that lies in its tokenizer_config.json, or beside it in chat_template.jinja.

Written as `transformers` writes it (trim_blocks, lstrip_blocks, loop controls, raise_exception, a sandbox).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import combinations
from typing import Any

from data_tools.conversations import Conversation
from data_tools.errors import TokenizerError
from data_tools.records import BadLine
from data_tools.templates import Piece, Template, name_of
from data_tools.tokenizers.base import Tokenizer, content_of, read_config, read_text

# Whose texts a template strips: mostly nobody's or everybody's; Mistral's the answers alone.
_STRIPPED = [roles for count in (0, 3, 1, 2) for roles in combinations(("assistant", "user", "system"), count)]
_MARK = re.compile("\ue000(\\d+)\ue001")  # of private use: stands for a message's text while the template writes around it


class JinjaTemplate(Template):
    """Renders by the tokenizer's own template. What it writes around the messages may spell special tokens, they may not.

    Trained is what the template writes from where it asks for an answer, such as gpt-oss's channel, then the answer, and what
    follows it up to the first special token, which ends it; without one, the end of document.

    Raises:
        TokenizerError: there is no template, it is not one, or a file beside it is broken.
    """

    name = "tokenizer"

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer)
        source, where = jinja_source(tokenizer)
        if not where:
            place = str(next(iter(tokenizer.files.values()), ""))
            raise TokenizerError("the tokenizer has no chat template of its own", place, "name one, such as tokenizer.chat_template=alpaca")
        self._template = _compile(source, where)
        self._tokens = _named_beside(tokenizer)
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._signs = re.compile("|".join([_MARK.pattern, *map(re.escape, names)]))

    def pieces(self, turns: Conversation) -> Iterator[Piece]:
        marked = self._write(turns, _marks(len(turns)))
        written = self._write(turns, [turn.whole for turn in turns])
        for stripped in _STRIPPED:
            texts = [turn.whole.strip() if turn.role in stripped else turn.whole for turn in turns]
            if _MARK.sub(lambda mark: texts[int(mark[1])], marked) == written:
                yield from self._cut(marked, turns, texts)
                return
        raise BadLine("the tokenizer's template changes what is said in it", "another template: tokenizer.chat_template=chatml")

    def _cut(self, marked: str, turns: Conversation, texts: list[str]) -> Iterator[Piece]:
        begins, at, answering, said = self._begins(marked, turns), 0, False, False
        for match in [*self._signs.finditer(marked), None]:
            end = match.start() if match else len(marked)
            for stop in sorted({begin for begin in begins if at <= begin < end} | {end}):
                yield Piece(marked[at:stop], answering)
                at, answering = stop, answering or stop in begins
            if match and match[1]:
                answering = said = turns[int(match[1])].role == "assistant"
                yield Piece(texts[int(match[1])], answering)
            elif match:
                yield Piece(match[0], answering, special=True)
                answering, said = answering and not said, False
            at = match.end() if match else at
        if answering:
            yield Piece(self._end, True, special=True)

    def _begins(self, marked: str, turns: Conversation) -> set[int]:
        """Where in `marked` answers begin: behind the prompt that asks for each, which may end before a space."""
        prompts = [self._write(turns[:k], _marks(k)) for k, turn in enumerate(turns) if turn.role == "assistant"]
        return {len(prompt) for prompt in prompts if marked.startswith(prompt)}

    def _write(self, turns: Conversation, texts: Sequence[str]) -> str:
        messages = [{"role": turn.role, "content": text} for turn, text in zip(turns, texts, strict=True)]
        try:
            return self._template.render(messages=messages, add_generation_prompt=turns[-1].role == "user", **self._tokens)
        except Exception as error:  # whatever its author's code raises
            raise BadLine(f"the tokenizer's template refuses it: {error}", "mend the row, or take another template") from None


def _named_beside(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a template may ask for, as the tokenizer's own configuration has it."""
    bos = "" if tokenizer.bos is None else name_of(tokenizer, tokenizer.bos)
    told: dict[str, Any] = {"eos_token": name_of(tokenizer, tokenizer.eod), "bos_token": bos}
    for path in tokenizer.companions:
        if path.suffix == ".json":
            config = read_config(path)
            named = {key: content_of(config.get(key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
            told |= {key: token for key, token in named.items() if token}
    return told | {"tools": None, "documents": None}


def _marks(count: int) -> list[str]:
    return [f"\ue000{number}\ue001" for number in range(count)]


def jinja_source(tokenizer: Tokenizer) -> tuple[str, str]:
    """The template and the file it is in; two empty texts where the tokenizer has none.

    Raises:
        TokenizerError: a file beside the tokenizer is broken.
    """
    for path in sorted(tokenizer.companions, key=lambda path: path.suffix != ".jinja"):
        if path.suffix == ".jinja":
            return read_text(path), str(path)
        template = read_config(path).get("chat_template")
        if isinstance(template, list):  # several by name
            template = next((one.get("template") for one in template if isinstance(one, dict) and one.get("name") == "default"), None)
        if isinstance(template, str):
            return template, str(path)
    return "", ""


def _generation() -> type:
    """`transformers`' own tag around what an assistant says: here its body alone."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _compile(source: str, where: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation()])
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise TokenizerError(f"the chat template is not Jinja: {error}", where, "fetch the file again, or name another template") from None
