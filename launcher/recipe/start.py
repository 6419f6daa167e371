"""What a training takes from the folder that it starts from: the model, where the recipe gives none, and the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from checkpoints.beside import beside
from checkpoints.folder import CheckpointError, has_checkpoints, newest_checkpoint
from checkpoints.models.model import FREE, Model
from checkpoints.recognise import checkpoint_in, recognise
from launcher.errors import UserError
from launcher.recipe import schema
from launcher.recipe.frozen import own_recipe
from launcher.recipe.schema import Recipe

SIZES = ("model.num_layers", "model.hidden_size", "model.num_attention_heads")  # a recipe that gives one gives the whole model
# Of a tokenizer these say how it is used, and not which it is.
_USES = ("tokenizer.chat_template", "tokenizer.use_gigatoken", "tokenizer.vocab_size")


@dataclass(frozen=True)
class Start:
    """What a folder says of the model in it.

    Attributes:
        model: key of the group `model` → value.
        tokenizer: its settings, chat template and number of ids included.
        where: the file that says it.
        ours: it is a checkpoint with a recipe.
        ids: of another tool's, rows of its vocabulary's tables that are no padding.
        companions: of another tool's, the files beside the weights.
    """

    model: dict[str, Any]
    tokenizer: schema.Tokenizer
    where: str
    ours: bool
    ids: int = 0
    companions: tuple[Path, ...] = ()


def start_of(checkpoint: Path, resumes: bool, hf_config: Path | None, ids_will_do: bool) -> Start | None:
    """What a checkpoint's folder says, or `hf_config` where it has no config.json; None where the weights' files alone may say
    it. A run that `resumes` names its tokenizer as before, or its copies where that is gone, another one those in the checkpoint.
    Where no tokenizer lies beside weights, one that takes ids for text, if `ids_will_do`.

    Raises:
        CheckpointError, UserError: what it says cannot be read.
    """
    from launcher.recipe.converted import tokenizer_for_text
    from launcher.recipe.tokenizer import with_copies

    if own := own_recipe(checkpoint):
        tokenizer = with_copies(own.tokenizer, checkpoint / "tokenizer")
        if resumes:  # the run's copies stay where they are; its older checkpoints may go
            tokenizer = with_copies(tokenizer, checkpoint.parents[1] / "tokenizer") if _gone(own.tokenizer) else own.tokenizer
        return Start(vars(own.model), tokenizer, str(checkpoint / "recipe.yaml"), True)
    found = recognise(checkpoint)
    said = beside(found, hf_config)
    if said.model is None:
        return None
    tokenizer = tokenizer_for_text(said.companions, said.model, found.path, ids_will_do)
    if tokenizer.type != "NullTokenizer":
        tokenizer.vocab_size = said.model.vocab_size
    return Start(model_keys(said.model), tokenizer, said.where, False, said.model.vocab_size, said.companions)


def _gone(tokenizer: schema.Tokenizer) -> bool:
    files = (tokenizer.tokenizer_model, tokenizer.vocab_file, tokenizer.merge_file)
    return any(path and not Path(path).exists() for path in files)


def model_keys(model: Model) -> dict[str, Any]:
    """A model as keys of a recipe's group `model`."""
    return {one.name: getattr(model, one.name) for one in fields(model) if hasattr(schema.Model, one.name)}


def take(recipe: Recipe, sources: dict[str, str], name: str) -> None:
    """Fill what nobody gave from the checkpoint that a training would go on from, the run's own or checkpoint.load, and note
    the file in `sources`. A folder that cannot be read says nothing here: `check` tells why.

    The sizes of a model are one thing: a recipe that gives some of them gives them all, and the folder must fit.
    """
    try:
        config = recipe.convert.hf_config
        start = start_of(*_checkpoint(recipe, name), Path(config) if config else None, recipe.data.train is None)
    except (CheckpointError, UserError, OSError):
        return
    if start is None:
        return

    def fill(group: str, values: dict[str, Any], free: tuple[str, ...] = ()) -> None:
        for leaf, value in values.items():
            key = f"{group}.{leaf}"
            if key not in free and sources[key] == "default" and value is not None:
                setattr(getattr(recipe, group), leaf, value)
                sources[key] = start.where

    given = {key for key, source in sources.items() if source != "default"}
    if given.intersection(SIZES):
        fill("model", {key: start.model[key] for key in FREE})
    else:
        fill("model", start.model, free=("model.quantize",))  # int8 weights are for answers alone, which `check` says
    if not any(key.startswith("tokenizer.") and key not in _USES for key in given):
        if recipe.data.train is None or start.tokenizer.type != "NullTokenizer":  # which takes no text, but ids
            fill("tokenizer", vars(start.tokenizer))
    elif recipe.tokenizer.type != "NullTokenizer" and not start.ours and _is_theirs(recipe, start):
        fill("tokenizer", {"vocab_size": start.ids})  # the tables may have more rows than the tokenizer has ids


def _is_theirs(recipe: Recipe, start: Start) -> bool:
    """Whether the recipe's tokenizer may be the one that the weights were made with."""
    from data_tools.errors import TokenizerError
    from launcher.recipe.converted import same_tokenizer

    try:
        return start.tokenizer.type == "NullTokenizer" or same_tokenizer(recipe.tokenizer, start.tokenizer, start.companions)
    except TokenizerError:
        return False  # told by `check`


def _checkpoint(recipe: Recipe, name: str) -> tuple[Path, bool]:
    """What the training would go on from, and whether that is a checkpoint of its own."""
    run = Path(recipe.run.dir or f"runs/{recipe.run.name or name}") / "checkpoints"
    resumes = has_checkpoints(run)
    return newest_checkpoint(run) if resumes else checkpoint_in(Path(recipe.checkpoint.load or "")), resumes
