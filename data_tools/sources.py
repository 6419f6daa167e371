"""Where the text comes from: files and folders, plain or compressed, cut into blocks of whole lines.

A block is the unit of work and of continuing after a break: the same input is always cut in the same places.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from data_tools.compression import SUFFIXES, compression_of, decompressed
from data_tools.errors import InputError
from data_tools.records import beginning

Format = Literal["jsonl", "json", "text", "yuan", "parquet"]
FORMATS: dict[str, str] = {
    "jsonl": "one JSON object per line",
    "json": "one JSON array of objects",
    "text": "one document per line",
    "yuan": "one document per line with Yuan's signs: <n> for a line end, [SEP] for <sep>",
    "parquet": "a column of texts",
}
_SUFFIXES: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".parquet": "parquet", ".json": "json"}
_BOM = b"\xef\xbb\xbf"
_SKIPPED = (".bin", ".idx", ".lock", ".part", ".md", ".py", ".yaml", ".model")  # beside corpora in folders, and no corpus
_READ = 1 << 20
_ROWS = 32  # of Parquet at a time: a text may be of MBs


@dataclass(frozen=True)
class Source:
    """One input file: how it is compressed (None: not) and what lies in it."""

    path: str
    size: int
    compression: str | None
    format: Format

    @property
    def is_seekable(self) -> bool:
        """Whether a worker can read its own range of bytes instead of being sent what was read."""
        return self.compression is None and self.format in ("jsonl", "text", "yuan")


@dataclass(frozen=True)
class Block:
    """Some consecutive lines of a source.

    Attributes:
        start, end: range of bytes in the file, for a source that is seekable.
        lines: the lines themselves, for others.
        first: number of the first line, from 1; None for a range of bytes, where it is counted when someone asks.
        size: bytes of input, for the progress: of a compressed file the share that was read so far.
    """

    source: Source
    start: int = 0
    end: int = 0
    lines: tuple[bytes, ...] | None = None
    first: int | None = None
    size: int = 0

    def read(self) -> list[bytes]:
        """The lines as bytes, each with its line end."""
        return list(self.lines) if self.lines is not None else io.BytesIO(self._range()).readlines()

    def read_hashed(self) -> tuple[list[bytes], str]:
        """The lines as of `read`, and the sha256 of them all in hex."""
        if self.lines is not None:
            return list(self.lines), hashlib.sha256(b"".join(self.lines)).hexdigest()
        data = self._range()
        return io.BytesIO(data).readlines(), hashlib.sha256(data).hexdigest()

    def _range(self) -> bytes:
        with open(self.source.path, "rb") as file:
            file.seek(self.start)
            data = file.read(self.end - self.start)
        if len(data) < self.end - self.start:
            raise InputError("the file became shorter while it was read", self.source.path, "start again when nothing writes it any more")
        return data.removeprefix(_BOM) if self.start == 0 else data

    def place(self, index: int) -> str:
        """`file:line` of the block's line `index`, from 0; `file[item]` in a JSON array or a Parquet file."""
        number = (self.first if self.first is not None else self._lines_before() + 1) + index
        if self.source.format in ("json", "parquet"):
            return f"{self.source.path}[{number - 1}]"
        return f"{self.source.path}:{number}"

    def _lines_before(self) -> int:
        count, left = 0, self.start
        with open(self.source.path, "rb") as file:
            while left and (data := file.read(min(_READ, left))):
                count, left = count + data.count(b"\n"), left - len(data)
        return count


def find_sources(inputs: str | Path | Sequence[str | Path], format: Format | None = None) -> list[Source]:
    """The files of `inputs`, in the order given; those of a folder and its folders by name.

    Args:
        inputs: files, folders, or patterns such as `data/*.jsonl.gz`.
        format: what lies in all of them; otherwise told by suffix and first bytes.

    Raises:
        InputError: nothing there, a name twice, or a file that is neither text nor known compression.
    """
    given = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    paths = [path for one in given for path in _expand(str(one))]
    if not paths:
        raise InputError("no input files", "preprocess.input", "give a JSONL file, or a folder of such")
    twice = [path for path, times in Counter(map(os.path.abspath, paths)).items() if times > 1]
    if twice:
        raise InputError(f"named twice: {min(twice)}", "preprocess.input", "name each file once")
    return [_source(path, format) for path in paths]


def check_readable(path: Path) -> None:
    """InputError if `path` is not a file, or holds compressed data."""
    source = _source(str(path), "jsonl")
    if source.compression:
        what = f"the input is compressed with {source.compression}"
        raise InputError(what, str(path), "decompress it, and give the file that this makes")


def _expand(given: str) -> list[str]:
    path = Path(given)
    if path.is_dir():
        found = [str(p) for p in _files(path) if not _is_ours(p.relative_to(path), p)]
        if not found:
            raise InputError(f"no files of text in {given}", "", "give a JSONL file, or a folder of such")
        return found
    if any(sign in given for sign in "*?[") and not path.exists():
        found = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor)) if path.anchor else given))
        if not found:
            raise InputError(f"no file is named like {given}", "", "give a JSONL file, or a folder of such")
        return [str(p) for p in found if p.is_file()]
    return [given]


def passed_over(inputs: str | Path | Sequence[str | Path]) -> list[str]:
    """The files in the folders among `inputs` that `find_sources` leaves out for their names."""
    folders = [path for one in ([inputs] if isinstance(inputs, (str, Path)) else inputs) if (path := Path(one)).is_dir()]
    return [str(p) for folder in folders for p in _files(folder) if _is_ours(p.relative_to(folder), p)]


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]


def _is_ours(name: Path, path: Path) -> bool:
    """Whether a file of a folder is no corpus but what was made of one: pairs, their manifests, caches, unfinished work."""
    made = any(part == "cache" or part.endswith(".unfinished") for part in name.parts[:-1])
    return made or path.suffix in _SKIPPED or (path.suffix == ".json" and path.with_suffix(".idx").exists())


def _source(path: str, format: Format | None) -> Source:
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no such file: {path}" if not file.exists() else f"not a file: {path}", "", "give a JSONL file")
    with open(file, "rb") as opened:
        start = opened.read(10)
    compression = compression_of(start)
    found = Source(path, file.stat().st_size, compression, format or "jsonl")
    return found if format else Source(path, found.size, compression, _format(found, start))


def _format(source: Source, start: bytes) -> Format:
    name = source.path.lower()
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    told = _SUFFIXES.get(Path(name).suffix) or ("parquet" if start.startswith(b"PAR1") else "jsonl")
    if told != "json":
        return told
    with open(source.path, "rb") as raw, _readable(source):  # .json is an array (WuDao's) or lines
        head = decompressed(source.compression, raw).read(4096).removeprefix(_BOM).lstrip()
    return "json" if head.startswith(b"[") else "jsonl"


@contextmanager
def _readable(source: Source) -> Iterator[None]:
    """What the decompressors raise, as an error that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: {error}", source.path, "convert the file to UTF-8 (iconv -t UTF-8)") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        what = f"the {source.compression or source.format} data cannot be read: {error}"
        raise InputError(what, source.path, "fetch the file again") from error


def blocks(source: Source, block_bytes: int, keys: Sequence[str], start: int = 0, end: int | None = None) -> Iterator[Block]:
    """The source in blocks of some `block_bytes` of text; a longer line is a block of its own.

    Args:
        keys: the columns to read of a Parquet file.
        start, end: of a seekable source only the lines that begin in this range of bytes.

    Raises:
        InputError: the compressed data are broken, or an array is not one.
    """
    if source.is_seekable:
        yield from _ranges(source, block_bytes, start, source.size if end is None else end)
        return
    with open(source.path, "rb") as raw:
        rows = _parquet_rows(source, raw, keys) if source.format == "parquet" else _stream_lines(source, raw)
        lines: list[bytes] = []
        first, held, told = 1, 0, 0
        with _readable(source):
            for number, line in enumerate(rows, start=1):
                lines.append(line)
                held += len(line)
                if held >= block_bytes:
                    told, size = raw.tell(), raw.tell() - told
                    yield Block(source, lines=tuple(lines), first=first, size=size)
                    lines, first, held = [], number + 1, 0
        if lines:
            yield Block(source, lines=tuple(lines), first=first, size=source.size - told)


def _ranges(source: Source, block_bytes: int, start: int, end: int) -> Iterator[Block]:
    with open(source.path, "rb") as file:
        at = _line_start(file, start)
        end = _line_start(file, end) if end < source.size else source.size
        while at < end:
            stop = min(_line_start(file, at + block_bytes), end) if at + block_bytes < end else end
            yield Block(source, at, stop, size=stop - at)
            at = stop


def _line_start(file: BinaryIO, at: int) -> int:
    """Where the first line that begins at `at` or later begins."""
    if at <= 0:
        return 0
    file.seek(at - 1)
    while piece := file.readline(_READ):
        if piece.endswith(b"\n"):
            break
    return file.tell()


def _stream_lines(source: Source, raw: BinaryIO) -> Iterator[bytes]:
    stream = decompressed(source.compression, raw)
    if source.format == "json":
        yield from _array_items(stream, source.path)
        return
    for number, line in enumerate(stream):
        yield line.removeprefix(_BOM) if number == 0 else line


def _array_items(stream: BinaryIO, path: str) -> Iterator[bytes]:
    """The objects of a JSON array, one by one, each as it stands in the file: the array need not fit into memory."""
    decoder = json.JSONDecoder()
    reader = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    buffer, at, opened, done, wanted = "", 0, False, False, _READ
    while True:
        while at < len(buffer) and buffer[at] in " \t\r\n,":
            at += 1
        if done and at == len(buffer):
            raise InputError("not JSON: the array does not end with ]", path, "fetch the file again, or mend its end")
        if at < len(buffer) and not opened:
            if buffer[at] != "[":
                raise InputError("not a JSON array", path, "for one object per line: preprocess.format=jsonl")
            opened, at = True, at + 1
            continue
        if at < len(buffer) and buffer[at] == "]":
            _refuse_more(buffer[at + 1 :], reader, path)
            return
        try:
            if at == len(buffer):
                raise ValueError
            _, stop = decoder.raw_decode(buffer, at)
            if stop == len(buffer) and not done:
                raise ValueError  # a number may go on
            yield buffer[at:stop].encode("utf-8", errors="surrogatepass")
            at, wanted = stop, _READ
        except RecursionError:
            raise InputError("not JSON: nested too deep", path, "mend the file") from None
        except ValueError as error:
            if done:
                raise InputError(f"not JSON: {error}", path, "mend the file") from None
            more = reader.read(wanted)
            buffer, at, done, wanted = buffer[at:] + more, 0, not more, wanted * 2


def _refuse_more(rest: str, reader: io.TextIOWrapper, path: str) -> None:
    """Behind the end of an array there is nothing but white space."""
    while not rest.strip():
        if not (rest := reader.read(_READ)):
            return
    what = f"something stands behind the end of the array: {beginning(rest.strip())}"
    raise InputError(what, path, "one array in a file; or one object per line, and --format jsonl")


def _parquet_rows(source: Source, raw: BinaryIO, keys: Sequence[str]) -> Iterator[bytes]:
    """The rows as JSON objects of the columns `keys`; a column that is missing is missing in them too."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("reading Parquet needs the package pyarrow", source.path, "pip install pyarrow") from None
    try:
        # Otherwise a column of a row group is held as a whole, which may be GBs of texts.
        file = pyarrow.parquet.ParquetFile(raw, buffer_size=_READ, pre_buffer=False)
        columns = [key for key in keys if key in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=_ROWS, columns=columns or None):
            for row in batch.to_pylist():
                yield json.dumps(row, ensure_ascii=False, default=_no_json).encode("utf-8", errors="surrogateescape")
    except pyarrow.ArrowException as error:
        raise InputError(f"not a Parquet file: {error}", source.path, "fetch the file again") from error


def _no_json(value: Any) -> Any:
    """Bytes are text, as many writers have it, and where they are not UTF-8 a bad line; other values are none, and named."""
    return value.decode("utf-8", errors="surrogateescape") if isinstance(value, bytes) else {type(value).__name__: str(value)}
