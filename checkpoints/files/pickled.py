"""torch.save's files and other pickles, read without executing anything in them.

A pickle is a program: it names functions and calls them. Here a name gets what is on a list, all of it harmless: tensors
become `Stored`, the settings of a training a Namespace, classes that are only carried along `Inert`; another name is
refused. A tensor's bytes are not read: a file of 10 GB is opened in milliseconds.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import struct
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from checkpoints.files.stored import Stored
from checkpoints.folder import CheckpointError

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
# What checkpoints of Megatron-LM and its kin carry besides tensors, as classes of these packages: never imported, never run.
_CARRIED = ("megatron.", "megatron_patch.", "transformer_engine.", "numpy.", "torch.distributed.", "transformers.")
_CARRIED_NAMES = {
    "numpy.ndarray", "numpy.dtype", "_codecs.encode", "signal.Signals", "pathlib.PosixPath", "pathlib._local.PosixPath", "io.BytesIO",
    "torch.device", "torch.Size", "torch.storage._load_from_bytes",
}  # fmt: skip

_TENSORS = re.compile(r"torch\.\w+Storage|torch\._utils\._rebuild_(tensor_v2|parameter)|collections\.OrderedDict")
_AGAIN = "copy or download it again"
_DEEPEST, _MOST = 64, 10_000_000  # of what a file holds


class Inert:
    """Stands for an object that is not needed: takes whatever it is given and does nothing with it."""

    def __init__(self, *given: Any):
        self.given = given

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None: ...
    def append(self, value: Any) -> None: ...
    def extend(self, values: Any) -> None: ...


class Settings(Namespace):
    """A training's settings. A pickle sets attributes of an object alone: where it means a class, `self` is missing."""

    def __setstate__(self, state: Any) -> None:
        if not all(isinstance(key, str) for key in state):
            raise ValueError("a setting whose name is none")
        vars(self).update(state)


class Names(dict[Any, Any]):
    """In place of an OrderedDict, whose methods a pickle could replace; its attributes (`_metadata`) are not needed."""

    def __setstate__(self, state: Any) -> None: ...


class Unpickler(pickle.Unpickler):
    """Gives every name that a pickle asks for what `allowed` has for it, and refuses the others."""

    def __init__(self, content: bytes, allowed: Mapping[str, Any], path: Path):
        super().__init__(io.BytesIO(content))
        self._content, self._allowed, self._path = content, allowed, path

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self._allowed:
            return self._allowed[full]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if full in _CARRIED_NAMES or module.startswith(_CARRIED):
            return Inert
        raise CheckpointError(f"{self._path} asks for {full}, which no checkpoint needs: nothing of it was run", "do not trust this file")

    def read(self) -> Any:
        """The object.

        Raises:
            CheckpointError: it is damaged, or asks for what is not allowed.
        """
        try:
            self._expect_room()
            return self.load()
        except CheckpointError:
            raise
        except Exception as error:  # a damaged pickle raises a dozen kinds
            raise CheckpointError(f"{self._path} is damaged: {type(error).__name__}: {error}", _AGAIN) from error


    def _expect_room(self) -> None:
        """What a pickle notes for later is numbered; for the number 2 billion Python would take 34 GB. A microsecond for each step."""
        for code, number, _ in pickletools.genops(self._content):
            if code.name in ("PUT", "LONG_BINPUT") and number > len(self._content):
                raise ValueError(f"a note of the number {number:,}, in {len(self._content):,} bytes")


class _TorchUnpickler(Unpickler):
    """For the pickle inside torch.save's archive; `places` are the bytes of its storages, by key: (offset, size)."""

    def __init__(self, content: bytes, path: Path, places: Mapping[str, tuple[int, int]]):
        allowed = {f"torch.{name}": dtype for name, dtype in _STORAGES.items()} | {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._tensor._rebuild_from_type_v2": self._marked,
            "torch.Tensor": Inert,
            "torch.nn.parameter.Parameter": Inert,
            "collections.OrderedDict": Names,
            "argparse.Namespace": Settings,
            "types.SimpleNamespace": Settings,
        }
        super().__init__(content, allowed, path)
        self._places = places

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, int, int]:
        _, dtype, key, _, count = pid
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{self._path} holds a storage of an unknown type", _AGAIN)
        offset, size = self._places[key]
        if count * dtype.itemsize > size:
            raise CheckpointError(f"{self._path} is damaged: storage {key} has {size:,} bytes for {count:,} {dtype}", _AGAIN)
        return dtype, offset, size

    def _marked(self, make: Any, kind: Any, given: Any, state: Any) -> Stored:
        """A tensor with attributes, such as Megatron's marks on fp32 copies of weights, which are not needed."""
        if make != self._tensor:
            raise CheckpointError(f"{self._path} is damaged: what should be a tensor with marks is none", _AGAIN)
        return self._tensor(*given)

    def _tensor(self, storage: tuple[torch.dtype, int, int], start: int, shape: Any, strides: Any, *_: Any) -> Stored:
        dtype, offset, size = storage
        if not all(type(number) is int for number in (start, *shape, *strides)):
            raise CheckpointError(f"{self._path} is damaged: a tensor's shape holds what is no number", _AGAIN)
        stored = Stored(self._path, offset + start * dtype.itemsize, dtype, tuple(shape), tuple(strides))
        if min((start, *stored.shape, *strides), default=0) < 0 or start * dtype.itemsize + stored.nbytes > size:
            raise CheckpointError(f"{self._path} is damaged: a tensor lies outside its storage", _AGAIN)
        if prod(stored.shape) * dtype.itemsize > size:  # by strides such as 0 a few bytes can stand for terabytes
            raise CheckpointError(f"{self._path} holds a tensor {list(stored.shape)} of more numbers than it has bytes for", "save it made contiguous")
        return stored


def read(path: Path, offset: int = 0, length: int | None = None) -> Any:
    """What torch.save wrote into `path`, or into the `length` bytes of it from `offset`; its tensors are `Stored`.

    Of the form before torch 1.6, which is no archive, the tensors themselves are given, read into memory.

    Raises:
        CheckpointError: it is damaged, or asks for something that is not on the list.
    """
    with open(path, "rb") as file:
        view = _View(file, offset, path.stat().st_size - offset if length is None else length)
        try:
            archive = zipfile.ZipFile(view)
        except Exception as error:  # zipfile raises a dozen kinds
            if offset == 0 and _is_old(path):
                return _read_old(path)
            raise CheckpointError(f"{path} is cut off or no file of torch.save: {error}", _AGAIN) from error
        try:
            root, places = _records(path, view, archive, offset)
            content = archive.read(f"{root}/data.pkl")
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{path} is damaged: {error or type(error).__name__}", _AGAIN) from error
    found = _TorchUnpickler(content, path, places).read()
    _expect_tree(found, path, frozenset(), {})
    return found


def _expect_tree(value: Any, path: Path, above: frozenset[int], known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Dictionaries, lists and settings end somewhere: none is deep, holds itself, or holds others again and again until all of it
    together is beyond reading. Gives how many parts a value has, and how deep it is."""
    if not isinstance(value, (dict, list, tuple, Namespace)):
        return 1, 0
    if id(value) not in known:
        within = vars(value) if isinstance(value, Namespace) else value
        endless = id(value) in above or len(above) > _DEEPEST
        ones = () if endless else within.values() if isinstance(within, dict) else within
        inner = [_expect_tree(one, path, above | {id(value)}, known) for one in ones]
        parts, depth = 1 + sum(one for one, _ in inner), 1 + max((one for _, one in inner), default=0)
        if endless or parts > _MOST or depth > _DEEPEST:
            what = f"a dictionary or list in it holds itself, is nested more than {_DEEPEST} deep or has more than {_MOST:,} parts"
            raise CheckpointError(f"{path} is damaged: {what}", _AGAIN)
        known[id(value)] = parts, depth
    return known[id(value)]


def _records(path: Path, view: _View, archive: zipfile.ZipFile, base: int) -> tuple[str, dict[str, tuple[int, int]]]:
    """The folder that all of an archive lies in, and where in the file each of its storages lies."""
    roots = [name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(f"{path} is no file of torch.save: {len(roots)} data.pkl in it", _AGAIN)
    if packed := [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]:
        raise CheckpointError(f"{path} is damaged: {packed[0]} is compressed, which torch.save never does", _AGAIN)
    if f"{roots[0]}/byteorder" in archive.namelist() and archive.read(f"{roots[0]}/byteorder") != b"little":
        raise CheckpointError(f"{path} was written on a big-endian machine", "save it on a little-endian machine")
    places = {}
    for entry in archive.infolist():
        if not entry.filename.startswith(f"{roots[0]}/data/"):
            continue
        key = entry.filename.removeprefix(f"{roots[0]}/data/")
        view.seek(entry.header_offset)
        header = view.read(30)
        names, extra = struct.unpack("<HH", header[26:])
        if not header.startswith(b"PK\3\4") or not view.read(names).endswith(f"/data/{key}".encode()):
            raise CheckpointError(f"{path} is damaged: {entry.filename} does not lie where its list says", _AGAIN)
        at = entry.header_offset + 30 + names + extra
        if at + entry.file_size > view.length:
            raise CheckpointError(f"{path} is damaged: {entry.filename} is cut off", _AGAIN)
        places[key] = (base + at, entry.file_size)
    return roots[0], places


def _is_old(path: Path) -> bool:
    """Whether it begins as torch.save's files did before 1.6: with a pickled number that stands for the form."""
    with open(path, "rb") as file:
        return b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19" in file.read(16)


def _read_old(path: Path) -> Any:
    if asked := [name for name in _globals(path) if not _TENSORS.fullmatch(name)]:  # torch would advise to run what it asks for
        what = f"{path} is of torch before 1.6 and asks for {', '.join(asked[:4])}, which is not read from such a file: nothing of it was run"
        raise CheckpointError(what, "where you trust it, load it with the program that wrote it, and save it with a torch of today")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}", _AGAIN) from error
    _expect_tree(found, path, frozenset(), {})
    return found


def _globals(path: Path) -> list[str]:
    """The names that the pickles of an old file ask for, read and not followed."""
    found: dict[str, None] = {}
    with open(path, "rb") as file:
        try:
            for _ in range(5):  # a number, the form, the system, the object, the storages' keys
                texts: list[str] = []
                for code, argument, _ in pickletools.genops(file):
                    if code.name in ("GLOBAL", "INST"):
                        found[argument.replace(" ", ".")] = None
                    elif code.name == "STACK_GLOBAL":
                        found[".".join(texts[-2:])] = None
                    elif isinstance(argument, str):
                        texts.append(argument)
        except Exception:  # damaged: what was found until there
            pass
    return list(found)


class _View(io.RawIOBase):
    """`length` bytes of a file from `start`, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        self._file, self._start, self.length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError("before the beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        rest = max(0, self.length - self._at)
        self._file.seek(self._start + self._at)
        found = self._file.read(rest if size is None or size < 0 else min(size, rest))
        self._at += len(found)
        return found
