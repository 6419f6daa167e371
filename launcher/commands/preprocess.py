"""`yuan preprocess`: a JSONL corpus into Megatron's .bin/.idx."""

from __future__ import annotations

import shlex
import sys
import time
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands.data import build_index
from launcher.commands.rows import describe, prepare_rows
from launcher.commands.tokenizer import (
    MergeFile,
    PlainSpecialTokens,
    TokenizerModel,
    TokenizerType,
    VocabFile,
    VocabSize,
    Words,
    tokenizer_options,
    typed_keys,
)
from launcher.console import human_size, labelled, plural
from launcher.errors import UserError, of_system
from launcher.launch.torchrun import STOPPED
from launcher.recipe import Loaded, load, sample_index
from launcher.recipe.check import ensure
from launcher.recipe.check_data import parse_shard
from launcher.recipe.finetuning import settle_rows
from launcher.recipe.keys import yaml_scalar
from launcher.recipe.problem import typed
from launcher.recipe.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from data_tools.preprocess import Counts

_TRAINING_RECIPE = "345m_1dp"  # what the closing line proposes when the data were made without a training recipe
_INPUT_HELP = "Text to tokenize: a file, a folder or a pattern; plain, .gz, .zst, .bz2 or .xz. May be given several times."
_KEYS_HELP = "Keys of each line to tokenize, one output each: --json-keys text title"


def preprocess(
    words: Words = None,
    input: Annotated[list[str] | None, typer.Option("--input", help=_INPUT_HELP)] = None,
    output_prefix: Annotated[str | None, typer.Option("--output-prefix", help="The output is PREFIX_KEY_document.bin and .idx.")] = None,
    json_keys: Annotated[list[str] | None, typer.Option("--json-keys", "--key", metavar="KEY...", help=_KEYS_HELP)] = None,
    tokenizer_type: TokenizerType = None,
    vocab_file: VocabFile = None,
    merge_file: MergeFile = None,
    tokenizer_model: TokenizerModel = None,
    vocab_size: VocabSize = None,
    plain_special_tokens: PlainSpecialTokens = None,
    append_eod: Annotated[
        bool | None, typer.Option("--append-eod/--no-append-eod", help="End every document with the end-of-document id.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Processes.")] = None,
    format: Annotated[str | None, typer.Option("--format", help="jsonl, json, text, yuan or parquet. Default: by the names.")] = None,
    max_bad: Annotated[int | None, typer.Option("--max-bad", min=0, help="Lines that may be left out because they are broken.")] = None,
    shard: Annotated[str | None, typer.Option("--shard", metavar="I/N", help="Only the I-th of N shares of the input, from 0.")] = None,
    use_gigatoken: Annotated[
        bool | None, typer.Option("--use-gigatoken/--no-gigatoken", help="The fast library for byte-level BPE. Default: where exact.")
    ] = None,
    dataset_impl: Annotated[str | None, typer.Option("--dataset-impl", hidden=True)] = None,
    chunk_size: Annotated[int | None, typer.Option("--chunk-size", hidden=True)] = None,
    log_interval: Annotated[int | None, typer.Option("--log-interval", hidden=True)] = None,
) -> None:
    """Tokenize text into Megatron's .bin/.idx, byte for byte as Megatron-LM's preprocess_data.py.

    The options bear Megatron-LM's names; each is short for a recipe's key (--input for preprocess.input).
    Documents keep their order, and a line that cannot be tokenized is refused with its number. A run that was stopped
    goes on where it stood when the same command is typed again.

    \b
    Examples:
      yuan preprocess --input data/corpus.jsonl --workers 2
      yuan preprocess recipe=345m_1dp           its tokenizer, paths and index
    """
    pairs, json_keys = _bare_words_are_keys(words or [], json_keys)
    options: dict[str, tuple[object, str]] = {
        "preprocess.input": (input[0] if input and len(input) == 1 else input, "--input"),
        "preprocess.output_prefix": (output_prefix, "--output-prefix"),
        "preprocess.json_keys": (json_keys, "--json-keys"),
        "preprocess.append_eod": (append_eod, "--append-eod"),
        "preprocess.workers": (workers, "--workers"),
        "preprocess.format": (format, "--format"),
        "preprocess.max_bad": (max_bad, "--max-bad"),
        "preprocess.shard": (shard, "--shard"),
        "tokenizer.use_gigatoken": (use_gigatoken, "--use-gigatoken" if use_gigatoken else "--no-gigatoken"),
        **tokenizer_options(
            type=tokenizer_type,
            vocab_file=vocab_file,
            merge_file=merge_file,
            tokenizer_model=tokenizer_model,
            vocab_size=vocab_size,
            plain_special_tokens=plain_special_tokens,
        ),
    }
    for flag, value in (("--dataset-impl", dataset_impl), ("--chunk-size", chunk_size), ("--log-interval", log_interval)):
        if value is not None:
            typer.echo(f"note: {flag} {value} has no effect here (Megatron-LM dropped it, or the progress line replaces it)", err=True)
    loaded = load(pairs, options, default="preprocess")
    if loaded.recipe.data.train is not None and not typed(loaded.sources["preprocess.input"]):
        _prepare_rows(loaded, pairs)
    else:
        _run(loaded, pairs)


def _bare_words_are_keys(words: list[str], json_keys: list[str] | None) -> tuple[list[str], list[str] | None]:
    """Megatron-LM's `--json-keys text title`: here `title` arrives as a word without `=`. Also `--json-keys text,title`."""
    if not json_keys:
        return words, None
    keys = [key for given in json_keys for key in given.split(",") if key]
    return [word for word in words if "=" in word], keys + [word for word in words if "=" not in word]


def _prepare_rows(loaded: Loaded, words: list[str]) -> None:
    """The rows of a recipe for fine-tuning, which its training then finds."""
    ensure(loaded, "rows")
    prepare_rows(loaded)
    typer.echo(labelled("\n".join(describe(loaded.recipe, settle_rows(loaded.recipe, loaded.sources))), sys.stdout))
    by_option = [_word(key, attrgetter(key)(loaded.recipe)) for key, source in loaded.sources.items() if source.startswith("--")]
    typer.echo(f"next       yuan sft {shlex.join([*words, *by_option])}")


def _run(loaded: Loaded, words: list[str]) -> None:
    from data_tools.indexed import bin_path, idx_path
    from data_tools.preprocess import dataset_prefix, preprocess, shares, sharded_prefix
    from data_tools.sources import find_sources, passed_over

    ensure(loaded, "preprocess")
    tokenizer = tokenizer_of(loaded.recipe.tokenizer)
    asked = loaded.recipe.preprocess
    shard = parse_shard(asked.shard)
    sources, output, workers = find_sources(asked.input, asked.format), sharded_prefix(asked.output_prefix, shard), asked.workers or 1
    prefixes = [dataset_prefix(output, key) for key in asked.json_keys]
    size = sum(end - start for _, start, end in shares(sources, shard))
    files = sources[0].path if len(sources) == 1 else f"{len(sources)} files, {sources[0].path} to {sources[-1].path}"
    share = f", share {asked.shard}" if asked.shard else ""
    keys = f"{plural(len(asked.json_keys), 'key')}: {', '.join(asked.json_keys)}"
    typer.echo(f"input      {files} ({human_size(size)}, {' and '.join(sorted({s.format for s in sources}))}{share}), {keys}")
    if over := passed_over(asked.input):
        typer.echo(f"           passed over {plural(len(over), 'file')} of other names: {', '.join(over[:3])}{', ...' if len(over) > 3 else ''}")
    ending = f"every document ends with {tokenizer.eod}" if asked.append_eod else "no end-of-document ids (see --append-eod)"
    engine = "" if tokenizer.engine == tokenizer.type else f" by {tokenizer.engine}"
    typer.echo(f"tokenizer  {tokenizer.type}{engine}, {tokenizer.vocab_size} ids; {ending}")
    for prefix in prefixes:
        replaced = " (replaces the one there)" if idx_path(prefix).exists() else ""
        typer.echo(f"output     {bin_path(prefix)} and .idx{replaced}")
    typer.echo(f"workers    {workers}")

    started = time.monotonic()
    try:
        with Meter(size) as meter:
            counts = preprocess(
                asked.input,
                asked.output_prefix,
                tokenizer,
                json_keys=asked.json_keys,
                append_eod=asked.append_eod,
                workers=workers,
                format=asked.format,
                max_bad=asked.max_bad,
                shard=shard,
                progress=meter.show,
            )
    except KeyboardInterrupt:
        typer.echo("stopped    the same command goes on with the parts that are whole", err=True)
        raise typer.Exit(STOPPED) from None
    except OSError as error:
        raise of_system(error, output, ", and start again") from None
    _report(loaded, words, prefixes, list(counts.values()), time.monotonic() - started)


def _report(loaded: Loaded, words: list[str], prefixes: list[str], counts: list[Counts], seconds: float) -> None:
    tokens, read = sum(count.tokens for count in counts), counts[0].bytes
    typer.echo(
        f"done       {plural(counts[0].documents, 'document')}, {tokens:,} tokens, {human_size(read)} in {seconds:.1f} s"
        f" ({read / 1e6 / seconds:.2f} MB/s, {tokens / seconds:,.0f} tokens/s)"
    )
    _report_left_out(prefixes[0], counts[0])
    for prefix, count in zip(prefixes, counts, strict=True):
        typer.echo(f"           {prefix}.bin and .idx: {count.tokens:,} tokens, largest id {count.largest_id}")
    _index(loaded, prefixes)
    typer.echo(f"next       {_next_command(loaded, words, prefixes[0])}")


def _index(loaded: Loaded, prefixes: list[str]) -> None:
    """The sample index of the training that the recipe is for, where its data were just made: GPUs need not wait for it."""
    made = {Path(prefix).resolve() for prefix in prefixes}
    if loaded.recipe.model.num_layers is None or not made & {Path(prefix).resolve() for prefix in sample_index.prefixes(loaded.recipe)}:
        return
    faults = [problem for problem in sample_index.problems(loaded.recipe, loaded.sources) if problem.severity == "error"]
    try:
        typer.echo(f"index      not built: {faults[0].what}" if faults else build_index(loaded))
    except UserError as error:
        typer.echo(f"index      not built: {error.what}")


def _report_left_out(prefix: str, count: Counts) -> None:
    from data_tools.indexed import IndexedReader

    if count.blank:
        typer.echo(f"left out   {plural(count.blank, 'blank line')}")
    if count.bad:
        typer.echo(f"left out   {plural(count.bad, 'bad line')}, such as")
        for line in (IndexedReader(prefix).description or {}).get("first_bad_lines", []):
            typer.echo(f"           {line}")


def _next_command(loaded: Loaded, words: list[str], prefix: str) -> str:
    """What to type with the pair just made, by a recipe that was named in `words`."""
    from data_tools.preprocess import dataset_prefix

    asked = loaded.recipe.preprocess
    if (number := parse_shard(asked.shard)[1]) > 1:
        shares, whole = (dataset_prefix(f"{asked.output_prefix}{which}", asked.json_keys[0]) for which in (f"_*-of-{number:05d}", ""))
        return f"the other shares, then: yuan data merge {shlex.quote(f'{shares}.idx')} --output {shlex.quote(whole)}"
    named = next((word for word in reversed(words) if word.startswith("recipe=")), f"recipe={loaded.name}")
    training = [named if loaded.recipe.model.num_layers else f"recipe={_TRAINING_RECIPE}", f"data.data_path={prefix}"]
    training += [_word(f"tokenizer.{key}", getattr(loaded.recipe.tokenizer, key)) for key in typed_keys(loaded)]
    return "yuan pretrain " + shlex.join(training)


def _word(key: str, value: object) -> str:
    return f"{key}={yaml_scalar(value)}"


class Meter:
    """Rates and time left on stderr: a bar on a terminal, elsewhere a line every 10 seconds."""

    def __init__(self, total_bytes: int):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = TaskProgressColumn(), BarColumn(bar_width=20), TextColumn("{task.description}"), TextColumn("left:"), TimeRemainingColumn()
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("starting", total=total_bytes)
        self._terminal = self._bar.console.is_terminal
        self._started = self._shown = time.monotonic()

    def show(self, counts: list[Counts]) -> None:
        """The progress so far."""
        now, read = time.monotonic(), counts[0].bytes
        seconds = max(now - self._started, 1e-9)
        rates = f"{counts[0].documents:,} documents, {read / 1e6 / seconds:.2f} MB/s, {sum(count.tokens for count in counts) / seconds:,.0f} tokens/s"
        if self._terminal and not self._bar.live.is_started:  # not before: its thread would keep the workers from being forked
            self._bar.start()
        self._bar.update(self._task, completed=read, description=rates)
        if not self._terminal and now - self._shown > 10:
            self._shown = now
            total = self._bar.tasks[0].total or read
            print(f"{100 * read / total:.0f} %, {rates}, {seconds / read * (total - read):.0f} s left", file=sys.stderr, flush=True)

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._bar.stop()
