"""Which format a checkpoint is in, told from the names of its files: nothing is read but names and sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from checkpoints.folder import CheckpointError, newest_checkpoint
from checkpoints.part import MARK

RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
_MINDSPORE_RANK = re.compile(r"rank_(0|[1-9]\d*)")
QUANTIZED = ("torch_dist", "mindspore")  # formats that have int8 weights
OPTIMIZER = "optim.pt"  # of Megatron-LM of early 2023: a share of the distributed optimizer's state, in a folder of its own
RANK_FILES = ("model_optim_rng.pt", "model_rng.pt")  # Megatron-LM's and Yuan's; Pai's of 2023 with the distributed optimizer


@dataclass(frozen=True)
class Found:
    """A checkpoint on the disk.

    Attributes:
        path: the folder that holds the weights, such as `.../iter_0001000`.
        format: torch_dist; torch, one file per rank, which Megatron-LM, Yuan 2.0 and Pai share; hf; mindspore.
        tensor, pipeline: ranks of `torch` and `mindspore`, 1 elsewhere.
        size: bytes of all its files.
    """

    path: Path
    format: Literal["torch_dist", "torch", "hf", "mindspore"]
    tensor: int
    pipeline: int
    size: int


def recognise(path: Path) -> Found:
    """The checkpoint that `path` means: a folder of weights, or a folder of checkpoints or of a run, of which the newest.

    Raises:
        CheckpointError: nothing there is a checkpoint, ranks are missing, or a conversion was not ended.
    """
    if not path.is_dir():
        raise CheckpointError(f"no such folder: {path}" if not path.exists() else f"{path} is a file, and a checkpoint is a folder")
    if (path / MARK).is_file():
        raise CheckpointError(f"{path} is a conversion that was not ended", "type the command that began it again: it goes on with what is written")
    folder = checkpoint_in(path)
    if _is_mindspore(folder):
        return Found(folder, "mindspore", len(mindspore_ranks(folder)), 1, _size(folder))
    if _is_huggingface(folder):
        return Found(folder, "hf", 1, 1, _size(folder))
    if (folder / "metadata.json").is_file():
        return Found(folder, "torch_dist", 1, 1, _size(folder))
    if not any(RANK.fullmatch(one.name) and not _is_optimizers(one) for one in folder.iterdir()):
        raise CheckpointError(f"{folder} is in no known format: neither metadata.json nor mp_rank_* is in it")
    return Found(folder, "torch", *_grid(folder), _size(folder))


def checkpoint_in(path: Path) -> Path:
    """The folder of weights that `path` means: itself, or the newest in a folder of checkpoints or of a run.

    Raises:
        CheckpointError: there is none.
    """
    itself = path.is_dir() and (_is_mindspore(path) or _is_huggingface(path) or _is_whole(path))
    return path if itself else newest_checkpoint(path)


def _is_mindspore(path: Path) -> bool:
    return bool(list(path.glob("rank_*/*.ckpt")))


def _is_huggingface(path: Path) -> bool:
    return (path / "config.json").is_file() and any(one for kind in ("*.safetensors", "*.bin", "*.index.json") for one in path.glob(kind))


def _is_whole(path: Path) -> bool:
    return (path / "metadata.json").is_file() or any(RANK.fullmatch(one.name) for one in path.iterdir())


def _grid(folder: Path) -> tuple[int, int]:
    """TP and PP of a folder of mp_rank_TT[_PPP], each of which must hold its weights."""
    ranks = [match for one in folder.iterdir() if (match := RANK.fullmatch(one.name)) and not _is_optimizers(one)]
    tensor, pipeline = (1 + max(int(match[group] or 0) for match in ranks) for group in (1, 2))
    if any(match[2] for match in ranks):
        pipeline = max(pipeline, 2)  # of one stage alone none would be named
    names = [f"mp_rank_{t:02d}" + (f"_{p:03d}" if pipeline > 1 else "") for p in range(pipeline) for t in range(tensor)]
    missing = [name for name in names if not any((folder / name / file).is_file() for file in RANK_FILES)]
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise CheckpointError(
            f"{folder} has no weights ({' or '.join(RANK_FILES)}) for {shown} of its {len(names)} ranks" + _instead(folder / missing[0]), "copy the missing ranks there"
        )
    return tensor, pipeline


def _is_optimizers(rank: Path) -> bool:
    """Whether a folder has no weights but a share of the distributed optimizer, as Megatron-LM of early 2023 kept them: behind the
    rank's name stands a data-parallel rank, `mp_rank_00_000`, which could be a pipeline stage."""
    return (rank / OPTIMIZER).is_file() and not any((rank / file).is_file() for file in RANK_FILES)


def _instead(rank: Path) -> str:
    """What a rank's folder holds instead of its weights: they may have another name there."""
    there = ", ".join(sorted(one.name for one in rank.iterdir())[:4]) if rank.is_dir() else ""
    return f" ({rank.name} holds {there})" if there else ""


def mindspore_ranks(path: Path) -> list[Path]:
    """The folders `rank_0`, `rank_1`, … of MindSpore's checkpoint, in this order, each of which holds a .ckpt.

    Raises:
        CheckpointError: ranks are missing, or a folder is there that may be a rank's or not, such as `rank_0_old`.
    """
    holding = {one.parent.name for one in path.glob("rank_*/*.ckpt")}
    if others := sorted(name for name in holding if not _MINDSPORE_RANK.fullmatch(name)):
        what = f"{path} holds a .ckpt in {', '.join(others[:4])}, no rank's folder (rank_0, rank_1, …)"
        raise CheckpointError(what, "move it elsewhere, or rename it")
    count = 1 + max(int(match[1]) for one in path.iterdir() if (match := _MINDSPORE_RANK.fullmatch(one.name)))
    if missing := [name for rank in range(count) if (name := f"rank_{rank}") not in holding]:
        raise CheckpointError(f"{path} has no .ckpt for {', '.join(missing[:4])} of its {count} ranks", "copy the missing ranks there")
    return [path / f"rank_{rank}" for rank in range(count)]


def _size(path: Path) -> int:
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())
