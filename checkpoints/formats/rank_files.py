"""A file of torch.save per tensor-parallel rank and stage, `mp_rank_TT[_PPP]/model_optim_rng.pt`, in any of the dialects.

Stages may hold any number of layers, and several parts of the model (interleaved, `model0`, `model1`): how many layers each
holds is counted in the files, whatever the settings in them say.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from checkpoints.beside import companions, config_folder
from checkpoints.files import pickled
from checkpoints.files.stored import Stored
from checkpoints.folder import CheckpointError
from checkpoints.formats import hf
from checkpoints.formats.base import Readable, Source
from checkpoints.formats.dialects import core, pai, unfused, yuan
from checkpoints.formats.rank_states import FLAT, bucket_of, read_states
from checkpoints.formats.shares import RANKS, Shares, expect_alike, same
from checkpoints.models import legacy, megatron, published
from checkpoints.models.layout import Foreign
from checkpoints.models.model import Model
from checkpoints.models.tensor import Tensor
from checkpoints.optimizer import KINDS, PREFIX, NoStateError, TrainingState, read_state, with_rows, with_states
from checkpoints.recognise import OPTIMIZER, RANK_FILES

_LAYER = re.compile(r"((?:^|.*\.)layers\.)(\d+)(\..*)")
_OF_TRAINING = ("optimizer", "opt_param_scheduler", "rng_state", "rerun_state_machine")
_ALONE = "the training's: weights alone are converted, unless --optimizer keep"


def rank_name(tensor: int, stage: int, stages: int) -> str:
    """The folder of a rank: `mp_rank_TT`, with `_PPP` behind it where there are several stages."""
    return f"mp_rank_{tensor:02d}" + (f"_{stage:03d}" if stages > 1 else "")


# ---- the files -------------------------------------------------------------------------------------------------------


class _Found:
    """All tensors of a folder under the names that they would have on one stage, each rank's share apart."""

    def __init__(self, folder: Path, tensor: int, pipeline: int, states: bool = False):
        """With `states` the optimizer's too."""
        self.folder, self.pipeline, self.states = folder, pipeline, states
        self.shares: dict[str, tuple[Readable, ...]] = {}
        self.left_out: dict[str, str] = {}
        self.layers: list[int] = []  # of each part of the model, in the order in which it computes
        grid = [[self._rank(rank_name(t, p, pipeline)) for t in range(tensor)] for p in range(pipeline)]
        self.grid = grid
        if any(folder.glob(f"mp_rank_*/{OPTIMIZER}")):
            self.left_out[OPTIMIZER] = "the optimizer's of a Megatron-LM of early 2023, which is not carried"
        if states and not {"optimizer", FLAT} & self.left_out.keys():
            raise NoStateError(f"{folder} holds no optimizer's state", "leave out --optimizer, for the weights alone")
        self.settings = vars(grid[0][0]["args"]) if isinstance(grid[0][0].get("args"), Namespace) else {}
        self.version = self._one([rank for stage in grid for rank in stage], "checkpoint_version", 0)
        self._one([rank for stage in grid for rank in stage], "iteration", 0)
        counts = {len(_models(rank)) for stage in grid for rank in stage}
        if len(counts) > 1:
            several = " and ".join(map(str, sorted(counts)))
            raise CheckpointError(f"{folder}: its ranks are not of one checkpoint, they hold {several} parts of the model", RANKS)
        parts = [[self._parts(rank, t, p) for t, rank in enumerate(stage)] for p, stage in enumerate(grid)]
        for part in range(counts.pop()):
            for p, stage in enumerate(parts):
                self._add(p, [rank[part] for rank in stage])

    def _rank(self, name: str) -> dict[str, Any]:
        path = next(path for file in RANK_FILES if (path := self.folder / name / file).is_file())
        content = pickled.read(path)
        if not isinstance(content, dict) or not _models(content):
            keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
            raise CheckpointError(f"{path} holds no model, but {keys[:200]}", "give the folder of a checkpoint with its weights")
        self.left_out |= {key: _ALONE for key in _OF_TRAINING if content.get(key)}
        if path.with_name(FLAT).is_file():
            self.left_out[FLAT] = _ALONE
        return content

    def _parts(self, rank: dict[str, Any], t: int, p: int) -> list[dict[str, Any]]:
        """The tensors of each part of the model on a rank, by name."""
        parts = [dict(_flat(one)) for one in _models(rank)]
        if not self.states or any(name.startswith("language_model.") for name in parts[0]):
            return parts
        folder = self.folder / rank_name(t, p, self.pipeline)
        weights = [{name: one for name, one in part.items() if isinstance(one, (Stored, torch.Tensor)) and not _no_weight(name)} for part in parts]
        form, states = read_states(folder, RANK_FILES[0], rank.get("optimizer") or {}, weights, bucket_of(self.settings, p))
        self.form = form
        return [{**part, **more} for part, more in zip(parts, states, strict=True)]

    def state(self) -> TrainingState:
        """Where the training stands.

        Raises:
            CheckpointError: the ranks' files hold no such thing.
        """
        last = self.grid[-1][0]  # losses that are not told yet are the last stage's
        content = {**self.grid[0][0], **{key: last[key] for key in ("pending", "best") if key in last}}
        random = {(p, t): rank["rng_state"] for p, stage in enumerate(self.grid) for t, rank in enumerate(stage) if rank.get("rng_state")}
        grads = pickled.read(self.folder / rank_name(0, 0, self.pipeline) / FLAT) if self.form == "distributed" else {}
        types = [key[1] for buffer in grads.values() if isinstance(buffer, Mapping) for key in buffer if isinstance(key, tuple) and len(key) == 2]
        return read_state(
            content, self.form, f"{self.folder}/{rank_name(0, 0, self.pipeline)}/{RANK_FILES[0]}", random=random,
            grid=(self.pipeline, len(self.grid[0])), grads=types[0] if types and isinstance(types[0], torch.dtype) else None,
        )  # fmt: skip

    def _one(self, ranks: list[dict[str, Any]], key: str, unsaid: Any) -> Any:
        """A number that the files of all ranks should have alike."""
        if not all(isinstance(rank.get(key, unsaid), (int, float)) for rank in ranks):
            raise CheckpointError(f"{self.folder} is damaged: {key} is no number", RANKS)
        if len(found := {rank.get(key, unsaid) for rank in ranks}) > 1:
            raise CheckpointError(
                f"{self.folder}: its ranks are not of one checkpoint, they say {key} {' and '.join(sorted(map(str, found)))}",
                RANKS,
            )
        return found.pop()

    def _add(self, stage: int, ranks: list[dict[str, Any]]) -> None:
        """One part of the model on one stage."""
        before, numbers = sum(self.layers), [int(match[2]) for name in ranks[0] if (match := _LAYER.fullmatch(name))]
        self.layers.append(1 + max(numbers, default=-1))
        for name in dict.fromkeys(name for rank in ranks for name in rank):
            if lacking := [t for t, rank in enumerate(ranks) if name not in rank]:
                where = " and ".join(rank_name(t, stage, self.pipeline) for t in lacking)
                raise CheckpointError(f"{self.folder}: {where} has no {name}, which other tensor-parallel ranks have", RANKS)
            match = _LAYER.fullmatch(name)
            whole = f"{match[1]}{int(match[2]) + before}{match[3]}" if match else name
            self._take(whole, stage, [rank[name] for rank in ranks])

    def _take(self, name: str, stage: int, values: list[Any]) -> None:
        if why := _no_weight(name):
            if values[0] is not None:
                self.left_out[name] = why
        elif not all(isinstance(value, (Stored, torch.Tensor)) for value in values):
            self.left_out[name] = "no tensor"
        else:
            shares = tuple(value if isinstance(value, Stored) else hf.InMemory(value) for value in values)
            expect_alike(self.folder, name, shares)
            if name not in self.shares:
                self.shares[name] = shares
            elif _all_same(shares, self.shares[name]):
                self.left_out[f"{name} of stage {stage}"] = "a copy of an earlier stage's"
            else:
                raise CheckpointError(f"{self.folder}: {name} is on two stages, and stage {stage}'s differs from the one before", RANKS)


def _no_weight(name: str) -> str:
    """Why a name is of no weight, or nothing."""
    if name.endswith("_extra_state"):
        return "a state of Transformer Engine's, of use with FP8 alone"
    return "RoPE's frequencies" if name.endswith("rotary_emb.inv_freq") else ""


def _models(rank: Mapping[str, Any]) -> list[Any]:
    """The parts of the model that a rank holds: several where stages are interleaved."""
    if "model" in rank:
        return [rank["model"]]
    return [rank[f"model{part}"] for part in range(len(rank)) if f"model{part}" in rank]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries, their names joined by dots, and as the latest releases have them."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _flat(one, f"{name}.{key}" if name else str(key))
        return
    if name.startswith("language_model."):
        for alias, usual in legacy.ALIASES.items():
            name = name.replace(alias, usual)
    yield unfused(name), value


def _all_same(shares: Sequence[Readable], others: Sequence[Readable]) -> bool:
    return all(same(one, other) for one, other in zip(shares, others, strict=True))


# ---- the model -------------------------------------------------------------------------------------------------------


def open_source(
    folder: Path, tensor: int, pipeline: int, model: Model | None = None, vocab_size: int | None = None, hf_config: Path | None = None,
    states: bool = False,
) -> Source:  # fmt: skip
    """A folder of `tensor` x `pipeline` files, in whichever of the dialects they are.

    Args:
        model: what it is a model of, where something beside the weights says it; else what the files, or for yuan and pai a
            config.json beside them, say.
        vocab_size: ids before padding, where nothing there says it.
        hf_config: a folder with the model's config.json.
        states: the optimizer's tensors too, and all rows of the vocabulary.

    Raises:
        CheckpointError: it is damaged, ranks do not agree, it does not hold this model, or does not say what the model is; a
            NoStateError where no rank holds an optimizer.
    """
    found = _Found(folder, tensor, pipeline, states)
    if any(name.startswith("language_model.") for name in found.shares):
        format, model, table = _legacy(found, tensor, model, vocab_size, hf_config)
    else:
        model = model or (_of_config(hf_config, vocab_size) if hf_config else None)
        format, model = "torch", model or megatron.model_with_ids(found.settings, f"{folder} (args)", vocab_size)
        table = core().foreign(with_rows(model, found.shares.get("embedding.word_embeddings.weight", ())) if states else model)
    if found.version < 2 and any("query_key_value" in name or "linear_qkv" in name for name in found.shares):
        raise CheckpointError(
            f"{folder} is of checkpoint_version {found.version}, whose queries, keys and values lie in an order that is not read",
            "load and save it with a Megatron-LM of 2021 or later, which writes checkpoint_version 3.0",
        )
    if states and format != "torch":
        raise CheckpointError(f"{folder} is of before megatron-core: of its training the weights alone are carried", "leave out --optimizer")
    _leave_copies(found, model)
    state = found.state() if states else None
    if state is not None:
        table, found.left_out = with_states(table), {key: why for key, why in found.left_out.items() if why != _ALONE} | dict(state.left_out)
    pieces = {piece.name: piece for one in table for piece in legacy.pieces(one)}
    tensors = {name: Shares(pieces.get(name, Tensor(name, ())), shares) for name, shares in found.shares.items()}
    layers = "" if len(set(found.layers)) == 1 else f", layers {', '.join(map(str, found.layers))}"
    try:
        return Source(
            format, folder, model, table, tensors, found.left_out, padded=True, layout=f"TP {tensor}, PP {pipeline}{layers}",
            training=found.settings, companions=companions(folder), state=state,
        )  # fmt: skip
    except CheckpointError as error:
        raise CheckpointError(str(error) + _other_ranks(found.settings, tensor, pipeline), error.fix) from error


def _other_ranks(settings: Mapping[str, Any], tensor: int, pipeline: int) -> str:
    said = (settings.get("tensor_model_parallel_size", tensor), settings.get("pipeline_model_parallel_size", pipeline))
    return "" if said == (tensor, pipeline) else f"\n    its settings say TP {said[0]} x PP {said[1]}, there are TP {tensor} x PP {pipeline}"


def _of_config(folder: Path, vocab_size: int | None) -> Model:
    model = published.model_of(published.read_config(folder), str(folder / "config.json"))
    return replace(model, vocab_size=vocab_size or model.vocab_size)


def _legacy(
    found: _Found, tensor: int, model: Model | None, vocab_size: int | None, config: Path | None
) -> tuple[str, Model, list[Foreign]]:
    """The format, the model and its table, of names of before megatron-core."""
    shapes = {name: tuple(shares[0].shape) for name, shares in found.shares.items()}
    rows = shapes[legacy.EMBEDDING][0] * tensor if legacy.EMBEDDING in shapes else None
    ours = found.settings.get("vocab_size") if found.settings.get("family") else None  # what others' settings count is not known
    config = config or (None if ours else config_folder(found.folder))
    if model is None and config is not None:
        model = _of_config(config, vocab_size)
        if rows and not vocab_size and model.vocab_size != rows:
            ids = model.vocab_size
            raise CheckpointError(
                f"{found.folder} has {rows} rows in its vocabulary, and {config / 'config.json'} speaks of {ids} ids: --vocab-size {ids} if the"
                f" others are padding, --vocab-size {rows} if tokens were added"
                + _other_ranks(found.settings, tensor, found.pipeline), f"--vocab-size {ids}, or {rows}"
            )
    if model is None:
        model = legacy.model_of(found.settings, shapes, tensor, found.pipeline, f"{found.folder} (args)", vocab_size or ours)
    if model.family == "yuan2":
        return "yuan", model, yuan().foreign(model)
    separate = [any(f".{name}." in one for one in shapes) for name in ("mlp.dense_h_to_4h_1", "self_attention.key_value")]
    pai().foreign(model)
    return "pai", model, legacy.foreign(model, *separate)


def _leave_copies(found: _Found, model: Model) -> None:
    """Leave out what is a copy of the embedding or the output layer: where weights are tied, and where converters put some.

    Raises:
        CheckpointError: it is none.
    """
    tied = [legacy.TIED, "lm_head.weight"] + ([] if model.untie_embeddings_and_output_weights else ["output_layer.weight", legacy.HEAD])
    originals = [name for name in ("embedding.word_embeddings.weight", legacy.EMBEDDING, legacy.HEAD) if name in found.shares and name not in tied]
    for name in tied:
        if name not in found.shares:
            continue
        original = next((one for one in originals if _all_same(found.shares[name], found.shares[one])), None)
        if original is None:
            raise CheckpointError(
                f"{found.folder}: {name} should be a copy of {' or '.join(originals)}, and is not",
                f"{RANKS}; if the two are meant, untie_embeddings_and_output_weights has to be true in its args",
            )
        found.left_out[name] = f"a copy of {original}"
        for begin in (f"{PREFIX}{kind}." for kind in KINDS if f"{PREFIX}{kind}.{name}" in found.shares):
            alike = _all_same(found.shares[begin + name], found.shares[begin + original])
            found.left_out[begin + name] = f"a copy of {begin}{original}" if alike else f"the last stage's, which is not quite {begin}{original}"
