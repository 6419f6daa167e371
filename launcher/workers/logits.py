"""The worker of `yuan convert A B --verify --logits`: reads the same prompts with one model, then with the other."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.workers.entry import Stop, run_worker

if TYPE_CHECKING:  # importing them takes 0.5 s, in which no signal is answered
    import torch

    from launcher.recipe.schema import Recipe
    from launcher.run.folder import RunFolder

SECOND, SUMMARY = "second.yaml", "summary.json"  # beside the frozen recipe: the other model's, and what was found
_PROMPTS, _LENGTH = 8, 64  # of random ids, where no input is given
_MOST_BYTES = 8 << 30  # of one model's logits, which are kept while the other one reads


def main(recipe: Recipe, folder: RunFolder, stop: Stop) -> None:
    """Let the models of `recipe` and of the recipe in SECOND read; one rank leaves SUMMARY."""
    from launcher.engine.initialize import finish, initialize

    initialize(recipe)
    import torch
    from megatron.core import parallel_state

    from launcher.recipe.frozen import read_frozen

    second = read_frozen(folder.path / SECOND)
    shared = [_prompts(recipe, second) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(shared, src=0)
    prompts: list[list[int]] = shared[0]
    vocabulary = min(recipe.derived.vocab_size, second.derived.vocab_size)
    first = _logits(recipe, prompts, vocabulary)
    other = _logits(second, prompts, vocabulary)
    ends = parallel_state.is_pipeline_last_stage(), parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_rank()
    if ends == (True, 0, 0):
        (folder.path / SUMMARY).write_text(json.dumps(_compared(prompts, first, other)), encoding="utf-8")
    torch.distributed.barrier()
    finish()


def _prompts(recipe: Recipe, second: Recipe) -> list[list[int]]:
    """The token ids to read: of the input's lines, by the first model's tokenizer; else random ones, always the same.

    Raises:
        UserError: a line cannot be read, by the second model either, or all are too long.
    """
    from launcher.engine.generate.answer import to_prompts
    from launcher.engine.generate.records import read_lines
    from launcher.errors import UserError
    from launcher.recipe.tokenizer import tokenizer_of

    vocabulary = min(recipe.derived.vocab_size, second.derived.vocab_size)
    if recipe.generate.input is None:
        length = min(_LENGTH, recipe.model.max_position_embeddings, second.model.max_position_embeddings)
        draw = random.Random(0)
        return [[draw.randrange(vocabulary) for _ in range(length)] for _ in range(_PROMPTS)]
    lines = read_lines(Path(recipe.generate.input), recipe.tokenizer.chat_template is not None)
    prompts = to_prompts(recipe, tokenizer_of(recipe.tokenizer), lines)
    if bad := next((line for line in lines if line.error), None):
        raise UserError(bad.error, f"{recipe.generate.input}:{bad.number}", "mend the line")
    positions = second.model.max_position_embeddings
    for prompt in prompts:
        if len(prompt.ids) > positions or max(prompt.ids) >= vocabulary:
            what = f"{len(prompt.ids)} tokens, up to id {max(prompt.ids)}: the second model has {positions} positions, and both have {vocabulary} ids"
            raise UserError(what, f"{recipe.generate.input}:{prompt.line}", "leave the line out")
    tokens = sum(len(prompt.ids) for prompt in prompts)
    if not tokens or 4 * tokens * vocabulary > _MOST_BYTES:
        what = f"{tokens:,} tokens, whose logits take {4 * tokens * vocabulary / 1e9:,.1f} GB, of at most {_MOST_BYTES / 1e9:.1f}"
        raise UserError(what, recipe.generate.input, "give another --input")
    return [prompt.ids for prompt in prompts]


def _logits(recipe: Recipe, prompts: list[list[int]], vocabulary: int) -> list[torch.Tensor]:
    """After every token of each prompt, [s, vocabulary] in fp32 on the CPU; on the last stage, empty elsewhere."""
    import torch

    from launcher.workers.generate import load_model

    model = load_model(recipe)
    device = torch.device(recipe.derived.device if recipe.derived.device == "cpu" else f"cuda:{torch.cuda.current_device()}")
    with torch.no_grad():
        found = [model.read(torch.tensor(ids, device=device)) for ids in prompts]
    return [one[:, :vocabulary].float().cpu() for one in found if one is not None]


def _compared(prompts: list[list[int]], first: list[torch.Tensor], second: list[torch.Tensor]) -> dict:
    """What the two models' logits have apart."""
    import torch

    apart = [(one - other).abs().nan_to_num(torch.inf) for one, other in zip(first, second, strict=True)]
    most = max(range(len(prompts)), key=lambda number: apart[number].max().item())
    place = int(apart[most].amax(1).argmax())
    likeliest = [(one.argmax(1), other.argmax(1)) for one, other in zip(first, second, strict=True)]
    return {
        "tokens": sum(map(len, prompts)),
        "prompts": len(prompts),
        "largest": apart[most].max().item(),
        "mean": torch.cat([one.flatten() for one in apart]).mean().item(),
        "spread": torch.cat([one.flatten() for one in first]).std().item(),
        "agree": sum(int((one == other).sum()) for one, other in likeliest),
        "most": {"prompt": most, "ids": prompts[most], "place": place, "likeliest": [int(one[place]) for one in likeliest[most]]},
    }


if __name__ == "__main__":
    run_worker(main)
