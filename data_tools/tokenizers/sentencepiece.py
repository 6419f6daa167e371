"""SentencePiece models, read and trained by the `sentencepiece` C++ library and nothing else.

Rank-based re-implementations split a share of words differently: SentencePiece breaks ties of scores left-most.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.errors import TokenizerError
from data_tools.tokenizers.base import Tokenizer

# The trainer skips a sentence with one of its reserved characters (tab, U+2585) and stops a piece at a newline anyway.
_CUT = re.compile("[\n\t\u2585]")
_LONGEST = 4096  # characters of one training sentence; longer lines (Chinese has no spaces) only slow the training
_TRAINER: dict[str, Any] = dict(
    byte_fallback=True,  # a character outside the vocabulary becomes its UTF-8 bytes, not <unk>
    normalization_rule_name="identity",  # with the next two: decode(encode(text)) == text
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,  # indentation in few tokens
    user_defined_symbols=["\n", "\t"],
    split_digits=True,
    max_sentence_length=8 * _LONGEST,  # in bytes; the default of 4192 drops longer sentences silently
    num_threads=2,  # written into the model, and it orders unigram's sums: a constant keeps the file reproducible
    minloglevel=2,
)


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
        self.special_ids = {i for i in range(self.vocab_size) if self._processor.is_control(i)}
        self.files = {"tokenizer_model": tokenizer_model}
        self.options = {}

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])


def train_sentencepiece(texts: Iterable[str], vocab_size: int, model_type: str = "bpe") -> bytes:
    """Train a model on `texts` and return the content of its .model file: the same texts, the same bytes.

    What it encodes it decodes to the same text: newlines, runs of spaces, any script. One character cannot be kept,
    U+2581, which SentencePiece itself uses to stand for a space: it comes back as a space.

    Args:
        texts: the training text, document by document; read once.
        vocab_size: pieces, of which 3 are control pieces and 256 bytes.
        model_type: bpe or unigram.

    Raises:
        TokenizerError: the texts hold too few distinct pieces for vocab_size, or vocab_size too few for the texts.
    """
    import sentencepiece

    model = io.BytesIO()
    sentences = _Sentences(texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, vocab_size=vocab_size, model_type=model_type, **_TRAINER
        )
    except RuntimeError as error:
        if sentences.failure:
            raise sentences.failure from None
        # The library's text is "INTERNAL: file.cc(line) [condition] message".
        raise TokenizerError(f"cannot train: {str(error).rpartition('] ')[2]}", fix="another --vocab-size, or more text") from error
    return model.getvalue()


class _Sentences:
    """Texts cut to what the trainer takes. The library turns a fault of its iterator into text; `failure` keeps it."""

    def __init__(self, texts: Iterable[str]):
        self._texts = texts
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                for line in _CUT.split(text):
                    for start in range(0, len(line), _LONGEST):
                        yield line[start : start + _LONGEST]
        except (Exception, KeyboardInterrupt) as failure:
            self.failure = failure
            raise
