"""The recipe that goes with weights of another tool's, so that they can be trained and asked without another file."""

from __future__ import annotations

import filecmp
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.models.model import FREE, Model
from checkpoints.recognise import Found
from launcher.errors import UserError, raise_all
from launcher.recipe.inference import describes_model
from launcher.recipe.load import Loaded
from launcher.recipe.resolve import keep_padded_vocabulary, resolve
from launcher.recipe.schema import Checkpoint, Convert, Data, Derived, Generate, Launch, Lora, Parallel, Recipe, Run, Slurm, Tokenizer
from launcher.recipe.tokenizer import tokenizer_of, with_copies

if TYPE_CHECKING:  # it imports torch
    from checkpoints.formats.base import Source
    from checkpoints.optimizer import TrainingState

LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "pipeline_model_parallel_layout")
# What a Hugging Face folder's files make, the first that is there; Yuan's ids are SentencePiece's alone.
_YUANS: tuple[tuple[str, dict[str, str]], ...] = (("YuanTokenizer", {"tokenizer_model": "tokenizer.model"}),)
_TOKENIZERS: tuple[tuple[str, dict[str, str]], ...] = (
    ("HuggingFaceTokenizer", {"tokenizer_model": "tokenizer.json"}),
    ("SentencePieceTokenizer", {"tokenizer_model": "tokenizer.model"}),
    ("GPT2BPETokenizer", {"vocab_file": "vocab.json", "merge_file": "merges.txt"}),
)


@dataclass(frozen=True)
class TokenizerFound:
    """A tokenizer, and the files to keep with the weights; `why` says why there is none."""

    settings: Tokenizer
    files: tuple[Path, ...]
    why: str = ""


def model_of(recipe: Recipe) -> Model:
    """The model of a resolved recipe, as the room `checkpoints` knows it."""
    from checkpoints.models.model import Model

    return Model.of(vars(recipe.model), f"recipe {recipe.run.name}", vocab_size=recipe.derived.vocab_size)


def open_checkpoint(loaded: Loaded, found: Found, base: Recipe | None, fused_layout: str | None, states: bool = False) -> Source:
    """A checkpoint, with what the named recipe and the options of `yuan convert` say of it; with `states` its training's too.

    Raises:
        CheckpointError: it is damaged, or something is not said that nobody should guess.
    """
    from checkpoints.convert import open_source

    asked = loaded.recipe.convert
    if found.format == "mindspore" and fused_layout and fused_layout == asked.source_fused_layout:
        from checkpoints.formats.mindspore import agree_layout

        agree_layout(found.path, fused_layout)
    hf_config = Path(asked.hf_config) if asked.hf_config else None
    return open_source(found, source_model(loaded, base, found), asked.vocab_size, fused_layout, hf_config, states)  # type: ignore[arg-type]


def source_model(loaded: Loaded, base: Recipe | None, found: Found) -> Model | None:
    """What the source is a model of, where a recipe says it: that of the run which it is of; for MindSpore's files, which
    say nothing but shapes, the named one, with all rows of the vocabulary where its tokenizer is not there."""
    if base is not None:
        return model_of(base)
    if found.format != "mindspore" or not describes_model(loaded):
        return None
    from checkpoints.models.model import Model

    recipe = loaded.recipe
    return Model.of(vars(recipe.model), f"recipe {loaded.name}", vocab_size=recipe.convert.vocab_size or recipe.derived.vocab_size or 0)


def source_fused(asked: Convert) -> str | None:
    """How fused matrices of a source of MindSpore's lie: as the target's, where nothing else is said."""
    return asked.source_fused_layout or asked.fused_layout


def agree(loaded: Loaded, model: Model) -> None:
    """The model that a named recipe describes must be the one that is converted.

    Raises:
        UserError: with every value that is another.
    """
    faults = []
    for key, source in loaded.sources.items():
        group, leaf = key.split(".")
        if group != "model" or leaf in FREE or not hasattr(model, leaf) or source in ("default", "derived"):
            continue
        mine, theirs = getattr(loaded.recipe.model, leaf), getattr(model, leaf)
        if mine is not None and mine != theirs:
            faults.append(UserError(f"{key} is {mine}, and the source's is {theirs}", source, f"{key}={theirs}, or another convert.source"))
    raise_all(faults)


def find_tokenizer(loaded: Loaded, source: Source, base: Recipe | None) -> TokenizerFound:
    """The tokenizer of a source: that of the run it is of, else the recipe's, else what the files beside the weights make.

    Raises:
        data_tools.errors.TokenizerError: the recipe names one whose files are missing.
    """
    if base is not None:
        settings = with_copies(base.tokenizer, source.path / "tokenizer")
    elif any(key.startswith("tokenizer.") and where not in ("default", "derived") for key, where in loaded.sources.items()):
        settings = loaded.recipe.tokenizer
    else:
        settings, why = tokenizer_beside(source.companions, source.model, source.path)
        if why:
            return TokenizerFound(settings, (), why)
    built = tokenizer_of(settings)
    return TokenizerFound(settings, (*map(Path, built.files.values()), *built.companions))


def tokenizer_beside(companions: Sequence[Path], model: Model, folder: Path) -> tuple[Tokenizer, str]:
    """What the files beside the weights in `folder` make, with the chat template that lies among them; where they make none,
    one that takes ids for text, and why."""
    from data_tools.errors import TokenizerError
    from data_tools.jinja_texts import template_beside

    settings = _named(companions, model, folder)
    try:
        settings.chat_template = template_beside(tokenizer_of(settings))  # type: ignore[assignment]
    except TokenizerError as error:
        return Tokenizer(type="NullTokenizer", vocab_size=model.vocab_size - 1), ": ".join(filter(None, (error.where, error.what)))
    return settings, ""


def tokenizer_for_text(companions: Sequence[Path], model: Model, folder: Path, ids_will_do: bool) -> Tokenizer:
    """The same for who reads text: of one that is broken the settings, so that whoever builds it says which file is wrong; and of
    one that is not there, unless `ids_will_do`."""
    settings, why = tokenizer_beside(companions, model, folder)
    if not why:
        return settings
    named = _named(companions, model, folder)
    there = any(path and Path(path).is_file() for path in (named.tokenizer_model, named.vocab_file))
    return settings if ids_will_do and not there else replace(named, chat_template="tokenizer")


def same_tokenizer(mine: Tokenizer, theirs: Tokenizer, beside: Sequence[Path]) -> bool:
    """Whether two tokenizers give the same ids: they are equal, or mine is made of files that lie `beside` the weights, of which
    theirs is one reading (a Llama's tokenizer.model beside its tokenizer.json).

    Raises:
        data_tools.errors.TokenizerError: one cannot be built.
    """
    built = tokenizer_of(mine)
    if built.hash() == tokenizer_of(theirs).hash():
        return True
    there = {path.name: path for path in beside}
    return bool(built.files) and all(
        (one := there.get(Path(path).name)) is not None and filecmp.cmp(path, one, shallow=False) for path in built.files.values()
    )


def _named(companions: Sequence[Path], model: Model, folder: Path) -> Tokenizer:
    there = {path.name: str(path) for path in companions}
    kinds = _YUANS if model.family == "yuan2" else _TOKENIZERS
    for kind, names in kinds:
        if all(name in there for name in names.values()):
            return Tokenizer(type=kind, **{key: there[name] for key, name in names.items()})  # type: ignore[arg-type]
    kind, names = kinds[0]
    return Tokenizer(type=kind, **{key: str(folder / name) for key, name in names.items()})  # type: ignore[arg-type]


def recipe_for(loaded: Loaded, source: Source, base: Recipe | None, tokenizer: Tokenizer, precision: str, padded: int) -> Recipe:
    """A resolved recipe of the converted model: what `base` (the run it is of) or the named recipe says of training it, the
    source's own numbers, and nothing of machines, data and runs; these, too, where the training goes along.

    `padded` are the rows of the vocabulary's tables as written.
    """
    recipe = base or (loaded.recipe if describes_model(loaded) else Recipe())
    asked = loaded.recipe.convert
    for group, changed in (_fresh(asked) if source.state is None else _going_on(asked, recipe, source.state)).items():
        setattr(recipe, group, changed)
    describe(recipe, source.model, tokenizer, precision)
    resolve(recipe, {}, recipe.run.name)
    recipe.derived.vocab_size = source.model.vocab_size
    keep_padded_vocabulary(recipe, padded)
    return recipe


def describe(recipe: Recipe, model: Model, tokenizer: Tokenizer, precision: str) -> None:
    """Write into `recipe` what a model is, of whose training it may know something already."""
    trained = recipe.model.num_layers is not None
    for field in fields(model):
        if hasattr(recipe.model, field.name) and not (field.name in FREE and trained):
            setattr(recipe.model, field.name, getattr(model, field.name))
    recipe.tokenizer = tokenizer
    if tokenizer.type != "NullTokenizer":
        recipe.tokenizer.vocab_size = model.vocab_size
    recipe.training.precision = precision  # type: ignore[assignment]
    recipe.training.seq_length = recipe.training.seq_length or model.max_position_embeddings
    recipe.training.micro_batch_size = recipe.training.micro_batch_size or 1


def _going_on(asked: Convert, recipe: Recipe, state: TrainingState) -> dict[str, Any]:
    """The training that goes along, at the layout of what is written; torch_dist's is the one that saved it."""
    args, parallel = vars(state.common["args"]), recipe.parallel
    distributed = state.form if asked.optimizer == "keep" else asked.optimizer
    tp, pp = state.grid[::-1]
    keys = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp} if asked.to == "torch_dist" else {
        **{key: getattr(asked, key) for key in (*LAYOUT, "num_layers_per_virtual_pipeline_stage")},
        "decoder_first_pipeline_num_layers": None, "decoder_last_pipeline_num_layers": None,
    }  # fmt: skip
    sequence_parallel = bool(args.get("sequence_parallel")) and keys["tensor_model_parallel_size"] > 1
    parallel = replace(parallel, **keys, sequence_parallel=sequence_parallel, zero=None, use_distributed_optimizer=distributed == "distributed")
    launch = replace(recipe.launch, nproc_per_node=parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size, nnodes=1)
    return {
        "parallel": parallel, "launch": launch, "convert": Convert(), "checkpoint": replace(recipe.checkpoint, format=asked.to),
        "run": Run(name=Path(asked.target or "").name), "derived": Derived(device=recipe.derived.device),
    }  # fmt: skip


def _fresh(asked: Convert) -> dict[str, Any]:
    """Nothing of the training that the model comes from; the layout is that of the files where these have one."""
    parallel, checkpoint, launch = Parallel(), Checkpoint(), Launch()
    if asked.to == "torch":
        for key in (*LAYOUT, "num_layers_per_virtual_pipeline_stage"):
            setattr(parallel, key, getattr(asked, key))
        checkpoint.format = "torch"
        launch.nproc_per_node = asked.tensor_model_parallel_size * asked.pipeline_model_parallel_size
    return {
        "parallel": parallel, "data": Data(), "checkpoint": checkpoint, "launch": launch, "slurm": Slurm(),
        "run": Run(name=Path(asked.target or "").name), "lora": Lora(), "generate": Generate(), "convert": Convert(), "derived": Derived(),
    }  # fmt: skip
