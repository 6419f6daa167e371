"""From one format into another: tensor by tensor, each exactly once, with a checksum of each on both sides."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from checkpoints.files.stored import NAMES, raw
from checkpoints.folder import CheckpointError
from checkpoints.formats.base import Source, Target

MANIFEST = "conversion.json"
Progress = Callable[[int], None]  # called with the bytes of tensors that were done since the last call


def dtypes(source: Source, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """The type that each tensor of a source is to have: `dtype` where one is given, else its own."""
    return {tensor.name: dtype or source.dtype(tensor.name) for tensor in source.tensors}


def nbytes(source: Source, types: Mapping[str, torch.dtype]) -> int:
    """Bytes of all tensors of a source in `types`."""
    return sum(torch.Size(tensor.shape).numel() * types[tensor.name].itemsize for tensor in source.tensors)


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name, `folder`, when all went well; what a dead writer left is removed.

    Raises:
        CheckpointError: `folder` is there already and holds something.
    """
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is there already")
    part = folder.with_name(folder.name + ".part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    yield part
    part.rename(folder)


def copy(source: Source, target: Target, progress: Progress = lambda count: None, allow_nan: bool = False) -> dict[str, int]:
    """Write every tensor of `source` into `target`, and end it. Returns each one's checksum, as written.

    Raises:
        CheckpointError: a tensor holds NaN or infinity (unless `allow_nan`), or would not fit its new type.
    """
    sums: dict[str, int] = {}
    for tensor in target.order():
        whole = _as(source.read(tensor.name), target.dtypes[tensor.name], tensor.name, allow_nan)
        if tensor.name in sums:
            raise ValueError(f"{tensor.name} was asked for twice")
        sums[tensor.name] = checksum(whole)
        target.put(tensor, whole)
        progress(whole.nbytes)
    if left := {tensor.name for tensor in source.tensors} - sums.keys():
        raise ValueError(f"not asked for: {sorted(left)}")
    target.finish()
    return sums


def _as(whole: torch.Tensor, dtype: torch.dtype, name: str, allow_nan: bool) -> torch.Tensor:
    if not allow_nan and not _finite(whole):
        raise CheckpointError(f"{name} holds NaN or infinity")
    cast = whole.to(dtype)
    if cast.dtype != whole.dtype and _finite(whole) and not _finite(cast):
        raise CheckpointError(f"{name} holds numbers up to {whole.abs().max().item():.3g}, which {dtype} has not")
    return cast


def _finite(tensor: torch.Tensor) -> bool:
    """One pass without a copy: NaN spreads to the extremes."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes in C order. It finds accidents; sha256 would take longer than copying."""
    return zlib.crc32(raw(tensor))


def compare(source: Source, sums: Mapping[str, int], progress: Progress = lambda count: None) -> None:
    """Read a written checkpoint back, and hold every tensor to the checksum it was written with.

    Raises:
        CheckpointError: tensors differ, which are named: the disk or the memory is at fault.
    """
    wrong = []
    for tensor in source.tensors:
        whole = source.read(tensor.name)
        if checksum(whole) != sums[tensor.name]:
            wrong.append(tensor.name)
        progress(whole.nbytes)
    if wrong:
        raise CheckpointError(f"{source.path}: {', '.join(wrong[:8])} read back otherwise than written")


def write_manifest(folder: Path, source: Source, target: Target, to: str, sums: Mapping[str, int]) -> None:
    """Say in conversion.json what became of what: the source, every tensor's shape, type and checksum, and what was left out."""
    manifest: dict[str, Any] = {
        "source": str(source.path),
        "from": source.format,
        "to": to,
        "model": vars(source.model),
        "left_out": source.left_out,
        "tensors": {
            tensor.name: {
                "shape": list(tensor.shape),
                "dtype": NAMES.get(target.dtypes[tensor.name], str(target.dtypes[tensor.name])),
                "crc32": f"{sums[tensor.name]:08x}",
            }
            for tensor in source.tensors
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
