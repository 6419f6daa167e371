"""Speed of training on GPUs: yuan beside a bare megatron-core loop, tokens/s and the share of peaks (MFU).

    torchrun --nproc-per-node 1 -m tests.benchmarks.gpu_train                  345M and 1.3B in bf16
    torchrun --nproc-per-node 8 -m tests.benchmarks.gpu_train shapes=1.3b parallel.use_distributed_optimizer=true
    torchrun --nproc-per-node 1 -m tests.benchmarks.gpu_train shapes=tiny      on a CPU, to see that it runs

Further words are a recipe's, for yuan; the bare loop is data-parallel alone. In one process per GPU yuan trains
first, then the bare loop, on random tokens, without dropout or recomputation. MFU counts Megatron-LM's arithmetic of the model, against
the data sheet's dense peak of the GPU and against the rate of the largest matrix product that this GPU gives. The report
ends with one line of JSON that names date, hardware and versions.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date

from launcher.recipe import load
from launcher.recipe.schema import Recipe
from launcher.recipe.size import flops_per_token, parameters
from tests.benchmarks.train import COMMON, bare, random_batches

SHAPES = {
    "345m": "training.micro_batch_size=8",
    "1.3b": """model.num_layers=24 model.hidden_size=2048 model.num_attention_heads=16 model.max_position_embeddings=2048
training.seq_length=2048 training.micro_batch_size=4""",
    "tiny": """model.num_layers=2 model.hidden_size=64 model.num_attention_heads=4 model.max_position_embeddings=32
training.seq_length=32 training.micro_batch_size=2 tokenizer.vocab_size=511""",
}
# Dense bf16 TFLOP/s of the data sheets, by a part of the device's name; the first that fits counts.
DATA_SHEET = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362,
              "L4": 121, "A10": 125, "4090": 165, "3090": 71, "V100": 125}  # fmt: skip
STEPS, WARM_UP = 10, 3


def recipe_of(shape: str, more: list[str]) -> Recipe:
    """One micro-batch on each rank, whose number torchrun tells."""
    import torch

    world, on_gpu = int(os.environ["WORLD_SIZE"]), torch.cuda.is_available()
    words = [word for word in COMMON.split() if not word.startswith(("training.precision", "launch.device"))]
    words += [
        f"training.precision={'bf16' if on_gpu else 'fp32'}",
        f"launch.device={'cuda' if on_gpu else 'cpu'}",
        f"launch.nproc_per_node={world}",
    ]
    return load([*words, "training.global_batch_size=null", *SHAPES[shape].split(), *more]).recipe


def timed(step: Callable[[], None]) -> list[float]:
    """Seconds of each step after the warm-up, of the slowest rank."""
    import torch

    found = []
    for _ in range(WARM_UP + STEPS):
        torch.cuda.synchronize()
        torch.distributed.barrier()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    seconds = torch.tensor(found[WARM_UP:], device="cuda")
    torch.distributed.all_reduce(seconds, torch.distributed.ReduceOp.MAX)
    return seconds.tolist()


def ours(recipe: Recipe) -> Callable[[], None]:
    import torch
    from megatron.core import parallel_state

    from launcher.engine.parts import parts
    from launcher.engine.train import build, train_step

    state = build(recipe)
    for chunk in state.chunks:
        chunk.train()
    if torch.distributed.get_rank() == 0:
        print(f"  yuan's parts: {parts(recipe, state.optimizer)}")
    reads = parallel_state.get_tensor_model_parallel_rank() == 0
    batches = [random_batches(recipe) if reads else None for _ in state.chunks]
    return lambda: train_step(recipe, state, batches)


def measured_peak() -> float:
    """TFLOP/s of the best of some products of square matrices, bf16 on a GPU, fp32 on a CPU."""
    import torch

    on_gpu, best = torch.cuda.is_available(), 0.0
    for n in (4096, 8192, 16384) if on_gpu else (512,):
        a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16 if on_gpu else torch.float32) for _ in range(2))
        for _ in range(5):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(10):
                a @ b
            torch.cuda.synchronize()
            best = max(best, 20 * n**3 / (time.perf_counter() - started) / 1e12)
    return best


def compare(shape: str, more: list[str], peak: float) -> dict:
    """Both at one shape; prints their lines on rank 0 and returns the record."""
    import torch
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    recipe = recipe_of(shape, more)
    world, first = recipe.derived.world_size, torch.distributed.get_rank() == 0
    per_step = recipe.training.global_batch_size * recipe.training.seq_length
    sheet = next((tflops for name, tflops in DATA_SHEET.items() if name in device_name()), None)
    record = {"shape": shape, "parameters": parameters(recipe), "tokens_per_step": per_step, "world": world, "words": more}
    if first:
        print(f"{shape}: {parameters(recipe) / 1e6:,.0f} M parameters, {per_step:,} tokens a step, {world} ranks")
    for name, make in {"yuan": ours, "bare megatron-core": bare}.items():
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        step = make(recipe)
        seconds = statistics.median(timed(step))
        del step
        destroy_num_microbatches_calculator() if name == "yuan" else None
        gc.collect()
        torch.cuda.empty_cache()
        each = per_step * flops_per_token(recipe) / seconds / world / 1e12
        memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        record[name] = {"tokens_per_second": per_step / seconds, "tflops": each, "of_peak": each / peak, "memory_gib": memory}
        record[name]["mfu"] = each / sheet if sheet else None
        if first:
            of_sheet = f"MFU {each / sheet:.1%} of the data sheet's {sheet}" if sheet else "no data sheet"
            print(f"  {name:<20} {per_step / seconds:12,.0f} tokens/s  {each:8.3f} TFLOP/s each, {of_sheet}, {each / peak:.1%} of the measured peak")
    return record


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def main(words: list[str]) -> None:
    shapes = next((word[7:] for word in words if word.startswith("shapes=")), "345m,1.3b").split(",")
    more = [word for word in words if not word.startswith("shapes=")]
    recipe = recipe_of(shapes[0], more)
    from launcher.engine.initialize import finish, initialize

    initialize(recipe)
    import megatron.core
    import torch

    peak = measured_peak()
    records = [compare(shape, more, peak) for shape in shapes]
    if torch.distributed.get_rank() == 0:
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "megatron-core": megatron.core.__version__}
        told = {"date": date.today().isoformat(), "device": device_name(), "measured_peak_tflops": peak, **versions}
        print(json.dumps(told | {"results": records}))
    finish()


if __name__ == "__main__":
    main(sys.argv[1:])
