"""Several rows in one sequence: which go together. Best fit, longest first."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from data_tools.sft import Rows


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Share rows out to as few packs as best-fit-decreasing finds: each row, longest first, into the fullest pack that still
    takes it (at most 11/9 of the least number, Johnson 1974; within 1 % of it for the lengths of real data).

    Args:
        lengths: int[rows], each from 1 to `capacity`.

    Returns:
        (rows int64[rows], starts int64[packs + 1]): pack i holds rows[starts[i] : starts[i + 1]], in their own order.
        The same for the same lengths, in every process.

    Raises:
        ValueError: a length outside 1 to `capacity`.
    """
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} do not go into packs of {capacity}")
    packs: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs by the room that is left in them
    rooms = 0  # bit r is set where with_room[r] is not empty: the fullest pack that takes a row is one lowest bit away
    for row in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = int(lengths[row])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = with_room[room].pop()
            rooms ^= 0 if with_room[room] else 1 << room
        else:
            room, number = capacity, len(packs)
            packs.append([])
        packs[number].append(row)
        with_room[room - length].append(number)
        rooms |= 1 << (room - length)
    starts = np.concatenate([[0], np.cumsum([len(one) for one in packs], dtype=np.int64)]).astype(np.int64)
    return np.array([row for one in packs for row in sorted(one)], dtype=np.int64), starts


@dataclass
class Packed:
    """Prepared rows as training samples of `seq_length`: a row of n tokens gives n - 1 inputs, each with the token that comes
    next as its label. A longer row is cut at its end; one of which no trained label is left is left out.

    Attributes:
        rows_cut, rows_left_out: how many.
        supervised: labels that are trained, in all samples together.
        efficiency: share of the positions of all samples that holds rows.
    """

    rows: Rows
    seq_length: int
    packing: bool = True
    rows_cut: int = field(init=False)
    rows_left_out: int = field(init=False)
    supervised: int = field(init=False)

    def __post_init__(self) -> None:
        lengths = np.minimum(np.asarray(self.rows.lengths, dtype=np.int64) - 1, self.seq_length)
        trained = self.rows.trained(self.seq_length + 1)
        kept = np.flatnonzero(trained > 0)
        self.rows_cut = int((self.rows.lengths[kept] - 1 > self.seq_length).sum())
        self.rows_left_out = len(lengths) - len(kept)
        self.supervised = int(trained.sum())
        self._lengths = lengths[kept]
        order, self._starts = pack(self._lengths, self.seq_length) if self.packing else (np.arange(len(kept)), np.arange(len(kept) + 1))
        self._rows = kept[order]

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def efficiency(self) -> float:
        return float(self._lengths.sum() / max(len(self) * self.seq_length, 1))

    def sample(self, number: int, filling: int) -> dict[str, np.ndarray]:
        """One sample.

        Args:
            filling: id of the positions behind the rows, which no row looks at and no loss counts.

        Returns:
            tokens, labels, position_ids int64[s]; loss_mask float32[s]; document int64[s], the number of the row within the
            sample that a position belongs to, and one more for the filling. Positions begin at 0 in every row.
        """
        size = self.seq_length
        tokens, labels = (np.full(size, filling, dtype=np.int64) for _ in range(2))
        loss_mask, positions = np.zeros(size, dtype=np.float32), np.arange(size, dtype=np.int64)
        rows = self._rows[self._starts[number] : self._starts[number + 1]]
        document, at = np.full(size, len(rows), dtype=np.int64), 0
        for place, number_of_row in enumerate(rows.tolist()):
            row = self.rows.row(number_of_row)
            length = min(len(row.ids) - 1, size)
            here = slice(at, at + length)
            tokens[here], labels[here] = row.ids[:length], row.ids[1 : length + 1]
            loss_mask[here], document[here] = row.trained[1 : length + 1], place
            positions[here] = np.arange(length)
            at += length
        positions[at:] = np.arange(size - at)
        return {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": positions, "document": document}
