"""The file that torch.save writes, written a tensor at a time: first what it will hold, then the tensors in any order.

torch.save takes all tensors of a file in memory. The file is a zip archive: `data.pkl`, the pickled content in which a
tensor is the key of its storage, and the storages as they lie in memory, each in an entry `data/KEY` of its own.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from checkpoints.files.stored import contiguous, raw

_ALIGNED = 64  # as torch.save does, so that a mapped tensor is aligned
_PADDING = 0x4246  # the extra field of a zip entry that fills up to there; torch.save's number
_16_BITS, _32_BITS = 0xFFFF, 0xFFFFFFFF  # what a field of the archive holds; it says so when it cannot
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


class Behind:
    """What comes behind the end of an open file, as a file of its own: several of torch.save's lie in one of torch_dist's."""

    stem = "archive"  # torch.save's name where it writes no path

    def __init__(self, file: BinaryIO):
        self._file, self._start = file, file.tell()

    def tell(self) -> int:
        return self._file.tell() - self._start

    def write(self, data: Any) -> int:
        return self._file.write(data)


class Writer:
    """Writes one file that `torch.load` reads, mapped or not, from its beginning to its end."""

    def __init__(self, place: Path | Behind, content: Any):
        """`content` is what torch.load is to give, a `Slot` in the place of every tensor. The folder must be there."""
        self._root = place.stem
        self._file: Any = open(place, "wb") if isinstance(place, Path) else place
        self._entries: list[bytes] = []
        pickled = _Pickled(content)
        self._keys = pickled.keys
        self._entry("data.pkl", [memoryview(pickled.data)])
        self._entry("byteorder", [memoryview(b"little")])

    def write(self, slot: Slot, *parts: torch.Tensor, crc: int | None = None) -> None:
        """Fill one slot; each is filled once. Of several tensors the rows one after another make it up.

        `crc` is the CRC-32 of their bytes, where it is known.
        """
        rows = [tuple(part.shape) for part in parts]
        shape = (sum(one[0] for one in rows), *rows[0][1:]) if rows[0] else ()
        if {part.dtype for part in parts} != {slot.dtype} or shape != tuple(slot.shape):
            raise ValueError(f"{parts[0].dtype} {list(shape)} where {slot.dtype} {list(slot.shape)} was announced")
        self._entry(f"data/{self._keys.pop(slot)}", [raw(part) for part in parts], crc)

    def close(self) -> None:
        """End the file; every slot must have been filled."""
        self._entry("version", [memoryview(b"3\n")])
        start, size = self._file.tell(), sum(map(len, self._entries))
        self._file.write(b"".join(self._entries))
        count, small = len(self._entries), min(len(self._entries), _16_BITS)
        self._file.write(struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, start))
        self._file.write(struct.pack("<IIQI", 0x07064B50, 0, start + size, 1))
        self._file.write(struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, small, small, min(size, _32_BITS), min(start, _32_BITS), 0))
        if not isinstance(self._file, Behind):
            self._file.close()
        if self._keys:
            raise ValueError(f"{len(self._keys)} tensors were not written")

    def _entry(self, name: str, parts: list[memoryview], crc: int | None = None) -> None:
        """One entry of the archive, uncompressed: a header, which tells the checksum of what follows, and that.

        Sizes and places from 4 GiB on stand in a field of their own (PKWARE's APPNOTE, 4.3 and 4.5.3).
        """
        at, size, full = self._file.tell(), sum(map(len, parts)), f"{self._root}/{name}".encode()
        if crc is None:
            crc = 0
            for part in parts:
                crc = zlib.crc32(part, crc)
        large = struct.pack("<HHQQ", 1, 16, size, size) if size >= _32_BITS else b""
        filled = -(at + 30 + len(full) + len(large) + 4) % _ALIGNED
        extra = large + struct.pack("<HH", _PADDING, filled) + bytes(filled)
        known = struct.pack("<HHHHHIII", 45 if large else 20, 0, 0, 0, _DAY, crc, min(size, _32_BITS), min(size, _32_BITS))
        self._file.write(struct.pack("<I", 0x04034B50) + known + struct.pack("<HH", len(full), len(extra)) + full + extra)
        for part in parts:
            self._file.write(part)
        wide = ([size, size] if large else []) + ([at] if at >= _32_BITS else [])
        more = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        place = struct.pack("<HHHHHII", len(full), len(more), 0, 0, 0, 0, min(at, _32_BITS))
        self._entries.append(struct.pack("<IH", 0x02014B50, 45) + known + place + full + more)


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
