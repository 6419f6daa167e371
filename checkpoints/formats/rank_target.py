"""Writes a file per tensor-parallel rank and stage, in one of the dialects; of each only the tensor at hand is in memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoints.files.stored import raw
from checkpoints.files.torch_save import Slot, Writer
from checkpoints.folder import CheckpointError
from checkpoints.formats.base import Target
from checkpoints.formats.dialects import Dialect
from checkpoints.formats.rank_files import rank_name
from checkpoints.models import legacy
from checkpoints.models.megatron import args_of
from checkpoints.models.model import Model
from checkpoints.models.tensor import Tensor, pad

_EMBEDDING = "embedding.word_embeddings.weight"


def even(layers: int, stages: int) -> list[int]:
    """As many layers on each stage.

    Raises:
        CheckpointError: that cannot be.
    """
    if layers % stages:
        raise CheckpointError(f"{layers} layers cannot be shared out over {stages} pipeline stages evenly: give --layout", "--layout, or another --pp")
    return [layers // stages] * stages


class RankFiles(Target):
    """Writes the folder of one checkpoint: `mp_rank_TT[_PPP]/` with a file each."""

    def __init__(self, folder: Path, model: Model, dtypes: Mapping[str, torch.dtype], dialect: Dialect, ranks: int, stages: Sequence[int]):
        """`ranks` of tensor parallelism, and the layers of each of the `stages`.

        Raises:
            CheckpointError: the format has no such model, or it cannot be cut so.
        """
        super().__init__(folder, model, dtypes)
        self._dialect, self._ranks, self._stages = dialect, ranks, list(stages)
        if sum(stages) != model.num_layers:
            raise CheckpointError(f"stages of {', '.join(map(str, stages))} layers, and the model has {model.num_layers}")
        self._rows = dialect.rows(model.vocab_size, ranks)
        self._table = {one.tensor.name: one for one in dialect.foreign(model)}
        self._pieces = {name: [self._padded(piece) for piece in legacy.pieces(one)] for name, one in self._table.items()}
        self._check()
        self._slots: dict[tuple[int, int], dict[str, Slot]] = {}
        self._writers: dict[tuple[int, int], Writer] = {}
        self._beside = ThreadPoolExecutor(2)

    def _padded(self, piece: Tensor) -> Tensor:
        shape = (self._rows, *piece.shape[1:]) if piece.vocabulary else piece.shape
        return Tensor(piece.name, shape, piece.axis, piece.parts, piece.vocabulary)

    def _check(self) -> None:
        heads, groups = self.model.num_attention_heads, self.model.num_query_groups
        if heads % self._ranks or groups % self._ranks and (self._ranks % groups or self._dialect.format != "torch"):
            raise CheckpointError(f"{heads} heads in {groups} groups cannot be shared out over TP {self._ranks}", "another --tp")
        for piece in (piece for pieces in self._pieces.values() for piece in pieces):
            if piece.axis is not None and piece.shape[piece.axis] % (self._ranks * piece.parts):
                raise CheckpointError(f"{piece.name} {list(piece.shape)} cannot be shared out over TP {self._ranks}", "another --tp")

    # ---- what a file holds

    def _stage(self, tensor: Tensor) -> int:
        if tensor.layer is None:
            return 0 if tensor.name.startswith("embedding.") else len(self._stages) - 1
        return next(stage for stage in range(len(self._stages)) if tensor.layer < sum(self._stages[: stage + 1]))

    def _local(self, name: str, stage: int) -> str:
        """A piece's name on its stage, where layers are counted from 0."""
        before, found, after = name.partition("layers.")
        if not found:
            return name
        number, _, rest = after.partition(".")
        return f"{before}layers.{int(number) - sum(self._stages[:stage])}.{rest}"

    def _shapes(self, stage: int) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """The tensors of a stage's files: name, type, shape of a rank's share."""
        for tensor in self.order():
            if self._stage(tensor) == stage:
                for piece in self._pieces[tensor.name]:
                    yield self._local(piece.name, stage), self.dtypes[tensor.name], self._share(piece)
        if self._copies_embedding and stage == len(self._stages) - 1:
            yield self._dialect.tied, self.dtypes[_EMBEDDING], self._share(self._pieces[_EMBEDDING][0])

    def _share(self, piece: Tensor) -> tuple[int, ...]:
        return tuple(size // (self._ranks if axis == piece.axis else 1) for axis, size in enumerate(piece.shape))

    @property
    def _copies_embedding(self) -> bool:
        return len(self._stages) > 1 and not self.model.untie_embeddings_and_output_weights

    def _open(self, stage: int, rank: int) -> Writer:
        if (stage, rank) not in self._writers:
            folder = self.folder / rank_name(rank, stage, len(self._stages))
            folder.mkdir()
            slots = {name: Slot(dtype, shape) for name, dtype, shape in self._shapes(stage)}
            last = stage == len(self._stages) - 1
            beside = self._dialect.beside(self.model, self._stages[stage], last)
            more = {name: None if one is None else Slot(one.dtype, tuple(one.shape)) for name, one in beside.items()}
            content = {
                "args": self._settings(), "checkpoint_version": 3.0, "iteration": 0, "model": self._dialect.nested({**slots, **more}),
            }  # fmt: skip
            self._slots[stage, rank] = slots
            self._writers[stage, rank] = Writer(folder / self._dialect.file, content)
            for name, slot in more.items():
                if slot is not None:
                    self._writers[stage, rank].write(slot, beside[name])  # type: ignore[arg-type]
        return self._writers[stage, rank]

    def _settings(self) -> Any:
        stages = {} if len(set(self._stages)) == 1 else {"pipeline_model_parallel_blocks": ",".join(map(str, self._stages))}
        dtype = next(iter(self.dtypes.values()))
        return args_of(
            self.model, self._rows, self.dtypes.values(), tensor_model_parallel_size=self._ranks,
            pipeline_model_parallel_size=len(self._stages), data_parallel_size=1, params_dtype=dtype, orig_vocab_size=self.model.vocab_size,
            layernorm_epsilon=self.model.norm_epsilon, **stages | self._dialect.settings,
        )  # fmt: skip

    # ---- writing

    def put(self, tensor: Tensor, whole: torch.Tensor) -> None:
        stage, one = self._stage(tensor), self._table[tensor.name]
        self._close(before=stage)
        for piece, value in zip(self._pieces[tensor.name], one.layout.split(whole), strict=True):
            places = [(stage, self._local(piece.name, stage))]
            if tensor.name == _EMBEDDING and self._copies_embedding:
                places.append((len(self._stages) - 1, self._dialect.tied))
            crc = zlib.crc32(raw(value)) if piece.axis is None else None  # the same on every rank
            for at, name in places:
                # Ranks side by side: checksums and the system's writing let go of Python's lock.
                list(self._beside.map(partial(self._write, at, name, piece, value, crc), range(self._ranks)))

    def _write(self, stage: int, name: str, piece: Tensor, value: torch.Tensor, crc: int | None, rank: int) -> None:
        writer = self._open(stage, rank)
        writer.write(self._slots[stage, rank].pop(name), *self._share_of(piece, value, rank), crc=crc)

    def _share_of(self, piece: Tensor, value: torch.Tensor, rank: int) -> list[torch.Tensor]:
        """What a rank holds of a piece, in parts that come one after another: views, so that none is in memory twice."""
        if piece.vocabulary:
            rows = self._rows // self._ranks
            share = value[rank * rows : (rank + 1) * rows]
            return [share] if len(share) == rows else [pad(share if len(share) else value[-1:], rows)]
        if piece.axis is None:
            return [value]
        return [part.chunk(self._ranks, piece.axis)[rank] for part in value.chunk(piece.parts, piece.axis)]

    def _close(self, before: int) -> None:
        """End the files of the stages before this one; the last stage's may be open from the first on, for a tied head."""
        for stage, rank in [key for key in self._writers if key[0] < before]:
            self._writers.pop((stage, rank)).close()

    def finish(self) -> None:
        for stage in range(len(self._stages)):
            for rank in range(self._ranks):
                if (stage, rank) not in self._slots:
                    self._open(stage, rank)  # a stage without layers
        self._close(before=len(self._stages))
        self._beside.shutdown()
