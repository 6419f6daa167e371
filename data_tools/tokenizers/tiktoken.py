"""Byte-level BPE in the form of OpenAI's `tiktoken`: a file of ranks, and beside it in code how texts are split."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import TokenizerError
from data_tools.tokenizers.base import joined
from data_tools.tokenizers.gigatoken import GigatokenBatches, hard_texts

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_GPT4 = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD, _ENDING = r"[^\r\n\p{L}\p{N}]?", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = "|".join(
    (f"{_WORD}{_UPPER}*{_LOWER}+{_ENDING}", f"{_WORD}{_UPPER}+{_LOWER}*{_ENDING}", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _SPACES)
)
_V1 = r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_V2 = "|".join((f"{_WORD}{_UPPER}*{_LOWER}+", f"{_WORD}{_UPPER}+{_LOWER}*", r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _SPACES))


@dataclass(frozen=True)
class Encoding:
    """How texts are split, which special tokens there are besides the ranks, and gigatoken's name for it."""

    pattern: str
    special_tokens: dict[str, int] = field(default_factory=dict)
    gigatoken: str | None = None


END_OF_TEXT = "<|endoftext|>"
# As published in tiktoken_ext/openai_public.py; v1 and v2 are Megatron-LM's, for its own form of vocabulary.
ENCODINGS = {
    "r50k_base": Encoding(_GPT2, {END_OF_TEXT: 50256}, "gpt2"),
    "p50k_base": Encoding(_GPT2, {END_OF_TEXT: 50256}, "gpt2"),
    "cl100k_base": Encoding(
        _GPT4,
        {END_OF_TEXT: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276},
        "gpt4",
    ),
    "o200k_base": Encoding(_GPT4O, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}, "o200k"),
    "v1": Encoding(_V1),
    "v2": Encoding(_V2),
}
_MEGATRON_TOKENS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
_MEGATRON_SIZE = 1 << 17


class TikTokenizer(GigatokenBatches):
    """A file of ranks, id for id as the `tiktoken` library.

    Args:
        tokenizer_model: a .tiktoken file, or a .json of Megatron-LM's: a list of {rank, token_bytes, token_str}, whose
            ids begin behind the special tokens.
        tiktoken_pattern: how texts are split: a name of ENCODINGS or a regular expression. Not given: by the file's
            name, such as cl100k_base.tiktoken; v2 for a .json, as in Megatron-LM.
        tiktoken_special_tokens: their ids by name, or a list of names: after the largest rank for a .tiktoken, from 0 for
            a .json. Not given: what the encoding was published with; <unk> <s> </s> <mask> <pad> <cls> <sep> for a .json.
        tiktoken_num_special_tokens: for a .json, how many ids are kept free for them.
        vocab_size: for a .json, its ids with the special ones; ranks beyond are left out, as in Megatron-LM.
        eod_token: the special token that ends documents; otherwise <|endoftext|>, and </s> for a .json.
        plain_special_tokens: a special token's name in a text is ordinary characters.
        use_gigatoken: encode large batches by gigatoken: True, False, or None for where it gives the same ids.

    Raises:
        TokenizerError: the file is broken, or how to split or end documents is not known.
    """

    type = "TikTokenizer"
    is_local = True
    library = "tiktoken"

    def __init__(
        self,
        tokenizer_model: Path,
        tiktoken_pattern: str | None = None,
        tiktoken_special_tokens: Sequence[str] | dict[str, int] | None = None,
        tiktoken_num_special_tokens: int = 1000,
        vocab_size: int | None = None,
        eod_token: str | None = None,
        plain_special_tokens: bool = False,
        use_gigatoken: bool | None = None,
    ):
        import tiktoken

        is_json = tokenizer_model.suffix == ".json"
        name = tiktoken_pattern or ("v2" if is_json else tokenizer_model.stem)
        self._encoding = _encoding(name, tiktoken_pattern, tokenizer_model)
        if is_json:
            tokens = _megatron_tokens(tiktoken_special_tokens, tiktoken_num_special_tokens, tokenizer_model)
            ranks = _megatron_ranks(tokenizer_model, len(tokens), vocab_size or _MEGATRON_SIZE)
        else:
            ranks = _ranks(tokenizer_model)
            tokens = _numbered(self._encoding.special_tokens if tiktoken_special_tokens is None else tiktoken_special_tokens, ranks)
        _check_ids(ranks, tokens, tokenizer_model)
        try:
            self._backend = tiktoken.Encoding(
                tokenizer_model.stem, pat_str=self._encoding.pattern, mergeable_ranks=ranks, special_tokens=tokens
            )
        except ValueError as error:
            raise TokenizerError(f"not a pattern: {error}", "tokenizer.tiktoken_pattern", f"a regular expression, or {_names()}") from None
        self._refuse_holes(tiktoken_pattern)
        self.special_tokens, self._plain = tokens, plain_special_tokens
        eod_token = eod_token or ("</s>" if is_json else END_OF_TEXT)
        if eod_token not in tokens:
            fix = f"tokenizer.eod_token=TOKEN; there are {', '.join(list(tokens)[:8]) or 'none: tokenizer.tiktoken_special_tokens=[TOKEN]'}"
            raise TokenizerError(f"no special token {eod_token!r} to end documents with", str(tokenizer_model), fix)
        self.eod = tokens[eod_token]
        self.vocab_size = self._backend.n_vocab
        self.files = {"tokenizer_model": tokenizer_model}
        self.options = {
            "tiktoken_pattern": tiktoken_pattern,
            "tiktoken_special_tokens": tiktoken_special_tokens,
            "tiktoken_num_special_tokens": tiktoken_num_special_tokens,
            "vocab_size": vocab_size,
            "eod_token": eod_token,
            "plain_special_tokens": plain_special_tokens,
        }
        self.settings = {"use_gigatoken": use_gigatoken}

    def _identity(self) -> dict[str, Any]:
        tokens = sorted(self.special_tokens.items())
        return {"pattern": self._encoding.pattern, "tokens": tokens, "eod": self.eod, "plain": self._plain, "size": self.vocab_size}

    def encode(self, text: str) -> list[int]:
        return self._backend.encode_ordinary(text) if self._plain else self._backend.encode(text, allowed_special="all")

    def encode_plain(self, text: str, begins: bool = True) -> list[int]:
        return self._backend.encode_ordinary(text)

    def encode_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._fast:
            return super().encode_arrays(texts)
        allowed: Any = set() if self._plain else "all"
        return joined([self._backend.encode_to_numpy(text, allowed_special=allowed, disallowed_special=()) for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids])

    def _refuse_holes(self, pattern: str | None) -> None:
        """The library leaves out what an expression does not match, and says nothing."""
        for text in hard_texts() if pattern and pattern not in ENCODINGS else []:
            back = self._backend.decode(self._backend.encode_ordinary(text))
            if back != text:
                fix = f"an expression that matches every text from end to end, or {_names()}"
                raise TokenizerError(f"the pattern {pattern!r} leaves out parts of a text: {text[:40]!r}", "tokenizer.tiktoken_pattern", fix)

    def _make_gigatoken(self, factory: Any) -> Any:
        path = self.files["tokenizer_model"]
        if path.suffix == ".json" or not self._encoding.gigatoken:
            raise TokenizerError("gigatoken knows the published encodings alone, and .tiktoken files", "tokenizer.use_gigatoken")
        return factory.from_tiktoken(path, self._encoding.gigatoken, {} if self._plain else self.special_tokens)


def _names() -> str:
    return ", ".join(ENCODINGS)


def _encoding(name: str, given: str | None, path: Path) -> Encoding:
    if name in ENCODINGS:
        return ENCODINGS[name]
    if given:
        return Encoding(given)
    fix = f"tokenizer.tiktoken_pattern=NAME, one of {_names()}; or the regular expression itself"
    raise TokenizerError("a file of ranks does not say how texts are split, and its name is not that of a published one", str(path), fix)


def _ranks(path: Path) -> dict[bytes, int]:
    """The lines of a .tiktoken file: a token's bytes in base64, a space, its rank."""
    try:
        lines = (line.split() for line in path.read_bytes().splitlines() if line)
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise TokenizerError(f"not a file of ranks: {error}", str(path), "lines such as 'IQ== 0': base64, a space, a number") from None


def _megatron_ranks(path: Path, first: int, size: int) -> dict[bytes, int]:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        ranks = {base64.b64decode(one["token_bytes"], validate=True): first + one["rank"] for one in listed[: max(0, size - first)]}
        in_order = all(one["rank"] == i for i, one in enumerate(listed))
    except (ValueError, TypeError, KeyError) as error:
        raise TokenizerError(f"not a vocabulary of Megatron-LM's form: {error!r}", str(path), "a list of {rank, token_bytes, token_str}") from None
    if not in_order:
        raise TokenizerError("the ranks are not 0, 1, 2, ... in order", str(path), "sort the file by rank")
    return ranks


def _megatron_tokens(given: Sequence[str] | dict[str, int] | None, number: int, path: Path) -> dict[str, int]:
    tokens = list(_MEGATRON_TOKENS if given is None else given)
    if len(tokens) > number:
        fix = f"tokenizer.tiktoken_num_special_tokens={len(tokens)}"
        raise TokenizerError(f"{len(tokens)} special tokens, and only {number} ids for them", str(path), fix)
    tokens += [f"<SPECIAL_{i}>" for i in range(len(tokens), number)]
    return {token: i for i, token in enumerate(tokens)}


def _numbered(tokens: Sequence[str] | dict[str, int], ranks: dict[bytes, int]) -> dict[str, int]:
    """Names in a list get the ids after the largest rank."""
    first = max(ranks.values(), default=-1) + 1
    return dict(tokens) if isinstance(tokens, dict) else {token: first + i for i, token in enumerate(tokens)}


def _check_ids(ranks: dict[bytes, int], tokens: dict[str, int], path: Path) -> None:
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(f"no token for the byte {missing[0]:#04x}: not every text could be written", str(path), "fetch the file again")
    taken = set(ranks.values())
    twice = [token for token, i in tokens.items() if i in taken]
    if twice or len(set(tokens.values())) < len(tokens) or len(taken) < len(ranks):
        what = f"{twice[0]!r} has the id of a rank, {tokens[twice[0]]}" if twice else "two tokens with the same id"
        raise TokenizerError(what, str(path), "tokenizer.tiktoken_special_tokens: ids that no rank has, or a list of names")
