"""Bytes that one layer keeps for its backward pass, for one micro-batch, on one rank.

What autograd saves in megatron-core's modules as launcher/engine builds them. A GPU fuses the activation function and
the attention (Transformer Engine or torch); a CPU the attention alone.
Reference: Korthikanti et al. 2022 (arXiv 2205.05198), whose sbh(10 + 24/t + 5as/ht) is the case of GPT-2 in 16 bits
with dropout and unfused attention on a GPU.
"""

from __future__ import annotations

from launcher.recipe.schema import Recipe
from launcher.recipe.size import adapted, matrices, widths

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
DROPOUT_ROWS = 128  # launcher/engine/attention.py: queries per block
STATISTIC = 4  # softmax and norms keep theirs in fp32


def tokens(recipe: Recipe) -> int:
    """Tokens of one micro-batch."""
    return recipe.training.micro_batch_size * recipe.training.seq_length


def boundary(recipe: Recipe) -> int:
    """Bytes of the residual stream of one micro-batch: what passes between layers and between stages."""
    p = recipe.parallel
    share = p.tensor_model_parallel_size if p.sequence_parallel else 1
    return tokens(recipe) * recipe.model.hidden_size * BYTES[recipe.training.precision] // share


def layer(recipe: Recipe) -> int:
    """All that a layer keeps that recomputes nothing, or its attention alone (`selective`)."""
    selective = recipe.parallel.recompute_granularity == "selective"
    kept = _residual(recipe) + _attention(recipe) + _feed_forward(recipe) + (0 if selective else core_attention(recipe))
    return kept + (_adapters(recipe) if recipe.lora.rank else 0)


def _adapters(recipe: Recipe) -> int:
    """What adapters keep, r numbers a token and with dropout its mask, less the inputs that frozen matrices without them do
    not keep. A norm of yuan2 goes into the filter too, and the attention keeps its context itself."""
    r, tp, size = recipe.lora, recipe.parallel.tensor_model_parallel_size, BYTES[recipe.training.precision]
    kept = tokens(recipe) * r.rank * size * len(adapted(recipe))
    for name, one in matrices(recipe).items():
        width = tokens(recipe) * one.inputs * size // tp if one.by_inputs else boundary(recipe)
        if name in r.target_modules:
            kept += width // (size if recipe.derived.device == "cuda" else 1) if r.dropout else 0
        elif name not in ("linear_v", "linear_proj"):
            kept -= width
    return kept


def dropout_mask(recipe: Recipe) -> int:
    """What a dropout on the residual stream keeps: a GPU's mask has a byte for each number, a CPU's is as wide as these."""
    if not recipe.model.hidden_dropout:
        return 0
    return boundary(recipe) // (BYTES[recipe.training.precision] if recipe.derived.device == "cuda" else 1)


def norm(recipe: Recipe) -> int:
    """Input and output of a norm. On a CPU torch's RMSNorm is made of several operations, in fp32, and keeps one more for the
    gradient of its weight."""
    stream = boundary(recipe)
    if recipe.model.normalization == "LayerNorm" or recipe.derived.device == "cuda":
        return 2 * stream
    return stream + (1 if recipe.lora.rank else 2) * stream * STATISTIC // BYTES[recipe.training.precision]


def _residual(recipe: Recipe) -> int:
    """Both norms and both dropouts on the residual stream; with Yuan's filter its convolutions and its norm."""
    filtered = 0
    if recipe.model.family == "yuan2":  # h/2 between the convolutions, their sum with the input, its norm
        filtered = boundary(recipe) // 2 + norm(recipe)
    return 2 * norm(recipe) + 2 * dropout_mask(recipe) + filtered


def _attention(recipe: Recipe) -> int:
    """Query, key, value and the context that goes into the output projection."""
    m, w, tp = recipe.model, widths(recipe), recipe.parallel.tensor_model_parallel_size
    columns = w.query + 2 * w.key + w.query  # value is a view, and keeps the product of the qkv matrix alive
    if m.position_embedding_type == "rope":
        columns += w.query + w.key
    elif w.query != w.key:
        columns += w.query  # grouped queries are not evenly spaced in that product: they are copied out
    return tokens(recipe) * columns * BYTES[recipe.training.precision] // tp


def core_attention(recipe: Recipe) -> int:
    """What the attention keeps between query, key, value and context: all of it quadratic in s where it is not fused; on a
    CPU a fused one with dropout (launcher/engine/attention.py) its mask up to the diagonal, and the context once more."""
    m, t, tp = recipe.model, recipe.training, recipe.parallel.tensor_model_parallel_size
    size = BYTES[t.precision]
    if fused_attention(recipe):
        if m.attention_dropout and recipe.derived.device == "cpu":
            repeated = 2 * (widths(recipe).query if m.num_query_groups < m.num_attention_heads else 0)
            seen = (t.seq_length + min(t.seq_length, DROPOUT_ROWS)) // 2
            return tokens(recipe) * (m.num_attention_heads * seen + (widths(recipe).query + repeated) * size) // tp
        masks = document_mask(recipe) * (1 + size) if recipe.derived.device == "cuda" else 0  # as bool and as floats
        return tokens(recipe) * m.num_attention_heads * STATISTIC // tp + masks
    probabilities = STATISTIC if m.attention_softmax_in_fp32 else size
    dropout = 2 * size if recipe.derived.device == "cpu" else 1 + size
    repeated = 2 * tokens(recipe) * widths(recipe).query * size // tp if m.num_query_groups < m.num_attention_heads else 0
    return scores(recipe) * (probabilities + (dropout if m.attention_dropout else 0)) + repeated


def document_mask(recipe: Recipe) -> int:
    """The mask that keeps documents apart, a byte for each pair of tokens: a GPU's attention makes one in each layer, a CPU's attends
    to each document by itself."""
    return recipe.training.seq_length * tokens(recipe) if recipe.data.reset_attention_mask else 0


def fused_attention(recipe: Recipe) -> bool:
    """Whether the attention is one kernel that writes no s x s matrix (launcher/engine/layers.py)."""
    return recipe.model.attention_backend != "unfused"


def scores(recipe: Recipe) -> int:
    """Numbers of the attention matrix of one layer and micro-batch."""
    heads = recipe.model.num_attention_heads // recipe.parallel.tensor_model_parallel_size
    return heads * recipe.training.seq_length * tokens(recipe)


def _feed_forward(recipe: Recipe) -> int:
    """The activation function's input and output; a gate that is not fused keeps both its factors as well."""
    w, tp = widths(recipe), recipe.parallel.tensor_model_parallel_size
    columns = w.up + w.ffn
    if recipe.model.swiglu and recipe.derived.device == "cpu" and not recipe.training.torch_compile:
        columns += 2 * w.ffn
    return tokens(recipe) * columns * BYTES[recipe.training.precision] // tp
