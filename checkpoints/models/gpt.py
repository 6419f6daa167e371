"""The tensors of megatron-core's GPTModel, for every choice of norms, biases, positions and heads; Yuan's filter too."""

from __future__ import annotations

from collections.abc import Iterator

from checkpoints.models.model import Model
from checkpoints.models.tensor import Tensor

SCALE = "weight_scale"  # of a quantized weight: a number for each output, by which the whole row is multiplied


def tensors(model: Model) -> list[Tensor]:
    """Every trainable tensor of the model once, in the order in which it computes; of tied weights the embedding."""
    table = (model.vocab_size, model.hidden_size)
    found = [Tensor("embedding.word_embeddings.weight", table, axis=0, vocabulary=True)]
    if model.position_embedding_type == "learned_absolute":
        found.append(Tensor("embedding.position_embeddings.weight", (model.max_position_embeddings, model.hidden_size)))
    for number in range(model.num_layers):
        found += _layer(model, f"decoder.layers.{number}.")
    found += _norm(model, "decoder.final_layernorm.")
    if model.untie_embeddings_and_output_weights:
        found.append(Tensor("output_layer.weight", table, axis=0, vocabulary=True))
    return found


def _layer(model: Model, at: str) -> Iterator[Tensor]:
    yield from _norm(model, f"{at}input_layernorm.")
    yield from (_filtered if model.family == "yuan2" else _attention)(model, f"{at}self_attention.")
    yield from _norm(model, f"{at}pre_mlp_layernorm.")
    up = model.ffn_hidden_size * (2 if model.swiglu else 1)
    yield from _columns(model, f"{at}mlp.linear_fc1.", up, model.hidden_size, model.add_bias_linear, parts=2 if model.swiglu else 1)
    yield from _rows(model, f"{at}mlp.linear_fc2.", model.hidden_size, model.ffn_hidden_size, model.add_bias_linear)


def _attention(model: Model, at: str) -> Iterator[Tensor]:
    """Rows of linear_qkv: group by group the queries of the group's heads, its key, its value. Groups are shared out."""
    query, key = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    bias = model.add_bias_linear or model.add_qkv_bias
    yield from _columns(model, f"{at}linear_qkv.", query + 2 * key, model.hidden_size, bias)
    yield from _rows(model, f"{at}linear_proj.", model.hidden_size, query, model.add_bias_linear)


def _filtered(model: Model, at: str) -> Iterator[Tensor]:
    """Yuan 2.0's attention: rows of linear_qk are head by head the query, the key; the filter is whole on every rank."""
    hidden, heads = model.hidden_size, model.num_attention_heads * model.kv_channels
    yield from _columns(model, f"{at}linear_qk.", 2 * heads, hidden, False)
    yield from _columns(model, f"{at}linear_v.", heads, hidden, False)
    yield from _rows(model, f"{at}linear_proj.", hidden, heads, False)
    yield Tensor(f"{at}filter.conv1.weight", (hidden // 2, hidden, 2))
    yield Tensor(f"{at}filter.conv1.bias", (hidden // 2,))
    yield Tensor(f"{at}filter.conv2.weight", (hidden, hidden // 2, 2))
    yield Tensor(f"{at}filter.conv2.bias", (hidden,))
    yield Tensor(f"{at}filter.norm.weight", (hidden,))


def _norm(model: Model, at: str) -> Iterator[Tensor]:
    yield Tensor(f"{at}weight", (model.hidden_size,))
    if model.normalization == "LayerNorm":
        yield Tensor(f"{at}bias", (model.hidden_size,))


def _columns(model: Model, at: str, rows: int, columns: int, bias: bool, parts: int = 1) -> Iterator[Tensor]:
    """A linear layer whose outputs are shared out (megatron-core's ColumnParallelLinear): weight [out, in], bias [out]."""
    yield Tensor(f"{at}weight", (rows, columns), axis=0, parts=parts)
    if model.quantize:
        yield Tensor(f"{at}{SCALE}", (rows,), axis=0, parts=parts)
    if bias:
        yield Tensor(f"{at}bias", (rows,), axis=0, parts=parts)


def _rows(model: Model, at: str, rows: int, columns: int, bias: bool) -> Iterator[Tensor]:
    """A linear layer whose inputs are shared out (RowParallelLinear): each rank adds to all outputs, one adds the bias."""
    yield Tensor(f"{at}weight", (rows, columns), axis=1)
    if model.quantize:
        yield Tensor(f"{at}{SCALE}", (rows,))
    if bias:
        yield Tensor(f"{at}bias", (rows,))
