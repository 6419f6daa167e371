"""megatron-core's sample index of a recipe's data: which samples it holds, where it is kept, whether it is there.

Without torch, so that `yuan check` can tell; `launcher.engine.data` builds it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from launcher.recipe import check_data, check_layout, check_model, check_schedule
from launcher.recipe.problem import Case, Problem
from launcher.recipe.schema import Recipe
from launcher.recipe.tokenizer import tokenizer_of
from launcher.whole import write_whole

# What must be right for an index; the model, the memory and the machines have no part in it. (Where a share of the data
# is empty, megatron-core counts its epochs for ever.)
_CHECKS = (check_model.ranges, check_layout.batch, check_schedule.units, check_schedule.length, check_data.tokenizer, check_data.data)


def problems(recipe: Recipe, sources: dict[str, str]) -> list[Problem]:
    """What stands in the way of an index, as errors, and what is odd, as warnings."""
    case = Case(recipe, sources)
    return [problem for one in _CHECKS for problem in one(case)]


def sample_counts(recipe: Recipe) -> list[int]:
    """Samples of the train, validation and test sets that the whole run may consume, as Megatron-LM counts them."""
    training, derived = recipe.training, recipe.derived
    evaluation = training.eval_iters * training.global_batch_size
    train = training.train_samples or derived.train_samples
    return [train, (derived.train_iters // training.eval_interval + 1) * evaluation, evaluation]


def prefixes(recipe: Recipe) -> list[str]:
    """The data sets that the recipe reads, those of them that are there."""
    from data_tools.indexed import idx_path

    data = recipe.data
    sources = [data.data_path, data.train_data_path, data.valid_data_path, data.test_data_path]
    return [word for source in sources for word in words(source) or [] if idx_path(word).is_file()]


def words(path: Any) -> list[str] | None:
    """A prefix or a blend as Megatron-LM's list of words: ['0.7', 'a', '0.3', 'b'] or ['a']."""
    if path is None:
        return None
    return [str(word) for word in path] if isinstance(path, (list, tuple)) else [str(path)]


def cache_folder(recipe: Recipe) -> Path:
    """Where megatron-core keeps its sample indices: a folder per lengths of the data's sequences, all that they are made of.

    Its own key is made of names and settings; data written anew under the same name would be read by the old indices.
    """
    from data_tools.indexed import HEADER, idx_path

    digest = hashlib.sha256()
    found = prefixes(recipe)
    for prefix in found:
        with open(idx_path(prefix), "rb") as file:
            header = file.read(HEADER.size)
            digest.update(header)
            left = 4 * HEADER.unpack(header)[3]
            while block := file.read(min(left, 1 << 24)):
                digest.update(block)
                left -= len(block)
    data = recipe.data
    base = Path(data.data_cache_path) if data.data_cache_path else Path(found[0]).parent / "cache"
    return base / digest.hexdigest()[:16]


def note_path(recipe: Recipe) -> Path:
    """The file that says that the index of this recipe is whole: name and size of each of its files."""
    t, d = recipe.training, recipe.data
    sources = [words(source) for source in (d.data_path, d.train_data_path, d.valid_data_path, d.test_data_path)]
    settings = [sources, d.split, sample_counts(recipe), t.seq_length, t.seed, tokenizer_of(recipe.tokenizer).hash()]
    return cache_folder(recipe) / f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]}.json"


def is_whole(note: Path) -> bool:
    """Whether the index of this note is there: a build that was killed, or files removed since, are told by it."""
    try:
        files = json.loads(note.read_text(encoding="utf-8"))
        return all((note.parent / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError):
        return False


def write_note(note: Path, files: list[Path]) -> None:
    """Say that these files, which lie beside the note, are the whole index."""
    write_whole(note, json.dumps({path.name: path.stat().st_size for path in sorted(files)}, indent=1) + "\n")


def described(recipe: Recipe) -> str | None:
    """A line for those who wait: is the index of this recipe, in which nothing is wrong, there? None where it reads no data set."""
    if not prefixes(recipe):
        return None
    note = note_path(recipe)
    if is_whole(note):
        return f"{note.parent} (built)"
    return f"{note.parent} (not there yet: built while the processes wait, or before by `yuan data index`)"
