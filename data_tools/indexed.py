"""Megatron's indexed dataset: a .bin of raw tokens and an .idx that says where each sequence and document lies.

The .idx, little endian: magic "MMIDIDX\\0\\0", uint64 version 1, uint8 dtype code, uint64 S sequences, uint64 D,
int32[S] tokens per sequence, int64[S] byte offset of each sequence in the .bin, int64[D] first sequence of each
document with S at the end (so D is the number of documents + 1). An empty document repeats its boundary.
Source: megatron/core/datasets/indexed_dataset.py; the tests hold both byte for byte together.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_tools.errors import IndexedError
from data_tools.lock import Lock

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_CHUNK = 1 << 20  # index entries turned at a time while finishing: 12 MiB
_DOCUMENTS = 1 << 18  # documents turned at a time elsewhere: some MiB, where a document is of some sequences
_COPIED = 1 << 24
_FIX = "`yuan data repair` mends what can be mended; or make the pair again with `yuan preprocess`"


def bin_path(prefix: str | Path) -> Path:
    """The data file of a prefix."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index file of a prefix."""
    return Path(f"{prefix}.idx")


def description_path(prefix: str | Path) -> Path:
    """Ours: the file that says what made the data."""
    return Path(f"{prefix}.json")


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's choice: uint16 below 65500 ids, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class NotMovedError(Exception):
    """Tokens that should have been moved into a .bin are not there."""


class IndexedWriter:
    """Writes one .bin/.idx pair, document by document, in bounded memory; locked against a second writer.

    Everything goes into `.part` files beside the output. `finish` makes the pair appear, the .idx last; without it,
    leaving the `with` block removes the `.part` files and what was there before stays as it was.

    Args:
        prefix: path of the pair without suffix; its folder exists.
        dtype: of the tokens (`token_dtype`).
        data: where the .bin grows, on the same file system; it stays there when the block is left before `finish`, and what it
            holds then is there for `move_file`.

    Raises:
        DataError: another process is writing this pair.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | str, data: Path | None = None):
        self.prefix, self.dtype = Path(prefix), np.dtype(dtype).newbyteorder("<")
        self.documents = self.sequences = self.tokens = 0
        self._code = next(code for code, name in DTYPES.items() if np.dtype(name) == self.dtype)
        self._bin_part, self._idx_part = (path.with_name(path.name + ".part") for path in (bin_path(prefix), idx_path(prefix)))
        self._unfinished = [self._idx_part, *([] if data else [self._bin_part])]
        self._bin_part = data or self._bin_part
        self._lock = Lock(Path(f"{prefix}.lock"))
        self._bin = open(self._bin_part, "r+b" if data and data.is_file() else "wb")
        # The index grows with the number of sequences, so it waits on disk, in files without a name, not in memory.
        self._lengths, self._boundaries = (tempfile.TemporaryFile(dir=self.prefix.parent) for _ in range(2))

    def add_document(self, tokens: Sequence[int] | np.ndarray, lengths: Sequence[int] | None = None) -> None:
        """One document: its tokens, and the lengths of its sequences (one sequence if not given; [] for none)."""
        tokens = np.asarray(tokens, dtype=self.dtype)
        lengths = [tokens.size] if lengths is None else lengths
        self.add_batch(tokens, lengths, [len(lengths)])

    def add_batch(self, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray, sequences: Sequence[int] | np.ndarray) -> None:
        """Several documents at once.

        Args:
            tokens: all their tokens, one after another.
            lengths: tokens of each sequence; they add up to `tokens`.
            sequences: number of sequences of each document; they add up to `lengths`.

        Raises:
            ValueError: the sums do not agree.
        """
        lengths, sequences = np.asarray(lengths, dtype="<i4"), np.asarray(sequences, dtype="<i8")
        if lengths.sum(dtype="i8") != len(tokens) or sequences.sum() != len(lengths):
            raise ValueError(f"{len(tokens)} tokens, sequences of {lengths.sum()}; {len(lengths)} sequences, documents of {sequences.sum()}")
        self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).tobytes())
        self._count(len(tokens), lengths, sequences)

    def move_file(self, tokens: Path, lengths: np.ndarray, sequences: np.ndarray) -> None:
        """Several documents at once, whose tokens lie in a file of raw tokens of this pair's dtype. It is removed when they are
        in the .bin; where it is gone, an earlier writer with the same `data` and the same files before it moved them.

        Raises:
            ValueError: the sizes do not agree.
            NotMovedError: there is neither the file nor what was moved.
        """
        count = int(lengths.sum(dtype="i8"))
        start, size = self.tokens * self.dtype.itemsize, count * self.dtype.itemsize
        if int(sequences.sum(dtype="i8")) != len(lengths) or tokens.is_file() and tokens.stat().st_size != size:
            raise ValueError(f"{tokens} is not of the {size} bytes that its lengths add up to")
        self._bin.flush()
        if tokens.is_file():
            self._bin.truncate(start)  # before it is written again, so that what follows cannot be of another run
            self._bin.seek(start)
            with open(tokens, "rb") as file:
                _copy(file, self._bin, size)
            tokens.unlink()
        elif os.fstat(self._bin.fileno()).st_size < start + size:
            raise NotMovedError(str(tokens))
        self._count(count, lengths.astype("<i4"), sequences.astype("<i8"))

    def add_stream(self, tokens: BinaryIO, index: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Any number of documents in bounded memory: an open file of raw tokens of this pair's dtype, read only as far as
        the index goes, and their (lengths of sequences, sequences of documents) piece by piece.

        Raises:
            ValueError: the file ends before its index.
        """
        for lengths, sequences in index:
            count = int(lengths.sum(dtype="i8"))
            left = count * self.dtype.itemsize
            while left:
                block = tokens.read(min(left, _COPIED))
                if not block:
                    raise ValueError(f"{tokens.name} ends {left} bytes before its index")
                self._bin.write(block)
                left -= len(block)
            self._count(count, lengths.astype("<i4"), sequences.astype("<i8"))

    def _count(self, tokens: int, lengths: np.ndarray, sequences: np.ndarray) -> None:
        self._lengths.write(lengths.tobytes())
        self._boundaries.write((self.sequences + np.cumsum(sequences)).astype("<i8").tobytes())
        self.tokens += tokens
        self.sequences += len(lengths)
        self.documents += len(sequences)

    def finish(self, description: dict[str, object] | None = None) -> None:
        """Write the index and give the files their names, the .idx last: it never lies beside an older or newer .bin.

        Args:
            description: what made the data, for `IndexedReader.description`; kept in `<prefix>.json`.
        """
        self.flush()
        self.appear(description)

    def flush(self) -> None:
        """The first half of `finish`, which takes its time: all of both files is on the disk."""
        self._bin.flush()
        self._bin.truncate(self.tokens * self.dtype.itemsize)
        with ThreadPoolExecutor(1) as meanwhile:  # each waits for the disk
            synced = meanwhile.submit(os.fsync, self._bin.fileno())
            self._write_index()
            synced.result()

    def appear(self, description: dict[str, object] | None = None) -> None:
        """The second half."""
        self._bin.close()
        idx_path(self.prefix).unlink(missing_ok=True)
        description_path(self.prefix).unlink(missing_ok=True)
        os.replace(self._bin_part, bin_path(self.prefix))
        if description:
            description_path(self.prefix).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        os.replace(self._idx_part, idx_path(self.prefix))
        self.close()

    def _write_index(self) -> None:
        with open(self._idx_part, "wb") as out:
            out.write(HEADER.pack(MAGIC, 1, self._code, self.sequences, self.documents + 1))
            self._lengths.seek(0)
            shutil.copyfileobj(self._lengths, out)
            self._lengths.seek(0)
            offset = 0
            while chunk := self._lengths.read(4 * _CHUNK):
                sizes = np.frombuffer(chunk, dtype="<i4").astype("<i8") * self.dtype.itemsize
                out.write((offset + np.cumsum(sizes) - sizes).astype("<i8").tobytes())
                offset += int(sizes.sum())
            out.write(struct.pack("<q", 0))
            self._boundaries.seek(0)
            shutil.copyfileobj(self._boundaries, out)
            out.flush()
            os.fsync(out.fileno())

    def close(self) -> None:
        """Remove what is not finished. Harmless after `finish`."""
        for part in self._unfinished:
            part.unlink(missing_ok=True)
        for file in (self._bin, self._lengths, self._boundaries):
            with suppress(OSError):  # on a full disk closing tries once more to write what is buffered
                file.close()
        self._lock.release()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    """`size` bytes between open files from where each stands, `target` without anything unwritten. Within the system, where it
    can: a third of the time."""
    try:
        while size:
            copied = os.sendfile(target.fileno(), source.fileno(), None, size)
            if not copied:
                raise ValueError(f"{source.name} ends {size} bytes early")
            size -= copied
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSOCK, errno.EOPNOTSUPP):
            raise
        shutil.copyfileobj(source, target)


class IndexedReader:
    """A .bin/.idx pair, memory-mapped; its sizes are checked on opening.

    Attributes:
        dtype: numpy type of the tokens.
        documents, sequences, tokens: counts.
        lengths, offsets: int32[sequences], int64[sequences], tokens of each and the byte in the .bin at which it begins.
        boundaries: int64[documents + 1], first sequence of each document, and the end.
        multimodal: each sequence has a mode too, which nothing here reads or writes.
        description: what made the data, or None where that is not known: `documents`, `tokens`, `largest_id`,
            `append_eod` and `tokenizer` with its `type`, `sha256` (`Tokenizer.hash`), `vocab_size` and `eod`.

    Raises:
        IndexedError: a file is missing, not of this format, or its size does not fit its header.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = Path(prefix)
        for path in (idx_path(prefix), bin_path(prefix)):
            if not path.is_file():
                raise IndexedError(f"no such file: {path}", str(prefix), "give the path without .bin or .idx; `yuan preprocess` makes both")
        if idx_path(prefix).stat().st_size < HEADER.size:
            raise self._torn("too short for the index of a Megatron dataset")
        index = np.memmap(idx_path(prefix), mode="r", dtype="u1")
        magic, version, code, count, boundaries = HEADER.unpack(index[: HEADER.size].tobytes())
        if (magic, version) != (MAGIC, 1) or code not in DTYPES:
            raise self._torn("not the index of a Megatron dataset")
        self.dtype, self.sequences, self.documents = np.dtype(DTYPES[code]), count, boundaries - 1
        end = HEADER.size + 12 * count + 8 * boundaries
        if len(index) not in (end, end + count):  # one more byte per sequence: a multimodal dataset's modes
            raise self._torn(f"{len(index)} bytes where its header asks for {end}")
        self.multimodal = len(index) > end
        lengths_end, offsets_end = HEADER.size + 4 * count, HEADER.size + 12 * count
        self.lengths = index[HEADER.size : lengths_end].view("<i4")
        self.offsets = index[lengths_end:offsets_end].view("<i8")
        self.boundaries = index[offsets_end:end].view("<i8")
        self.tokens = int(self.lengths.sum(dtype="i8"))
        if self.documents == 0 and count:
            raise self._torn("no document is ended, as in the files of Yuan 2.0's preprocess_data_yuan.py")
        if self.documents < 0 or self.boundaries[0] != 0 or self.boundaries[-1] != count:
            raise self._torn("its documents do not begin with its first sequence and end with its last")
        self._map_tokens()
        self.description = self._read_description()

    def _map_tokens(self) -> None:
        path, wanted = bin_path(self.prefix), self.tokens * self.dtype.itemsize
        if path.stat().st_size != wanted:
            raise IndexedError(f"{path.stat().st_size} bytes where the .idx speaks of {wanted}", str(path), _FIX)
        self._data = np.memmap(path, mode="r", dtype=self.dtype) if self.tokens else np.empty(0, self.dtype)

    def _read_description(self) -> dict[str, Any] | None:
        try:
            description = json.loads(description_path(self.prefix).read_text(encoding="utf-8"))
            counts = description["documents"], description["tokens"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return description if counts == (self.documents, self.tokens) else None  # another tool rewrote the pair

    def sampled_id_range(self, tokens: int = 1 << 22) -> tuple[int, int]:
        """The smallest and the largest id among the first and the last `tokens` (32 MiB at most); (0, -1) without any."""
        ends = [part for part in (self._data[:tokens], self._data[max(tokens, self.tokens - tokens) :]) if len(part)]
        return int(min((part.min() for part in ends), default=0)), int(max((part.max() for part in ends), default=-1))

    def _torn(self, what: str) -> IndexedError:
        return IndexedError(what, str(idx_path(self.prefix)), _FIX)

    def get(self, sequence: int) -> np.ndarray:
        """Tokens of one sequence, a view into the file; IndexError outside 0 to sequences - 1, IndexedError for one outside the .bin."""
        if not 0 <= sequence < self.sequences:
            raise IndexError(f"sequence {sequence} of {self.sequences}")
        start, length = int(self.offsets[sequence]) // self.dtype.itemsize, int(self.lengths[sequence])
        if not 0 <= start <= start + length <= self.tokens:
            raise self._torn(f"sequence {sequence} lies outside the .bin")
        return self._data[start : start + length]

    def run(self, first: int, stop: int) -> np.ndarray:
        """Tokens of the sequences from `first` to before `stop`, one after another, a view into the file."""
        start = int(self.offsets[first]) // self.dtype.itemsize if first < stop else 0
        return self._data[start : start + int(self.lengths[first:stop].sum(dtype="i8"))]

    def document(self, number: int) -> list[np.ndarray]:
        """The sequences of one document; IndexError outside 0 to documents - 1."""
        if not 0 <= number < self.documents:
            raise IndexError(f"document {number} of {self.documents}")
        return [self.get(i) for i in range(int(self.boundaries[number]), int(self.boundaries[number + 1]))]

    def pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The index piece by piece, for `IndexedWriter.add_stream`; IndexedError where it contradicts itself."""
        for lengths, sequences in pieces(self.lengths, self.boundaries):
            if (sequences < 0).any() or (lengths < 0).any():
                raise self._torn("a document ends before it begins" if (sequences < 0).any() else "a sequence has a length below 0")
            yield lengths, sequences


def pieces(lengths: np.ndarray, boundaries: np.ndarray, size: int = _DOCUMENTS) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """An index as (lengths of sequences int32, sequences of documents int64), `size` documents at a time."""
    for start in range(0, len(boundaries) - 1, size):
        edges = np.asarray(boundaries[start : start + size + 1])
        yield np.asarray(lengths[edges[0] : edges[-1]]), np.diff(edges)


def document_tokens(lengths: np.ndarray, sequences: np.ndarray) -> np.ndarray:
    """Tokens of each document, int64, of one of the `pieces`."""
    until = np.concatenate([[0], np.cumsum(lengths, dtype="i8")])
    ends = np.cumsum(sequences)
    return until[ends] - until[ends - sequences]
