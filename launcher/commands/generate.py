"""`yuan generate`: a file of prompts into a file of answers."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Optional

import typer

import launcher.workers
from launcher.commands.pretrain import warn
from launcher.errors import UserError, raise_all
from launcher.launch.torchrun import STOPPED, launch
from launcher.recipe import Loaded
from launcher.recipe import check_answers
from launcher.recipe import load as load_recipe
from launcher.recipe.check import ensure
from launcher.recipe.frozen import write_frozen
from launcher.recipe.inference import find_checkpoint, inference_recipe
from launcher.recipe.problem import Case
from launcher.recipe.schema import Generate, Recipe
from launcher.run.folder import RunFolder
from launcher.workers.generate import SUMMARY

BROKEN_OFF = 130  # exit code: stopped, and the same command does not go on from there
WORKER = Path(launcher.workers.__file__).with_name("generate.py")
_INPUT_HELP = "JSONL with query (or prompt, text, or instruction and input) on each line."
_GREEDY_HELP = "Always the likeliest token; so it is too where no option of sampling is given."
_TOP_P_HELP = "Sample among the likeliest tokens whose probabilities add up to p."
_PENALTY_HELP = "Above 1 makes tokens already seen less likely."
_LOAD_HELP = "Run folder, checkpoint or Hugging Face folder. Default: the newest checkpoint under runs/."
_OUTPUT_HELP = "One answer per line, newlines escaped; a name ending in .jsonl gets whole records. Default: output.txt."


def generate(
    words: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="[recipe=NAME] [KEY=VALUE]...", help="A recipe, and values that override its own."),
    ] = None,
    input: Annotated[Optional[str], typer.Option("--input", help=_INPUT_HELP)] = None,
    output: Annotated[Optional[str], typer.Option("--output", help=_OUTPUT_HELP)] = None,
    load: Annotated[Optional[str], typer.Option("--load", help=_LOAD_HELP)] = None,
    max_new_tokens: Annotated[Optional[int], typer.Option("--max-new-tokens", help="Longest answer in tokens.")] = None,
    batch_size: Annotated[Optional[int], typer.Option("--batch-size", help="Prompts answered side by side.")] = None,
    greedy: Annotated[Optional[bool], typer.Option("--greedy/--no-greedy", help=_GREEDY_HELP)] = None,
    temperature: Annotated[Optional[float], typer.Option("--temperature", help="Sample; divides the logits.")] = None,
    top_k: Annotated[Optional[int], typer.Option("--top-k", help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[Optional[float], typer.Option("--top-p", help=_TOP_P_HELP)] = None,
    repetition_penalty: Annotated[Optional[float], typer.Option("--repetition-penalty", help=_PENALTY_HELP)] = None,
    seed: Annotated[Optional[int], typer.Option("--seed", help="Seed of the sampling.")] = None,
) -> None:
    """Answer every line of a JSONL file with a trained model.

    The model, its tokenizer and its layout come from the checkpoint. A bad line gets an error in its place and the
    others are answered; the exit code is 0 then, and 1 where no line could be answered. Stopped by Ctrl-C, it keeps the
    answers that it has in output.stopped.txt; the exit code is 130.

    \b
    Examples:
      yuan generate --input pred_input.jsonl
      yuan generate --input pred_input.jsonl --load runs/345m_1dp
      yuan generate --input pred_input.jsonl --temperature 0.8 --seed 7
    """
    flags = {
        "input": input, "output": output, "load": load, "max_new_tokens": max_new_tokens, "batch_size": batch_size,
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "greedy": greedy,
        "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    options = {f"generate.{key}": (value, "--" + key.replace("_", "-")) for key, value in flags.items()}
    loaded = load_recipe(words or [], options, default="generate")
    _check_files(loaded)
    checkpoint, passed = find_checkpoint(loaded)
    found = " (the newest)" if loaded.recipe.generate.load is None else ""
    recipe, sources = inference_recipe(loaded, checkpoint)
    warn(ensure(Loaded(recipe, sources, loaded.name), "generate"))
    for line in passed:
        typer.echo(f"warning: passed over: {line}", err=True)
    if recipe.tokenizer.type == "NullTokenizer":
        typer.echo("warning: no tokenizer goes with the weights: ids alone will do as text", err=True)
    typer.echo(_plan(recipe, found), err=True)
    raise typer.Exit(_run(recipe))


def _check_files(loaded: Loaded) -> None:
    """The input and the output, before a checkpoint is looked for; the output's folder is made."""
    raise_all([problem.as_error() for problem in check_answers.files(Case(loaded.recipe, loaded.sources))])
    output = Path(loaded.recipe.generate.output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"the output's folder cannot be made: {error.strerror}"
        raise UserError(what, str(output.parent), "give another --output") from None


def _plan(recipe: Recipe, found: str) -> str:
    parallel, derived, options = recipe.parallel, recipe.derived, recipe.generate
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layout = f"TP {tp}, PP {pp}, DP {derived.data_parallel_size}"
    return "\n".join(
        [
            f"model      {options.load}{found}",
            f"processes  {derived.world_size} x {derived.device}: {layout}, {recipe.training.precision}",
            f"answers    at most {options.max_new_tokens} tokens, {options.batch_size} side by side, {_sampling(options)}",
        ]
    )


def _sampling(options: Generate) -> str:
    if options.greedy or options.temperature == 0 or options.top_k == 1:
        words = ["greedy"]
    else:
        words = [f"temperature {options.temperature:g}"]
        words += [f"top-k {options.top_k}"] if options.top_k else []
        words += [f"top-p {options.top_p:g}"] if options.top_p else []
        words += [f"seed {options.seed}"]
    words += [f"repetition penalty {options.repetition_penalty:g}"] if options.repetition_penalty != 1 else []
    return ", ".join(words)


def _run(recipe: Recipe) -> int:
    """Launch the ranks from a folder of their own, which stays only where ranks died and it holds their logs."""
    folder = RunFolder(tempfile.mkdtemp(prefix="yuan-generate-"))
    died = False
    try:
        folder.logs.mkdir()
        write_frozen(recipe, folder.recipe)
        code = launch(recipe, folder, WORKER, "generate")
        summary, died = folder.path / SUMMARY, code not in (0, STOPPED)
        if died or recipe.launch.node_rank > 0:
            return code
        if not summary.is_file():  # stopped before the model was there
            return _nothing_yet()
        return _report(json.loads(summary.read_text(encoding="utf-8")))
    finally:
        if not died:
            shutil.rmtree(folder.path, ignore_errors=True)


def _nothing_yet() -> int:
    typer.echo("stopped    nothing was answered yet, and nothing is written; the same command begins anew", err=True)
    return BROKEN_OFF


def _report(summary: dict) -> int:
    """Say what was done. Returns the exit code."""
    from launcher.engine.generate.records import escape

    if summary["stopped"] and not summary["answered"]:
        return _nothing_yet()
    if summary["sample"]:
        question, answer = (escape(text) for text in summary["sample"])
        typer.echo(f"question   {_shorten(question)}\nanswer     {_shorten(answer)}", err=True)
    tokens, seconds = summary["tokens"], summary["seconds"]
    rate = f"{tokens:,} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):,.0f} tokens/s)"
    typer.echo(f"answered   {summary['answered']:,} {'line' if summary['answered'] == 1 else 'lines'}, {rate}", err=True)
    if summary["bad"]:
        count = f"{summary['bad']:,} {'line was' if summary['bad'] == 1 else 'lines were'}"
        typer.echo(f"warning: {count} not answered; the output says why in their place:", err=True)
        for number, error in summary["first_bad"]:
            typer.echo(f"    line {number}: {_shorten(escape(error))}", err=True)
    typer.echo(f"output     {summary['output']}", err=True)
    if summary["stopped"]:
        typer.echo("stopped    the output tells which lines were not reached; the same command begins anew", err=True)
        return BROKEN_OFF
    return 1 if summary["bad"] and not summary["answered"] else 0


def _shorten(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 4] + " ..."
