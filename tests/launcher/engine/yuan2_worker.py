"""The job of the tests of Yuan 2.0: four ranks take each layout in turn and compare it with the reference.

`python yuan2_worker.py FOLDER` imports the engine once and forks the ranks: the imports take longer than all the layouts.
"""

import dataclasses
import json
import os
import socket
import sys
import traceback
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))  # it is started as a script
from launcher.recipe.resolve import resolve
from launcher.recipe.schema import Derived, Recipe
from tests.launcher.engine import yuan2_reference as reference
from tests.launcher.engine.generate_worker import YUAN2, tiny

MODES = {"across": {}, "positions": {"reset_position_ids": True}, "apart": {"reset_position_ids": True, "reset_attention_mask": True}}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS = {  # tp, pp, keys of `parallel`, mode; the others of the four ranks are data-parallel
    "plain": (1, 1, {}, "across"),
    "tp2_sequence": (2, 1, {"sequence_parallel": True}, "across"),
    "tp2": (2, 1, {}, "positions"),
    "pp2_uneven": (1, 2, {"decoder_first_pipeline_num_layers": 1}, "positions"),
    "pp4_full": (1, 4, FULL, "positions"),
    "tp2_pp2_interleaved": (2, 2, {"num_layers_per_virtual_pipeline_stage": 1}, "positions"),
    "tp2_pp2_sequence": (2, 2, {"sequence_parallel": True}, "apart"),
    "tp4_sequence_full": (4, 1, {"sequence_parallel": True, **FULL}, "apart"),
    "pp2_zero1": (1, 2, {"use_distributed_optimizer": True}, "apart"),
    "tp2_selective": (2, 1, {"recompute_granularity": "selective"}, "apart"),
    "plain_apart": (1, 1, {}, "apart"),
}
FIRST = "plain"
SAVED, LOADED = "tp2_pp2_sequence", "plain_apart"  # of the same mode
SAMPLES, TOKENS = 4, 24
DOCUMENTS = [[7, 1, 10, 6], [12, 12], [11, 2, 11], [24]]  # borders before, on and after those of the sequence's parts


def at_layout(name: str) -> Recipe:
    tp, pp, keys, mode = LAYOUTS[name]
    recipe = tiny("layouts", tp, pp)
    recipe.launch.nproc_per_node = 4
    recipe.model = dataclasses.replace(recipe.model, **YUAN2, ffn_hidden_size=None, make_vocab_size_divisible_by=16)  # 64 at each TP
    recipe.parallel = dataclasses.replace(recipe.parallel, **keys)
    recipe.data = dataclasses.replace(recipe.data, **MODES[mode])
    recipe.training.global_batch_size, recipe.training.train_iters = SAMPLES, 3
    recipe.optimizer.clip_grad, recipe.optimizer.lr, recipe.optimizer.weight_decay = 1.0, 1e-2, 0.1
    recipe.derived = Derived()
    resolve(recipe, {}, "layouts")
    return recipe


def form_groups(recipe):
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    from launcher.engine.initialize import virtual_pipeline_size

    parallel_state.destroy_model_parallel()
    destroy_num_microbatches_calculator()
    p = recipe.parallel
    parallel_state.initialize_model_parallel(p.tensor_model_parallel_size, p.pipeline_model_parallel_size, virtual_pipeline_size(recipe))
    tensor_parallel.model_parallel_cuda_manual_seed(recipe.training.seed)


def samples():
    """[(ids, labels, documents)], the same on every rank."""
    import torch

    ids = torch.randint(50, (SAMPLES, TOKENS + 1), generator=torch.Generator().manual_seed(3))
    return [(row[:-1], row[1:], documents) for row, documents in zip(ids, DOCUMENTS, strict=True)]


def batches(recipe, chunks):
    """This rank's share as the loaders give it, an iterator for each chunk."""
    import torch
    from megatron.core import parallel_state

    from launcher.engine.data import reads_data

    mine = []
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for ids, labels, documents in samples()[rank::size]:
        places = torch.cat([torch.arange(length) for length in documents])
        number = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
        whole = torch.arange(TOKENS)
        mine.append({"tokens": ids[None], "labels": labels[None], "loss_mask": torch.ones(1, TOKENS),
                     "position_ids": (places if recipe.data.reset_position_ids else whole)[None]})  # fmt: skip
        mine[-1]["document"] = number[None]
    return [iter(mine) if reads_data(recipe) else None for _ in chunks]


def whole_logits(recipe, chunks):
    """[samples of this data-parallel rank, s, vocabulary] on the last stage, by the forward pass of an evaluation."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from launcher.engine.data import next_batch

    def step(iterator, model):
        batch = next_batch(recipe, iterator)
        return model(batch["tokens"], batch["position_ids"], batch["attention_mask"]), lambda output, non_loss_data: output

    feed = batches(recipe, chunks)
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=step, data_iterator=feed if len(chunks) > 1 else feed[0], model=chunks, seq_length=TOKENS,
            num_microbatches=SAMPLES // parallel_state.get_data_parallel_world_size(), micro_batch_size=1,
            decoder_seq_length=TOKENS, forward_only=True, collect_non_loss_data=True,
        )  # fmt: skip
        return torch.cat([gather_from_tensor_model_parallel_region(output) for output in outputs]) if outputs else None


def named(recipe, chunks):
    """(name in the whole model, parameter) of this rank; the last stage's copy of the tied table bears the table's name."""
    from launcher.engine.model import unwrap

    for chunk in map(unwrap, chunks):
        for name, parameter in chunk.named_parameters():
            if name.startswith("decoder.layers."):
                local = int(name.split(".")[2])
                name = name.replace(f".{local}.", f".{chunk.decoder.layers[local].layer_number - 1}.", 1)
            if not recipe.model.untie_embeddings_and_output_weights:
                name = name.replace("output_layer.weight", "embedding.word_embeddings.weight")
            yield name, parameter


def own_part(name, whole, parameter):
    """This rank's slice of a whole tensor."""
    import torch
    from megatron.core import parallel_state

    if not parameter.tensor_model_parallel:
        return whole
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    halves = whole.chunk(2) if "linear_fc1" in name else (whole,)  # gate and up are cut each by itself
    return torch.cat([half.chunk(size, parameter.partition_dim)[rank] for half in halves])


def apart_by(found, expected):
    """The largest difference, in units of the largest number."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def compared(recipe, state, weights, mode):
    """Differences of logits, loss, gradients and their norm from the reference; one step is taken."""
    import torch
    from megatron.core import parallel_state

    from launcher.engine.step import run_microbatches

    heads, layers = recipe.model.num_attention_heads, recipe.model.num_layers
    found = {}
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    if (mine := whole_logits(recipe, state.chunks)) is not None:
        pairs = zip(mine, samples()[rank::size], strict=True)
        found["logits"] = max(
            (row - reference.packed_logits(weights, ids, documents, mode, heads, layers)).abs().max().item() for row, (ids, _, documents) in pairs
        )
    loss, gradients = reference.loss_and_gradients(weights, samples(), mode, heads, layers)
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    totals = run_microbatches(recipe, state.chunks, batches(recipe, state.chunks), SAMPLES // size)
    if parallel_state.is_pipeline_last_stage():
        found["loss"] = abs((totals[0] / totals[1]).item() - loss)
    if not recipe.parallel.use_distributed_optimizer:  # its ranks hold a share of each gradient
        for name, parameter in named(recipe, state.chunks):
            found[f"gradient {name}"] = apart_by(parameter.main_grad, own_part(name, gradients[name], parameter))
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    _, grad_norm, _ = state.optimizer.step()
    found["norm"] = abs(grad_norm / norm.item() - 1)
    return found


def evaluate(recipe, state):
    from megatron.core import parallel_state

    from launcher.engine.step import from_last_stage, run_microbatches

    count = SAMPLES // parallel_state.get_data_parallel_world_size()
    totals = from_last_stage(run_microbatches(recipe, state.chunks, batches(recipe, state.chunks), count, forward_only=True))
    return (totals[0] / totals[1]).item()


def whole_model(recipe, chunk):
    """What of the whole model needs no reference: its size, its filter's first weights, the angles of the released weights."""
    from launcher.engine.model import build_chunks, transformer_config
    from launcher.recipe.size import parameters

    bf16 = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, rotary_bf16=True))
    table = build_chunks(bf16, transformer_config(bf16))[0].rotary_pos_emb(8192)[:, 0, 0]
    lfa = chunk.decoder.layers[0].self_attention.filter
    return {
        "parameters": [sum(parameter.numel() for parameter in chunk.parameters()), parameters(recipe)],
        "initial": {name: [p.abs().max().item(), p.std().item()] for name, p in lfa.named_parameters()},
        "angles": [table[:4096, 0].unique().numel(), table[:, 0].unique().numel(), str(table.dtype)],
    }


def main(name, folder):
    """One layout; rank 0 leaves its differences, and of the first one the weights for the others."""
    from launcher.engine.initialize import finish, initialize

    one = at_layout(name)
    initialize(one)
    import torch

    from checkpoints.folder import newest_checkpoint
    from launcher.engine import checkpoint
    from launcher.engine.model import unwrap
    from launcher.engine.train import build, train_step

    state, first, about = build(one), torch.distributed.get_rank() == 0, {}
    if name == FIRST:
        whole = unwrap(state.chunks[0])
        about = whole_model(one, whole)
        generator = torch.Generator().manual_seed(1)  # norms of ones would hide one that is not there
        if first:
            torch.save({n: p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for n, p in whole.named_parameters()}, folder / "weights.pt")
        torch.distributed.barrier()
    weights = torch.load(folder / "weights.pt")
    with torch.no_grad():
        for n, parameter in named(one, state.chunks):
            parameter.copy_(own_part(n, weights[n], parameter))
    if one.parallel.use_distributed_optimizer:
        state.optimizer.reload_model_params()
    found = compared(one, state, weights, LAYOUTS[name][-1])
    if name == SAVED:
        checkpoint.save(one, state, folder, folder / "tokenizer")
    if name == LOADED:
        checkpoint.load(one, state, newest_checkpoint(folder), resume=True)
    if name in (SAVED, LOADED):
        train_step(one, state, batches(one, state.chunks))
        found["next"] = evaluate(one, state)
    every = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, found)
    if first:
        worst = {key: max(rank.get(key, 0.0) for rank in every) for key in set().union(*every)}
        (folder / f"{name}.json").write_text(json.dumps(about | {name: worst}))
    finish()


def fork_ranks(folder, count, main):
    """Run `main` in `count` ranks; whether all ended well."""
    from launcher.engine import cpu_port

    cpu_port.install()
    import launcher.engine.checkpoint

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    children = []
    for rank in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            try:
                main(folder)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)  # taking the interpreter apart would take longer than most layouts
    return all(os.waitpid(child, 0)[1] == 0 for child in children)


if __name__ == "__main__":
    # Ranks of their own for each layout: the threads of gloo's groups wake 100 times a second as long as their process lives.
    folder = Path(sys.argv[1])
    if not all(fork_ranks(folder, 4, partial(main, name)) for name in LAYOUTS):
        sys.exit(1)
    found = [json.loads((folder / f"{name}.json").read_text()) for name in LAYOUTS]
    (folder / "result.json").write_text(json.dumps({key: value for one in found for key, value in one.items()}))
