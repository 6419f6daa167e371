"""Where torch_dist holds the optimizer's state: its tensors beside the weights, stacked as they; the rest in common.pt; the
random numbers' states as objects, one for each rank of the layout that saved them.
"""

from __future__ import annotations

import io
import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoints.files import pickled
from checkpoints.folder import CheckpointError
from checkpoints.models.tensor import Tensor
from checkpoints.optimizer import MASTER, PREFIX, Form, TrainingState, inner_of, read_state

SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True, "singleton_local_shards": False,
}  # fmt: skip
_TYPE = "param_state_sharding_type"
_RANDOM = re.compile(r"rng_state/shard_(\d+)\.(\d+)_(\d+)\.(\d+)")  # stage, tensor-parallel rank, of how many


def key_of_state(tensor: Tensor, key: str, form: Form, halves: bool) -> str:
    """The key under which a tensor of the optimizer's lies, `key` being the one of its name: the distributed form has another
    word for fp32 weights, and the plain one has none besides weights that are in fp32 themselves."""
    if tensor.state != f"{PREFIX}{MASTER}.":
        return key
    weight = key.removeprefix(tensor.state)
    return f"{PREFIX}param.{weight}" if form == "distributed" else key if halves else weight


def state_in(folder: Path, common: Mapping[str, Any], random: Mapping[str, tuple[Path, int, int]]) -> TrainingState:
    """Where the training stands, by what common.pt holds; `random` are the places of the objects of `.metadata`, by their keys.

    Raises:
        CheckpointError: there is no optimizer's state, or one that is cut up by the data-parallel ranks that saved it.
    """
    optimizer = common.get("optimizer")
    kind = optimizer.get(_TYPE) if isinstance(optimizer, Mapping) else None
    if kind not in (None, SHARDING["distrib_optim_sharding_type"]):
        what = f"{folder} has its optimizer's state cut up by the data-parallel ranks that saved it ({kind}), which no other layout takes"
        raise CheckpointError(what, "save it anew with Megatron-LM's --dist-ckpt-optim-fully-reshardable, or leave out --optimizer")
    found = {match.groups(): place for key, place in random.items() if (match := _RANDOM.fullmatch(key))}
    grids = {(int(stages), int(ranks)) for _, _, stages, ranks in found}
    return read_state(
        common, "distributed" if kind else "plain", f"{folder}/common.pt", grid=grids.pop() if len(grids) == 1 else (1, 1),
        random={(int(stage), int(rank)): _object(*place) for (stage, rank, _, _), place in found.items()},
    )  # fmt: skip


def _object(path: Path, offset: int, length: int) -> Any:
    found = pickled.read(path, offset, length)
    if not isinstance(found, list) or len(found) != 1:
        raise CheckpointError(f"{path} is damaged: no object of megatron-core's at byte {offset:,}", "copy the whole checkpoint again")
    return found[0]


def common_of(state: TrainingState, halves: bool) -> dict[str, Any]:
    """What common.pt holds; `halves`: the weights are of 16 bits."""
    optimizer = state.nested(halves)
    if state.form == "distributed":
        optimizer[_TYPE] = SHARDING["distrib_optim_sharding_type"]
    elif state.step:
        inner_of(optimizer)["state"]["common_step"] = torch.tensor(float(state.step))
    return {**state.common, "args": Namespace(**vars(state.common["args"])), "optimizer": optimizer, "content_metadata": dict(SHARDING)}


def objects_of(state: TrainingState) -> Iterable[tuple[str, bytes]]:
    """The states of random number generators, as they lie in the files, by their keys."""
    for (stage, rank), one in sorted(state.random.items()):
        file = io.BytesIO()
        torch.save([one], file)  # as megatron-core wraps every object
        yield f"rng_state/shard_{stage}.{rank}_{state.grid[0]}.{state.grid[1]}", file.getvalue()
