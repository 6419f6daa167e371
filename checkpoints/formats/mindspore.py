"""MindSpore's checkpoints of Llama: `rank_0/NAME.ckpt`, `rank_1/…`, a file for each tensor-parallel rank.

The files say nothing of the model but shapes. What is written here has a config.json beside the ranks, as Hugging Face
has it, which is read again. Neither MindSpore, a strategy file nor a compiled model is needed: how a tensor is shared out
follows from its name. A training's pipeline stages and data-parallel copies are recognised by the tensors that ranks hold.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from checkpoints.files import mindspore as file
from checkpoints.files.placed import Place
from checkpoints.files.stored import Buffer
from checkpoints.folder import MANIFEST, CheckpointError, UnsaidError, manifest
from checkpoints.formats.base import Piece, Readable, Source, Target
from checkpoints.formats.hf import write_json
from checkpoints.formats.shares import RANKS, Shares, expect_alike, same
from checkpoints.models import gpt, mindformers
from checkpoints.models.mindformers import Cut, Fused
from checkpoints.models.model import Model
from checkpoints.models.published import TOKENIZER_FILES, model_of, read_config
from checkpoints.models.tensor import Tensor
from checkpoints.recognise import mindspore_ranks

Rank = Mapping[str, Readable]


@dataclass(frozen=True)
class _Copied:
    """A tensor of which data-parallel replicas, of `first` and the ranks after it, hold the shares again and again."""

    shares: Shares
    copies: tuple[Readable, ...]
    first: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shares.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.shares.dtype

    def read(self) -> torch.Tensor:
        """The whole.

        Raises:
            CheckpointError: a rank holds something else than the one whose copy it should be.
        """
        width = len(self.shares.shares)
        for number, copy in enumerate(self.copies):
            if not same(self.shares.shares[number % width], copy):
                rank, other = self.first + width + number, self.first + number % width
                what = f"rank_{rank} should hold a data-parallel copy of rank_{other}'s, and holds something else"
                raise CheckpointError(f"{self.shares.tensor.name}: {what}", RANKS)
        return self.shares.read()


_TABLE, _WO = "model.tok_embeddings.embedding_weight", "attention.wo."
_TABLES = (_TABLE, "lm_head.weight")


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_ranks(folder: Path) -> list[dict[str, file.Pieces]]:
    """The tensors of each rank. Of several files of a rank the one whose name ends in the highest number, as MindSpore has it.

    Raises:
        CheckpointError: a file is damaged, or ranks are missing.
    """
    return [file.read(rank_file(path)) for path in mindspore_ranks(folder)]


def rank_file(folder: Path) -> Path:
    """The file of a rank."""
    return max(folder.glob("*.ckpt"), key=lambda path: ([int(number) for number in re.findall(r"\d+", path.stem)], path.name))


def open_source(folder: Path, model: Model | None = None, fused: Fused | None = None, hf_config: Path | None = None) -> Source:
    """A folder of ranks.

    Args:
        model: what it is a model of, its vocab_size 0 where that is all rows there are.
        hf_config: else the folder whose config.json says it; else the ranks' own folder is.
        fused: how fused matrices lie, concat or grouped, where no conversion.json beside the ranks says it.

    Raises:
        CheckpointError: it is damaged, does not hold this model, or does not say how its matrices lie.
    """
    model, fused = model or _model(folder, hf_config), _own_layout(folder) or fused
    ranks = read_ranks(folder)
    left_out = {name: why for rank in ranks for name in rank if (why := mindformers.no_weight(name))}
    weights = [{name: one for name, one in rank.items() if name not in left_out} for rank in ranks]
    zeros_alone(ranks)
    stages = _stages(weights)
    names = {name for rank in weights for name in rank}
    if any("._layer." in name for name in names):
        model = replace(model, quantize="int8")
    width = _width(stages[0], model)
    cut = Cut(width, _kind(folder, names, mindformers.W_QKV, fused), _kind(folder, names, mindformers.W_GATE_HIDDEN, fused))
    scale = next((one for one in mindformers.SCALES if any(name.endswith(one) for name in names)), mindformers.SCALES[0])
    axes = {name: axis for one, axis in mindformers.foreign(model, cut, scale) for name in one.names}
    found: dict[str, Readable] = {}
    for at, stage in zip(range(0, len(ranks), len(stages[0])), stages, strict=True):
        if len(stage) > width:
            left_out[f"rank_{at + width} to {at + len(stage) - 1}"] = f"data-parallel copies of rank_{at} to {at + width - 1}"
        for name, shares in _put_together(folder, stage[:width], axes).items():
            copies = tuple(rank[name] for rank in stage[width:])
            whole = _Copied(shares, copies, at) if copies else shares
            if name in found and not same(found[name], whole):
                raise CheckpointError(f"{folder}: {name} is on two pipeline stages, and that of rank_{at} is not the one before", RANKS)
            found[name] = whole
    if not model.vocab_size:
        model = replace(model, vocab_size=found[_TABLE].shape[0] if _TABLE in found else 1)
    table = mindformers.foreign(model, cut, scale)
    return Source(
        "mindspore", folder, model, [one for one, _ in table], found, left_out, padded=True,
        companions=sorted(path for pattern in (*TOKENIZER_FILES, "config.json", "generation_config.json") for path in folder.glob(pattern)),
    )  # fmt: skip


def zeros_alone(ranks: Sequence[Rank]) -> None:
    """Quantized weights that are not symmetric are refused: their zero points would be lost.

    Raises:
        CheckpointError: naming the first.
    """
    for rank in ranks:
        for name, one in rank.items():
            if name.endswith(mindformers.ZERO_POINT) and one.read().any():
                raise CheckpointError(
                    f"{name} has zero points other than 0: only symmetric weights can be read",
                    "quantize the weights anew from the original ones: --quantize int8",
                )


def _stages(ranks: list[dict[str, Readable]]) -> list[list[dict[str, Readable]]]:
    """Pipeline stages: ranks that follow one another and hold the same tensors."""
    stages: list[list[dict[str, Readable]]] = []
    for rank in ranks:
        if stages and stages[-1][0].keys() == rank.keys():
            stages[-1].append(rank)
        else:
            stages.append([rank])
    if any(len(stage) != len(stages[0]) for stage in stages):
        raise CheckpointError(
            f"the ranks' tensors are not those of pipeline stages: {', '.join(str(len(stage)) for stage in stages)} ranks hold the same",
            RANKS,
        )
    return stages


def _width(stage: Sequence[Rank], model: Model) -> int:
    """Over how many ranks tensors are shared out: by the columns of the attention's output matrix."""
    columns = next((one.shape[1] for name, one in stage[0].items() if _WO in name and len(one.shape) == 2), 0)
    whole = model.num_attention_heads * model.kv_channels
    if not columns or whole % columns or len(stage) % (whole // columns):
        raise CheckpointError(
            f"a rank has {columns} of the {whole} columns of attention.wo, and {len(stage)} ranks cannot hold the model so",
            f"{RANKS}; if they are, another config.json: --hf-config",
        )
    return whole // columns


def _kind(folder: Path, names: set[str], fused_name: str, fused: Fused | None) -> Fused:
    if not any(f".{fused_name}." in name for name in names):
        return "separate"
    if fused not in ("concat", "grouped"):
        what = "does not say how its rows lie: --source-fused-layout concat (MindFormers to 1.3) or grouped (from 1.5)"
        raise UnsaidError(f"{folder} has {fused_name}, which {what}", "--source-fused-layout concat or grouped")
    return fused


def _put_together(folder: Path, stage: Sequence[Rank], axes: Mapping[str, int | None]) -> dict[str, Shares]:
    """A stage's tensors, whole. Ranks may share out the vocabulary's tables or hold all of them, whatever the sizes: of one
    table they hold the same first row, of shares each another."""
    found: dict[str, Shares] = {}
    for name, one in stage[0].items():
        shares = tuple(rank[name] for rank in stage)
        expect_alike(folder, name, shares)
        whole = name in _TABLES and len(one.shape) == 2 and all(torch.equal(share.read()[:1], one.read()[:1]) for share in shares)
        found[name] = Shares(Tensor(name, one.shape, None if whole else axes.get(name)), shares)
    return found


def _model(folder: Path, hf_config: Path | None) -> Model:
    if hf_config is None and not (folder / "config.json").is_file():
        what = "says the shapes of its tensors, and not what the model is: --hf-config DIR with its config.json, or a recipe with it"
        raise UnsaidError(f"{folder} {what}", "--hf-config FOLDER, with its config.json")
    place = hf_config or folder
    return model_of(read_config(place), str(place / "config.json"))


def agree_layout(folder: Path, fused: str) -> None:
    """The conversion that wrote the ranks must not say otherwise than `fused` how fused matrices lie.

    Raises:
        CheckpointError: it does.
    """
    if (own := _own_layout(folder) or fused) != fused:
        raise CheckpointError(
            f"{folder / MANIFEST} says that fused matrices lie as {own}, and --source-fused-layout says {fused}",
            "leave out --source-fused-layout",
        )


def _own_layout(folder: Path) -> Fused | None:
    found = manifest(folder)
    own = found.get("fused_layout")
    if found and own not in get_args(Fused):
        raise CheckpointError(
            f"{folder / MANIFEST}: fused_layout is {own!r}, and {', '.join(get_args(Fused))} are known",
            f"move {MANIFEST} elsewhere, and give --source-fused-layout",
        )
    return own


# ---- writing ---------------------------------------------------------------------------------------------------------


class MindSpore(Target):
    """Writes a folder of ranks, and `config` and the files of `beside` for readers that know no MindSpore."""

    def __init__(
        self, folder: Path, model: Model, dtypes: Mapping[str, torch.dtype], ranks: int, fused: Fused,
        config: Mapping[str, Any], beside: Mapping[str, Path],
    ):  # fmt: skip
        table = {one.tensor.name: (one, axis) for one, axis in mindformers.foreign(model, Cut(ranks, fused, fused))}
        self._table, self._ranks, self._config, self._beside = table, ranks, config, beside
        self._places: dict[str, int] = {}
        size = 0
        for tensor in gpt.tensors(model):  # every rank's file has the same tensors, of the same shapes
            foreign, axis = table[tensor.name]
            for name, shape in foreign.shapes().items():
                self._places[name] = size
                share = tuple(length // (ranks if number == axis else 1) for number, length in enumerate(shape))
                size += sum(len(head) + stop - start for head, start, stop in file.slices(name, dtypes[tensor.name], share))
        super().__init__(folder, model, dtypes, {_file(rank): size for rank in range(ranks)})

    def pieces(self, tensor: Tensor, whole: torch.Tensor) -> Iterator[Piece]:
        foreign, axis = self._table[tensor.name]
        for name, piece in zip(foreign.names, foreign.layout.split(whole), strict=True):
            shares = [piece] * self._ranks if axis is None else piece.chunk(self._ranks, axis)
            for rank, share in enumerate(shares):
                around = partial(_whole, name, share.dtype, tuple(share.shape))
                yield Piece(Place(_file(rank), self._places[name]), [share], around)

    def complete(self) -> None:
        for rank in range(self._ranks):
            file.end(self.folder / _file(rank))
        for name, path in self._beside.items():
            shutil.copy2(path, self.folder / name)
        write_json(self.folder / "config.json", self._config)


def _file(rank: int) -> str:
    return f"rank_{rank}/checkpoint_{rank}.ckpt"


def _whole(name: str, dtype: torch.dtype, shape: tuple[int, ...], contents: list[memoryview]) -> list[Buffer]:
    return file.whole(name, dtype, shape, contents[0])
