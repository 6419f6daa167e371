"""Checks of the checkpoint that a training starts from, and of the Hugging Face folder that it ends with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from checkpoints.beside import Beside, beside
from checkpoints.folder import CheckpointError, has_checkpoints, holds_weights_alone
from checkpoints.models import published
from checkpoints.models.model import FREE, Model
from checkpoints.recognise import Found, checkpoint_in, recognise
from launcher.errors import UserError
from launcher.recipe.converted import same_tokenizer, tokenizer_beside
from launcher.recipe.check_run import existing, gib, writable
from launcher.recipe.frozen import own_recipe
from launcher.recipe.problem import Case, Problem
from launcher.recipe.schema import Recipe, Tokenizer
from launcher.recipe.tokenizer import tokenizer_of, with_copies
from launcher.recipe.size import parameters
from launcher.run.changes import changed_keys, changed_model, refusals
from launcher.run.export import is_exported, trains_on


def load(case: Case) -> Iterator[Problem]:
    """checkpoint.load names a checkpoint that fits this model; a run that has its own goes on from that one, and does
    not ask."""
    path, run = case.recipe.checkpoint.load, case.recipe.run.dir
    if path is None or (run and has_checkpoints(Path(run) / "checkpoints")):
        return
    try:
        checkpoint = checkpoint_in(Path(path))
    except CheckpointError as error:
        yield Problem(str(error), case.at("checkpoint.load"), _another(case))
        return
    try:
        saved = own_recipe(checkpoint)
    except UserError as error:
        yield Problem(error.what, error.where, error.fix)
        return
    if saved is None:
        yield from _foreign(case, checkpoint)
        return
    yield from _fits(case, saved, checkpoint)
    yield from _other_tokenizer(case, with_copies(saved.tokenizer, checkpoint / "tokenizer"), (), checkpoint)


def _fits(case: Case, saved: Recipe, checkpoint: Path) -> Iterator[Problem]:
    options = case.recipe.checkpoint
    changes = changed_keys(saved, case.recipe)
    weights = options.finetune or options.no_load_optim or holds_weights_alone(checkpoint)
    for key, why in refusals(saved, case.recipe, not weights).items():
        before = _word(changes[key][0])
        fix = f"{key}={before}"
        if key in ("training.precision", "parallel.use_distributed_optimizer", "parallel.zero"):
            fix += ", or checkpoint.no_load_optim=true for its weights alone"
        yield Problem(f"{checkpoint} has {key}={before}: {why}", case.at("checkpoint.load", key), fix)
    if others := changed_model(saved, case.recipe):
        listed = "".join(f"\n    {change}" for change in others)
        what = f"{checkpoint} loads, but was trained with another model:{listed}"
        fix = ", ".join(f"{change.key}={_word(change.before)}" for change in others)
        yield Problem(what, case.at("checkpoint.load"), f"{fix}; or leave it if the change is meant", "warning")


def _another(case: Case) -> str:
    """What to load instead; fresh weights are none for a fine-tuning."""
    return "checkpoint.load=RUN_OR_CHECKPOINT" + ("" if case.recipe.data.train is not None else ", or null for fresh weights")


def _foreign(case: Case, checkpoint: Path) -> Iterator[Problem]:
    """Another tool's: what lies beside the weights is the recipe's model; what is in them the engine sees."""
    options, config = case.recipe.checkpoint, case.recipe.convert.hf_config
    try:
        found = recognise(checkpoint)
        said = beside(found, Path(config) if config else None)
    except CheckpointError as error:
        yield Problem(str(error), case.at("checkpoint.load"), error.fix or _another(case))
        return
    if found.format == "torch" and not (options.finetune or options.no_load_optim or holds_weights_alone(checkpoint)):
        yield from _ranks(case, found)
    if said.model is None:
        return
    yield from another_model(case, said, "checkpoint.load")
    if said.model.quantize:
        yield Problem(f"{found.path} has weights in {said.model.quantize}, which are for answers alone", case.at("checkpoint.load"), "the weights before")
    theirs, why = tokenizer_beside(said.companions, said.model, found.path)
    ids_alone = why or case.recipe.tokenizer.type == "NullTokenizer"
    other = [] if ids_alone else list(_other_tokenizer(case, theirs, said.companions, found.path))
    yield from other
    yield from _ids(case, said.model.vocab_size, said.where, bool(other))


def another_model(case: Case, said: Beside, key: str) -> Iterator[Problem]:
    """What lies beside another tool's weights, named by `key`, says the recipe's model."""
    theirs, mine = vars(said.model), vars(case.recipe.model)
    others = {key: theirs[key] for key in theirs if key in mine and key not in (*FREE, "quantize") and mine[key] != theirs[key]}
    longer = {key: others.pop(key) for key in ("max_position_embeddings",) if key in others and theirs["position_embedding_type"] == "rope"}
    for values, severity, more in ((others, "error", ""), (longer, "warning", ", or leave it if the change is meant")):
        if values:
            listed = "".join(f"\n    model.{key}: {_word(value)} there, {_word(mine[key])} here" for key, value in values.items())
            fix = " ".join(f"model.{key}={_word(value)}" for key, value in values.items()) + more
            yield Problem(f"{said.where} is of another model:{listed}", case.at(key), fix, severity, by_itself=True)  # type: ignore[arg-type]


def _ranks(case: Case, found: Found) -> Iterator[Problem]:
    """The optimizer's state lies in a file per rank, for the layout that wrote it."""
    parallel = case.recipe.parallel
    if (found.tensor, found.pipeline) != (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size):
        yield Problem(
            f"{found.path} is of TP {found.tensor} and PP {found.pipeline}, and its optimizer's state is for that layout alone",
            case.at("checkpoint.load", "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"),
            "checkpoint.finetune=true for its weights alone, at any layout; or that layout",
        )


def _ids(case: Case, rows: int, where: str, other: bool) -> Iterator[Problem]:
    """The tables have a row for each id of the text, and no id is lost on the way back."""
    ids, tokenizer = case.recipe.derived.vocab_size, case.recipe.tokenizer
    if ids is None or ids == rows:
        return
    if not other and (tokenizer.type == "NullTokenizer" or ids < rows or case.given("tokenizer.vocab_size")):
        fix = f"tokenizer.vocab_size={rows - 1 if tokenizer.type == 'NullTokenizer' else rows}"
    else:
        fix = "the tokenizer that the model was made with"
    yield Problem(f"{where} speaks of {rows} ids, and the tokenizer has {ids}", case.at("checkpoint.load", "tokenizer.vocab_size"), fix)


def _word(value: Any) -> str:
    """A value as it is typed."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _other_tokenizer(case: Case, settings: Tokenizer, beside: Sequence[Path], checkpoint: Path) -> Iterator[Problem]:
    """The ids of the text must be those that the weights were trained on; fine-tuning may bring more."""
    from data_tools.errors import TokenizerError

    try:
        same = same_tokenizer(case.recipe.tokenizer, settings, beside)
        theirs, mine = tokenizer_of(settings), tokenizer_of(case.recipe.tokenizer)
    except TokenizerError:
        return  # ours is reported by `tokenizer`; theirs is not needed
    if not same:
        finetune = case.recipe.checkpoint.finetune
        where = f"the files beside {checkpoint}" if beside else f"the tokenizer in {checkpoint}/tokenizer"
        yield Problem(
            f"{checkpoint} was trained with another tokenizer: a {theirs.type} of {theirs.vocab_size} ids, and this is a "
            f"{mine.type} of {mine.vocab_size}" + (", from other files" if theirs.vocab_size == mine.vocab_size else ""),
            case.at("checkpoint.load", "tokenizer.type"),
            where + ("" if finetune else ", or checkpoint.finetune=true for a new vocabulary"),
            "warning" if finetune else "error",
        )


def export(case: Case) -> Iterator[Problem]:
    """checkpoint.export_hf is free, on a disk with room, and Hugging Face has this kind of model: told before the training."""
    recipe, where = case.recipe, case.at("checkpoint.export_hf")
    if recipe.checkpoint.export_hf is None or is_exported(recipe) and not trains_on(recipe):
        return
    target = Path(recipe.checkpoint.export_hf)
    run, real = Path(recipe.run.dir or "").resolve(), target.resolve()
    if run.is_relative_to(real) or real.is_relative_to(run):
        yield Problem(f"{target} is the run's own folder, or in it, or around it", where, "checkpoint.export_hf=A_FOLDER_OF_ITS_OWN")
    elif target.is_file() or target.is_dir() and any(target.iterdir()):
        yield Problem(f"{target} is there already", where, "give another checkpoint.export_hf, or move that away")
    elif not writable(there := existing(target.parent)):
        yield Problem(f"{target} cannot be made: {there} cannot be written", where, "checkpoint.export_hf=A_FOLDER")
    if any(case.value(f"model.{key}") is None for key in ("num_layers", "hidden_size", "num_attention_heads", "kv_channels", "ffn_hidden_size")):
        return  # told by `required`
    size = parameters(recipe) * (4 if recipe.training.precision == "fp32" else 2) if recipe.derived.padded_vocab_size else 0
    if size > (free := shutil.disk_usage(existing(target.parent)).free):
        what = f"{target} takes {gib(size)}, and {gib(free)} are free there"
        yield Problem(what, where, "checkpoint.export_hf on a larger disk", "error" if case.launching else "warning")
    try:
        published.foreign(Model.of(vars(recipe.model), "the recipe", vocab_size=recipe.derived.vocab_size or 1))
    except CheckpointError as error:
        yield Problem(str(error), where, "checkpoint.export_hf=null; `yuan convert` has other formats")
