"""MindSpore's .ckpt: protobuf messages one after another, read and written without MindSpore and without protobuf.

    Checkpoint    field 1: a Value                              the file is any number of these
    Value         1: tag, the name   2: a TensorProto
    TensorProto   1: dims, one varint each   2: type, a word such as Float16   3: the bytes, C order, little-endian

A tensor above 512 MiB is several Values of one name, each with the whole dims and the next of its bytes. A file may end
with a checksum: `crc_num` and the CRC-32 of all before it in 10 bytes, big-endian.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from isal.isal_zlib import crc32

from checkpoints.files.stored import Buffer, Stored
from checkpoints.folder import CheckpointError

TYPES = {
    "Int8": torch.int8, "UInt8": torch.uint8, "Int16": torch.int16, "UInt16": torch.uint16, "Int32": torch.int32, "UInt32": torch.uint32,
    "Int64": torch.int64, "UInt64": torch.uint64, "Float16": torch.float16, "Float32": torch.float32, "Float64": torch.float64,
    "BFloat16": torch.bfloat16, "Bool": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in TYPES.items()}
SLICE = 512 << 20
_TRAILER, _TRAILER_BYTES = b"crc_num", 17
_AGAIN = "copy it again"
_READ_ONLY = 0o400  # as MindSpore leaves its files


@dataclass(frozen=True)
class Pieces:
    """A tensor in one or several stretches of a file, (offset, bytes) each."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    places: tuple[tuple[int, int], ...]

    def read(self) -> torch.Tensor:
        """The tensor: of one aligned piece a view of the file, else a copy.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        if len(self.places) == 1:
            return Stored(self.path, self.places[0][0], self.dtype, self.shape).read()
        whole = torch.empty(self.shape, dtype=self.dtype)
        flat, at = whole.view(-1).view(torch.uint8), 0
        for offset, size in self.places:
            flat[at : at + size] = Stored(self.path, offset, torch.uint8, (size,)).read()
            at += size
        return whole


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Pieces]:
    """Where each tensor of a file lies. A text, which MindSpore keeps there too, counts as its bytes.

    Raises:
        CheckpointError: it is no such file, is encrypted or damaged: cut off, a tensor without all of its bytes.
    """
    with open(path, "rb") as file:
        if not path.stat().st_size:
            raise CheckpointError(f"{path} is empty", _AGAIN)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end = len(data) - (_TRAILER_BYTES if _has_checksum(data) else 0)
            try:
                entries = list(_values(data, end))
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise CheckpointError(
                    f"{path} is no .ckpt of MindSpore, is encrypted or cut off: {error}",
                    f"{_AGAIN}; an encrypted one has to be decrypted first",
                ) from error
    found: dict[str, Pieces] = {}
    for name, dtype, shape, place in entries:
        before = found.get(name)
        if before is not None and (before.dtype, before.shape) != (dtype, shape):
            raise CheckpointError(f"{path} is damaged: {name} is there twice, and the two differ", _AGAIN)
        found[name] = Pieces(path, dtype, shape, (*(before.places if before else ()), place))
    for name, one in found.items():
        there, wanted = sum(size for _, size in one.places), prod(one.shape) * one.dtype.itemsize
        if there != wanted:
            raise CheckpointError(f"{path} is damaged: {name} {list(one.shape)} has {there:,} bytes of {wanted:,}", _AGAIN)
    return found


def _values(data: mmap.mmap, end: int) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], tuple[int, int]]]:
    for field, value in _fields(data, 0, end):
        if field != 1:
            raise ValueError(f"a field {field} where tensors stand")
        parts = dict(_fields(data, *value))
        if 2 not in parts:
            raise ValueError(f"{_text(data, parts[1])} is no tensor")
        tensor = list(_fields(data, *parts[2]))
        dims = tuple(value for field, value in tensor if field == 1)
        code, (start, stop) = _text(data, dict(tensor)[2]), dict(tensor)[3]
        if code == "str":
            code, dims = "UInt8", (stop - start,)
        if code not in TYPES:
            raise ValueError(f"{_text(data, parts[1])} is of the type {code}")
        yield _text(data, parts[1]), TYPES[code], () if dims == (0,) else dims, (start, stop - start)


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """The fields of a message: each its number, and a number or where its bytes begin and end."""
    while at < end:
        key, at = _varint(data, at)
        value, at = _varint(data, at)
        if key & 7 == 0:
            yield key >> 3, value
        elif key & 7 == 2 and at + value <= end:
            yield key >> 3, (at, at + value)
            at += value
        else:
            raise ValueError(f"byte {at:,} begins {value:,} bytes, and {end - at:,} follow" if key & 7 == 2 else f"unknown at byte {at:,}")


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError(f"no number at byte {at:,}")


def _text(data: mmap.mmap, place: tuple[int, int]) -> str:
    return data[place[0] : place[1]].decode()


def _has_checksum(data: mmap.mmap) -> bool:
    return data[-_TRAILER_BYTES:][: len(_TRAILER)] == _TRAILER


def wrong_checksum(path: Path) -> bool:
    """Whether the file ends with a checksum that is not that of its bytes; reads all of it."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if not _has_checksum(data):
            return False
        found = 0
        with memoryview(data) as view:
            for at in range(0, len(data) - _TRAILER_BYTES, SLICE):
                found = crc32(view[at : min(at + SLICE, len(data) - _TRAILER_BYTES)], found)
        return found != int.from_bytes(data[-10:], "big")


# ---- writing ---------------------------------------------------------------------------------------------------------


def slices(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> list[tuple[bytes, int, int]]:
    """How MindSpore's save_checkpoint writes a tensor: what stands before each stretch of its bytes, where in them that begins
    and ends."""
    head = b"".join(b"\x08" + _number(size) for size in shape) + _tagged(2, CODES[dtype].encode())
    tag, nbytes, found = _tagged(1, name.encode()), prod(shape) * dtype.itemsize, []
    for at in range(0, max(1, nbytes), SLICE):
        size = min(SLICE, nbytes - at)
        before = head + b"\x1a" + _number(size)
        inner = tag + b"\x12" + _number(len(before) + size) + before
        found.append((b"\x0a" + _number(len(inner) + size) + inner, at, at + size))
    return found


def whole(name: str, dtype: torch.dtype, shape: tuple[int, ...], content: memoryview) -> list[Buffer]:
    """All that stands for a tensor in a file, its bytes being `content`."""
    return [part for head, start, stop in slices(name, dtype, shape) for part in (head, content[start:stop])]


def end(path: Path) -> None:
    """End a file, which nobody may write to any more."""
    path.chmod(_READ_ONLY)


def _number(value: int) -> bytes:
    """A varint: 7 bits a byte, the lowest first, the highest bit set on all but the last."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes(found) + bytes([value])


def _tagged(field: int, content: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _number(len(content)) + content
