"""megatron-core's torch_dist: torch's distributed checkpoint, whose files hold chunks of tensors and whose `.metadata`
says where each lies. Read without processes, groups or a model; `checkpoints.formats.torch_dist_target` writes it so.

    release/
      .metadata        pickled: every tensor's shape, its chunks, and their places in the files
      metadata.json    the name of the backend
      common.pt        what is not a tensor: here the settings, as Megatron-LM's `args`
      __0_N.distcp     the chunks, each a whole file of torch.save

Tensors bear the names of Transformer Engine's modules, whichever modules train: norms belong to the layer behind them.
Those of all layers are one tensor, stacked [layer, ...].
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch

from checkpoints.files import pickled
from checkpoints.files.stored import Stored, inside
from checkpoints.folder import CheckpointError, read_object
from checkpoints.formats.base import Readable, Source, by_own_names
from checkpoints.formats.dist_states import key_of_state, state_in
from checkpoints.models.model import Model
from checkpoints.models.tensor import Tensor
from checkpoints.optimizer import NoStateError, with_rows, with_states

_AGAIN = "copy the whole checkpoint again, or take an older one"
Found = TypeVar("Found")
_EMBEDDING = "embedding.word_embeddings.weight"
_LAYERS = "name the recipe that it was trained with, or mend num_layers in the one beside it"


class _Tensor(pickled.Inert):
    """Torch's TensorStorageMetadata; like all in `.metadata` it is what was saved of it, and no object of torch's."""


_PLACE = "torch.distributed.checkpoint."
_ALLOWED = {f"{_PLACE}metadata.{name}": pickled.Inert for name in (
    "Metadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
)} | {
    f"{_PLACE}metadata.TensorStorageMetadata": _Tensor,
    f"{_PLACE}filesystem._StorageInfo": pickled.Inert,
    "torch.Size": tuple,
    "torch.serialization._get_layout": pickled.Inert,
}  # fmt: skip


def key_of(tensor: Tensor, model: Model) -> str:
    """The name of the stacked tensor that holds this one (of one layer), or of this one (around the layers)."""
    if tensor.layer is None:
        return tensor.name
    moved = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if model.family != "yuan2":  # its filter stands between the norm and the query
        moved["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    within = tensor.within
    for norm, behind in moved.items():
        within = within.replace(norm, behind)
    return f"{tensor.state}decoder.layers.{within}"



@dataclass(frozen=True)
class Chunks:
    """A tensor in one or several chunks: each where it begins in the tensor, its size, and its place (file, offset, length)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[Path, int, int]], ...]

    def read(self) -> torch.Tensor:
        """The whole; of one chunk a view of the file."""
        pieces = [(start, size, self._stored(*place).reshape(size)) for start, size, place in self.chunks]
        if len(pieces) == 1:
            return pieces[0][2]
        whole = torch.empty(self.shape, dtype=self.dtype)
        for start, size, piece in pieces:
            whole[tuple(slice(at, at + length) for at, length in zip(start, size, strict=True))] = piece
        return whole

    @staticmethod
    def _stored(path: Path, offset: int, length: int) -> torch.Tensor:
        found = pickled.read(path, offset, length)
        if not isinstance(found, Stored):
            raise CheckpointError(f"{path} is damaged: no tensor at byte {offset:,}", _AGAIN)
        return found.read()


def settings(folder: Path) -> Namespace:
    """The settings of the training in common.pt, under Megatron-LM's names; empty where there are none."""
    args = _common(folder).get("args")
    return args if isinstance(args, Namespace) else Namespace()


def _common(folder: Path) -> dict[str, Any]:
    path = folder / "common.pt"
    common = pickled.read(path) if path.is_file() else {}
    return common if isinstance(common, dict) else {}


def open_source(folder: Path, model: Model, states: bool = False) -> Source:
    """A checkpoint folder (`iter_…`, `release`) of any tensor, pipeline and data parallelism, with or without optimizer;
    with `states` the optimizer's tensors too, and all rows of the vocabulary.

    Raises:
        CheckpointError: it is damaged, or does not hold this model; a NoStateError where it holds no optimizer.
    """
    backend = read_object(folder / "metadata.json", _AGAIN).get("sharded_backend")
    if backend != "torch_dist":
        raise CheckpointError(f"{folder} is in megatron-core's format {backend!r}, and torch_dist is read", "save it with --ckpt-format torch_dist")
    known = _known(folder)
    index = _parsed(known, folder, _tensors)
    table, state = by_own_names(model), None
    if states:
        common = _common(folder)
        if "optimizer" not in common and not any(key.startswith("optimizer.") for key in index):
            raise NoStateError(f"{folder} holds no optimizer's state", "leave out --optimizer, for the weights alone")
        rows = [index[_EMBEDDING]] if _EMBEDDING in index else []
        table, state = with_states(by_own_names(with_rows(model, rows))), state_in(folder, common, _parsed(known, folder, _objects))
    halves = any(one.dtype != torch.float32 for key, one in index.items() if not key.startswith("optimizer."))
    keys = {one.tensor.name: key_of(one.tensor, model) for one in table}
    if state is not None:
        keys = {one.tensor.name: key_of_state(one.tensor, keys[one.tensor.name], state.form, halves) for one in table}
    found: dict[str, Readable] = {}
    taken: set[str] = set()
    for tensor in (one.tensor for one in table):
        key = keys[tensor.name]
        if key in index:
            if tensor.layer is not None and index[key].shape[:1] != (model.num_layers,):
                layers = index[key].shape[0] if index[key].shape else "no"
                raise CheckpointError(f"{folder}: {key} is of {layers} layers, and the model has {model.num_layers}", _LAYERS)
            found[tensor.name] = index[key] if tensor.layer is None else of_layer(index[key], tensor.layer)
        elif tensor.layer is not None and (apart := key.replace("layers.", f"layers.{tensor.layer}.", 1)) in index:
            key = apart  # layers that differ are not stacked
            found[tensor.name] = index[apart]
        taken.add(key)
    left_out = {key: "the optimizer's: weights alone are converted, unless --optimizer keep" for key in index if key.startswith("optimizer.")}
    left_out = left_out if state is None else dict(state.left_out)
    more = {f"{key}, besides the stacked one" if key in found else key: one for key, one in index.items() if key not in taken and key not in left_out}
    return Source(
        "torch_dist", folder, model, table, found | more, left_out, padded=True, training=vars(settings(folder)),
        companions=sorted(path for place in ("tokenizer", "hf") for path in (folder / place).glob("*") if path.is_file()), state=state,
    )  # fmt: skip


def read_index(folder: Path) -> dict[str, Chunks]:
    """Every tensor of `.metadata`, with its chunks' places."""
    return _parsed(_known(folder), folder, _tensors)


def _known(folder: Path) -> Any:
    path = folder / ".metadata"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no .metadata: it was not written to its end", _AGAIN)
    return pickled.Unpickler(path.read_bytes(), _ALLOWED, path).read()


def _objects(known: Mapping[str, Any], folder: Path, path: Path) -> dict[str, tuple[Path, int, int]]:
    """The places of what is no tensor, by key: file, offset, length."""
    places = {index.state["fqn"]: info.state for index, info in known["storage_data"].items()}
    found = {
        key: (inside(folder, info["relative_path"], path), info["offset"], info["length"])
        for key, info in places.items()
        if not isinstance(known["state_dict_metadata"].get(key), _Tensor)
    }
    if wrong := [key for key, (file, offset, length) in found.items() if min(offset, length) < 0 or offset + length > file.stat().st_size]:
        raise CheckpointError(f"{path} is damaged, or a file is cut off: {wrong[0]} lies outside it", _AGAIN)
    return found


def _parsed(known: Any, folder: Path, parse: Callable[[Any, Path, Path], Found]) -> Found:
    path = folder / ".metadata"
    try:
        return parse(known.state, folder, path)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: it is no index of tensors ({type(error).__name__}: {error})", _AGAIN) from error


def _tensors(known: Mapping[str, Any], folder: Path, path: Path) -> dict[str, Chunks]:
    places = {(index.state["fqn"], index.state.get("offset")): info.state for index, info in known["storage_data"].items()}
    files: dict[str, Path] = {}
    sizes: dict[str, int] = {}
    found = {}
    for key, entry in known["state_dict_metadata"].items():
        if not isinstance(entry, _Tensor):
            continue  # an object, such as the state of a random number generator
        chunks = []
        for chunk in entry.state["chunks"]:
            start, size = (tuple(chunk.state[name]) for name in ("offsets", "sizes"))
            info = places.get((key, start))
            if info is None or info.get("transform_descriptors"):
                raise CheckpointError(f"{path} does not say where {key} lies, or it is packed by an extension", _AGAIN)
            file, offset, length = (info[name] for name in ("relative_path", "offset", "length"))
            if file not in files:
                files[file] = inside(folder, file, path)
                sizes[file] = files[file].stat().st_size
            if offset < 0 or offset + length > sizes[file]:
                what = f"is cut off: {key} should end at byte {offset + length:,}, and the file at {sizes[file]:,}"
                raise CheckpointError(f"{files[file]} {what}", _AGAIN)
            chunks.append((start, size, (files[file], offset, length)))
        dtype = entry.state["properties"].state[0]
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{path} does not say of which type {key} is", _AGAIN)
        found[key] = Chunks(tuple(entry.state["size"]), dtype, tuple(chunks))
        if not _whole(found[key]):
            raise CheckpointError(f"{path} is damaged: the chunks of {key} do not make up {list(found[key].shape)}", _AGAIN)
    return found


def _whole(one: Chunks) -> bool:
    """Whether its chunks cover it, and each number lies in one alone."""
    if sum(prod(size) for _, size, _ in one.chunks) != prod(one.shape):
        return False
    spans = sorted([(at, at + length) for at, length in zip(start, size, strict=True)] for start, size, _ in one.chunks)
    for number, span in enumerate(spans):
        if len(span) != len(one.shape) or any(not 0 <= a <= b <= end for (a, b), end in zip(span, one.shape, strict=True)):
            return False
        for other in spans[number + 1 :]:
            if not span or other[0][0] >= span[0][1]:
                break  # sorted: those behind begin later still
            if all(a < d and c < b for (a, b), (c, d) in zip(span, other, strict=True)):
                return False
    return True


def of_layer(stacked: Chunks, layer: int) -> Chunks:
    """One layer's tensor of a stacked one."""
    chunks = tuple((start[1:], size[1:], place) for start, size, place in stacked.chunks if start[0] == layer and size[0] == 1)
    shape = stacked.shape[1:]
    if sum(prod(size) for _, size, _ in chunks) != prod(shape):
        shape = ()  # no such layer: told as a wrong shape
    return Chunks(shape, stacked.dtype, chunks)
