"""Is a .bin/.idx pair whole? Every number of the index and every token is read, in bounded memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import DataError
from data_tools.indexed import IndexedReader, bin_path, description_path, document_tokens, idx_path
from data_tools.sources import Source, blocks

_TOKENS = 1 << 22  # read at a time: 16 MiB at most
_INDEX = 1 << 20
_REPAIR = "`yuan data repair` writes the index anew"


@dataclass
class Verified:
    """What was found: the counts, and each fault as an error that names the place and the mend."""

    documents: int = 0
    tokens: int = 0
    largest_id: int = -1
    faults: list[DataError] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def verify(
    prefix: str | Path,
    vocab_size: int | None = None,
    inputs: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Verified:
    """Hold the pair against its format and its manifest.

    Args:
        vocab_size: ids are below it; otherwise the manifest's tokenizer says so.
        inputs: read the input files too: are they those that the pair was made of?
        progress: called with the bytes of tokens read and those that there are.
    """
    found = Verified()
    try:
        reader = IndexedReader(prefix)
    except DataError as error:
        found.faults.append(error)
        return found
    found.documents, found.tokens = reader.documents, reader.tokens
    found.faults += _index(reader)
    manifest = _manifest(Path(prefix), found)
    if not found.faults:  # otherwise the ends of documents are not known
        tokenizer = manifest.get("tokenizer") or {}
        size = vocab_size or tokenizer.get("vocab_size")
        eod = tokenizer.get("eod") if manifest.get("append_eod") else None
        _tokens(reader, found, size, eod, progress)
        if manifest:
            _counts(reader, manifest, found)
    if inputs and manifest:
        found.faults += _inputs(manifest)
    return found


def _index(reader: IndexedReader) -> Iterator[DataError]:
    """Offsets are the sums of the lengths, and documents follow one another."""
    path, expected = str(idx_path(reader.prefix)), 0
    for start in range(0, reader.sequences, _INDEX):
        lengths = np.asarray(reader.lengths[start : start + _INDEX], dtype="i8")
        if (lengths < 0).any():
            yield DataError(f"sequence {start + int(np.argmax(lengths < 0))} has a length below 0", path, "make the pair again")
            return
        ends = expected + np.cumsum(lengths * reader.dtype.itemsize)
        wrong = reader.offsets[start : start + _INDEX] != ends - lengths * reader.dtype.itemsize
        if wrong.any():
            number = start + int(np.argmax(wrong))
            what = f"sequence {number} begins at byte {reader.offsets[number]}, and the lengths before it add up to another"
            yield DataError(what, path, _REPAIR)
            break
        expected = int(ends[-1])
    for start in range(0, reader.documents, _INDEX):
        falls = np.diff(reader.boundaries[start : start + _INDEX + 1]) < 0
        if falls.any():
            yield DataError(f"document {start + int(np.argmax(falls))} ends before it begins", path, _REPAIR)
            return


def _manifest(prefix: Path, found: Verified) -> dict[str, Any]:
    path = description_path(prefix)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        found.unknown.append(f"no manifest {path}: what made the pair is not known")
        return {}
    except ValueError as error:
        found.faults.append(DataError(f"the manifest cannot be read: {error}", str(path), "remove it, or make the pair again"))
        return {}
    return manifest


def _counts(reader: IndexedReader, manifest: dict[str, Any], found: Verified) -> None:
    for name, here in (("documents", reader.documents), ("tokens", reader.tokens), ("largest_id", found.largest_id)):
        if name in manifest and manifest[name] != here:
            what = f"the manifest says {name} {manifest[name]}, and there are {here}" if name != "largest_id" else f"the manifest says that the largest id is {manifest[name]}, and it is {here}"
            fix = "another tool wrote the pair, or the manifest: remove the manifest, or make the pair again"
            found.faults.append(DataError(what, str(description_path(reader.prefix)), fix))


def _tokens(reader: IndexedReader, found: Verified, size: int | None, eod: int | None, progress: Callable[[int, int], None] | None) -> None:
    """Every id is one of the vocabulary, and every document that has tokens ends with `eod` where there should be one."""
    if size is None:
        found.unknown.append("the size of the vocabulary is not known: no id is too large for it (--vocab-size, or recipe=NAME)")
    path, ends = str(bin_path(reader.prefix)), _Ends(reader)
    outside = unended = 0
    first_outside = first_unended = ""
    with open(bin_path(reader.prefix), "rb") as file:
        for start in range(0, reader.tokens, _TOKENS):
            tokens = np.fromfile(file, dtype=reader.dtype, count=_TOKENS)
            least, largest = int(tokens.min()), int(tokens.max())
            found.largest_id = max(found.largest_id, largest)
            if least < 0 or (size is not None and largest >= size):
                wrong = (tokens < 0) | (tokens >= (size or largest + 1))
                at = int(np.argmax(wrong))
                first_outside = first_outside or f"{tokens[at]}, token {start + at}"
                outside += int(wrong.sum())
            documents, last = ends.until(start + len(tokens))
            if eod is not None and len(last):
                open_ended = tokens[last - 1 - start] != eod
                if open_ended.any():
                    at = int(np.argmax(open_ended))
                    first_unended = first_unended or f"document {documents[at]} ends with {tokens[last[at] - 1 - start]}"
                    unended += int(open_ended.sum())
            if progress:
                progress((start + len(tokens)) * reader.dtype.itemsize, reader.tokens * reader.dtype.itemsize)
    if outside:
        bounds = f"the vocabulary of {size}" if size else "any vocabulary"
        what = f"{outside:,} ids outside {bounds}, the first is {first_outside}"
        found.faults.append(DataError(what, path, "give the tokenizer that made the data, or make the pair again"))
    if unended:
        what = f"{unended:,} documents do not end with {eod}, the end of document that the manifest promises; {first_unended}"
        found.faults.append(DataError(what, path, "make the pair again, or remove the manifest if another tool wrote the pair"))


class _Ends:
    """Where the documents that have tokens end, in tokens, as far as asked for."""

    def __init__(self, reader: IndexedReader):
        self._pieces = reader.pieces()
        self._numbers = self._ends = np.empty(0, dtype="i8")
        self._documents = self._tokens = 0

    def until(self, token: int) -> tuple[np.ndarray, np.ndarray]:
        """(numbers, ends) of those that end at `token` or before, and were not given before."""
        while not len(self._ends) or self._ends[-1] <= token:
            piece = next(self._pieces, None)
            if piece is None:
                break
            tokens = document_tokens(*piece)
            ends = self._tokens + np.cumsum(tokens)
            numbers = self._documents + np.arange(len(tokens))
            self._numbers = np.concatenate([self._numbers, numbers[tokens > 0]])
            self._ends = np.concatenate([self._ends, ends[tokens > 0]])
            self._documents, self._tokens = self._documents + len(tokens), int(ends[-1])
        count = int(np.searchsorted(self._ends, token, side="right"))
        given = self._numbers[:count], self._ends[:count]
        self._numbers, self._ends = self._numbers[count:], self._ends[count:]
        return given


def _inputs(manifest: dict[str, Any]) -> Iterator[DataError]:
    """The input files are there, and hold what they held: `input_sha256` is made again."""
    fix = "fetch the input of then, or make the pair again"
    for part in manifest.get("merged", [manifest]):
        told = part.get("inputs", manifest.get("inputs")) or []
        if not told or "input_sha256" not in part:
            yield DataError("the manifest does not say what the pair was made of", str(part.get("name", "")), "")
            continue
        sources = [Source(**source) for source in told]
        gone = [source.path for source in sources if not Path(source.path).is_file()]
        changed = [source.path for source in sources if source.path not in gone and Path(source.path).stat().st_size != source.size]
        for path in gone:
            yield DataError(f"an input is gone: {path}", path, fix)
        for path in changed:
            yield DataError("an input has another size than when the pair was made", path, fix)
        if not gone and not changed and _input_hash(sources, part, manifest) != part["input_sha256"]:
            shown = sources[0].path if len(sources) == 1 else f"one of {len(sources)} files, {sources[0].path} to {sources[-1].path}"
            yield DataError("an input has another content than when the pair was made", shown, fix)


def _input_hash(sources: list[Source], part: dict[str, Any], manifest: dict[str, Any]) -> str:
    from data_tools.preprocess import shares

    digest = hashlib.sha256()
    keys = part.get("json_keys", manifest.get("json_keys", []))
    for source, start, end in shares(sources, tuple(part["shard"])):
        for block in blocks(source, part["part_bytes"], keys, start, end):
            digest.update(block.read_hashed()[1].encode())
    return digest.hexdigest()
