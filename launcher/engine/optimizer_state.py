"""Adam's state: made before the first step, and carried between the plain and the distributed optimizer.

megatron-core saves both forms as one tensor per parameter and moment, but names and nests them apart, so that its own
loader cannot turn one into the other:

    plain         optimizer.param_groups, optimizer.state.common_step     fp32 weights: the model's, or state.fp32_param.*
    distributed   optimizer.optimizer.param_groups[*].step                fp32 weights: state.param.*

Here what is asked of a checkpoint is renamed to what it holds, and what it gave is nested as the optimizer expects it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer

from checkpoints.formats.dist_states import SHARDING

# How the state is cut into tensors. `fully_reshardable` is the one form of the distributed optimizer's state that can be
# loaded at another TP, PP and DP; megatron-core's default cannot. `mem_efficient` gathers it in the host memory of one rank
# per data-parallel group. Otherwise each rank would gather all of it, 24 bytes a number, by way of the GPUs' memory, 4 bytes
# a number: a run that fits would die at its first checkpoint.
METADATA = dict(SHARDING)
PREFIX = "optimizer.state."
STATE = ("param", "exp_avg", "exp_avg_sq")


def initialize_state(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its zero moments now.

    torch makes them at the first step; a run whose first steps overflow in fp16 would save a checkpoint without them.
    """
    for part in optimizer.chained_optimizers:
        adam = part.optimizer
        if adam is None or part.init_state_fn is None:  # nothing is trained here, or it is kept in the host's memory
            continue
        part.init_state_fn(adam, part.config)
        if isinstance(adam, torch.optim.AdamW):
            for state in adam.state.values():
                state.setdefault("step", torch.tensor(0.0))
    use_fused(optimizer)


def use_fused(optimizer: MegatronOptimizer) -> None:
    """torch's fused AdamW: one pass over memory. The default makes temporaries as large as the weights."""
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"], group["foreach"] = True, False
                for parameter in group["params"]:
                    state = part.optimizer.state[parameter]
                    # A copy each: megatron-core loads one tensor into all of them, and fused AdamW counts in place.
                    # None was saved of a run that had not made a step yet.
                    state["step"] = torch.tensor(float(state.get("step", 0.0)), device=parameter.device)


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    """Whether the state is shared out over the data-parallel ranks."""
    return isinstance(optimizer.chained_optimizers[0], DistributedOptimizer)


@contextmanager
def in_place(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Within, megatron-core 0.16 gathers the distributed optimizer's state with what pads the buckets of its buffers.

    For a checkpoint it cuts each parameter's state out of what it gathered, at the place that the parameter has in its buffer;
    but it gathers without the padding, and saves what lies behind a padded bucket, such as a tied table on the first of
    several stages, shifted by up to 127 numbers, zeros at its end, with a warning alone.

    For loading it makes zeros to read into, 12 bytes for each number of the model; here it is room that nobody has touched.
    """
    parts = [part for part in optimizer.chained_optimizers if isinstance(part, DistributedOptimizer)]
    for part in parts:
        part.get_parameter_state_dp_zero = partial(_gathered, part.get_parameter_state_dp_zero, part.buffers)
    try:
        yield
    finally:
        for part in parts:
            del part.get_parameter_state_dp_zero


def _gathered(gather, buffers: list, empty_data: bool = False, **more) -> dict | None:
    if empty_data:
        rooms = ({key: torch.empty(buffer.numel) for key in STATE} for buffer in buffers)
        return {number: {(buffer.param_dtype, buffer.grad_dtype): room} for number, (buffer, room) in enumerate(zip(buffers, rooms))}
    found = gather(**more)
    for number, buffer in enumerate(buffers if found else ()):
        for tensors in found[number].values():
            tensors |= {key: _padded(one, buffer) for key, one in tensors.items() if isinstance(one, torch.Tensor)}
    return found


def _padded(flat: torch.Tensor, buffer) -> torch.Tensor:
    """A flat buffer with zeros where it pads its buckets."""
    if len(flat) == buffer.numel:
        return flat
    whole = flat.new_zeros(buffer.numel)
    pieces = flat.split([bucket.numel_unpadded for bucket in buffer.buckets])
    for bucket, piece in zip(buffer.buckets, pieces, strict=True):
        whole[bucket.offset : bucket.offset + len(piece)] = piece
    return whole


def saved_form(checkpoint: Path) -> str:
    """`distributed`, `fp32` or `mixed` (plain with fp32 copies of 16-bit weights): how a torch_dist checkpoint was saved."""
    saved = dist_checkpointing.load_common_state_dict(str(checkpoint))["optimizer"]
    if "param_state_sharding_type" in saved:
        return "distributed"
    return "mixed" if "optimizer" in saved else "fp32"


def ask_for(sharded_optimizer: dict, saved: str, distributed: bool) -> None:
    """Rename the fp32 weights asked for, in place, to the name under which a checkpoint of form `saved` holds them."""
    if distributed == (saved == "distributed"):
        return
    if saved == "fp32":  # its fp32 weights are the model's own: `load_state` takes them from there
        for tensors in sharded_optimizer["param_state"].values():
            tensors.pop("param")
        return
    old = PREFIX + ("param." if distributed else "fp32_param.")
    new = PREFIX + ("param." if saved == "distributed" else "fp32_param.")

    def rename(value):
        if isinstance(value, (ShardedTensor, ShardedTensorFactory)) and value.key.startswith(old):
            return replace(value, key=new + value.key.removeprefix(old))
        return value

    dict_list_map_inplace(rename, sharded_optimizer)


def ask_for_shares(sharded_optimizer: dict, optimizer: MegatronOptimizer) -> None:
    """Ask the checkpoint, in place, for the tensors that this rank keeps a part of; megatron-core asks for all of them on every
    rank. Then no tensor need be asked for by the rank that saved it, which megatron-core's validation wants."""
    part = optimizer.chained_optimizers[0]
    kept = {parameter for ranges in part.gbuf_ranges for buckets in ranges.values() for one in buckets for parameter in one["param_map"]}
    order = (parameter for buffer in part.buffers for parameter in buffer.param_index_map)
    asked = sharded_optimizer["param_state"]
    sharded_optimizer["param_state"] = {number: asked[number] for number, parameter in enumerate(order) if parameter in kept}


def nest_as(loaded: dict, saved: str, distributed: bool) -> dict:
    """A loaded optimizer state of form `saved`, nested as the plain or the distributed optimizer loads it."""
    if distributed == (saved == "distributed"):
        return loaded
    if distributed:
        inner = loaded.pop("optimizer", loaded) if saved == "mixed" else loaded
        step = float(inner.pop("state").get("common_step", 0.0))
        groups = [{k: v for k, v in group.items() if k != "params"} | {"step": step} for group in inner.pop("param_groups")]
        return loaded | {"optimizer": {"param_groups": groups}}
    # Plain fp32 has its state at the top, plain 16-bit one level down, where the distributed one keeps its groups too.
    groups = loaded["optimizer"]["param_groups"]
    inner = loaded if "state" in loaded else loaded["optimizer"]
    asked = inner["param_groups"]
    step = torch.tensor(float(groups[0]["step"]))
    merged = [{k: v for k, v in group.items() if k != "step"} | {"params": own["params"]} for group, own in zip(groups, asked)]
    inner["param_groups"] = merged
    inner["state"]["common_step"] = step
    if inner is loaded:
        loaded.pop("optimizer")
    return loaded


def load_state(optimizer: MegatronOptimizer, loaded: dict) -> None:
    """Load a state of `nest_as`, or one of the torch layout with `param_state_file`, the path of its distrib_optim.pt.

    The model's weights must have been loaded before.
    """
    tensors, file = loaded.pop("param_state", None), loaded.pop("param_state_file", None)
    per_parameter = loaded.get("optimizer", loaded).get("state", {})
    if not any(key == "common_step" or "step" in state for key, state in per_parameter.items()):
        per_parameter["common_step"] = torch.tensor(0.0)  # megatron-core leaves out a step of 0
    optimizer.load_state_dict(loaded)
    if tensors is not None or file is not None:
        part = optimizer.chained_optimizers[0]
        # megatron-core looks for the saved tensor of every entry of torch's state, and saves none for `step`.
        steps = {parameter: state.pop("step") for parameter, state in part.optimizer.state.items() if "step" in state}
        with torch.no_grad():
            if file is not None:
                part.load_parameter_state(str(file))
            else:
                for index, parameter in enumerate(p for buffer in part.buffers for p in buffer.param_index_map):
                    if index in tensors:
                        tensors[index].setdefault("param", parameter.detach())
                part.load_parameter_state_from_fully_reshardable(tensors)
        for parameter, step in steps.items():
            part.optimizer.state[parameter]["step"] = step
    use_fused(optimizer)
