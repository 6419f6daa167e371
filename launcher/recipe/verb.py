"""What a recipe is for."""

from __future__ import annotations

from launcher.recipe.check_schedule import LENGTHS
from launcher.recipe.load import Loaded

_TRAINS = ("optimizer.lr", "training.micro_batch_size", "training.epochs", *LENGTHS)
_SAYS = {"convert": "convert.", "serve": "serve.", "generate": "generate.", "preprocess": "preprocess."}


def verb_of(loaded: Loaded) -> str:
    """The verb that a recipe is for, from the keys that someone gave.

    A learning rate, a batch or a length means training: `sft` with questions and answers (data.train), else `pretrain`.
    Otherwise it is the verb whose group of keys the recipe has, the last in the story first: a recipe for a server says how to sample too.
    """
    given = [key for key, source in loaded.sources.items() if source not in ("default", "derived")]
    if not any(key in given for key in _TRAINS):
        for verb, group in _SAYS.items():
            if any(key.startswith(group) for key in given):
                return verb
    return "sft" if "data.train" in given else "pretrain"
