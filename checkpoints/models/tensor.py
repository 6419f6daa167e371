"""One tensor of a model: its name, its whole shape, and how tensor-parallel ranks share it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes 3 s to import, and the description of a model needs none of it
    import torch


@dataclass(frozen=True)
class Tensor:
    """One tensor of a model, whole.

    Attributes:
        name: megatron-core's name of the parameter where no Transformer Engine is, layers counted over all stages from 0,
            such as `decoder.layers.3.mlp.linear_fc1.weight`. It is the name of the tensor in every format here.
        shape: the whole shape; of the embedding and the output layer without the rows that pad the vocabulary.
        axis: 0 or 1, along which tensor-parallel ranks share it out; None where each holds all of it.
        parts: 2 where the rows are two matrices, [gate; up], and each is shared out by itself: a rank holds
            [its gate; its up], and ranks cannot be put together by appending them.
        vocabulary: its rows are ids, padded in training so that ranks share them out evenly.
        state: of one of the optimizer's, which has the shape of a weight and is shared out as it: what its name begins with
            before the weight's, such as `optimizer.state.exp_avg.`.
    """

    name: str
    shape: tuple[int, ...]
    axis: int | None = None
    parts: int = 1
    vocabulary: bool = False
    state: str = ""

    @property
    def weight(self) -> str:
        """The name of the weight that it is, or that it is the optimizer's state of."""
        return self.name.removeprefix(self.state)

    @property
    def layer(self) -> int | None:
        """The layer that it is of; None around the layers."""
        words = self.weight.split(".")
        return int(words[2]) if words[:2] == ["decoder", "layers"] else None

    @property
    def within(self) -> str:
        """The weight's name within the layer, `mlp.linear_fc1.weight`; around the layers its name."""
        return self.weight if self.layer is None else self.weight.split(".", 3)[3]

    def split(self, whole: torch.Tensor, ranks: int) -> list[torch.Tensor]:
        """What each of `ranks` tensor-parallel ranks holds: views where that can be, else copies.

        A vocabulary must have been padded (`pad`) to a multiple of `ranks`.
        """
        if self.axis is None or ranks == 1:
            return [whole] * ranks
        import torch

        pieces = [part.chunk(ranks, self.axis) for part in whole.chunk(self.parts, self.axis)]
        return [torch.cat(of_rank, self.axis) if self.parts > 1 else of_rank[0] for of_rank in zip(*pieces, strict=True)]

    def join(self, shares: list[torch.Tensor]) -> torch.Tensor:
        """The whole of what the ranks hold, the first rank's copy where each holds all of it. The reverse of `split`."""
        if self.axis is None or len(shares) == 1:
            return shares[0]
        import torch

        pieces = [share.chunk(self.parts, self.axis) for share in shares]
        return torch.cat([piece for part in zip(*pieces, strict=True) for piece in part], self.axis)


def pad(table: torch.Tensor, rows: int) -> torch.Tensor:
    """A vocabulary's table [ids, h] with `rows` rows: the last id's row again and again, as Megatron-LM's converter has it.

    Rows of zeros would have the logit 0, and in a model such as GPT-2, whose logits lie around -30 to -100, win every softmax.
    """
    if rows == len(table):
        return table
    import torch

    return torch.cat([table, table[-1:].expand(rows - len(table), *table.shape[1:])])


def padded(vocab_size: int, multiple: int) -> int:
    """The number of rows that `vocab_size` ids are padded to."""
    return -(-vocab_size // multiple) * multiple
