"""Checks of the checkpoint that a training starts from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoints.folder import CheckpointError, has_checkpoints, holds_weights_alone, newest_checkpoint
from launcher.recipe.frozen import read_frozen
from launcher.recipe.problem import Case, Problem
from launcher.recipe.schema import Recipe
from launcher.recipe.tokenizer import tokenizer_of, with_copies
from launcher.run.changes import changed_keys, changed_model, refusals


def load(case: Case) -> Iterator[Problem]:
    """checkpoint.load names a checkpoint that fits this model; a run that has its own goes on from that one, and does
    not ask."""
    path, run = case.recipe.checkpoint.load, case.recipe.run.dir
    if path is None or (run and has_checkpoints(Path(run) / "checkpoints")):
        return
    try:
        checkpoint = newest_checkpoint(Path(path))
    except CheckpointError as error:
        yield Problem(str(error), case.at("checkpoint.load"), "checkpoint.load=RUN_OR_CHECKPOINT, or null for fresh weights")
        return
    if not (checkpoint / "recipe.yaml").is_file():
        return  # another tool's: what it holds only the engine can tell
    try:
        saved = read_frozen(checkpoint / "recipe.yaml")
    except Exception as error:  # OmegaConf and PyYAML raise a dozen kinds
        what = f"the checkpoint's recipe cannot be read: {str(error).splitlines()[0]}"
        yield Problem(what, f"{checkpoint}/recipe.yaml", "another version of yuan may have written it; take another checkpoint")
        return
    yield from _fits(case, saved, checkpoint)
    yield from _tokenizer(case, saved, checkpoint)


def _fits(case: Case, saved: Recipe, checkpoint: Path) -> Iterator[Problem]:
    options = case.recipe.checkpoint
    changes = changed_keys(saved, case.recipe)
    weights = options.finetune or options.no_load_optim or holds_weights_alone(checkpoint)
    for key, why in refusals(saved, case.recipe, not weights).items():
        before = _word(changes[key][0])
        fix = f"{key}={before}"
        if key in ("training.precision", "parallel.use_distributed_optimizer"):
            fix += ", or checkpoint.no_load_optim=true for its weights alone"
        yield Problem(f"{checkpoint} has {key}={before}: {why}", case.at("checkpoint.load", key), fix)
    if others := changed_model(saved, case.recipe):
        listed = "".join(f"\n    {change}" for change in others)
        what = f"{checkpoint} loads, but was trained with another model:{listed}"
        fix = ", ".join(f"{change.key}={_word(change.before)}" for change in others)
        yield Problem(what, case.at("checkpoint.load"), f"{fix}; or leave it if the change is meant", "warning")


def _word(value: Any) -> str:
    """A value as it is typed."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _tokenizer(case: Case, saved: Recipe, checkpoint: Path) -> Iterator[Problem]:
    """The ids of the text must be those that the weights were trained on; fine-tuning may bring more."""
    from data_tools.errors import TokenizerError

    try:
        theirs, mine = tokenizer_of(with_copies(saved.tokenizer, checkpoint / "tokenizer")), tokenizer_of(case.recipe.tokenizer)
    except TokenizerError:
        return  # ours is reported by `tokenizer`; theirs is not needed
    if theirs.hash() != mine.hash():
        finetune = case.recipe.checkpoint.finetune
        yield Problem(
            f"{checkpoint} was trained with another tokenizer: a {theirs.type} of {theirs.vocab_size} ids, and this is a "
            f"{mine.type} of {mine.vocab_size}" + (", from other files" if theirs.vocab_size == mine.vocab_size else ""),
            case.at("checkpoint.load", "tokenizer.type"),
            f"the tokenizer in {checkpoint}/tokenizer" + ("" if finetune else ", or checkpoint.finetune=true for a new vocabulary"),
            "warning" if finetune else "error",
        )
