"""From the logits of the next token to the token."""

from __future__ import annotations

import hashlib

import torch

from launcher.recipe.schema import Generate

NOT_FINITE = -1  # chosen in place of a token where a row's logits hold NaN or infinity


class Sampler:
    """Chooses the next token of every row, as `generate.*` of the recipe says.

    A row's choice depends on its logits, its tokens so far and its own random numbers, never on its neighbours.
    The order is that of Hugging Face: repetition penalty, temperature, top-k, top-p.
    """

    def __init__(self, options: Generate, vocab_size: int):
        """`vocab_size`: the tokenizer's ids; the padding behind them is never chosen."""
        self.options, self.vocab_size = options, vocab_size
        self.greedy = options.greedy or options.temperature == 0 or options.top_k == 1
        self.penalised = options.repetition_penalty != 1.0

    def choose(self, logits: torch.Tensor, uniforms: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """Token ids [b], or NOT_FINITE.

        Args:
            logits: [b, padded vocabulary].
            uniforms: [b], each from [0, 1).
            seen: [b, vocab_size], true for the tokens of the prompt and the answer so far; needed with a penalty.
        """
        logits = logits[:, : self.vocab_size].float()
        broken = ~torch.isfinite(logits.amax(dim=-1))  # NaN spreads to the maximum; cheaper than asking every logit
        if self.penalised:
            penalty = self.options.repetition_penalty
            logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        ids = logits.argmax(dim=-1) if self.greedy else self._sample(logits / self.options.temperature, uniforms)
        return ids.masked_fill(broken, NOT_FINITE)

    def _sample(self, logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """Draw by inverting the cumulative distribution: one random number per row, the same on every device."""
        ids, top_k, top_p = None, self.options.top_k, self.options.top_p
        if 0 < top_k < self.vocab_size:
            logits, ids = logits.topk(top_k, dim=-1)
        elif 0 < top_p < 1:
            logits, ids = logits.sort(dim=-1, descending=True, stable=True)
        # 64 bits: over 100,000 tokens the rounding of a 32-bit sum would shift the bounds of the rare ones.
        probabilities = torch.softmax(logits.double(), dim=-1)
        if 0 < top_p < 1:
            before = probabilities.cumsum(dim=-1) - probabilities  # the likeliest always has 0 before it
            probabilities = probabilities.masked_fill(before >= top_p, 0.0)
        bounds = probabilities.cumsum(dim=-1)
        target = uniforms.to(bounds)[:, None] * bounds[:, -1:]
        chosen = torch.searchsorted(bounds, target, right=True).clamp(max=bounds.shape[1] - 1)
        return (chosen if ids is None else ids.gather(1, chosen))[:, 0]


def random_numbers(seed: int, line: int, count: int) -> torch.Tensor:
    """`count` numbers of [0, 1) that belong to (seed, input line) alone, in 32 bits, on the CPU."""
    digest = hashlib.sha256(f"{seed}:{line}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.rand(count, generator=generator)
