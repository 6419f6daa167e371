"""How other formats lay out a tensor: as it is, turned, in several tensors, with its rows in another order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoints.models.model import Model
from checkpoints.models.tensor import Tensor

if TYPE_CHECKING:  # it takes 3 s to import, and a check asks which tensors a model has
    import torch


@dataclass(frozen=True)
class Layout:
    """`split` makes another format's tensors of one of ours, `join` ours of them; one is the reverse of the other."""

    split: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    join: Callable[[Sequence[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Foreign:
    """One tensor of a model as another format has it: the names of the tensors that it is there, and their layout."""

    tensor: Tensor
    names: tuple[str, ...]
    layout: Layout

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the other format's tensors, by name."""
        import torch

        pieces = self.layout.split(torch.empty(self.tensor.shape, device="meta"))
        return {name: tuple(piece.shape) for name, piece in zip(self.names, pieces, strict=True)}


SAME = Layout(lambda whole: [whole], lambda pieces: pieces[0])
TRANSPOSED = Layout(lambda whole: [whole.t()], lambda pieces: pieces[0].t())  # GPT-2's linear layers multiply from the right
HALVES = Layout(lambda whole: whole.chunk(2), lambda pieces: _cat(pieces))  # [gate; up], in two tensors


def separate_qkv(model: Model, keys: Sequence[int] = (1, 1)) -> Layout:
    """Query, key and value in a tensor each, rows head by head; ours are group by group the queries, the key, the value.

    With `keys` (2,) key and value share one: group by group the key, the value.
    """
    groups, channels = model.num_query_groups, model.kv_channels
    queries = model.num_attention_heads // groups

    def split(whole: torch.Tensor) -> list[torch.Tensor]:
        grouped = whole.view(groups, queries + 2, channels, *whole.shape[1:])
        return [rows.flatten(0, 2) for rows in grouped.split([queries, *keys], dim=1)]

    def join(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        return _cat([rows.reshape(groups, -1, channels, *rows.shape[1:]) for rows in pieces], dim=1).flatten(0, 2)

    return Layout(split, join)


def appended(layout: Layout, rows: Sequence[int]) -> Layout:
    """Several tensors of `layout`, which have `rows` rows, one after another in one."""
    return Layout(lambda whole: [_cat(layout.split(whole))], lambda pieces: layout.join(pieces[0].split(list(rows))))


def then(first: Layout, second: Layout) -> Layout:
    """`first`'s one tensor laid out as `second` says."""
    return Layout(lambda whole: second.split(first.split(whole)[0]), lambda pieces: first.join([second.join(pieces)]))


def _cat(pieces: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    import torch

    return torch.cat(list(pieces), dim)
