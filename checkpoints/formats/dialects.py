"""The three formats of a file per rank: what their files hold, and where.

    torch   megatron-core's names: {"model": {name: tensor}}
    yuan    Yuan 2.0's: {"model": {"language_model": {"embedding": …, "encoder": {name: tensor}}, "word_embeddings_for_head": …}}
    pai     Megatron-LM's before megatron-core, and Pai-Megatron-Patch's; as yuan's, with an "output_layer"

In all of them layers are counted from 0 on each stage; a tied head is a copy of the embedding on the last of several stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from checkpoints.folder import CheckpointError
from checkpoints.formats.base import by_own_names
from checkpoints.models import gpt, legacy
from checkpoints.models.layout import Foreign
from checkpoints.models.model import Model
from checkpoints.models.tensor import padded

FORMATS = ("torch", "yuan", "pai")
VOCABULARY_MULTIPLE = 128  # Megatron-LM's default of make_vocab_size_divisible_by
_NORMS = {"self_attention.linear_qkv.layer_norm_": "input_layernorm.", "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."}


@dataclass(frozen=True)
class Dialect:
    """One format of a file per rank.

    Attributes:
        format: as `--to` calls it.
        file: the name of each rank's file.
        foreign: the tensors of a model, layers counted over all stages.
        tied: the name under which the last of several stages holds a copy of a tied embedding.
        rows: of the vocabulary's tables, by the ids and the tensor-parallel ranks.
        settings: what `args` says besides.
        beside: what a stage holds besides, by its layers and whether it is the last: tensors that are no weights, or None.
    """

    format: str
    file: str
    foreign: Callable[[Model], list[Foreign]]
    tied: str
    rows: Callable[[int, int], int]
    settings: Mapping[str, Any]
    beside: Callable[[Model, int, bool], dict[str, torch.Tensor | None]] = lambda model, layers, last: {}

    def nested(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """`flat`, names with what they name, as the file has it under "model"."""
        if self.format == "torch":
            return dict(flat)
        model: dict[str, Any] = {}
        for name, value in flat.items():
            begin, _, rest = name.rpartition("language_model.encoder.")
            *words, last = [*begin.split(".")[:-1], "language_model", "encoder", rest] if rest != name else name.split(".")
            place = model
            for word in words:
                place = place.setdefault(word, {})
            place[last] = value
        return model


def core(transformer_impl: str = "local") -> Dialect:
    """megatron-core's, with the names of its own modules or, `transformer_engine`, of Transformer Engine's."""

    def foreign(model: Model) -> list[Foreign]:
        table = by_own_names(model)
        if transformer_impl == "local" or model.family == "yuan2":  # Yuan's filter stands between the norm and the projections
            return table
        return [Foreign(one.tensor, (_fused(one.tensor.name),), one.layout) for one in table]

    settings = {"transformer_impl": transformer_impl, "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE}
    return Dialect(
        "torch", "model_optim_rng.pt", foreign, "output_layer.weight", lambda ids, ranks: padded(ids, VOCABULARY_MULTIPLE * ranks),
        settings, _extra_states,
    )


def _fused(name: str) -> str:
    for fused, alone in _NORMS.items():
        name = name.replace(f".{alone}", f".{fused}")
    return name


def unfused(name: str) -> str:
    """A name of Transformer Engine's modules as megatron-core's own modules have it."""
    for fused, alone in _NORMS.items():
        name = name.replace(f".{fused}", f".{alone}")
    return name


_REGISTERED = (  # within a layer; of what is named by none of these, what comes first in the model's order
    "input_layernorm.", "self_attention.linear_proj.", "self_attention.filter.", "self_attention.linear_qkv.layer_norm_", "self_attention.",
    "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_", "mlp.",
)  # fmt: skip


def registered(names: Iterable[str]) -> list[str]:
    """Names of weights, which are in the order of `gpt.tensors`, in the order in which megatron-core's modules, or Transformer
    Engine's, register their parameters: its optimizer knows these by their numbers alone."""

    def place(name: str) -> tuple[int, int, int]:
        words = name.split(".", 3)
        if words[:2] != ["decoder", "layers"]:
            return (0 if name.startswith("embedding.") else 2, 0, 0)
        return (1, int(words[2]), next(number for number, begin in enumerate(_REGISTERED) if words[3].startswith(begin)))

    return sorted(names, key=place)


def _extra_states(model: Model, layers: int, last: bool) -> dict[str, None]:
    """megatron-core's linear layers ask for a state besides their weights, which is nothing without FP8."""
    modules = sorted({one.within.rsplit(".", 1)[0] for one in gpt.tensors(model) if one.layer is not None and "linear_" in one.within})
    names = [f"decoder.layers.{layer}.{module}._extra_state" for layer in range(layers) for module in modules]
    return dict.fromkeys([*names, *(["output_layer._extra_state"] if last else [])])


def yuan() -> Dialect:
    """Yuan 2.0's. Its vocabulary is padded to a multiple of 128, whatever the number of ranks."""

    def foreign(model: Model) -> list[Foreign]:
        legacy.expect_yuan(model)
        return legacy.foreign(model)

    settings = {
        "use_lf_gate": True, "lf_conv2d_group": 1, "lf_conv2d_num_pad": 1, "use_rotary_position_embeddings": True,
        "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE, "tokenizer_type": "YuanTokenizer",
    }  # fmt: skip
    return Dialect("yuan", "model_optim_rng.pt", foreign, legacy.TIED, lambda ids, ranks: padded(ids, VOCABULARY_MULTIPLE), settings)


def pai(release: str = "v0.6") -> Dialect:
    """Pai's for Llama, which is Megatron-LM's of before megatron-core; its vocabulary is not padded.

    In `v0.5` gate and up, and query and key/value of grouped attention, are tensors of their own, and RoPE's frequencies are
    saved with every layer.
    """
    old = release == "v0.5"

    def foreign(model: Model) -> list[Foreign]:
        if model.family == "yuan2" or model.use_rope_scaling:
            raise CheckpointError(
                f"Megatron-LM's models before megatron-core have no {'filter' if model.family == 'yuan2' else 'scaling of RoPE'}",
                "--to torch or torch_dist, which have it",
            )
        if old and (model.family != "llama" or model.add_bias_linear):
            raise CheckpointError(f"Pai's v0.5 is for Llama without biases, and this is {model}", "--pai-release v0.6")
        return legacy.foreign(model, old, old and model.num_query_groups != model.num_attention_heads)

    file, beside = ("model_rng.pt", _frequencies) if old else ("model_optim_rng.pt", Dialect.beside)
    settings = {"use_rotary_position_embeddings": True, "make_vocab_size_divisible_by": 1}
    return Dialect("pai", file, foreign, legacy.TIED, lambda ids, ranks: ids, settings, beside)


def _frequencies(model: Model, layers: int, last: bool) -> dict[str, torch.Tensor]:
    frequencies = 1.0 / model.rotary_base ** (torch.arange(0, model.kv_channels, 2).float() / model.kv_channels)
    return {f"language_model.encoder.layers.{layer}.self_attention.rotary_emb.inv_freq": frequencies for layer in range(layers)}
