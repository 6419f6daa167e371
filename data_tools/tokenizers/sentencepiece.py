"""SentencePiece models, read by the `sentencepiece` C++ library and nothing else.

Rank-based re-implementations split a share of words differently: SentencePiece breaks ties of scores left-most.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from data_tools.errors import TokenizerError
from data_tools.tokenizers.base import Tokenizer, joined, settings_beside


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. The end of document is its end-of-sentence piece, as in megatron-core.

    Args:
        tokenizer_model: the .model file.

    Raises:
        TokenizerError: not a SentencePiece model, or one without an end-of-sentence piece.
    """

    type = "SentencePieceTokenizer"

    def __init__(self, tokenizer_model: Path):
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
        except (RuntimeError, OSError) as error:
            fix = "see that the file is whole; `yuan tokenizer train` makes one"
            raise TokenizerError("not a SentencePiece model", str(tokenizer_model), fix) from error
        if self._processor.eos_id() < 0:
            fix = "train it with an eos_id (`yuan tokenizer train` does)"
            raise TokenizerError("the model has no end-of-sentence piece to end documents with", str(tokenizer_model), fix)
        self.eod = self._processor.eos_id()
        self.vocab_size = self._processor.get_piece_size()
        controls = (i for i in range(self.vocab_size) if self._processor.is_control(i))
        self.special_tokens = {self._processor.id_to_piece(i): i for i in controls}
        self.bos = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self.files = {"tokenizer_model": tokenizer_model}
        self.companions = settings_beside(tokenizer_model)
        self.options = {}

    @property
    def dummy_prefix(self) -> bool:
        """Whether every text gets a space before it."""
        return self._processor.normalize("a") == "▁a"

    @property
    def is_like_llamas(self) -> bool:
        """Whether it merges pairs, of texts as they are, and falls back to bytes: what LlamaTokenizer of `transformers` takes
        every model for."""
        probe = " a  b\nﬁ "
        as_it_is = self._processor.normalize(probe) == "▁" * self.dummy_prefix + probe.replace(" ", "▁")
        return as_it_is and self.is_local and self._processor.is_byte(self._processor.piece_to_id("<0x0A>"))

    @cached_property
    def is_local(self) -> bool:  # type: ignore[override]
        """Whether it merges pairs; a unigram model weighs ways through the whole text."""
        try:
            self._processor.nbest_encode("a", nbest_size=1)
        except RuntimeError:  # a unigram model alone can
            return True
        return False

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=1)

    def encode_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        # Arrays straight from the library: as fast as its own lists, which would have to be turned into arrays yet.
        return joined(self._processor.encode(list(texts), out_type="numpy", num_threads=1))

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    @property
    def engine(self) -> str:
        return "sentencepiece"
