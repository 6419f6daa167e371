"""A model as it is published at Hugging Face, but for its weights: config.json and the files beside it. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from checkpoints.folder import CheckpointError, read_object
from checkpoints.models import gpt2, llama, yuan2
from checkpoints.models.layout import Foreign
from checkpoints.models.model import FREE, Model

FAMILIES: dict[str, ModuleType] = {"gpt2": gpt2, "llama": llama, "yuan": yuan2}  # by config.json's model_type
_OF_FAMILY = {"gpt2": gpt2, "llama": llama, "yuan2": yuan2}
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_POINTER = b"version https://git-lfs"  # what a clone without git-lfs leaves in a file's place
# Files that are carried along. The weights' are not, nor what is of no use without them.
TOKENIZER_FILES = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.model", "*.tiktoken", "chat_template.*",
)  # fmt: skip
MODEL_FILES = ("config.json", "generation_config.json", "configuration_*.py", "*_hf_model.py", "modeling_*.py")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        CheckpointError: it is not there, or no JSON object.
    """
    return read_object(folder / "config.json", "copy or download it again")


def model_of(config: Mapping[str, Any], where: str) -> Model:
    """The model that a config.json describes.

    Raises:
        CheckpointError: its family or a value is none that the engine has.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(f"{where}: model_type {kind!r} is none of {', '.join(FAMILIES)}", "give a model of one of these families")
    model: Model = FAMILIES[kind].from_config(config, where)
    return model


def config_for(model: Model, base: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """The config.json of a model: `base`, the one that came with the weights, where it describes this model.

    Raises:
        CheckpointError: `base` (of `where`) describes another model; the differences are named.
    """
    if base is None:
        config: dict[str, Any] = _OF_FAMILY[model.family].to_config(model)
        return config
    theirs, mine = vars(model_of(base, where)), vars(model)
    if others := [f"{key} {theirs[key]} there, {mine[key]} here" for key in mine if key not in FREE and theirs[key] != mine[key]]:
        raise CheckpointError(f"{where} describes another model: {', '.join(others)}", "leave out --hf-config, or give the folder of this model")
    return dict(base)


def precision_of(config: Mapping[str, Any]) -> str | None:
    """fp32, bf16 or fp16, where a config.json says it."""
    return _PRECISIONS.get(str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch."))


def foreign(model: Model) -> list[Foreign]:
    """Hugging Face's tensors of a model.

    Raises:
        CheckpointError: the model has something that its family has not there.
    """
    found: list[Foreign] = _OF_FAMILY[model.family].foreign(model)
    return found


def describes(folder: Path, model: Model) -> bool:
    """Whether the config.json of a folder is of this model."""
    try:
        return bool(config_for(model, read_config(folder), str(folder / "config.json")))
    except CheckpointError:
        return False


def model_files(folder: Path) -> list[Path]:
    """The files of a Hugging Face folder that describe the model, besides its weights and its tokenizer."""
    return sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})


def companions(folder: Path) -> list[Path]:
    """The files of a Hugging Face folder that belong to a model besides its weights."""
    return sorted({path for pattern in (*TOKENIZER_FILES, *MODEL_FILES) for path in folder.glob(pattern) if path.is_file()})


def expect_whole(folder: Path) -> None:
    """See that the files of weights are there, by their names and their index; what is in them is not looked at.

    Raises:
        CheckpointError: files are missing, as after half a download, or stand for what was not downloaded.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if not (index.is_file() or single.is_file()):
            continue
        names = sorted(_named_in(index)) if index.is_file() else [single.name]
        if missing := [name for name in names if not (folder / name).is_file()]:
            shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            raise CheckpointError(f"{folder} lacks {shown} of its {len(names)} files of weights", "download the rest of the folder")
        for name in names:
            with open(folder / name, "rb") as file:
                if file.read(len(_POINTER)) == _POINTER:
                    raise CheckpointError(
                        f"{folder / name} only points to the weights, as Git without git-lfs leaves it",
                        f"git -C {folder} lfs pull",
                    )
        return
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
    raise CheckpointError(
        f"{folder} has no model.safetensors, pytorch_model.bin or index of several (there: {there})",
        "download the rest of the folder",
    )


def _named_in(index: Path) -> set[str]:
    return set(map(str, weight_map(index).values()))


def weight_map(index: Path) -> dict[str, Any]:
    """Which file holds which tensor, by an index: whatever it names as files.

    Raises:
        CheckpointError: it says no such thing.
    """
    places = read_object(index, "download it again").get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map of tensors to files", "download it again")
    return places
