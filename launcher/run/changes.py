"""What differs between a run's recipe and the one it is to go on with, and whether it may go on with that.

    safe      how fast, how long and how talkative the run is, not what it computes: it goes on, and the change is named
    consent   the run computes something else from here on: only with --accept-changes
    refused   the checkpoint cannot be loaded into what the new recipe describes, or its epochs counted on
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from launcher.recipe.schema import Recipe

SAFE_GROUPS = {"parallel", "preprocess", "logging", "launch", "slurm", "run", "generate", "convert", "serve"}
SAFE_KEYS = {
    "training.train_iters", "training.train_samples", "training.train_tokens", "training.epochs", "training.micro_batch_size",
    "training.early_stop_patience", "checkpoint.keep_best", "checkpoint.export_hf",
    "training.torch_compile", "optimizer.optimizer_cpu_offload", "optimizer.optimizer_offload_fraction",
    "optimizer.overlap_cpu_optimizer_d2h_h2d",
    "training.eval_interval", "training.eval_iters", "training.exit_duration_in_mins", "training.exit_interval",
    "data.num_workers", "data.data_cache_path",
    "checkpoint.save_interval", "checkpoint.keep_last", "checkpoint.format",  # of what is written; either is read
}  # fmt: skip
# What a run starts from: not asked once it has a checkpoint of its own.
START_KEYS = {f"checkpoint.{key}" for key in ("load", "finetune", "no_load_optim", "no_load_rng")}
# Checkpoints of format `torch` hold one file per rank of the layout that wrote them.
LAYOUT_KEYS = {
    "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size",
    "parallel.pipeline_model_parallel_layout", "parallel.num_layers_per_virtual_pipeline_stage",
    "parallel.decoder_first_pipeline_num_layers", "parallel.decoder_last_pipeline_num_layers",
}  # fmt: skip
SHAPE_KEYS = {
    "model.num_layers", "model.hidden_size", "model.ffn_hidden_size", "model.num_query_groups", "model.kv_channels",
    "model.swiglu",
}  # fmt: skip
# A tensor that the checkpoint has and the model has not is left out; one that the model alone has cannot be filled.
TURNED_ON = {
    "model.family": "yuan2", "model.normalization": "LayerNorm", "model.position_embedding_type": "learned_absolute",
    "model.add_bias_linear": True, "model.add_qkv_bias": True, "model.untie_embeddings_and_output_weights": True,
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One key that differs. `why` says why it is refused."""

    key: str
    before: Any
    after: Any
    kind: Literal["safe", "consent", "refused"]
    why: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.before)} -> {_shown(self.after)}" + (f" ({self.why})" if self.why else "")


def classify(old: Recipe, new: Recipe, saved: Recipe | None = None) -> list[Change]:
    """Every change from a run's recipe `old` to `new`, refused ones first.

    `saved` is the recipe of the checkpoint that the run goes on from: only what is in a checkpoint can fail to load.
    None where nothing was saved yet.
    """
    never = {} if saved is None else refusals(saved, new)
    changes = {key: (before, after) for key, (before, after) in changed_keys(old, new).items() if key not in never}
    begun = START_KEYS if saved is not None else set()
    kinds = {key: "safe" if key in begun or is_safe(key, old, new) else "consent" for key in changes}
    found = [Change(key, *changes[key], kind) for key, kind in kinds.items()]  # type: ignore[arg-type]
    found += [Change(key, *changed_keys(saved, new)[key], "refused", why) for key, why in never.items()]  # type: ignore[arg-type]
    return sorted(found, key=lambda change: ("refused", "consent", "safe").index(change.kind))


def changed_keys(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old value, new value)} of what differs. Derived values are left out: they follow from the rest, all but
    the vocabulary and the rows, whose files may have changed under the same names. (Rows are unknown until prepared.)"""
    before, after = _flat(asdict(old)), _flat(asdict(new))
    keys = [key for key in after if not key.startswith("derived.") or key == "derived.vocab_size"]
    rows = "derived.rows_sha256"
    keys += [rows] if before.get(rows) and after.get(rows) else []
    return {key: (before[key], after[key]) for key in keys if before[key] != after[key]}


def is_safe(key: str, old: Recipe, new: Recipe) -> bool:
    """Does a run compute the same when `key` alone differs between its recipe and the new one?"""
    if key in ("optimizer.lr_decay_iters", "optimizer.lr_decay_samples"):
        return all(_decays_to_the_end(key, recipe) for recipe in (old, new))
    return key in SAFE_KEYS or key.split(".")[0] in SAFE_GROUPS


def refusals(saved: Recipe, new: Recipe, with_optimizer: bool = True) -> dict[str, str]:
    """{dotted key: why} of what keeps a checkpoint of the recipe `saved` from being loaded into the model of `new`.

    `with_optimizer`: whether its optimizer is loaded too. Each entry was tried on the engine.
    """
    changes, why = changed_keys(saved, new), {}
    for key, (_, after) in changes.items():
        if key in SHAPE_KEYS:
            why[key] = "the checkpoint's tensors have other shapes"
        elif key == "model.quantize":
            why[key] = "int8 weights are for answers alone" if saved.model.quantize else "the checkpoint's weights are not quantized"
        elif key == "model.num_attention_heads":
            why[key] = "the weights would be cut into other heads"
        elif key in TURNED_ON and after == TURNED_ON[key]:
            why[key] = "the checkpoint has no tensors for it"
        elif key in LAYOUT_KEYS and saved.checkpoint.format == "torch" and with_optimizer:
            why[key] = "the torch format is loaded at the layout that saved it"
    if with_optimizer:
        why |= _adapter_refusals(saved, new, changes)
    both_learned = saved.model.position_embedding_type == new.model.position_embedding_type == "learned_absolute"
    if both_learned and "model.max_position_embeddings" in changes:
        why["model.max_position_embeddings"] = "the checkpoint's positions are another number"
    if with_optimizer:
        why |= _optimizer_refusals(saved, new, changes)
        if "training.global_batch_size" in changes and None not in (saved.training.epochs, new.training.epochs):
            why["training.global_batch_size"] = "the epochs behind it are counted in its own batches"
    return why


def changed_model(saved: Recipe, new: Recipe) -> list[Change]:
    """The model's keys under which the checkpoint loads, though it was trained with others."""
    never = refusals(saved, new)
    return [change for change in classify(saved, new) if change.key.startswith("model.") and change.key not in never]


def _optimizer_refusals(saved: Recipe, new: Recipe, changes: dict[str, Any]) -> dict[str, str]:
    """The plain optimizer holds fp32 copies of 16-bit weights only, the distributed one of all."""
    why, torch_format = {}, saved.checkpoint.format == "torch"
    distributed = [recipe.parallel.use_distributed_optimizer for recipe in (saved, new)]
    if torch_format and distributed[0] != distributed[1]:
        why["parallel.use_distributed_optimizer"] = "the torch format holds the other form of the optimizer"
    if torch_format and (new.parallel.zero or 0) >= 2:
        why["parallel.zero"] = "the torch format holds a whole optimizer, and no rank would"
    if "training.precision" in changes:
        to_or_from_fp32 = "fp32" in changes["training.precision"]
        if (torch_format and any(distributed)) or (to_or_from_fp32 and (torch_format or not any(distributed))):
            why["training.precision"] = "the checkpoint's optimizer has no state of that precision"
    return why


def _adapter_refusals(saved: Recipe, new: Recipe, changes: dict[str, Any]) -> dict[str, str]:
    """A checkpoint of adapters holds them and their optimizer's state alone."""
    if "lora.rank" in changes:
        whole = "its checkpoint has the state of all weights' optimizer" if new.lora.rank else "its checkpoint holds adapters alone"
        return {"lora.rank": "its adapters have another rank" if saved.lora.rank and new.lora.rank else whole}
    if saved.lora.rank and sorted(saved.lora.target_modules or ()) != sorted(new.lora.target_modules or ()):
        return {"lora.target_modules": "its adapters are of other matrices"}
    return {}


def _decays_to_the_end(key: str, recipe: Recipe) -> bool:
    """Is the decay's length the training's own, and so no choice but what follows from train_iters or its like?"""
    unit = key.rsplit("_", 1)[1]
    length = getattr(recipe.optimizer, f"lr_decay_{unit}")
    return length in (None, getattr(recipe.training, f"train_{unit}"), getattr(recipe.derived, f"train_{unit}"))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value, default=str)
