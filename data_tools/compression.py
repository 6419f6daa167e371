"""Compressed files: which they are, and their bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
from typing import Any, BinaryIO

SUFFIXES = (".gz", ".xz", ".zst", ".bz2")
_MAGIC = {  # the first bytes; bzip2's three letters alone may begin a text
    re.compile(rb"\x1f\x8b"): "gzip",
    re.compile(rb"\xfd7zXZ\x00"): "xz",
    re.compile(rb"\x28\xb5\x2f\xfd"): "zstd",
    re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", re.DOTALL): "bzip2",
}
_READ = 1 << 20
_LITTLE = 1 << 10  # bytes of zstd at a time, which may be 10 MB of text that repeats itself: a call gives all of it at once


def compression_of(start: bytes) -> str | None:
    """What a file that begins with these 10 bytes is compressed with; None for nothing known."""
    return next((name for magic, name in _MAGIC.items() if magic.match(start)), None)


def decompressed(compression: str | None, raw: BinaryIO) -> BinaryIO:
    """The bytes of the opened file `raw`, decompressed while they are read."""
    if compression is None:
        return raw
    if compression == "zstd":
        return io.BufferedReader(_Zstandard(raw), _READ)
    return {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}[compression](raw, "rb")  # type: ignore[return-value]


class _Zstandard(io.RawIOBase):
    """Frames of zstd one after another. The library's own reader takes a file that breaks off for one that ends."""

    def __init__(self, raw: BinaryIO):
        import zstandard

        self._raw, self._decompressor, self._error = raw, zstandard.ZstdDecompressor(), zstandard.ZstdError
        self._frame: Any = None
        self._held, self._pending = memoryview(b""), b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._held:
            data = self._pending or self._raw.read(_LITTLE)
            self._pending = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("it breaks off in the middle")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._held = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise OSError(str(error)) from None
            if self._frame.eof:
                self._pending, self._frame = self._frame.unused_data, None
        size = min(len(target), len(self._held))
        target[:size], self._held = self._held[:size], self._held[size:]
        return size
