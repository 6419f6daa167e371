"""Sampling against Hugging Face's rules, written out in numpy; the random numbers are a grid, so frequencies are exact."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from launcher.engine.generate.sampling import NOT_FINITE, Sampler, random_numbers
from launcher.recipe.schema import Generate

GRID = 2000
VOCAB = 7
logits_of = st.lists(st.floats(-4, 4, width=32), min_size=VOCAB, max_size=VOCAB, unique=True)


def reference(logits: list[float], options: Generate, seen: set[int]) -> np.ndarray:
    """The probability of each token: penalty, temperature, top-k, top-p, in this order."""
    x = np.array(logits, dtype=np.float64)
    for token in seen:
        x[token] = x[token] * options.repetition_penalty if x[token] < 0 else x[token] / options.repetition_penalty
    x = x / options.temperature
    order = np.argsort(-x, kind="stable")
    kept = order[: options.top_k] if options.top_k else order
    p = np.zeros(VOCAB)
    p[kept] = np.exp(x[kept]) / np.exp(x[kept]).sum()
    if options.top_p:
        total = 0.0
        for token in kept:
            if total >= options.top_p:
                p[token] = 0.0
            else:
                total += p[token]
    return p / p.sum()


def frequencies(logits: list[float], options: Generate, seen: set[int]) -> np.ndarray:
    uniforms = (torch.arange(GRID) + 0.5) / GRID
    padded = torch.tensor([[*logits, 50.0, 50.0]]).expand(GRID, -1)  # two padded ids, likelier than all others
    mask = torch.tensor([token in seen for token in range(VOCAB)]).expand(GRID, -1)
    chosen = Sampler(options, VOCAB).choose(padded, uniforms, mask)
    return np.bincount(chosen.numpy(), minlength=VOCAB) / GRID


@settings(max_examples=60, deadline=None)
@given(
    logits_of,
    st.floats(0.3, 3),
    st.integers(0, VOCAB),
    st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    st.sampled_from([1.0, 0.7, 1.5]),
    st.sets(st.integers(0, VOCAB - 1)),
)
def test_frequencies_are_the_probabilities(logits, temperature, top_k, top_p, penalty, seen):
    options = Generate(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    expected = reference(logits, options, seen if penalty != 1.0 else set())
    everything = reference(logits, replace(options, top_p=0.0), seen if penalty != 1.0 else set())
    sums = np.cumsum(np.sort(everything)[::-1])
    assume(not 0 < top_p < 1 or np.abs(sums - top_p).min() > 1e-5)  # else it is rounding that lets a token into top-p
    np.testing.assert_allclose(frequencies(logits, options, seen), expected, atol=1.5 / GRID)


@pytest.mark.parametrize("options", [{"greedy": True}, {"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}])
def test_greedy_by_any_name_is_the_likeliest_real_token(options):
    logits = [0.1, 3.0, -1.0, 2.9, 0.0, 1.0, 2.0]
    assert frequencies(logits, Generate(**options), set()).tolist() == [0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_told_and_only_their_row(bad):
    logits = torch.tensor([[0.0, bad, 1.0], [0.0, 1.0, 2.0]])
    for options in (Generate(greedy=True), Generate()):
        chosen = Sampler(options, 3).choose(logits, torch.tensor([0.5, 0.99]), None)
        assert chosen.tolist() == [NOT_FINITE, 2]


def test_random_numbers_belong_to_seed_and_line():
    one = random_numbers(1, 2, 8)
    assert one.tolist() == random_numbers(1, 2, 8).tolist() == random_numbers(1, 2, 20)[:8].tolist()
    others = {tuple(random_numbers(seed, line, 8).tolist()) for seed in range(5) for line in range(5)}
    assert len(others) == 25 and 0 <= min(map(min, others)) and max(map(max, others)) < 1
