"""`yuan check`: would a recipe run here?"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Annotated, Optional

import typer

from launcher.commands.pretrain import trained
from launcher.console import columns, hanging, wrapped
from launcher.errors import UserError
from launcher.recipe import Loaded, load
from launcher.recipe.check import CHECKS
from launcher.recipe.check import check as find_problems
from launcher.recipe.check_memory import reckonable
from launcher.recipe.check_run import going_on
from launcher.recipe.estimate.report import estimate
from launcher.recipe.problem import Case
from launcher.recipe.sample_index import described
from launcher.recipe.size import parameters
from launcher.recipe.verb import verb_of

_FOR_HELP = "The verb to check for: " + ", ".join(CHECKS) + ". Default: the one that the recipe is for."


def check(
    words: Annotated[
        Optional[list[str]], typer.Argument(metavar="recipe=NAME [KEY=VALUE]...", help="As for the verb that is checked.")
    ] = None,
    verb: Annotated[Optional[str], typer.Option("--for", metavar="VERB", help=_FOR_HELP)] = None,
    nodes: Annotated[Optional[int], typer.Option(metavar="N", help="Short for launch.nnodes=N launch.device=cuda.")] = None,
    gpus_per_node: Annotated[
        Optional[int], typer.Option(metavar="G", help="Short for launch.nproc_per_node=G launch.device=cuda.")
    ] = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="As for pretrain: go on with a run whose recipe was another.")
    ] = False,
) -> None:
    """Say whether a recipe would run, all faults at once, without starting anything.

    \b
    Examples:
      yuan check recipe=345m_1dp
      yuan check recipe=345m_4dp parallel.tensor_model_parallel_size=2
      yuan check recipe=345m_4dp --nodes 2 --gpus-per-node 8
      yuan check --for preprocess
    """
    if verb is not None and verb not in CHECKS:
        raise UserError(f"there is nothing to check for {verb!r}", "--for", "one of " + ", ".join(CHECKS))
    loaded = load(
        words or [],
        {"launch.nnodes": (nodes, "--nodes"), "launch.nproc_per_node": (gpus_per_node, "--gpus-per-node")}
        | {"launch.device": ("cuda" if nodes or gpus_per_node else None, "--nodes or --gpus-per-node")},
        default={"tokenizer": "preprocess", "preprocess": "preprocess", "generate": "generate"}.get(verb or ""),
        checked=True,
    )
    verb = verb or verb_of(loaded)
    problems = find_problems(loaded.recipe, loaded.sources, verb, loaded.faults, accept_changes=accept_changes)
    for severity, error in [("error", fault) for fault in loaded.faults] + [(one.severity, one.as_error()) for one in problems]:
        print(wrapped(f"{severity}: {error}", sys.stdout))
    errors = len(loaded.faults) + sum(problem.severity == "error" for problem in problems)
    if errors:
        if verb in ("pretrain", "sft") and not loaded.faults and (lines := takes(loaded)):
            print("\n" + "\n".join(lines))
        print(f"\n{loaded.name} would not run: {errors} error{'s' * (errors > 1)}")
        sys.exit(2)
    print(("\n" if problems else "") + f"{loaded.name} would run" + ("" if verb == "pretrain" else f" with `yuan {verb}`"))
    if not find_spec(f"launcher.commands.{verb}"):
        print(f"  but this version of yuan can only check it: there is no verb {verb} yet")
    if verb in ("pretrain", "sft"):
        print("\n".join(summary(loaded) + [f"  {line}" for line in going_on(loaded.recipe)]))


def takes(loaded: Loaded) -> list[str]:
    """What the training takes, which is known without the data, or that it is not known without the tokenizer."""
    if reckonable(Case(loaded.recipe, loaded.sources)):
        return aligned(estimate(loaded.recipe))
    if loaded.recipe.derived.vocab_size is None:
        return aligned({"memory": "not known: the tokenizer is missing; with tokenizer.vocab_size=… it is"})
    return []


def summary(loaded: Loaded) -> list[str]:
    """The sizes that follow from a recipe, one line each."""
    r = loaded.recipe
    p, t, d = r.parallel, r.training, r.derived
    if t.epochs is None:
        length = f"{d.train_iters:,} steps = {d.train_samples:,} samples = {d.train_samples * t.seq_length:,} tokens"
    else:
        length = f"{t.epochs} epoch{'s' * (t.epochs > 1)} over {r.data.train}"
    lines = {
        "model": f"{r.model.family}, {parameters(r) / 1e6:,.1f} M parameters, {t.precision}",
        **({"adapters": trained(r)} if r.lora.rank else {}),
        "processes": f"{d.world_size} on {d.device}: TP {p.tensor_model_parallel_size} x PP {p.pipeline_model_parallel_size} x DP {d.data_parallel_size}",
        "batch": f"{t.global_batch_size} samples a step = micro batch {t.micro_batch_size} x DP {d.data_parallel_size} x {d.num_microbatches}",
        "length": length,
        "vocabulary": f"{d.vocab_size:,} ids, padded to {d.padded_vocab_size:,}",
        "run folder": str(r.run.dir),
        **({"index": index} if (index := described(r)) else {}),
        **estimate(r),
    }
    return aligned(lines)


def aligned(lines: dict[str, str]) -> list[str]:
    """Names and their texts, one below the other; the further lines of a text, a table's, a little to the right."""
    width, found = columns(sys.stdout), []
    for name, text in lines.items():
        first, *table = text.split("\n")
        found += [hanging(f"  {name:<11} ", first, width), *(f"    {row}" for row in table)]
    return found
