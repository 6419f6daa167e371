"""What a training has besides its weights: what Adam remembers of each, and where the training stands.

Adam's tensors go between formats under the names that megatron-core's torch_dist has for them, one for each weight, of its
shape and cut as it:

    optimizer.state.fp32_param.decoder.layers.3.mlp.linear_fc1.weight     the weight in fp32, which the steps change
    optimizer.state.exp_avg. ...                                          mean of its gradients
    optimizer.state.exp_avg_sq. ...                                       mean of their squares

megatron-core has them in two forms: `plain`, where each rank has all of those of its weights; `distributed`, where
data-parallel ranks share them out (ZeRO-1), and files hold them put together again.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from checkpoints.files.pickled import Inert
from checkpoints.files.stored import Stored
from checkpoints.folder import CheckpointError
from checkpoints.models.layout import Foreign

if TYPE_CHECKING:  # it imports this
    from checkpoints.formats.base import Readable
    from checkpoints.models.model import Model

Form = Literal["plain", "distributed"]
PREFIX, MASTER, MOMENTS = "optimizer.state.", "fp32_param", ("exp_avg", "exp_avg_sq")
KINDS = (MASTER, *MOMENTS)
OTHER_LAYOUT = "random numbers go on only where TP and PP stay the same: those of this training begin anew from its seed"
_OBJECT = "an object of the program that saved it"
_WITHOUT = "leave out --optimizer, for the weights alone"
_OURS = ("model", "optimizer", "rng_state", "rerun_state_machine", "content_metadata")  # of a file's keys, not carried as they are
_AGAIN = "copy the whole checkpoint again, or take an older one"
Grid = tuple[int, int]


class NoStateError(CheckpointError):
    """A training was saved without any optimizer's state."""


@dataclass(frozen=True)
class TrainingState:
    """What a training checkpoint holds besides tensors of the weights' shapes.

    Attributes:
        form: how the optimizer's tensors were saved.
        groups: what holds for the weights that decay, and for those that do not (biases, norms): learning rate, betas, …
        step: how many Adam made.
        scaler: the loss scale's state, in fp16.
        common: what is the same on all ranks, by the names that Megatron-LM's files have: args, iteration, opt_param_scheduler, …
        random: of each rank (stage, tensor-parallel rank) the states of its random number generators.
        grid: PP and TP that it was saved at.
        grads: the type in which gradients were reduced, which the distributed form is filed under.
        left_out: what is there and not carried, with the reason.
    """

    form: Form
    groups: Sequence[Mapping[str, Any]]
    step: int
    scaler: Mapping[str, Any] | None
    common: Mapping[str, Any]
    random: Mapping[Grid, Any] = field(default_factory=dict)
    grid: Grid = (1, 1)
    grads: torch.dtype | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def iteration(self) -> int:
        return self.common["iteration"]

    def to(self, form: Form | None, grid: Grid | None, **settings: Any) -> TrainingState:
        """It in another form and, where the target has one, at another layout; `settings` are of `args`."""
        args = Namespace(**{**vars(self.common["args"]), **settings})
        changed = replace(self, form=form or self.form, common={**self.common, "args": args})
        if grid is None or grid == self.grid or not self.random:
            return changed
        return replace(changed, random={}, grid=grid, left_out={**self.left_out, "rng_state": OTHER_LAYOUT})

    def nested(self, halves: bool) -> dict[str, Any]:
        """`optimizer` of a file, without tensors; `halves`: the weights are of 16 bits."""
        groups = [{**group, "step": self.step} for group in self.groups]  # where Apex and Transformer Engine look for it
        if self.form == "distributed":
            inner: dict[str, Any] = {"param_groups": groups}
        else:
            inner = {"state": {}, "param_groups": groups}
        scaler = {"grad_scaler": dict(self.scaler)} if self.scaler else {}
        return {"optimizer": inner, **scaler} if halves or self.form == "distributed" else inner


def decays(name: str, shape: Sequence[int]) -> bool:
    """Whether weight decay holds for a parameter, as Megatron-LM has it: not for biases, nor what has one dimension."""
    return len(shape) > 1 and not name.endswith(".bias")


def with_states(table: Sequence[Foreign]) -> list[Foreign]:
    """The tensors of a table, each with the optimizer's behind it."""
    return [
        Foreign(replace(one.tensor, name=begin + one.tensor.name, state=begin), tuple(begin + name for name in one.names), one.layout)
        for one in table
        for begin in ("", *(f"{PREFIX}{kind}." for kind in KINDS))
    ]


def with_rows(model: Model, table: Sequence[Readable]) -> Model:
    """The model with all rows of its vocabulary's table, of which each rank has one of `table`: a training goes on with those that
    pad it, too."""
    return replace(model, vocab_size=max(model.vocab_size, sum(one.shape[0] for one in table if one.shape)))


# ---- out of files ----------------------------------------------------------------------------------------------------


def read_state(
    content: Mapping[str, Any], form: Form, where: str, random: Mapping[Grid, Any], grid: Grid, grads: torch.dtype | None = None
) -> TrainingState:
    """The state out of what a rank's file or common.pt holds; `random` as it lies in the files.

    Raises:
        CheckpointError: it holds none, one that is damaged, or one that is not of Adam as Megatron-LM sets it up; `where` names the
            place.
    """
    optimizer, schedule, iteration = (content.get(key) for key in ("optimizer", "opt_param_scheduler", "iteration"))
    if not isinstance(optimizer, Mapping) or not isinstance(content.get("args"), Namespace) or not isinstance(schedule, Mapping) or not schedule:
        raise CheckpointError(f"{where} holds no optimizer's state with its schedule and settings (args): no training goes on from it", _WITHOUT)
    if type(iteration) is not int or iteration < 0:
        raise CheckpointError(f"{where} is damaged: it does not say at which iteration the training stands", _AGAIN)
    inner, left_out = inner_of(optimizer, where), {}
    others = {key: one for key, one in content.items() if key not in _OURS and not str(key).removeprefix("model").isdecimal()}
    common = _plain(others, "", left_out)
    if content.get("rerun_state_machine"):
        left_out["rerun_state_machine"] = _OBJECT
    groups = [_plain({k: v for k, v in group.items() if k not in ("params", "step")}, "param_groups", left_out) for group in inner["param_groups"]]
    expect_groups(groups, where)
    scaler = _plain(optimizer.get("grad_scaler"), "grad_scaler", left_out)
    if not isinstance(scaler, (Mapping, type(None))):
        raise CheckpointError(f"{where} is damaged: its grad_scaler is no state of a loss scale", _AGAIN)
    random = _random(random, grid, where)
    return TrainingState(form, groups, _step(inner, where), scaler, common, random, grid, grads, left_out)


def _random(random: Mapping[Grid, Any], grid: Grid, where: str) -> Mapping[Grid, Any]:
    """The states of random number generators, of every rank of the layout or of none."""
    if random and (len(random) != grid[0] * grid[1] or any(stage >= grid[0] or rank >= grid[1] for stage, rank in random)):
        what = f"random numbers' states of {len(random)} ranks, and the layout is PP {grid[0]} x TP {grid[1]}"
        raise CheckpointError(f"{where} and the other ranks' files are not of one checkpoint: {what}", _AGAIN)
    try:
        return {place: _alive(one) for place, one in random.items()}
    except CheckpointError:
        raise
    except Exception as error:  # numpy raises many kinds
        raise CheckpointError(f"{where} is damaged: its rng_state is none of random number generators ({type(error).__name__}: {error})", _AGAIN) from error


def inner_of(optimizer: Mapping[str, Any], where: str = "") -> Mapping[str, Any]:
    """torch's own state: of 16-bit weights, and of the distributed optimizer, one level down.

    Raises:
        CheckpointError: there is none in what `where` names.
    """
    inner = optimizer.get("optimizer", optimizer) if isinstance(optimizer, Mapping) else None
    groups = inner.get("param_groups") if isinstance(inner, Mapping) else None
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups) or not isinstance(inner.get("state") or {}, Mapping):
        raise CheckpointError(f"{where} is damaged: its optimizer has no param_groups, or its state is none", _AGAIN)
    return inner


def group_decays(group: Mapping[str, Any]) -> bool:
    """Whether a parameter group is the one with weight decay."""
    return group.get("wd_mult", group.get("pre_wd_mult", 1.0)) != 0


def expect_groups(groups: Sequence[Mapping[str, Any]], where: str) -> None:
    """There is a parameter group with weight decay and one without, or one of the two.

    Raises:
        CheckpointError: there are others.
    """
    several = len({group_decays(group) for group in groups}) != len(groups)
    special = [key for group in groups for key in ("is_expert_parallel", "is_decoupled_lr") if group.get(key)]
    if several or special:
        what = f"with {special[0]}" if special else f"{len(groups)}, more than the weights that decay and those that do not"
        raise CheckpointError(f"{where} has parameter groups that are not carried: {what}", _WITHOUT)


def _step(inner: Mapping[str, Any], where: str) -> int:
    """How many steps were made: torch counts them for each parameter, and torch_dist has one number for all, or none where it
    is 0; Apex and Transformer Engine count for each group."""
    state = inner.get("state") or {}
    told = [state["common_step"]] if "common_step" in state else [
        one["step"] for one in state.values() if isinstance(one, Mapping) and "step" in one
    ]  # fmt: skip
    told += [group["step"] for group in inner["param_groups"] if "step" in group]
    first = told[0] if told else 0
    try:
        return int(first.read() if isinstance(first, Stored) else first)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{where} is damaged: the optimizer's step is no number", _AGAIN) from error


def _plain(value: Any, name: str, left_out: dict[str, str]) -> Any:
    """A value of Python's own types and torch's; another's is left out, and named."""
    if isinstance(value, Namespace):
        return Namespace(**_plain(vars(value), name, left_out))
    if isinstance(value, Mapping):
        found = {key: _plain(one, f"{name}.{key}".lstrip("."), left_out) for key, one in value.items()}
        return {key: one for key, one in found.items() if not isinstance(one, Inert)}
    if isinstance(value, (list, tuple)):
        items = [_plain(one, name, left_out) for one in value]
        return Inert() if any(isinstance(one, Inert) for one in items) else tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, Stored):
        return value.read().clone()
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.Tensor)):
        return value
    left_out[name] = _OBJECT
    return Inert()


def _alive(value: Any) -> Any:
    """The states of random number generators as they were before pickling: tensors and numpy's arrays, which the reader
    leaves where they are."""
    if isinstance(value, Stored):
        return value.read().clone()
    if isinstance(value, Mapping):
        return {key: _alive(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_alive(one) for one in value)
    if isinstance(value, Inert):
        _, shape, dtype, _, data = value.state
        raw = data.given[0].encode(data.given[1]) if isinstance(data, Inert) else data
        return np.frombuffer(raw, np.dtype(dtype.given[0])).reshape(shape).copy()
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.Tensor)):
        return value
    raise TypeError(type(value).__name__)
