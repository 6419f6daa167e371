"""What a fine-tuning reads: the files of rows, how they are written, and how many samples they give. Without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.recipe.schema import Recipe
from launcher.recipe.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from data_tools.packing import Packed
    from data_tools.sft import Form


def files(given: Any) -> list[Path]:
    """The files of data.train or data.valid; none for None."""
    from data_tools.sources import find_sources

    return [] if given is None else [Path(source.path) for source in find_sources(given)]


def form(recipe: Recipe) -> Form:
    """How rows become tokens."""
    from data_tools.sft import Form

    return Form(recipe.tokenizer.chat_template or "", recipe.data.mask_history, recipe.preprocess.format)


def prefix(recipe: Recipe, path: Path) -> Path:
    """Where the prepared rows of a file are kept."""
    from data_tools.sft import prepared_prefix

    return prepared_prefix(path, tokenizer_of(recipe.tokenizer), form(recipe))


def missing(recipe: Recipe) -> list[Path]:
    """The files whose rows are not prepared yet, each once."""
    from data_tools.sft import is_prepared

    asked = dict.fromkeys([*files(recipe.data.train), *files(recipe.data.valid)])
    return [path for path in asked if not is_prepared(prefix(recipe, path))]


def packed(recipe: Recipe, given: Any) -> Packed | None:
    """The samples of data.train or data.valid, whose rows are prepared; None for None.

    Raises:
        IndexedError: they are not whole.
    """
    from data_tools.packing import Packed
    from data_tools.sft import Rows

    paths = files(given)
    rows = Rows(*(prefix(recipe, path) for path in paths)) if paths else None
    return rows and Packed(rows, recipe.training.seq_length, recipe.data.packing)


def settle_length(recipe: Recipe, sources: dict[str, str], samples: int) -> None:
    """Turn training.epochs into steps, now that the number of `samples` is known: the last batch of all is filled up."""
    training, batch = recipe.training, recipe.training.global_batch_size
    if training.epochs is not None:
        steps = -(-training.epochs * samples // batch)
        training.train_samples = recipe.derived.train_samples = steps * batch
        recipe.derived.train_iters = steps
        sources |= dict.fromkeys(("training.train_samples", "derived.train_samples", "derived.train_iters"), "derived")
