"""Llama as MindFormers names it for MindSpore, shared out over tensor-parallel ranks.

Query, key and value, and gate and up (there: hidden), lie in matrices of their own or in one, in two ways that the same
names stand for:

    concat    to MindFormers 1.3: each rank has [q; k; v] and [gate; hidden] of its own share, one below the other
    grouped   from 1.5: query, key and value by query group, as megatron-core has them; gate and hidden row by row in turn
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from checkpoints.folder import CheckpointError
from checkpoints.models import gpt
from checkpoints.models.config import expect
from checkpoints.models.layout import HALVES, SAME, Foreign, Layout, separate_qkv
from checkpoints.models.model import Model
from checkpoints.models.tensor import Tensor

Fused = Literal["separate", "concat", "grouped"]
WQ, W_QKV, W1, W_GATE_HIDDEN = "attention.wq", "attention.w_qkv", "feed_forward.w1", "feed_forward.w_gate_hidden"
_AROUND = {
    "embedding.word_embeddings.weight": "model.tok_embeddings.embedding_weight",
    "decoder.final_layernorm.weight": "model.norm_out.weight",
    "output_layer.weight": "lm_head.weight",
}
_WITHIN: dict[str, tuple[str, ...]] = {
    "input_layernorm": ("attention_norm",),
    "self_attention.linear_proj": ("attention.wo",),
    "pre_mlp_layernorm": ("ffn_norm",),
    "mlp.linear_fc2": ("feed_forward.w2",),
}
_QKV, _FC1 = "self_attention.linear_qkv", "mlp.linear_fc1"
# What a training keeps there besides: the optimizer's tensors and counters, and texts.
_NO_WEIGHT = re.compile(r"(?!model\.|lm_head\.).*|.*\.(rotary_emb|freqs_mgr)\..*")
SCALES = ("matmul.t_scale", "matmul.weight_scale")  # of Golden Stick's w8a16: what is written, and what newer ones write
ZERO_POINT = "matmul.t_zp_neg"


@dataclass(frozen=True)
class Cut:
    """How a folder's ranks hold the model: how many share it out, and which layouts the two fused matrices have."""

    ranks: int
    qkv: Fused
    gate_hidden: Fused


def foreign(model: Model, cut: Cut, scale: str = SCALES[0]) -> list[tuple[Foreign, int | None]]:
    """MindFormers' tensors, each as the ranks' shares one after another along an axis; None where each holds all of it.

    `scale` is the name of a quantized matrix's scales.

    Raises:
        CheckpointError: it is no Llama, or the ranks cannot share it out.
    """
    expect(
        model, "MindFormers' Llama",
        family="llama", position_embedding_type="rope", rotary_percent=1.0, normalization="RMSNorm", swiglu=True,
        add_bias_linear=False,
    )  # fmt: skip
    for name in ("num_query_groups", "num_attention_heads", "ffn_hidden_size"):
        if getattr(model, name) % cut.ranks:
            raise CheckpointError(f"{name} {getattr(model, name)} cannot be shared out over {cut.ranks} ranks of MindSpore", "another --tp")
    return [_named(tensor, model, cut, scale) for tensor in gpt.tensors(model)]


def _named(tensor: Tensor, model: Model, cut: Cut, scale: str) -> tuple[Foreign, int | None]:
    if tensor.layer is None:
        even = tensor.vocabulary and tensor.shape[0] % cut.ranks == 0  # else each rank has the whole table
        return Foreign(tensor, (_AROUND[tensor.name],), SAME), 0 if even else None
    module, kind = tensor.within.rsplit(".", 1)
    names, layout = _matrices(module, model, cut)
    if model.quantize and module not in ("input_layernorm", "pre_mlp_layernorm"):
        kind = "_layer." + (scale if kind == gpt.SCALE else kind)
    return Foreign(tensor, tuple(f"model.layers.{tensor.layer}.{name}.{kind}" for name in names), layout), tensor.axis


def _matrices(module: str, model: Model, cut: Cut) -> tuple[tuple[str, ...], Layout]:
    """A module's names there, and their layout."""
    if module == _QKV:
        channels, groups = model.kv_channels, model.num_query_groups
        rows = [model.num_attention_heads * channels, groups * channels, groups * channels]
        concat = fused_by_rank(separate_qkv(model), rows, cut.ranks)
        return _fused(cut.qkv, (WQ, "attention.wk", "attention.wv"), separate_qkv(model), W_QKV, concat, SAME)
    if module == _FC1:
        concat = fused_by_rank(HALVES, [model.ffn_hidden_size] * 2, cut.ranks)
        return _fused(cut.gate_hidden, (W1, "feed_forward.w3"), HALVES, W_GATE_HIDDEN, concat, IN_TURN)
    return _WITHIN[module], SAME


def _fused(kind: Fused, names: tuple[str, ...], separate: Layout, name: str, concat: Layout, grouped: Layout) -> tuple[tuple[str, ...], Layout]:
    return (names, separate) if kind == "separate" else ((name,), concat if kind == "concat" else grouped)


def fused_by_rank(separate: Layout, rows: Sequence[int], ranks: int) -> Layout:
    """The tensors of `separate`, which have `rows` rows, in one: each rank's shares of all of them, then the next rank's."""

    def split(whole: torch.Tensor) -> list[torch.Tensor]:
        shares = [piece.chunk(ranks) for piece in separate.split(whole)]
        return [torch.cat([share for of_rank in zip(*shares, strict=True) for share in of_rank])]

    def join(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        shares = [of_rank.split([count // ranks for count in rows]) for of_rank in pieces[0].chunk(ranks)]
        return separate.join([torch.cat(of_piece) for of_piece in zip(*shares, strict=True)])

    return Layout(split, join)


# [gate; up] with their rows in turn
IN_TURN = Layout(
    lambda whole: [whole.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)],
    lambda pieces: pieces[0].unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1),
)


def no_weight(name: str) -> str | None:
    """What a tensor is that is no weight; None for a weight."""
    if name.endswith(ZERO_POINT):
        return "zero points of symmetric weights: zeros"
    return "the training's" if _NO_WEIGHT.fullmatch(name) else None
