"""Megatron-LM's saved settings, the `args` of a checkpoint: the model that they describe, and those that describe a model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from checkpoints.folder import UnsaidError
from checkpoints.models.config import number, shared, whole
from checkpoints.models.model import Model

if TYPE_CHECKING:
    import torch


def model_of(args: Mapping[str, Any], where: str, **more: Any) -> Model:
    """The model of Megatron-LM's arguments; `more`, such as vocab_size, stands above them.

    Raises:
        CheckpointError: something is missing; `where` names the place.
    """
    whole(args, where, free=("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"))
    heads = args.get("num_attention_heads")
    grouped = args.get("group_query_attention", True)
    derived = {
        "family": args.get("family") or _family(args),
        "num_query_groups": args.get("num_query_groups") if grouped else heads,
        "kv_channels": args.get("kv_channels") or (_channels(args, where) if args.get("hidden_size") and heads else None),
        "norm_epsilon": args.get("norm_epsilon") or args.get("layernorm_epsilon"),
        "rotary_base": int(number(args.get("rotary_base") or 10000, "rotary_base", where)),
        "num_layers": args.get("num_layers"),
    }
    derived["num_query_groups"] = derived["num_query_groups"] or heads
    return Model.of({**args, **{key: value for key, value in derived.items() if value is not None}}, where, **more)


def _channels(args: Mapping[str, Any], where: str) -> int:
    return shared(args["hidden_size"], args["num_attention_heads"], "hidden_size and num_attention_heads", where)


def _family(args: Mapping[str, Any]) -> str:
    """Which family the settings are of, for checkpoints that do not say: names in other formats follow from it."""
    if args.get("use_lf_gate"):
        return "yuan2"
    return "llama" if args.get("position_embedding_type") == "rope" else "gpt2"


def model_with_ids(args: Mapping[str, Any], where: str, vocab_size: int | None) -> Model:
    """`model_of` where nothing beside the weights says how many ids there are.

    Raises:
        CheckpointError: the settings do not say it either, or something else is missing.
    """
    ids = vocab_size or args.get("vocab_size")
    if args and not ids:
        rows = args.get("padded_vocab_size")
        raise UnsaidError(
            f"{where} says that its vocabulary was padded to {rows} rows, and not how many are ids: give --vocab-size",
            "--vocab-size N, as its tokenizer has",
        )
    return model_of(args, where, vocab_size=ids)


def args_of(model: Model, rows: int, dtypes: Iterable[torch.dtype], **more: Any) -> Namespace:
    """The settings that go with weights alone: what Megatron-LM looks at before it loads tensors, and the model itself.

    Args:
        rows: of the vocabulary's tables, padding included.
        dtypes: of the tensors.
        more: further settings, such as the ranks.
    """
    import torch

    found = set(dtypes)
    args = asdict(model) | {
        "add_position_embedding": model.position_embedding_type == "learned_absolute",
        "group_query_attention": model.num_query_groups != model.num_attention_heads,
        "seq_length": model.max_position_embeddings,
        "padded_vocab_size": rows,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "fp16": found == {torch.float16},
        "bf16": found == {torch.bfloat16},
    }
    return Namespace(**args | more)
