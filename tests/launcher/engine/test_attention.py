"""Attention with dropout on a CPU, block by block: its values, its gradients, its share of zeros."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from launcher.engine import attention


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "ROWS", 3)  # two whole blocks and a part of one


def inputs() -> list[torch.Tensor]:
    """Query, key and value as a projection leaves them, one tensor's columns: [heads, s, d] that are not contiguous."""
    torch.manual_seed(0)
    together = torch.randn(7, 2, 9, dtype=torch.double, requires_grad=True)
    return [x.permute(1, 0, 2) for x in together.split(3, -1)]


def test_without_dropout_it_is_torchs():
    query, key, value = inputs()
    ours = attention.causal_attention_with_dropout(query, key, value, 0.0, 0.35)
    torch.testing.assert_close(ours, scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.35))


def test_its_gradients_are_those_of_finite_differences():
    def drawn_alike(*tensors):
        torch.manual_seed(1)
        return attention.causal_attention_with_dropout(*tensors, 0.3, 0.35)

    assert torch.autograd.gradcheck(drawn_alike, [x.detach().requires_grad_() for x in inputs()])


def unfused(query, key, value, gone, dropout: float, scale: float) -> torch.Tensor:
    """As megatron-core's own: softmax in fp32 or better, the products in the inputs' precision."""
    later = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool).triu(1)
    scores = torch.bmm(query, key.transpose(1, 2)) * scale
    if scores.dtype != torch.double:
        scores = scores.float()
    probabilities = torch.softmax(scores.masked_fill(later, float("-inf")), -1).to(query.dtype)
    return torch.bmm(probabilities.masked_fill(gone, 0.0) / (1 - dropout), value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_its_gradients_are_no_less_exact_than_the_unfused_ones(dtype):
    torch.manual_seed(3)
    *inputs, out = torch.randn(4, 4, 90, 16).to(dtype)
    gone = torch.zeros(4, 90, 90, dtype=torch.bool)
    torch.manual_seed(4)
    for start in range(0, 90, 3):  # the same mask, drawn block by block
        gone[:, start : start + 3, : start + 3] = torch.empty(4, 3, start + 3, dtype=torch.bool).bernoulli_(0.1)
    torch.manual_seed(4)
    ways = {
        "exact": (lambda *x: unfused(*x, gone, 0.1, 0.25), [x.double() for x in inputs]),
        "unfused": (lambda *x: unfused(*x, gone, 0.1, 0.25), inputs),
        "ours": (lambda *x: attention.causal_attention_with_dropout(*x, 0.1, 0.25), inputs),
    }
    found = {}
    for name, (way, tensors) in ways.items():
        leaves = [x.clone().requires_grad_() for x in tensors]
        context = way(*leaves)
        found[name] = [context, *torch.autograd.grad(context, leaves, out.to(context.dtype))]
    for exact, theirs, ours in zip(*found.values(), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exact).norm() < 1.05 * (theirs.double() - exact).norm()


def test_it_drops_that_share_and_keeps_the_mean():
    torch.manual_seed(2)
    query, key = torch.zeros(2, 400, 50, 4)  # every key alike to every query
    value = torch.ones(400, 50, 4)
    context = attention.causal_attention_with_dropout(query, key, value, 0.25, 1.0)[:, :, 0]
    assert (context[:, 0] == 0).double().mean() == pytest.approx(0.25, abs=0.08)  # it sees itself alone
    assert context[:, 25:].mean() == pytest.approx(1.0, abs=0.01)


def numbers(*samples: list[int]) -> torch.Tensor:
    """The document of each position [b, s] of samples with documents of these lengths."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)) for lengths in samples])


def test_documents_are_found_by_their_numbers():
    expected = [[slice(0, 3), slice(3, 4), slice(4, 9)], [slice(0, 9)], [slice(0, 8), slice(8, 9)]]
    assert attention.documents(numbers([3, 1, 5], [9], [8, 1])) == expected
    mask = attention.document_mask(numbers([2, 1]))[0, 0]
    assert mask.int().tolist() == [[0, 1, 1], [0, 0, 1], [1, 1, 0]]
