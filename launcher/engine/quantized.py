"""Linear layers whose weights stay in int8 in memory, for answers: y = (x qᵀ) scale, one scale for each output.

In checkpoints they are megatron-core's linear layers with `weight_scale` beside the weight, and load at any TP and PP.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch.nn.functional import linear

# Up to so many tokens torch's own int8 kernel for CPUs beats a copy of the weight in x's type. 4096 x 4096, 2 cores, ms:
#   bf16  1 token: kernel 0.5, copy 14, weight in bf16 1.1    64 tokens: kernel 13, copy 16, weight in bf16 2.1
#   fp32  1 token: kernel 5.4, copy 20, weight in fp32 1.2     8 tokens: kernel 38, copy 24, weight in fp32 3.8
_KERNEL = {torch.bfloat16: 64, torch.float32: 4}


def int8_linear(x: torch.Tensor, numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [..., in] times `numbers` [out, in] int8, each output times its `scale` [out] fp32; of x's type."""
    if x.dtype == torch.float16:  # whose largest number, 65504, a sum over unscaled weights would pass
        return linear(x, numbers.to(x.dtype).mul_(scale.to(x.dtype)[:, None]))
    if x.device.type == "cpu" and x.numel() // x.shape[-1] <= _KERNEL.get(x.dtype, 0):
        ones = torch.ones(len(numbers), dtype=x.dtype)
        y = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), numbers, ones).unflatten(0, x.shape[:-1])
    else:
        y = linear(x, numbers.to(x.dtype))
    return (y * scale).to(x.dtype)


class Int8Linear(torch.nn.Module):
    """A share of a linear layer, made as megatron-core makes its own. `AXIS`: that of the weight which ranks share out."""

    AXIS: int

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, bias: bool, skip_bias_add: bool, tp_group=None,
        tp_comm_buffer_name: str | None = None, **_,
    ):  # fmt: skip
        super().__init__()
        self.tp_group, self.skip_bias_add = get_tensor_model_parallel_group_if_none(tp_group), skip_bias_add
        self.gated = config.gated_linear_unit and tp_comm_buffer_name == "fc1"
        shape = [output_size, input_size]
        shape[self.AXIS] //= self.tp_group.size()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = _frozen(torch.empty(shape, dtype=torch.int8, device=device))
        self.weight_scale = _frozen(torch.empty(shape[0], dtype=torch.float32, device=device))
        self.bias = _frozen(torch.empty(shape[0], dtype=config.params_dtype, device=device)) if bias else None

    def _apply(self, fn, recurse: bool = True):
        """Scales stay fp32 when the model becomes bf16 or fp16: rounded, they would be wrong for whole rows."""
        exact = self.weight_scale.data
        super()._apply(fn, recurse)
        self.weight_scale.data = exact.to(self.weight.device)
        return self

    def _finish(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.bias is None or self.skip_bias_add:
            return y, self.bias
        return y + self.bias, None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """As megatron-core's layers, with scales shared out as the weight's rows are."""
        axes = {"weight": 0, "weight_scale": 0, "bias": 0} if self.AXIS == 0 else {"weight": 1}
        state = self.state_dict(prefix="", keep_vars=True)
        sharded = make_sharded_tensors_for_checkpoint(
            state, prefix, axes, sharded_offsets, tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"]
        )
        if self.gated:  # the MLP, which asks, sees to the weight's two halves itself
            key = f"{prefix}weight_scale"
            sharded[key] = apply_swiglu_sharded_factory(sharded[key], sharded_offsets, metadata.get("singleton_local_shards", False))
        return sharded


class Int8ColumnParallelLinear(Int8Linear):
    """Outputs are shared out: x [s, b, in] to [s, b, out / TP]."""

    AXIS = 0

    def forward(self, x: torch.Tensor, *_, **__) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._finish(int8_linear(x, self.weight, self.weight_scale))


class Int8RowParallelLinear(Int8Linear):
    """Inputs are shared out: x [s, b, in / TP] to [s, b, out], summed over the ranks."""

    AXIS = 1

    def forward(self, x: torch.Tensor, *_, **__) -> tuple[torch.Tensor, torch.Tensor | None]:
        partial = int8_linear(x, self.weight, self.weight_scale)
        return self._finish(reduce_from_tensor_model_parallel_region(partial, group=self.tp_group))


def _frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)
