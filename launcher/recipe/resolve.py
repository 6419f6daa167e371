"""Fills what follows from the rest of a recipe, so that nobody is asked for it.

What cannot be derived from impossible values stays None: `check` says what is wrong with them.
"""

from __future__ import annotations

import os
from typing import Any

from launcher.recipe.device import resolve_device
from launcher.recipe.ramp import ramp
from launcher.recipe.schema import Recipe, Tokenizer
from launcher.recipe.size import matrix_names
from launcher.recipe.tokenizer import tokenizer_of

DEFAULT_SPLIT = "969, 30, 1"  # Megatron-LM's, where data_path comes without a split


def resolve(recipe: Recipe, sources: dict[str, str], name: str) -> None:
    """Fill the derived values of `recipe` in place and note them in `sources`.

    `name` is the recipe's own name: the run is called so unless run.name says otherwise. Values that were given
    are never changed.
    """

    def fill(key: str, value: Any) -> None:
        group, leaf = key.split(".")
        if getattr(getattr(recipe, group), leaf) is None and value is not None:
            setattr(getattr(recipe, group), leaf, value)
            sources[key] = "derived"

    fill("run.name", name)
    fill("run.dir", f"runs/{recipe.run.name}")
    if recipe.data.data_path is not None:
        fill("data.split", DEFAULT_SPLIT)
    if recipe.data.train is not None:
        _fine_tuning(recipe, sources)
    if (recipe.lora.rank or 0) > 0:
        _lora(recipe, fill, sources)
    _turn_on(recipe, sources, "parallel.use_distributed_optimizer", recipe.parallel.zero == 1)
    fill("preprocess.workers", cores())
    _model(recipe, fill)
    _processes(recipe, fill)
    _lengths(recipe, fill)
    _schedule(recipe, fill)
    _vocabulary(recipe, fill)


def _fine_tuning(recipe: Recipe, sources: dict[str, str]) -> None:
    """What is false unless given, and true where rows are packed, and where the weights come from another run."""
    rounded = recipe.model.family == "yuan2" and recipe.model.rotary_bf16  # whose angles are not those of a place further on
    _turn_on(recipe, sources, "data.reset_attention_mask", recipe.data.packing)
    _turn_on(recipe, sources, "data.reset_position_ids", recipe.data.packing and rounded)
    _turn_on(recipe, sources, "checkpoint.finetune", recipe.checkpoint.load is not None)


def _lora(recipe: Recipe, fill, sources: dict[str, str]) -> None:
    """Adapters are of the weights alone, not of the training that these come from."""
    fill("lora.alpha", 2.0 * recipe.lora.rank)
    fill("lora.target_modules", list(matrix_names(recipe.model.family)))
    _turn_on(recipe, sources, "checkpoint.finetune", recipe.checkpoint.load is not None)


def _turn_on(recipe: Recipe, sources: dict[str, str], key: str, wanted: bool) -> None:
    if wanted and sources.get(key, "default") in ("default", "derived"):
        group, leaf = key.split(".")
        setattr(getattr(recipe, group), leaf, True)
        sources[key] = "derived"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _model(recipe: Recipe, fill) -> None:
    m = recipe.model
    if m.hidden_size:
        # Megatron's rule: two thirds of 4h, so that the gate's extra matrix adds no parameters, and a multiple of 64
        fill("model.ffn_hidden_size", int((4 * m.hidden_size * 2 / 3) / 64) * 64 if m.swiglu else 4 * m.hidden_size)
        if m.num_attention_heads and m.hidden_size % m.num_attention_heads == 0:
            fill("model.kv_channels", m.hidden_size // m.num_attention_heads)
    fill("model.num_query_groups", m.num_attention_heads)
    fill("model.max_position_embeddings", recipe.training.seq_length)


def _processes(recipe: Recipe, fill) -> None:
    p, t, launch = recipe.parallel, recipe.training, recipe.launch
    fill("derived.device", resolve_device(launch))
    fill("derived.world_size", launch.nnodes * launch.nproc_per_node)
    fill("data.num_workers", 2 if recipe.derived.device == "cuda" else 0)
    if recipe.derived.device == "cpu" and launch.nproc_per_node > 0:
        fill("launch.cpu_threads", max(1, cores() // launch.nproc_per_node))
    ranks = p.tensor_model_parallel_size * p.pipeline_model_parallel_size
    if ranks > 0 and recipe.derived.world_size % ranks == 0:
        fill("derived.data_parallel_size", recipe.derived.world_size // ranks)
    at_once = (t.micro_batch_size or 0) * (recipe.derived.data_parallel_size or 0)
    if at_once > 0:
        fill("training.global_batch_size", at_once)
        if t.global_batch_size % at_once == 0:
            fill("derived.num_microbatches", t.global_batch_size // at_once)


def _lengths(recipe: Recipe, fill) -> None:
    """The whole training in steps, and in the samples that those steps consume."""
    t = recipe.training
    samples = t.train_samples
    if samples is None and t.train_tokens is not None and t.seq_length:
        samples = t.train_tokens // t.seq_length
    batch = t.global_batch_size
    if not batch or batch < 0:
        return
    if t.train_iters is not None:
        fill("derived.train_iters", t.train_iters)
        fill("derived.train_samples", t.train_iters * batch)
    elif samples is not None:
        growing = ramp(t.rampup_batch_size, batch, samples)
        rest = samples - sum(size * steps for size, steps in growing)
        steps, rest = sum(steps for _, steps in growing) + rest // batch, rest % batch
        fill("derived.train_iters", steps)
        fill("derived.train_samples", samples - rest)


def _schedule(recipe: Recipe, fill) -> None:
    """`*_tokens` become iterations or samples, whichever the training counts; the decay is as long as the training."""
    t, o = recipe.training, recipe.optimizer
    by_iters = t.train_iters is not None
    unit, per_unit = ("iters", (t.global_batch_size or 0) * (t.seq_length or 0)) if by_iters else ("samples", t.seq_length or 0)
    for length in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        tokens = getattr(o, f"{length}_tokens")
        if tokens and per_unit > 0:
            if length == "lr_warmup" and o.lr_warmup_iters == o.lr_warmup_samples == 0:
                setattr(o, f"{length}_{unit}", None)
            fill(f"optimizer.{length}_{unit}", tokens // per_unit)
    if o.lr_decay_iters is None and o.lr_decay_samples is None:
        whole = t.train_samples or (t.train_tokens or 0) // max(1, t.seq_length or 1) or None
        fill(f"optimizer.lr_decay_{unit}", t.train_iters if by_iters else whole)


def _vocabulary(recipe: Recipe, fill) -> None:
    built, stated = vocabulary_size(recipe.tokenizer), recipe.tokenizer.vocab_size
    if recipe.tokenizer.type != "NullTokenizer" and stated:  # its files are not on this machine, or tokens are added to them
        built = max(built or 0, stated)
    fill("derived.vocab_size", built)
    if recipe.tokenizer.type != "NullTokenizer":
        fill("tokenizer.vocab_size", recipe.derived.vocab_size)
    fill("derived.padded_vocab_size", padded_vocabulary(recipe))


def padded_vocabulary(recipe: Recipe) -> int | None:
    """Rows of the embedding: the vocabulary, up to a whole number of parts for every tensor-parallel rank."""
    divisor = recipe.model.make_vocab_size_divisible_by * recipe.parallel.tensor_model_parallel_size
    return -(-recipe.derived.vocab_size // divisor) * divisor if recipe.derived.vocab_size and divisor > 0 else None


def vocabulary_size(tokenizer: Tokenizer) -> int | None:
    """How many ids the tokenizer has; None where it cannot be built, which `check` explains."""
    from data_tools.errors import TokenizerError

    try:
        return tokenizer_of(tokenizer).vocab_size
    except TokenizerError:
        return None


def keep_padded_vocabulary(recipe: Recipe, padded: int | None) -> None:
    """Keep the padded vocabulary that a checkpoint was trained with where this TP can split it.

    It follows from TP, and another one adds or takes logits that share the softmax: the loss would jump (9.2093 to
    9.2136 from 50304 to 50432 in one measured case).
    """
    tp = recipe.parallel.tensor_model_parallel_size
    if padded and padded >= (recipe.derived.vocab_size or 0) and tp > 0 and padded % tp == 0:
        recipe.derived.padded_vocab_size = padded
