"""How large the model of a recipe is: its numbers, and the arithmetic of a token."""

from __future__ import annotations

from typing import NamedTuple

from launcher.recipe.schema import Recipe

# Tokens whose logits exist together. Every chunk reads and writes the gradient of the vocabulary's table once: 10 / ROWS of
# the time of its products on a CPU (2 % at 512); a GPU multiplies forty times as fast for each byte that it moves.
LOGIT_ROWS = {"cpu": 512, "cuda": 4096}


class Widths(NamedTuple):
    """Columns of a layer's activations, over all tensor-parallel ranks."""

    hidden: int
    query: int  # heads x channels
    key: int  # groups x channels: of the keys, and once more of the values
    up: int  # what the feed-forward layer's first matrix gives: twice its width with a gate
    ffn: int


def widths(recipe: Recipe) -> Widths:
    """The widths of one layer."""
    m = recipe.model
    query, key = m.num_attention_heads * m.kv_channels, m.num_query_groups * m.kv_channels
    return Widths(m.hidden_size, query, key, m.ffn_hidden_size * (2 if m.swiglu else 1), m.ffn_hidden_size)


def parameters(recipe: Recipe) -> int:
    """Trainable numbers of the whole model, the padded vocabulary's included."""
    m = recipe.model
    tables = 2 if m.untie_embeddings_and_output_weights else 1
    around = tables * vocabulary_table(recipe) + position_table(recipe) + norm(recipe)
    return m.num_layers * sum(layer_parameters(recipe)) + around


def layer_parameters(recipe: Recipe) -> tuple[int, int]:
    """Trainable numbers of one layer: those that the tensor-parallel ranks share out, and those that each holds whole."""
    m, w = recipe.model, widths(recipe)
    qkv = w.query + 2 * w.key
    shared = w.hidden * (qkv + w.query + w.up + w.ffn)
    whole = 2 * norm(recipe)
    if m.add_bias_linear:
        shared, whole = shared + qkv + w.up, whole + 2 * w.hidden
    elif m.add_qkv_bias:
        shared += qkv
    if m.family == "yuan2":  # the filter: two convolutions over two tokens, h to h/2 to h, with biases, and a norm
        whole += filter_products(recipe) + w.hidden // 2 + w.hidden + norm(recipe)
    return shared, whole


def norm(recipe: Recipe) -> int:
    """Trainable numbers of one norm."""
    return recipe.model.hidden_size * (2 if recipe.model.normalization == "LayerNorm" else 1)


def vocabulary_table(recipe: Recipe) -> int:
    """Numbers of the embedding, or of the output layer; the tensor-parallel ranks share them out."""
    return recipe.derived.padded_vocab_size * recipe.model.hidden_size


def position_table(recipe: Recipe) -> int:
    """Numbers of the learned positions; every rank of the first stage holds them whole."""
    learned = recipe.model.position_embedding_type == "learned_absolute"
    return recipe.model.max_position_embeddings * recipe.model.hidden_size if learned else 0


def flops_per_token(recipe: Recipe) -> float:
    """Floating-point operations of one training step per token: forward plus twice that for backward.

    Megatron-LM's count: 2 per multiply-add of every matrix product, the logits and the causal half of the attention
    included (Narayanan et al. 2021, arXiv 2104.04473, with half of its attention term). Recomputation is not counted.
    """
    return 6.0 * (recipe.model.num_layers * layer_products(recipe) + vocabulary_table(recipe))


def layer_products(recipe: Recipe) -> int:
    """Multiply-adds of one layer's forward pass per token."""
    w = widths(recipe)
    matrices = w.hidden * (2 * w.query + 2 * w.key + w.up + w.ffn)
    scores = w.query * recipe.training.seq_length  # QK^T and PV over s / 2 keys on average
    return matrices + scores + filter_products(recipe)


def filter_products(recipe: Recipe) -> int:
    """Of these the filter's: its matrices are whole on every tensor-parallel rank."""
    return 2 * recipe.model.hidden_size**2 if recipe.model.family == "yuan2" else 0
