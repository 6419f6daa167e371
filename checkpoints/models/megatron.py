"""Megatron-LM's saved settings, the `args` of a checkpoint: the model that they describe, and those that describe a model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from checkpoints.folder import CheckpointError, UnsaidError
from checkpoints.models.config import number, shared, whole
from checkpoints.models.model import Model

if TYPE_CHECKING:
    import torch


def model_of(args: Mapping[str, Any], where: str, **more: Any) -> Model:
    """The model of Megatron-LM's arguments; `more`, such as vocab_size, stands above them.

    Raises:
        CheckpointError: something is missing; `where` names the place.
    """
    whole(args, where, free=("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"))
    heads = args.get("num_attention_heads")
    grouped = args.get("group_query_attention", True)
    derived = {
        "family": args.get("family") or _family(args),
        "num_query_groups": args.get("num_query_groups") if grouped else heads,
        "kv_channels": args.get("kv_channels") or (_channels(args, where) if args.get("hidden_size") and heads else None),
        "norm_epsilon": args.get("norm_epsilon") or args.get("layernorm_epsilon"),
        "rotary_base": int(number(args.get("rotary_base") or 10000, "rotary_base", where)),
        "num_layers": args.get("num_layers"),
        "openai_gelu": tanh_gelu(args),
    }
    derived["num_query_groups"] = derived["num_query_groups"] or heads
    return Model.of({**args, **{key: value for key, value in derived.items() if value is not None}}, where, **more)


def tanh_gelu(args: Mapping[str, Any]) -> bool:
    """Whether GELU is the tanh formula: Megatron-LM's kernel that adds the bias too is, whatever --openai-gelu says."""
    return bool(args.get("openai_gelu") or args.get("bias_gelu_fusion") and not args.get("swiglu"))


def _channels(args: Mapping[str, Any], where: str) -> int:
    return shared(args["hidden_size"], args["num_attention_heads"], "hidden_size and num_attention_heads", where)


def _family(args: Mapping[str, Any]) -> str:
    """Which family the settings are of, for checkpoints that do not say: names in other formats follow from it."""
    if args.get("use_lf_gate"):
        return "yuan2"
    return "llama" if args.get("position_embedding_type") == "rope" else "gpt2"


def model_with_ids(args: Mapping[str, Any], where: str, vocab_size: int | None) -> Model:
    """`model_of` where nothing beside the weights says how many ids there are.

    Raises:
        CheckpointError: the settings do not say it either, or something else is missing.
    """
    ids = vocab_size or _ids(args)
    if args and not ids:
        rows = args.get("padded_vocab_size")
        raise UnsaidError(
            f"{where} says that its vocabulary was padded to {rows} rows, and not how many are ids: give --vocab-size",
            "--vocab-size N, as its tokenizer has",
        )
    return model_of(args, where, vocab_size=ids)


def _ids(args: Mapping[str, Any]) -> Any:
    """Ids before padding, where settings say it. Of Megatron-LM's own `--vocab-size` the tokenizer makes what it likes: it is
    believed where fewer rows than a multiple pad it. NullTokenizer's end of document comes besides."""
    said, rows = args.get("vocab_size"), args.get("padded_vocab_size")
    if "family" in args or not all(type(one) is int and one > 0 for one in (said, rows)):
        return said
    ids = said + (args.get("tokenizer_type") == "NullTokenizer")
    multiple = (args.get("make_vocab_size_divisible_by") or 128) * (args.get("tensor_model_parallel_size") or 1)
    return ids if 0 <= rows - ids < multiple else None


# Settings with which the same tensors compute something else, under Megatron-LM's names; beside null and false what means nothing.
_OTHERWISE = {
    "apply_layernorm_1p": None, "apply_residual_connection_post_layernorm": None, "squared_relu": None, "rotary_interleaved": None,
    "rotary_seq_len_interpolation_factor": 1, "qk_l2_norm": None, "window_size": None, "no_rope_freq": None, "softmax_type": "vanilla",
    "glu_linear_offset": None, "activation_func_clamp_value": None,
}  # fmt: skip


def expect_plain(settings: Mapping[str, Any], where: str) -> None:
    """A training's settings ask for nothing that no model here computes, and that its tensors do not show.

    Raises:
        CheckpointError: naming every one that does.
    """
    wrong = [f"{key} {settings[key]}" for key, plain in _OTHERWISE.items() if settings.get(key) not in (None, False, plain)]
    if wrong:
        what = f"{where} was trained with {', '.join(wrong)}, which neither the engine nor the other formats compute"
        raise CheckpointError(what, "leave it with the program that trained it: here it would answer otherwise")


def args_of(model: Model, rows: int, dtypes: Iterable[torch.dtype], **more: Any) -> Namespace:
    """The settings that go with weights alone: what Megatron-LM looks at before it loads tensors, and the model itself.

    Args:
        rows: of the vocabulary's tables, padding included.
        dtypes: of the tensors.
        more: further settings, such as the ranks.
    """
    import torch

    found = set(dtypes)
    args = asdict(model) | {
        "add_position_embedding": model.position_embedding_type == "learned_absolute",
        "group_query_attention": model.num_query_groups != model.num_attention_heads,
        "seq_length": model.max_position_embeddings,
        "padded_vocab_size": rows,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "fp16": found == {torch.float16},
        "bf16": found == {torch.bfloat16},
    }
    return Namespace(**args | more)
