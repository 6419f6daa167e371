"""How large the model of a recipe is."""

from launcher.recipe.schema import Recipe


def parameters(recipe: Recipe) -> int:
    """Trainable numbers of the whole model, the padded vocabulary's included."""
    m = recipe.model
    hidden, ffn, heads_width = m.hidden_size, m.ffn_hidden_size, m.num_attention_heads * m.kv_channels
    groups_width = m.num_query_groups * m.kv_channels
    qkv, up = heads_width + 2 * groups_width, ffn * (2 if m.swiglu else 1)
    norm = hidden * (2 if m.normalization == "LayerNorm" else 1)
    layer = hidden * (qkv + heads_width + up + ffn) + 2 * norm
    if m.add_bias_linear:
        layer += qkv + hidden + up + hidden
    elif m.add_qkv_bias:
        layer += qkv
    tables = recipe.derived.padded_vocab_size * (2 if m.untie_embeddings_and_output_weights else 1)
    if m.position_embedding_type == "learned_absolute":
        tables += m.max_position_embeddings
    return m.num_layers * layer + tables * hidden + norm
