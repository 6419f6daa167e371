"""A block of lines → token ids in the files of a part. Runs in every worker."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data_tools.errors import InputError
from data_tools.indexed import token_dtype
from data_tools.long_lines import json_texts, line_text
from data_tools.records import JSON_FORMATS, PARSERS, BadLine, Sentences, parse_whole
from data_tools.sources import Block
from data_tools.tokenizers import Tokenizer
from data_tools.tokenizers.base import LONG, encode_all_but

_BATCH_BYTES = 1 << 22  # of input encoded at once: large enough for vectors, small enough for the caches
_LONG_LINE = 1 << 23  # bytes of a line that is read piece by piece: as a whole it may be five times as large in memory
BAD_SHOWN = 5
_NONE = np.empty(0, dtype="<i4")


@dataclass
class Counts:
    """What was read and written: `documents`, `bytes` and `blank` and `bad` lines of the input (left out), `tokens` and
    `largest_id` of the output."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    largest_id: int = -1
    blank: int = 0
    bad: int = 0

    def add(self, other: Counts) -> None:
        """Count what `other` counted too."""
        for name, value in asdict(other).items():
            setattr(self, name, max(self.largest_id, value) if name == "largest_id" else getattr(self, name) + value)


@dataclass
class Part:
    """What came of one block: the counts of each key, and the first bad lines as (place, what, fix)."""

    number: int
    input_sha256: str
    counts: list[Counts]
    bad_lines: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass
class Column:
    """One key of some documents: all tokens in the dtype that is written, the length of each sequence and the number of
    sequences of each document, int32."""

    tokens: np.ndarray
    lengths: np.ndarray
    sequences: np.ndarray


class PartFiles:
    """The files of part `number` in the folder of unfinished work; its .json is written last and makes the part whole."""

    def __init__(self, folder: str | Path, number: int):
        self._stem = f"{folder}/{number:07d}"

    def tokens(self, key: int) -> Path:
        """Raw tokens of the key of that index."""
        return Path(f"{self._stem}.{key}.bin")

    def sizes(self, key: int) -> Path:
        """Raw int32: the number of sequences of each document, then the length of each sequence."""
        return Path(f"{self._stem}.{key}.sizes")

    def read_sizes(self, key: int, documents: int) -> tuple[np.ndarray, np.ndarray]:
        """Lengths of the sequences, number of sequences of each document."""
        sizes = np.fromfile(self.sizes(key), dtype="<i4")
        return sizes[documents:], sizes[:documents]

    def read(self, dtypes: Sequence[np.dtype]) -> Part | None:
        """The part, where it is whole, its tokens here or moved on already; `dtypes` are those of each key's tokens."""
        try:
            record = json.loads(Path(f"{self._stem}.json").read_text(encoding="utf-8"))
            record["counts"] = [Counts(**count) for count in record["counts"]]
            part = Part(**record)
            for i, (count, dtype) in enumerate(zip(part.counts, dtypes, strict=True)):
                self.sizes(i).stat()
                if self.tokens(i).is_file() and self.tokens(i).stat().st_size != count.tokens * dtype.itemsize:
                    return None
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return part

    def begin(self) -> None:
        """The part is not whole from here on: an older record must not speak for new tokens of the same size."""
        Path(f"{self._stem}.json").unlink(missing_ok=True)

    def write(self, part: Part) -> None:
        """Declare the part whole; of a record that was cut off `read` takes nothing."""
        Path(f"{self._stem}.json").write_text(json.dumps(asdict(part)), encoding="utf-8")


@dataclass
class BlockEncoder:
    """Turns (number, block) into a `Part`, whose files lie in `folder` then. Pickled into every worker.

    A part that is whole already and was made of the same bytes is taken as it is.

    Raises:
        InputError: more than `max_bad` bad lines in the block; the first of them.
    """

    tokenizer: Tokenizer
    keys: tuple[str, ...]
    append_eod: bool
    max_bad: int
    folder: str = ""

    def plan(self) -> dict[str, object]:
        """All that the parts depend on, besides where the input is cut and the text in it, which each part's sha256 holds."""
        tokenizer = self.tokenizer
        return {
            "tokenizer": {"type": tokenizer.type, "sha256": tokenizer.hash(), "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod},
            "json_keys": list(self.keys),
            "append_eod": self.append_eod,
            "max_bad": self.max_bad,
        }

    def __call__(self, item: tuple[int, Block]) -> Part:
        number, block = item
        lines, digest = block.read_hashed()
        files = PartFiles(self.folder, number)
        before = files.read(self.dtypes)
        if before and before.input_sha256 == digest:
            return before
        files.begin()
        part = Part(number, digest, [Counts(bytes=block.size) for _ in self.keys])
        sizes: list[tuple[list[np.ndarray], list[np.ndarray]]] = [([], []) for _ in self.keys]
        with ExitStack() as stack:
            outputs = [stack.enter_context(open(files.tokens(i), "wb")) for i in range(len(self.keys))]
            for columns in self._batches(block, lines, part):
                for i, column in enumerate(columns):
                    outputs[i].write(memoryview(column.tokens))  # numpy's tofile does not say why a write fails
                    sizes[i][0].append(column.sequences)
                    sizes[i][1].append(column.lengths)
                    largest = int(column.tokens.max()) if len(column.tokens) else -1
                    part.counts[i].add(Counts(len(column.sequences), 0, len(column.tokens), largest))
        for i in range(len(self.keys)):
            np.concatenate([*sizes[i][0], *sizes[i][1], _NONE]).tofile(files.sizes(i))
        files.write(part)
        return part

    def _batches(self, block: Block, lines: list[bytes], part: Part) -> Iterator[list[Column]]:
        ends = np.cumsum(np.fromiter(map(len, lines), dtype=np.int64, count=len(lines)))
        start = 0
        while start < len(lines):
            before = ends[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + _BATCH_BYTES, side="right")))
            chunk = lines[start:stop]
            lines[start:stop] = [b""] * len(chunk)  # as it is encoded: a line may be most of the memory
            if len(chunk[0]) > _LONG_LINE and (pieces := self._long_texts(block, chunk[0])):
                yield from self._long(pieces)
                start = stop
                continue
            texts = parse_whole(chunk, self.keys) if block.source.format in JSON_FORMATS else None
            try:
                columns = texts and [self._column(one, np.ones(len(one), dtype=np.int64)) for one in texts]
            except ValueError:  # NullTokenizer's, which cannot know the line
                columns = None
            if columns:
                yield columns
            else:
                yield from self._line_by_line(block, start, chunk, part)
            start = stop

    def _long_texts(self, block: Block, line: bytes) -> Sequence[Iterable[str]] | None:
        """The text under each key, to be encoded piece by piece; None for a line that is better read as a whole."""
        if not self.tokenizer.is_local:
            return None
        return json_texts(line, self.keys) if block.source.format in JSON_FORMATS else line_text(line) if block.source.format == "text" else None

    def _long(self, texts: Sequence[Iterable[str]]) -> Iterator[list[Column]]:
        """A document, its ids as they come, and when a text is over its length."""
        for i, (text, dtype) in enumerate(zip(texts, self.dtypes, strict=True)):
            length = 0
            for ids in self.tokenizer.encode_pieces(text):
                length += len(ids)
                yield self._of_one_key(i, Column(ids.astype(dtype), _NONE, _NONE))
            ending = np.array([self.tokenizer.eod] if self.append_eod and length else [], dtype=dtype)
            lengths = np.array([length + len(ending)] if length else [], dtype="<i4")
            yield self._of_one_key(i, Column(ending, lengths, np.array([len(lengths)], dtype="<i4")))

    def _of_one_key(self, key: int, column: Column) -> list[Column]:
        return [column if i == key else Column(_NONE, _NONE, _NONE) for i in range(len(self.keys))]

    def _line_by_line(self, block: Block, start: int, lines: list[bytes], part: Part) -> Iterator[list[Column]]:
        """What is not all plain texts: lists of sentences, blank lines, bad lines."""
        parse = PARSERS[block.source.format]
        documents: list[list[Sentences]] = []
        numbers: list[int] = []
        for number, line in enumerate(lines, start=start):
            try:
                document = parse(line, self.keys)
            except BadLine as bad:
                yield self._columns(block, numbers, documents, part)  # whose bad lines come before this one
                documents, numbers = [], []
                self._count_bad(part, block.place(number), bad)
                continue
            if document is None:
                for count in part.counts:
                    count.blank += 1
                continue
            documents.append(document)
            numbers.append(number)
        if documents:
            yield self._columns(block, numbers, documents, part)

    def _columns(self, block: Block, numbers: list[int], documents: list[list[Sentences]], part: Part) -> list[Column]:
        try:
            return self._columns_of(documents)
        except ValueError:
            return self._columns_of([d for n, d in zip(numbers, documents, strict=True) if self._is_encoded(block.place(n), d, part)])

    def _columns_of(self, documents: list[list[Sentences]]) -> list[Column]:
        columns = []
        for i in range(len(self.keys)):
            sentences = np.fromiter((len(document[i]) for document in documents), dtype=np.int64, count=len(documents))
            columns.append(self._column([sentence for document in documents for sentence in document[i]], sentences))
        return columns

    def _is_encoded(self, place: str, document: list[Sentences], part: Part) -> bool:
        try:
            self.tokenizer.encode_arrays([sentence for sentences in document for sentence in sentences])
        except ValueError as error:
            self._count_bad(part, place, BadLine(str(error), "mend the line, or give the tokenizer that the data was made for"))
            return False
        return True

    def _count_bad(self, part: Part, place: str, bad: BadLine) -> None:
        for count in part.counts:
            count.bad += 1
        if part.counts[0].bad > self.max_bad:
            raise bad.at(place) if not part.bad_lines else too_many_bad(self.max_bad, [*part.bad_lines, (place, bad.what, bad.fix)])
        if len(part.bad_lines) < BAD_SHOWN:
            part.bad_lines.append((place, bad.what, bad.fix))

    def _column(self, texts: list[str], sentences: np.ndarray) -> Column:
        """Texts, of which each document has so many, as ids. As Megatron-LM: an empty sentence is no sequence, and a
        document without any gets no end of document either."""
        ids, lengths = self._encode(texts)
        document = np.repeat(np.arange(len(sentences)), sentences)[lengths > 0]
        lengths = lengths[lengths > 0]
        sequences = np.bincount(document, minlength=len(sentences))
        if self.append_eod and len(lengths):
            last = np.append(document[1:] != document[:-1], True)
            lengths = lengths + last
            is_text = np.ones(len(ids) + int(last.sum()), dtype=bool)
            is_text[np.cumsum(lengths)[last] - 1] = False
            ended = np.full(len(is_text), self.tokenizer.eod, dtype=self.dtypes[0])
            ended[is_text] = ids
            ids = ended
        return Column(ids.astype(self.dtypes[0], copy=False), lengths.astype("<i4"), sequences.astype("<i4"))

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        long = {i: np.concatenate(list(self.tokenizer.encode_pieces([text]))) for i, text in enumerate(texts) if len(text) > LONG}
        return encode_all_but(self.tokenizer.encode_arrays, texts, long)

    @property
    def dtypes(self) -> list[np.dtype]:
        """What is written for each key."""
        return [token_dtype(self.tokenizer.vocab_size)] * len(self.keys)


def too_many_bad(allowed: int, lines: Sequence[tuple[str, str, str]]) -> InputError:
    """More bad lines than allowed, the first of them with their places."""
    shown = "\n".join(f"    {place}: {what}" for place, what, _ in lines[:BAD_SHOWN])
    return InputError(f"more than {allowed} bad lines:\n{shown}", lines[0][0], "mend them, or allow more with --max-bad")
