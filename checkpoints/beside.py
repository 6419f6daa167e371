"""What lies beside weights and says what they are: config.json, a conversion's manifest, a tokenizer. Read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.folder import MANIFEST, CheckpointError, is_checkpoint, manifest
from checkpoints.models import published
from checkpoints.models.model import Model
from checkpoints.recognise import Found


@dataclass(frozen=True)
class Beside:
    """What a checkpoint of another tool's says of itself.

    Attributes:
        model: None where only the files of weights may say it.
        where: the file that says it.
        precision: fp32, bf16 or fp16, where it is said.
        companions: the tokenizer's and the model's small files.
    """

    model: Model | None
    where: str
    precision: str | None
    companions: tuple[Path, ...]


def beside(found: Found, hf_config: Path | None = None) -> Beside:
    """What is said beside the weights, which need not be whole but must be there; `hf_config` is a folder whose config.json
    stands for one that is missing.

    Raises:
        CheckpointError: files are missing, what is said cannot be read, or is of a model that the engine has not.
    """
    folder = found.path
    if found.format == "hf":
        published.expect_whole(folder)
    files = tuple(companions(folder) if found.format == "torch" else published.companions(folder))
    made = manifest(folder)
    if found.format != "hf" and isinstance(made.get("model"), dict):
        where = str(folder / MANIFEST)
        return Beside(Model.of(made["model"], where), where, _most_precise(made), files)
    place = folder if found.format == "hf" else hf_config or config_folder(folder)
    if place is None:
        return Beside(None, str(folder), None, files)
    config, where = published.read_config(place), str(place / "config.json")
    return Beside(published.model_of(config, where), where, published.precision_of(config), files)


def _most_precise(made: Mapping[str, Any]) -> str | None:
    kinds = [one.get("dtype") for one in made.get("tensors", {}).values()]
    return next((kind for kind in ("fp32", "bf16", "fp16") if kind in kinds), None)


def companions(folder: Path) -> list[Path]:
    """The tokenizer's and Hugging Face's files in a checkpoint, as runs have them, or beside it, as Pai has them."""
    return sorted({path for place in (folder / "tokenizer", folder / "hf", *above(folder)) for path in published.companions(place)})


def above(folder: Path) -> list[Path]:
    """The folder that a checkpoint is in, where that is one model's: what lies beside any other folder is not its own."""
    here = folder.absolute()  # `.` has a name too
    return [here.parent] if is_checkpoint(here) else []


def config_folder(folder: Path) -> Path | None:
    """Where the config.json of a checkpoint lies: beside it, or in it."""
    return next((place for place in (*above(folder), folder / "hf", folder) if (place / "config.json").is_file()), None)
