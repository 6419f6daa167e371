"""Saving and loading what training changes: megatron-core's sharded checkpoints, or Megatron-LM's `torch` layout."""

from __future__ import annotations

import random
import shutil
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.safe_globals import register_safe_globals
from torch.distributed.checkpoint.api import CheckpointException

from checkpoints import folder as folders
from checkpoints.adapters import NOTE, Adapters, find_base, note_of, read_note, write_note
from checkpoints.folder import CheckpointError
from checkpoints.formats.dialects import unfused
from checkpoints.models import published
from checkpoints.recognise import checkpoint_in
from launcher.engine import foreign, optimizer_state
from launcher.engine.lora import is_adapter
from launcher.engine.model import unwrap
from launcher.engine.optimizer import holds_weights
from launcher.engine.optimizer_state import METADATA
from launcher.engine.sharded import ShardedDataParallel
from launcher.engine.train import Best, Pending, TrainState
from launcher.recipe.converted import model_of
from launcher.recipe.frozen import own_recipe, write_frozen
from launcher.recipe.schema import Recipe
from launcher.recipe.tokenizer import tokenizer_of


def save(recipe: Recipe, state: TrainState, folder: Path, tokenizer: Path, best: bool = False) -> Path:
    """Write the state into `folder` (a run's `checkpoints/`); whole or not at all. Every rank calls it. `best`: it is kept as the
    best one, until the next is.

    `tokenizer` is the run's own copy of the tokenizer's files, beside which those of `keep_files` are. Returns the checkpoint: weights, optimizer, schedule, random numbers, data position, recipe and tokenizer.
    """
    if recipe.parallel.overlap_param_gather:
        for chunk in state.chunks:  # the last step's weights are still shared out; the next forward pass would gather them
            chunk.start_param_sync(force_sync=True)
    first = torch.distributed.get_rank() == 0
    part = folder / (folders.name_of(state.iteration) + ".part")
    if first:
        folders.begin(folder, state.iteration)
    torch.distributed.barrier()
    (_save_torch if recipe.checkpoint.format == "torch" else _save_torch_dist)(recipe, state, part)
    torch.distributed.barrier()
    checkpoint = part.with_name(folders.name_of(state.iteration))
    if first:
        write_frozen(recipe, part / "recipe.yaml")
        shutil.copytree(tokenizer, part / "tokenizer")
        if (model_files := tokenizer.with_name("hf_config")).is_dir():
            shutil.copytree(model_files, part / "hf")
        if state.adapters:
            write_note(part, state.adapters)
        folders.commit(part)
        if best:
            folders.mark_best(folder, state.iteration)
        if recipe.checkpoint.keep_last:
            folders.keep_last(folder, recipe.checkpoint.keep_last)
    torch.distributed.barrier()
    return checkpoint


def load(recipe: Recipe, state: TrainState, checkpoint: Path, resume: bool) -> None:
    """Fill the state from `checkpoint` (an iter_ folder). With `resume` everything, else as checkpoint.finetune,
    no_load_optim and no_load_rng say. Random numbers are restored where TP and PP are the same. Of a converted one
    (`release`) and of another tool's there are weights alone; those are read in any format, at any TP and PP. Adapters begin anew
    unless the run resumes: then `checkpoint` holds them alone, and says where the weights are.

    Raises:
        CheckpointError: the checkpoint does not fit the model or is damaged.
    """
    if recipe.lora.rank:
        state.adapters = _load_frozen(recipe, state.chunks, checkpoint, resume)
        if not resume:
            return
    options, weights_alone = recipe.checkpoint, folders.holds_weights_alone(checkpoint)
    with_optimizer = not weights_alone and (resume or not (options.finetune or options.no_load_optim))
    with_rng = not weights_alone and (resume or not (options.finetune or options.no_load_rng)) and same_layout(recipe, checkpoint)
    if with_optimizer or with_rng or not _read_by_tensor(checkpoint):
        loaded = _read(recipe, state, checkpoint, with_optimizer, with_rng)
        _load_chunks(state.chunks, loaded, adapters=bool(recipe.lora.rank))
    else:
        settings = foreign.fill(recipe, state.chunks, checkpoint)
        begun = {"iteration": 0, "consumed_train_samples": 0} | ({} if weights_alone else dict(settings))
        loaded = {"iteration": begun["iteration"], "args": Namespace(**begun)}
    if with_optimizer:
        optimizer_state.load_state(state.optimizer, loaded["optimizer"])
        state.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    elif recipe.training.precision != "fp32" or recipe.parallel.use_distributed_optimizer:
        state.optimizer.reload_model_params()  # the fp32 copies must follow the weights
    if with_rng:
        _set_rng(loaded["rng_state"])
    if resume or not options.finetune:
        state.iteration = loaded["iteration"]
        state.consumed_train_samples = loaded["args"].consumed_train_samples
        state.pending = Pending(**loaded.get("pending", {}))
        state.best = Best(**loaded.get("best", {}))


def load_weights(recipe: Recipe, chunks: list, checkpoint: Path) -> None:
    """Fill model chunks of `build_chunks` from a checkpoint of any format, at any TP and PP; adapters in it are merged, and those
    of the chunks left as they are."""
    if _read_by_tensor(checkpoint):
        foreign.fill(recipe, chunks, checkpoint)
        return
    state = TrainState(chunks, optimizer=None, scheduler=None)
    _load_chunks(chunks, _read(recipe, state, checkpoint, with_optimizer=False, with_rng=False))


def _load_frozen(recipe: Recipe, chunks: list, checkpoint: Path, resume: bool) -> Adapters:
    """Fill the frozen weights from `checkpoint`, or from where the run's own one says; what the run's next one is to say."""
    settings = recipe.lora.rank, recipe.lora.alpha, recipe.lora.target_modules
    if resume:
        note = read_note(checkpoint)
        if note is None:
            raise CheckpointError(f"{checkpoint} holds no {NOTE}, and so does not say which weights its adapters stand beside")
        load = recipe.checkpoint.load
        checkpoint = find_base(checkpoint, note, Path(load) if load else None)
    load_weights(recipe, chunks, checkpoint)
    return note_of(checkpoint, *settings)


def same_layout(recipe: Recipe, checkpoint: Path) -> bool:
    """Whether the checkpoint was saved at this recipe's TP and PP, and on its kind of device, and holds its random numbers."""
    if "rng_state" in folders.manifest(checkpoint).get("left_out", {}):
        return False
    saved = own_recipe(checkpoint)
    if saved is None:
        here = (recipe.parallel.tensor_model_parallel_size, recipe.parallel.pipeline_model_parallel_size)
        return foreign.grid(checkpoint) == here
    keys = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    same = all(getattr(saved.parallel, key) == getattr(recipe.parallel, key) for key in keys)
    return same and saved.derived.device == recipe.derived.device


def keep_files(recipe: Recipe, run: Path) -> None:
    """Copy what a run's checkpoints take along, so that they can be used when the originals have moved: the tokenizer's files
    into `tokenizer/`, and into `hf_config/` the config.json that the weights came with, and what else describes the model at
    Hugging Face, for the way back. Both anew at each start, until there is a checkpoint of the run's own."""
    begun = folders.has_checkpoints(run / "checkpoints")
    if not (begun and (run / "tokenizer").is_dir()):
        copy_tokenizer(recipe, run / "tokenizer")
    if begun:
        return
    shutil.rmtree(run / "hf_config", ignore_errors=True)
    if recipe.checkpoint.load is None:
        return
    start = checkpoint_in(Path(recipe.checkpoint.load))
    place = start / "hf" if (start / "hf").is_dir() else start
    if (place / "config.json").is_file() and published.describes(place, model_of(recipe)):
        _copy(published.model_files(place), run / "hf_config")


def copy_tokenizer(recipe: Recipe, folder: Path) -> None:
    """Make `folder` a copy of the tokenizer's files, and of what else lies beside them of the tokenizer where training starts from
    weights that they came with: a Llama's tokenizer.model beside its tokenizer.json, for the way back."""
    tokenizer = tokenizer_of(recipe.tokenizer)
    files = [*map(Path, tokenizer.files.values()), *tokenizer.companions]
    if recipe.checkpoint.load is not None and tokenizer.files:
        start, place = checkpoint_in(Path(recipe.checkpoint.load)), files[0].parent
        if place.resolve() in (start.resolve(), (start / "tokenizer").resolve()):
            of_model = published.model_files(place)
            files += [path for path in published.companions(place) if path not in of_model]
    _copy(files, folder)


def _copy(files: Iterable[Path], folder: Path) -> None:
    """Files as a folder that is whole or not there."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for path in files:
        shutil.copy2(path, part / path.name)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


# ---- what is saved ---------------------------------------------------------------------------------------------------


def _common(recipe: Recipe, state: TrainState) -> dict:
    """What is the same on every rank, under Megatron-LM's names."""
    groups = asdict(recipe)
    arguments = {key: value for group in ("model", "parallel", "training", "optimizer") for key, value in groups[group].items()}
    arguments |= {
        "add_position_embedding": recipe.model.position_embedding_type == "learned_absolute",
        "tokenizer_type": recipe.tokenizer.type,
        "padded_vocab_size": recipe.derived.padded_vocab_size,
        "data_parallel_size": recipe.derived.data_parallel_size,
        "world_size": recipe.derived.world_size,
        "iteration": state.iteration,
        "consumed_train_samples": state.consumed_train_samples,
        "consumed_valid_samples": state.consumed_valid_samples(recipe),
        "fp16": recipe.training.precision == "fp16",
        "bf16": recipe.training.precision == "bf16",
    }
    return {
        "args": Namespace(**arguments),
        "checkpoint_version": 3.0,
        "iteration": state.iteration,
        "opt_param_scheduler": state.scheduler.state_dict() if state.scheduler else None,
        "pending": asdict(state.pending),
        "best": asdict(state.best),
    }


def _rng() -> list[dict]:
    """The state of every random number generator of this rank, in Megatron-LM's form (one entry: data-parallel rank 0)."""
    return [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": torch.cuda.get_rng_state(),
            "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
        }
    ]


def _set_rng(states: list[dict]) -> None:
    state = states[0]
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])


def _chunk_keys(chunks: list) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]


def _load_chunks(chunks: list, loaded: dict, adapters: bool = False) -> None:
    """Fill the chunks' adapters, or all but these."""
    for key, chunk in zip(_chunk_keys(chunks), chunks, strict=True):
        try:
            if isinstance(chunk, ShardedDataParallel):
                chunk.load_rows(loaded.get(key, {}))
                continue
            missing, more = unwrap(chunk).load_state_dict(loaded.get(key, {}), strict=False)
            if wrong := [name for name in missing if is_adapter(name) == adapters] + more:
                raise RuntimeError(f"missing or left over: {', '.join(wrong)}")
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"the checkpoint's tensors are not this model's: {error}") from error


def _read_by_tensor(checkpoint: Path) -> bool:
    """Whether its weights are read one by one: other formats, and adapters, which are merged into what they stand beside."""
    return not _is_torch_dist(checkpoint) or (checkpoint / NOTE).is_file()


def _is_torch_dist(checkpoint: Path) -> bool:
    return (checkpoint / "metadata.json").is_file()


def _read(recipe: Recipe, state: TrainState, checkpoint: Path, with_optimizer: bool, with_rng: bool) -> dict:
    register_safe_globals()
    read = _read_torch_dist if _is_torch_dist(checkpoint) else _read_torch
    try:
        loaded = read(recipe, state, checkpoint, with_optimizer, with_rng)
        if not (checkpoint / "recipe.yaml").is_file():
            foreign.expect_model(recipe, vars(loaded["args"]), checkpoint)
        if (kind := getattr(loaded["args"], "quantize", None)) != recipe.model.quantize:  # torch would have turned int8 into bf16
            raise CheckpointError(f"{checkpoint} has {kind or 'no quantized'} weights, and model.quantize is {recipe.model.quantize}")
        return loaded
    except CheckpointException as error:  # torch's, not an Exception; its text is every rank's traceback
        cause = next((cause for cause, _ in error.failures.values()), error)
        raise CheckpointError(f"{checkpoint} cannot be loaded: {type(cause).__name__}: {cause}") from error
    except CheckpointError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, dist_checkpointing.core.CheckpointingException) as error:
        raise CheckpointError(f"{checkpoint} cannot be loaded: {type(error).__name__}: {error}") from error


# ---- torch_dist ------------------------------------------------------------------------------------------------------


def _sharded_state(recipe: Recipe, state: TrainState, loading: bool, with_optimizer: bool, with_rng: bool) -> dict:
    """The state as megatron-core's sharded tensors: each knows its place in the whole tensor. Of a model with adapters these, which
    go with the optimizer, or without it the frozen weights."""
    metadata = METADATA | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    sharded = _common(recipe, state)
    for key, chunk in zip(_chunk_keys(state.chunks), state.chunks, strict=True):
        keeper = chunk if isinstance(chunk, ShardedDataParallel) else unwrap(chunk)
        whole = keeper.sharded_state_dict(metadata=metadata)
        adapters = with_optimizer and bool(recipe.lora.rank)
        sharded[key] = {name: entry for name, entry in whole.items() if is_adapter(name) == adapters}
    if with_optimizer:
        models = {key: sharded[key] for key in _chunk_keys(state.chunks)}
        with optimizer_state.in_place(state.optimizer):
            sharded["optimizer"] = state.optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata)
        if sharded["optimizer"].get("param_state", ()) is None:
            del sharded["optimizer"]["param_state"]  # data-parallel rank 0 alone gathered it, and saves it
        if loading and holds_weights(state.optimizer):
            sharded |= dict.fromkeys(models, {})
    if with_rng:
        sharded["rng_state"] = ShardedObject(
            "rng_state",
            _rng(),
            (recipe.parallel.pipeline_model_parallel_size, recipe.parallel.tensor_model_parallel_size),
            (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()),
            replica_id=parallel_state.get_data_parallel_rank(),
        )
    return sharded


def _save_torch_dist(recipe: Recipe, state: TrainState, part: Path) -> None:
    sharded = _sharded_state(recipe, state, loading=False, with_optimizer=True, with_rng=True)
    dist_checkpointing.save(sharded, str(part), ("torch_dist", 1), content_metadata=dict(METADATA))


def _read_torch_dist(recipe: Recipe, state: TrainState, checkpoint: Path, with_optimizer: bool, with_rng: bool) -> dict:
    sharded = _sharded_state(recipe, state, loading=True, with_optimizer=with_optimizer, with_rng=with_rng)
    if not with_optimizer:
        return dist_checkpointing.load(sharded, str(checkpoint))
    saved, distributed = optimizer_state.saved_form(checkpoint), optimizer_state.is_distributed(state.optimizer)
    optimizer_state.ask_for(sharded["optimizer"], saved, distributed)
    if distributed:
        optimizer_state.ask_for_shares(sharded["optimizer"], state.optimizer)
    loaded = dist_checkpointing.load(sharded, str(checkpoint), validate_access_integrity=not distributed)
    loaded["optimizer"] = optimizer_state.nest_as(loaded["optimizer"], saved, distributed)
    return loaded


# ---- torch -----------------------------------------------------------------------------------------------------------


def _rank_folder(recipe: Recipe, checkpoint: Path) -> Path:
    """`mp_rank_00`, with the pipeline rank behind it where there are stages."""
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if recipe.parallel.pipeline_model_parallel_size > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    return checkpoint / name


def _save_torch(recipe: Recipe, state: TrainState, part: Path) -> None:
    folder = _rank_folder(recipe, part)
    first_replica = parallel_state.get_data_parallel_rank() == 0
    if first_replica:
        folder.mkdir()
        whole = _common(recipe, state) | {"optimizer": state.optimizer.state_dict(), "rng_state": _rng()}
        for key, chunk in zip(_chunk_keys(state.chunks), state.chunks, strict=True):
            whole[key] = unwrap(chunk).state_dict_for_save_checkpoint()
        torch.save(whole, folder / "model_optim_rng.pt")
    if recipe.parallel.use_distributed_optimizer:
        # Gathered on data-parallel rank 0, which alone writes; the others only send.
        state.optimizer.save_parameter_state(str(folder / "distrib_optim.pt"))


def _read_torch(recipe: Recipe, state: TrainState, checkpoint: Path, with_optimizer: bool, with_rng: bool) -> dict:
    path = _rank_folder(recipe, checkpoint) / "model_optim_rng.pt"
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in checkpoint.glob("mp_rank_*"))) or "no mp_rank_ folder"
        raise CheckpointError(
            f"there is no {path.name} in {path.parent}: the torch layout is loaded at the TP and PP that saved it (there: {found}); "
            "checkpoint.format=torch_dist resumes at any"
        )
    # mmap: only what is used is read; weights_only: nothing in the file is executed.
    loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if with_optimizer and recipe.parallel.use_distributed_optimizer:
        loaded["optimizer"]["param_state_file"] = path.with_name("distrib_optim.pt")
    if not with_optimizer:  # its state follows the order of the parameters, which goes with their names
        for key, chunk in zip(_chunk_keys(state.chunks), state.chunks, strict=True):
            if key in loaded:
                loaded[key] = _named_as(unwrap(chunk).state_dict(), loaded[key])
    return loaded


def _named_as(own: dict, saved: dict) -> dict:
    """The saved tensors under the names of the modules that load them: a norm may have been part of Transformer Engine's layer."""
    names = {unfused(name): name for name in own}
    found = {names.get(unfused(name), name): value for name, value in saved.items()}
    states = {name: found.pop(name) for name in list(found) if name.endswith("_extra_state")}
    return found | {name: states.get(name) for name in own if name.endswith("_extra_state")}
