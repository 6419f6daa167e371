"""A tensor that ranks hold shares of, or each all of: put together, and held against its copies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints.files.stored import Stored
from checkpoints.folder import CheckpointError
from checkpoints.formats.base import Readable
from checkpoints.models.tensor import Tensor

RANKS = "copy all ranks of one checkpoint, and no others, into one folder"
_BLOCK = 64 << 20  # bytes that are compared at a time


@dataclass(frozen=True)
class Shares:
    """A tensor of which each tensor-parallel rank has a share, or, where `tensor.axis` is None, all."""

    tensor: Tensor
    shares: tuple[Readable, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        axis = self.tensor.axis
        return tuple(size * (len(self.shares) if number == axis else 1) for number, size in enumerate(self.shares[0].shape))

    @property
    def dtype(self) -> torch.dtype:
        return self.shares[0].dtype

    def read(self) -> torch.Tensor:
        """The whole.

        Raises:
            CheckpointError: ranks that should all hold the same hold something else.
        """
        if self.tensor.axis is None:
            if other := [str(rank) for rank, share in enumerate(self.shares) if rank and not same(self.shares[0], share)]:
                raise CheckpointError(
                    f"{self.tensor.name} should be the same on every tensor-parallel rank, and rank {' and '.join(other)}'s is not rank 0's", RANKS
                )
            return self.shares[0].read()
        return self.tensor.join([share.read() for share in self.shares])

    def in_order(self, size: int) -> Iterator[torch.Tensor]:
        """The whole in C order, without a copy of more than about `size` bytes.

        Raises:
            CheckpointError: as `read`.
        """
        if self.tensor.axis is None or len(self.shares) == 1:
            yield self.read()
        elif self.tensor.axis == 0:
            pieces = [share.read().chunk(self.tensor.parts) for share in self.shares]
            yield from (piece for part in zip(*pieces, strict=True) for piece in part)
        else:
            shares = [share.read() for share in self.shares]
            rows = max(1, size // max(1, sum(share[:1].nbytes for share in shares)))
            for first in range(0, len(shares[0]), rows):
                yield self.tensor.join([share[first : first + rows] for share in shares])


def expect_alike(folder: Path, name: str, shares: Sequence[Readable]) -> None:
    """The shares of a tensor are of one shape and type.

    Raises:
        CheckpointError: they are not.
    """
    kinds = [f"{list(share.shape)} {share.dtype}" for share in shares]
    if len(set(kinds)) > 1:
        raise CheckpointError(f"{folder}: {name} is not of one kind on all tensor-parallel ranks: {', '.join(kinds)}", RANKS)


def same(one: Readable, other: Readable) -> bool:
    """Whether two tensors have the same bytes; of those in files a block is in memory at a time."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    blocks = [list(each.blocks(_BLOCK)) if isinstance(each, Stored) else [each] for each in (one, other)]
    if len(blocks[0]) != len(blocks[1]):  # one lies there with strides
        blocks = [[one], [other]]
    return all(raw_equal(a.read(), b.read()) for a, b in zip(*blocks, strict=True))


def raw_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one type and shape have the same bits: NaN is itself here, and 0 is not -0."""
    flat = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    whole = len(flat[0]) // 8 * 8
    in_eights = all(tensor.data_ptr() % 8 == 0 for tensor in flat)  # four times as fast
    fast = [tensor[:whole].view(torch.int64) if in_eights else tensor[:whole] for tensor in flat]
    return torch.equal(*fast) and torch.equal(*(tensor[whole:] for tensor in flat))
