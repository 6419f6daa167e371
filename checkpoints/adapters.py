"""What a checkpoint of LoRA's adapters says of itself: their sizes, and the checkpoint whose weights they stand beside.

    iter_0001000/
      lora.json        this: base, fingerprint, rank, alpha, target_modules
      .metadata, …     torch_dist's, with the adapters and their optimizer's state alone

Beside a matrix `linear_qkv.weight` W [out, in] lie `linear_qkv_lora.a` A [rank, in] and `linear_qkv_lora.b` B [out, rank]:
the model computes with W + alpha / rank x B A.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpoints.folder import CheckpointError, read_object
from checkpoints.recognise import RANK, recognise

NOTE = "lora.json"
SUFFIX = "_lora"  # of the adapters' module, behind the name of the matrix that it is of
_WEIGHTS = (".distcp", ".safetensors", ".bin", ".pt", ".ckpt")
_COPY = "the lora.json of another checkpoint of the same run says the same: copy it"
_PIECES, _PIECE = 16, 1 << 16  # of each file 16 pieces of 64 KiB are looked at: another training changes every number


@dataclass(frozen=True)
class Adapters:
    """The content of lora.json.

    Attributes:
        base: absolute path of the checkpoint that holds the weights; of a folder of several the one that was read.
        fingerprint: of its files of weights, by `fingerprint`.
        target_modules: names of the adapted matrices of each layer.
    """

    base: str
    fingerprint: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    def __str__(self) -> str:
        return f"LoRA of rank {self.rank}, alpha {self.alpha:g}, in {', '.join(self.target_modules)}"


def note_of(base: Path, rank: int, alpha: float, target_modules: list[str]) -> Adapters:
    """The note of new adapters beside the checkpoint `base`: a folder of weights, of checkpoints, or of a run.

    Raises:
        CheckpointError: there is none.
    """
    whole = recognise(base).path.resolve()
    return Adapters(str(whole), fingerprint(whole), rank, alpha, tuple(target_modules))


def write_note(folder: Path, note: Adapters) -> None:
    """Put lora.json into a checkpoint's folder."""
    (folder / NOTE).write_text(json.dumps(asdict(note), indent=1) + "\n", encoding="utf-8")


def read_note(checkpoint: Path) -> Adapters | None:
    """The lora.json of a checkpoint's folder; None where it holds whole weights.

    Raises:
        CheckpointError: it is damaged.
    """
    path = checkpoint / NOTE
    if not path.is_file():
        return None
    read = read_object(path, _COPY)
    try:
        note = Adapters(**read | {"target_modules": tuple(read["target_modules"])})
        if note.rank < 1 or not isinstance(note.alpha, (int, float)) or not isinstance(note.base, str):
            raise ValueError("a value of another kind than is written there")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}", _COPY) from error
    return note


def find_base(checkpoint: Path, note: Adapters, also: Path | None = None) -> Path:
    """The checkpoint that the adapters in `checkpoint` stand beside: where lora.json says, or where `also` leads to.

    Raises:
        CheckpointError: it is gone, cannot be read, or its weights have changed since; the fix says how to name it anew.
    """
    places, changed, unread = [Path(note.base)], [], None
    if also is not None:
        try:
            places.append(recognise(also).path.resolve())
        except CheckpointError:
            pass  # what stands in lora.json may do
    for place in dict.fromkeys(places):
        try:
            with _reading(place):
                there = place.is_dir() and any(_files(place))
            if there and fingerprint(place) == note.fingerprint:
                return place
            changed += [place] * there
        except CheckpointError as error:
            unread = error
    if unread:
        raise unread
    fix = f"bring it back, or write where it is now into {checkpoint / NOTE}: \"base\""
    if changed:
        where = " and ".join(map(str, changed))
        raise CheckpointError(f"{checkpoint} holds adapters to the weights of {note.base}, and {where} has other weights now", fix)
    raise CheckpointError(f"{checkpoint} holds adapters to the weights of {note.base}, which is not there", fix)


def find_bases(checkpoint: Path, also: Path | None = None) -> list[Path]:
    """All that the weights of `checkpoint` are made of besides: what its adapters stand beside, which may be adapters again, and so
    on. Empty where it holds whole weights.

    Raises:
        CheckpointError: one of them is gone or has changed.
    """
    found: list[Path] = []
    while note := read_note(checkpoint):
        checkpoint = find_base(checkpoint, note, None if found else also)
        found.append(checkpoint)
    return found


def fingerprint(folder: Path) -> str:
    """Of the files of weights in a checkpoint's folder: names, sizes, and 1 MiB of each. Moving or copying it keeps it.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    found = hashlib.blake2b(digest_size=16)
    with _reading(folder):
        for path in _files(folder):
            size = path.stat().st_size
            found.update(f"{path.relative_to(folder)} {size}\n".encode())
            with open(path, "rb") as file:
                for number in range(_PIECES):
                    file.seek(max(0, size - _PIECE) * number // (_PIECES - 1))
                    found.update(file.read(_PIECE))
    return found.hexdigest()


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"the weights in {folder} cannot be read: {error}", "see to it that they can be, or bring another copy") from error


def _files(folder: Path) -> Iterator[Path]:
    """The weights of the formats of `recognise`, at the top or by rank; not what lies in other folders, or is hidden."""
    places = [folder, *(one for one in folder.iterdir() if one.is_dir() and (RANK.fullmatch(one.name) or one.name.startswith("rank_")))]
    for path in sorted(path for place in places for path in place.iterdir()):
        weights = path.name.endswith(_WEIGHTS) and not path.name.startswith(".") or path.name == ".metadata"
        if weights and path.is_file():
            yield path
