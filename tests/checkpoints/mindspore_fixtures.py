"""MindSpore's folders of ranks, written by rules of their own: the protobuf messages, MindFormers' names and how it shares tensors out.

`mindspore_2_10_0.ckpt` is no work of this file: `save_checkpoint` of MindSpore 2.10.0 wrote it, given the values of MADE.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

MADE = Path(__file__).with_name("mindspore_2_10_0.ckpt")
NAMES = {torch.float16: "Float16", torch.float32: "Float32", torch.bfloat16: "BFloat16", torch.int8: "Int8", torch.int32: "Int32"}
H, D, F, LAYERS = 32, 2, 48, 4


def made() -> dict[str, torch.Tensor]:
    """What MADE holds of tensors: 7 i + n, modulo 23, less 11, in quarters where they are no whole numbers."""

    def some(n: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        numbers = ((torch.arange(torch.Size(shape).numel()) * 7 + n) % 23 - 11).reshape(shape)
        return (numbers / 4 if dtype.is_floating_point else numbers).to(dtype)

    return {
        "model.tok_embeddings.embedding_weight": some(1, (5, 4), torch.float16),
        "model.layers.0.attention_norm.weight": some(2, (4,), torch.float32),
        "model.layers.0.attention.wq.weight": some(3, (3, 4), torch.float32).bfloat16(),
        "model.layers.0.attention.wk._layer.weight": some(4, (150, 2), torch.int8),
        "loss_scale": torch.tensor(0.5),
        "global_step": torch.tensor([7], dtype=torch.int32),
    }


def parts(heads: int = 4, groups: int = 4, rows: int = 40) -> dict:
    """Random parts of a Llama in fp16, as MindFormers has them whole: of layer n under n, around the layers by name."""
    random = torch.Generator().manual_seed(heads + groups + rows)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).half()

    found: dict = {"tok": some(rows, H), "norm_out": some(H), "head": some(rows, H)}
    for layer in range(LAYERS):
        found[layer] = {
            "wq": some(heads * D, H), "wk": some(groups * D, H), "wv": some(groups * D, H), "wo": some(H, heads * D),
            "w1": some(F, H), "w3": some(F, H), "w2": some(H, F), "attention_norm": some(H), "ffn_norm": some(H),
        }  # fmt: skip
    return found


def config(heads: int, groups: int, rows: int) -> dict:
    """config.json of such a model."""
    return {
        "model_type": "llama", "vocab_size": rows, "hidden_size": H, "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": heads,
        "num_key_value_heads": groups, "head_dim": D, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip


def rank(whole: dict, kind: str, number: int, ranks: int, layers: range = range(LAYERS)) -> dict[str, torch.Tensor]:
    """The tensors of one of `ranks` tensor-parallel ranks that holds these layers: `kind` separate, concat or grouped."""

    def rows(one: torch.Tensor) -> torch.Tensor:
        size = len(one) // ranks
        return one[number * size : (number + 1) * size]

    def columns(one: torch.Tensor) -> torch.Tensor:
        return rows(one.t()).t()

    def table(one: torch.Tensor) -> torch.Tensor:
        return one if len(one) % ranks else rows(one)

    found = {}
    if 0 in layers:
        found["model.tok_embeddings.embedding_weight"] = table(whole["tok"])
    for layer in layers:
        one, at = whole[layer], f"model.layers.{layer}."
        found[f"{at}attention_norm.weight"], found[f"{at}ffn_norm.weight"] = one["attention_norm"], one["ffn_norm"]
        found[f"{at}attention.wo.weight"], found[f"{at}feed_forward.w2.weight"] = columns(one["wo"]), columns(one["w2"])
        if kind == "separate":
            found |= {f"{at}attention.{name}.weight": rows(one[name]) for name in ("wq", "wk", "wv")}
            found |= {f"{at}feed_forward.{name}.weight": rows(one[name]) for name in ("w1", "w3")}
        else:
            fused = [rows(one[name]) for name in ("wq", "wk", "wv")], [rows(one[name]) for name in ("w1", "w3")]
            qkv, gate_hidden = (torch.cat(shares) for shares in fused) if kind == "concat" else (by_group(*fused[0]), in_turn(*fused[1]))
            found[f"{at}attention.w_qkv.weight"], found[f"{at}feed_forward.w_gate_hidden.weight"] = qkv, gate_hidden
    if LAYERS - 1 in layers:
        found["model.norm_out.weight"], found["lm_head.weight"] = whole["norm_out"], table(whole["head"])
    return found


def by_group(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """For each key/value head the rows of its queries, its key, its value."""
    groups = len(k) // D
    size = len(q) // groups
    rows = []
    for group in range(groups):
        rows += [q[group * size : (group + 1) * size], k[group * D : (group + 1) * D], v[group * D : (group + 1) * D]]
    return torch.cat(rows)


def in_turn(gate: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """g0, h0, g1, h1, …"""
    return torch.cat([row[None] for pair in zip(gate, hidden) for row in pair])


def ours(whole: dict) -> dict[str, torch.Tensor]:
    """The same model as megatron-core has it."""
    found = {"embedding.word_embeddings.weight": whole["tok"], "decoder.final_layernorm.weight": whole["norm_out"], "output_layer.weight": whole["head"]}
    for layer in range(LAYERS):
        one, at = whole[layer], f"decoder.layers.{layer}."
        found |= {
            f"{at}input_layernorm.weight": one["attention_norm"], f"{at}pre_mlp_layernorm.weight": one["ffn_norm"],
            f"{at}self_attention.linear_qkv.weight": by_group(one["wq"], one["wk"], one["wv"]), f"{at}self_attention.linear_proj.weight": one["wo"],
            f"{at}mlp.linear_fc1.weight": torch.cat([one["w1"], one["w3"]]), f"{at}mlp.linear_fc2.weight": one["w2"],
        }  # fmt: skip
    return found


# ---- files -----------------------------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    more, rest = number >> 7, number & 0x7F
    return bytes([rest | 0x80]) + varint(more) if more else bytes([rest])


def delimited(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def encoded(tensors: dict[str, torch.Tensor], slice_bytes: int = 512 << 20) -> bytes:
    """A .ckpt: for each tensor, or each slice of a large one, Checkpoint{Value{tag, TensorProto{dims, type, content}}}."""
    found = b""
    for name, tensor in tensors.items():
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        dims = b"".join(varint(1 << 3) + varint(size) for size in tensor.shape)
        for at in range(0, len(content), slice_bytes):
            proto = dims + delimited(2, NAMES[tensor.dtype].encode()) + delimited(3, content[at : at + slice_bytes])
            found += delimited(1, delimited(1, name.encode()) + delimited(2, proto))
    return found


def write(folder: Path, ranks: list[dict[str, torch.Tensor]], config: dict | None = None) -> Path:
    """A folder of ranks; config.json beside them where it is given."""
    for number, tensors in enumerate(ranks):
        (folder / f"rank_{number}").mkdir(parents=True)
        (folder / f"rank_{number}" / f"llama_{number}.ckpt").write_bytes(encoded(tensors))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder
