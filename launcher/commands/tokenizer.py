"""`yuan tokenizer train | show`, and the tokenizer options that `yuan preprocess` shares with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from launcher.errors import UserError
from launcher.recipe import Loaded, load
from launcher.recipe.check import ensure
from launcher.recipe.problem import typed
from launcher.recipe.tokenizer import tokenizer_of

app = typer.Typer(help="Train a tokenizer, or look at one.", no_args_is_help=True, rich_markup_mode=None)

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[recipe=NAME] [KEY=VALUE]...", help="A recipe, and values that override its own."),
]
TokenizerType = Annotated[
    str | None, typer.Option("--tokenizer-type", help="GPT2BPETokenizer, SentencePieceTokenizer or NullTokenizer.")
]
VocabFile = Annotated[str | None, typer.Option("--vocab-file", help="GPT-2's vocab.json.")]
MergeFile = Annotated[str | None, typer.Option("--merge-file", help="GPT-2's merges.txt.")]
TokenizerModel = Annotated[str | None, typer.Option("--tokenizer-model", help="SentencePiece's .model file.")]
VocabSize = Annotated[int | None, typer.Option("--vocab-size", help="Ids in the data, with NullTokenizer.")]
PlainSpecialTokens = Annotated[
    bool | None,
    typer.Option("--plain-special-tokens/--no-plain-special-tokens", help="Read a literal <|endoftext|> as ordinary characters."),
]


def tokenizer_options(**values: object) -> dict[str, tuple[object, str]]:
    """Options as `load` takes them; each is named as its key under `tokenizer`."""
    flags = {key: "--tokenizer-type" if key == "type" else "--" + key.replace("_", "-") for key in values}
    return {f"tokenizer.{key}": (value, flags[key]) for key, value in values.items()}


def typed_keys(loaded: Loaded) -> list[str]:
    """Keys under `tokenizer` whose values the user typed, and did not leave to a recipe or a default."""
    given = (key for key, value in vars(loaded.recipe.tokenizer).items() if value is not None)
    return [key for key in given if typed(loaded.sources[f"tokenizer.{key}"])]


@app.command()
def train(
    input: Annotated[Path, typer.Option("--input", help="Text: a JSONL or .txt file, or a folder of such.")],
    output_prefix: Annotated[Path, typer.Option("--output-prefix", help="The output is PREFIX.model.")] = Path("data/my-sp"),
    vocab_size: Annotated[int, typer.Option("--vocab-size", min=300, help="Pieces, of which 259 are bytes and control pieces.")] = 32000,
    model_type: Annotated[Literal["bpe", "unigram"], typer.Option("--model-type", help="SentencePiece's algorithm.")] = "bpe",
    json_key: Annotated[str, typer.Option("--json-key", help="Key of each line's text.")] = "text",
) -> None:
    """Train a SentencePiece model that gives every text back as it was, newlines, indentation and any script included.

    The same text and options make the same file. It is trained on all of the input: for many GB, take a sample.
    """
    from data_tools.sources import find_sources
    from data_tools.tokenizers import build_tokenizer, train_sentencepiece

    output = output_prefix.with_name(output_prefix.name + ".model")
    part = output.with_name(output.name + ".part")
    started = time.monotonic()
    try:
        size = sum(source.size for source in find_sources(input))
        typer.echo(f"training   {model_type}, {vocab_size} pieces, on {input} ({size / 1e6:.1f} MB)")
        model = train_sentencepiece(_texts(input, json_key), vocab_size, model_type)
        output.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(model)
        part.replace(output)
        tokenizer = build_tokenizer("SentencePieceTokenizer", tokenizer_model=output)
    except OSError as error:
        raise UserError(f"cannot read or write: {error}", str(output), "see to the space and the rights there") from None
    typer.echo(f"done       {output}, {tokenizer.vocab_size} pieces, in {time.monotonic() - started:.1f} s")
    typer.echo(f"next       yuan preprocess --tokenizer-type SentencePieceTokenizer --tokenizer-model {output} --input {input}")


def _texts(path: Path, key: str) -> Iterator[str]:
    from data_tools.records import PARSERS, BadLine
    from data_tools.sources import blocks, find_sources

    for source in find_sources(path):
        for block in blocks(source, 1 << 20, [key]):
            for number, line in enumerate(block.read()):
                try:
                    document = PARSERS[source.format](line, [key])
                except BadLine as bad:
                    raise bad.at(block.place(number)) from None
                yield from (sentence for sentences in document or [] for sentence in sentences)


@app.command()
def show(
    words: Words = None,
    tokenizer_type: TokenizerType = None,
    vocab_file: VocabFile = None,
    merge_file: MergeFile = None,
    tokenizer_model: TokenizerModel = None,
    vocab_size: VocabSize = None,
    plain_special_tokens: PlainSpecialTokens = None,
    text: Annotated[str, typer.Option("--text", help="Text to take apart.")] = "Hello, world!\n    你好，世界",
) -> None:
    """Print a tokenizer's type, size, end-of-document id and hash, and the tokens of a text."""
    given = tokenizer_options(
        type=tokenizer_type,
        vocab_file=vocab_file,
        merge_file=merge_file,
        tokenizer_model=tokenizer_model,
        vocab_size=vocab_size,
        plain_special_tokens=plain_special_tokens,
    )
    loaded = load(words or [], given, default="preprocess")
    ensure(loaded, "tokenizer")
    tokenizer = tokenizer_of(loaded.recipe.tokenizer)
    try:
        ids = tokenizer.encode(text)
    except ValueError as error:
        raise UserError(str(error), "--text", 'with NullTokenizer: --text "5 17 3"') from None
    typer.echo(f"type        {tokenizer.type}")
    for name, path in tokenizer.files.items():
        typer.echo(f"{name:11} {path}" if len(name) <= 11 else f"{name} {path}")
    typer.echo(f"vocab_size  {tokenizer.vocab_size}")
    typer.echo(f"eod         {tokenizer.eod}")
    typer.echo(f"sha256      {tokenizer.hash()}")
    back = tokenizer.decode(ids)
    typer.echo(f"text        {len(text)} characters, {len(ids)} tokens, {'comes back as it was' if back == text else f'comes back as {back!r}'}")
    for i in ids:
        typer.echo(f"  {i:7} {tokenizer.decode([i])!r}")
