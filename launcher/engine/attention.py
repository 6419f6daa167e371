"""Attention where torch's one kernel does not do: on a CPU with dropout, and over documents that are kept apart.

With dropout block by block, without the half above the diagonal.

Megatron-core's own keeps three matrices of s x s in fp32 for each head: scores, probabilities, dropout's mask. Here a
block of queries at a time is made and made again in the backward pass (Dao et al. 2022, arXiv 2205.14135); only the
dropout's mask is kept, a byte for each pair of a query and a key that it sees.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from launcher.recipe.estimate.activations import DROPOUT_ROWS as ROWS  # queries per block: 64 are as fast, 512 take 1.4 x


def causal_attention_with_dropout(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scale: float
) -> torch.Tensor:
    """dropout(softmax(scale x query key^T)) value of [heads, s, d], every query seeing the keys up to its own.

    Draws from torch's generator, once, in the forward pass.
    """
    return _Blocks.apply(query, key, value, dropout, scale)


def documents(document: torch.Tensor) -> list[list[slice]]:
    """The places of each sample's documents, where `document` [b, s] numbers each position's."""
    begins = pad(document[:, 1:] != document[:, :-1], (1, 0), value=True)
    edges = [[*sample.nonzero().flatten().tolist(), document.shape[1]] for sample in begins]
    return [[slice(*pair) for pair in zip(sample, sample[1:])] for sample in edges]


def document_mask(document: torch.Tensor) -> torch.Tensor:
    """True for what is hidden, [b, 1, s, s]: what comes later, and other documents. From each position's document [b, s]."""
    size = document.shape[1]
    later = torch.ones(size, size, dtype=torch.bool, device=document.device).triu(1)
    return (later | (document[:, :, None] != document[:, None, :]))[:, None]


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, dropout, scale):
        context, dropped = query.new_empty(query.shape), []
        for rows in _blocks(query):
            probabilities = _probabilities(query, key, rows, scale)
            dropped.append(torch.empty(probabilities.shape, dtype=torch.bool).bernoulli_(dropout))
            probabilities.masked_fill_(dropped[-1], 0.0)
            context[:, rows] = torch.bmm(probabilities, value[:, : rows.stop])
        context /= 1 - dropout
        ctx.save_for_backward(query, key, value, context, *dropped)
        ctx.dropout, ctx.scale = dropout, scale
        return context

    @staticmethod
    def backward(ctx, grad_output):
        *tensors, context = ctx.saved_tensors[:4]
        dropped, dtype = ctx.saved_tensors[4:], context.dtype
        if dtype.itemsize == 2:  # the sum over the blocks in 16 bits took an error of 0.4 % of a key's gradient to 0.7 %
            *tensors, context, grad_output = (x.float() for x in (*tensors, context, grad_output))
        query, key, value = tensors
        grad_output = grad_output.contiguous() / (1 - ctx.dropout)
        # the sum over the keys of probability x its gradient, from what is there (FlashAttention's D)
        inner = (grad_output * context).sum(-1, keepdim=True) * (1 - ctx.dropout)
        grads = [x.new_zeros(x.shape) for x in tensors]
        for rows, gone in zip(_blocks(query), dropped, strict=True):
            seen, out = slice(0, rows.stop), grad_output[:, rows]
            probabilities = _probabilities(query, key, rows, ctx.scale)
            scores = torch.bmm(out, value[:, seen].transpose(1, 2)).masked_fill_(gone, 0.0).sub_(inner[:, rows]).mul_(probabilities)
            grads[2][:, seen].baddbmm_(probabilities.masked_fill_(gone, 0.0).transpose(1, 2), out)
            grads[0][:, rows].baddbmm_(scores, key[:, seen], beta=0, alpha=ctx.scale)
            grads[1][:, seen].baddbmm_(scores.transpose(1, 2), query[:, rows], alpha=ctx.scale)
        return *(grad.to(dtype) for grad in grads), None, None


def _blocks(query: torch.Tensor) -> list[slice]:
    length = query.shape[1]
    return [slice(start, min(start + ROWS, length)) for start in range(0, length, ROWS)]


def _probabilities(query: torch.Tensor, key: torch.Tensor, rows: slice, scale: float) -> torch.Tensor:
    """[heads, rows, keys up to the block's last query]; zero where a key comes after its query."""
    scores = torch.bmm(query[:, rows], key[:, : rows.stop].transpose(1, 2)).mul_(scale)
    later = torch.ones(scores.shape[1], scores.shape[1], dtype=torch.bool).triu_(1)
    scores[:, :, rows.start :].masked_fill_(later, float("-inf"))
    return torch.softmax(scores, -1, out=scores)
