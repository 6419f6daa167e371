"""The recipe of a model that answers: the one its checkpoint was trained with, laid out anew for generation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from checkpoints.beside import beside
from checkpoints.folder import TRACKER, CheckpointError, newest_checkpoint
from checkpoints.models.tensor import padded as padded_rows
from checkpoints.recognise import checkpoint_in, recognise
from launcher.errors import UserError, raise_all
from launcher.recipe import Loaded
from launcher.recipe.frozen import own_recipe
from launcher.recipe.problem import Case, typed
from launcher.recipe.resolve import keep_padded_vocabulary, resolve
from launcher.recipe.schema import Derived, Launch, Lora, Parallel, Recipe
from launcher.recipe.tokenizer import template_of, tokenizer_of, with_copies

# How the stages of a pipeline are cut: of no meaning for another number of stages.
STAGE_KEYS = (
    "pipeline_model_parallel_layout", "num_layers_per_virtual_pipeline_stage",
    "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
)  # fmt: skip
LAYOUT_KEYS = ("tensor_model_parallel_size", "pipeline_model_parallel_size", *STAGE_KEYS, "distributed_timeout_minutes")
FREE_GROUPS = ("generate", "launch")
FREE_KEYS = {"training.precision", "tokenizer.chat_template", *(f"parallel.{key}" for key in LAYOUT_KEYS)}
# What another tool's files may not say.
_UNSAID = {"convert.hf_config", "convert.vocab_size", "convert.source_fused_layout"}
FROM_CHECKPOINT = "the checkpoint"


def find_checkpoint(loaded: Loaded, runs: Path = Path("runs")) -> tuple[Path, list[str]]:
    """The iter_ folder to load, and what was passed over on the way to it.

    It is that of generate.load; else the newest of the run that the named recipe trains; else the newest under `runs`.

    Raises:
        UserError: there is none.
    """
    if loaded.recipe.generate.load is not None:
        return _of(Path(loaded.recipe.generate.load), f"generate.load ({loaded.sources['generate.load']})"), []
    if describes_model(loaded):
        return _of(Path(loaded.recipe.run.dir), f"run.dir of recipe {loaded.name}"), []
    trackers = sorted(runs.glob(f"*/checkpoints/{TRACKER}"), key=lambda path: path.stat().st_mtime, reverse=True)
    passed = []
    for tracker in trackers:
        try:
            return newest_checkpoint(tracker.parent), passed
        except CheckpointError as error:
            passed.append(str(error))
    fix = "train a model: yuan pretrain recipe=NAME; or say where one is: --load RUN_OR_CHECKPOINT"
    raise UserError("there is no checkpoint" + "".join(f"\n    {line}" for line in passed), f"{runs}/*/checkpoints", fix)


def _of(path: Path, where: str) -> Path:
    try:
        return checkpoint_in(path)
    except CheckpointError as error:
        raise UserError(str(error), where, "give a run folder, a checkpoints folder, an iter_ folder or a Hugging Face folder: --load PATH") from None


def describes_model(loaded: Loaded | Case) -> bool:
    """Whether the named recipe says what is trained, and not only how to generate."""
    from_files = (key for key, source in loaded.sources.items() if source not in ("default", "derived") and not typed(source))
    return any(key.startswith("model.") for key in from_files)


def inference_recipe(loaded: Loaded, checkpoint: Path) -> tuple[Recipe, dict[str, str]]:
    """The checkpoint's own recipe with the layout and the sampling that `loaded` asks for, resolved; and the sources.

    One process per TP x PP on this machine unless `launch.*` asks for more. A checkpoint without a recipe of its own
    is described by the named recipe, or by what lies beside the weights.

    Raises:
        UserError: the checkpoint cannot be read, or something was given that is fixed by the checkpoint.
    """
    base, asked = _trained_with(loaded, checkpoint), loaded.recipe
    taken = _taken(loaded, base is asked, FREE_KEYS if (checkpoint / "recipe.yaml").is_file() else FREE_KEYS | _UNSAID)
    sources = dict.fromkeys(loaded.sources, FROM_CHECKPOINT)
    sources |= {key: source for key, source in loaded.sources.items() if key in taken or key.startswith("generate.")}
    trained, rows = base.parallel, base.derived.padded_vocab_size
    base.generate, base.derived, base.lora = asked.generate, Derived(), Lora()  # adapters are merged when they are loaded
    base.generate.load = str(checkpoint)
    base.parallel = Parallel(**{key: getattr(trained, key) for key in LAYOUT_KEYS})
    base.launch = Launch(device=base.launch.device)
    if "parallel.pipeline_model_parallel_size" in taken:
        for key in STAGE_KEYS:
            setattr(base.parallel, key, None)
    for key in taken:
        group, leaf = key.split(".")
        setattr(getattr(base, group), leaf, getattr(getattr(asked, group), leaf))
    parallel = base.parallel
    if "launch.nproc_per_node" not in taken:
        ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        base.launch.nproc_per_node = max(1, ranks // max(1, base.launch.nnodes))
    _use_copied_tokenizer(base, checkpoint)
    _choose_greedy(base, loaded.sources)
    resolve(base, sources, base.run.name or loaded.name)
    keep_padded_vocabulary(base, rows)
    return base, sources


def _trained_with(loaded: Loaded, checkpoint: Path) -> Recipe:
    if own := own_recipe(checkpoint):
        return own
    return loaded.recipe if describes_model(loaded) else _described(checkpoint, loaded)


def _described(checkpoint: Path, loaded: Loaded) -> Recipe:
    """The recipe of another tool's weights, from what lies beside them."""
    from launcher.recipe.converted import describe, tokenizer_for_text

    config = loaded.recipe.convert.hf_config
    try:
        found = recognise(checkpoint)
        said = beside(found, Path(config) if config else None)
    except CheckpointError as error:
        raise UserError(str(error), f"generate.load ({checkpoint})", error.fix) from None
    if said.model is None:
        fix = "name the recipe that describes its model, recipe=NAME, or a folder with its config.json: convert.hf_config=FOLDER"
        raise UserError("the checkpoint holds no recipe of its own, and nothing beside it says what model it is", str(checkpoint), fix)
    ids = loaded.recipe.convert.vocab_size if found.format in ("torch", "torch_dist") else None  # others say it
    recipe, model = Recipe(), replace(said.model, vocab_size=ids or said.model.vocab_size)
    describe(recipe, model, tokenizer_for_text(said.companions, model, checkpoint, ids_will_do=True), said.precision or "fp32")
    recipe.derived.padded_vocab_size = padded_rows(model.vocab_size, recipe.model.make_vocab_size_divisible_by)
    return recipe


def _taken(loaded: Loaded, described: bool, free_keys: set[str]) -> list[str]:
    """The keys whose values come from the command line or a recipe for generation.

    Of a recipe that trains a model only `generate.*` is taken: the checkpoint knows what it was really trained with. One
    that names the checkpoint itself is for generation; the model in it is for checkpoints that hold no recipe.
    """
    given = {key: source for key, source in loaded.sources.items() if source not in ("default", "derived")}
    words = {key for key, source in given.items() if typed(source)}
    trains = describes_model(loaded) and ("generate.load" not in given or "generate.load" in words)
    wanted = words if trains else set(given)
    free = {key for key in wanted if key.split(".")[0] in FREE_GROUPS or key in free_keys}
    faults = []
    for key in sorted(wanted - free):
        if key.startswith("parallel."):
            faults.append(UserError(f"{key} is of training and has no meaning for generation", given[key], "leave it out"))
        elif not described and (key in words or not describes_model(loaded)):
            fix = "leave it out; generate.*, launch.*, training.precision, tokenizer.chat_template and TP and PP may be given"
            faults.append(UserError(f"{key} is fixed by the checkpoint", given[key], fix))
    raise_all(faults)
    return sorted(key for key in free if not key.startswith("generate."))


def _use_copied_tokenizer(recipe: Recipe, checkpoint: Path) -> None:
    """Point the tokenizer's keys at the copies in the checkpoint, and see that it can be built, and its chat template."""
    from data_tools.errors import TokenizerError

    recipe.tokenizer = with_copies(recipe.tokenizer, checkpoint / "tokenizer")
    try:
        template_of(recipe.tokenizer, tokenizer_of(recipe.tokenizer))
    except TokenizerError as error:
        raise UserError(error.what, f"{error.where} (tokenizer of {checkpoint})", error.fix) from None


def _choose_greedy(recipe: Recipe, sources: dict[str, str]) -> None:
    """Greedy is what happens when nobody says how to sample."""
    says = ("generate.greedy", "generate.temperature", "generate.top_k", "generate.top_p")
    if all(sources[key] == "default" for key in says):
        recipe.generate.greedy = True
