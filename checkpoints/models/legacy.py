"""Megatron-LM's models of before megatron-core: their names, which Yuan 2.0 and Pai-Megatron-Patch have too.

Yuan 2.0's attention is its own, and some of its numbers stand in its code. Pai's first release for Llama keeps gate and up,
and query and key/value of grouped attention, in tensors of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.folder import CheckpointError
from checkpoints.models import gpt
from checkpoints.models.config import expect
from checkpoints.models.layout import HALVES, SAME, Foreign, Layout, separate_qkv
from checkpoints.models.model import Model
from checkpoints.models.tensor import Tensor
from checkpoints.models.yuan2 import CONV2D

EMBEDDING, HEAD, TIED = (
    "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight", "word_embeddings_for_head.weight",
)  # fmt: skip
_POSITIONS, _LAYER = "language_model.embedding.position_embeddings.weight", "language_model.encoder.layers.0."
_AROUND = {
    "embedding.word_embeddings.weight": EMBEDDING,
    "embedding.position_embeddings.weight": _POSITIONS,
    "decoder.final_layernorm.weight": "language_model.encoder.final_layernorm.weight",
    "decoder.final_layernorm.bias": "language_model.encoder.final_layernorm.bias",
    "output_layer.weight": HEAD,
}
_WITHIN: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("input_layernorm",),
    "self_attention.linear_qkv": ("self_attention.query_key_value",),
    "self_attention.linear_qk": ("self_attention.get_query_key",),
    "self_attention.linear_v": ("self_attention.get_value",),
    "self_attention.linear_proj": ("self_attention.dense",),
    "self_attention.filter.conv1": ("self_attention.lf_gate.conv1",),
    "self_attention.filter.conv2": ("self_attention.lf_gate.conv2",),
    "self_attention.filter.norm": ("self_attention.lf_gate.output_layernorm",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
    "mlp.linear_fc1": ("mlp.dense_h_to_4h",),
    "mlp.linear_fc2": ("mlp.dense_4h_to_h",),
}
_SEPARATE: dict[str, tuple[str, ...]] = {
    "self_attention.linear_qkv": ("self_attention.query", "self_attention.key_value"),
    "mlp.linear_fc1": ("mlp.dense_h_to_4h_1", "mlp.dense_h_to_4h_2"),
}
# Names of other releases, by which the same tensors go.
ALIASES = {
    "language_model.transformer.": "language_model.encoder.",
    ".attention.": ".self_attention.",
    ".input_norm.": ".input_layernorm.",
    ".post_attention_norm.": ".post_attention_layernorm.",
    ".final_norm.": ".final_layernorm.",
}


def foreign(model: Model, separate_mlp: bool = False, separate_attention: bool = False) -> list[Foreign]:
    """The tensors of a model under these names, layers counted over all stages."""
    separate = {"self_attention.linear_qkv": separate_attention, "mlp.linear_fc1": separate_mlp}
    layouts = {"self_attention.linear_qkv": separate_qkv(model, (2,)), "mlp.linear_fc1": HALVES}
    found = []
    for tensor in gpt.tensors(model):
        if tensor.layer is None:
            found.append(Foreign(tensor, (_AROUND[tensor.name],), SAME))
            continue
        module, kind = tensor.within.rsplit(".", 1)
        apart = separate.get(module, False)
        names = (_SEPARATE if apart else _WITHIN)[module]
        layout: Layout = layouts[module] if apart else CONV2D if len(tensor.shape) == 3 else SAME
        found.append(Foreign(tensor, tuple(f"language_model.encoder.layers.{tensor.layer}.{name}.{kind}" for name in names), layout))
    return found


def expect_yuan(model: Model) -> None:
    """The model must be one that Yuan 2.0's code computes.

    Raises:
        CheckpointError: naming every value that it has not.
    """
    expect(
        model, "Yuan 2.0",
        family="yuan2", position_embedding_type="rope", rotary_percent=1.0, rotary_base=10000, normalization="RMSNorm", norm_epsilon=1e-6,
        swiglu=True, add_bias_linear=False, add_qkv_bias=False, num_query_groups=model.num_attention_heads, use_rope_scaling=False,
    )  # fmt: skip


def model_of(
    args: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], ranks: int, stages: int, where: str, vocab_size: int | None
) -> Model:
    """The model of a checkpoint that no config.json describes, by its settings and the tensors of its first layer.

    Args:
        shapes: of each tensor-parallel rank's share, by name.
        ranks, stages: of tensor and pipeline parallelism, as there are files.
        vocab_size: ids; else all rows of the embedding count, as in the converters of Yuan 2.0 and Pai.

    Raises:
        CheckpointError: what neither says is named, with the way to say it; the two contradict each other, as they do where
            tensor-parallel ranks are missing at the end.
    """
    heads = args.get("num_attention_heads")
    if not heads or f"{_LAYER}self_attention.dense.weight" not in shapes or EMBEDDING not in shapes:
        raise CheckpointError(f"{where} does not say what the model is", "--hf-config FOLDER, with its config.json")
    said = {"norm_epsilon": args.get("layernorm_epsilon"), "max_position_embeddings": args.get("seq_length")}
    shown = _of_tensors(shapes, ranks, heads)
    _agree(args, shown, ranks, stages, where)
    values = {**said, **{key: value for key, value in args.items() if value is not None}, **shown}
    if values["family"] == "yuan2":  # numbers of its code, whatever its settings say
        values |= {"norm_epsilon": 1e-6, "rotary_base": 10000}
    turned = ["rotary_base"] * (values["position_embedding_type"] == "rope")
    if unsaid := [name for name in ("norm_epsilon", "max_position_embeddings", *turned) if not values.get(name)]:
        raise CheckpointError(f"{where} does not say {', '.join(unsaid)}", "--hf-config FOLDER, with its config.json")
    return Model.of(values, where, vocab_size=vocab_size or values["rows"])


def _agree(args: Mapping[str, Any], shown: Mapping[str, Any], ranks: int, stages: int, where: str) -> None:
    """What settings say must be what the tensors show: those of half of the ranks are a model too, of half the heads' size.

    How many stages there are matters only where the settings count no layers: blocks and stages put together explain others.
    """
    there = {**shown, "padded_vocab_size": shown["rows"], "tensor_model_parallel_size": ranks, "pipeline_model_parallel_size": stages}
    said = {**args, "kv_channels": args.get("kv_channels") or shown["hidden_size"] // args["num_attention_heads"]}
    names = ["tensor_model_parallel_size", "num_layers", "hidden_size", "kv_channels", "ffn_hidden_size", "padded_vocab_size"]
    names += [] if args.get("num_layers") else ["pipeline_model_parallel_size"]
    others = [f"{name} {said[name]}, the files hold {there[name]}" for name in names if said.get(name) and said[name] != there[name]]
    if not others:
        return
    wanted = said.get("tensor_model_parallel_size") or ranks
    missing = [f"mp_rank_{rank:02d}" + ("_*" if stages > 1 else "") for rank in range(ranks, wanted)]
    mend = "if the settings are those of another layout or model: --hf-config FOLDER, with the model's config.json"
    if missing:
        mend = f"copy what is missing: {', '.join(missing)}"
    raise CheckpointError(f"{where} contradicts the tensors: it says {'; '.join(others)}", mend)


def _of_tensors(shapes: Mapping[str, tuple[int, ...]], ranks: int, heads: int) -> dict[str, Any]:
    """What the tensors of the first layer and around the layers show of a model."""

    def size(name: str, axis: int) -> int:
        return shapes[_LAYER + name][axis] * ranks

    yuan = f"{_LAYER}self_attention.get_query_key.weight" in shapes
    channels = size("self_attention.dense.weight", 1) // heads
    if f"{_LAYER}self_attention.key_value.weight" in shapes:
        groups = size("self_attention.key_value.weight", 0) // (2 * channels)
    else:
        groups = heads if yuan else (size("self_attention.query_key_value.weight", 0) // channels - heads) // 2
    separate = f"{_LAYER}mlp.dense_h_to_4h_1.weight" in shapes
    ffn = size("mlp.dense_4h_to_h.weight", 1)
    bias = f"{_LAYER}self_attention.dense.bias" in shapes
    learned = _POSITIONS in shapes
    return {
        "family": "yuan2" if yuan else "gpt2" if learned else "llama",
        "num_layers": sum(name.endswith(".input_layernorm.weight") for name in shapes),
        "hidden_size": shapes[f"{_LAYER}input_layernorm.weight"][0],
        "ffn_hidden_size": ffn,
        "num_query_groups": groups,
        "kv_channels": channels,
        "swiglu": separate or size("mlp.dense_h_to_4h.weight", 0) == 2 * ffn,
        "normalization": "LayerNorm" if f"{_LAYER}input_layernorm.bias" in shapes else "RMSNorm",
        "add_bias_linear": bias,
        "add_qkv_bias": not bias and f"{_LAYER}self_attention.query_key_value.bias" in shapes,
        "position_embedding_type": "learned_absolute" if learned else "rope",
        "untie_embeddings_and_output_weights": HEAD in shapes,
        "rows": shapes[EMBEDDING][0] * ranks,
    } | ({"max_position_embeddings": shapes[_POSITIONS][0]} if learned else {})


def pieces(foreign: Foreign) -> list[Tensor]:
    """The other format's tensors of one of ours, and how tensor-parallel ranks share each out."""
    one = foreign.tensor
    parts = one.parts if len(foreign.names) == 1 else 1
    return [Tensor(name, shape, one.axis, parts, one.vocabulary) for name, shape in foreign.shapes().items()]
