"""What is measured and not asserted: ratios within one run, medians of several rounds. `make bench`

Training step: yuan's layer spec (fused attention) against megatron-core's own local spec, the rest alike, in one
process that takes turns between the two, so that what else the machine does weighs on both.
"""

import os
import socket
import statistics
import sys
import time
from collections.abc import Iterator

from launcher.recipe import load
from launcher.recipe.schema import Recipe

ROUNDS, WARM_UP = 7, 2
SHAPE = """
model.num_layers=6 model.hidden_size=384 model.num_attention_heads=6 model.max_position_embeddings=256
model.attention_dropout=0 model.hidden_dropout=0 parallel.recompute_granularity=null
training.seq_length=256 training.micro_batch_size=4 training.global_batch_size=4 training.precision=fp32
tokenizer.type=NullTokenizer tokenizer.vocab_size=50303 launch.device=cpu
"""


def main() -> None:
    recipe = load(["recipe=345m", *SHAPE.split(), *sys.argv[1:]]).recipe
    alone()
    from launcher.engine.initialize import finish, initialize

    initialize(recipe)
    turns = {"megatron-core's local spec": built(recipe, local=True), "yuan": built(recipe, local=False)}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for round_number in range(WARM_UP + ROUNDS):
        for name, state in turns.items():
            took = step(recipe, state)
            if round_number >= WARM_UP:
                seconds[name].append(took)
    report(recipe, seconds)
    finish()


def alone() -> None:
    """torchrun's environment of a world of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def built(recipe: Recipe, local: bool):
    """Model and optimizer; with `local`, of the layers that megatron-core's GPTModel has without Transformer Engine."""
    from unittest import mock

    from launcher.engine import layers
    from launcher.engine.train import build
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    destroy_num_microbatches_calculator()  # `build` makes one for the process, and is called twice here
    if not local:
        return build(recipe)
    with mock.patch.object(layers, "block_spec", lambda *_: get_gpt_layer_local_spec()):
        return build(recipe)


def step(recipe: Recipe, state) -> float:
    """Seconds of one optimizer step, forward, backward and update."""
    from launcher.engine.train import train_step

    batches = [random_batches(recipe)]
    started = time.perf_counter()
    train_step(recipe, state, batches)
    return time.perf_counter() - started


def random_batches(recipe: Recipe) -> Iterator[dict]:
    import torch

    shape = recipe.training.micro_batch_size, recipe.training.seq_length
    while True:
        ids = torch.randint(recipe.derived.vocab_size, (shape[0], shape[1] + 1))
        positions = torch.arange(shape[1]).expand(shape)
        yield {"tokens": ids[:, :-1], "labels": ids[:, 1:], "position_ids": positions, "loss_mask": torch.ones(shape)}


def report(recipe: Recipe, seconds: dict[str, list[float]]) -> None:
    model, training = recipe.model, recipe.training
    tokens = training.global_batch_size * training.seq_length
    print(
        f"training step: {model.family}, {model.num_layers} layers x {model.hidden_size}, vocabulary {recipe.derived.padded_vocab_size}, "
        f"{training.global_batch_size} x {training.seq_length} tokens, {training.precision}, {recipe.launch.cpu_threads} threads"
    )
    for name, all_of_them in seconds.items():
        median = statistics.median(all_of_them)
        print(f"  {name:<28} {tokens / median:8,.0f} tokens/s   median {median:.3f} s, {min(all_of_them):.3f} to {max(all_of_them):.3f} s")
    local, ours = seconds.values()
    ratios = sorted(a / b for a, b in zip(local, ours, strict=True))
    print(f"  yuan is {statistics.median(ratios):.2f} x as fast (of {len(ratios)} rounds, {ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
