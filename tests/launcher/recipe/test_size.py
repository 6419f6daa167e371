"""Sizes that are counted without building a model."""

from launcher.recipe import load
from launcher.recipe.size import parameters

TINY = """
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 4}
training: {seq_length: 16, micro_batch_size: 2}
tokenizer: {type: NullTokenizer, vocab_size: 50}
"""


def test_parameters_are_those_of_the_model_that_the_engine_builds(write_recipe):
    """A number worked out by hand: tied embedding, positions, two layers with biases, and the last norm."""
    write_recipe("tiny", TINY)
    layer = (32 * 96 + 96) + (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32) + 4 * 32
    assert parameters(load(["recipe=tiny"]).recipe) == 128 * 32 + 16 * 32 + 2 * layer + 2 * 32
    words = ["model.num_query_groups=2", "tokenizer.type=NullTokenizer", "tokenizer.vocab_size=127"]
    llama = load(["recipe=quickstart", *words]).recipe
    h, f = llama.model.hidden_size, llama.model.ffn_hidden_size
    layer = h * (h + 2 * 2 * h // llama.model.num_attention_heads) + h * h + 3 * h * f + 2 * h
    assert parameters(llama) == 128 * h + llama.model.num_layers * layer + h
