"""Llama 1 to 3 as Hugging Face has them: names, layouts and config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from checkpoints.folder import CheckpointError
from checkpoints.models import gpt
from checkpoints.models.config import expect, need, number, shared, whole
from checkpoints.models.layout import HALVES, SAME, Foreign, Layout, separate_qkv
from checkpoints.models.model import Model

PREFIX = "model."
AROUND = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_WITHIN: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("input_layernorm",),
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}
_ROTARY = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# What megatron-core's `rope_scaling` computes: Llama 3.1's rule with its own numbers.
_SCALING = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def foreign(model: Model) -> list[Foreign]:
    """Hugging Face's tensors of a Llama.

    Raises:
        CheckpointError: the model has something that LlamaForCausalLM has not.
    """
    expect(
        model, "Hugging Face's Llama",
        position_embedding_type="rope", rotary_percent=1.0, normalization="RMSNorm", swiglu=True,
        add_qkv_bias=model.add_bias_linear and model.add_qkv_bias,
    )  # fmt: skip
    layouts = {"self_attention.linear_qkv": separate_qkv(model), "mlp.linear_fc1": HALVES}
    return [named(tensor, AROUND, _WITHIN, layouts) for tensor in gpt.tensors(model)]


def named(tensor: gpt.Tensor, around: Mapping[str, str], within: Mapping[str, tuple[str, ...]], layouts: Mapping[str, Layout]) -> Foreign:
    """A tensor under the names of `model.layers.N.*`: `within` and `layouts` by megatron-core's modules."""
    if tensor.layer is None:
        return Foreign(tensor, (around[tensor.name],), SAME)
    module, kind = tensor.within.rsplit(".", 1)
    names = tuple(f"model.layers.{tensor.layer}.{name}.{kind}" for name in within[module])
    return Foreign(tensor, names, layouts.get(module, SAME))


def no_weight(name: str) -> str | None:
    """What a tensor is that is no weight, and may be there or not; None for a weight."""
    return "RoPE's frequencies" if _ROTARY.fullmatch(name) else None


def from_config(config: Mapping[str, Any], where: str) -> Model:
    """The model that a config.json describes.

    Raises:
        CheckpointError: a value is missing, or asks for what the engine does not compute.
    """
    need(config, where, hidden_act=("silu", "silu"), pretraining_tp=(1, 1), mlp_bias=(False, config.get("attention_bias", False)))
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings", "vocab_size")
    whole(config, where, *sizes, free=("num_key_value_heads", "head_dim"))
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    groups = config.get("num_key_value_heads") or heads
    shared(heads, groups, "num_attention_heads and num_key_value_heads", where)
    rope = rope_of(config, where)
    if (part := rope.get("partial_rotary_factor")) not in (None, 1.0):
        raise CheckpointError(
            f"{where}: the engine has no partial_rotary_factor={part!r}",
            f"mend {where} if that is wrong there: such a model is none of the engine's",
        )
    base = number(rope.get("rope_theta", 10000), "rope_theta", where)
    if not base.is_integer():
        raise CheckpointError(
            f"{where}: rope_theta {base} is no whole number",
            f"mend {where} if that is wrong there: such a model is none of the engine's",
        )
    values = {
        "family": "llama",
        "num_layers": config.get("num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": config.get("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": config.get("head_dim") or shared(hidden, heads, "hidden_size and num_attention_heads", where),
        "max_position_embeddings": config.get("max_position_embeddings"),
        "vocab_size": config.get("vocab_size"),
        "position_embedding_type": "rope",
        "rotary_base": int(base),
        "normalization": "RMSNorm",
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "swiglu": True,
        "add_bias_linear": config.get("attention_bias", False),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "init_method_std": config.get("initializer_range", 0.02),
        "attention_dropout": config.get("attention_dropout", 0.0),
        "hidden_dropout": 0.0,
    }
    return Model.of(values | _scaling(rope, where), where)


def rope_of(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """RoPE's numbers, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key) or {}, dict):
            raise CheckpointError(f"{where}: {key} is {config[key]!r}, and an object is wanted", f"mend {where}")
    older = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    found = older | (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    return found | {"rope_type": found.get("rope_type", found.get("type", "default"))}


def _scaling(rope: Mapping[str, Any], where: str) -> dict[str, Any]:
    if rope["rope_type"] == "default":
        return {}
    if wrong := [f"{key}={rope.get(key)!r}" for key, value in _SCALING.items() if rope.get(key) != value]:
        raise CheckpointError(
            f"{where}: of RoPE's scalings the engine has Llama 3's with its own numbers, and no {', '.join(wrong)}",
            f"mend {where} if that is wrong there: such a model is none of the engine's",
        )
    return {"use_rope_scaling": True, "rope_scaling_factor": number(rope.get("factor"), "rope_scaling's factor", where)}


def to_config(model: Model) -> dict[str, Any]:
    """The config.json of a model, as `transformers` 4 and 5 read it."""
    scaling = _SCALING | {"factor": model.rope_scaling_factor} if model.use_rope_scaling else None
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": float(model.rotary_base),
        "rope_scaling": scaling,
        "attention_bias": model.add_bias_linear,
        "mlp_bias": model.add_bias_linear,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
    }
