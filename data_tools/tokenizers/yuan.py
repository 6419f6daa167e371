"""Yuan 2.0's tokenizer: a SentencePiece model, with rules on top that the model alone does not know."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from data_tools.errors import TokenizerError
from data_tools.tokenizers.base import joined
from data_tools.tokenizers.sentencepiece import SentencePieceTokenizer

END_OF_DOCUMENT = "<eod>"
_OF_THE_MODEL = ("<unk>", "<s>", END_OF_DOCUMENT, "<sep>", "<pad>")
_ADDED = (
    "<mask>", "<predict>", "<FIM_SUFFIX>", "<FIM_PREFIX>", "<FIM_MIDDLE>", "<commit_before>", "<commit_msg>", "<commit_after>",
    "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>",
)  # fmt: skip


class YuanTokenizer(SentencePieceTokenizer):
    """Yuan 2.0's tokenizer, id for id what its code makes with `transformers`' slow LlamaTokenizer.

    Special tokens are split off first: the model holds them as ordinary pieces, and would never find them by itself.
    Every text between two of them is encoded as a text of its own, with a dummy prefix (a piece for the space before it).
    Those that the model does not hold come after its last id, in the order in which Yuan's code adds them: with Yuan's
    own model <mask> 134953, <predict>, <FIM_SUFFIX>, <FIM_PREFIX>, <FIM_MIDDLE> 134957. A document ends with <eod>;
    nothing begins one. `<n>` and `</s>` are text.

    Args:
        tokenizer_model: the .model file.

    Raises:
        TokenizerError: not a SentencePiece model, or not one of Yuan's.
    """

    type = "YuanTokenizer"

    def __init__(self, tokenizer_model: Path):
        super().__init__(tokenizer_model)
        pieces = {self._processor.id_to_piece(i): i for i in range(self.vocab_size)}
        missing = [token for token in _OF_THE_MODEL if token not in pieces]
        if missing:
            fix = "give the tokenizer.model of the released Yuan 2.0; other models: tokenizer.type=SentencePieceTokenizer"
            raise TokenizerError(f"not Yuan's model: it has no piece {' or '.join(missing)}", str(tokenizer_model), fix)
        added = [token for token in _ADDED if token not in pieces]
        self._split_off = {token: pieces[token] for token in (*_OF_THE_MODEL, *_ADDED) if token in pieces}
        self._split_off |= {token: self.vocab_size + i for i, token in enumerate(added)}
        self.vocab_size += len(added)
        self.eod = self._split_off[END_OF_DOCUMENT]
        self.bos = None
        self.special_tokens |= self._split_off
        self._names = {i: token for token, i in self.special_tokens.items()}
        self._pattern = re.compile("(" + "|".join(map(re.escape, self._split_off)) + ")")

    def encode(self, text: str) -> list[int]:
        return self.encode_arrays([text])[0].tolist()

    def encode_plain(self, text: str, begins: bool = True) -> list[int]:
        return super().encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids, lengths = self.encode_arrays(texts)
        return [one.tolist() for one in np.split(ids, np.cumsum(lengths)[:-1])] if len(texts) else []

    def encode_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        parts = [self._pattern.split(text) for text in texts]  # text, token, text, ..., token, text
        between, lengths = super().encode_arrays([text for part in parts for text in part[::2]])
        if len(lengths) == len(texts):
            return between, lengths
        tokens = np.array([self._split_off[token] for part in parts for token in part[1::2]], dtype=between.dtype)
        segments = np.fromiter((len(part) // 2 + 1 for part in parts), dtype=np.int64, count=len(parts))
        last = np.cumsum(segments) - 1  # of a text's segments: no token follows it
        followed = np.ones(len(lengths), dtype=bool)
        followed[last] = False
        ids = np.insert(between, np.cumsum(lengths)[followed], tokens)
        return ids, np.add.reduceat(lengths + followed, last - segments + 1)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens as they are written, without the spaces of the dummy prefixes."""
        texts = []
        for is_special, run in groupby((int(i) for i in ids), self._names.__contains__):
            texts += map(self._names.__getitem__, run) if is_special else [super().decode(list(run))]
        return "".join(texts)
