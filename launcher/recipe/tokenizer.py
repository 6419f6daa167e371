"""The tokenizer that a recipe describes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.recipe import schema

if TYPE_CHECKING:
    from data_tools.templates import Template
    from data_tools.tokenizers import Tokenizer


def tokenizer_of(settings: schema.Tokenizer) -> Tokenizer:
    """Build it from a recipe's group `tokenizer`.

    Raises:
        data_tools.errors.TokenizerError: a value is not given, a file is missing or broken; `where` is the key.
    """
    from data_tools.tokenizers import build_tokenizer

    return build_tokenizer(**{key: value for key, value in vars(settings).items() if key != "chat_template"})


def template_of(settings: schema.Tokenizer, tokenizer: Tokenizer) -> Template | None:
    """The chat template of a recipe's group `tokenizer`, written by the tokenizer that was built of it; None where it has none.

    Raises:
        data_tools.errors.TokenizerError: the tokenizer cannot write it.
    """
    from data_tools.templates import build_template

    return build_template(settings.chat_template, tokenizer) if settings.chat_template else None


def with_copies(settings: schema.Tokenizer, folder: Path) -> schema.Tokenizer:
    """The same settings, their files being the copies in `folder` where it has them: a checkpoint's `tokenizer/`."""
    from data_tools.tokenizers import MODEL_FILES

    copies = {}
    for key in ("tokenizer_model", "vocab_file", "merge_file"):
        given = Path(getattr(settings, key) or "").name
        names = [given, MODEL_FILES.get(settings.type, "")] if key == "tokenizer_model" else [given]  # it may have been a folder
        copies |= {key: str(folder / name) for name in reversed(names) if given and name and (folder / name).is_file()}
    return replace(settings, **copies)
