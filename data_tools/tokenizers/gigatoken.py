"""Byte-level BPE by `gigatoken`, 25 to 150 times as fast as Hugging Face's `tokenizers`, whose ids it must give.

It is believed only as far as it is checked: on hard texts when it is built, and on a sample of every batch. It keeps every
word that it ever saw (10 GB of varied text: 1.1 GiB in two processes), so it is built anew when it has grown.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from data_tools.errors import TokenizerError
from data_tools.tokenizers.base import Tokenizer, encode_all_but

Encode = Callable[[list[str]], list[list[int]]]
_SAMPLE = 512  # characters of a batch's middle text: 0.2 ms of `tokenizers` beside the 10 ms of a batch
_GROWTH = 192 << 20  # bytes of words kept: 1.5 GB of varied text, or 24 MB of words that never come again
_NEAR = 1 << 10  # characters that the exact library reads around one that gigatoken knows and it does not; no less than `_cut` searches
_LEAST_TEXT = 1 << 24  # characters between two of them, as building takes as long as these (0.15 s)
_HARD = [
    "To be, or not to be: it's 1234567 o'clock, they'll say'S 'LL",
    "  def f(x):\n        return  x\n\n\n\ttabs\t\tand trailing  \n \r\n\r\r\n",
    "今天天气很好，我们去公园。　全角空格 Ärger Straße ﬁ ½ ² ٣ ৪",
    "😀👩‍👩‍👧‍👦🇨🇳 e\u0301é \ufeff\u2028\xa0\u200b\x00\x07\x1b[0m\x85",
    "<|endoftext|> <s></s><|endoftext|><|endoftext|",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 5,
    "",
    " ",
    "\n\n",
]
# Unicode 17's letters, digits and marks, which gigatoken 0.10 knows and the exact libraries' Unicode 16 does not: "\U000323b0'll" is cut
# elsewhere. Where a text has none beyond U+FFFF, finding them one by one takes half as long as an expression does.
_NEW = "\u088f\u0c5c\u0cdc\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1" + "".join(map(chr, [*range(0x1ACF, 0x1ADE), *range(0x1AE0, 0x1AEC)]))
_NEW_ANYWHERE = re.compile(
    f"[{_NEW}\U00010940-\U00010959\U00010ec5-\U00010ec7\U00010efa\U00010efb\U00011b60-\U00011b67\U00011db0-\U00011ddb\U00011de0-\U00011de9\U00016ea0-\U00016eb8\U00016ebb-\U00016ed3"
    "\U00016ff2-\U00016ff6\U000187f8-\U000187ff\U00018d09-\U00018d1e\U00018d80-\U00018df2\U0001e6c0-\U0001e6ff\U0002b73a-\U0002b73f"
    "\U0002cea2-\U0002cead\U000323b0-\U00033479]"
)
_RANGES = [(9, 14), (32, 127), (32, 127), (160, 0x500), (0x900, 0x980), (0x2000, 0x2100), (0x3000, 0x3100), (0x4E00, 0x9FFF), (0x1F300, 0x1F700)]


class Gigatoken:
    """Encodes batches as the library `exact` would, on the calling thread.

    Args:
        make: builds gigatoken's tokenizer.
        exact: the other library's own encoding of a batch.
        special_tokens: as they are written in a text; how they are read is compared too.

    Raises:
        TokenizerError: it cannot be had, or does not give the same ids.
    """

    def __init__(self, make: Callable[[Any], Any], exact: Encode, special_tokens: Iterable[str] = ()):
        try:
            import gigatoken
        except ImportError:
            raise TokenizerError("the package gigatoken is not installed", "", "pip install gigatoken") from None
        self._make = lambda: make(gigatoken.Tokenizer)
        try:
            self._tokenizer = self._make()
        except Exception as error:  # the library raises several kinds for what it does not support
            raise TokenizerError(f"gigatoken cannot take this tokenizer: {error}") from error
        self._exact, self._before, self._text = exact, _resident(), 0
        self._compare([*hard_texts(), *(f"a{token} b {token}\n{token}c" for token in special_tokens)])

    def encode_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """All ids one after another, and how many there are of each text.

        Raises:
            TokenizerError: the sample was encoded otherwise by the other library.
        """
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        texts = texts if isinstance(texts, list) else list(texts)
        self._forget(sum(map(len, texts)))
        self._compare([texts[len(texts) // 2][:_SAMPLE]])
        return self._encode(texts)

    def _forget(self, text: int) -> None:
        """Start over with no words where the process has grown, before so much more text."""
        if self._text >= _LEAST_TEXT and _resident() - self._before > _GROWTH:
            self._text, self._tokenizer = 0, None
            _return_memory()
            self._tokenizer = self._make()
        self._text += text

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        layout = self._tokenizer.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)

    def _compare(self, texts: list[str]) -> None:
        ids, lengths = self._encode(texts)
        wanted = self._exact(texts)
        if ids.tolist() == [i for one in wanted for i in one] and lengths.tolist() == [len(one) for one in wanted]:
            return
        ends = np.cumsum(lengths)
        pairs = zip(texts, np.split(ids, ends[:-1]), wanted, strict=True)
        text = next(text for text, mine, theirs in pairs if mine.tolist() != theirs)
        fix = "go without it: tokenizer.use_gigatoken=false; and please report the text"
        raise TokenizerError(f"gigatoken gives other ids for a text: {text[:80]!r}", "tokenizer.use_gigatoken", fix)


def has_new(text: str) -> bool:
    """Whether a text has a character that gigatoken takes for a letter or a digit, and the exact libraries do not."""
    size = sys.getsizeof(text)  # CPython's strings have four bytes for each character where one is beyond U+FFFF, two beyond U+00FF
    if size < 2 * len(text):
        return False
    if size > 4 * len(text):
        return _NEW_ANYWHERE.search(text) is not None
    return any(one in text for one in _NEW)


class GigatokenBatches(Tokenizer):
    """A tokenizer whose batches gigatoken encodes where it gives the ids of `encode_batch`.

    Attributes:
        library: what encodes otherwise.
        settings: with `use_gigatoken`: True, False, or None for where it gives the same ids.
    """

    library: str

    @abstractmethod
    def _make_gigatoken(self, factory: Any) -> Any:
        """The same tokenizer by `gigatoken.Tokenizer` (the factory); TokenizerError for what it must not be tried on."""

    def encode_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if not self._fast:
            return super().encode_arrays(texts)
        odd = {number: self._around_new(text) for number, text in enumerate(texts) if not text.isascii() and has_new(text)}
        return encode_all_but(self._fast.encode_arrays, texts, odd)

    def _around_new(self, text: str) -> np.ndarray:
        """The ids of a text that has a character of `has_new`: by the exact library where it is near."""
        return np.concatenate([self._ids_of_piece(piece)[left_out:] for piece, left_out in self._cut_around_new(text)])

    def _ids_of_piece(self, piece: str) -> np.ndarray:
        return np.array(self.encode(piece), np.uint32) if has_new(piece) else self._fast.encode_arrays([piece])[0]

    def _cut_around_new(self, text: str) -> list[tuple[str, int]]:
        """The text in pieces, and how many ids to leave out at the start of each: those with such characters are small."""
        pieces, at, left_out = [], 0, 0
        while found := _NEW_ANYWHERE.search(text, at):
            before = found.start()  # all that has none; then until a cut is found behind it
            for end in (before, *range(found.end() + _NEAR, len(text), _NEAR)):
                if cut := self._cut(text[at:end]):
                    pieces.append((text[at : at + cut[0]], left_out))
                    at, left_out = at + cut[0] + cut[1], cut[2]
                    if end > before:
                        break
            else:
                break
        return [*pieces, (text[at:], left_out)]

    @cached_property
    def _fast(self) -> Gigatoken | None:
        wanted = self.settings["use_gigatoken"]
        if wanted is False:
            return None
        try:
            return Gigatoken(self._make_gigatoken, self.encode_batch, self.special_tokens)
        except TokenizerError:
            if wanted:
                raise
            return None

    @property
    def engine(self) -> str:
        return "gigatoken" if self._fast else self.library


def _resident() -> int:
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _return_memory() -> None:
    """Give freed memory back: glibc keeps what small pieces were in (50 to 100 MiB here)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # another C library has none
    if trim:
        trim(0)


def hard_texts() -> list[str]:
    """The same every time: what tokenizers stumble over, and letters, digits, signs and spaces of all scripts in random order."""
    choose = random.Random(0)
    return _HARD + ["".join(chr(choose.randrange(*choose.choice(_RANGES))) for _ in range(200)) for _ in range(10)]
