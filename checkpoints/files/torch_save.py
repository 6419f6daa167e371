"""The file that torch.save writes, planned before a tensor is read: each has its place, and may come in any order, from any
process.

torch.save takes all tensors of a file in memory. The file is a zip archive: `data.pkl`, the pickled content in which a
tensor is the key of its storage, and the storages as they lie in memory, each in an entry `data/KEY` of its own.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from isal.isal_zlib import crc32

from checkpoints.files.stored import Buffer, contiguous

_ALIGNED = 64  # as torch.save does, so that a mapped tensor is aligned
_PADDING = 0x4246  # the extra field of a zip entry that fills up to there; torch.save's number
_16_BITS, _32_BITS = 0xFFFF, 0xFFFFFFFF  # what a field of the archive holds; it says so when it cannot
_TRAILER, _CRC_AT = 98, 14  # bytes behind the list of entries; where in its header an entry's checksum stands
_DAY = 0x21  # 1980-01-01, so that the same content makes the same file
_STORAGES = {
    torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage, torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage, torch.bool: torch.BoolStorage,
}  # fmt: skip


class Slot:
    """The place of a tensor in what a file holds."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]):
        self.dtype, self.shape = dtype, shape

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """One entry of the archive, uncompressed: its name, the byte at which its header begins, the size of its content.

    Sizes and places from 4 GiB on stand in a field of their own (PKWARE's APPNOTE, 4.3 and 4.5.3).
    """

    name: bytes
    at: int
    size: int

    @property
    def start(self) -> int:
        """The byte at which its content begins."""
        return self.at + len(self.header(0))

    def header(self, crc: int) -> bytes:
        """What stands before the content: `crc` is the content's CRC-32."""
        large = struct.pack("<HHQQ", 1, 16, self.size, self.size) if self.size >= _32_BITS else b""
        filled = -(self.at + 30 + len(self.name) + len(large) + 4) % _ALIGNED
        extra = large + struct.pack("<HH", _PADDING, filled) + bytes(filled)
        return struct.pack("<I", 0x04034B50) + self._known(crc) + struct.pack("<HH", len(self.name), len(extra)) + self.name + extra

    def record(self, crc: int) -> bytes:
        """Its line in the list at the archive's end."""
        wide = ([self.size, self.size] if self.size >= _32_BITS else []) + ([self.at] if self.at >= _32_BITS else [])
        more = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        place = struct.pack("<HHHHHII", len(self.name), len(more), 0, 0, 0, 0, min(self.at, _32_BITS))
        return struct.pack("<IH", 0x02014B50, 45) + self._known(crc) + place + self.name + more

    def _known(self, crc: int) -> bytes:
        version, size = 45 if self.size >= _32_BITS else 20, min(self.size, _32_BITS)
        return struct.pack("<HHHHHIII", version, 0, 0, 0, _DAY, crc, size, size)

    def framed(self, contents: Sequence[Buffer], crc: int | None = None) -> list[Buffer]:
        """The header and the content, which may come in several parts; `crc` where it is known.

        Raises:
            ValueError: it is of another size.
        """
        if (size := sum(len(content) for content in contents)) != self.size:
            raise ValueError(f"{self.name.decode()}: {size} bytes where {self.size} were announced")
        return [self.header(_crc(contents) if crc is None else crc), *contents]


def _crc(contents: Sequence[Buffer]) -> int:
    crc = 0
    for content in contents:
        crc = crc32(content, crc)
    return crc


class Archive:
    """A file that `torch.load` reads, mapped or not: where everything goes in it is known before a tensor is.

    Attributes:
        size: of the file, in bytes.
    """

    def __init__(self, stem: str, content: Any):
        """`content` is what torch.load is to give, a `Slot` in the place of every tensor; `stem` the file's name without its
        suffix, `archive` where there is none."""
        self._stem, self._end = stem, 0
        self._entries: list[Entry] = []
        self._fixed: dict[Entry, bytes] = {}
        pickled = _Pickled(content)
        self._add("data.pkl", pickled.data)
        self._add("byteorder", b"little")
        self._slots = {slot: self._entry(f"data/{key}", slot.nbytes) for slot, key in pickled.keys.items()}
        self._add("version", b"3\n")
        self.size = self._end + sum(len(entry.record(0)) for entry in self._entries) + _TRAILER

    def _add(self, name: str, content: bytes) -> None:
        self._fixed[self._entry(name, len(content))] = content

    def _entry(self, name: str, size: int) -> Entry:
        entry = Entry(f"{self._stem}/{name}".encode(), self._end, size)
        self._entries.append(entry)
        self._end += len(entry.header(0)) + size
        return entry

    def entry(self, slot: Slot) -> Entry:
        """Where a tensor goes."""
        return self._slots[slot]

    def fixed(self) -> Iterator[tuple[int, bytes]]:
        """What is no tensor, but for the end: its place, its bytes."""
        for entry, content in self._fixed.items():
            yield entry.at, b"".join(entry.framed([content]))

    def end(self, crcs: Mapping[Entry, int]) -> tuple[int, bytes]:
        """The archive's end, which lists all entries: its place, its bytes. `crcs` are the CRC-32 of the tensors' entries."""
        known = {**crcs, **{entry: crc32(content) for entry, content in self._fixed.items()}}
        listed = b"".join(entry.record(known[entry]) for entry in self._entries)
        start, size, count = self._end, len(listed), len(self._entries)
        small = min(count, _16_BITS)
        listed += struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, start)
        listed += struct.pack("<IIQI", 0x07064B50, 0, start + size, 1)
        return start, listed + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, small, small, min(size, _32_BITS), min(start, _32_BITS), 0)

    def end_of(self, read: Callable[[int, int], bytes]) -> tuple[int, bytes]:
        """`end`, with the checksums that the tensors' headers have: `read` gives bytes of the file, by place and size."""
        return self.end({entry: int.from_bytes(read(entry.at + _CRC_AT, 4), "little") for entry in self._slots.values()})

    def whole(self, contents: Sequence[Buffer]) -> list[Buffer]:
        """All of a file that holds one tensor, whose content this is."""
        (entry,), crc = self._slots.values(), _crc(contents)
        framed = {at: [content] for at, content in self.fixed()} | {entry.at: entry.framed(contents, crc)}
        return [*(part for at in sorted(framed) for part in framed[at]), self.end({entry: crc})[1]]


class _Storage:
    def __init__(self, dtype: torch.dtype, key: str, count: int):
        self.kind, self.key, self.count = _STORAGES[dtype], key, count


class _Pickled(pickle.Pickler):
    """`data`: a pickle as torch.save's; `keys`: of the storage of each slot in it."""

    def __init__(self, content: Any):
        file = io.BytesIO()
        super().__init__(file, protocol=2)
        self.keys: dict[Slot, str] = {}
        self.dump(content)
        self.data = file.getvalue()

    def persistent_id(self, obj: Any) -> Any:
        return ("storage", obj.kind, obj.key, "cpu", obj.count) if isinstance(obj, _Storage) else None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Slot):
            return NotImplemented
        self.keys[obj] = key = str(len(self.keys))
        storage = _Storage(obj.dtype, key, torch.Size(obj.shape).numel())
        return torch._utils._rebuild_tensor_v2, (storage, 0, tuple(obj.shape), contiguous(obj.shape), False, OrderedDict())
