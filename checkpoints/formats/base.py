"""What every format is: a source that gives a model's tensors one at a time, a target that takes them so.

Between them go whole tensors under megatron-core's names (`checkpoints.models.gpt`), without the padding of the
vocabulary. Neither builds a model; what is in memory is about one tensor.

A new format is two functions. One opens a folder: it finds what is there, by name (`found`: a `Readable` each, which may put
ranks' shares together), the model, and the table of `Foreign`, and gives both to `Source`, which does the rest: it
refuses what is missing, left over or of another shape before a byte is written. The other is a subclass of `Target`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import torch

from checkpoints.files.placed import Place, Placed
from checkpoints.files.stored import Buffer, raw
from checkpoints.folder import CheckpointError
from checkpoints.models import gpt
from checkpoints.models.layout import SAME, Foreign
from checkpoints.models.model import Model
from checkpoints.models.tensor import Tensor
from checkpoints.optimizer import TrainingState, with_states

_SHOWN = 8  # names in a message, of thousands there may be
_BLOCK = 2 << 20  # bytes: malloc gives the same memory again and again


class Readable(Protocol):
    """A tensor somewhere: `checkpoints.files.stored.Stored`, or shares of one that `read` puts together."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self) -> torch.Tensor: ...


class Source:
    """A checkpoint whose every tensor is accounted for.

    Attributes:
        format: as `yuan convert --to` calls it.
        path: its folder.
        model: what it is a model of.
        left_out: tensors that are there and not converted, by name, with the reason: copies of tied weights, padding, the
            optimizer's.
        training: the settings that it was trained with, where the format has them, under Megatron-LM's names.
        companions: small files that belong to the model and not to the weights: the tokenizer's and Hugging Face's.
        folders: all that is read of: its own, and those of weights that it builds on.
        reading: what was said of how its files are to be read, by name: with another word its tensors are others.
    """

    reading: Mapping[str, Any] = {}

    def __init__(
        self,
        format: str,
        path: Path,
        model: Model,
        table: Sequence[Foreign],
        found: Mapping[str, Readable],
        left_out: Mapping[str, str],
        *,
        padded: bool = False,
        layout: str = "",
        training: Mapping[str, Any] | None = None,
        companions: Sequence[Path] = (),
        state: TrainingState | None = None,
    ):
        """`found` are all the tensors there are by the format's names, those of `left_out` among them or not. With `padded`
        a vocabulary may have more rows than the model has ids.

        Raises:
            CheckpointError: tensors are missing, left over, or of another shape; every one is named.
        """
        self.format, self.path, self.model, self.layout = format, path, model, layout
        self.folders = [path]
        self.left_out, self.training, self.companions, self.state = dict(left_out), training or {}, tuple(companions), state
        self._table, self._found = {foreign.tensor.name: foreign for foreign in table}, found
        self._check(padded)

    def _check(self, padded: bool) -> None:
        wanted = {name: (shape, one.tensor) for one in self._table.values() for name, shape in one.shapes().items()}
        missing = [name for name in wanted if name not in self._found]
        more = [name for name in self._found if name not in wanted and name not in self.left_out]
        wrong = []
        for name, (shape, tensor) in wanted.items():
            if name not in self._found or (there := tuple(self._found[name].shape)) == shape:
                continue
            if padded and tensor.vocabulary and there[0] > shape[0] and there[1:] == shape[1:]:
                self.left_out[f"{name}[{shape[0]}:]"] = f"{there[0] - shape[0]} rows that pad the vocabulary"
            else:
                wrong.append(f"{name} is {list(there)}, and {list(shape)} was expected")
        told = [("missing: ", missing), ("not known: ", more), ("", wrong)]
        if any(names for _, names in told):
            lines = [f"    {what}{_listed(names)}" for what, names in told if names]
            raise CheckpointError(
                f"{self.path} does not hold the tensors of {self.model}\n" + "\n".join(lines),
                "copy or download the whole folder again; if it is whole, what says the model (config.json, args, a recipe) is another one's",
            )

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor of the model, and with `state` the optimizer's of each behind it."""
        return gpt.tensors(self.model) if self.state is None else [one.tensor for one in self._table.values()]

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor: of one that lies in several, the type that holds the numbers of all."""
        return reduce(torch.promote_types, dict.fromkeys(self._found[one].dtype for one in self._table[name].names))

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor by its name in `tensors`: where it can be a view of the file, else put together in memory."""
        foreign = self._table[name]
        dtype = self.dtype(name)
        whole = foreign.layout.join([self._found[one].read().to(dtype) for one in foreign.names])
        return whole[: foreign.tensor.shape[0]]

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The same tensor in pieces, one after another in C order, for who needs each byte once: where ranks' shares lie in
        one another's way, a few rows are put together at a time."""
        foreign = self._table[name]
        found, left = self._found[foreign.names[0]], torch.Size(foreign.tensor.shape).numel()
        if foreign.layout is not SAME or not hasattr(found, "in_order"):
            yield self.read(name)
            return
        for block in found.in_order(_BLOCK):
            yield block.flatten()[:left]
            left -= min(left, block.numel())


class Derived(Source):
    """A source whose tensors are made of another's, `_source`, when they are asked for: `read` makes them."""

    def __init__(self, source: Source):
        vars(self).update(vars(source))
        self._source = source

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor, in one piece: what lies in the files is another."""
        yield self.read(name)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def by_own_names(model: Model) -> list[Foreign]:
    """The table of a format whose tensors are named and laid out as ours."""
    return [Foreign(tensor, (tensor.name,), SAME) for tensor in gpt.tensors(model)]


@dataclass(frozen=True)
class Piece:
    """Something of a tensor that goes to a place.

    Attributes:
        parts: whose bytes, in C order, one after another.
        around: the bytes to write, of the parts' own.
    """

    place: Place
    parts: Sequence[torch.Tensor]
    around: Callable[[list[memoryview]], Sequence[Buffer]] = list


class Target(ABC):
    """A checkpoint that is being written into a folder, which nobody takes for a whole one before it has its name.

    What each file holds, and where, is settled before anything is written: tensors may come in any order, from any process.
    """

    state: TrainingState | None = None  # where the training stands, where its optimizer's tensors are written too

    def __init__(self, folder: Path, model: Model, dtypes: Mapping[str, torch.dtype], sizes: Mapping[str, int]):
        """`dtypes`: of every tensor, by its name. `sizes`: of every file that holds tensors, in bytes, by its name in `folder`."""
        self.folder, self.model, self.dtypes = folder, model, dtypes
        self.files = Placed(folder, sizes)
        self._side_by_side = ThreadPoolExecutor(2)

    def order(self) -> list[Tensor]:
        """Every tensor of the model, in the order in which they are to come, and with `state` the optimizer's of each behind it."""
        return gpt.tensors(self.model) if self.state is None else [one.tensor for one in with_states(by_own_names(self.model))]

    def put(self, tensor: Tensor, whole: torch.Tensor) -> None:
        """Write one: of its dtype in `dtypes`, without padding."""
        self.files.relax()
        # Side by side: checksums and the system's writing let go of Python's lock.
        list(self._side_by_side.map(self._write, self.pieces(tensor, whole)))

    def _write(self, piece: Piece) -> None:
        self.files.write(piece.place, piece.around([raw(part) for part in piece.parts]))

    @abstractmethod
    def pieces(self, tensor: Tensor, whole: torch.Tensor) -> Iterable[Piece]:
        """What goes where of one: views where that can be, so that nothing is in memory twice."""

    def finish(self) -> None:
        """Write all that is no tensor; every tensor has been put."""
        self.complete()
        self.files.close()

    @abstractmethod
    def complete(self) -> None:
        """What `finish` writes."""
