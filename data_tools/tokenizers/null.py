"""Megatron's NullTokenizer: the text is token ids already, written in decimal with spaces between."""

from __future__ import annotations

from collections.abc import Sequence

from data_tools.errors import TokenizerError
from data_tools.tokenizers.base import Tokenizer


class NullTokenizer(Tokenizer):
    """Ids 0 to vocab_size - 1 are the data's; the end of document is one more, and `vocab_size` counts it in.

    Args:
        vocab_size: number of ids in the data (Megatron-LM's --vocab-size).

    Raises:
        TokenizerError: vocab_size is not given, or below 1.
    """

    type = "NullTokenizer"

    def __init__(self, vocab_size: int | None = None):
        if not isinstance(vocab_size, int) or vocab_size < 1:
            fix = "give tokenizer.vocab_size, the number of ids in the data (--vocab-size)"
            raise TokenizerError(f"NullTokenizer needs a vocab_size of at least 1, not {vocab_size}", "tokenizer.vocab_size", fix)
        self.eod = vocab_size
        self.vocab_size = vocab_size + 1
        self.special_tokens = {str(self.eod): self.eod}
        self.files = {}
        self.options = {"vocab_size": vocab_size}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; ValueError for what is not an id of the vocabulary."""
        return [self._id(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(i) for i in ids)

    def _id(self, word: str) -> int:
        if not (word.isascii() and word.isdigit()):
            raise ValueError(f"NullTokenizer reads ids in decimal with spaces between, not {word[:40]!r}")
        if int(word) > self.eod:
            raise ValueError(f"id {int(word)} is outside the vocabulary: ids go to {self.eod - 1}, and {self.eod} ends a document")
        return int(word)
