"""The memory estimate of `yuan check` beside what training really takes, on this machine's CPU. Part of `make bench`.

Each case trains two steps on random tokens and saves a checkpoint, one process per rank with the environment that
`yuan pretrain` gives it. Two peaks of every rank:

    process   the high-water mark of its resident memory, the GiB in a training's lines
    tensors   bytes in live tensors, what torch's allocator counts on a GPU; a training step's, without the checkpoint

    python -m tests.benchmarks.memory                 every case
    python -m tests.benchmarks.memory recipe=… key=…  one of your own
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

from launcher.launch.machines import Alone
from launcher.launch.torchrun import environment
from launcher.recipe import load
from launcher.recipe.estimate.memory import stage_memory

COMMON = """tokenizer.type=NullTokenizer launch.device=cpu training.seq_length=512
optimizer.lr_decay_iters=null"""
GPT = """recipe=345m model.num_layers=12 model.hidden_size=768 model.num_attention_heads=12 model.max_position_embeddings=512
tokenizer.vocab_size=32767 training.precision=fp32 training.micro_batch_size=2 training.global_batch_size=4
parallel.recompute_granularity=null"""
FUSED = "model.attention_dropout=0 model.hidden_dropout=0"
LLAMA = """recipe=quickstart model.num_layers=8 model.hidden_size=1024 model.num_attention_heads=16 model.num_query_groups=4
model.ffn_hidden_size=2816 tokenizer.vocab_size=16383 training.micro_batch_size=2 training.global_batch_size=8
launch.nproc_per_node=1"""
TWO, FULL = "launch.nproc_per_node=2", "parallel.recompute_granularity=full parallel.recompute_num_layers=1"
PP_2 = "parallel.pipeline_model_parallel_size=2"
CASES = {
    "gpt": f"{GPT} {FUSED}",
    "gpt, dropout": GPT,
    "gpt, dropout, selective": f"{GPT} parallel.recompute_granularity=selective",
    "gpt, documents apart": f"{GPT} {FUSED} data.reset_attention_mask=true",
    "gpt, TP 2": f"{GPT} {FUSED} {TWO} parallel.tensor_model_parallel_size=2",
    "gpt, PP 2": f"{GPT} {FUSED} {TWO} {PP_2}",
    "gpt, DP 2, distributed optimizer": f"{GPT} {FUSED} {TWO} parallel.use_distributed_optimizer=true",
    "llama": LLAMA,
    "llama, LoRA": f"{LLAMA} lora.rank=16",
    "llama, LoRA, dropout": f"{LLAMA} lora.rank=16 lora.dropout=0.1",
    "llama, LoRA, bf16, full uniform": f"{LLAMA} lora.rank=16 training.precision=bf16 {FULL} parallel.recompute_method=uniform",
    "llama, bf16": f"{LLAMA} training.precision=bf16",
    "llama, bf16, full uniform": f"{LLAMA} training.precision=bf16 {FULL} parallel.recompute_method=uniform",
    "llama, full block": f"{LLAMA} {FULL} parallel.recompute_method=block",
    "llama, TP 2, sequence parallel": f"{LLAMA} {TWO} parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true",
    "llama, PP 2, interleaved": f"{LLAMA} {TWO} {PP_2} parallel.num_layers_per_virtual_pipeline_stage=2",
}


@dataclass
class Peaks:
    """One rank's peaks in bytes, and the estimate's of its stage."""

    stage: int
    tensors: int
    process: int
    estimate_tensors: int
    estimate_process: int


def measure(words: list[str]) -> list[Peaks]:
    """Train what `words` say, and return every rank's peaks."""
    recipe = load([*COMMON.split(), *words]).recipe
    ranks = recipe.launch.nproc_per_node
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        machine = Alone(free.getsockname()[1])
        free.close()
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.benchmarks.memory", "--rank", folder, *words],
                env=environment(recipe, rank, machine),
                cwd=Path(__file__).parents[2],
                stdout=subprocess.DEVNULL,
            )
            for rank in range(ranks)
        ]
        if any([process.wait() for process in processes]):
            raise RuntimeError(f"a rank of {' '.join(words)} died")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    step, whole = stage_memory(recipe, saves=False), stage_memory(recipe)
    return [
        Peaks(stage, one["tensors"], one["process"], step[stage].total - step[stage].base, whole[stage].total)
        for one in found
        for stage in (one["stage"],)
    ]


def rank_worker(folder: Path, words: list[str]) -> None:
    """One rank: build, train, save, and write down the peaks."""
    recipe = load([*COMMON.split(), *words]).recipe
    from launcher.engine.initialize import finish, initialize

    initialize(recipe)
    import torch
    from megatron.core import parallel_state

    from launcher.engine import checkpoint
    from launcher.engine.train import build, memory_gib, train_step
    from tests.benchmarks.train import random_batches

    with live_tensors() as live:
        state = build(recipe)
        for chunk in state.chunks:
            chunk.train()
        for _ in range(2):
            train_step(recipe, state, [random_batches(recipe) for _ in state.chunks])
    (folder / "tokenizer").mkdir(exist_ok=True)
    checkpoint.save(recipe, state, folder, folder / "tokenizer")
    found = {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "tensors": live.peak,
        "process": round(memory_gib() * 2**30),
    }
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    finish()


def live_tensors():
    """A context in which the bytes of live tensors are counted, each storage once; `peak` is their highest sum."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.bytes: dict[int, int] = {}
            self.now = self.peak = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.bytes:
                    storage = tensor.untyped_storage()
                    self.bytes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
            self.peak = max(self.peak, self.now)
            return result

        def _gone(self, storage: int) -> None:
            self.now -= self.bytes.pop(storage)

    return Live()


def report(name: str, peaks: list[Peaks]) -> None:
    """One line per stage: its fullest rank."""
    for stage in sorted({one.stage for one in peaks}):
        ranks = [one for one in peaks if one.stage == stage]
        process, tensors = max(one.process for one in ranks), max(one.tensors for one in ranks)
        label = name if len(peaks) == len(ranks) else f"{name}, stage {stage}"
        pairs = ((process, ranks[0].estimate_process), (tensors, ranks[0].estimate_tensors))
        cells = (f"{took / 2**30:8.2f} {said / 2**30:8.2f} {said / took - 1:+5.0%}" for took, said in pairs)
        print(f"  {label:<34}", *cells, flush=True)


def main(words: list[str]) -> None:
    print(f"memory, GiB{'':<25}  process estimate        tensors estimate", flush=True)
    cases = {"yours": " ".join(words)} if words else CASES
    for name, case in cases.items():
        report(name, measure(case.split()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_worker(Path(sys.argv[2]), sys.argv[3:])
    else:
        main(sys.argv[1:])
