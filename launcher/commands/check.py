"""`yuan check`: would a recipe run here?"""

from __future__ import annotations

import sys
from typing import Annotated, Optional

import typer

from launcher.errors import UserError
from launcher.recipe import Loaded, load
from launcher.recipe.check import CHECKS
from launcher.recipe.check import check as find_problems
from launcher.recipe.schema import Recipe


def check(
    words: Annotated[
        Optional[list[str]], typer.Argument(metavar="recipe=NAME key=value", help="As for the verb that is checked.")
    ] = None,
    verb: Annotated[
        str, typer.Option("--for", metavar="VERB", help="The verb to check for: " + ", ".join(CHECKS) + ".")
    ] = "pretrain",
) -> None:
    """Say whether a recipe would run, all faults at once, without starting anything.

    \b
    Examples:
      yuan check recipe=345m_1dp
      yuan check recipe=345m_4dp parallel.tensor_model_parallel_size=2
      yuan check --for preprocess
    """
    if verb not in CHECKS:
        raise UserError(f"there is nothing to check for {verb!r}", "--for", "one of " + ", ".join(CHECKS))
    loaded = load(words or [], default=None if verb == "pretrain" else verb)
    problems = find_problems(loaded.recipe, loaded.sources, verb)
    for problem in problems:
        print(f"{problem.severity}: {problem.as_error()}")
    errors = sum(problem.severity == "error" for problem in problems)
    if errors:
        print(f"\n{loaded.name} would not run: {errors} error{'s' * (errors > 1)}")
        sys.exit(2)
    print(("\n" if problems else "") + f"{loaded.name} would run")
    if verb == "pretrain":
        print("\n".join(summary(loaded)))


def summary(loaded: Loaded) -> list[str]:
    """The sizes that follow from a recipe, one line each."""
    r = loaded.recipe
    p, t, d = r.parallel, r.training, r.derived
    tokens = d.train_samples * t.seq_length
    lines = {
        "model": f"{r.model.family}, {parameters(r) / 1e6:,.1f} M parameters, {t.precision}",
        "processes": f"{d.world_size} on {d.device}: TP {p.tensor_model_parallel_size} x PP {p.pipeline_model_parallel_size} x DP {d.data_parallel_size}",
        "batch": f"{t.global_batch_size} samples a step = micro batch {t.micro_batch_size} x DP {d.data_parallel_size} x {d.num_microbatches}",
        "length": f"{d.train_iters:,} steps = {d.train_samples:,} samples = {tokens:,} tokens",
        "vocabulary": f"{d.vocab_size:,} ids, padded to {d.padded_vocab_size:,}",
        "run folder": str(r.run.dir),
    }
    return [f"  {name:<11} {text}" for name, text in lines.items()]


def parameters(recipe: Recipe) -> int:
    """Trainable numbers of the whole model, the padded vocabulary's included."""
    m = recipe.model
    hidden, ffn, heads_width = m.hidden_size, m.ffn_hidden_size, m.num_attention_heads * m.kv_channels
    groups_width = m.num_query_groups * m.kv_channels
    qkv, up = heads_width + 2 * groups_width, ffn * (2 if m.swiglu else 1)
    norm = hidden * (2 if m.normalization == "LayerNorm" else 1)
    layer = hidden * (qkv + heads_width + up + ffn) + 2 * norm
    if m.add_bias_linear:
        layer += qkv + hidden + up + hidden
    elif m.add_qkv_bias:
        layer += qkv
    tables = recipe.derived.padded_vocab_size * (2 if m.untie_embeddings_and_output_weights else 1)
    if m.position_embedding_type == "learned_absolute":
        tables += m.max_position_embeddings
    return m.num_layers * layer + tables * hidden + norm
