"""A tensor that lies in a file, and is read by mapping its own bytes alone."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import torch

from checkpoints.folder import CheckpointError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int8: "int8"}
_AGAIN = "copy or download the whole folder again"
Buffer = Union[bytes, memoryview]


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Attributes:
        path, offset: the file, and the byte at which its first element begins.
        strides: in elements; None where it is contiguous.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    def __setstate__(self, state: Any) -> None:
        """A pickle can give any object another state: this one would then read another file."""
        raise CheckpointError(f"{self.path}: its pickle changes where a tensor lies, which no checkpoint does", "do not trust this file")

    @property
    def nbytes(self) -> int:
        """Bytes from its first element to its last."""
        if 0 in self.shape:
            return 0
        strides = self.strides or contiguous(self.shape)
        return (1 + sum((size - 1) * stride for size, stride in zip(self.shape, strides, strict=True))) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The tensor, its pages read as they are touched and dropped with it: a mapping of its own each time.

        Writing to it changes no file.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        start = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        with open(self.path, "rb") as file:
            try:
                pages = mmap.mmap(file.fileno(), self.offset + self.nbytes - start, offset=start, access=mmap.ACCESS_COPY)
            except ValueError as error:
                raise CheckpointError(f"{self.path} is cut off: it ends before byte {self.offset + self.nbytes:,}", _AGAIN) from error
        flat = _elements(pages, self.dtype, self.nbytes // self.dtype.itemsize, self.offset - start)
        return flat.as_strided(self.shape, self.strides or contiguous(self.shape))

    def blocks(self, size: int) -> Iterator[Stored]:
        """It as several of at most `size` bytes, of a matrix some rows each, one after another."""
        if not self.shape or self.strides not in (None, contiguous(self.shape)) or self.nbytes <= size:
            yield self
            return
        step = self.nbytes // self.shape[0]
        rows = max(1, size // step)
        for first in range(0, self.shape[0], rows):
            shape = (min(rows, self.shape[0] - first), *self.shape[1:])
            yield Stored(self.path, self.offset + first * step, self.dtype, shape)


def _elements(pages: mmap.mmap, dtype: torch.dtype, count: int, offset: int) -> torch.Tensor:
    if offset % dtype.itemsize:  # MindSpore aligns nothing
        with memoryview(pages) as view:
            return torch.frombuffer(bytearray(view[offset : offset + count * dtype.itemsize]), dtype=dtype)
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=offset)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in C order; of a contiguous one without a copy."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


def inside(folder: Path, name: Any, named_in: Path) -> Path:
    """A file that an index names, which must lie in the index's own folder.

    Raises:
        CheckpointError: it is not there, or the name leads out of the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise CheckpointError(f"{named_in} names {name!r}, which is no name of a file", _AGAIN)
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or path.resolve().parent != folder.resolve() and not path.is_symlink():
        raise CheckpointError(f"{named_in} names {name!r}, which leads out of its folder", "do not trust this folder")
    if not path.is_file():
        raise CheckpointError(f"{named_in} names {name}, which is not there", _AGAIN)
    return path
