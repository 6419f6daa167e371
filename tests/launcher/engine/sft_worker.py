"""A rank of the tests of fine-tuning: one job of four that trains the same rows at each layout, packed or not."""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))  # a rank is started as a script
from launcher.recipe.converted import model_of
from launcher.recipe.resolve import resolve
from launcher.recipe.schema import Derived
from launcher.workers.entry import run_worker
from tests.launcher.engine import yuan2_reference as reference
from tests.launcher.engine import yuan2_worker as yuan2
from tests.launcher.engine.generate_worker import FAMILIES, YUAN2, tiny

CASES = {  # tp, pp, keys of `parallel`, packing, micro batch, normalization, family; the others of the four ranks are data-parallel
    "packed": (1, 1, {}, True, 1, "token", "yuan2"),
    "packed_tp2_sequence": (2, 1, {"sequence_parallel": True}, True, 2, "token", "yuan2"),
    "packed_pp2": (1, 2, {}, True, 1, "token", "yuan2"),
    "packed_tp2_pp2": (2, 2, {}, True, 4, "token", "yuan2"),
    "packed_zero1_tp2": (2, 1, {"use_distributed_optimizer": True}, True, 1, "token", "yuan2"),
    "apart": (1, 1, {}, False, 2, "token", "yuan2"),
    "apart_pp4": (1, 4, {}, False, 1, "token", "yuan2"),
    "sample": (1, 1, {}, True, 1, "sample", "yuan2"),
    "sample_apart_tp2_pp2": (2, 2, {}, False, 2, "sample", "yuan2"),
    "gpt2_packed": (1, 1, {}, True, 2, "token", "gpt2"),
    "gpt2_apart_tp2_pp2": (2, 2, {}, False, 1, "token", "gpt2"),
    "llama_packed_tp2_sequence": (2, 1, {"sequence_parallel": True}, True, 2, "token", "llama"),
    "llama_packed_tp4": (4, 1, {}, True, 1, "token", "llama"),
    "llama_sample_pp2": (1, 2, {}, True, 1, "sample", "llama"),
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
    tp, pp, keys, packing, micro_batch, normalization, family = CASES[name]
    recipe = tiny("sft", tp, pp)
    recipe.launch.nproc_per_node = 4
    values = {"yuan2": YUAN2, "gpt2": {"openai_gelu": True}, "llama": {**FAMILIES["llama"], "num_query_groups": 4}}[family]
    recipe.model = dataclasses.replace(recipe.model, **values, ffn_hidden_size=None, make_vocab_size_divisible_by=16)
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
        logits = logits[:, : recipe.derived.vocab_size]  # what pads the vocabulary has no share
        sums.append((cross_entropy(logits, ids[1:], reduction="none") * trained).sum())
        counts.append(trained.sum())
    sums, counts = torch.stack(sums), torch.stack(counts)
    loss = sums.sum() / counts.sum() if normalization == "token" else (sums / counts).mean()
    loss.backward()
    return loss.item(), {name: w.grad for name, w in weights.items()}


def by_transformers(path, recipe):
    """(weights, loss, gradients) that the test found for a family, with rows that pad the vocabulary as an import makes them."""
    import torch

    from checkpoints.models.tensor import pad

    found, rows = torch.load(path / f"{recipe.model.family}_{recipe.training.loss_normalization}.pt"), recipe.derived.padded_vocab_size
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in found["weights"]:
            weight, gradient = found["weights"][name], found["gradients"][name]
            found["weights"][name] = pad(weight, rows)
            found["gradients"][name] = torch.cat([gradient, gradient.new_zeros(rows - len(gradient), gradient.shape[1])])
    return found["weights"], found["loss"], found["gradients"]


def own_part(recipe, name, whole):
    """This rank's share of a whole tensor, by the description that conversions use."""
    from megatron.core import parallel_state

    from checkpoints.models import gpt

    tensor = {one.name: one for one in gpt.tensors(model_of(recipe))}[name]
    return tensor.split(whole, parallel_state.get_tensor_model_parallel_world_size())[parallel_state.get_tensor_model_parallel_rank()]


def compared(recipe, state, rows, loss, gradients):
    from megatron.core import parallel_state

    from data_tools.packing import Packed
    from launcher.engine.data import loader, reads_data
    from launcher.engine.rows import RowSamples
    from launcher.engine.step import run_microbatches

    training = recipe.training
    samples = RowSamples(Packed(rows, TOKENS, recipe.data.packing), recipe, training.global_batch_size, True, training.seed)
    dataset = samples if reads_data(recipe) else None
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    count = training.global_batch_size // (training.micro_batch_size * parallel_state.get_data_parallel_world_size())
    totals = run_microbatches(recipe, state.chunks, [loader(recipe, dataset, 0) for _ in state.chunks], count)
    found = {"loss": abs((totals[0] / totals[1]).item() - loss)} if parallel_state.is_pipeline_last_stage() else {}
    if not recipe.parallel.use_distributed_optimizer:  # its ranks hold a share of each gradient
        for name, parameter in yuan2.named(recipe, state.chunks):
            found[f"gradient {name}"] = yuan2.apart_by(parameter.main_grad, own_part(recipe, name, gradients[name]))
    return found


def main(recipe, folder, stop):
    import torch

    from data_tools.sft import Rows
    from launcher.engine.initialize import finish, initialize

    initialize(recipe)
    from launcher.engine.train import build

    rows, results, own = Rows(folder.path / "rows"), {}, {}
    for name in CASES:
        one = of_case(name)
        yuan2.form_groups(one)
        state = build(one)
        if one.model.family == "yuan2":
            weights = own = own or {n: p.detach().clone() for n, p in yuan2.named(one, state.chunks)}
            loss, gradients = expected(weights, rows, one.training.loss_normalization, one)
        else:
            weights, loss, gradients = by_transformers(folder.path, one)
        with torch.no_grad():
            for n, parameter in yuan2.named(one, state.chunks):
                parameter.copy_(own_part(one, n, weights[n]))
        results[name] = compared(one, state, rows, loss, gradients)
    every = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, results)
    if torch.distributed.get_rank() == 0:
        worst = {name: {key: max(rank[name].get(key, 0.0) for rank in every) for key in set().union(*(rank[name] for rank in every))} for name in CASES}
        (folder.path / "result.json").write_text(json.dumps(worst))
    finish()


if __name__ == "__main__":
    run_worker(main)
