"""Hugging Face folders made by the library `safetensors` and torch alone, as small as they can be."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LLAMA = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 11, "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 11, "activation_function": "gelu_new"}
YUAN = {
    "model_type": "yuan", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 11,
    "max_position_embeddings": 16, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip


def llama_tensors() -> dict[str, torch.Tensor]:
    """Of LLAMA, each other numbers."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,), "lm_head.weight": (11, 8)}
    for layer in range(2):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{name}_proj.weight": shape for name, shape in zip("qkvo", ((8, 8), (4, 8), (4, 8), (8, 8)))}
        shapes |= {f"{at}mlp.{name}_proj.weight": shape for name, shape in zip(("gate", "up", "down"), ((12, 8), (12, 8), (8, 12)))}
        shapes |= {f"{at}input_layernorm.weight": (8,), f"{at}post_attention_layernorm.weight": (8,)}
    return filled(shapes)


def gpt2_tensors(prefix: str = "transformer.") -> dict[str, torch.Tensor]:
    """Of GPT2, with the masks that old files hold."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (11, 8), "wpe.weight": (16, 8), "ln_f.weight": (8,), "ln_f.bias": (8,)}
    for layer in range(2):
        at = f"h.{layer}."
        shapes |= {f"{at}{norm}.{kind}": (8,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        for name, (rows, columns) in {"attn.c_attn": (8, 24), "attn.c_proj": (8, 8), "mlp.c_fc": (8, 32), "mlp.c_proj": (32, 8)}.items():
            shapes |= {f"{at}{name}.weight": (rows, columns), f"{at}{name}.bias": (columns,)}
        shapes[f"{at}attn.bias"] = (1, 1, 16, 16)
    return filled({prefix + name: shape for name, shape in shapes.items()})


def yuan_tensors() -> dict[str, torch.Tensor]:
    """Of YUAN, with the copy of the embedding and the frequencies that its files hold."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,)}
    for layer in range(2):
        at = f"model.layers.{layer}.self_attn."
        shapes |= {f"{at}{name}_proj.weight": (8, 8) for name in "qkvo"}
        shapes |= {f"{at}lf_gate.conv1.weight": (4, 8, 2, 1), f"{at}lf_gate.conv1.bias": (4,), f"{at}lf_gate.conv2.weight": (8, 4, 2, 1)}
        shapes |= {f"{at}lf_gate.conv2.bias": (8,), f"{at}lf_gate.output_layernorm.weight": (8,), f"{at}rotary_emb.inv_freq": (2,)}
        at = f"model.layers.{layer}."
        shapes |= {f"{at}mlp.{name}_proj.weight": shape for name, shape in zip(("gate", "up", "down"), ((16, 8), (16, 8), (8, 16)))}
        shapes |= {f"{at}input_layernorm.weight": (8,), f"{at}post_attention_layernorm.weight": (8,)}
    made = filled(shapes)
    return made | {"lm_head.weight": made["model.embed_tokens.weight"].clone()}


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(folder: Path, config: dict, tensors: dict[str, torch.Tensor], shards: int = 1, kind: str = "safetensors") -> Path:
    """A folder with these tensors in one file or `shards` with an index, as safetensors or .bin."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, save = ("model", save_file) if kind == "safetensors" else ("pytorch_model", torch.save)
    if shards == 1:
        save(tensors, folder / f"{stem}.{kind}")
        return folder
    names = {name: f"{stem}-{number % shards + 1:05d}-of-{shards:05d}.{kind}" for number, name in enumerate(tensors)}
    for file in set(names.values()):
        save({name: tensors[name] for name in tensors if names[name] == file}, folder / file)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder
