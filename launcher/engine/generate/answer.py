"""Answers to all lines of a file: tokenized, batched by length, shared out over the data-parallel ranks, put in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from megatron.core import parallel_state

from data_tools.records import BadLine
from data_tools.tokenizers import Tokenizer
from launcher.engine.generate.cache import CachedModel
from launcher.engine.generate.decode import NO_NUMBERS, Answer, Prompt, answer_batch
from launcher.engine.generate.records import Line
from launcher.engine.generate.sampling import Sampler
from launcher.recipe.schema import Recipe
from launcher.recipe.tokenizer import template_of

NOT_REACHED = "not answered: the job was stopped before"


class Meter:
    """Counts this rank's answers and tokens, and tells `show(answered, tokens, seconds)` at every step."""

    def __init__(self, show: Callable[[int, int, float], None]):
        self.show, self.answered, self.tokens, self.started = show, 0, 0, time.monotonic()

    def step(self, tokens: int) -> None:
        self.tokens += tokens
        self.show(self.answered, self.tokens, time.monotonic() - self.started)


def to_prompts(recipe: Recipe, tokenizer: Tokenizer, lines: list[Line]) -> list[Prompt]:
    """The lines that can be answered, tokenized, in the recipe's chat template where it has one; a line that cannot gets its
    error.

    An empty prompt is the end-of-document token, after which a document begins in the training data.
    """
    prompts, template = [], template_of(recipe.tokenizer, tokenizer)
    positions = recipe.model.max_position_embeddings
    for line in lines:
        if line.prompt is None:
            continue
        try:
            ids = template.prompt(line.turns) if template else tokenizer.encode(line.prompt) or [tokenizer.eod]
        except BadLine as error:
            line.fail(error.what)
            continue
        except ValueError as error:
            line.fail(f"cannot be tokenized: {error}")
            continue
        line.prompt_tokens = len(ids)
        if len(ids) >= positions:
            line.fail(f"the prompt has {len(ids)} tokens, and the model's {positions} positions leave no room for an answer")
            continue
        prompts.append(Prompt(line.number, ids, min(recipe.generate.max_new_tokens, positions - len(ids))))
    return prompts


def answer_all(
    recipe: Recipe, model: CachedModel, prompts: list[Prompt], tokenizer: Tokenizer, stop, meter: Meter
) -> list[Answer] | None:
    """Answers in any order; on rank 0 alone, None elsewhere. After `stop.requested` the rest is left out.

    Every rank calls it with the same prompts.
    """
    sampler, template = Sampler(recipe.generate, tokenizer.vocab_size), template_of(recipe.tokenizer, tokenizer)
    ends = {tokenizer.eod, *([template.end] if template else [])}
    answers: list[Answer] = []
    for batch in _share(prompts, recipe.generate.batch_size):
        if _asked_to_stop(stop):
            break
        answers += answer_batch(model, sampler, batch, ends, meter.step)
        meter.answered += len(batch)
    return _gathered(answers)


def fill(lines: list[Line], answers: list[Answer], tokenizer: Tokenizer) -> None:
    """Put the answers into their lines; a line that was left without one says so."""
    for answer in answers:
        line = lines[answer.line - 1]
        line.completion_tokens = len(answer.ids)
        text = tokenizer.decode(answer.ids)
        line.output, line.finish_reason = text.strip(" ") if line.turns else text, answer.finish_reason  # templates set spaces
        if answer.finish_reason == "error":
            line.fail(NO_NUMBERS)
    for line in lines:
        if line.prompt is not None and line.finish_reason is None:
            line.fail(NOT_REACHED)


def _share(prompts: list[Prompt], batch_size: int) -> Iterator[list[Prompt]]:
    """This data-parallel rank's batches. Prompts of like length go together, the longest first: a batch that does not
    fit into memory fails at once."""
    ordered = sorted(prompts, key=lambda prompt: len(prompt.ids), reverse=True)
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    return iter(batches[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()])


def _asked_to_stop(stop) -> bool:
    """Whether any rank of this model was: they must leave at the same batch."""
    vote = torch.tensor([float(stop.requested is not None)], device="cuda")
    torch.distributed.all_reduce(vote, op=torch.distributed.ReduceOp.MAX, group=parallel_state.get_model_parallel_group())
    return bool(vote.item())


def _gathered(answers: list[Answer]) -> list[Answer] | None:
    """All data-parallel ranks' answers, on rank 0: the first of its data-parallel group."""
    group = parallel_state.get_data_parallel_group()
    first = torch.distributed.get_global_rank(group, 0)
    parts: list | None = None
    if torch.distributed.get_rank() == first:
        parts = [None] * torch.distributed.get_world_size(group)
    torch.distributed.gather_object(answers, parts, dst=first, group=group)
    return [answer for part in parts for answer in part] if torch.distributed.get_rank() == 0 else None
