"""Tokenizers of one's own, trained on texts: SentencePiece, and byte-level BPE as GPT-2's."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from data_tools.errors import TokenizerError
from data_tools.tokenizers.gpt2_bpe import END_OF_TEXT

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
        why = str(error).rpartition("] ")[2] or "there is no text"
        raise TokenizerError(f"cannot train: {why}", fix="another --vocab-size, or more text") from error
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


_WORDS = re.compile(rf".{{1,{_LONGEST}}}(?!\S)|.{{1,{_LONGEST}}}", re.DOTALL)  # cut where white space is, if there is any


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> dict[str, bytes]:
    """Train a vocabulary like GPT-2's on `texts` and return the files of its folder by name: the same texts, the same files.

    vocab.json and merges.txt are for GPT2BPETokenizer; with the others the folder is one of Hugging Face's. What it
    encodes it decodes to the same text.

    Args:
        texts: the training text, document by document; read once. Memory grows with the number of different words.
        vocab_size: 256 bytes, the merges, and <|endoftext|> with the last id.

    Raises:
        TokenizerError: the texts hold too few different words for vocab_size.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    # A word of many MB would be joined anew with every merge.
    tokenizer.train_from_iterator((piece for text in texts for piece in _WORDS.findall(text)), trainer)
    if tokenizer.get_vocab_size() < vocab_size - 1:
        fix = f"--vocab-size {tokenizer.get_vocab_size() + 1}, or more text"
        raise TokenizerError(f"the texts make {tokenizer.get_vocab_size() + 1} tokens, and not {vocab_size}", "--vocab-size", fix)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    vocab = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "clean_up_tokenization_spaces": False}
    files = {
        "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges),
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
    return {name: text.encode() for name, text in files.items()}
