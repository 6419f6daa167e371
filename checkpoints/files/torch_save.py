"""The file that torch.save writes, written a tensor at a time: first what it will hold, then the tensors in any order.

torch.save takes all tensors of a file in memory. The file is a zip archive: `data.pkl`, the pickled content in which a
tensor is the key of its storage, and the storages as they lie in memory, each in an entry `data/KEY` of its own.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from checkpoints.files.stored import contiguous, raw

_ALIGNED = 64  # as torch.save does, so that a mapped tensor is aligned
_PADDING = 0x4246  # the extra field of a zip entry that fills up to there; torch.save's number
_STORAGES = {
    torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage, torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage, torch.bool: torch.BoolStorage,
}  # fmt: skip


class Slot:
    """The place of a tensor in what a file holds."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]):
        self.dtype, self.shape = dtype, shape


class Behind(io.RawIOBase):
    """What comes behind the end of an open file, as a file of its own: several of torch.save's lie in one of torch_dist's."""

    stem = "archive"  # torch.save's name where it writes no path

    def __init__(self, file: BinaryIO):
        self._file, self._start = file, file.tell()

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset + (self._start if whence == io.SEEK_SET else 0), whence) - self._start

    def write(self, data: Any) -> int:
        return self._file.write(data)


class Writer:
    """Writes one file that `torch.load` reads, mapped or not."""

    def __init__(self, place: Path | Behind, content: Any):
        """`content` is what torch.load is to give, a `Slot` in the place of every tensor. The folder must be there."""
        self._root = place.stem
        self._archive = zipfile.ZipFile(place, "w", zipfile.ZIP_STORED)  # type: ignore[call-overload]
        pickled = _Pickled(content)
        self._keys = pickled.keys
        self._entry("data.pkl", pickled.data)
        self._entry("byteorder", b"little")

    def write(self, slot: Slot, tensor: torch.Tensor) -> None:
        """Fill one slot; each is filled once."""
        if (tensor.dtype, tuple(tensor.shape)) != (slot.dtype, tuple(slot.shape)):
            raise ValueError(f"{tensor.dtype} {list(tensor.shape)} where {slot.dtype} {list(slot.shape)} was announced")
        self._entry(f"data/{self._keys.pop(slot)}", raw(tensor))

    def close(self) -> None:
        """End the file; every slot must have been filled."""
        self._entry("version", b"3\n")
        self._archive.close()
        if self._keys:
            raise ValueError(f"{len(self._keys)} tensors were not written")

    def _entry(self, name: str, data: bytes | memoryview) -> None:
        info = zipfile.ZipInfo(f"{self._root}/{name}")
        info.file_size = len(data)
        large = 20 if info.file_size * 1.05 > zipfile.ZIP64_LIMIT else 0  # what zipfile adds to the header of such an entry
        begins = self._archive.fp.tell() + 30 + len(info.filename.encode()) + large + 4  # type: ignore[union-attr]
        filled = -begins % _ALIGNED
        info.extra = struct.pack("<HH", _PADDING, filled) + bytes(filled)
        with self._archive.open(info, "w") as entry:
            entry.write(data)


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
