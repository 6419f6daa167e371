"""`yuan tokenizer train | show`, and the tokenizer options that `yuan preprocess` shares with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from launcher.errors import UserError, of_system
from launcher.recipe import Loaded, load
from launcher.recipe.check import ensure
from launcher.recipe.problem import typed
from launcher.recipe.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from data_tools.sources import Format
    from data_tools.tokenizers import Tokenizer

app = typer.Typer(help="Train a tokenizer, or look at one.", no_args_is_help=True, rich_markup_mode=None)

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[recipe=NAME] [KEY=VALUE]...", help="A recipe, and values that override its own."),
]
TokenizerType = Annotated[
    str | None,
    typer.Option("--tokenizer-type", help="GPT2BPE-, HuggingFace-, Tik-, SentencePiece-, Yuan- or NullTokenizer, in one word."),
]
VocabFile = Annotated[str | None, typer.Option("--vocab-file", help="GPT-2's vocab.json.")]
MergeFile = Annotated[str | None, typer.Option("--merge-file", help="GPT-2's merges.txt.")]
TokenizerModel = Annotated[str | None, typer.Option("--tokenizer-model", help="A .model, tokenizer.json or .tiktoken file; a folder with one of the first two.")]
VocabSize = Annotated[int | None, typer.Option("--vocab-size", help="Ids in the data, with NullTokenizer.")]
PlainSpecialTokens = Annotated[
    bool | None,
    typer.Option("--plain-special-tokens/--no-plain-special-tokens", help="Read a literal <|endoftext|> as ordinary characters."),
]

_SPECIAL_SHOWN = 24


def tokenizer_options(**values: object) -> dict[str, tuple[object, str]]:
    """Options as `load` takes them; each is named as its key under `tokenizer`."""
    flags = {key: "--tokenizer-type" if key == "type" else "--" + key.replace("_", "-") for key in values}
    return {f"tokenizer.{key}": (value, flags[key]) for key, value in values.items()}


def typed_keys(loaded: Loaded) -> list[str]:
    """Keys under `tokenizer` whose values the user typed, and did not leave to a recipe or a default."""
    given = (key for key, value in vars(loaded.recipe.tokenizer).items() if value is not None)
    return [key for key in given if typed(loaded.sources[f"tokenizer.{key}"])]


@app.command(short_help="Train one on your own text.")
def train(
    input: Annotated[list[str], typer.Option("--input", help="Text: a file, a folder or a pattern. May be given several times.")],
    output_prefix: Annotated[Path | None, typer.Option("--output-prefix", help="PREFIX.model, or the folder PREFIX for GPT2BPETokenizer.")] = None,
    tokenizer_type: Annotated[
        Literal["SentencePieceTokenizer", "GPT2BPETokenizer"], typer.Option("--tokenizer-type", help="GPT2BPETokenizer is byte-level BPE.")
    ] = "SentencePieceTokenizer",
    vocab_size: Annotated[int, typer.Option("--vocab-size", min=300, help="Tokens, of which some 260 are bytes and special ones.")] = 32000,
    model_type: Annotated[Literal["bpe", "unigram"], typer.Option("--model-type", help="SentencePiece's algorithm.")] = "bpe",
    json_key: Annotated[str, typer.Option("--json-key", help="Key of each line's text.")] = "text",
    format: Annotated[str | None, typer.Option("--format", help="jsonl, json, text, yuan or parquet. Default: by the names.")] = None,
) -> None:
    """Train a tokenizer that gives every text back as it was, newlines, indentation and any script included.

    It reads what `yuan preprocess` reads. The same text and options make the same files. All of the input is used: for
    many GB, take a sample.
    """
    from data_tools.sources import FORMATS, find_sources

    if format is not None and format not in FORMATS:
        raise UserError(f"no such format: {format}", "--format", "one of " + ", ".join(FORMATS))
    is_bpe = tokenizer_type == "GPT2BPETokenizer"
    output = output_prefix or Path("data/my-bpe" if is_bpe else "data/my-sp")
    started = time.monotonic()
    try:
        size = sum(source.size for source in find_sources(input, format))  # type: ignore[arg-type]
        kind = "byte-level BPE" if is_bpe else f"SentencePiece ({model_type})"
        typer.echo(f"training   {kind}, {vocab_size} tokens, on {', '.join(input)} ({size / 1e6:.1f} MB)")
        texts = _texts(input, format, json_key)  # type: ignore[arg-type]
        output.parent.mkdir(parents=True, exist_ok=True)
        tokenizer = _train_bpe(texts, vocab_size, output) if is_bpe else _train_sentencepiece(texts, vocab_size, model_type, output)
    except OSError as error:
        raise of_system(error, str(output)) from None
    options = " ".join(f"--{name.replace('_', '-')} {path}" for name, path in tokenizer.files.items())
    made = output if is_bpe else tokenizer.files["tokenizer_model"]
    typer.echo(f"done       {made}, {tokenizer.vocab_size} tokens, in {time.monotonic() - started:.1f} s")
    if is_bpe:
        typer.echo(f"           with a tokenizer.json: --tokenizer-type HuggingFaceTokenizer --tokenizer-model {output}")
    typer.echo(f"next       yuan preprocess --tokenizer-type {tokenizer_type} {options} --input {' --input '.join(input)}")


def _train_sentencepiece(texts: Iterator[str], vocab_size: int, model_type: str, output: Path) -> Tokenizer:
    from data_tools.tokenizers import build_tokenizer, train_sentencepiece

    model = output.with_name(output.name + ".model")
    _write({model: train_sentencepiece(texts, vocab_size, model_type)})
    return build_tokenizer("SentencePieceTokenizer", tokenizer_model=model)


def _train_bpe(texts: Iterator[str], vocab_size: int, folder: Path) -> Tokenizer:
    from data_tools.tokenizers import build_tokenizer, train_byte_level_bpe

    files = train_byte_level_bpe(texts, vocab_size)
    folder.mkdir(exist_ok=True)
    _write({folder / name: content for name, content in files.items()})
    return build_tokenizer("GPT2BPETokenizer", vocab_file=folder / "vocab.json", merge_file=folder / "merges.txt")


def _write(files: dict[Path, bytes]) -> None:
    """Each beside its name first: a full disk leaves what was there before."""
    parts = {path: path.with_name(path.name + ".part") for path in files}
    try:
        for path, content in files.items():
            parts[path].write_bytes(content)
        for path, part in parts.items():
            part.replace(path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _texts(inputs: list[str], format: Format | None, key: str) -> Iterator[str]:
    from data_tools.records import PARSERS, BadLine
    from data_tools.sources import blocks, find_sources

    for source in find_sources(inputs, format):
        for block in blocks(source, 1 << 20, [key]):
            for number, line in enumerate(block.read()):
                try:
                    document = PARSERS[source.format](line, [key])
                except BadLine as bad:
                    raise bad.at(block.place(number)) from None
                yield from (sentence for sentences in document or [] for sentence in sentences)


@app.command(short_help="Its special ids, sizes, hash, and a text in tokens.")
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
    """Print a tokenizer's type, sizes, special ids, library and hash, and the tokens of a text."""
    given = tokenizer_options(
        type=tokenizer_type,
        vocab_file=vocab_file,
        merge_file=merge_file,
        tokenizer_model=tokenizer_model,
        vocab_size=vocab_size,
        plain_special_tokens=plain_special_tokens,
    )
    from data_tools.records import BadLine, whole_text

    loaded = load(words or [], given, default="preprocess")
    ensure(loaded, "tokenizer")
    tokenizer = tokenizer_of(loaded.recipe.tokenizer)
    try:
        ids = tokenizer.encode(whole_text(text, "the text"))
    except BadLine as bad:
        raise UserError(bad.what, "--text", "text in UTF-8") from None
    except ValueError as error:
        raise UserError(str(error), "--text", 'with NullTokenizer: --text "5 17 3"') from None
    typer.echo("\n".join(_description(tokenizer, loaded)))
    back = tokenizer.decode(ids)
    typer.echo(f"text        {len(text)} characters, {len(ids)} tokens, {'comes back as it was' if back == text else f'comes back as {back!r}'}")
    for i in ids:
        typer.echo(f"  {i:7} {tokenizer.decode([i])!r}")


def _description(tokenizer: Tokenizer, loaded: Loaded) -> Iterator[str]:
    recipe = loaded.recipe
    yield f"type        {tokenizer.type}" + (f" by {tokenizer.engine}" if tokenizer.engine != tokenizer.type else "")
    for name, path in tokenizer.files.items():
        yield f"{name:11} {path}" if len(name) <= 11 else f"{name} {path}"
    yield f"vocab_size  {tokenizer.vocab_size}"
    divisor = f"{recipe.model.make_vocab_size_divisible_by} x TP {recipe.parallel.tensor_model_parallel_size}"
    yield f"padded      {recipe.derived.padded_vocab_size}, a multiple of {divisor}"
    yield f"eod         {tokenizer.eod}"
    tokens = sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    for token, i in tokens[:_SPECIAL_SHOWN]:
        yield f"special     {i:7} {token}"
    if len(tokens) > _SPECIAL_SHOWN:
        yield f"            and {len(tokens) - _SPECIAL_SHOWN} more, to {tokens[-1][1]}"
    yield f"sha256      {tokenizer.hash()}"
