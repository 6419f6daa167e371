"""A .bin/.idx pair that an old tool or a killed run left, written anew with a right index; the old files stay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import IndexedError
from data_tools.indexed import DTYPES, HEADER, MAGIC, IndexedWriter, bin_path, description_path, document_tokens, idx_path, pieces

_AGAIN = "make the pair again with `yuan preprocess`"


@dataclass
class Diagnosis:
    """What is wrong with a pair, and what a right index says.

    Attributes:
        mended: what is wrong and costs nothing.
        lost: what cannot be kept.
        lengths, boundaries: of sequences and documents, as in the .idx; both as far as they are known.
        documents: how many of those are kept: those whose tokens are all there.
        is_eod_uncounted: the .bin has one token more behind every document than the lengths say.
    """

    prefix: Path
    dtype: np.dtype
    lengths: np.ndarray
    boundaries: np.ndarray
    documents: int = 0
    is_eod_uncounted: bool = False
    mended: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The right index, for `IndexedWriter.add_stream`."""
        for lengths, sequences in pieces(self.lengths, self.boundaries[: self.documents + 1]):
            if self.is_eod_uncounted:
                lengths = lengths.astype("i8")
                lengths[(np.cumsum(sequences) - 1)[sequences > 0]] += 1
            yield lengths, sequences


def diagnose(prefix: str | Path) -> Diagnosis:
    """What is wrong with the pair; nothing is written.

    Raises:
        IndexedError: too little is left to know where a document ends.
    """
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            raise IndexedError(f"no such file: {path}", str(prefix), f"there is nothing to mend a pair from with one file of it; {_AGAIN}")
    code, sequences, ends = _header(idx_path(prefix))
    index = np.memmap(idx_path(prefix), mode="r", dtype="u1")
    known = min(sequences, (len(index) - HEADER.size) // 4)
    lengths = index[HEADER.size : HEADER.size + 4 * known].view("<i4")
    found = Diagnosis(Path(prefix), np.dtype(DTYPES[code]), lengths, np.zeros(1, "i8"))
    start = HEADER.size + 12 * sequences
    size = start + 8 * ends
    if len(index) == size + sequences and sequences:
        raise IndexedError("a multimodal data set, whose modes would be lost", str(idx_path(prefix)), "mend it with Megatron-LM")
    if known and lengths.min() < 0:
        raise IndexedError("there are lengths below 0", str(idx_path(prefix)), _AGAIN)
    if len(index) < size:
        part = f"among its lengths: {known:,} of {sequences:,} sequences are known" if known < sequences else "behind its lengths"
        found.lost.append(f"the .idx is cut off, {len(index):,} of {size:,} bytes, {part}")
    elif len(index) > size:
        found.mended.append(f"{len(index) - size:,} bytes behind the end of the .idx, which mean nothing")
    _offsets(found, index[HEADER.size + 4 * sequences : start], sequences)
    whole = max(0, min(ends, (len(index) - start) // 8))
    _documents(found, index[start : start + 8 * whole].view("<i8"), sequences, ends)
    _tokens(found)
    return found


def repair(prefix: str | Path, output: str | Path, accept_loss: bool = False) -> tuple[Diagnosis, IndexedWriter]:
    """Write the pair anew as `output`, with a right index.

    Returns:
        What was wrong, and the writer, whose counts are those of the new pair.

    Raises:
        IndexedError: nothing is wrong; the output is the pair itself; something is lost and that is not accepted.
    """
    if Path(output).resolve() == Path(prefix).resolve():
        raise IndexedError("the output is the pair itself, which may be the only copy", "--output", "give another prefix")
    found = diagnose(prefix)
    if not found.mended and not found.lost:
        raise IndexedError(f"nothing to mend: {prefix} is whole", str(prefix), "use it as it is; `yuan data verify` looks at every token too")
    if found.lost and not accept_loss:
        raise IndexedError("\n    ".join(["not all can be kept:", *found.lost]), str(prefix), f"go on without it: --accept-loss; or {_AGAIN}")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(output, found.dtype) as writer, open(bin_path(prefix), "rb") as tokens:
        writer.add_stream(tokens, found.pieces())
        if not writer.tokens:
            raise IndexedError("no whole document is left", str(prefix), _AGAIN)
        writer.finish(_manifest(found, writer))
    return found, writer


def _header(path: Path) -> tuple[int, int, int]:
    with open(path, "rb") as file:
        start = file.read(HEADER.size)
    if len(start) < HEADER.size:
        raise IndexedError(f"{len(start)} bytes are left of the .idx, not even its header", str(path), _AGAIN)
    magic, version, code, sequences, ends = HEADER.unpack(start)
    if (magic, version) != (MAGIC, 1) or code not in DTYPES:
        raise IndexedError("not the index of a Megatron data set", str(path), _AGAIN)
    return code, sequences, ends


def _offsets(found: Diagnosis, there: np.ndarray, sequences: int) -> None:
    """They follow from the lengths, so they are only looked at."""
    if len(there) < 8 * sequences:
        return  # cut off, which is said already
    offsets, expected = there.view("<i8"), 0
    for start in range(0, sequences, 1 << 20):
        sizes = found.lengths[start : start + (1 << 20)].astype("i8") * found.dtype.itemsize
        if (offsets[start : start + len(sizes)] != expected + np.cumsum(sizes) - sizes).any():
            found.mended.append("sequences begin at other bytes than their lengths add up to: written anew from the lengths")
            return
        expected += int(sizes.sum())


def _documents(found: Diagnosis, there: np.ndarray, sequences: int, ends: int) -> None:
    known = len(found.lengths)
    if ends == 1 and len(there) == 1 and there[0] == 0 and sequences:
        found.mended.append(f"no document is ended, as Yuan 2.0's preprocess_data_yuan.py does: {known:,} sequences become {known:,} documents")
        found.boundaries, found.documents = np.arange(known + 1), known
        return
    right = (there >= 0) & (there <= known)
    right[:1] &= there[:1] == 0
    right[1:] &= there[1:] >= there[:-1]
    count = len(there) if right.all() else int(np.argmin(right))
    prefix = there[:count]
    if count == ends and count and prefix[-1] == sequences:
        found.boundaries, found.documents = prefix, ends - 1
    elif (np.diff(prefix) == 1).all():  # as all those before, and as every plain text has it
        what = f"which sequences make a document is known of {max(0, count - 1):,} documents, each of one: the others become one document each"
        found.lost.append(f"{what}, and empty documents among them are left out")
        found.boundaries, found.documents = np.arange(known + 1), known
    else:
        what = f"which sequences make a document is known of {max(0, count - 1):,} of {ends - 1:,} documents"
        found.lost.append(f"{what}: {known - int(prefix[-1]):,} sequences at the end are left out")
        found.boundaries, found.documents = prefix, count - 1


def _tokens(found: Diagnosis) -> None:
    """Hold the size of the .bin against the lengths."""
    size, item = bin_path(found.prefix).stat().st_size, found.dtype.itemsize
    kept = int(found.lengths[: int(found.boundaries[found.documents])].sum(dtype="i8"))
    surplus = size - kept * item
    if surplus > 0 and not found.lost and (eod := _uncounted_eod(found, size)) is not None:
        found.is_eod_uncounted = True
        what = f"every document is followed by {eod}, which no length counts, as in files of Megatron-LM's older preprocess_data.py"
        found.mended.append(f"{what}: counted now, {surplus // item:,} tokens")
    elif surplus > 0:
        found.lost.append(f"{surplus:,} bytes at the end of the .bin belong to no document that the .idx knows ({surplus // item:,} tokens): cut off")
    elif surplus < 0:
        documents, tokens = _whole_documents(found, size // item)
        what = f"the .bin is cut off, {size:,} of {kept * item:,} bytes: {found.documents - documents:,} documents at the end are left out"
        found.lost.append(f"{what} ({kept - tokens:,} tokens, of which {size // item - tokens:,} are there)")
        found.documents = documents


def _uncounted_eod(found: Diagnosis, size: int) -> int | None:
    """The one id that follows every document that has text, where the .bin is longer by just those."""
    data = np.memmap(bin_path(found.prefix), mode="r", dtype=found.dtype, shape=(size // found.dtype.itemsize,))
    eod, at = None, 0
    for lengths, sequences in found.pieces():
        tokens = document_tokens(lengths, sequences)[sequences > 0]
        ends = at + np.cumsum(tokens + 1)
        if len(ends):
            at = int(ends[-1])
            if at > len(data):
                return None
            last = data[ends - 1]
            eod = int(last[0]) if eod is None else eod
            if (last != eod).any():
                return None
    return eod if at * found.dtype.itemsize == size else None


def _whole_documents(found: Diagnosis, tokens: int) -> tuple[int, int]:
    """How many documents lie in the first `tokens` tokens as a whole, and how many tokens they have."""
    documents = until = 0
    for piece in found.pieces():
        ends = until + np.cumsum(document_tokens(*piece))
        whole = int(np.searchsorted(ends, tokens, side="right"))
        if whole < len(ends):
            return documents + whole, int(ends[whole - 1]) if whole else until
        documents, until = documents + len(ends), int(ends[-1])
    return documents, until


def _manifest(found: Diagnosis, writer: IndexedWriter) -> dict[str, Any]:
    """What the old manifest says of how the pair was made, with counts of now."""
    try:
        old = json.loads(description_path(found.prefix).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        old = {}
    kept = {key: old[key] for key in ("tokenizer", "tokenizer_arguments", "append_eod", "json_keys", "inputs") if isinstance(old, dict) and key in old}
    return {"documents": writer.documents, "tokens": writer.tokens, **kept, "repaired": {"from": found.prefix.name, "mended": found.mended, "lost": found.lost}}
