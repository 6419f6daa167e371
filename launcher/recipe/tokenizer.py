"""The tokenizer that a recipe describes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.recipe import schema

if TYPE_CHECKING:
    from data_tools.tokenizers import Tokenizer


def tokenizer_of(settings: schema.Tokenizer) -> Tokenizer:
    """Build it from a recipe's group `tokenizer`.

    Raises:
        data_tools.errors.TokenizerError: a value is not given, a file is missing or broken; `where` is the key.
    """
    from data_tools.tokenizers import build_tokenizer

    return build_tokenizer(**vars(settings))
