"""Tokenizers by Megatron-LM's names: `build_tokenizer(type, ...)`."""

from __future__ import annotations

from pathlib import Path

from data_tools.errors import TokenizerError
from data_tools.tokenizers.base import Tokenizer
from data_tools.tokenizers.gpt2_bpe import GPT2BPETokenizer
from data_tools.tokenizers.null import NullTokenizer
from data_tools.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece

# What each type is built from; the other arguments are not its own.
TOKENIZER_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "GPT2BPETokenizer": ("vocab_file", "merge_file", "plain_special_tokens", "use_gigatoken"),
    "SentencePieceTokenizer": ("tokenizer_model",),
    "NullTokenizer": ("vocab_size",),
}
_GPT2_FIX = (
    "take vocab.json and merges.txt of OpenAI's GPT-2, as published with the model openai-community/gpt2, and save them there; "
    "or train a tokenizer of your own: yuan tokenizer train --help"
)
_SENTENCEPIECE_FIX = "give the path of a SentencePiece .model, or make one: yuan tokenizer train --help"


def build_tokenizer(
    type: str,
    *,
    vocab_file: str | Path | None = None,
    merge_file: str | Path | None = None,
    tokenizer_model: str | Path | None = None,
    vocab_size: int | None = None,
    plain_special_tokens: bool = False,
    use_gigatoken: bool | None = None,
) -> Tokenizer:
    """The tokenizer of this type; arguments that belong to other types are left alone (see TOKENIZER_ARGUMENTS).

    Raises:
        TokenizerError: an unknown type, an argument not given, a file missing or broken; its `fix` says what to do.
    """
    if type == "GPT2BPETokenizer":
        files = _file("vocab_file", vocab_file, _GPT2_FIX), _file("merge_file", merge_file, _GPT2_FIX)
        return GPT2BPETokenizer(*files, plain_special_tokens=plain_special_tokens, use_gigatoken=use_gigatoken)
    if type == "SentencePieceTokenizer":
        return SentencePieceTokenizer(_file("tokenizer_model", tokenizer_model, _SENTENCEPIECE_FIX))
    if type == "NullTokenizer":
        if not isinstance(vocab_size, int) or vocab_size < 1:
            fix = "give tokenizer.vocab_size, the number of ids in the data (--vocab-size)"
            raise TokenizerError(f"NullTokenizer needs a vocab_size of at least 1, not {vocab_size}", "tokenizer.vocab_size", fix)
        return NullTokenizer(vocab_size)
    raise TokenizerError(f"unknown tokenizer type {type!r}", "tokenizer.type", "one of " + ", ".join(TOKENIZER_ARGUMENTS))


def _file(key: str, path: str | Path | None, fix: str) -> Path:
    if path is None:
        raise TokenizerError(f"tokenizer.{key} is not given", f"tokenizer.{key}", fix)
    if not Path(path).is_file():
        raise TokenizerError(f"no such file: {path}", f"tokenizer.{key}", fix)
    return Path(path)


__all__ = ["TOKENIZER_ARGUMENTS", "Tokenizer", "TokenizerError", "build_tokenizer", "train_sentencepiece"]
