"""What a model is, as plain numbers under the names of Megatron-LM's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from math import inf
from typing import Any

from checkpoints.folder import CheckpointError

FAMILIES = ("gpt2", "llama", "yuan2")
FREE = ("init_method_std", "attention_dropout", "hidden_dropout")  # keys of no meaning for what a model answers


_MOST = {"num_layers": 10_000, "rotary_base": 1 << 53}  # a file of a few bytes may claim more than any machine holds
_KINDS = {"int": "a whole number above 0, and of what a model has,", "float": "a number", "bool": "true or false", "str": "a word"}


def _fits(name: str, value: Any, kind: str) -> bool:
    if kind == "int":
        return type(value) is int and (name != "vocab_size") <= value < _MOST.get(name, 1 << 24)  # 0 ids: what the tables have is not known
    if kind == "float":
        return type(value) in (int, float) and 0 <= value < inf
    return type(value) is bool if kind == "bool" else isinstance(value, str)


@dataclass(frozen=True)
class Model:
    """The numbers that decide a model's tensors and what is computed with them.

    Every field bears the name and has the meaning of the key in a recipe's group `model`, and of Megatron-LM's argument;
    `vocab_size` is the number of ids before any padding. With `quantize` int8 the matrices of the layers are whole numbers,
    with a scale for each output.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    max_position_embeddings: int
    vocab_size: int
    position_embedding_type: str = "learned_absolute"
    rotary_base: int = 10000
    rotary_percent: float = 1.0
    use_rope_scaling: bool = False
    rope_scaling_factor: float = 8.0
    normalization: str = "LayerNorm"
    norm_epsilon: float = 1e-5
    swiglu: bool = False
    openai_gelu: bool = False
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    untie_embeddings_and_output_weights: bool = False
    init_method_std: float = 0.02
    attention_dropout: float = 0.1
    hidden_dropout: float = 0.1
    quantize: str | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str, **more: Any) -> Model:
        """The model that `values` describe; other keys are passed over, and None is not given. `more` stands above them.

        Raises:
            CheckpointError: a value without a default is missing, the family is unknown, or a value is of another kind or
                impossible; `where` names the place.
        """
        merged = {**values, **more}
        merged = {one.name: merged[one.name] for one in fields(cls) if merged.get(one.name) is not None}
        missing = [one.name for one in fields(cls) if one.default is MISSING and one.name not in merged]
        if missing:
            raise CheckpointError(f"{where} does not say what the model is: {', '.join(missing)} missing", f"add them to {where}")
        if merged["family"] not in FAMILIES:
            raise CheckpointError(f"{where}: unknown family {merged['family']!r}, known are {', '.join(FAMILIES)}", f"mend {where}")
        kinds = {one.name: str(one.type).removesuffix(" | None") for one in fields(cls)}
        if wrong := [f"{name} is {value!r}, {_KINDS[kinds[name]]}" for name, value in merged.items() if not _fits(name, value, kinds[name])]:
            raise CheckpointError(f"{where}: {'; '.join(wrong)} is wanted", f"mend {where}")
        heads, groups = merged["num_attention_heads"], merged["num_query_groups"]
        if heads * merged["kv_channels"] >= 1 << 24:
            raise CheckpointError(f"{where}: {heads} attention heads of {merged['kv_channels']} are more than a model has", f"mend {where}")
        if heads % groups:
            raise CheckpointError(f"{where}: {heads} attention heads are not to be had in {groups} query groups of one size", f"mend {where}")
        return cls(**merged)

    def __str__(self) -> str:
        groups = "" if self.num_query_groups == self.num_attention_heads else f" in {self.num_query_groups} groups"
        tied = "" if self.untie_embeddings_and_output_weights else ", tied"
        return (
            f"{self.family}: {self.num_layers} layers, hidden {self.hidden_size}, {self.num_attention_heads} heads{groups},"
            f" vocabulary {self.vocab_size}{tied}" + (f", weights in {self.quantize}" if self.quantize else "")
        )
