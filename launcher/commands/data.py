"""`yuan data inspect | verify | repair | merge | index`: what to do with .bin/.idx pairs once they are there."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import data_inspect as view
from launcher.commands.tokenizer import (
    MergeFile,
    PlainSpecialTokens,
    TokenizerModel,
    TokenizerType,
    VocabFile,
    VocabSize,
    Words,
    tokenizer_options,
)
from launcher.console import plural
from launcher.errors import UserError, of_system
from launcher.recipe import Loaded, load, sample_index
from launcher.recipe.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from data_tools.indexed import IndexedReader
    from data_tools.inspect import Summary
    from data_tools.tokenizers import Tokenizer

app = typer.Typer(help="Look at .bin/.idx pairs; verify, repair, merge and index them.", no_args_is_help=True, rich_markup_mode=None)

Prefix = Annotated[str, typer.Argument(metavar="PREFIX", help="Path of a pair, without .bin or .idx.")]
Output = Annotated[str, typer.Option("--output", metavar="NEW", help="Prefix of the pair to write.")]


@app.command(short_help="Counts, lengths and documents of a pair.")
def inspect(
    prefix: Prefix,
    words: Words = None,
    document: Annotated[int, typer.Option("--document", metavar="N", help="The document to show, from 0.")] = 0,
    all_tokens: Annotated[bool, typer.Option("--all", help="All of the document, however long.")] = False,
    mask: Annotated[bool, typer.Option("--mask", help="What fine-tuning trains on, in colour (shown wherever it is known).")] = False,
    tokenizer_type: TokenizerType = None,
    vocab_file: VocabFile = None,
    merge_file: MergeFile = None,
    tokenizer_model: TokenizerModel = None,
    vocab_size: VocabSize = None,
    plain_special_tokens: PlainSpecialTokens = None,
) -> None:
    """Show a pair's counts, what made it, how long its documents are, and one document as text and as tokens.

    The tokenizer is the one that made the pair, where its files are still there; or a recipe's, or the options'.

    \b
    Examples:
      yuan data inspect data/my-gpt2_text_document
      yuan data inspect data/my-gpt2_text_document --document 17
      yuan data inspect data/old_text_document recipe=345m_1dp
    """
    from data_tools.indexed import IndexedReader
    from data_tools.inspect import summarize

    prefix = _bare(prefix)
    given = tokenizer_options(
        type=tokenizer_type,
        vocab_file=vocab_file,
        merge_file=merge_file,
        tokenizer_model=tokenizer_model,
        vocab_size=vocab_size,
        plain_special_tokens=plain_special_tokens,
    )
    summary = summarize(prefix)
    typer.echo("\n".join(view.counts(prefix, summary) + view.made(summary) + view.lengths(summary)))
    asked = bool(words) or any(value is not None for value, _ in given.values())
    tokenizer = tokenizer_of(load(words or [], given, default="preprocess").recipe.tokenizer) if asked else _maker(summary)
    reader = IndexedReader(prefix)
    if not 0 <= document < reader.documents:
        raise UserError(f"there is no document {document}", f"{prefix}.idx", f"--document 0 to {reader.documents - 1}")
    masks = _masks(prefix, mask)
    of_document = masks.document(document) if masks else None
    typer.echo("\n".join(view.document(reader.document(document), document, tokenizer, all_tokens, of_document)))


def _masks(prefix: str, wanted: bool) -> IndexedReader | None:
    """The masks beside prepared rows of fine-tuning."""
    from data_tools.indexed import IndexedReader, idx_path
    from data_tools.preprocess import dataset_prefix
    from data_tools.sft import KEYS

    beside = prefix.removesuffix(dataset_prefix("", KEYS[0]))
    if beside != prefix and idx_path(dataset_prefix(beside, KEYS[1])).is_file():
        return IndexedReader(dataset_prefix(beside, KEYS[1]))
    if wanted:
        raise UserError("no mask lies beside it", prefix, f"give rows that `yuan sft` or `yuan preprocess recipe=..._sft` prepared: ..._{KEYS[0]}_document")
    return None


def _bare(prefix: str) -> str:
    """A pair's prefix, also where one of its files was given."""
    return prefix.removesuffix(".bin").removesuffix(".idx")


def _maker(s: Summary) -> Tokenizer | None:
    """The tokenizer that made the pair, where its files are still there and still the same."""
    from data_tools.tokenizers import TokenizerError, build_tokenizer

    made = s.description or {}
    try:
        tokenizer = build_tokenizer(made["tokenizer"]["type"], **made["tokenizer_arguments"])
        return tokenizer if tokenizer.hash() == made["tokenizer"]["sha256"] else None
    except (KeyError, TypeError, TokenizerError):
        return None


@app.command(short_help="Is a pair whole, and what its manifest says?")
def verify(
    prefixes: Annotated[list[str], typer.Argument(metavar="PREFIX...", help="Pairs; also folders or patterns of them.")],
    vocab_size: Annotated[int | None, typer.Option("--vocab-size", help="Ids are below it. Default: what the manifest says.")] = None,
    inputs: Annotated[bool, typer.Option("--inputs", help="Read the input too: is it what the pair was made of?")] = False,
) -> None:
    """Read all of each pair: header, sizes, offsets, ends of documents, every id, and what the manifest says of them.

    Exit code 0 where all are whole, 2 otherwise; every fault is named with its file.

    \b
    Examples:
      yuan data verify data/my-gpt2_text_document
      yuan data verify data --inputs
    """
    from data_tools.merge import expand
    from data_tools.verify import verify as verify_pair

    faulty = 0
    for prefix in expand(prefixes):
        started = time.monotonic()
        with _Meter(f"reading {prefix}") as meter:
            found = verify_pair(prefix, vocab_size, inputs, meter.show)
        for fault in found.faults:
            typer.echo(f"error: {UserError(fault.what, fault.where, fault.fix)}", err=True)
        if found.faults:
            faulty += 1
            typer.echo(f"not whole  {prefix}: {plural(len(found.faults), 'fault')}")
            continue
        counts = f"{plural(found.documents, 'document')}, {plural(found.tokens, 'token')}, largest id {found.largest_id}"
        typer.echo(f"whole      {prefix}: {counts} ({time.monotonic() - started:.1f} s)")
        for line in found.unknown:
            typer.echo(f"           {line}")
    if faulty:
        raise typer.Exit(2)


@app.command(short_help="Write a damaged pair, or an old tool's, anew.")
def repair(
    prefix: Prefix,
    output: Output,
    accept_loss: Annotated[bool, typer.Option("--accept-loss", help="Leave out what cannot be kept.")] = False,
) -> None:
    """Write a pair with a right index, from one that an old tool or a killed run left. The old files stay as they are.

    Without loss: files of Yuan 2.0's preprocess_data_yuan.py, whose index ends no document, and of Megatron-LM's older
    preprocess_data.py, which does not count the end-of-document ids. A file that is cut off is cut back to its last whole
    document, with --accept-loss.

    \b
    Example:
      yuan data repair out/train.txt_document_context --output data/train_document
    """
    from data_tools.repair import repair as repair_pair

    prefix, output = _bare(prefix), _bare(output)
    with _os_errors(output):
        found, writer = repair_pair(prefix, output, accept_loss)
    for line in found.mended:
        typer.echo(f"mended     {line}")
    for line in found.lost:
        typer.echo(f"lost       {line}")
    typer.echo(f"done       {output}.bin and .idx: {plural(writer.documents, 'document')}, {plural(writer.tokens, 'token')}")
    typer.echo(f"next       yuan data verify {output}")


@app.command(short_help="Several pairs into one.")
def merge(
    prefixes: Annotated[list[str], typer.Argument(metavar="PREFIX...", help="Pairs; also folders or patterns of them.")],
    output: Output,
) -> None:
    """Join pairs, in the order given, into the one that a single run over all of their input makes, byte for byte.

    All shards of a set have to be there; pairs of different tokenizers, and the same text twice, are refused.

    \b
    Examples:
      yuan data merge 'a_*-of-00004_text_document.idx' --output a_text_document
      yuan data merge a_text_document b_text_document --output both_text_document
    """
    from data_tools.merge import find_pairs
    from data_tools.merge import merge as merge_pairs

    output, pairs, started = _bare(output), find_pairs(prefixes), time.monotonic()
    typer.echo(f"merging    {plural(len(pairs), 'pair')}, {pairs[0]} to {pairs[-1]}")
    with _os_errors(output), _Meter(f"writing {output}") as meter:
        joined = merge_pairs(pairs, output, meter.show)
    counts = f"{plural(joined['documents'], 'document')}, {plural(joined['tokens'], 'token')}"
    typer.echo(f"done       {output}.bin and .idx: {counts} ({time.monotonic() - started:.1f} s)")
    if "merged_from" in joined:
        typer.echo("           not all have a manifest: the new one tells the counts alone")


@app.command(short_help="Build a recipe's sample index ahead of its training.")
def index(words: Words = None) -> None:
    """Build megatron-core's sample index of a recipe's data, which `yuan pretrain` then finds. Needs no GPU.

    It belongs to the data, the split, the sequence length, the seed and the length of the training; it lies in a folder
    `cache` beside the data, or in data.data_cache_path. `yuan preprocess recipe=NAME` builds it by itself.

    \b
    Example:
      yuan data index recipe=345m_1dp
    """
    from launcher.errors import raise_all

    loaded = load(words or [])
    found = sample_index.problems(loaded.recipe, loaded.sources)
    raise_all([problem.as_error() for problem in found if problem.severity == "error"])
    typer.echo(build_index(loaded))


def build_index(loaded: Loaded) -> str:
    """Build the index of a recipe without faults, and say where it is."""
    recipe = loaded.recipe
    note = sample_index.note_path(recipe)
    counts = [f"{count:,} {name}" for count, name in zip(sample_index.sample_counts(recipe), ("train", "validation", "test")) if count]
    if sample_index.is_whole(note):
        return f"index      {note.parent}: it is there"
    typer.echo(f"indexing   {', '.join(sample_index.prefixes(recipe))}: samples of {recipe.training.seq_length} tokens, {', '.join(counts)}", err=True)
    # That Transformer Engine and Apex are missing is said four times at import, which an index has no use for.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|full scope is deprecated)")
    from launcher.engine.data import build_index as build  # 8 s of imports

    started = time.monotonic()
    build(recipe)
    return f"index      {note.parent}: built in {time.monotonic() - started:.1f} s"


@contextmanager
def _os_errors(output: str) -> Iterator[None]:
    """What the system refuses, as an error that names the output."""
    try:
        yield
    except OSError as error:
        raise of_system(error, output, ", and start again") from None


class _Meter:
    """How far it is, on stderr: a line that is written over on a terminal, elsewhere one every 10 seconds."""

    def __init__(self, doing: str):
        self._doing, self._started = doing, time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._shown = self._started
        self._is_shown = False

    def show(self, done: int, total: int) -> None:
        """The progress so far, in bytes."""
        now = time.monotonic()
        if now - self._shown < (0.2 if self._terminal else 10):
            return
        self._shown, rate = now, done / max(now - self._started, 1e-9)
        line = f"{self._doing}: {100 * done / max(total, 1):.0f} %, {rate / 1e6:.0f} MB/s, {(total - done) / max(rate, 1):.0f} s left"
        print(f"\r\033[K{line}" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr, flush=True)
        self._is_shown = True

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal and self._is_shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
