"""Small models as they are published: random weights in Hugging Face's folders, written by `transformers` itself."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 131  # a prime: no layout divides it
_SIZES = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": VOCABULARY}
SCALING = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
LLAMAS = {
    "llama2": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "llama_grouped_tied": {"num_key_value_heads": 2, "tie_word_embeddings": True, "head_dim": 16, "rms_norm_eps": 1e-6},
    "llama3": {"num_key_value_heads": 2, "tie_word_embeddings": False, "rope_theta": 5000.0, "rope_scaling": SCALING},
}
NAMES = ("gpt2", *LLAMAS)
# What they are loaded at, TP x PP, and other models whose tensors are compared with their description.
SAVED = ("gpt2", "llama_grouped_tied")  # those that a training begins from, and saves
TUNED = "llama_grouped_tied"  # one that is fine-tuned
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))
_LLAMA = {"position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False}
VARIANTS = {
    "gpt2": {},
    "gpt2, untied, gated, no positions": {"swiglu": True, "position_embedding_type": "none", "untie_embeddings_and_output_weights": True},
    "llama, grouped": {"family": "llama", **_LLAMA, "num_query_groups": 2, "untie_embeddings_and_output_weights": True},
    "llama, biases of query, key and value": {"family": "llama", **_LLAMA, "add_qkv_bias": True, "kv_channels": 16},
    "yuan2": {"family": "yuan2", **_LLAMA},
}


def make(folder: Path, name: str):
    """Write the model `name` into `folder`/`name` and return it, a `transformers` model in fp32."""
    import torch
    import transformers

    torch.manual_seed(len(name))
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=64, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0)
        model = transformers.GPT2LMHeadModel(config)
    else:
        more = dict(LLAMAS[name])
        rope = {"rope_theta": more.pop("rope_theta", 10000.0), "rope_type": "default"} | (more.pop("rope_scaling", None) or {})
        config = transformers.LlamaConfig(**_SIZES, **more, max_position_embeddings=64, rope_parameters=rope, bos_token_id=0, eos_token_id=0)
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():  # far from what an initialization leaves: norms and biases that matter, answers that vary
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.eval().save_pretrained(folder / name, max_shard_size="40KB" if name == "llama2" else "5GB")
    return model
