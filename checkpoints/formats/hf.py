"""Hugging Face's folder: config.json, safetensors in one file or several with an index, or pytorch_model*.bin; a tokenizer."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from checkpoints.files import pickled, safetensors
from checkpoints.files.stored import NAMES, Stored, inside
from checkpoints.folder import CheckpointError
from checkpoints.formats.base import Readable, Source, Target
from checkpoints.models import gpt2, llama, yuan2
from checkpoints.models.layout import Foreign
from checkpoints.models.model import FREE, Model
from checkpoints.models.tensor import Tensor

FAMILIES: dict[str, ModuleType] = {"gpt2": gpt2, "llama": llama, "yuan": yuan2}  # by config.json's model_type
_OF_FAMILY = {"gpt2": gpt2, "llama": llama, "yuan2": yuan2}
_HEAD, _EMBEDDING = "lm_head.weight", "embedding.word_embeddings.weight"
_SHARD_BYTES = 5_000_000_000  # as `transformers` has long cut its files
# Files that are carried along. The weights' are not, nor what is of no use without them.
TOKENIZER_FILES = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.model", "*.tiktoken", "chat_template.*",
)  # fmt: skip
MODEL_FILES = ("config.json", "generation_config.json", "configuration_*.py", "*_hf_model.py", "modeling_*.py")


# ---- config.json -----------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        CheckpointError: it is not there, or no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no object")
    return config


def model_of(config: Mapping[str, Any], where: str) -> Model:
    """The model that a config.json describes.

    Raises:
        CheckpointError: its family or a value is none that the engine has.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(f"{where}: model_type {kind!r} is none of {', '.join(FAMILIES)}")
    return FAMILIES[kind].from_config(config, where)


def config_for(model: Model, base: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """The config.json of a model: `base`, the one that came with the weights, where it describes this model.

    Raises:
        CheckpointError: `base` (of `where`) describes another model; the differences are named.
    """
    if base is None:
        return _OF_FAMILY[model.family].to_config(model)
    theirs, mine = vars(model_of(base, where)), vars(model)
    if others := [f"{key} {theirs[key]} there, {mine[key]} here" for key in mine if key not in FREE and theirs[key] != mine[key]]:
        raise CheckpointError(f"{where} describes another model: {', '.join(others)}")
    return dict(base)


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


def companions(folder: Path) -> list[Path]:
    """The files of a Hugging Face folder that belong to a model besides its weights."""
    return sorted({path for pattern in (*TOKENIZER_FILES, *MODEL_FILES) for path in folder.glob(pattern) if path.is_file()})


def _tied_copy(folder: Path, found: Mapping[str, Readable], embedding: str) -> str:
    if embedding not in found or found[_HEAD].shape != found[embedding].shape or not torch.equal(found[_HEAD].read(), found[embedding].read()):
        raise CheckpointError(
            f"{folder}: config.json says that {_HEAD} is the embedding (tie_word_embeddings), and {_HEAD} and {embedding} differ;"
            " set tie_word_embeddings to false there if the two are meant"
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
    raise CheckpointError(f"{folder} has no model.safetensors, pytorch_model.bin or index of several (there: {there})")


def _indexed(folder: Path, index: Path, read: Any) -> tuple[dict[str, Readable], list[str]]:
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = list(dict.fromkeys(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read: {type(error).__name__}: {error}", "download it again") from error
    headers = {name: read(inside(folder, name, index)) for name in files}
    found: dict[str, Readable] = {}
    for file, header in headers.items():
        for name, stored in header.items():
            if name in found:
                raise CheckpointError(f"{name} is in two files of {folder}: {file} and another")
            found[name] = stored
    if missing := [name for name, file in places.items() if name not in headers[file]]:
        raise CheckpointError(f"{index} names tensors that are not in their files: {', '.join(missing[:8])}", "download the folder again")
    return found, files


def _read_bin(path: Path) -> dict[str, Readable]:
    content = pickled.read(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no names with tensors")
    found: dict[str, Readable] = {}
    for name, value in content.items():
        if isinstance(value, Stored):
            found[name] = value
        elif isinstance(value, torch.Tensor):
            found[name] = InMemory(value)
        else:
            raise CheckpointError(f"{path}: {name} is no tensor")
    return found


# ---- writing ---------------------------------------------------------------------------------------------------------


class HuggingFace(Target):
    """Writes safetensors, their index and config.json.

    `config` is the whole config.json; `beside` are files that go with it, such as the tokenizer's.
    """

    def __init__(
        self, folder: Path, model: Model, dtypes: Mapping[str, torch.dtype], config: Mapping[str, Any], beside: Mapping[str, Path] | None = None
    ):
        super().__init__(folder, model, dtypes)
        self._config, self._beside = dict(config), beside or {}
        self._table: dict[str, Foreign] = {one.tensor.name: one for one in _OF_FAMILY[model.family].foreign(model)}
        self._shards = self._plan()
        self._files = {name: file for file, entries in self._shards.items() for name, _, _ in entries}
        self._open: tuple[str, safetensors.Writer] | None = None

    def _plan(self) -> dict[str, list[tuple[str, torch.dtype, tuple[int, ...]]]]:
        """What goes into which file: in the model's order, a new file where the next tensor would be too much."""
        shards: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
        size = 0
        for tensor in self.order():
            for name, shape in self._table[tensor.name].shapes().items():
                nbytes = torch.Size(shape).numel() * self.dtypes[tensor.name].itemsize
                if shards[-1] and size + nbytes > _SHARD_BYTES:
                    shards.append([])
                    size = 0
                shards[-1].append((name, self.dtypes[tensor.name], shape))
                size += nbytes
        if len(shards) == 1:
            return {"model.safetensors": shards[0]}
        return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}

    def put(self, tensor: Tensor, whole: torch.Tensor) -> None:
        foreign = self._table[tensor.name]
        for name, piece in zip(foreign.names, foreign.layout.split(whole), strict=True):
            file = self._files[name]
            if self._open is None or self._open[0] != file:
                self._close()
                self._open = file, safetensors.Writer(self.folder / file, self._shards[file])
            self._open[1].write(name, piece)

    def _close(self) -> None:
        if self._open:
            self._open[1].close()

    def finish(self) -> None:
        self._close()
        if len(self._shards) > 1:
            sizes = [torch.Size(shape).numel() * dtype.itemsize for entries in self._shards.values() for _, dtype, shape in entries]
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": self._files}
            write_json(self.folder / "model.safetensors.index.json", index)
        for name, path in self._beside.items():
            shutil.copy2(path, self.folder / name)
        dtypes = {NAMES.get(dtype, str(dtype)) for dtype in self.dtypes.values()}
        if len(dtypes) == 1:
            key = "dtype" if "dtype" in self._config else "torch_dtype"  # transformers 5 reads both, 4 the latter
            self._config[key] = re.sub(r"^torch\.", "", str(next(iter(self.dtypes.values()))))
        write_json(self.folder / "config.json", self._config)


def write_json(path: Path, value: Any) -> None:
    """As `transformers` writes its files."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
