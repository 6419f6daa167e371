"""A rank of the tests of fine-tuning: one job of four that trains the same rows at each layout, packed or not."""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))  # a rank is started as a script
from launcher.recipe.resolve import resolve
from launcher.recipe.schema import Derived
from launcher.workers.entry import run_worker
from tests.launcher.engine import yuan2_reference as reference
from tests.launcher.engine import yuan2_worker as yuan2
from tests.launcher.engine.generate_worker import YUAN2, tiny

CASES = {  # tp, pp, keys of `parallel`, packing, micro batch, normalization; the others of the four ranks are data-parallel
    "packed": (1, 1, {}, True, 1, "token"),
    "packed_tp2_sequence": (2, 1, {"sequence_parallel": True}, True, 2, "token"),
    "packed_pp2": (1, 2, {}, True, 1, "token"),
    "packed_tp2_pp2": (2, 2, {}, True, 4, "token"),
    "packed_zero1_tp2": (2, 1, {"use_distributed_optimizer": True}, True, 1, "token"),
    "apart": (1, 1, {}, False, 2, "token"),
    "apart_pp4": (1, 4, {}, False, 1, "token"),
    "sample": (1, 1, {}, True, 1, "sample"),
    "sample_apart_tp2_pp2": (2, 2, {}, False, 2, "sample"),
}
TOKENS = 24
ROWS = [(9, 4), (12, 11), (5, 1), (25, 20), (3, 2), (14, 13), (8, 3), (30, 9), (24, 23), (40, 3)]  # tokens, of them trained at the end


def write_rows(prefix) -> None:
    """Rows of random ids; the last is cut before its answer begins, and left out."""
    import numpy as np

    from data_tools.indexed import IndexedWriter
    from data_tools.preprocess import dataset_prefix
    from data_tools.sft import KEYS

    random = np.random.default_rng(0)
    with IndexedWriter(dataset_prefix(prefix, KEYS[0]), "<u2") as tokens, IndexedWriter(dataset_prefix(prefix, KEYS[1]), "u1") as masks:
        for length, trained in ROWS:
            tokens.add_document(random.integers(0, 50, length))
            masks.add_document(np.arange(length) >= length - trained)
        tokens.finish()
        masks.finish()


def of_case(name: str):
    tp, pp, keys, packing, micro_batch, normalization = CASES[name]
    recipe = tiny("sft", tp, pp)
    recipe.launch.nproc_per_node = 4
    recipe.model = dataclasses.replace(recipe.model, **YUAN2, ffn_hidden_size=None, make_vocab_size_divisible_by=16)
    recipe.parallel = dataclasses.replace(recipe.parallel, **keys)
    recipe.data = dataclasses.replace(recipe.data, train="rows", packing=packing)
    t = recipe.training
    t.train_iters, t.epochs, t.micro_batch_size, t.global_batch_size, t.loss_normalization = 1, 1, micro_batch, 16, normalization
    recipe.derived = Derived()
    resolve(recipe, {}, "sft")
    return recipe


def expected(weights, rows, normalization, recipe):
    """Loss and gradients with every row by itself, in plain PyTorch."""
    import torch
    from torch.nn.functional import cross_entropy

    weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
    sums, counts = [], []
    for number in range(len(rows) - 1):
        row = rows.row(number)
        ids, trained = torch.tensor(row.ids[: TOKENS + 1]).long(), torch.tensor(row.trained[1 : TOKENS + 1])
        logits = reference.logits(weights, ids[:-1], torch.arange(len(ids) - 1), recipe.model.num_attention_heads, recipe.model.num_layers)
        sums.append((cross_entropy(logits, ids[1:], reduction="none") * trained).sum())
        counts.append(trained.sum())
    sums, counts = torch.stack(sums), torch.stack(counts)
    loss = sums.sum() / counts.sum() if normalization == "token" else (sums / counts).mean()
    loss.backward()
    return loss.item(), {name: w.grad for name, w in weights.items()}


def compared(recipe, state, rows, weights):
    from megatron.core import parallel_state

    from data_tools.packing import Packed
    from launcher.engine.data import loader, reads_data
    from launcher.engine.rows import RowSamples
    from launcher.engine.step import run_microbatches

    training = recipe.training
    samples = RowSamples(Packed(rows, TOKENS, recipe.data.packing), recipe, training.global_batch_size, 1, training.seed)
    dataset = samples if reads_data(recipe) else None
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    count = training.global_batch_size // (training.micro_batch_size * parallel_state.get_data_parallel_world_size())
    totals = run_microbatches(recipe, state.chunks, [loader(recipe, dataset, 0) for _ in state.chunks], count)
    loss, gradients = expected(weights, rows, training.loss_normalization, recipe)
    found = {"loss": abs((totals[0] / totals[1]).item() - loss)} if parallel_state.is_pipeline_last_stage() else {}
    if not recipe.parallel.use_distributed_optimizer:  # its ranks hold a share of each gradient
        for name, parameter in yuan2.named(recipe, state.chunks):
            found[f"gradient {name}"] = yuan2.apart_by(parameter.main_grad, yuan2.own_part(name, gradients[name], parameter))
    return found


def main(recipe, folder, stop):
    import torch

    from data_tools.sft import Rows
    from launcher.engine.initialize import finish, initialize

    initialize(recipe)
    from launcher.engine.train import build

    if torch.distributed.get_rank() == 0:
        write_rows(folder.path / "rows")
    torch.distributed.barrier()
    rows, results, weights = Rows(folder.path / "rows"), {}, {}
    for name in CASES:
        one = of_case(name)
        yuan2.form_groups(one)
        state = build(one)
        weights = weights or {n: p.detach().clone() for n, p in yuan2.named(one, state.chunks)}
        with torch.no_grad():
            for n, parameter in yuan2.named(one, state.chunks):
                parameter.copy_(yuan2.own_part(n, weights[n], parameter))
        results[name] = compared(one, state, rows, weights)
    every = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, results)
    if torch.distributed.get_rank() == 0:
        worst = {name: {key: max(rank[name].get(key, 0.0) for rank in every) for key in set().union(*(rank[name] for rank in every))} for name in CASES}
        (folder.path / "result.json").write_text(json.dumps(worst))
    finish()


if __name__ == "__main__":
    run_worker(main)
