"""Where a file per rank holds the optimizer's tensors. Nothing there bears a name: the order of the parameters says it, which
is the one in which megatron-core's modules register them, and in which `model` lists them.

    plain         model_optim_rng.pt: optimizer.state, numbered group by group; fp32_from_fp16_params, group by group
    distributed   distrib_optim.pt: for each part of the model three flat buffers, the last parameter first
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch

from checkpoints.files import pickled
from checkpoints.files.stored import Stored
from checkpoints.files.torch_save import Slot
from checkpoints.folder import CheckpointError
from checkpoints.formats.base import Readable
from checkpoints.optimizer import KINDS, MASTER, MOMENTS, PREFIX, Form, TrainingState, decays, expect_groups, group_decays, inner_of

FLAT = "distrib_optim.pt"
_FLAT_KINDS = {"param": MASTER, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_TIED = frozenset(("embedding.word_embeddings.weight", "output_layer.weight"))  # where stages share one table
_ALIGNED = 64  # numbers: 128 bytes in 16 bits
_AGAIN = "copy the whole checkpoint again, or take an older one"
Part = Mapping[str, Readable]  # the weights of a part of the model on a rank, in the order of its parameters


@dataclass(frozen=True)
class Master(Stored):
    """A weight in fp32. `weight` is the one that was made of it: that they agree shows that the order was understood."""

    weight: Stored | None = None
    name: str = ""

    def read(self) -> torch.Tensor:
        """The weight in fp32.

        Raises:
            CheckpointError: rounded it is not the model's.
        """
        whole = super().read()
        if self.weight is not None:
            rounded, there = (one.contiguous().flatten().view(torch.uint8) for one in (whole.to(self.weight.dtype), self.weight.read()))
            if not torch.equal(rounded, there):
                raise CheckpointError(f"{self.path}: what should be the fp32 weights of {self.name} is not what the model has", _AGAIN)
        return whole


def read_states(folder: Path, file: str, optimizer: Mapping[str, Any], parts: Sequence[Part], bucket: int | None) -> tuple[Form, list[dict[str, Readable]]]:
    """The optimizer's tensors of a rank, for each part of the model by name.

    Args:
        folder, file: of the rank, and the name of its weights' file.
        bucket: numbers of a bucket of gradients, where they are reduced while the backward pass runs.

    Raises:
        CheckpointError: they are not there, or not those of these weights.
    """
    if (folder / FLAT).is_file():
        return "distributed", _flat(folder / FLAT, parts, bucket)
    return "plain", _numbered(folder / file, optimizer, parts)


def _numbered(path: Path, optimizer: Mapping[str, Any], parts: Sequence[Part]) -> list[dict[str, Readable]]:
    inner = inner_of(optimizer, str(path)) if optimizer else {}
    if not inner.get("state"):
        raise CheckpointError(f"{path} holds no moments: no step was made yet, or {FLAT} is missing beside it", _AGAIN)
    expect_groups(inner["param_groups"], str(path))
    masters = _masters(path, optimizer, [group.get("params") for group in inner["param_groups"]])
    found: list[dict[str, Readable]] = [{} for _ in parts]
    for number, group in enumerate(inner["param_groups"]):
        own = [
            (part, name, weight)
            for part, weights in enumerate(parts)
            for name, weight in weights.items()
            if decays(name, weight.shape) == group_decays(group)
        ]
        halves = sum(weight.dtype != torch.float32 for *_, weight in own)
        if len(own) != len(group["params"]) or halves != (len(masters[number]) if masters else 0):
            counts = f"{len(group['params'])} in its group {number}, for {len(own)}, {halves} of which are of 16 bits"
            raise CheckpointError(f"{path}: its optimizer's parameters are not the model's: {counts}", _AGAIN)
        fp32 = iter(masters[number] if masters else ())
        for (part, name, weight), index in zip(own, group["params"], strict=True):
            moments = inner["state"].get(index) if type(index) is int else None
            master = weight if weight.dtype == torch.float32 else _master(next(fp32), weight, name)
            state = {**(moments if isinstance(moments, Mapping) else {}), MASTER: master}
            for kind in KINDS:
                shape = getattr(state.get(kind), "shape", None)
                if shape is None or tuple(shape) != tuple(weight.shape):
                    raise CheckpointError(f"{path}: {kind} of {name} {list(weight.shape)} is {'missing' if shape is None else list(shape)}", _AGAIN)
                found[part][f"{PREFIX}{kind}.{name}"] = state[kind]
    return found


def _masters(path: Path, optimizer: Mapping[str, Any], params: Sequence[Any]) -> Sequence[Sequence[Any]]:
    """The weights in fp32 of each group of `params`; empty where the weights are in fp32 themselves."""
    found = optimizer.get("fp32_from_fp16_params", optimizer.get("fp32_from_fp16", ()))
    several = [*params, found, *(found if isinstance(found, (list, tuple)) else ())]
    if not all(isinstance(one, (list, tuple)) for one in several) or len(found) not in (0, len(params)):
        raise CheckpointError(f"{path} is damaged: its parameter groups have no params, or there are fp32 weights of other groups", _AGAIN)
    return found


def _master(one: Any, weight: Readable, name: str) -> Any:
    return Master(**vars(one), weight=weight, name=name) if isinstance(one, Stored) and isinstance(weight, Stored) else one


def _flat(path: Path, parts: Sequence[Part], bucket: int | None) -> list[dict[str, Readable]]:
    content = pickled.read(path)
    buffers = [one for key, one in content.items() if type(key) is int] if isinstance(content, Mapping) else []
    if len(buffers) != len(parts) or not content.get("buckets_coalesced") or any(not isinstance(one, Mapping) or len(one) != 1 for one in buffers):
        what = f"{len(buffers)} flat buffers for {len(parts)} parts of the model, or several types of numbers in one"
        raise CheckpointError(f"{path} is of an older release, of several optimizers or of FP8: it holds {what}", "save it with megatron-core 0.16")
    found: list[dict[str, Readable]] = []
    for weights, buffer in zip(parts, buffers, strict=True):
        (flat,) = buffer.values()
        three = [flat.get(kind) for kind in _FLAT_KINDS] if isinstance(flat, Mapping) else [None]
        if any(not isinstance(one, Stored) or len(one.shape) != 1 or one.strides not in (None, (1,)) or one.shape != three[0].shape for one in three):
            raise CheckpointError(f"{path} is damaged: a flat buffer is missing, or no row of as many numbers as the others", _AGAIN)
        places = _places_of(weights, flat["param"].shape[0], bucket, path)
        own: dict[str, Readable] = {}
        for name, weight in weights.items():
            for key, kind in _FLAT_KINDS.items():
                at = flat[key].offset + places[name] * flat[key].dtype.itemsize
                piece = Stored(flat[key].path, at, flat[key].dtype, tuple(weight.shape))
                own[f"{PREFIX}{kind}.{name}"] = _master(piece, weight, name) if kind == MASTER else piece
        found.append(own)
    return found


def _places_of(weights: Part, length: int, bucket: int | None, path: Path) -> dict[str, int]:
    """Where each parameter begins, by how buffers of this length can have come about."""
    sizes = {name: prod(weight.shape) for name, weight in weights.items()}
    for tied, size in product((frozenset(), _TIED), dict.fromkeys((None, bucket))):
        found, end = places(sizes, tied, size)
        if end == length:
            return found
    raise CheckpointError(f"{path} has {length:,} numbers for each of Adam's tensors, and the model's {end:,}", _AGAIN)


def places(sizes: Mapping[str, int], tied: Iterable[str] = (), bucket: int | None = None) -> tuple[dict[str, int], int]:
    """Where in a flat buffer each parameter begins, and where the buffer ends.

    megatron-core 0.16's buffers have the last parameter first, and each begin at a multiple of 64 numbers. They are cut into buckets of
    at least `bucket` numbers, and a table that stages share has one to itself; what pads a bucket is not saved.
    """
    found, base, end = {}, 0, 0  # base: where the bucket begins; end: how long it is so far
    for name in reversed(sizes):
        start = -(-end // _ALIGNED) * _ALIGNED
        if name in tied and end:
            base, start = base + start, 0
        found[name], end = base + start, start + sizes[name]
        if name in tied or bucket is not None and end >= bucket:
            base, end = base + end, 0
    return found, base + end


def bucket_of(settings: Mapping[str, Any], stage: int) -> int | None:
    """Numbers of a bucket of gradients, by a training's settings: on the first stage, where reducing is overlapped."""
    if stage or not settings.get("overlap_grad_reduce"):
        return None
    return settings.get("ddp_bucket_size") or max(40_000_000, 1_000_000 * (settings.get("data_parallel_size") or 1))


# ---- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """A rank's share of a weight, on the part of the model that it is of. `kinds`: the types of the optimizer's tensors of it."""

    part: int
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    kinds: Mapping[str, torch.dtype]


@dataclass(frozen=True)
class Where:
    """A place in a file: a slot, or the numbers of one from `first` on."""

    file: str
    slot: Slot
    first: int | None = None


Plan = tuple[dict[str, Any], dict[tuple[int, str], Where]]  # what a file holds, and the places of tensors in it, by part and name


def numbered(state: TrainingState, weights: Sequence[Weight], file: str) -> Plan:
    """`optimizer` of a rank's file in the plain form; `weights` in the order of the parameters.

    Raises:
        CheckpointError: a weight is in no parameter group.
    """
    halves = any(one.dtype != torch.float32 for one in weights)
    content, found = state.nested(halves), {}
    inner, masters = inner_of(content), []
    for group in inner["param_groups"]:
        own = [one for one in weights if decays(one.name, one.shape) == group_decays(group)]
        first = len(inner["state"])
        group["params"] = list(range(first, first + len(own)))
        masters.append([Slot(one.kinds[MASTER], one.shape) for one in own if one.dtype != torch.float32])
        fp32 = iter(masters[-1])
        for index, one in zip(group["params"], own, strict=True):
            slots = {kind: Slot(one.kinds[kind], one.shape) for kind in MOMENTS}
            inner["state"][index] = {"step": torch.tensor(float(state.step)), **slots}
            if one.dtype != torch.float32:
                slots[MASTER] = next(fp32)
            found |= {(one.part, f"{PREFIX}{kind}.{one.name}"): Where(file, slot) for kind, slot in slots.items()}
    if len(inner["state"]) != len(weights):
        raise CheckpointError(f"{len(weights) - len(inner['state'])} weights are in none of the optimizer's parameter groups", "leave out --optimizer")
    return {**content, **({"fp32_from_fp16_params": masters} if halves else {})}, found


def flat(state: TrainingState, weights: Sequence[Weight], buckets: Sequence[int | None], tied: bool) -> Plan:
    """What distrib_optim.pt holds; `buckets` of each part of the model; `tied`: stages share a table.

    Raises:
        CheckpointError: weights of several types, of which each would have a buffer, or moments that are not in fp32.
    """
    content: dict[str, Any] = {"buckets_coalesced": True}
    found = {}
    for number, part in enumerate(dict.fromkeys(one.part for one in weights)):
        own = [one for one in weights if one.part == part]
        types = {one.dtype for one in own} | {kind for one in own for kind in one.kinds.values()} - {torch.float32}
        if len(types) != 1:
            raise CheckpointError(f"{FLAT} is for weights of one type with Adam's tensors in fp32, and these are {', '.join(sorted(map(str, types)))}")
        at, length = places({one.name: prod(one.shape) for one in own}, _TIED if tied else (), buckets[number])
        slots = {key: Slot(torch.float32, (length,)) for key in _FLAT_KINDS}
        content[number] = {(own[0].dtype, state.grads or _grads(own[0].dtype)): {**slots, "numel_unpadded": length}}
        for key, kind in _FLAT_KINDS.items():
            found |= {(part, f"{PREFIX}{kind}.{one.name}"): Where(FLAT, slots[key], at[one.name]) for one in own}
    return content, found


def _grads(dtype: torch.dtype) -> torch.dtype:
    """The type in which gradients are reduced: Megatron-LM's default."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def slotted(value: Any, contents: dict[Slot, torch.Tensor]) -> Any:
    """A value with a slot in the place of every tensor, whose contents are noted."""
    if isinstance(value, torch.Tensor):
        slot = Slot(value.dtype, tuple(value.shape))
        contents[slot] = value
        return slot
    if isinstance(value, dict):
        return {key: slotted(one, contents) for key, one in value.items()}
    return type(value)(slotted(one, contents) for one in value) if isinstance(value, (list, tuple)) else value
