"""What a fine-tuning reads: the files of rows, how they are written, and how many samples they give. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.console import plural
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


def prefixes(recipe: Recipe) -> dict[Path, Path]:
    """Each file of data.train and data.valid, and where its prepared rows are kept."""
    from data_tools.sft import prepared_prefix

    tokenizer, data = tokenizer_of(recipe.tokenizer), recipe.data
    asked = dict.fromkeys([*files(data.train), *files(data.valid)])
    return {path: prepared_prefix(path, tokenizer, form(recipe), data.data_cache_path) for path in asked}


def missing(recipe: Recipe) -> dict[Path, Path]:
    """Those of `prefixes` whose rows are not prepared yet."""
    from data_tools.sft import is_prepared

    return {path: prefix for path, prefix in prefixes(recipe).items() if not is_prepared(prefix)}


def packed(recipe: Recipe, prefixes: Sequence[str] | None) -> Packed | None:
    """The samples of derived.train_rows or derived.valid_rows; None where there are none.

    Raises:
        IndexedError: they are not whole.
    """
    from data_tools.packing import Packed
    from data_tools.sft import Rows

    return Packed(Rows(*prefixes), recipe.training.seq_length, recipe.data.packing) if prefixes else None


def settle_rows(recipe: Recipe, sources: dict[str, str]) -> dict[str, Packed]:
    """Note in `derived` which prepared rows are read; the samples of `train` and, where it is given, `valid`.

    The processes then read what was prepared, whatever becomes of the files; a resume with other rows is noticed.
    """
    derived, data, kept = recipe.derived, recipe.data, prefixes(recipe)
    derived.train_rows = [str(kept[path]) for path in files(data.train)]
    derived.valid_rows = [str(kept[path]) for path in files(data.valid)] or None
    found = {name: packed(recipe, rows) for name, rows in (("train", derived.train_rows), ("valid", derived.valid_rows))}
    samples = {name: one for name, one in found.items() if one is not None}
    derived.rows_sha256 = samples["train"].rows.sha256
    sources |= dict.fromkeys(("derived.train_rows", "derived.valid_rows", "derived.rows_sha256"), "derived")
    return samples


def steps_of_epoch(recipe: Recipe, samples: int) -> int:
    """Steps that see each of so many samples once; the last one's batch is filled up."""
    return -(-samples // recipe.training.global_batch_size)


def epoch(recipe: Recipe, samples: int) -> str:
    """A line for the user: the steps of an epoch, and how full the last one is."""
    steps, batch = steps_of_epoch(recipe, samples), recipe.training.global_batch_size
    last = samples - (steps - 1) * batch
    filled = f", the last with {plural(last, 'sample')} and {batch - last} without loss that fill it up" if last < batch else ""
    return f"epoch      {plural(steps, 'step')} of {plural(batch, 'sample')}{filled}"


def settle_length(recipe: Recipe, sources: dict[str, str], samples: int) -> None:
    """Turn training.epochs into steps, now that the number of `samples` is known."""
    training = recipe.training
    recipe.derived.train_iters = training.epochs * steps_of_epoch(recipe, samples)
    training.train_samples = recipe.derived.train_samples = recipe.derived.train_iters * training.global_batch_size
    sources |= dict.fromkeys(("training.train_samples", "derived.train_samples", "derived.train_iters"), "derived")
