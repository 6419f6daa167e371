"""The model that Megatron-LM's saved settings describe: the `args` of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.models.model import Model


def model_of(args: Mapping[str, Any], where: str, **more: Any) -> Model:
    """The model of Megatron-LM's arguments; `more`, such as vocab_size, stands above them.

    Raises:
        CheckpointError: something is missing; `where` names the place.
    """
    heads = args.get("num_attention_heads")
    grouped = args.get("group_query_attention", True)
    derived = {
        "family": args.get("family") or _family(args),
        "num_query_groups": args.get("num_query_groups") if grouped else heads,
        "kv_channels": args.get("kv_channels") or (args["hidden_size"] // heads if args.get("hidden_size") and heads else None),
        "norm_epsilon": args.get("norm_epsilon") or args.get("layernorm_epsilon"),
        "rotary_base": int(args.get("rotary_base") or 10000),
        "num_layers": args.get("num_layers"),
    }
    derived["num_query_groups"] = derived["num_query_groups"] or heads
    return Model.of({**args, **{key: value for key, value in derived.items() if value is not None}}, where, **more)


def _family(args: Mapping[str, Any]) -> str:
    """Which family the settings are of, for checkpoints that do not say: names in other formats follow from it."""
    if args.get("use_lf_gate"):
        return "yuan2"
    return "llama" if args.get("position_embedding_type") == "rope" else "gpt2"
