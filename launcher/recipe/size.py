"""How large the model of a recipe is: its numbers, and the arithmetic of a token."""

from __future__ import annotations

from typing import NamedTuple

from launcher.recipe.schema import Recipe

# Tokens whose logits exist together. Every chunk reads and writes the gradient of the vocabulary's table once: 10 / ROWS of
# the time of its products on a CPU (2 % at 512); a GPU multiplies forty times as fast for each byte that it moves.
LOGIT_ROWS = {"cpu": 512, "cuda": 4096}


def loss_ids(recipe: Recipe) -> int | None:
    """How many ids the softmax of the loss runs over; None: all rows, those that pad the vocabulary too, as in Megatron-LM.
    Weights from elsewhere often had no padding, or it is frozen: then it has no share."""
    return recipe.derived.vocab_size if recipe.data.train is not None or recipe.lora.rank else None


def whole_logits(recipe: Recipe) -> bool:
    """Whether megatron-core's loss takes the logits of a micro-batch whole, as a GPU has room for; else chunk by chunk."""
    tokens = recipe.training.micro_batch_size * recipe.training.seq_length
    return recipe.derived.device == "cuda" and tokens <= LOGIT_ROWS["cuda"] and loss_ids(recipe) is None


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


class Matrix(NamedTuple):
    """One matrix of a layer, over all tensor-parallel ranks, which share out its inputs (`by_inputs`) or else its outputs."""

    inputs: int
    outputs: int
    by_inputs: bool


def matrix_names(family: str) -> tuple[str, ...]:
    """megatron-core's names of a layer's matrices; with Yuan's filter queries and keys have another input than values."""
    return (*(("linear_qk", "linear_v") if family == "yuan2" else ("linear_qkv",)), "linear_proj", "linear_fc1", "linear_fc2")


def matrices(recipe: Recipe) -> dict[str, Matrix]:
    """The matrices of a layer, by `matrix_names`."""
    w = widths(recipe)
    columns = (w.query + w.key, w.key) if recipe.model.family == "yuan2" else (w.query + 2 * w.key,)
    found = [*(Matrix(w.hidden, width, False) for width in columns), Matrix(w.query, w.hidden, True)]
    found += [Matrix(w.hidden, w.up, False), Matrix(w.ffn, w.hidden, True)]
    return dict(zip(matrix_names(recipe.model.family), found, strict=True))


def adapted(recipe: Recipe) -> list[Matrix]:
    """The matrices of a layer that have adapters; none where all weights are trained."""
    r = recipe.lora
    return [one for name, one in matrices(recipe).items() if name in (r.target_modules or ())] if r.rank else []


def adapter_parameters(recipe: Recipe) -> tuple[int, int]:
    """Numbers of one layer's adapters: those that the tensor-parallel ranks share out, and those that each holds whole."""
    shared = sum(one.inputs if one.by_inputs else one.outputs for one in adapted(recipe))
    whole = sum(one.outputs if one.by_inputs else one.inputs for one in adapted(recipe))
    return (recipe.lora.rank or 0) * shared, (recipe.lora.rank or 0) * whole


def trained_parameters(recipe: Recipe) -> int:
    """Numbers that are trained: all of the model's, or those of its adapters alone."""
    return recipe.model.num_layers * sum(adapter_parameters(recipe)) if recipe.lora.rank else parameters(recipe)


def parameters(recipe: Recipe) -> int:
    """Numbers of the whole model, the padded vocabulary's included, adapters not."""
    m = recipe.model
    tables = 2 if m.untie_embeddings_and_output_weights else 1
    around = tables * vocabulary_table(recipe) + position_table(recipe) + norm(recipe)
    return m.num_layers * sum(layer_parameters(recipe)) + around


def layer_parameters(recipe: Recipe) -> tuple[int, int]:
    """Numbers of one layer: those that the tensor-parallel ranks share out, and those that each holds whole."""
    m, w = recipe.model, widths(recipe)
    qkv = w.query + 2 * w.key
    shared = sum(one.inputs * one.outputs for one in matrices(recipe).values())
    whole = 2 * norm(recipe)
    if m.add_bias_linear:
        shared, whole = shared + qkv + w.up, whole + 2 * w.hidden
    elif m.add_qkv_bias:
        shared += qkv
    if m.family == "yuan2":  # the filter: two convolutions over two tokens, h to h/2 to h, with biases, and a norm
        whole += filter_products(recipe) + w.hidden // 2 + w.hidden + norm(recipe)
    return shared, whole


def norm(recipe: Recipe) -> int:
    """Numbers of one norm."""
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
    A frozen matrix has no gradient: 4 for 6, and 6 for its adapters.
    """
    layers = recipe.model.num_layers
    whole = 6.0 * (layers * layer_products(recipe) + vocabulary_table(recipe))
    if not recipe.lora.rank:
        return whole
    frozen = layers * (layer_products(recipe) - scores(recipe)) + vocabulary_table(recipe)
    return whole - 2.0 * frozen + 6.0 * trained_parameters(recipe)


def layer_products(recipe: Recipe) -> int:
    """Multiply-adds of one layer's forward pass per token."""
    return sum(one.inputs * one.outputs for one in matrices(recipe).values()) + scores(recipe) + filter_products(recipe)


def scores(recipe: Recipe) -> int:
    """Of these the attention's: QK^T and PV over s / 2 keys on average."""
    return widths(recipe).query * recipe.training.seq_length


def filter_products(recipe: Recipe) -> int:
    """Of these the filter's: its matrices are whole on every tensor-parallel rank."""
    return 2 * recipe.model.hidden_size**2 if recipe.model.family == "yuan2" else 0
