"""Two data-parallel ranks that train alike without sharding and at every stage of ZeRO, for test_zero.py."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[3]))  # a rank is started as a script
from launcher.recipe.resolve import resolve
from launcher.recipe.schema import Derived, Parallel
from launcher.workers.entry import run_worker
from tests.launcher.engine.generate_worker import FAMILIES, tiny

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES = {  # family, precision, whether rows are trained (the mean over the tokens of the whole batch), keys of `parallel`
    "gpt2": ("gpt2", "fp32", False, {}),
    "llama": ("llama", "fp32", True, FULL),
    "yuan2": ("yuan2", "bf16", False, {}),
}
STEPS, SAVED = 3, 1


def of_case(name: str, zero: int | None, tp: int = 1):
    """A recipe of two micro-batches a step on each rank; 49 rows of the vocabulary, which two cannot share evenly."""
    family, precision, rows, keys = CASES[name]
    recipe = tiny("zero", tp)
    recipe.model = dataclasses.replace(recipe.model, **FAMILIES[family], num_layers=2, make_vocab_size_divisible_by=1 if tp == 1 else 2)
    recipe.model.ffn_hidden_size = None
    recipe.parallel = Parallel(tensor_model_parallel_size=tp, zero=zero, sequence_parallel=tp > 1, **keys)
    recipe.training.precision, recipe.launch.nproc_per_node = precision, 2
    recipe.training.micro_batch_size, recipe.training.global_batch_size, recipe.training.train_iters = 2, 8, STEPS
    recipe.tokenizer.vocab_size, recipe.optimizer.clip_grad, recipe.optimizer.lr = 48, 0.7, 1e-2
    recipe.data.train, recipe.data.packing = "rows" if rows else None, False
    recipe.derived = Derived()
    resolve(recipe, {}, "zero")
    return recipe


def compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def batches(recipe, first: int):
    """This rank's micro-batches of 2 x 24 tokens from step `first` on; how many are trained differs from one to the next."""
    import torch
    from megatron.core import parallel_state

    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for number in range(4 * first + rank, 4 * STEPS, size):
        draw = torch.Generator().manual_seed(number)
        ids = torch.randint(48, (2, 25), generator=draw)
        mask = (torch.rand(2, 24, generator=draw) < 0.1 + 0.2 * (number % 4)).float()
        mask[0, 0] = 1.0
        places = torch.arange(24).expand(2, 24).contiguous()
        ids = {"tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
        yield ids | {"position_ids": places, "loss_mask": mask, "document": torch.zeros_like(places)}


def built(recipe):
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    from launcher.engine.train import build

    destroy_num_microbatches_calculator()
    if parallel_state.get_tensor_model_parallel_world_size() != recipe.parallel.tensor_model_parallel_size:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(recipe.parallel.tensor_model_parallel_size)
    import torch

    torch.manual_seed(3)
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    return build(recipe)


def train(recipe, state, until: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step from the state's on."""
    from launcher.engine.train import train_step

    found, data = [], [batches(recipe, state.iteration)]
    for chunk in state.chunks:
        chunk.train()
    while state.iteration < until:
        loss, norm, updated = train_step(recipe, state, data)
        assert updated
        found.append((loss.item(), norm))
    return found


def offloaded() -> list:
    """What megatron-core builds and is told; it trains so on a GPU alone, with Transformer Engine, whose version it asks for."""
    from megatron.core.optimizer import optimizer_config
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    from launcher.engine.model import transformer_config

    one = of_case("yuan2", 1)
    one.optimizer.optimizer_cpu_offload, one.optimizer.optimizer_offload_fraction = True, 0.5
    with mock.patch.object(optimizer_config, "is_te_min_version", return_value=False):
        inner = built(one).optimizer.chained_optimizers[0].optimizer
    one.parallel.cpu_offloading_num_layers = 1
    config = transformer_config(one)
    return [isinstance(inner, HybridDeviceOptimizer), inner.offload_fraction, config.cpu_offloading, config.cpu_offloading_num_layers]


def asked() -> list[list[int]]:
    """Of which parameters each rank asks a checkpoint for the state of a distributed optimizer."""
    import torch

    from launcher.engine.optimizer_state import ask_for_shares

    optimizer = built(of_case("gpt2", 1)).optimizer
    everything = dict.fromkeys(range(sum(len(buffer.param_index_map) for buffer in optimizer.chained_optimizers[0].buffers)))
    mine, every = {"param_state": everything}, [None] * 2
    ask_for_shares(mine, optimizer)
    torch.distributed.all_gather_object(every, list(mine["param_state"]))
    return [list(everything), *every]


def filled(checkpoint) -> bool:
    """Whether rows that are read tensor by tensor, as those of other formats are, are the ones that megatron-core reads."""
    import torch

    from launcher.engine import foreign
    from launcher.engine.checkpoint import load

    one = of_case("llama", 3)
    read, other = built(one), built(one)
    load(one, read, checkpoint, resume=True)
    other.chunks[0].load_rows({name: [torch.zeros_like(rows.to_local())] for name, rows in other.chunks[0].rows.items()})
    foreign.fill(one, other.chunks, checkpoint)
    pairs = zip(read.chunks[0].rows.values(), other.chunks[0].rows.values(), strict=True)
    return all(torch.equal(mine.to_local(), theirs.to_local()) for mine, theirs in pairs)


def main(recipe, folder, stop):
    import torch

    from launcher.engine.initialize import finish, initialize

    initialize(recipe)
    from launcher.engine.checkpoint import copy_tokenizer, load, save
    from launcher.engine.train import evaluate

    results = {"curves": {}, "resumed": {}}
    for name, zero in TRAINED:
        one = of_case(name, zero)
        run = folder.path / f"{name}_{zero}"
        if torch.distributed.get_rank() == 0:
            copy_tokenizer(one, run / "tokenizer")
        state = built(one)
        curve = train(one, state, SAVED)
        evaluate(one, state, [batches(one, 0)], 1, stop)  # leaves no gathered weights
        if any((name, zero) == saved[:2] for saved in RESUMED):
            save(one, state, run / "checkpoints", run / "tokenizer")
        results["curves"][f"{name} {zero}"] = curve + train(one, state, STEPS)
    results["offloaded"], results["asked"] = offloaded(), asked()
    if compiler():
        one = of_case("llama", 3)
        one.training.torch_compile = True
        results["curves"]["llama compiled"] = train(one, built(one), STEPS)
    for name, saved, new, tp in RESUMED:
        one = of_case(name, new, tp)
        state = built(one)
        load(one, state, folder.path / f"{name}_{saved}" / "checkpoints" / f"iter_{SAVED:07d}", resume=True)
        assert state.iteration == SAVED
        results["resumed"][f"{name} {saved} {new} {tp}"] = train(one, state, STEPS)
    results["filled"] = filled(folder.path / "llama_3" / "checkpoints" / f"iter_{SAVED:07d}")
    if torch.distributed.get_rank() == 0:
        (folder.path / "result.json").write_text(json.dumps(results))
    finish()


TRAINED = [*(("gpt2", zero) for zero in (None, 1, 2)), ("llama", None), ("llama", 3), ("yuan2", None), ("yuan2", 3)]
# Case, stage that saved, stage that goes on, its TP: of two ranks, so that at 2 there is one data-parallel rank.
RESUMED = [
    ("gpt2", 1, 3, 1),
    ("gpt2", 2, 2, 1),
    ("llama", 3, None, 1),
    ("llama", 3, 3, 2),
    ("yuan2", None, 2, 1),
    ("yuan2", 3, 1, 1),
    ("yuan2", 3, 3, 1),
]

if __name__ == "__main__":
    run_worker(main)
