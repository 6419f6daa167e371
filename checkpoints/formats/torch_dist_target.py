"""Writes megatron-core's torch_dist; `checkpoints.formats.torch_dist` reads it, and says what it is."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from checkpoints.files.placed import Place
from checkpoints.files.torch_save import Archive, Slot
from checkpoints.folder import CheckpointError
from checkpoints.formats.base import Piece, Target
from checkpoints.formats.dist_states import SHARDING, common_of, key_of_state, objects_of
from checkpoints.formats.torch_dist import key_of
from checkpoints.models import gpt
from checkpoints.models.megatron import args_of
from checkpoints.models.model import Model
from checkpoints.models.tensor import Tensor, pad
from checkpoints.optimizer import PREFIX, TrainingState

BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
_FILE_BYTES, _CHUNK_BYTES = 4 << 30, 256 << 20  # a rank that loads its share reads the chunks that touch it, each whole
_ALIGNED = 64


@dataclass(frozen=True)
class _Chunk:
    """Rows of a tensor from `first` on, of these sizes as they lie in the stacked one, in a file of torch.save at a place."""

    first: int
    sizes: tuple[int, ...]
    archive: Archive
    place: Place


class TorchDist(Target):
    """Writes the folder of one checkpoint. `padded` are the rows of the vocabulary's tables; `state` where its training stands."""

    def __init__(self, folder: Path, model: Model, dtypes: Mapping[str, torch.dtype], padded: int, state: TrainingState | None = None):
        """Raises:
        CheckpointError: a tensor of one layer has another type than those of the others, with which it is stacked.
        """
        self.model, self.dtypes, self._padded, self.state = model, dtypes, padded, state
        self._tensors: dict[str, Any] = {}
        self._places: dict[Any, Any] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        self._archives: dict[tuple[torch.dtype, tuple[int, ...]], Archive] = {}
        self._sizes = [0]
        for tensor in self.order():
            self._chunks[tensor.name] = self._plan(tensor)
        self._objects = [(self._object(key, content), content) for key, content in (*self._extra_states(), *(objects_of(state) if state else ()))]
        super().__init__(folder, model, dtypes, {_file(number): size for number, size in enumerate(self._sizes)})

    def _plan(self, tensor: Tensor) -> list[_Chunk]:
        """Gives a tensor its place in the files, and enters it into what `.metadata` will be."""
        key, at, dtype = key_of(tensor, self.model), () if tensor.layer is None else (tensor.layer,), self.dtypes[tensor.name]
        if self.state is not None:
            key = key_of_state(tensor, key, self.state.form, self._halves)
            if tensor.state and not key.startswith(PREFIX):
                return []  # it is the weight itself
        shape = (self._padded, *tensor.shape[1:]) if tensor.vocabulary else tensor.shape
        if key not in self._tensors:
            stacked = torch.Size((self.model.num_layers,) * len(at) + shape)
            self._tensors[key] = metadata.TensorStorageMetadata(metadata.TensorProperties(dtype=dtype), stacked, [])
        if (others := self._tensors[key].properties.dtype) != dtype:
            raise CheckpointError(
                f"{tensor.name} is {dtype}, other layers' are {others}, which lie in one tensor with it",
                "--dtype bf16, fp16 or fp32",
            )
        rows, found = max(1, _CHUNK_BYTES * shape[0] // max(1, prod(shape) * dtype.itemsize)), []
        for first in range(0, shape[0], rows):
            sizes = (1,) * len(at) + (min(rows, shape[0] - first), *shape[1:])
            offsets = torch.Size(at + (first,) + (0,) * (len(shape) - 1))
            self._tensors[key].chunks.append(metadata.ChunkStorageMetadata(offsets, torch.Size(sizes)))
            archive = self._archives.get((dtype, sizes)) or Archive("archive", Slot(dtype, sizes))  # torch.save's name where it writes no path
            self._archives[dtype, sizes] = archive
            found.append(_Chunk(first, sizes, archive, self._next(metadata.MetadataIndex(key, offsets), archive.size, _ALIGNED)))
        return found

    def _next(self, index: Any, size: int, aligned: int) -> Place:
        """The place of the next `size` bytes."""
        if self._sizes[-1] > _FILE_BYTES:
            self._sizes.append(0)
        start = self._sizes[-1] + -self._sizes[-1] % aligned
        self._sizes[-1] = start + size
        place = Place(_file(len(self._sizes) - 1), start)
        self._places[index] = filesystem._StorageInfo(place.file, start, size)
        return place

    def pieces(self, tensor: Tensor, whole: torch.Tensor) -> Iterator[Piece]:
        whole = pad(whole, self._padded) if tensor.vocabulary else whole
        for chunk in self._chunks[tensor.name]:
            rows = whole[chunk.first : chunk.first + chunk.sizes[len(chunk.sizes) - whole.dim()]]
            yield Piece(chunk.place, [rows], chunk.archive.whole)

    @property
    def _halves(self) -> bool:
        return any(self.dtypes[tensor.name] != torch.float32 for tensor in gpt.tensors(self.model))

    def complete(self) -> None:
        for place, content in self._objects:
            self.files.write(place, [content])
        known = metadata.Metadata(state_dict_metadata=self._tensors, storage_data=self._places)
        (self.folder / ".metadata").write_bytes(pickle.dumps(known))
        (self.folder / "metadata.json").write_text(json.dumps(BACKEND), encoding="utf-8")
        torch.save(self._common(), self.folder / "common.pt")

    def _extra_states(self) -> Iterator[tuple[str, bytes]]:
        """megatron-core's linear layers ask for a state besides their weights, which is nothing without FP8."""
        modules = {one.within.rsplit(".", 1)[0] for one in gpt.tensors(self.model) if one.layer is not None and "linear_" in one.within}
        nothing = io.BytesIO()
        torch.save([None], nothing)
        for module in sorted(modules | {"self_attention.core_attention"}):
            for layer in range(self.model.num_layers):
                yield f"decoder.layers.{module}._extra_state/shard_{layer}_{self.model.num_layers}", nothing.getvalue()

    def _object(self, key: str, content: bytes) -> Place:
        """The place of what is no tensor."""
        self._tensors[key] = metadata.BytesStorageMetadata()
        return self._next(metadata.MetadataIndex(key), len(content), 1)

    def _common(self) -> dict[str, Any]:
        """What Megatron-LM looks for before it loads tensors; of weights alone nothing of an optimizer."""
        if self.state is not None:
            return common_of(self.state, self._halves)
        args = args_of(self.model, self._padded, self.dtypes.values())
        sharding = {key: SHARDING[key] for key in ("distrib_optim_sharding_type", "singleton_local_shards")}
        return {"args": args, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": sharding}


def _file(number: int) -> str:
    return f"__0_{number}.distcp"
