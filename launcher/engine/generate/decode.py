"""Answers to a batch of prompts."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Literal

import torch
from megatron.core import parallel_state

from launcher.engine.generate.cache import CachedModel
from launcher.engine.generate.sampling import NOT_FINITE, Sampler, random_numbers

NO_NUMBERS = "the model's logits are not finite numbers"


@dataclass
class Prompt:
    """What is asked: `ids` of at least one token, and at most `limit` tokens of answer. `line` names it, from 1."""

    line: int
    ids: list[int]
    limit: int


@dataclass
class Answer:
    """The tokens of an answer, without the token that ended it."""

    line: int
    ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "error"] | None = None


@torch.inference_mode()
def answer_batch(
    model: CachedModel, sampler: Sampler, prompts: list[Prompt], ends: Set[int], count: Callable[[int], None] = lambda tokens: None
) -> list[Answer]:
    """Answers in the order of the prompts. Every rank of the model calls this with the same prompts and gets the same.

    An answer ends with one of the tokens `ends`. Rows that have finished leave the batch. `count` is told the number of new tokens at every step.
    """
    answers = [Answer(prompt.line) for prompt in prompts]
    rows = list(range(len(prompts)))  # the prompt that each row of the batch answers
    limit = max(prompt.limit for prompt in prompts)
    uniforms = torch.stack([random_numbers(sampler.options.seed, prompt.line, limit) for prompt in prompts]).to("cuda")
    ids, lengths = _padded(prompts, min(ends))
    seen = _seen(prompts, sampler) if sampler.penalised else None
    positions = [len(prompt.ids) for prompt in prompts]
    logits = model.prefill(ids, lengths, max(len(prompt.ids) + prompt.limit for prompt in prompts))
    for step in range(limit):
        chosen = _agreed_choice(logits, len(rows), sampler, uniforms[:, step], seen)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            _take(answers[row], token, ends, prompts[row].limit)
        count(len(rows))
        going = [place for place, row in enumerate(rows) if answers[row].finish_reason is None]
        if not going:
            break
        if len(going) < len(rows):
            kept = torch.tensor(going, device="cuda")
            model.keep(kept)
            chosen, uniforms, seen = chosen[kept], uniforms[kept], None if seen is None else seen[kept]
            rows, positions = [rows[place] for place in going], [positions[place] for place in going]
        if seen is not None:
            seen[torch.arange(len(rows), device="cuda"), chosen] = True
        logits = model.decode(chosen, torch.tensor(positions, device="cuda"), max(positions) + 1)
        positions = [position + 1 for position in positions]
    return answers


def _take(answer: Answer, token: int, ends: Set[int], limit: int) -> None:
    if token == NOT_FINITE:
        answer.finish_reason = "error"
    elif token in ends:
        answer.finish_reason = "stop"
    else:
        answer.ids.append(token)
        answer.finish_reason = "length" if len(answer.ids) == limit else None


def _agreed_choice(logits, batch: int, sampler: Sampler, uniforms: torch.Tensor, seen) -> torch.Tensor:
    """The next tokens [b] on every rank: one rank of the last stage chooses, for sums on a GPU may differ between ranks."""
    group = parallel_state.get_model_parallel_group()
    size = torch.distributed.get_world_size(group)
    chooser = torch.distributed.get_global_rank(group, size - parallel_state.get_tensor_model_parallel_world_size())
    if torch.distributed.get_rank() == chooser:
        chosen = sampler.choose(logits, uniforms, seen)
    else:
        chosen = torch.empty(batch, dtype=torch.int64, device="cuda")
    if size > 1:
        torch.distributed.broadcast(chosen, chooser, group=group)
    return chosen


def _padded(prompts: list[Prompt], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids [b, s] and their lengths [b]."""
    lengths = [len(prompt.ids) for prompt in prompts]
    ids = torch.full((len(prompts), max(lengths)), pad, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : lengths[row]] = torch.tensor(prompt.ids)
    return ids.to("cuda"), torch.tensor(lengths, device="cuda")


def _seen(prompts: list[Prompt], sampler: Sampler) -> torch.Tensor:
    seen = torch.zeros(len(prompts), sampler.vocab_size, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen[row, prompt.ids] = True
    return seen.to("cuda")
