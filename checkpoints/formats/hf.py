"""Hugging Face's folder: config.json, safetensors in one file or several with an index, or pytorch_model*.bin; a tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.files import pickled, safetensors
from checkpoints.files.placed import Place
from checkpoints.files.stored import Stored, inside
from checkpoints.folder import CheckpointError
from checkpoints.formats.base import Piece, Readable, Source, Target
from checkpoints.models.layout import Foreign
from checkpoints.models.model import Model
from checkpoints.models.published import FAMILIES, companions, foreign, model_of, read_config, weight_map
from checkpoints.models.tensor import Tensor

_HEAD, _EMBEDDING = "lm_head.weight", "embedding.word_embeddings.weight"
_SHARD_BYTES = 5_000_000_000  # as `transformers` has long cut its files


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InMemory:
    """A tensor that is in memory already, of a file that cannot be read a tensor at a time."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> torch.Tensor:
        return self.tensor


def open_source(folder: Path) -> Source:
    """A folder as `transformers` and the Hub have it.

    Raises:
        CheckpointError: it is damaged, incomplete, or of a model that the engine has not.
    """
    where = str(folder / "config.json")
    config = read_config(folder)
    model = model_of(config, where)
    family = FAMILIES[config["model_type"]]
    tensors, unnamed = _tensors(folder)
    found = _with_prefix(tensors, family.PREFIX)
    left_out = {name: "a file that the index does not name" for name in unnamed} | {name: why for name in found if (why := family.no_weight(name))}
    table: list[Foreign] = family.foreign(model)
    if not model.untie_embeddings_and_output_weights and _HEAD in found:
        left_out[_HEAD] = _tied_copy(folder, found, next(one.names[0] for one in table if one.tensor.name == _EMBEDDING))
    return Source("hf", folder, model, table, found, left_out, training={}, companions=companions(folder))


def _tied_copy(folder: Path, found: Mapping[str, Readable], embedding: str) -> str:
    if embedding not in found or found[_HEAD].shape != found[embedding].shape or not torch.equal(found[_HEAD].read(), found[embedding].read()):
        raise CheckpointError(
            f"{folder}: config.json says that {_HEAD} is the embedding (tie_word_embeddings), and {_HEAD} and {embedding} differ;"
            " set tie_word_embeddings to false there if the two are meant", "set tie_word_embeddings to false in config.json if the two are meant"
        )
    return f"a copy of {embedding}, which it is tied to"


def _with_prefix(found: dict[str, Readable], prefix: str) -> dict[str, Readable]:
    """The files of OpenAI's own GPT-2 name the tensors without `transformer.`."""
    if any(name.startswith(prefix) for name in found):
        return found
    return {name if name == _HEAD else prefix + name: one for name, one in found.items()}


def _tensors(folder: Path) -> tuple[dict[str, Readable], list[str]]:
    """Every tensor of a folder: of its safetensors where there are any, else of its .bin files. And the files that its index
    leaves out."""
    for stem, suffix, read in (("model", "safetensors", safetensors.read_header), ("pytorch_model", "bin", _read_bin)):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.is_file():
            found, files = _indexed(folder, index, read)
            if single.is_file() and single.name not in files:
                what = f"{folder} holds both {single.name} and {index.name}, which names other files"
                raise CheckpointError(what, "move away the one that is not meant")
            return found, sorted(path.name for path in folder.glob(f"{stem}*.{suffix}") if path.name not in files)
        if single.is_file():
            return dict(read(single)), []
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
    raise CheckpointError(
        f"{folder} has no model.safetensors, pytorch_model.bin or index of several (there: {there})",
        "download the weights too, or give the folder that holds them",
    )


def _indexed(folder: Path, index: Path, read: Any) -> tuple[dict[str, Readable], list[str]]:
    places = weight_map(index)
    paths = {str(name): inside(folder, name, index) for name in places.values()}
    headers, files = {name: read(path) for name, path in paths.items()}, list(paths)
    found: dict[str, Readable] = {}
    for file, header in headers.items():
        for name, stored in header.items():
            if name in found:
                raise CheckpointError(f"{name} is in two files of {folder}: {file} and another", "download the folder again")
            found[name] = stored
    if missing := [name for name, file in places.items() if name not in headers[file]]:
        raise CheckpointError(f"{index} names tensors that are not in their files: {', '.join(missing[:8])}", "download the folder again")
    return found, files


def _read_bin(path: Path) -> dict[str, Readable]:
    content = pickled.read(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no names with tensors", "save a state_dict: tensors by their names")
    found: dict[str, Readable] = {}
    for name, value in content.items():
        if isinstance(value, Stored):
            found[name] = value
        elif isinstance(value, torch.Tensor):
            found[name] = InMemory(value)
        else:
            raise CheckpointError(f"{path}: {name} is no tensor", "save a state_dict: tensors by their names")
    return found


# ---- writing ---------------------------------------------------------------------------------------------------------


class HuggingFace(Target):
    """Writes safetensors, their index and config.json.

    `config` is the whole config.json; `beside` are files that go with it, such as the tokenizer's.
    """

    def __init__(
        self, folder: Path, model: Model, dtypes: Mapping[str, torch.dtype], config: Mapping[str, Any], beside: Mapping[str, Path] | None = None
    ):
        self._config, self._beside = dict(config), beside or {}
        self._table: dict[str, Foreign] = {one.tensor.name: one for one in foreign(model)}
        shards = _shards(self._table.values(), dtypes)
        self._planned = {file: safetensors.Planned(entries) for file, entries in shards.items()}
        self._file_of = {name: file for file, entries in shards.items() for name, _, _ in entries}
        super().__init__(folder, model, dtypes, {file: planned.size for file, planned in self._planned.items()})

    def pieces(self, tensor: Tensor, whole: torch.Tensor) -> Iterator[Piece]:
        one = self._table[tensor.name]
        for name, piece in zip(one.names, one.layout.split(whole), strict=True):
            file = self._file_of[name]
            yield Piece(Place(file, self._planned[file].place(name, piece.nbytes)), [piece])

    def complete(self) -> None:
        for file, planned in self._planned.items():
            self.files.write(Place(file, 0), [planned.header])
        if len(self._planned) > 1:
            total = sum(planned.size - len(planned.header) for planned in self._planned.values())
            write_json(self.folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": self._file_of})
        for name, path in self._beside.items():
            shutil.copy2(path, self.folder / name)
        if len(dtypes := set(self.dtypes.values())) == 1:
            keys = [key for key in ("dtype", "torch_dtype") if key in self._config] or ["torch_dtype"]  # transformers 5 reads both, 4 the latter
            self._config |= dict.fromkeys(keys, str(dtypes.pop()).removeprefix("torch."))
        write_json(self.folder / "config.json", self._config)


def _shards(table: Iterable[Foreign], dtypes: Mapping[str, torch.dtype]) -> dict[str, list[tuple[str, torch.dtype, tuple[int, ...]]]]:
    """What goes into which file: in the model's order, a new file where the next tensor would be too much."""
    shards: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    size = 0
    for one in table:
        dtype = dtypes[one.tensor.name]
        for name, shape in one.shapes().items():
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            if shards[-1] and size + nbytes > _SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append((name, dtype, shape))
            size += nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def write_json(path: Path, value: Any) -> None:
    """As `transformers` writes its files."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
