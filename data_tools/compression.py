"""Compressed files: which they are, and their bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
from collections.abc import Callable
from typing import Any, BinaryIO

SUFFIXES = (".gz", ".xz", ".zst", ".bz2")
_MAGIC = {  # the first bytes; bzip2's three letters alone may begin a text
    re.compile(rb"\x1f\x8b"): "gzip",
    re.compile(rb"\xfd7zXZ\x00"): "xz",
    re.compile(rb"\x28\xb5\x2f\xfd"): "zstd",
    re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", re.DOTALL): "bzip2",
}
_READ = 1 << 20
_LITTLE = 1 << 10  # bytes at a time, which of zstd may be 10 MB of text that repeats itself: a call gives all of it at once


def compression_of(start: bytes) -> str | None:
    """What a file that begins with these 10 bytes is compressed with; None for nothing known."""
    return next((name for magic, name in _MAGIC.items() if magic.match(start)), None)


def decompressed(compression: str | None, raw: BinaryIO) -> BinaryIO:
    """The bytes of the opened file `raw`, decompressed while they are read."""
    if compression is None:
        return raw
    if compression == "gzip":
        return gzip.open(raw, "rb")  # type: ignore[return-value]
    make: dict[str, Callable[[], Any]] = {"bzip2": bz2.BZ2Decompressor, "xz": lzma.LZMADecompressor, "zstd": _zstandard_frame}
    return io.BufferedReader(_Frames(raw, make[compression], padding=b"\0" if compression == "xz" else b""), _READ)


class _Frames(io.RawIOBase):
    """Frames one after another. The libraries' own readers leave out what follows a frame and does not begin as one, so all that is
    behind a damaged one; that of zstd also takes a file that breaks off for one that ends."""

    def __init__(self, raw: BinaryIO, make: Callable[[], Any], padding: bytes):
        self._raw, self._make, self._padding = raw, make, padding
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
            if self._frame is None:
                if not (data := data.lstrip(self._padding)):
                    continue
                self._frame = self._make()
            try:
                self._held = memoryview(self._frame.decompress(data))
            except Exception as error:  # of the library's own kinds
                raise OSError(str(error)) from None
            if self._frame.eof:
                self._pending, self._frame = self._frame.unused_data, None
        size = min(len(target), len(self._held))
        target[:size], self._held = self._held[:size], self._held[size:]
        return size


def _zstandard_frame() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()
