"""Writes a file per tensor-parallel rank and stage, in one of the dialects; only the tensor at hand is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from isal.isal_zlib import crc32

from checkpoints.files.placed import Place
from checkpoints.files.stored import raw
from checkpoints.files.torch_save import Archive, Slot
from checkpoints.folder import CheckpointError
from checkpoints.formats.base import Piece, Target
from checkpoints.formats.dialects import Dialect, registered
from checkpoints.formats.rank_files import rank_name
from checkpoints.formats.rank_states import FLAT, Weight, Where, bucket_of, flat, numbered, slotted
from checkpoints.models import gpt, legacy
from checkpoints.models.megatron import args_of
from checkpoints.models.model import Model
from checkpoints.models.tensor import Tensor, pad
from checkpoints.optimizer import KINDS, PREFIX, TrainingState, with_states

_EMBEDDING = "embedding.word_embeddings.weight"
_BLOCK = 64 << 20  # bytes that are read at a time


def even(layers: int, stages: int) -> list[int]:
    """As many layers on each stage.

    Raises:
        CheckpointError: that cannot be.
    """
    if layers % stages:
        raise CheckpointError(
            f"{layers} layers cannot be shared out over {stages} pipeline stages evenly: give --layout",
            "--layout, or another --pp",
        )
    return [layers // stages] * stages


def interleaved(stages: Sequence[int], pipeline: int) -> dict[str, int]:
    """What Megatron-LM's settings say of more stages than pipeline ranks."""
    if len(stages) == pipeline:
        return {}
    each = {"num_layers_per_virtual_pipeline_stage": stages[0]} if len(set(stages)) == 1 else {}
    return {"virtual_pipeline_model_parallel_size": len(stages) // pipeline, **each}


@dataclass(frozen=True)
class _Plan:
    """What a rank's files hold: their archives, the tensors' places by part of the model and name, and the contents of tensors
    that are not of the model."""

    archives: dict[str, Archive]
    places: dict[tuple[int, str], Where]
    fixed: dict[Where, torch.Tensor]


class RankFiles(Target):
    """Writes the folder of one checkpoint: `mp_rank_TT[_PPP]/` with a file each, or two."""

    def __init__(
        self, folder: Path, model: Model, dtypes: Mapping[str, torch.dtype], dialect: Dialect, ranks: int, stages: Sequence[int],
        pipeline: int | None = None, state: TrainingState | None = None,
    ):  # fmt: skip
        """`ranks` of tensor parallelism, and the layers of each of the `stages`; where there are more of these than `pipeline`
        ranks, they go round: a rank has several, each a part of the model by itself (interleaving).

        Raises:
            CheckpointError: the format has no such model, or it cannot be cut so.
        """
        self.model, self.dtypes, self.state = model, dtypes, state
        self._dialect, self._ranks, self._stages, self._pipeline = dialect, ranks, list(stages), pipeline or len(stages)
        if sum(stages) != model.num_layers:
            raise CheckpointError(f"stages of {', '.join(map(str, stages))} layers, and the model has {model.num_layers}", "another --layout, or layers of each virtual stage")
        if len(stages) % self._pipeline or len(stages) > self._pipeline and (dialect.format != "torch" or self._pipeline == 1):
            what = f"{len(stages)} stages cannot be interleaved over {self._pipeline} pipeline ranks in the format {dialect.format}"
            raise CheckpointError(what, "--to torch, and stages a multiple of --pp 2 or more")
        if state is not None and dialect.format != "torch":
            raise CheckpointError(f"{dialect.format} holds no optimizer's state", "--to torch or torch_dist, or leave out --optimizer")
        self._rows = dialect.rows(model.vocab_size, ranks) if state is None else model.vocab_size
        table = dialect.foreign(model)
        self._table = {one.tensor.name: one for one in (table if state is None else with_states(table))}
        self._pieces = {name: [self._padded(piece) for piece in legacy.pieces(one)] for name, one in self._table.items()}
        self._check()
        self._plans = {(p, rank): plan for p in range(self._pipeline) for rank, plan in enumerate(self._planned(p))}
        super().__init__(folder, model, dtypes, {
            self._file(p, rank, file): archive.size for (p, rank), plan in self._plans.items() for file, archive in plan.archives.items()
        })  # fmt: skip

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
            return 0 if tensor.weight.startswith("embedding.") else len(self._stages) - 1
        return next(stage for stage in range(len(self._stages)) if tensor.layer < sum(self._stages[: stage + 1]))

    def _local(self, name: str, stage: int) -> str:
        """A piece's name on its stage, where layers are counted from 0."""
        before, found, after = name.partition("layers.")
        if not found:
            return name
        number, _, rest = after.partition(".")
        return f"{before}layers.{int(number) - sum(self._stages[:stage])}.{rest}"

    def _weights(self, stage: int) -> list[Weight]:
        """A rank's shares of the weights of a stage."""
        found = {}
        for tensor in gpt.tensors(self.model):
            if self._stage(tensor) == stage:
                for piece in self._pieces[tensor.name]:
                    found[self._local(piece.name, stage)] = self._weight(stage, self._local(piece.name, stage), tensor.name, piece)
        if self._copies_embedding and stage == len(self._stages) - 1:
            found[self._dialect.tied] = self._weight(stage, self._dialect.tied, _EMBEDDING, self._pieces[_EMBEDDING][0])
        return [found[name] for name in (registered(found) if self._dialect.format == "torch" else found)]

    def _weight(self, stage: int, local: str, name: str, piece: Tensor) -> Weight:
        kinds = {kind: self.dtypes[f"{PREFIX}{kind}.{name}"] for kind in KINDS} if self.state else {}
        return Weight(stage, local, self.dtypes[name], self._share(piece), kinds)

    def _share(self, piece: Tensor) -> tuple[int, ...]:
        return tuple(size // (self._ranks if axis == piece.axis else 1) for axis, size in enumerate(piece.shape))

    @property
    def _copies_embedding(self) -> bool:
        return len(self._stages) > 1 and not self.model.untie_embeddings_and_output_weights

    def _file(self, p: int, rank: int, file: str) -> str:
        return f"{rank_name(rank, p, self._pipeline)}/{file}"

    def _planned(self, p: int) -> list[_Plan]:
        """The files of each tensor-parallel rank of one pipeline rank: all the same, but for random numbers' states."""
        if self.state is None or not self.state.random:
            return [self._plan(p, None)] * self._ranks
        return [self._plan(p, self.state.random[p, rank]) for rank in range(self._ranks)]

    def _plan(self, p: int, random: Any) -> _Plan:
        file, parts = self._dialect.file, range(p, len(self._stages), self._pipeline)
        weights = [one for stage in parts for one in self._weights(stage)]
        places = {(one.part, one.name): Where(file, Slot(one.dtype, one.shape)) for one in weights}
        contents: dict[Slot, torch.Tensor] = {}
        whole = self._head()
        for number, stage in enumerate(parts):
            own = {name: where.slot for (part, name), where in places.items() if part == stage}
            more = slotted(self._dialect.beside(self.model, self._stages[stage], stage == len(self._stages) - 1), contents)
            whole["model" if len(parts) == 1 else f"model{number}"] = self._dialect.nested({**own, **more})
        archives = {}
        if self.state is not None:
            optimizer, of_state = self._optimizer(weights, p)
            places |= of_state
            whole["optimizer"] = optimizer if self.state.form == "plain" else self.state.nested(True)
            whole |= {} if random is None else {"rng_state": random}
            if self.state.form == "distributed":
                archives[FLAT] = Archive(Path(FLAT).stem, optimizer)
        archives[file] = Archive(Path(file).stem, slotted(whole, contents))
        return _Plan(archives, places, {Where(file, slot): one for slot, one in contents.items()})

    def _optimizer(self, weights: list[Weight], p: int) -> tuple[dict[str, Any], dict[tuple[int, str], Where]]:
        assert self.state is not None
        if self.state.form == "plain":
            return numbered(self.state, weights, self._dialect.file)
        parts = len(self._stages) // self._pipeline
        buckets = [bucket_of(vars(self.state.common["args"]), p + number) for number in range(parts)]  # the first part's alone
        return flat(self.state, weights, buckets, self._copies_embedding)

    def _head(self) -> dict[str, Any]:
        """What is neither a tensor nor the optimizer's: of weights alone what Megatron-LM asks for."""
        if self.state is not None:
            return dict(self.state.common)
        return {"args": self._settings(), "checkpoint_version": 3.0, "iteration": 0}

    def _settings(self) -> Any:
        stages = {} if len(set(self._stages)) == 1 else {"pipeline_model_parallel_blocks": ",".join(map(str, self._stages))}
        dtype = next(iter(self.dtypes.values()))
        return args_of(
            self.model, self._rows, self.dtypes.values(), tensor_model_parallel_size=self._ranks,
            pipeline_model_parallel_size=self._pipeline, data_parallel_size=1, params_dtype=dtype, orig_vocab_size=self.model.vocab_size,
            layernorm_epsilon=self.model.norm_epsilon, **stages | interleaved(self._stages, self._pipeline) | self._dialect.settings,
        )  # fmt: skip

    # ---- writing

    def pieces(self, tensor: Tensor, whole: torch.Tensor) -> Iterator[Piece]:
        stage, one = self._stage(tensor), self._table[tensor.name]
        for piece, value in zip(self._pieces[tensor.name], one.layout.split(whole), strict=True):
            names = [(stage, self._local(piece.name, stage))]
            if tensor.weight == _EMBEDDING and self._copies_embedding:
                names.append((len(self._stages) - 1, tensor.state + self._dialect.tied))
            crc = crc32(raw(value)) if piece.axis is None else None  # the same on every rank
            for part, name in names:
                for rank in range(self._ranks):
                    yield from self._piece(part, name, rank, self._share_of(piece, value, rank), crc)

    def _piece(self, part: int, name: str, rank: int, share: list[torch.Tensor], crc: int | None) -> Iterator[Piece]:
        plan = self._plans[part % self._pipeline, rank]
        where = plan.places.get((part, name))
        if where is None:
            return  # fp32 weights of fp32 weights: these themselves
        file, entry = self._file(part % self._pipeline, rank, where.file), plan.archives[where.file].entry(where.slot)
        if where.first is None:
            yield Piece(Place(file, entry.at), share, partial(entry.framed, crc=crc))
        else:
            yield Piece(Place(file, entry.start + where.first * where.slot.dtype.itemsize), share)

    def _share_of(self, piece: Tensor, value: torch.Tensor, rank: int) -> list[torch.Tensor]:
        """What a rank holds of a piece, in parts that come one after another: views, so that none is in memory twice."""
        if piece.vocabulary:
            rows = self._rows // self._ranks
            share = value[rank * rows : (rank + 1) * rows]
            return [share] if len(share) == rows else [pad(share if len(share) else value[-1:], rows)]
        if piece.axis is None:
            return [value]
        return [part.chunk(self._ranks, piece.axis)[rank] for part in value.chunk(piece.parts, piece.axis)]

    def complete(self) -> None:
        for (p, rank), plan in self._plans.items():
            for name, archive in plan.archives.items():
                self._complete(self._file(p, rank, name), name, archive, plan)
            self.files.relax()

    def _complete(self, file: str, name: str, archive: Archive, plan: _Plan) -> None:
        """Write what of a file is no tensor of the model."""
        for at, content in archive.fixed():
            self.files.write(Place(file, at), [content])
        for where, one in plan.fixed.items():
            if where.file == name:
                entry = archive.entry(where.slot)
                self.files.write(Place(file, entry.at), entry.framed([raw(one)]))
        for slot in {where.slot for where in plan.places.values() if where.file == name and where.first is not None}:
            entry = archive.entry(slot)  # its pieces are there, in any order: what stands before them tells their checksum
            self.files.write(Place(file, entry.at), [entry.header(self._crc(file, entry.start, entry.size))])
        at, content = archive.end_of(lambda at, size: self.files.read(Place(file, at), size))
        self.files.write(Place(file, at), [content])

    def _crc(self, file: str, start: int, size: int) -> int:
        crc = 0
        for at in range(start, start + size, _BLOCK):
            crc = crc32(self.files.read(Place(file, at), min(_BLOCK, start + size - at)), crc)
        return crc
