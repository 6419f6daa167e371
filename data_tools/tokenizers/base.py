"""What every tokenizer offers."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import TokenizerError

LONG = 1 << 20  # characters of a text from which it is encoded in pieces: libraries need 40 (gigatoken) to 150 bytes for each
# Few signs, that the ids compared are those of all of them: a run of signs and the line end behind it may be one word.
_WORD_END = re.compile(r"\w(?:(?=[ \n，。])|[^\w\s]{1,8}(?=[ \n]))")
_WAYS = ((0, 0), (1, 0), (0, 1))  # what is left out behind a cut: nothing; a space, and the tokenizer adds one; the id of one that it adds
_AROUND, _SEARCHED, _TRIED = 64, 1 << 10, 8  # characters compared on either side of a cut; where they are looked for, and how many

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


class Tokenizer(ABC):
    """Text to token ids and back.

    Megatron-core's datasets read `eod`, `vocab_size` and `unique_identifiers` of it. It deliberately has no `pad`:
    GPTDataset then takes -1, a value that is never in the data, so no token loses its loss by accident.

    Attributes:
        type: Megatron-LM's --tokenizer-type.
        eod: id that ends a document.
        vocab_size: number of ids, unpadded; every id is below it.
        special_tokens: the ids that stand for no text, by the names that they are written with.
        files: what decides the ids, by the name of the argument of `build_tokenizer`.
        companions: files that belong beside them: copied with them, and no part of the hash.
        options: the other arguments that it was built with.
        settings: arguments that change its speed and no id.
        is_local: it merges neighbours, so that what stands a few words away changes no id.
    """

    type: str
    eod: int
    bos: int | None = None
    vocab_size: int
    special_tokens: dict[str, int]
    files: dict[str, Path]
    companions: tuple[Path, ...] = ()
    options: dict[str, Any]
    settings: dict[str, Any] = {}
    is_local: bool = False

    @property
    def special_ids(self) -> set[int]:
        """The ids of `special_tokens`."""
        return set(self.special_tokens.values())

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; no end of document is added."""

    def encode_plain(self, text: str, begins: bool = True) -> list[int]:
        """The same, but what spells a special token is text: for what users say. `begins`: nothing stands before it, not even
        a special token, for tokenizers that put a space before the first text alone."""
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in order; on one thread."""
        return [self.encode(text) for text in texts]

    def encode_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """`encode` of each text as (all ids one after another, how many there are of each text)."""
        encoded = self.encode_batch(texts)
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        return np.fromiter(chain.from_iterable(encoded), dtype=np.int64, count=int(lengths.sum())), lengths

    def encode_pieces(self, text: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of a long text that comes in pieces, in pieces too, so that it takes little memory: all of them together are
        those of `encode`."""
        held, left_out = "", 0
        for part in text:
            for start in range(0, len(part), LONG):
                held += part[start : start + LONG]
                if len(held) >= LONG and (cut := self._cut(held)):
                    at, skipped, next_left_out = cut
                    yield self.encode_arrays([held[:at]])[0][left_out:]
                    held, left_out = held[at + skipped :], next_left_out
        yield self.encode_arrays([held])[0][left_out:]

    def _cut(self, text: str) -> tuple[int, int, int] | None:
        """Where to cut near the end, and how many characters and ids to leave out behind it; None where no cut is known to be right:
        where the ids around it are the same without it."""
        if not self.is_local:
            return None
        ends = [found.end() for found in _WORD_END.finditer(text, max(0, len(text) - _SEARCHED), len(text) - _AROUND)]
        for at in reversed(ends[-_TRIED:]):
            before, after = text[max(0, at - _AROUND) : at], text[at : at + _AROUND]
            ids, whole = self.encode(before), self.encode(before + after)
            for skipped, left_out in _WAYS[:: 1 if after[0] == " " else 2]:
                if ids + self.encode(after[skipped:])[left_out:] == whole:
                    return at, skipped, left_out
        return None

    @property
    def engine(self) -> str:
        """The library that does the work, for the user to see."""
        return self.type

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""

    def hash(self) -> str:
        """sha256 over the type, the content of the files and what else decides the ids: equal hash, equal ids."""
        digest = hashlib.sha256(f"{self.type}\n{sorted(self._identity().items())}\n".encode())
        for name, path in sorted(self.files.items()):
            digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        return digest.hexdigest()

    def _identity(self) -> dict[str, Any]:
        """What decides the ids, besides the files."""
        return self.options

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled as what it is built from: 100 bytes, and the files are read again where it arrives."""
        return partial(type(self), **self.files, **self.options, **self.settings), ()

    @property
    def unique_identifiers(self) -> OrderedDict[str, object]:
        """What megatron-core hashes into the name of a dataset's cache: content, so that moved files keep their cache."""
        return OrderedDict(type=self.type, sha256=self.hash())


def settings_beside(path: Path) -> tuple[Path, ...]:
    """Hugging Face's settings that lie beside a tokenizer's file: names of tokens, and a chat template."""
    return tuple(found for name in (CONFIG, TEMPLATE) if (found := path.with_name(name)).is_file())


def read_text(path: Path) -> str:
    """A text that lies beside a tokenizer.

    Raises:
        TokenizerError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"cannot be read: {error}", str(path), "fetch the file again") from None


def read_config(path: Path) -> dict[str, Any]:
    """Settings that lie beside a tokenizer.

    Raises:
        TokenizerError: not a JSON object, as where Git without git-lfs left a pointer.
    """
    try:
        values = json.loads(read_text(path))
    except ValueError as error:
        raise TokenizerError(f"not JSON: {error}", str(path), "fetch the file again") from None
    if not isinstance(values, dict):
        raise TokenizerError("not a JSON object", str(path), "fetch the file again")
    return values


def content_of(token: Any) -> str | None:
    """A token is written as a string, or as an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def encode_all_but(
    encode: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]], texts: Sequence[str], others: dict[int, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """What `encode` gives for all texts, as `Tokenizer.encode_arrays`, but for `others`: their ids, by the text's number."""
    if not others:
        return encode(texts)
    ids, lengths = encode(["" if number in others else text for number, text in enumerate(texts)])
    each = np.split(ids, np.cumsum(lengths)[:-1])
    for number, one in others.items():
        each[number] = one
    return joined(each)


def joined(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of several texts as `Tokenizer.encode_arrays` gives them."""
    lengths = np.fromiter(map(len, arrays), dtype=np.int64, count=len(arrays))
    if len(arrays) == 1:
        return arrays[0], lengths  # which may be most of the memory
    return np.concatenate(arrays) if len(arrays) else np.empty(0, dtype=np.int64), lengths
