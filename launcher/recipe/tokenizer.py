"""The tokenizer that a recipe describes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
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


def with_copies(settings: schema.Tokenizer, folder: Path) -> schema.Tokenizer:
    """The same settings, their files being the copies in `folder` where it has them: a checkpoint's `tokenizer/`."""
    keys = ("tokenizer_model", "vocab_file", "merge_file")
    copies = {key: folder / Path(getattr(settings, key) or "").name for key in keys if getattr(settings, key)}
    return replace(settings, **{key: str(copy) for key, copy in copies.items() if copy.is_file()})
