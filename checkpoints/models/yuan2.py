"""Yuan 2.0 as Hugging Face has it, whose names mislead:

    q_proj, k_proj    the upper and the lower half of the rows of one matrix that holds, head by head, query and key: so
                      q_proj is queries and keys of the first half of the heads
    up_proj           the half that goes through SiLU, which Llama calls gate
    gate_proj         the other one
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from checkpoints.models import gpt
from checkpoints.models.config import expect, need, shared, whole
from checkpoints.models.layout import HALVES, Foreign, Layout
from checkpoints.models.llama import AROUND, named
from checkpoints.models.model import Model

PREFIX = "model."
_WITHIN: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("input_layernorm",),
    "self_attention.linear_qk": ("self_attn.q_proj", "self_attn.k_proj"),
    "self_attention.linear_v": ("self_attn.v_proj",),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "self_attention.filter.conv1": ("self_attn.lf_gate.conv1",),
    "self_attention.filter.conv2": ("self_attn.lf_gate.conv2",),
    "self_attention.filter.norm": ("self_attn.lf_gate.output_layernorm",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
    "mlp.linear_fc1": ("mlp.up_proj", "mlp.gate_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}
_ROTARY = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
CONV2D = Layout(lambda whole: [whole[..., None]], lambda pieces: pieces[0][..., 0])  # [out, in, 2, 1], a kernel over tokens


def foreign(model: Model) -> list[Foreign]:
    """Hugging Face's tensors of a Yuan 2.0.

    Raises:
        CheckpointError: the model has something that Yuan's modelling code has not.
    """
    expect(
        model, "Yuan 2.0 at Hugging Face",
        position_embedding_type="rope", rotary_percent=1.0, rotary_base=10000, normalization="RMSNorm", swiglu=True,
        add_bias_linear=False, add_qkv_bias=False, num_query_groups=model.num_attention_heads, use_rope_scaling=False,
    )  # fmt: skip
    layouts = {"self_attention.linear_qk": HALVES, "mlp.linear_fc1": HALVES}
    found = []
    for tensor in gpt.tensors(model):
        conv = len(tensor.shape) == 3
        found.append(named(tensor, AROUND, _WITHIN, {tensor.within.rsplit(".", 1)[0]: CONV2D} if conv else layouts))
    return found


def no_weight(name: str) -> str | None:
    """What a tensor is that is no weight, and may be there or not; None for a weight."""
    return "RoPE's frequencies" if _ROTARY.fullmatch(name) else None


def from_config(config: Mapping[str, Any], where: str) -> Model:
    """The model that a config.json describes.

    Raises:
        CheckpointError: a value is missing, or asks for what the engine does not compute.
    """
    need(config, where, hidden_act=("silu", "silu"), use_shareqk=(False, False))
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings", "vocab_size")
    whole(config, where, *sizes)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    values = {
        "family": "yuan2",
        "num_layers": config.get("num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": config.get("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": shared(hidden, heads, "hidden_size and num_attention_heads", where),
        "max_position_embeddings": config.get("max_position_embeddings"),
        "vocab_size": config.get("vocab_size"),
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", True),
        "init_method_std": config.get("initializer_range", 0.02),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    return Model.of(values, where)


def to_config(model: Model) -> dict[str, Any]:
    """The config.json of a model, for the modelling code that Yuan 2.0 is published with."""
    return {
        "architectures": ["YuanForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_yuan.YuanConfig", "AutoModelForCausalLM": "yuan_hf_model.YuanForCausalLM"},
        "model_type": "yuan",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_method_std,
        "use_cache": True,
        "causal_mask": True,
        "use_flash_attention": False,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
    }
