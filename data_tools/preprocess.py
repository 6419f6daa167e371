"""A JSONL corpus into Megatron's indexed datasets, one per key, documents in input order whatever the workers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.errors import InputError
from data_tools.indexed import IndexedWriter, token_dtype
from data_tools.jsonl import Chunk, parse_chunk, read_chunks
from data_tools.parallel import ordered_map
from data_tools.tokenizers import Tokenizer

_CHUNK_BYTES = 1 << 18  # of input per task: some 0.1 s of work, against 1 ms to hand it over


@dataclass
class Counts:
    """What was read and written: `documents` and `bytes` of the input, `tokens` and `largest_id` of the output."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    largest_id: int = -1

    def add(self, documents: int, size: int, tokens: np.ndarray) -> None:
        """Count one chunk's documents, bytes and tokens."""
        self.documents += documents
        self.bytes += size
        self.tokens += len(tokens)
        if len(tokens):
            self.largest_id = max(self.largest_id, int(tokens.max()))


def dataset_prefix(output_prefix: str | Path, key: str) -> str:
    """Megatron-LM's name for the output of one key, without .bin or .idx."""
    return f"{output_prefix}_{key}_document"


def preprocess(
    input: str | Path,
    output_prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    workers: int = 1,
    progress: Callable[[list[Counts]], None] | None = None,
) -> dict[str, Counts]:
    """Tokenize `input` into `<output_prefix>_<key>_document.bin` and `.idx` for every key.

    Beside each pair goes a .json that says what made it (see `IndexedReader.description`), so that a training with
    another tokenizer can be refused. The files appear when all is done and replace older ones; a run that fails
    leaves the older ones alone.

    Args:
        append_eod: end every document that has tokens with the end-of-document id.
        workers: processes; with 1 all is done in this one.
        progress: called after every chunk, some 256 KiB of input, with the counts so far, one per key.

    Returns:
        The counts of each key.

    Raises:
        DataError: bad input (the first bad line of the file, whatever the workers), or a dead worker.
    """
    keys = tuple(json_keys)
    if not keys or len(set(keys)) < len(keys):
        raise InputError(f"each key once, and at least one, not {list(keys)}", "preprocess.json_keys", "--json-keys text")
    chunks = read_chunks(Path(input), _CHUNK_BYTES)
    encode = ChunkEncoder(tokenizer, keys, append_eod)
    counts = {key: Counts() for key in keys}
    Path(output_prefix).parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        dtype = token_dtype(tokenizer.vocab_size)
        writers = [stack.enter_context(IndexedWriter(dataset_prefix(output_prefix, key), dtype)) for key in keys]
        results = stack.enter_context(closing(_encode_all(encode, chunks, workers)))
        for size, columns in results:
            for writer, count, column in zip(writers, counts.values(), columns, strict=True):
                writer.add_batch(column.tokens, column.lengths, column.sequences)
                count.add(len(column.sequences), size, column.tokens)
            if progress:
                progress(list(counts.values()))
        _refuse_empty(counts, str(input))
        for writer, count in zip(writers, counts.values(), strict=True):
            writer.finish(_description(tokenizer, append_eod, count))
    return counts


@dataclass
class Column:
    """One key of one chunk: all tokens, the length of each sequence, the number of sequences of each document."""

    tokens: np.ndarray
    lengths: list[int]
    sequences: list[int]


@dataclass
class ChunkEncoder:
    """Turns a chunk of lines into (its size in bytes, one `Column` per key). Pickled into every worker."""

    tokenizer: Tokenizer
    keys: tuple[str, ...]
    append_eod: bool

    def __call__(self, chunk: Chunk) -> tuple[int, list[Column]]:
        places, documents = zip(*parse_chunk(chunk, self.keys), strict=True)
        columns = [self._column(places, [document[i] for document in documents]) for i in range(len(self.keys))]
        return sum(map(len, chunk.lines)), columns

    def _column(self, places: Sequence[str], documents: list[list[str]]) -> Column:
        encoded = iter(self._encode(places, documents))
        tokens: list[int] = []
        lengths: list[int] = []
        sequences: list[int] = []
        for document in documents:
            # As Megatron-LM: an empty sentence is no sequence, a document without any gets no end of document either.
            parts = [ids for ids in (next(encoded) for _ in document) if ids]
            if parts and self.append_eod:
                parts[-1].append(self.tokenizer.eod)
            for ids in parts:
                tokens += ids
                lengths.append(len(ids))
            sequences.append(len(parts))
        return Column(np.array(tokens, dtype=token_dtype(self.tokenizer.vocab_size)), lengths, sequences)

    def _encode(self, places: Sequence[str], documents: list[list[str]]) -> list[list[int]]:
        try:
            return self.tokenizer.encode_batch([sentence for document in documents for sentence in document])
        except ValueError:  # NullTokenizer's, which cannot know the line
            for place, document in zip(places, documents, strict=True):
                try:
                    self.tokenizer.encode_batch(document)
                except ValueError as error:
                    raise InputError(str(error), place, "mend the line, or give the tokenizer that the data was made for") from None
            raise


def _encode_all(encode: ChunkEncoder, chunks: Iterator[Chunk], workers: int) -> Generator[tuple[int, list[Column]], None, None]:
    yield from map(encode, chunks) if workers == 1 else ordered_map(encode, chunks, workers)


def _refuse_empty(counts: dict[str, Counts], path: str) -> None:
    """megatron-core cannot read a dataset without tokens (it maps an empty file into memory)."""
    for key, count in counts.items():
        if not count.tokens:
            what = f"{count.documents} documents and no text under {key!r}" if count.documents else "no documents"
            raise InputError(what, path, 'each line is an object such as {"text": "..."}')


def _description(tokenizer: Tokenizer, append_eod: bool, count: Counts) -> dict[str, object]:
    identity = {"type": tokenizer.type, "sha256": tokenizer.hash(), "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod}
    return {"documents": count.documents, "tokens": count.tokens, "largest_id": count.largest_id, "append_eod": append_eod, "tokenizer": identity}
