"""Rows of fine-tuning data → their tokens and which of these are trained, prepared once and kept beside the data.

Two of Megatron's pairs, document for document and token for token alike: `<prefix>_sft_document`, the tokens, and
`<prefix>_sft_mask_document`, uint8, 1 for what is trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data_tools.conversations import conversation
from data_tools.encode import BlockEncoder, Column, Counts, Part
from data_tools.errors import IndexedError
from data_tools.indexed import IndexedReader, idx_path, token_dtype
from data_tools.preprocess import dataset_prefix, encode_files
from data_tools.records import BadLine
from data_tools.rows import parse_row, row_sources
from data_tools.sources import Block, Format
from data_tools.templates import Rendered, Template, build_template
from data_tools.tokenizers import Tokenizer

KEYS = ("sft", "sft_mask")
_VERSION = 4  # of what conversations and templates make of a row: another one, and rows are prepared anew
_ROWS = 1 << 16  # looked at together


@dataclass
class ConversationEncoder(BlockEncoder):
    """Rows as tokens and masks; of `keys` the first is the tokens, the second the masks."""

    template: str = ""
    last_only: bool = False

    def plan(self) -> dict[str, object]:
        return {**super().plan(), "template": self.template, "last_only": self.last_only, "companions": _hashes(self.tokenizer), "version": _VERSION}

    @cached_property
    def _template(self) -> Template:
        return build_template(self.template, self.tokenizer)

    @property
    def dtypes(self) -> list[np.dtype]:
        return [token_dtype(self.tokenizer.vocab_size), np.dtype("u1")]

    def _batches(self, block: Block, lines: list[bytes], part: Part) -> Iterator[list[Column]]:
        rendered: list[Rendered] = []
        for number, line in enumerate(lines):
            try:
                row = parse_row(block.source.format, line)
                if row is None:
                    for count in part.counts:
                        count.blank += 1
                    continue
                rendered.append(self._template.render(conversation(row), self.last_only))
            except BadLine as bad:
                self._count_bad(part, block.place(number), bad)
            except ValueError as error:  # NullTokenizer's
                fix = "give the tokenizer of the model that is trained"
                self._count_bad(part, block.place(number), BadLine(str(error), fix))
        yield [self._column_of([getattr(one, name) for one in rendered], dtype) for name, dtype in zip(("ids", "trained"), self.dtypes)]

    @staticmethod
    def _column_of(rows: list[np.ndarray], dtype: np.dtype) -> Column:
        tokens = np.concatenate(rows).astype(dtype) if rows else np.empty(0, dtype)
        return Column(tokens, np.array([len(row) for row in rows], dtype="<i4"), np.ones(len(rows), dtype="<i4"))


@dataclass(frozen=True)
class Form:
    """How rows become tokens: all that decides them besides the rows and the tokenizer."""

    template: str
    last_only: bool = False
    format: Format | None = None


def prepared_prefix(path: str | Path, tokenizer: Tokenizer, form: Form, folder: str | Path | None = None) -> Path:
    """Where the tokens of a file of rows are kept: in `folder`, or a folder `cache` beside it, under a name that changes with
    the file (its size and its time), the tokenizer, the form and what its templates write."""
    path, status = Path(path), Path(path).stat()
    made_of = {"size": status.st_size, "time": status.st_mtime_ns, "tokenizer": tokenizer.hash(), "companions": _hashes(tokenizer), **asdict(form), "version": _VERSION}
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    return Path(folder or path.parent / "cache") / f"{path.name}-{key}"


def prepare(
    path: str | Path,
    prefix: str | Path,
    tokenizer: Tokenizer,
    form: Form,
    workers: int = 1,
    max_bad: int = 0,
    progress: Callable[[list[Counts]], None] | None = None,
) -> Counts:
    """Make both pairs of a file of rows.

    Raises:
        DataError: more than `max_bad` rows that are not what `conversation` reads, with the first of them.
        TokenizerError: the template does not go with the tokenizer.
    """
    build_template(form.template, tokenizer)  # before a worker does
    encoder = ConversationEncoder(tokenizer, KEYS, False, max_bad, template=form.template, last_only=form.last_only)
    return encode_files(encoder, row_sources(path, form.format), prefix, workers, progress=progress)[KEYS[0]]


def _hashes(tokenizer: Tokenizer) -> list[str]:
    """Of the files that may hold a template of the tokenizer's own."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in tokenizer.companions]


class Rows:
    """Prepared rows of one or several files, one after another, memory-mapped.

    Attributes:
        lengths: int32[rows], tokens of each.
        left_out: bad rows that the files had and these have not.
        sha256: of what they were made of: rows, tokenizer, template.

    Raises:
        IndexedError: a pair is missing or torn, or they do not go together.
    """

    def __init__(self, *prefixes: str | Path):
        self._files = [_Pair(prefix) for prefix in prefixes]
        self._starts = np.cumsum([0, *(len(file.tokens.lengths) for file in self._files)])
        self.lengths = np.concatenate([file.tokens.lengths for file in self._files])
        self.left_out = sum((file.tokens.description or {}).get("bad_lines", 0) for file in self._files)
        self.sha256 = hashlib.sha256("".join(file.sha256() for file in self._files).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, number: int) -> Rendered:
        """Tokens int32[n] and mask bool[n]; views into the files where their types allow it."""
        file = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._files[file].row(number - int(self._starts[file]))

    def trained(self, until: int) -> np.ndarray:
        """int64[rows]: trained tokens among the first `until` of each row, without its very first, which nothing predicts."""
        return np.concatenate([file.trained(until) for file in self._files])


class _Pair:
    def __init__(self, prefix: str | Path):
        self.tokens, self.mask = (IndexedReader(dataset_prefix(prefix, key)) for key in KEYS)
        if not np.array_equal(self.tokens.lengths, self.mask.lengths):
            raise IndexedError("its masks have other lengths than its tokens", str(prefix), "remove both, and prepare the rows again")

    def sha256(self) -> str:
        made = self.tokens.description or {}
        keys = ("input_sha256", "tokenizer", "template", "last_only", "companions", "version")
        return hashlib.sha256(json.dumps([made.get(key) for key in keys], sort_keys=True).encode()).hexdigest()

    def row(self, number: int) -> Rendered:
        return Rendered(self.tokens.get(number).astype(np.int32, copy=False), self.mask.get(number).view(bool))

    def trained(self, until: int) -> np.ndarray:
        lengths, offsets = self.mask.lengths, self.mask.offsets
        found = np.empty(len(lengths), dtype=np.int64)
        for first in range(0, len(lengths), _ROWS):
            rows = slice(first, min(first + _ROWS, len(lengths)))
            total = np.concatenate([[0], np.cumsum(self.mask.run(rows.start, rows.stop), dtype=np.int64)])
            starts = offsets[rows] - offsets[first]
            ends = starts + np.minimum(lengths[rows], until)
            found[rows] = total[ends] - total[np.minimum(starts + 1, ends)]
        return found


def is_prepared(prefix: str | Path) -> bool:
    """Whether both pairs are there: each appears when it is whole."""
    return all(idx_path(dataset_prefix(prefix, key)).is_file() for key in KEYS)
