"""What lies in a .bin/.idx pair: counts, and how long its documents are. Reads the index alone, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.indexed import IndexedReader, bin_path, document_tokens, idx_path

_TABLE = 1 << 20  # lengths counted one by one; the documents above it are few, and kept as they are
PERCENTILES = (1, 10, 50, 90, 99)


@dataclass(frozen=True)
class Summary:
    """Counts of a pair.

    Attributes:
        largest_id: of all tokens where `is_exact`, else of the first and last four million.
        empty: documents without a token.
        percentiles: tokens of the document at each of PERCENTILES, by length; empty without documents.
        histogram: (fewest tokens, most tokens, documents) in bins that double, the empty ones left out at both ends.
        description: the manifest, where it belongs to the pair.
    """

    documents: int
    sequences: int
    tokens: int
    dtype: str
    bin_bytes: int
    idx_bytes: int
    largest_id: int
    is_exact: bool
    empty: int
    longest: int
    percentiles: dict[int, int]
    histogram: list[tuple[int, int, int]]
    description: dict[str, Any] | None


def summarize(prefix: str | Path) -> Summary:
    """Counts of the pair, exact, in some 20 MiB whatever its size.

    Raises:
        IndexedError: a file is missing or torn.
    """
    reader = IndexedReader(prefix)
    counts, long = _count_lengths(reader)
    known = (reader.description or {}).get("largest_id")
    return Summary(
        documents=reader.documents,
        sequences=reader.sequences,
        tokens=reader.tokens,
        dtype=str(reader.dtype),
        bin_bytes=bin_path(prefix).stat().st_size,
        idx_bytes=idx_path(prefix).stat().st_size,
        largest_id=known if isinstance(known, int) else reader.sampled_id_range()[1],
        is_exact=isinstance(known, int) or reader.tokens <= 1 << 22,
        empty=int(counts[0]),
        longest=int(long[-1]) if len(long) else int(np.flatnonzero(counts)[-1]) if counts.any() else 0,
        percentiles=_percentiles(counts, long),
        histogram=_histogram(counts, long),
        description=reader.description,
    )


def _count_lengths(reader: IndexedReader) -> tuple[np.ndarray, np.ndarray]:
    """How many documents there are of each length below _TABLE, and the lengths of the others, sorted."""
    counts, long = np.zeros(_TABLE, dtype="i8"), [np.empty(0, dtype="i8")]
    for piece in reader.pieces():
        tokens = document_tokens(*piece)
        within = tokens < _TABLE
        found = np.bincount(tokens[within])
        counts[: len(found)] += found
        long.append(tokens[~within])
    return counts, np.sort(np.concatenate(long))


def _percentiles(counts: np.ndarray, long: np.ndarray) -> dict[int, int]:
    until = np.cumsum(counts)
    short, total = int(until[-1]), int(until[-1]) + len(long)
    found = {}
    for percent in PERCENTILES if total else ():
        rank = min(total - 1, total * percent // 100)
        found[percent] = int(np.searchsorted(until, rank, side="right")) if rank < short else int(long[rank - short])
    return found


def _histogram(counts: np.ndarray, long: np.ndarray) -> list[tuple[int, int, int]]:
    rows = [(0, 0, int(counts[0]))]
    low = 1
    while low < _TABLE or (len(long) and low <= long[-1]):
        high = 2 * low - 1
        count = counts[low : high + 1].sum() if low < _TABLE else np.searchsorted(long, high, side="right") - np.searchsorted(long, low)
        rows.append((low, high, int(count)))
        low *= 2
    filled = [i for i, row in enumerate(rows) if row[2]]
    return rows[filled[0] : filled[-1] + 1] if filled else []
