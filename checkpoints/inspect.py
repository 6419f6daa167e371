"""What can be told of a checkpoint without reading its numbers; and, reading them, whether they are sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from checkpoints.files import mindspore, pickled, safetensors
from checkpoints.files.stored import NAMES
from checkpoints.folder import MANIFEST, CheckpointError, manifest
from checkpoints.formats.base import Source
from checkpoints.formats.mindspore import rank_file
from checkpoints.models.gpt import SCALE
from checkpoints.parallel import checksum, told
from checkpoints.recognise import RANK_FILES, Found


_ASIDE = f"if it was changed on purpose, move {MANIFEST} elsewhere"


def damaged(found: Found) -> list[CheckpointError]:
    """What is wrong with the conversion's manifest and the files of weights, each by itself: of these only headers are read.

    torch_dist's have none; what they should hold is in one place, which opening the checkpoint reads.
    """
    faults = []
    for path, read in ((found.path, manifest), *_files(found)):
        try:
            read(path)
        except CheckpointError as error:
            faults.append(error)
    return faults


def _files(found: Found) -> Iterator[tuple[Path, Callable[[Path], Any]]]:
    if found.format == "hf":
        yield from ((path, safetensors.read_header) for path in sorted(found.path.glob("*.safetensors")))
        yield from ((path, pickled.read) for path in sorted(found.path.glob("pytorch_model*.bin")))
    if found.format == "torch":
        yield from ((path, pickled.read) for name in RANK_FILES for path in sorted(found.path.glob(f"mp_rank_*/{name}")))
    if found.format == "mindspore":
        yield from ((rank_file(found.path / f"rank_{rank}"), mindspore.read) for rank in range(found.tensor))


def parameters(source: Source) -> int:
    """Numbers that were learned: of tied weights once, no padding, no scales of quantized ones."""
    return sum(torch.Size(tensor.shape).numel() for tensor in source.tensors if not tensor.within.endswith(SCALE))


def sizes(source: Source) -> dict[str, int]:
    """Bytes of each type of number, the most first."""
    found: dict[str, int] = {}
    for tensor in source.tensors:
        dtype = source.dtype(tensor.name)
        name = NAMES.get(dtype, str(dtype).removeprefix("torch."))
        found[name] = found.get(name, 0) + torch.Size(tensor.shape).numel() * dtype.itemsize
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def unsound(source: Source, found: Found, progress: Callable[[int], None] = lambda count: None) -> Iterator[CheckpointError]:
    """Reads every number: tensors with NaN or infinity, tensors that are not those which a conversion wrote, checksums."""
    if found.format == "mindspore":
        for path, _ in _files(found):
            if mindspore.wrong_checksum(path):
                yield CheckpointError(f"{path} does not have the checksum that it ends with", "copy it again, or take an older checkpoint")
    written = told(source)
    for tensor in source.tensors:
        try:
            whole = source.read(tensor.name)
        except CheckpointError as error:
            yield error
            continue
        if whole.is_floating_point() and (bad := int((~whole.isfinite()).sum())):
            what = f"{tensor.name}: {bad:,} of its {whole.numel():,} numbers are NaN or infinite"
            yield CheckpointError(what, "take an older checkpoint; yuan convert --allow-nan takes them as they are")
        if tensor.name in written and written[tensor.name] != f"{checksum(whole):08x}":
            yield CheckpointError(f"{tensor.name} is not what {MANIFEST} says that was written", f"convert it anew; {_ASIDE}")
        progress(whole.nbytes)
