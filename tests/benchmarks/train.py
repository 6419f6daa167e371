"""Speed of a training step on this machine's CPU: yuan beside megatron-core's local spec and transformers' GPT-2.

Contestants take turns, each in a process of its own, all without dropout: yuan's with the environment that `yuan pretrain` gives
a rank, the others' with as many threads and what they set themselves, or with the same one (environment=yuan). Around every step the machine's GEMM peak is taken again by torch.mm of the model's own shapes, forward
and backward; a step is told as its share of that peak, so that what else the machine does weighs on both alike. CPU
seconds are told as well: they do not count the time in which others had the cores.

    python -m tests.benchmarks.train small                     6 layers x 384, sequences of 256
    python -m tests.benchmarks.train 345m                      24 layers x 1,024, sequences of 1,024
    python -m tests.benchmarks.train layouts                   two processes against one with two threads
    python -m tests.benchmarks.train loop                      what the loop around a step costs
    python -m tests.benchmarks.train small key=value ...       with other values, rounds=N, environment=yuan
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launcher.launch.machines import Alone
from launcher.launch.torchrun import environment
from launcher.recipe import load
from launcher.recipe.schema import Recipe
from launcher.recipe.size import flops_per_token

COMMON = """recipe=345m model.attention_dropout=0 model.hidden_dropout=0 parallel.recompute_granularity=null
training.precision=fp32 tokenizer.type=NullTokenizer tokenizer.vocab_size=50303 launch.device=cpu optimizer.lr_decay_iters=null"""
SHAPES = {
    "small": """model.num_layers=6 model.hidden_size=384 model.num_attention_heads=6 model.max_position_embeddings=256
training.seq_length=256 training.micro_batch_size=4 training.global_batch_size=4""",
    "345m": "training.micro_batch_size=1 training.global_batch_size=1",
}
# Four micro-batches of two for one process, pipeline and tensor ranks; data-parallel ranks have two each.
LAYOUT_SHAPE = SHAPES["small"].replace("size=4", "size=2").replace("global_batch_size=2", "global_batch_size=8")
LAYOUTS = {
    "one process": "",
    "TP 2": "launch.nproc_per_node=2 parallel.tensor_model_parallel_size=2",
    "PP 2": "launch.nproc_per_node=2 parallel.pipeline_model_parallel_size=2",
    "DP 2": "launch.nproc_per_node=2",
}
CONTESTANTS = ("yuan", "megatron-core's local spec", "transformers' GPT-2")
STEPS, WARM_UP = 3, 1  # in each turn
SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "THP_MEM_ALLOC_ENABLE", "MKL_DYNAMIC")  # of yuan's environment


def words_of(shape: str, more: list[str]) -> list[str]:
    return [*COMMON.split(), *shape.split(), *more]


def turn(contestant: str, words: list[str], same_environment: bool = False) -> list[dict]:
    """One turn of a contestant: for each step of its first rank the seconds, CPU seconds and seconds in communication,
    and the peak's GFLOP/s before and after it, by both clocks."""
    left_out = () if contestant == CONTESTANTS[0] or same_environment else tuple(name for name in SETTINGS if name not in os.environ)
    recipe = load(words).recipe
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        machine = Alone(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.train", "--rank", contestant, *words],
            env={name: value for name, value in environment(recipe, rank, machine).items() if name not in left_out},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(recipe.launch.nproc_per_node)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"{contestant} died on {' '.join(words)}")
    return json.loads(said[0].splitlines()[-1])


def rank_worker(contestant: str, words: list[str]) -> None:
    """One rank of a turn."""
    recipe = load(words).recipe
    if contestant == CONTESTANTS[2]:
        return print(json.dumps(measured(recipe, hugging_face(recipe), {"comm": 0.0})))
    from launcher.engine.initialize import finish, initialize

    initialize(recipe)
    waited = count_waiting()
    step = yuan(recipe) if contestant == CONTESTANTS[0] else bare(recipe)
    print(json.dumps(measured(recipe, step, waited)))
    finish()


def measured(recipe: Recipe, step: Callable[[], None], waited: dict) -> list[dict]:
    found = []
    probe = peak_probe(recipe) if recipe.derived.world_size == 1 else lambda: (None, None)
    for number in range(WARM_UP + STEPS):
        before, waited["comm"] = probe(), 0.0
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        one = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "comm": waited["comm"]}
        if number >= WARM_UP:
            found.append(one | {"peak": [before, probe()]})
    return found


def peak_probe(recipe: Recipe) -> Callable[[], tuple[float, float]]:
    """GFLOP/s of the model's own matrix products: each shape forward, and both of its products backward."""
    import torch

    m, tokens = recipe.model, recipe.training.micro_batch_size * recipe.training.seq_length
    h, f, vocabulary = m.hidden_size, m.ffn_hidden_size, recipe.derived.padded_vocab_size
    layer = [(h, 3 * h), (h, h), (h, f), (f, h)]
    shapes = [(*shape, m.num_layers) for shape in layer] + [(h, vocabulary, 1)]
    tensors = [
        [torch.rand(size) for size in ((tokens, k), (n, k), (tokens, n))] + [torch.empty(n, k), torch.empty(tokens, k)]
        for k, n, _ in shapes
    ]

    def probe() -> tuple[float, float]:
        wall_total = cpu_total = 0.0
        for (_, _, count), (x, w, y, dw, dx) in zip(shapes, tensors, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            torch.mm(x, w.t(), out=y)
            torch.mm(y, w, out=dx)
            torch.mm(y.t(), x, out=dw)
            wall_total += count * (time.perf_counter() - wall)
            cpu_total += count * (time.process_time() - cpu)
        flop = sum(6 * tokens * k * n * count for k, n, count in shapes)
        return flop / wall_total / 1e9, flop / cpu_total / 1e9

    probe()
    return probe


def count_waiting() -> dict:
    """{"comm": seconds that this process has waited for collectives and messages}."""
    from torch.distributed import Work

    waited, wait = {"comm": 0.0}, Work.wait

    def timed(self, *arguments, **more):
        started = time.perf_counter()
        result = wait(self, *arguments, **more)
        waited["comm"] += time.perf_counter() - started
        return result

    Work.wait = timed
    return waited


def yuan(recipe: Recipe) -> Callable[[], None]:
    from launcher.engine.train import build, train_step

    state = build(recipe)
    for chunk in state.chunks:
        chunk.train()
    batches = [random_batches(recipe)]
    return lambda: train_step(recipe, state, batches)


def bare(recipe: Recipe) -> Callable[[], None]:
    from tests.benchmarks.bare import BareLoop

    loop, batches = BareLoop(recipe), random_batches(recipe)
    return lambda: loop.step(batches)


def hugging_face(recipe: Recipe) -> Callable[[], None]:
    """GPT2LMHeadModel with SDPA attention, torch's fused AdamW, clipping."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(recipe.launch.cpu_threads)
    m = recipe.model
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=recipe.derived.padded_vocab_size,
            n_positions=m.max_position_embeddings,
            n_embd=m.hidden_size,
            n_layer=m.num_layers,
            n_head=m.num_attention_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            attn_implementation="sdpa",
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optimizer.lr, weight_decay=0.1, fused=True)
    batches = random_batches(recipe)

    def step() -> None:
        optimizer.zero_grad()
        ids = next(batches)["tokens"]
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_grad)
        optimizer.step()

    return step


def alone() -> None:
    """torchrun's environment of a world of one process, for this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ.update(place | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})


def random_batches(recipe: Recipe) -> Iterator[dict]:
    """Microbatches of random ids without end, where documents are kept apart of four in each sample."""
    import torch

    shape = recipe.training.micro_batch_size, recipe.training.seq_length
    while True:
        ids = torch.randint(recipe.derived.vocab_size, (shape[0], shape[1] + 1))
        positions = torch.arange(shape[1]).expand(shape)
        batch = {"tokens": ids[:, :-1], "labels": ids[:, 1:], "position_ids": positions, "loss_mask": torch.ones(shape)}
        if recipe.data.reset_attention_mask:
            batch["document"] = positions * 4 // shape[1]
        yield batch


def compare(shape: str, more: list[str], rounds: int, same_environment: bool) -> None:
    """All contestants at one shape, `rounds` turns each."""
    words = words_of(SHAPES[shape], more)
    recipe = load(words).recipe
    tokens = recipe.training.global_batch_size * recipe.training.seq_length
    m = recipe.model
    print(
        f"training step: {m.num_layers} layers x {m.hidden_size}, vocabulary {recipe.derived.padded_vocab_size}, "
        f"{recipe.training.global_batch_size} x {recipe.training.seq_length} tokens, fp32, {recipe.launch.cpu_threads} threads"
    )
    steps: dict[str, list[dict]] = {name: [] for name in CONTESTANTS}
    for _ in range(rounds):
        for name, found in steps.items():
            found += turn(name, words, same_environment)
            print(f"  a turn of {name}: {found[-1]}", file=sys.stderr, flush=True)
    work = tokens * flops_per_token(recipe) / 1e9
    print(f"  {'':<28} {'tokens/s':>9} {'seconds':>8} {'CPU s':>7}   GEMM peak, GFLOP/s: share of it (by CPU seconds)")
    shares = {name: report(name, found, tokens, work) for name, found in steps.items()}
    cpu = {name: statistics.median(one["cpu"] for one in found) for name, found in steps.items()}
    for name in CONTESTANTS[1:]:
        ratio, by_cpu = shares["yuan"] / shares[name], cpu[name] / cpu["yuan"]
        print(f"  yuan is {ratio:.2f} x as fast as {name}; by CPU seconds {by_cpu:.2f} x")


def report(name: str, found: list[dict], tokens: int, work: float) -> float:
    """One contestant's line; returns its share of the peak, `work` being GFLOP of a step."""
    median = {key: statistics.median(one[key] for one in found) for key in ("wall", "cpu")}
    peaks = [[statistics.mean(clock) for clock in zip(*one["peak"], strict=True)] for one in found]
    share = statistics.median(work / one["wall"] / peak for one, (peak, _) in zip(found, peaks, strict=True))
    by_cpu = statistics.median(work / one["cpu"] / peak for one, (_, peak) in zip(found, peaks, strict=True))
    peak = statistics.median(peak for peak, _ in peaks)
    print(
        f"  {name:<28} {tokens / median['wall']:9,.0f} {median['wall']:8.2f} {median['cpu']:7.2f}   "
        f"{peak:6.0f}: {share:4.0%} ({by_cpu:.0%})",
        flush=True,
    )
    return share


def layouts(more: list[str], rounds: int) -> None:
    """Two processes with a thread each against one with two, in turns."""
    steps: dict[str, list[dict]] = {name: [] for name in LAYOUTS}
    for _ in range(rounds):
        for name, found in steps.items():
            found += turn("yuan", words_of(LAYOUT_SHAPE, [*LAYOUTS[name].split(), *more]))
    print("training step of 8 x 256 tokens in micro-batches of 2: 6 layers x 384, vocabulary 50304, two cores")
    one = statistics.median(step["wall"] for step in steps["one process"])
    for name, found in steps.items():
        wall = statistics.median(step["wall"] for step in found)
        waiting = statistics.median(step["comm"] / step["wall"] for step in found)
        print(f"  {name:<12} {wall:6.2f} s, {wall / one:.2f} x one process; {waiting:4.0%} of it waiting for the other")


def main(words: list[str]) -> None:
    same = "environment=yuan" in words
    what, more = words[0], [word for word in words[1:] if not word.startswith(("rounds=", "environment="))]
    rounds = next((int(word[7:]) for word in words if word.startswith("rounds=")), 3)
    if what == "layouts":
        layouts(more, rounds)
    elif what == "loop":
        from tests.benchmarks.train_loop import main as loop

        loop(more)
    else:
        compare(what, more, rounds, same)


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        rank_worker(sys.argv[2], sys.argv[3:])
    else:
        main(sys.argv[1:])
