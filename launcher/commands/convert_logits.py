"""`yuan convert A B --verify --logits`: what two checkpoints answer to the same prompts, token by token, both by our engine."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import typer

import launcher.workers
from launcher.errors import UserError
from launcher.launch.torchrun import STOPPED, launch
from launcher.recipe import Loaded
from launcher.recipe import load as load_recipe
from launcher.recipe.frozen import write_frozen
from launcher.recipe.inference import describes_model, find_checkpoint, inference_recipe
from launcher.recipe.schema import Recipe
from launcher.recipe.tokenizer import tokenizer_of
from launcher.run.folder import RunFolder
from launcher.workers.logits import SECOND, SUMMARY

WORKER = Path(launcher.workers.__file__).with_name("logits.py")
TOLERANCE = 1e-3
_ONE = ("parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=1")
_SHOWN = 12  # ids of a prompt


def expect_prompts(logits: bool, prompts: str | None, verify: bool) -> None:
    """What was typed must go together, and the prompts be there.

    Raises:
        UserError: they are not.
    """
    if (logits or prompts) and not verify or prompts and not logits:
        raise UserError("--logits and --input are of a comparison", "command line", "yuan convert A B --verify --logits")
    if prompts is not None and not Path(prompts).is_file():
        raise UserError(f"there is no file {prompts}", "--input", "--input FILE.jsonl, with query, prompt or text on each line")


def compare_logits(loaded: Loaded, words: list[str], prompts: str | None, tolerance: float) -> int:
    """Let the models of convert.source and convert.target read the same prompts, in one process unless `words` lay them out
    otherwise, and say how far their logits are apart. Returns the exit code: 1 where it is further than `tolerance`.

    Raises:
        UserError: a checkpoint cannot be read, or the prompts.
    """
    asked = loaded.recipe.convert
    recipes = [_recipe(loaded, words, place, prompts) for place in (asked.source, asked.target)]
    recipes[1].convert = replace(asked, source_fused_layout=None)  # how the first one's fused matrices lie
    if len({recipe.training.precision for recipe in recipes}) > 1:
        for recipe in recipes:
            recipe.training.precision = "fp32"  # else what is told is how roughly one of them computes
    found = _run(recipes)
    return 1 if found is None else _say(found, recipes[0], prompts is not None, tolerance)


def _recipe(loaded: Loaded, words: list[str], place: str | None, prompts: str | None) -> Recipe:
    """The recipe by which one of the two answers; its model is read out of the checkpoint, or is the named recipe's."""
    named = [f"recipe={loaded.name}"] if describes_model(loaded) else []
    given = [word for word in words if word.split(".")[0] in ("parallel", "launch", "training", "tokenizer")]
    laid_out = [word for word in _ONE if not any(other.startswith(word.split("=")[0]) for other in given)]
    options: dict[str, tuple[object, str]] = {"generate.load": (place, "command line"), "generate.input": (prompts, "--input")}
    mine = load_recipe([*named, *laid_out, *given], options, default="generate")
    mine.recipe.convert.hf_config = loaded.recipe.convert.hf_config
    recipe, _ = inference_recipe(mine, find_checkpoint(mine)[0])
    recipe.convert = loaded.recipe.convert
    return recipe


def _run(recipes: list[Recipe]) -> dict | None:
    """What the ranks found; None where they died."""
    folder = RunFolder(tempfile.mkdtemp(prefix="yuan-logits-"))
    died = False
    try:
        folder.logs.mkdir()
        write_frozen(recipes[0], folder.recipe)
        write_frozen(recipes[1], folder.path / SECOND)
        code = launch(recipes[0], folder, WORKER, "convert")
        died = code not in (0, STOPPED)
        summary = folder.path / SUMMARY
        return json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else None
    finally:
        if not died:
            shutil.rmtree(folder.path, ignore_errors=True)


def _say(found: dict, recipe: Recipe, texts: bool, tolerance: float) -> int:
    equal = found["largest"] <= tolerance
    most, tokens = found["most"], found["tokens"]
    typer.echo(f"logits     of {found['prompts']} prompts, {tokens:,} tokens, {recipe.training.precision}; they spread by {found['spread']:.3g}")
    typer.echo(f"apart      at most {found['largest']:.3g}, on average {found['mean']:.3g}: {'within' if equal else 'beyond'} --tolerance {tolerance:g}")
    typer.echo(f"likeliest  the same next token after {found['agree']:,} of {tokens:,}")
    if not found["largest"]:
        return 0
    ids, place = most["ids"][: most["place"] + 1], most["place"]
    shown = repr(tokenizer_of(recipe.tokenizer).decode(ids)) if texts else " ".join(map(str, ids[-_SHOWN:]))
    first, second = most["likeliest"]
    typer.echo(f"most       in prompt {most['prompt'] + 1} after token {place + 1}: {'... ' if not texts and place >= _SHOWN else ''}{shown}")
    typer.echo(f"           likeliest then {first}" + (" in both" if first == second else f" and {second}"))
    return 0 if equal else 1
