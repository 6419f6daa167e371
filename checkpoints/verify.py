"""Two checkpoints, of any formats and layouts, tensor by tensor: what is the same and what is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import inf, sqrt
from typing import Literal

import torch

from checkpoints.files.stored import NAMES
from checkpoints.formats.base import Source
from checkpoints.formats.shares import raw_equal
from checkpoints.models.gpt import SCALE
from checkpoints.models.model import FREE
from checkpoints.optimizer import group_decays

_TOLD = (*FREE, "quantize")  # of no meaning here, or told by the tensors
_OF_GROUPS = ("lr", "betas", "eps", "weight_decay", "max_lr", "min_lr")
_BLOCK = 4 << 20  # numbers that are compared at a time


@dataclass(frozen=True)
class Compared:
    """One tensor of both.

    Attributes:
        kind: same, bit for bit; rounded, the one being the other in fewer bits and infinite nowhere else; different; missing
            in one.
        what: of what is not the same, in words.
        zeroed: of what is rounded, how many numbers are 0 in one and not in the other.
    """

    name: str
    kind: Literal["same", "rounded", "different", "missing"]
    what: str = ""
    zeroed: int = 0


def models(first: Source, second: Source) -> dict[str, tuple[object, object]]:
    """What the two say differently of the model that they are, by name."""
    ours, theirs = vars(first.model), vars(second.model)
    return {key: (ours[key], theirs[key]) for key in ours if key not in _TOLD and ours[key] != theirs[key]}


def trainings(first: Source, second: Source) -> dict[str, tuple[object, object]]:
    """What two trainings, both opened with their states, say differently of where they stand, by name; the form in which the
    optimizer's state lies, and the layout, are no difference."""
    ours, theirs = (_standing(source) for source in (first, second))
    return {key: (ours.get(key), theirs.get(key)) for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)}


def _standing(source: Source) -> dict[str, object]:
    state = source.state
    if state is None:
        return {}
    args = vars(state.common["args"])
    found: dict[str, object] = {"iteration": state.iteration, "optimizer's step": state.step, "grad_scaler": state.scaler}
    found |= {key: args.get(key) for key in ("consumed_train_samples", "consumed_valid_samples")}
    found |= {f"opt_param_scheduler.{key}": value for key, value in state.common["opt_param_scheduler"].items()}
    for group in state.groups:
        decays = "with" if group_decays(group) else "without"
        found |= {f"{key} {decays} weight decay": value for key, value in group.items() if key in _OF_GROUPS}
    return {key: _plain(value) for key, value in found.items()}


def _plain(value: object) -> object:
    """A value without tensors, to be compared and shown."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return {key: _plain(one) for key, one in value.items()} if isinstance(value, Mapping) else value


def compare(first: Source, second: Source, progress: Callable[[int], None] = lambda count: None) -> Iterator[Compared]:
    """Every tensor of either, in the first's order; `progress` is told the bytes that were read of the first.

    Of int8 weights beside others the numbers that they stand for are compared; a layer's scales are part of its weight.
    """
    ours, theirs = ({tensor.name: tensor for tensor in source.tensors} for source in (first, second))
    for name in dict.fromkeys([*ours, *theirs]):
        if name.endswith(SCALE) and not (name in ours and name in theirs):
            continue
        if name not in ours or name not in theirs:
            yield Compared(name, "missing", f"only in {(first if name in ours else second).path}")
        elif ours[name].shape != theirs[name].shape and not (first.state and ours[name].vocabulary):
            yield Compared(name, "different", f"{list(ours[name].shape)} and {list(theirs[name].shape)}")
        else:
            types = " and ".join(dict.fromkeys(NAMES.get(source.dtype(name), str(source.dtype(name))) for source in (first, second)))
            one, other = _read(first, name, second), _read(second, name, first)
            if one.shape != other.shape:  # tables of trainings come with the rows that pad them
                one, other = one[: first.model.vocab_size], other[: second.model.vocab_size]
            if one.shape == other.shape:
                yield _compared(name, one, other, types)
            else:
                yield Compared(name, "different", f"{list(one.shape)} and {list(other.shape)}")
        if name in ours:
            progress(torch.Size(ours[name].shape).numel() * first.dtype(name).itemsize)


def _read(source: Source, name: str, other: Source) -> torch.Tensor:
    """A tensor; of int8, where the other's is not, what it stands for, in fp32."""
    whole = source.read(name)
    if whole.dtype != torch.int8 or other.dtype(name) == torch.int8:
        return whole
    return whole.float().mul_(source.read(name.removesuffix("weight") + SCALE).float()[:, None])


def _compared(name: str, one: torch.Tensor, other: torch.Tensor, types: str) -> Compared:
    if one.dtype == other.dtype and raw_equal(one, other):
        return Compared(name, "same")
    if one.dtype != other.dtype and (raw_equal(one.to(other.dtype), other) or raw_equal(one, other.to(one.dtype))):
        overflown, zeroed = _lost(one, other)
        if not overflown:
            return Compared(name, "rounded", types, zeroed)
    return Compared(name, "different", f"{types}: {_distance(one, other)}")


def _lost(one: torch.Tensor, other: torch.Tensor) -> tuple[int, int]:
    """How many numbers are finite, and how many 0, in one of the two alone."""
    overflown = zeroed = 0
    for a, b in zip(one.reshape(-1).split(_BLOCK), other.reshape(-1).split(_BLOCK), strict=True):
        overflown += int((a.isfinite() != b.isfinite()).sum())
        zeroed += int(((a == 0) != (b == 0)).sum())
    return overflown, zeroed


def _distance(one: torch.Tensor, other: torch.Tensor) -> str:
    """How many numbers differ, by how much at most, and the whole's relative distance."""
    count, largest, wrong, size = 0, 0.0, 0.0, 0.0
    for a, b in zip(one.reshape(-1).split(_BLOCK), other.reshape(-1).split(_BLOCK), strict=True):
        a, b = a.double(), b.double()
        apart = (a - b).abs()
        same = (a == b) | (a.isnan() & b.isnan())
        count += int((~same).sum())
        apart = torch.where(same, 0.0, apart.nan_to_num(inf, inf, inf))
        largest = max(largest, apart.max().item())
        wrong, size = wrong + apart.square().sum().item(), size + a.square().sum().item()
    relative = f", {100 * sqrt(wrong / size):.3g} % of its length" if 0 < size < inf and wrong < inf else ""
    return f"{count:,} of {one.numel():,} numbers differ, by up to {largest:.3g}{relative}"
