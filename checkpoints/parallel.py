"""Tensors from a source into a target, and their checksums, in this process or in several; each does one tensor after another."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from isal.isal_zlib import crc32

from checkpoints.files.stored import NAMES, raw
from checkpoints.folder import MANIFEST, CheckpointError, manifest
from checkpoints.formats.base import Source, Target
from checkpoints.models.gpt import SCALE
from checkpoints.part import Damaged, Stopped
from data_tools.errors import DataError
from data_tools.parallel import ordered_map

Item = TypeVar("Item")
Result = TypeVar("Result")
_M_MMAP_THRESHOLD = -3  # of mallopt, in malloc.h


def spread(make: Callable[[], Callable[[Item], Result]], items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """`map` of what `make` gives over the items; with several workers, each a process, `make` is called in each, and must be
    one that can be pickled.

    Raises:
        Stopped: a worker died.
    """
    if workers == 1:
        yield from map(make(), items)
        return
    try:
        yield from ordered_map(_Apart(make, max(1, (os.cpu_count() or 1) // workers)), items, workers)
    except DataError as error:
        raise Stopped(f"{error.what}: what was written is kept", "fewer --workers, and the same command again") from error


class _Apart(Generic[Item, Result]):
    """A function that a worker makes for itself, when it is first called."""

    def __init__(self, make: Callable[[], Callable[[Item], Result]], threads: int):
        self._make, self._threads = make, threads
        self._made: Callable[[Item], Result] | None = None

    def __call__(self, item: Item) -> Result:
        if self._made is None:
            torch.set_num_threads(self._threads)
            give_memory_back()
            self._made = self._make()
        return self._made(item)


def give_memory_back() -> None:
    """Have glibc return what is freed to the system. By itself it keeps blocks below a threshold that grows with them, up to
    32 MB: tensors of 46 MB cut for 4 ranks took 0.9 GB of memory instead of 0.5."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 4 << 20)


# ---- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A tensor that was written.

    Attributes:
        crc32: of its bytes.
        zeroed: numbers that became 0, too small for their new type.
        error: of a quantized weight, relative.
    """

    name: str
    crc32: int
    zeroed: int = 0
    error: float | None = None


class Copying:
    """Reads tensors, by name, and writes them.

    Raises:
        CheckpointError: when called: a tensor holds NaN or infinity (unless `allow_nan`), would not fit its new type, or is not
            what the conversion that made `source` wrote.
    """

    def __init__(self, source: Source, target: Target, allow_nan: bool = False):
        self.source, self.target, self.allow_nan = source, target, allow_nan
        self._tensors, self._told = {tensor.name: tensor for tensor in target.order()}, told(source)
        self._beside = ThreadPoolExecutor(1)  # crc32 lets go of Python's lock: checksums cost no time while there is writing

    def __call__(self, names: Sequence[str]) -> list[Written]:
        return [self._copied(name) for name in names]

    def _copied(self, name: str) -> Written:
        found = self.source.read(name)
        whole = _as(found, self.target.dtypes[name], name, self.allow_nan)
        zeroed = int(found.count_nonzero() - whole.count_nonzero()) if whole.dtype != found.dtype else 0
        its_sum = self._beside.submit(checksum, whole)
        before = its_sum if whole is found or name not in self._told else self._beside.submit(checksum, found)
        del found  # else one more tensor is in memory while the next is read
        self.target.put(self._tensors[name], whole)
        if name in self._told and self._told[name] != f"{before.result():08x}":
            what = f"{self.source.path}: {name} is not what {MANIFEST} there says that was written"
            raise CheckpointError(what, f"convert anew what it was made of; if it was changed on purpose, move {MANIFEST} elsewhere")
        return Written(name, its_sum.result(), zeroed, getattr(self.source, "errors", {}).get(name))


def told(source: Source) -> dict[str, str]:
    """The checksums that the conversion which made `source` wrote beside it, of the tensors that are read as it wrote them:
    neither quantized since nor of another vocabulary.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    tensors = manifest(source.path).get("tensors", {})
    found: dict[str, str] = {}
    for tensor in source.tensors:
        said, dtype = tensors.get(tensor.name, {}), source.dtype(tensor.name)
        if (said.get("shape"), said.get("dtype")) == (list(tensor.shape), NAMES.get(dtype, str(dtype))):
            found[tensor.name] = said.get("crc32", "")
    return found


def _as(whole: torch.Tensor, dtype: torch.dtype, name: str, allow_nan: bool) -> torch.Tensor:
    finite = all_finite(whole)
    if not finite and not allow_nan:
        raise CheckpointError(f"{name} holds NaN or infinity; --allow-nan converts it as it is", "--allow-nan, or an older checkpoint")
    cast = whole.to(dtype)
    if cast.dtype != whole.dtype and finite and not all_finite(cast):
        raise CheckpointError(f"{name} holds numbers up to {whole.abs().max().item():.3g}, which {NAMES[dtype]} cannot", "--dtype bf16 or fp32")
    if name.endswith(SCALE) and not cast.all():
        what = f"{name} holds numbers below {whole.min().item():.3g}, which are 0 in {NAMES[dtype]}"
        raise CheckpointError(what, "--to torch_dist, whose scales are fp32")
    return cast


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite. One pass without a copy: NaN spreads to the extremes."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes in C order. It finds accidents; sha256 would take longer than copying."""
    return crc32(raw(tensor))


# ---- reading back ----------------------------------------------------------------------------------------------------


class Checking:
    """Reads tensors, by name: its checksum and its bytes."""

    def __init__(self, source: Source):
        self.source = source

    def __call__(self, name: str) -> tuple[str, int, int]:
        its_sum = count = 0
        for block in self.source.blocks(name):
            its_sum, count = crc32(raw(block), its_sum), count + block.nbytes
        return name, its_sum, count


def compare(
    reopen: Callable[[], Source], sums: Mapping[str, int], progress: Callable[[int], None] = lambda count: None, workers: int = 1
) -> None:
    """Read a written checkpoint back, and hold every tensor to the checksum it was written with. `reopen` gives it, in each of
    several workers too.

    Raises:
        Damaged: tensors differ, which are named: the disk or the memory is at fault.
    """
    source, wrong = reopen(), []
    names = [tensor.name for tensor in source.tensors[::-1]]  # what was written last is still in the system's cache
    with ThreadPoolExecutor(2) as threads:  # so two tensors are in memory
        found = threads.map(Checking(source), names) if workers == 1 else spread(_CheckingOf(reopen), names, workers)
        with contextlib.closing(found):
            for name, its_sum, count in found:
                progress(count)
                if its_sum != sums[name]:
                    wrong.append(name)
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        what = f"{source.path}: {', '.join(wrong[:8])}{more} read back otherwise than written"
        raise Damaged(what, "see to the disk and the memory there, and start again", wrong)


@dataclass(frozen=True)
class _CheckingOf:
    reopen: Callable[[], Source]

    def __call__(self) -> Checking:
        return Checking(self.reopen())
