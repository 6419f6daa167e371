"""Output layer and cross-entropy in one: the logits exist for some hundred tokens at a time and never whole.

The gradients of hidden states and table are made in the same pass, chunk by chunk, while the logits are there; the
backward pass only scales them. That needs the gradient of each token's loss up to one common factor, so it is the sum
over the masked tokens that is differentiated, not each token's loss.

The vocabulary may lie in shares over the tensor-parallel ranks (Shoeybi et al. 2019, arXiv 1909.08053, section 3): two
all-reduces of a number per token.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from launcher.recipe.size import LOGIT_ROWS


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.nn.Parameter,
    labels: torch.Tensor,
    mask: torch.Tensor,
    group: dist.ProcessGroup,
    add_to_main_grad: bool = False,
    tied_here: bool = False,
    expected_scale: float = 1.0,
    ids: int | None = None,
) -> torch.Tensor:
    """Sum over the tokens of mask x cross-entropy of `hidden @ weight.T`, in fp32.

    Args:
        hidden: [tokens, h], the same on every rank of `group`; its gradient is this rank's part of the sum over them.
        weight: [vocabulary / ranks, h], this rank's rows; its gradient is made only where it is wanted.
        labels: [tokens], ids of the whole vocabulary.
        mask: [tokens], a factor for each token's loss.
        group: the tensor-parallel ranks.
        add_to_main_grad: add the table's gradient to `weight.main_grad` as megatron-core's fused linear layers do.
        tied_here: with it, return none besides: the embedding, whose turn is last, tells the hooks that there is one.
        expected_scale: about what the backward pass will be called with. It changes no result, but in fp16 it keeps small
            gradients from vanishing, and lets an overflow be seen, as the loss scale does without this function.
        ids: how many rows of the whole vocabulary there are ids for; the others pad it, and with this have no share in the softmax.
    """
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    more = group, add_to_main_grad, tied_here, expected_scale, ids, wants_grad
    return _LinearCrossEntropy.apply(hidden, weight, labels, mask.float(), *more)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, mask, group, add_to_main_grad, tied_here, expected_scale, ids, wants_grad):
        losses = torch.empty_like(mask)
        if wants_grad:
            hidden_grad = torch.empty_like(hidden)
            weight_grad = torch.empty_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        rows, tokens = LOGIT_ROWS[hidden.device.type], len(hidden)
        for start in range(0, tokens, rows):
            part = slice(start, start + rows)
            losses[part], gradient = _chunk(hidden[part], weight, labels[part], group, ids)
            if wants_grad:
                factor = mask[part, None] * expected_scale
                _add_gradients(hidden[part], weight, gradient, factor, hidden_grad[part], weight_grad, first=start == 0)
            del gradient  # before the next chunk's logits
        if wants_grad:
            ctx.save_for_backward(hidden_grad, weight_grad)
            ctx.weight, ctx.expected_scale = weight, expected_scale
            ctx.add_to_main_grad, ctx.tied_here = add_to_main_grad, tied_here
        return (losses * mask).sum()

    @staticmethod
    def backward(ctx, grad_output):
        hidden_grad, weight_grad = ctx.saved_tensors
        factor, weight = grad_output / ctx.expected_scale, ctx.weight
        hidden_grad = (hidden_grad * factor).to(hidden_grad.dtype)
        if weight_grad is None:
            pass
        elif ctx.add_to_main_grad:
            weight.main_grad.add_(weight_grad, alpha=factor.item())
            weight.grad_added_to_main_grad = True  # what is returned only tells the hooks that it is there
            weight_grad = None if ctx.tied_here else torch.empty_like(weight)
        else:
            weight_grad = weight_grad.mul_(factor).to(weight.dtype)
        return hidden_grad, weight_grad, *[None] * 8


def _chunk(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup, ids: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [rows] and their gradients by the logits [rows, vocabulary / ranks], in fp32."""
    logits = (hidden @ weight.t()).float()
    rows, ranks = torch.arange(len(labels), device=labels.device), group.size()
    first = group.rank() * len(weight)
    if ids is not None:  # no infinity, of which a rank that holds nothing but padding would make NaN
        logits[:, max(ids - first, 0) :] = torch.finfo(torch.float32).min
    labels = labels - first
    here = (labels >= 0) & (labels < len(weight))
    labels = labels.clamp(0, len(weight) - 1)
    target = logits[rows, labels] * here
    top = logits.amax(-1)
    softmax = torch.softmax(logits, -1, out=logits)
    log_sum = top - softmax.amax(-1).log()  # the likeliest has 1 / sum(exp(logits - top))
    if ranks > 1:
        whole = log_sum.clone()
        dist.all_reduce(whole, dist.ReduceOp.MAX, group=group)
        sums = torch.stack([(log_sum - whole).exp(), target])
        dist.all_reduce(sums, group=group)
        whole, target = whole + sums[0].log(), sums[1]
        softmax *= (log_sum - whole).exp()[:, None]
        log_sum = whole
    softmax[rows, labels] -= here.float()
    return log_sum - target, softmax


def _add_gradients(hidden, weight, gradient, factor, hidden_grad, weight_grad, first: bool) -> None:
    """Through the output layer: `hidden_grad` is set, `weight_grad`, if any, set by the first chunk and added to by the others."""
    if weight.dtype == torch.float32:  # the factor on the small matrices: one pass less over the large one
        torch.mm(gradient, weight, out=hidden_grad).mul_(factor)
        if weight_grad is not None:
            torch.addmm(weight_grad, gradient.t(), hidden * factor, beta=0 if first else 1, out=weight_grad)
        return
    gradient = gradient.mul_(factor).to(weight.dtype)
    torch.mm(gradient, weight, out=hidden_grad)
    if weight_grad is not None:
        product = gradient.t() @ hidden
        weight_grad.copy_(product) if first else weight_grad.add_(product)
