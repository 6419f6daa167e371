"""ZeRO stages 2 and 3 (Rajbhandari et al. 2020, arXiv 1910.02054): torch's FSDP2 around megatron-core's model.

Of every tensor a data-parallel rank keeps its share of the rows: fp32 weights, both moments, gradients. A layer's weights
are gathered from the ranks, in the training's precision, before it computes; its gradients are summed in fp32, and each
rank keeps its rows of them. In stage 3 the gathered weights go after each pass, in stage 2 after the step's last.

megatron-core's own wrapper of FSDP2 is for CUDA and for untied embeddings, and keeps rows and sums gradients in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from launcher.engine.optimizer_state import METADATA

Places = list[ShardedTensor]  # of one tensor: where its rows lie in the whole model's, in their order


class ShardedDataParallel(_BaseDataParallel):
    """One model on this data-parallel rank, in shares of rows.

    Args:
        module: the model as it was built, whole, perhaps in megatron-core's wrapper for 16 bits.
        model: the model itself.
        stage: 2 or 3.
    """

    def __init__(self, config: TransformerConfig, module: torch.nn.Module, model: torch.nn.Module, stage: int):
        super().__init__(config, module)
        self.ddp_config = DistributedDataParallelConfig()  # megatron-core asks it what kind of wrapper this is
        self.stage, self.dtype = stage, config.params_dtype
        self.group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.places, self.others = _places(model, METADATA | {"dp_cp_group": self.group})
        apart = not model.share_embeddings_and_output_weights  # a tied table is needed from end to end
        # In the order of the forward pass; the last is what is left: final norm, output layer, a tied table.
        self.parts = [*[model.embedding] * apart, *model.decoder.layers, model]
        attributes = {name: dict(vars(parameter)) for name, parameter in model.named_parameters()}
        self._shard(config)
        self.rows = dict(model.named_parameters())
        for name, parameter in self.rows.items():
            vars(parameter).update(attributes[name])  # FSDP2 makes new parameters, without Megatron's marks

    def _shard(self, config: TransformerConfig) -> None:
        mesh = DeviceMesh.from_group(self.group, next(self.module.parameters()).device.type)
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if self.dtype != torch.float32:
            policy = replace(policy, param_dtype=self.dtype, reduce_dtype=torch.float32)
        whole, before = self.parts[-1], None
        for part in self.parts:
            for parameter in part.parameters():
                if not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.float()
            # What is left is needed as soon as the backward pass begins.
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=self.stage == 3 and part is not whole)
            part.set_force_sum_reduction_for_comms(True)  # gloo has no mean
            if config.calculate_per_token_loss:
                part.set_gradient_divide_factor(1.0)
            if config.recompute_granularity is not None:  # a layer's forward pass within the backward pass changes the order
                part.set_modules_to_backward_prefetch([before] if before else [])
            before = part

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """megatron-core's schedule runs all backward passes of a step but the last in here."""
        self.parts[-1].set_reshard_after_backward(self.stage == 3)
        try:
            yield
        finally:
            self.parts[-1].set_reshard_after_backward(True)

    def train(self, mode: bool = True) -> ShardedDataParallel:
        for part in self.parts if mode else ():
            part.reshard()  # an evaluation has no backward pass, after which gathered weights go
        return super().train(mode)

    def finish_grad_sync(self, **_) -> None:
        """Gradients were summed in the backward pass."""

    @torch.no_grad()
    def scale_gradients(self, scaling_factor: torch.Tensor) -> None:
        """Gradients x scaling_factor."""
        for parameter in self.rows.values():
            if parameter.grad is not None:
                parameter.grad.to_local().mul_(scaling_factor)

    # ---- checkpoints: the tensors of a run without sharding, each rank with its rows ---------------------------------

    @torch.no_grad()
    def shares(self) -> Iterator[ShardedTensor]:
        """This rank's rows of the weights, in fp32 as they are kept, with their places in the whole model."""
        for name, rows in self.rows.items():
            yield from self._shares(name, self.places[name][0].key, rows.to_local())

    @torch.no_grad()
    def sharded_state_dict(self, **_) -> dict[str, object]:
        """megatron-core's, of these rows: weights in the training's precision, what the optimizer makes of it in its own."""
        return {name: self._factory(name, rows.to_local()) for name, rows in self.rows.items()} | self.others

    @torch.no_grad()
    def load_rows(self, loaded: dict[str, object]) -> None:
        """Take the weights that megatron-core loaded for `sharded_state_dict`; none where the optimizer brought them."""
        for name, rows in self.rows.items() if loaded else ():
            rows.to_local().view(-1).copy_(torch.cat([piece.reshape(-1) for piece in loaded[name]]))

    def _factory(self, name: str, rows: torch.Tensor) -> ShardedTensorFactory:
        key = self.places[name][0].key

        def build(asked: str, data: torch.Tensor, *_) -> list[ShardedTensor | LocalNonpersistentObject]:
            data = data.to(self.dtype) if asked == key else data
            return [_without_prepended(share) for share in self._shares(name, asked, data)] or [LocalNonpersistentObject(data)]

        return ShardedTensorFactory(key, rows, build, lambda pieces: pieces)

    def _shares(self, name: str, key: str, data: torch.Tensor) -> Iterator[ShardedTensor]:
        """`data`, this rank's rows of a tensor, in parts that lie together in the whole model's tensor `key`."""
        whole, begin = len(self.rows[name]), 0
        first = min(-(-whole // self.group.size()) * self.group.rank(), whole)  # torch.chunk's: the last have fewer, or none
        for place in self.places[name]:
            end = begin + place.local_shape[0]
            low, high = max(begin, first), min(end, first + len(data))
            if low < high:
                yield _part(place, key, data[low - first : high - first], low - begin)
            begin = end


def _places(model: torch.nn.Module, metadata: dict) -> tuple[dict[str, Places], dict[str, object]]:
    """Where each parameter's rows lie, without their numbers, and what else a checkpoint has of a model."""
    names, places, others = {name for name, _ in model.named_parameters()}, {}, {}
    for name, entry in model.sharded_state_dict(metadata=metadata).items():
        if name not in names:
            others[name] = entry
            continue
        entry = replace(entry, data=entry.data.detach().to("meta"))
        places[name] = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]  # gate and up lie apart
    return places, others


def _part(place: ShardedTensor, key: str, rows: torch.Tensor, offset: int) -> ShardedTensor:
    """`rows` as a part of the whole model's tensor `key`, from row `offset` of `place` on."""
    whole = list(place.global_offset)
    whole[place.prepend_axis_num] += offset
    return replace(
        place,
        key=key,
        data=rows,
        dtype=rows.dtype,
        local_shape=tuple(rows.shape),
        global_offset=tuple(whole),
        axis_fragmentations=None,  # no regular grid
        replica_id=(*place.replica_id[:-1], 0),  # no other data-parallel rank has them
    )


def _without_prepended(share: ShardedTensor) -> ShardedTensor:
    """With the axis of the layers among its own: megatron-core saves no irregular parts of another number of axes."""
    rows = share.data[(None,) * share.prepend_axis_num]
    return replace(share, data=rows, local_shape=tuple(rows.shape), prepend_axis_num=0)
