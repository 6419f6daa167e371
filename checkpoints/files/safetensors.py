"""Hugging Face's safetensors: 8 bytes of length, a JSON header of names, types, shapes and places, then the bytes.

Ours and not the library's, because this reads one tensor at a time and drops it, and plans where each goes: the library maps
whole files, and writes a file from tensors that are all in memory. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from checkpoints.files.stored import Stored
from checkpoints.folder import CheckpointError

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in TYPES.items()}
_AGAIN = "copy or download it again"
_HEADER_LIMIT = 100_000_000  # the library's own


def read_header(path: Path) -> dict[str, Stored]:
    """Where each tensor of a file lies.

    Raises:
        CheckpointError: it is no safetensors file, or is damaged: cut off, tensors that overlap or leave gaps.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(_HEADER_LIMIT, size - 8):
            raise CheckpointError(f"{path} is no safetensors file, or is cut off: its header does not fit its {size:,} bytes", _AGAIN)
        try:
            header: dict[str, Any] = json.loads(file.read(length), object_pairs_hook=_once)
            header.pop("__metadata__", None)
            found = {name: _stored(path, entry, 8 + length) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: the header cannot be read: {error}", _AGAIN) from error
    _check_places(path, found, 8 + length, size)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _stored(path: Path, entry: dict[str, Any], base: int) -> Stored:
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in TYPES:
        raise ValueError(f"unknown dtype {entry['dtype']!r}")
    if not all(isinstance(number, int) and number >= 0 for number in (begin, end, *entry["shape"])):
        raise ValueError("a size or a place is no number")
    stored = Stored(path, base + begin, TYPES[entry["dtype"]], tuple(entry["shape"]))
    if stored.nbytes != end - begin:
        raise ValueError(f"{end - begin} bytes for {entry['dtype']} {entry['shape']}")
    return stored


def _check_places(path: Path, found: dict[str, Stored], at: int, size: int) -> None:
    for name, stored in sorted(found.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if stored.offset != at:
            raise CheckpointError(f"{path}: {name} {'overlaps what is before it' if stored.offset < at else 'follows a gap'}", _AGAIN)
        at += stored.nbytes
    if at != size:
        what = f"is cut off: {at:,} bytes in its header" if at > size else f"has {size - at:,} bytes that no tensor owns"
        raise CheckpointError(f"{path} {what}, {size:,} there", _AGAIN)


class Planned:
    """A file to be written, in which each tensor has its place.

    Attributes:
        header: what it begins with.
        size: of the file, in bytes.
    """

    def __init__(self, entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]):
        content: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
        self._places: dict[str, tuple[int, int]] = {}
        at = 0
        for name, dtype, shape in entries:
            size = torch.Size(shape).numel() * dtype.itemsize
            content[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
            self._places[name] = at, size
            at += size
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = struct.pack("<Q", len(text)) + text
        self.size = len(self.header) + at

    def place(self, name: str, nbytes: int) -> int:
        """The byte at which a tensor begins.

        Raises:
            ValueError: it was announced with another size.
        """
        at, size = self._places[name]
        if size != nbytes:
            raise ValueError(f"{name}: {nbytes} bytes where {size} were announced")
        return len(self.header) + at
