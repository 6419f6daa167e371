"""LoRA (Hu et al. 2021, arXiv 2106.09685): beside each frozen matrix W two narrow ones are trained, y = W x + alpha / r x B A x.

A [r, in] begins uniform in ± 1 / sqrt(in), B [out, r] as zeros. How tensor-parallel ranks share them out follows W:

    outputs shared (linear_qkv, linear_fc1)   A whole on each rank, B by rows      with sequence parallelism A x is gathered,
    inputs shared (linear_proj, linear_fc2)   A by columns, B whole on each rank   or summed and scattered: r wide, not h
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from zlib import crc32

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.nn.functional import dropout, linear

from checkpoints.adapters import SUFFIX
from launcher.recipe.schema import Lora, Recipe


class Adapter(torch.nn.Module):
    """This rank's share of A and B beside `frozen`, a linear layer of megatron-core's; `name` is that of the matrix in the
    whole model, which with the seed decides A, whatever the layout."""

    def __init__(self, frozen: torch.nn.Module, config: TransformerConfig, settings: Lora, name: str, seed: int):
        super().__init__()
        self.config, self.group = config, frozen.tp_group
        self.scale, self.dropout = settings.alpha / settings.rank, settings.dropout
        self.by_outputs = isinstance(frozen, ColumnParallelLinear)
        self.gated = config.gated_linear_unit and name.endswith("linear_fc1")
        outputs, inputs = frozen.weight.shape
        a = initial(settings.rank, frozen.input_size, f"{seed} {name}")
        if not self.by_outputs:
            a = a.narrow(1, self.group.rank() * inputs, inputs)
        self.a = torch.nn.Parameter(a.to(config.params_dtype, copy=True))
        self.b = torch.nn.Parameter(torch.zeros(outputs, settings.rank, dtype=config.params_dtype))
        shared, axis, whole = (self.b, 0, self.a) if self.by_outputs else (self.a, 1, self.b)
        set_tensor_model_parallel_attributes(shared, True, axis, 1)
        whole.sequence_parallel = config.sequence_parallel  # each rank sees its part of the tokens: gradients are summed

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y + alpha / r x B A x, of the layer's input x [s, b, in] and output y [s, b, out], this rank's shares."""
        if self.dropout and self.training:
            # Where ranks share out the inputs each draws its own mask; with sequence parallelism the block has seen to it.
            own = not self.by_outputs and not self.config.sequence_parallel
            with get_cuda_rng_tracker().fork() if own else nullcontext():
                x = dropout(x, self.dropout)
        narrow = linear(x, self.a)
        if self.by_outputs and self.config.sequence_parallel:
            narrow = gather_from_sequence_parallel_region(narrow, tensor_parallel_output_grad=True, group=self.group)
        elif self.by_outputs:
            narrow = copy_to_tensor_model_parallel_region(narrow, group=self.group)
        elif self.config.sequence_parallel:
            narrow = reduce_scatter_to_sequence_parallel_region(narrow, group=self.group)
        else:
            narrow = reduce_from_tensor_model_parallel_region(narrow, group=self.group)
        return torch.addmm(y.flatten(0, -2), narrow.flatten(0, -2), self.b.t(), alpha=self.scale).view_as(y)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """As megatron-core's linear layers; of [gate; up] each half is shared out by itself."""
        axes, state = {"b": 0} if self.by_outputs else {"a": 1}, self.state_dict(prefix="", keep_vars=True)
        groups = {"tp_group": self.group, "dp_cp_group": metadata["dp_cp_group"]}
        sharded = make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets, **groups)
        if self.gated:
            key, single = f"{prefix}b", metadata.get("singleton_local_shards", False)
            sharded[key] = apply_swiglu_sharded_factory(sharded[key], sharded_offsets, single)
        return sharded


def initial(rank: int, inputs: int, seed: str) -> torch.Tensor:
    """A [rank, inputs] in fp32: Kaiming's uniform numbers as torch's linear layers have them, from a generator of its own."""
    bound = 1 / math.sqrt(inputs)
    return torch.empty(rank, inputs).uniform_(-bound, bound, generator=torch.Generator().manual_seed(crc32(seed.encode())))


def adapt(recipe: Recipe, chunk: torch.nn.Module) -> None:
    """Freeze a model chunk of `build_chunk`, and put adapters beside the matrices that the recipe names."""
    chunk.requires_grad_(False)
    for layer in chunk.decoder.layers:
        for within in ("self_attention", "mlp"):
            part = getattr(layer, within)
            for target in recipe.lora.target_modules:
                if (frozen := getattr(part, target, None)) is not None:
                    name = f"decoder.layers.{layer.layer_number - 1}.{within}.{target}"
                    adapter = Adapter(frozen, chunk.config, recipe.lora, name, recipe.training.seed)
                    part.add_module(target + SUFFIX, adapter)
                    frozen.register_forward_hook(partial(_add, adapter))
    if chunk.pre_process and chunk.config.recompute_granularity == "full":
        # What is recomputed has gradients only where its input has them.
        chunk.embedding.register_forward_hook(lambda _, __, output: output.requires_grad_())


def _add(adapter: Adapter, _: torch.nn.Module, inputs: tuple, outputs: tuple) -> tuple:
    y, bias = outputs
    return adapter(inputs[0], y), bias


def is_adapter(name: str) -> bool:
    """Whether a parameter, or an entry of a state dict, is an adapter's."""
    return any(part.endswith(SUFFIX) for part in name.split("."))
