"""GPT-2 as Hugging Face has it: names, layouts and config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from checkpoints.folder import CheckpointError
from checkpoints.models import gpt
from checkpoints.models.config import expect, need, shared, whole
from checkpoints.models.layout import SAME, TRANSPOSED, Foreign, Layout, appended, separate_qkv, then
from checkpoints.models.model import Model

PREFIX = "transformer."  # of every name; the files of OpenAI's own weights leave it out
_AROUND = {
    "embedding.word_embeddings.weight": "transformer.wte.weight",
    "embedding.position_embeddings.weight": "transformer.wpe.weight",
    "decoder.final_layernorm.weight": "transformer.ln_f.weight",
    "decoder.final_layernorm.bias": "transformer.ln_f.bias",
    "output_layer.weight": "lm_head.weight",
}
_WITHIN = {
    "input_layernorm": "ln_1",
    "self_attention.linear_qkv": "attn.c_attn",
    "self_attention.linear_proj": "attn.c_proj",
    "pre_mlp_layernorm": "ln_2",
    "mlp.linear_fc1": "mlp.c_fc",
    "mlp.linear_fc2": "mlp.c_proj",
}
_MASKS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")
_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def foreign(model: Model) -> list[Foreign]:
    """Hugging Face's tensors of a GPT-2.

    Raises:
        CheckpointError: the model has something that GPT2LMHeadModel has not.
    """
    expect(
        model, "Hugging Face's GPT-2",
        position_embedding_type="learned_absolute", normalization="LayerNorm", swiglu=False, add_bias_linear=True,
        num_query_groups=model.num_attention_heads, kv_channels=model.hidden_size // model.num_attention_heads,
    )  # fmt: skip
    found = []
    for tensor in gpt.tensors(model):
        if tensor.layer is None:
            found.append(Foreign(tensor, (_AROUND[tensor.name],), SAME))
        else:
            module, kind = tensor.within.rsplit(".", 1)
            name = f"transformer.h.{tensor.layer}.{_WITHIN[module]}.{kind}"
            found.append(Foreign(tensor, (name,), _layout(model, module, kind)))
    return found


def _layout(model: Model, module: str, kind: str) -> Layout:
    """Conv1D holds the transposed matrix; query, key and value lie one after another in c_attn."""
    layout = SAME
    if module.endswith("linear_qkv"):
        layout = appended(separate_qkv(model), [model.hidden_size] * 3)
    return then(layout, TRANSPOSED) if kind == "weight" and "linear" in module else layout


def no_weight(name: str) -> str | None:
    """What a tensor is that is no weight, and may be there or not; None for a weight."""
    return "the causal mask" if _MASKS.fullmatch(name) else None


def from_config(config: Mapping[str, Any], where: str) -> Model:
    """The model that a config.json describes.

    Raises:
        CheckpointError: a value is missing, or asks for what the engine does not compute.
    """
    need(config, where, scale_attn_weights=(True, True), scale_attn_by_inverse_layer_idx=(False, False), add_cross_attention=(False, False))
    activation = config.get("activation_function", "gelu_new")
    if activation not in (*_TANH, "gelu"):
        raise CheckpointError(
            f"{where}: activation_function {activation!r} is none of {', '.join(_TANH)} and gelu",
            f"mend {where} if that is wrong there: such a model is none of the engine's",
        )
    positions = "n_positions" if "n_positions" in config else "n_ctx"
    whole(config, where, "n_layer", "n_embd", "n_head", positions, "vocab_size", free=("n_inner",))
    hidden, heads = config["n_embd"], config["n_head"]
    values = {
        "family": "gpt2",
        "num_layers": config["n_layer"],
        "hidden_size": hidden,
        "ffn_hidden_size": config.get("n_inner") or 4 * hidden,
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": shared(hidden, heads, "n_embd and n_head", where),
        "max_position_embeddings": config[positions],
        "vocab_size": config["vocab_size"],
        "norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "openai_gelu": activation in _TANH,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", True),
        "init_method_std": config.get("initializer_range", 0.02),
        "attention_dropout": config.get("attn_pdrop", 0.1),
        "hidden_dropout": config.get("resid_pdrop", 0.1),
    }
    return Model.of(values, where)


def to_config(model: Model) -> dict[str, Any]:
    """The config.json of a model, as `transformers` reads it."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_positions": model.max_position_embeddings,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_hidden_size,
        "activation_function": "gelu_new" if model.openai_gelu else "gelu",
        "layer_norm_epsilon": model.norm_epsilon,
        "initializer_range": model.init_method_std,
        "attn_pdrop": model.attention_dropout,
        "embd_pdrop": model.hidden_dropout,
        "resid_pdrop": model.hidden_dropout,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
    }
