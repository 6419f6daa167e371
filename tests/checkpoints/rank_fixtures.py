"""Files per rank as the original tools write them: written by rules of their own, apart from those of `checkpoints`.

A model here is plain parts, `q` [heads, d, h], `k`, `v` [groups, d, h], `gate`, `up` [f, h] and so on for every layer; each
format puts them together as its tools do.
"""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import torch

H, HEADS, D, F, LAYERS, ROWS = 16, 4, 4, 24, 5, 132  # hidden, heads, channels, feed-forward, layers, the table's rows
YUAN = {"num_layers": LAYERS, "hidden_size": H, "num_attention_heads": HEADS, "max_position_embeddings": 32, "layernorm_epsilon": 1e-5}


def parts(groups: int = HEADS, yuan: bool = False) -> dict:
    """Random parts of a model in bf16: those of layer n under n, those around the layers under their names."""
    random = torch.Generator().manual_seed(groups)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).bfloat16()

    found: dict = {"embedding": some(ROWS, H), "head": some(ROWS, H), "final": some(H)}
    for layer in range(LAYERS):
        found[layer] = {
            "input": some(H), "post": some(H), "q": some(HEADS, D, H), "k": some(groups, D, H), "v": some(groups, D, H),
            "dense": some(H, HEADS * D), "gate": some(F, H), "up": some(F, H), "down": some(H, F),
        }  # fmt: skip
        if yuan:
            found[layer] |= {"conv1": some(H // 2, H, 2, 1), "b1": some(H // 2), "conv2": some(H, H // 2, 2, 1), "b2": some(H), "lf": some(H)}
    return found


def grouped(layer: dict) -> torch.Tensor:
    """Query, key and value group by group, [(heads + 2 groups) d, h]."""
    groups = len(layer["k"])
    rows = []
    for group, queries in enumerate(layer["q"].chunk(groups)):
        rows += [*queries, layer["k"][group], layer["v"][group]]
    return torch.cat(rows)


def interleaved(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Head by head of one, then of the other, [2 heads d, h]."""
    return torch.cat([row for pair in zip(first, second, strict=True) for row in pair])


def _layer(layer: dict, kind: str, t: int, tp: int) -> dict[str, torch.Tensor]:
    """A layer's tensors on tensor-parallel rank t."""

    def rows(whole: torch.Tensor) -> torch.Tensor:
        return whole.chunk(tp)[t].clone()

    gate, up = rows(layer["gate"]), rows(layer["up"])
    dense, down = layer["dense"].chunk(tp, 1)[t].clone(), layer["down"].chunk(tp, 1)[t].clone()
    qkv = {} if kind == "yuan" else {"self_attention.query_key_value.weight": rows(grouped(layer))}
    if kind == "v0.5" and len(layer["k"]) != HEADS:
        key_value = interleaved(layer["k"], layer["v"])
        qkv = {"self_attention.query.weight": rows(layer["q"].flatten(0, 1)), "self_attention.key_value.weight": rows(key_value)}
    if kind == "yuan":
        qkv = {
            "self_attention.get_value.weight": rows(layer["v"].flatten(0, 1)),
            "self_attention.get_query_key.weight": rows(interleaved(layer["q"], layer["k"])),
            "self_attention.lf_gate.conv1.weight": layer["conv1"], "self_attention.lf_gate.conv1.bias": layer["b1"],
            "self_attention.lf_gate.conv2.weight": layer["conv2"], "self_attention.lf_gate.conv2.bias": layer["b2"],
            "self_attention.lf_gate.output_layernorm.weight": layer["lf"],
        }  # fmt: skip
    if kind.startswith("core"):
        norms = ["input_layernorm.weight", "pre_mlp_layernorm.weight"]
        if kind == "core with Transformer Engine":
            norms = ["self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"]
        return {
            norms[0]: layer["input"], norms[1]: layer["post"], "self_attention.linear_qkv.weight": rows(grouped(layer)),
            "self_attention.linear_proj.weight": dense, "mlp.linear_fc1.weight": torch.cat([gate, up]), "mlp.linear_fc2.weight": down,
            "self_attention.linear_qkv._extra_state": None,
        }  # fmt: skip
    mlp = {"mlp.dense_h_to_4h.weight": torch.cat([gate, up])}
    if kind == "v0.5":
        mlp = {"mlp.dense_h_to_4h_1.weight": gate, "mlp.dense_h_to_4h_2.weight": up}
        qkv |= {"self_attention.rotary_emb.inv_freq": 1 / 10000 ** (torch.arange(0, D, 2) / D)}
    norms = {"input_layernorm.weight": layer["input"], "post_attention_layernorm.weight": layer["post"]}
    return norms | qkv | mlp | {"self_attention.dense.weight": dense, "mlp.dense_4h_to_h.weight": down}


def write(folder: Path, model: dict, kind: str, tp: int, stages: list[list[int]], tied: bool, args: dict) -> None:
    """Write `folder`/mp_rank_*: for each rank of the pipeline the layers of its part of the model, or of its several."""
    pp = len(stages)
    for t in range(tp):
        for p, own in enumerate(stages):
            place = folder / (f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else ""))
            place.mkdir(parents=True)
            content: dict = {"args": (SimpleNamespace if kind == "v0.5" else Namespace)(**args), "checkpoint_version": 3.0, "iteration": 1}
            several = [own] if isinstance(own[0], int) else own
            for part, layers in enumerate(several):
                first, last = p == part == 0, p == pp - 1 and part == len(several) - 1
                name = "model" if len(several) == 1 else f"model{part}"
                content[name] = _part(model, layers, kind, t, tp, first, last, tied, pp * len(several))
            torch.save(content, place / ("model_rng.pt" if kind == "v0.5" else "model_optim_rng.pt"))


def _part(model: dict, layers: list[int], kind: str, t: int, tp: int, first: bool, last: bool, tied: bool, stages: int) -> dict:
    local = [(number, _layer(model[layer], kind, t, tp)) for number, layer in enumerate(layers)]
    table, head = model["embedding"].chunk(tp)[t].clone(), model["embedding" if tied else "head"].chunk(tp)[t].clone()
    if kind.startswith("core"):
        flat = {f"decoder.layers.{number}.{name}": one for number, layer in local for name, one in layer.items()}
        if first:
            flat["embedding.word_embeddings.weight"] = table
        if last:
            flat["decoder.final_layernorm.weight"] = model["final"]
        if last and (not tied or stages > 1):
            flat["output_layer.weight"] = head
        return flat
    encoder = OrderedDict((f"layers.{number}.{name}", one) for number, layer in local for name, one in layer.items())
    whole: dict = {"language_model": {"encoder": encoder}}
    if first:
        whole["language_model"]["embedding"] = {"word_embeddings": {"weight": table}}
    if last:
        encoder["final_layernorm.weight"] = model["final"]
        if not tied:
            whole["language_model"]["output_layer"] = {"weight": head}
        elif stages > 1:
            whole["word_embeddings_for_head"] = {"weight": head}
    if kind == "v0.5" and first:  # what its converter leaves behind, and nothing reads
        whole["lm_head"] = {"weight": model["head"].chunk(tp)[t].clone()}
    if kind == "v0.5" and last:
        whole["word_embeddings_for_head"] = {"weight": table}
    return whole


def expected(model: dict, tied: bool) -> dict[str, torch.Tensor]:
    """The whole tensors under megatron-core's names."""
    found = {"embedding.word_embeddings.weight": model["embedding"], "decoder.final_layernorm.weight": model["final"]}
    if not tied:
        found["output_layer.weight"] = model["head"]
    for number in range(LAYERS):
        layer, at = model[number], f"decoder.layers.{number}."
        found |= {
            f"{at}input_layernorm.weight": layer["input"], f"{at}pre_mlp_layernorm.weight": layer["post"],
            f"{at}self_attention.linear_proj.weight": layer["dense"], f"{at}mlp.linear_fc1.weight": torch.cat([layer["gate"], layer["up"]]),
            f"{at}mlp.linear_fc2.weight": layer["down"],
        }  # fmt: skip
        if "conv1" not in layer:
            found[f"{at}self_attention.linear_qkv.weight"] = grouped(layer)
            continue
        found |= {
            f"{at}self_attention.linear_qk.weight": interleaved(layer["q"], layer["k"]),
            f"{at}self_attention.linear_v.weight": layer["v"].flatten(0, 1),
            f"{at}self_attention.filter.conv1.weight": layer["conv1"][..., 0], f"{at}self_attention.filter.conv1.bias": layer["b1"],
            f"{at}self_attention.filter.conv2.weight": layer["conv2"][..., 0], f"{at}self_attention.filter.conv2.bias": layer["b2"],
            f"{at}self_attention.filter.norm.weight": layer["lf"],
        }  # fmt: skip
    return found
