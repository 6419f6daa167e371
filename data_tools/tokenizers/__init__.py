"""Tokenizers by Megatron-LM's names: `build_tokenizer(type, ...)`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.errors import TokenizerError

if TYPE_CHECKING:
    from data_tools.tokenizers.base import Tokenizer
    from data_tools.tokenizers.train import train_byte_level_bpe, train_sentencepiece

# Imported when they are built, after their files were seen to be there: numpy alone costs a check 0.14 s.
_MODULES = {
    "GPT2BPETokenizer": "gpt2_bpe",
    "HuggingFaceTokenizer": "huggingface",
    "TikTokenizer": "tiktoken",
    "SentencePieceTokenizer": "sentencepiece",
    "YuanTokenizer": "yuan",
    "NullTokenizer": "null",
}
_OFFERED = {"Tokenizer": "base", "train_byte_level_bpe": "train", "train_sentencepiece": "train"}


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_OFFERED[name]}"), name)


# What each type is built from; the other arguments are not its own.
TOKENIZER_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "GPT2BPETokenizer": ("vocab_file", "merge_file", "plain_special_tokens", "use_gigatoken"),
    "HuggingFaceTokenizer": ("tokenizer_model", "eod_token", "tokenizer_hf_include_special_tokens", "use_gigatoken"),
    "TikTokenizer": (
        "tokenizer_model", "tiktoken_pattern", "tiktoken_special_tokens", "tiktoken_num_special_tokens", "vocab_size", "eod_token",
        "plain_special_tokens", "use_gigatoken",
    ),
    "SentencePieceTokenizer": ("tokenizer_model",),
    "YuanTokenizer": ("tokenizer_model",),
    "NullTokenizer": ("vocab_size",),
}  # fmt: skip
# The name of tokenizer_model's file in a folder of a published model, for the types that may be given the folder.
MODEL_FILES = {
    "HuggingFaceTokenizer": "tokenizer.json",
    "SentencePieceTokenizer": "tokenizer.model",
    "YuanTokenizer": "tokenizer.model",
}
_FILES = ("vocab_file", "merge_file", "tokenizer_model")
_GPT2_FIX = (
    "take vocab.json and merges.txt of OpenAI's GPT-2, as published with the model openai-community/gpt2, and save them there; "
    "or train a tokenizer of your own: yuan tokenizer train --help"
)
_FIXES = {
    "GPT2BPETokenizer": _GPT2_FIX,
    "HuggingFaceTokenizer": "give the folder of a model, or its tokenizer.json",
    "TikTokenizer": "give a .tiktoken file, such as cl100k_base.tiktoken",
    "SentencePieceTokenizer": "give the path of a SentencePiece .model, or make one: yuan tokenizer train --help",
    "YuanTokenizer": "give the tokenizer.model of the released Yuan 2.0, or its folder",
}


def build_tokenizer(type: str, **arguments: Any) -> Tokenizer:
    """The tokenizer of this type; arguments that belong to other types are left alone (see TOKENIZER_ARGUMENTS).

    Raises:
        TokenizerError: an unknown type, an argument not given, a file missing or broken; its `fix` says what to do.
        TypeError: an argument that no type has.
    """
    if type not in _MODULES:
        raise TokenizerError(f"unknown tokenizer type {type!r}", "tokenizer.type", "one of " + ", ".join(_MODULES))
    unknown = set(arguments).difference(*TOKENIZER_ARGUMENTS.values())
    if unknown:
        raise TypeError(f"no tokenizer has {', '.join(sorted(unknown))}")
    own = TOKENIZER_ARGUMENTS[type]
    given = {key: value for key, value in arguments.items() if key in own and value is not None}
    given |= {key: _file(type, key, arguments.get(key)) for key in _FILES if key in own}
    return getattr(import_module(f"{__name__}.{_MODULES[type]}"), type)(**given)


def _file(type: str, key: str, path: str | Path | None) -> Path:
    if path is None:
        raise TokenizerError(f"tokenizer.{key} is not given", f"tokenizer.{key}", _FIXES[type])
    found = Path(path) / MODEL_FILES[type] if Path(path).is_dir() and type in MODEL_FILES else Path(path)
    if not found.is_file():
        raise TokenizerError(f"no such file: {found}", f"tokenizer.{key}", _FIXES[type])
    return found


__all__ = [
    "MODEL_FILES",
    "TOKENIZER_ARGUMENTS",
    "Tokenizer",
    "TokenizerError",
    "build_tokenizer",
    "train_byte_level_bpe",
    "train_sentencepiece",
]
