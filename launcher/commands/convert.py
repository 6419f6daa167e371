"""`yuan convert`: a checkpoint into another format."""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from checkpoints.adapters import read_note
from checkpoints.folder import CheckpointError
from checkpoints.recognise import QUANTIZED, Found, recognise
from launcher.commands.convert_logits import TOLERANCE, compare_logits, expect_prompts
from launcher.commands.convert_report import Meter, errors, grouped, next_step, plan
from launcher.commands.convert_verify import compare
from launcher.commands.pretrain import warn
from launcher.errors import UserError, of_system
from launcher.launch.torchrun import STOPPED
from launcher.recipe import Loaded
from launcher.recipe import load as load_recipe
from launcher.recipe.check import ensure
from launcher.recipe.check_data import parse_shard
from launcher.recipe.converted import TokenizerFound, agree, find_tokenizer, open_checkpoint, recipe_for, source_fused
from launcher.recipe.frozen import own_recipe
from launcher.recipe.frozen import write_frozen
from launcher.recipe.pipeline import stages_asked
from launcher.recipe.schema import Recipe, Tokenizer

if TYPE_CHECKING:  # it imports torch
    from checkpoints.formats.base import Source

_WORDS_HELP = "The checkpoint's folder and the folder to write; a recipe, and values that override its own."
_TO_HELP = "The format to write: hf, torch_dist, torch, yuan, pai or mindspore. Default: torch_dist, which loads at any TP and PP."
_DTYPE_HELP = "Precision of what is written: bf16, fp16 or fp32. Default: the source's."
_HF_HELP = "A Hugging Face folder whose config.json and tokenizer are to go with the weights."
_IMPL_HELP = "torch: the names of modules, local (default, yuan's on a CPU) or transformer_engine, as Megatron-LM's option of that name."
_PAI_HELP = "pai: the release whose files to write, v0.6 (default, and later) or v0.5."
_FUSED_HELP = "MindSpore: query, key and value separate, or in one matrix: concat (MindFormers to 1.3), grouped (from 1.5)."
_SOURCE_FUSED_HELP = "The same of the source, where it is another than the target's."
_LAYOUT_HELP = "Explicit pipeline stages, in Megatron's notation: 'Et*3|t*3L'."
_VIRTUAL_HELP = "torch: layers of each virtual stage, several of which every pipeline rank has (interleaving). --layout may have more stages than --pp too."
_OPTIMIZER_HELP = (
    "keep: the training goes along, for a run to go on at another layout or format: optimizer's state, schedule, step, data position. "
    "plain or distributed: with the optimizer's state in that form. Default: none, weights alone."
)
_QUANTIZE_HELP = "int8: the layers' matrices as whole numbers with a scale for each output, for answers alone."
_VERIFY_HELP = "Write nothing: compare two checkpoints, of any formats and layouts, tensor by tensor. Exit code 1 where they differ."
_LOGITS_HELP = "With --verify: let both read the same prompts, and compare what they expect after every token; it decides the exit code."
_INPUT_HELP = "--logits: the prompts, JSONL as for yuan generate. Default: eight of random token ids."
_WORKERS_HELP = "Processes. Default: 1, which computes checksums and writes side by side."
_SHARD_HELP = "Write the I-th of N shares of the tensors, from 0, each on a machine of its own; the last to finish ends the conversion."
_VOCABULARY_HELP = "Ids of the vocabulary, for a source that says only what it was padded to."


def convert(
    words: Annotated[
        Optional[list[str]], typer.Argument(metavar="SRC DST | [recipe=NAME] [KEY=VALUE]...", help=_WORDS_HELP, show_default=False)
    ] = None,
    to: Annotated[Optional[str], typer.Option("--to", help=_TO_HELP)] = None,
    tp: Annotated[Optional[int], typer.Option("--tp", help="Tensor-parallel ranks, in formats that have ranks.")] = None,
    pp: Annotated[Optional[int], typer.Option("--pp", help="Pipeline stages, in formats that have ranks.")] = None,
    layout: Annotated[Optional[str], typer.Option("--layout", help=_LAYOUT_HELP)] = None,
    transformer_impl: Annotated[Optional[str], typer.Option("--transformer-impl", help=_IMPL_HELP)] = None,
    virtual: Annotated[Optional[int], typer.Option("--num-layers-per-virtual-pipeline-stage", help=_VIRTUAL_HELP)] = None,
    optimizer: Annotated[Optional[str], typer.Option("--optimizer", help=_OPTIMIZER_HELP)] = None,
    pai_release: Annotated[Optional[str], typer.Option("--pai-release", help=_PAI_HELP)] = None,
    fused_layout: Annotated[Optional[str], typer.Option("--fused-layout", help=_FUSED_HELP)] = None,
    source_fused_layout: Annotated[Optional[str], typer.Option("--source-fused-layout", help=_SOURCE_FUSED_HELP)] = None,
    dtype: Annotated[Optional[str], typer.Option("--dtype", help=_DTYPE_HELP)] = None,
    quantize: Annotated[Optional[str], typer.Option("--quantize", help=_QUANTIZE_HELP)] = None,
    hf_config: Annotated[Optional[str], typer.Option("--hf-config", help=_HF_HELP)] = None,
    vocab_size: Annotated[Optional[int], typer.Option("--vocab-size", help=_VOCABULARY_HELP)] = None,
    workers: Annotated[Optional[int], typer.Option("--workers", min=1, help=_WORKERS_HELP)] = None,
    shard: Annotated[Optional[str], typer.Option("--shard", metavar="I/N", help=_SHARD_HELP)] = None,
    verify: Annotated[bool, typer.Option("--verify", help=_VERIFY_HELP)] = False,
    logits: Annotated[bool, typer.Option("--logits", help=_LOGITS_HELP)] = False,
    prompts: Annotated[Optional[str], typer.Option("--input", help=_INPUT_HELP)] = None,
    tolerance: Annotated[Optional[float], typer.Option("--tolerance", help=f"--logits: how far apart is equal. Default: {TOLERANCE:g}.")] = None,
    allow_nan: Annotated[Optional[bool], typer.Option("--allow-nan", help="Convert weights that hold NaN or infinity as they are.")] = None,
) -> None:
    """Write a checkpoint in another format, tensor by tensor: no model is built, no GPU is needed.

    SRC may be a Hugging Face folder, a run, or a checkpoint folder. DST gets its name when it is whole, read back and found
    to hold what SRC holds; beside the weights lies conversion.json, which says what became of every tensor. A conversion that was
    stopped goes on with what it had written when the same command is typed again.

    \b
    Examples:
      yuan convert data/Llama-2-7b-hf data/llama2_7b    from Hugging Face
      yuan convert runs/345m_1dp data/345m_hf --to hf   and to it
      yuan convert A B --verify                         do two hold the same?
    """
    places = [word for word in words or [] if "=" not in word]
    if len(places) not in (0, 2):
        shown = " ".join(places)
        raise UserError(f"two folders are wanted, SRC and DST, and {len(places)} given: {shown}", "command line", "yuan convert SRC DST --to hf")
    source, target = places or (None, None)
    options: dict[str, tuple[object, str]] = {
        "convert.source": (source, "command line"),
        "convert.target": (target, "command line"),
        "convert.to": (to, "--to"),
        "convert.tensor_model_parallel_size": (tp, "--tp"),
        "convert.pipeline_model_parallel_size": (pp, "--pp"),
        "convert.pipeline_model_parallel_layout": (layout, "--layout"),
        "convert.num_layers_per_virtual_pipeline_stage": (virtual, "--num-layers-per-virtual-pipeline-stage"),
        "convert.optimizer": (optimizer, "--optimizer"),
        "convert.fused_layout": (fused_layout, "--fused-layout"),
        "convert.source_fused_layout": (source_fused_layout, "--source-fused-layout"),
        "convert.transformer_impl": (transformer_impl, "--transformer-impl"),
        "convert.pai_release": (pai_release, "--pai-release"),
        "convert.dtype": (dtype, "--dtype"),
        "convert.quantize": (quantize, "--quantize"),
        "convert.hf_config": (hf_config, "--hf-config"),
        "convert.vocab_size": (vocab_size, "--vocab-size"),
        "convert.allow_nan": (allow_nan, "--allow-nan"),
        "convert.workers": (workers, "--workers"),
        "convert.shard": (shard, "--shard"),
    }
    expect_prompts(logits, prompts, verify)
    if tolerance is not None and not logits:
        raise UserError("--tolerance is of a comparison of logits", "command line", "yuan convert A B --verify --logits --tolerance ...")
    if verify and (workers is not None or shard is not None):
        raise UserError("--workers and --shard are of writing, and --verify writes nothing", "command line", "leave them out")
    loaded = load_recipe([word for word in words or [] if "=" in word], options, default="", checked=True)
    try:
        if verify:
            differ = compare(loaded)
            raise typer.Exit(compare_logits(loaded, words or [], prompts, TOLERANCE if tolerance is None else tolerance) if logits else differ)
    except CheckpointError as error:
        raise UserError(str(error), "", error.fix) from error
    except OSError as error:
        raise UserError(f"cannot read: {error}", "", "see to the disk and the rights there") from error
    carry_out(loaded)


def carry_out(loaded: Loaded) -> None:
    """Check and carry out the conversion that a recipe asks for.

    Raises:
        UserError: it cannot be; nothing is at its target then.
    """
    warn(ensure(loaded, "convert"))
    try:
        _run(loaded)
    except CheckpointError as error:
        raise UserError(str(error), loaded.recipe.convert.source or "", error.fix) from error
    except KeyboardInterrupt:
        part = f"{str(loaded.recipe.convert.target).rstrip('/')}.part"
        typer.echo(f"stopped    {f'what is written is kept in {part}' if Path(part).is_dir() else 'nothing was written yet'}; the same command goes on", err=True)
        raise typer.Exit(STOPPED) from None
    except OSError as error:
        raise of_system(error, str(loaded.recipe.convert.target), ", and start again") from error


def _run(loaded: Loaded) -> None:
    asked = loaded.recipe.convert
    found = recognise(Path(asked.source or ""))
    base = own_recipe(found.path)
    from checkpoints import convert as conversion  # torch takes 3 s to import
    from checkpoints.parallel import give_memory_back
    from checkpoints.quantize import Dequantized, Quantized

    source = _opened(loaded, found, base)
    agree(loaded, source.model)
    tokenizer = find_tokenizer(loaded, source, base)
    types = conversion.dtypes(source, conversion.DTYPES[asked.dtype] if asked.dtype else None, asked.to)
    size = conversion.nbytes(source, types)
    typer.echo(plan(source, found, asked.to, str(asked.target), sorted({conversion.NAMES.get(t, str(t)) for t in types.values()}), size))
    if note := read_note(found.path):
        typer.echo(f"merged     {note}: W + alpha / rank x B A, summed in fp32")
    if isinstance(source, Dequantized):
        typer.echo(f"warning: {source.path} has int8 weights, which {asked.to} has not: what is written are scale x number, {source.lost}", err=True)
    if tokenizer.why:
        typer.echo(f"warning: no tokenizer goes with the weights ({tokenizer.why}): ids alone will do as text", err=True)
    wanted = conversion.Wanted(
        to=asked.to, dtype=asked.dtype, hf_config=Path(asked.hf_config) if asked.hf_config else None, config=_config(tokenizer), allow_nan=asked.allow_nan,
        tensor=asked.tensor_model_parallel_size, pipeline=asked.pipeline_model_parallel_size,
        stages=stages_asked(asked, source.model.num_layers), optimizer=asked.optimizer, transformer_impl=asked.transformer_impl, pai_release=asked.pai_release,
        fused_layout=asked.fused_layout,
    )  # fmt: skip
    precision = next(iter(types.values()))

    def carry(weights: Path) -> None:
        if asked.to in ("torch_dist", "torch"):
            rows = conversion.rows(source, wanted)
            recipe = recipe_for(loaded, source, base, tokenizer.settings, conversion.NAMES[precision], rows)
            _carry(recipe, source, tokenizer, weights)
        else:
            _copy(tokenizer.files, weights if asked.to in conversion.BARE else weights.parent)
            _carry_template(asked.to, tokenizer.settings, weights)

    give_memory_back()
    zeroed: dict[str, int] = {}
    started = time.monotonic()
    with Meter(size, parse_shard(asked.shard)[1]) as meter:
        sums = conversion.convert(
            source, Path(asked.target or ""), wanted, carry, meter.show, zeroed.__setitem__,
            workers=asked.workers, shard=parse_shard(asked.shard), reopen=partial(_opened, loaded, found, base), tell=meter.tell,
        )  # fmt: skip
    seconds = time.monotonic() - started
    if sums is None:
        return
    if zeroed:
        what = f"{sum(zeroed.values()):,} numbers in {len(zeroed):,} tensors, such as {next(iter(zeroed))}, are too small for {asked.dtype}, and became 0"
        typer.echo(f"warning: {what}", err=True)
    for name, why in grouped(source.left_out).items():
        typer.echo(f"left out   {why}: {name}")
    if isinstance(source, Quantized):
        typer.echo(errors(source.errors))
    typer.echo(f"done       {len(source.tensors)} tensors, {size / 1e6:,.1f} MB in {seconds:.1f} s, read back and found equal")
    typer.echo(f"next       {next_step(asked.to, str(asked.target), source.state is not None)}")


def _opened(loaded: Loaded, found: Found, base: Recipe | None) -> Source:
    """The source, quantized or not as the target is to be."""
    from checkpoints.quantize import Dequantized, Quantized
    from checkpoints.wanted import DTYPES

    asked = loaded.recipe.convert
    source = open_checkpoint(loaded, found, base, source_fused(asked), asked.optimizer != "none")
    if asked.quantize:
        return Quantized(source)
    if source.model.quantize and asked.to not in QUANTIZED:
        return Dequantized(source, DTYPES[asked.dtype] if asked.dtype else None)
    return source


def _config(tokenizer: TokenizerFound) -> dict[str, int]:
    """What config.json should say of the tokenizer: without it `transformers` takes GPT-2's or Llama's own ids."""
    from launcher.recipe.tokenizer import tokenizer_of

    eod = tokenizer_of(tokenizer.settings).eod
    return {"bos_token_id": eod, "eos_token_id": eod}


def _copy(files: tuple[Path, ...], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path in files:
        if not (folder / path.name).exists():
            shutil.copy2(path, folder / path.name)


def _carry(recipe: Recipe, source: Source, tokenizer: TokenizerFound, weights: Path) -> None:
    """Put beside torch_dist's weights what training and answering need, and what a way back to Hugging Face needs."""
    from checkpoints.models.published import MODEL_FILES

    of_model = tuple(path for path in source.companions if any(path.match(pattern) for pattern in MODEL_FILES))
    _copy(tokenizer.files, weights / "tokenizer")
    _copy(tuple(path for path in source.companions if path not in of_model), weights / "tokenizer")
    if of_model:
        _copy(of_model, weights / "hf")
    write_frozen(recipe, weights / "recipe.yaml")


def _carry_template(to: str, settings: Tokenizer, folder: Path) -> None:
    """Have the model asked at Hugging Face as it was trained: a template of ours goes along as a Jinja text. The tokenizer's own
    is among its files."""
    if to != "hf" or settings.chat_template in (None, "tokenizer"):
        return
    from data_tools.jinja_texts import write_template
    from launcher.recipe.tokenizer import tokenizer_of

    if why := write_template(folder, settings.chat_template, tokenizer_of(settings)):
        typer.echo(f"warning: the chat template {settings.chat_template} {why}", err=True)
