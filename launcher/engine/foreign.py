"""Weights of any format that `yuan convert` reads, straight into a model that is built: each rank reads the tensors that it has
shares of, one at a time, and fills its shares in place. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from checkpoints.beside import beside
from checkpoints.convert import open_source
from checkpoints.files.stored import NAMES
from checkpoints.folder import CheckpointError
from checkpoints.formats.base import Source
from checkpoints.formats.torch_dist import key_of, settings
from checkpoints.models.megatron import tanh_gelu
from checkpoints.models.model import FREE
from checkpoints.models.tensor import Tensor, pad
from checkpoints.parallel import all_finite
from checkpoints.recognise import recognise
from launcher.engine.lora import is_adapter
from launcher.engine.model import unwrap
from launcher.engine.sharded import ShardedDataParallel
from launcher.recipe.converted import model_of, source_fused
from launcher.recipe.frozen import own_recipe
from launcher.recipe.schema import Recipe

# What the settings in a checkpoint say and the shapes of its tensors do not; these where there are rotary embeddings.
_BY_NUMBERS = ("num_attention_heads", "kv_channels", "position_embedding_type", "norm_epsilon", "openai_gelu", "add_qkv_bias")
_ROTARY = ("rotary_base", "rotary_percent", "use_rope_scaling")
_OTHER = "another checkpoint, or the recipe of this one's model"


def fill(recipe: Recipe, chunks: list, checkpoint: Path) -> Mapping[str, Any]:
    """Fill this rank's chunks of `build_chunks`, at any TP, PP and interleaving; rows that pad the vocabulary are the last id's.

    Returns the settings of the training that made the weights, where the format has them.

    Raises:
        CheckpointError: `checkpoint` is damaged or does not hold this model.
    """
    source = open_checkpoint(recipe, checkpoint)
    tensors = {(key_of(tensor, source.model), tensor.layer): tensor for tensor in source.tensors}
    places: dict[tuple[str, int | None], list[ShardedTensor]] = {}
    for share in _shares(chunks):
        layer = share.global_offset[0] if share.prepend_axis_num else None
        places.setdefault((share.key, layer), []).append(share)
    if lacking := [key for key, _ in places if key not in {one for one, _ in tensors}]:
        raise CheckpointError(f"{checkpoint} has nothing for {', '.join(sorted(set(lacking))[:8])} of the recipe's model", _OTHER)
    with torch.no_grad():
        for place, tensor in tensors.items():
            if place in places:
                _fill(places[place], tensor, source)
    return source.training


def open_checkpoint(recipe: Recipe, checkpoint: Path) -> Source:
    """The checkpoint as a model of the recipe's; what its files do not say, the recipe says.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    found, asked = recognise(checkpoint), recipe.convert
    config = Path(asked.hf_config) if asked.hf_config else None
    own = own_recipe(found.path)
    said = None if own else beside(found, config).model
    model = model_of(own) if own else None if said else model_of(recipe)
    source = open_source(found, model, None if model else asked.vocab_size, source_fused(asked), config)  # type: ignore[arg-type]
    if said:
        _expect(recipe, vars(replace(said, vocab_size=asked.vocab_size or said.vocab_size)), checkpoint)
    elif not own:
        expect_model(recipe, source.training, checkpoint)
    if source.model.quantize != recipe.model.quantize:
        kind = source.model.quantize or "no quantized"
        raise CheckpointError(f"{checkpoint} has {kind} weights, and model.quantize is {recipe.model.quantize}", _OTHER)
    return source


def expect_model(recipe: Recipe, settings: Mapping[str, Any], checkpoint: Path) -> None:
    """What Megatron-LM's settings in a checkpoint say of its model is the recipe's.

    Raises:
        CheckpointError: naming every key that is another.
    """
    names = {"norm_epsilon": "layernorm_epsilon"}  # Megatron-LM's own name for it
    said = {key: settings.get(key, settings.get(names.get(key, key))) for key in (*_BY_NUMBERS, *_ROTARY, "rope_scaling_factor")}
    said["openai_gelu"] = tanh_gelu(settings) if "openai_gelu" in settings else None
    _expect(recipe, {key: value for key, value in said.items() if value is not None}, checkpoint)


def _expect(recipe: Recipe, theirs: Mapping[str, Any], checkpoint: Path) -> None:
    """Each of these numbers of a model is the recipe's, all but those of no meaning: of training alone, or of rotary embeddings
    where there are none. With these, positions may be as many as the recipe says, which the check has told."""
    mine = vars(recipe.model) | {"vocab_size": recipe.derived.vocab_size}
    rope = "rope" in (mine["position_embedding_type"], theirs.get("position_embedding_type"))
    free = {*FREE, "quantize", *(("max_position_embeddings",) if rope else _ROTARY)}
    free |= set() if mine["use_rope_scaling"] or theirs.get("use_rope_scaling") else {"rope_scaling_factor"}
    others = {key: value for key, value in theirs.items() if key in mine and key not in free and mine[key] != value}
    if others:
        listed = ", ".join(f"{key} {value} there, {mine[key]} here" for key, value in others.items())
        fix = " ".join(f"{'tokenizer' if key == 'vocab_size' else 'model'}.{key}={value}" for key, value in others.items())
        raise CheckpointError(f"{checkpoint} is of another model: {listed}", fix)


def grid(checkpoint: Path) -> tuple[int, int] | None:
    """TP and PP that saved a checkpoint of another tool's, where its files or its settings say it."""
    found = recognise(checkpoint)
    if found.format == "torch":
        return found.tensor, found.pipeline
    said = vars(settings(checkpoint)) if found.format == "torch_dist" else {}
    tensor, pipeline = (said.get(f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline"))
    return (tensor, pipeline) if tensor and pipeline else None


def _shares(chunks: list) -> Iterator[ShardedTensor]:
    """What megatron-core would save of these chunks, adapters not: views of the parameters, each with its place in the whole."""
    metadata = {"singleton_local_shards": False, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    for chunk in chunks:
        if isinstance(chunk, ShardedDataParallel):
            yield from chunk.shares()
            continue
        state = {name: share for name, share in unwrap(chunk).sharded_state_dict(metadata=metadata).items() if not is_adapter(name)}
        apply_factories(state)  # [gate; up], of which a rank holds a part of each
        yield from (value for value in nested_values(state) if isinstance(value, ShardedTensor))


def _fill(shares: list[ShardedTensor], tensor: Tensor, source: Source) -> None:
    whole = source.read(tensor.name)
    if not all_finite(whole):
        raise CheckpointError(f"{source.path}: {tensor.name} holds NaN or infinity", "another checkpoint")
    if tensor.vocabulary:
        whole = pad(whole, shares[0].global_shape[0])
    for share in shares:
        shape = share.global_shape[share.prepend_axis_num :]
        if tuple(whole.shape) != tuple(shape):
            raise CheckpointError(f"{source.path}: {tensor.name} is {list(whole.shape)}, and the recipe's model has {list(shape)}", _OTHER)
        share.data.copy_(whole[share.global_slice()[share.prepend_axis_num :]])
        if not all_finite(share.data):
            most, kind = whole.abs().max().item(), NAMES[share.data.dtype]
            raise CheckpointError(f"{source.path}: {tensor.name} holds numbers up to {most:.3g}, which {kind} cannot", "training.precision=bf16")
