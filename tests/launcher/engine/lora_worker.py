"""The job of the tests of LoRA: two ranks take each layout in turn and compare it with the merged weights in plain PyTorch.

`python lora_worker.py FOLDER` imports the engine once and forks the ranks, as yuan2_worker.py does.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))  # it is started as a script
from launcher.recipe.resolve import resolve
from launcher.recipe.schema import Derived, Lora, Recipe
from tests.launcher.engine import yuan2_worker as yuan2
from tests.launcher.engine.generate_worker import FAMILIES, tiny

SEQUENCE, FULL = {"sequence_parallel": True}, yuan2.FULL
CASES = {  # family, tp, pp, keys of `parallel`, targets; where neither takes them the two ranks are data-parallel
    "gpt2_tp2": ("gpt2", 2, 1, {}, None),
    "gpt2_pp2_tied": ("gpt2", 1, 2, {}, None),
    "llama": ("llama", 1, 1, {}, None),
    "llama_zero1_overlap": ("llama", 1, 1, {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}, None),
    "llama_tp2_sequence": ("llama", 2, 1, SEQUENCE, None),
    "llama_tp2_full_some": ("llama", 2, 1, FULL, ["linear_qkv", "linear_fc2"]),
    "llama_stages_without_layers": ("llama", 1, 2, {"pipeline_model_parallel_layout": "E|tt|tt|L"}, None),  # and interleaved
    "yuan2_pp2_full": ("yuan2", 1, 2, FULL, None),
    "yuan2_tp2_sequence": ("yuan2", 2, 1, SEQUENCE, ["linear_qk", "linear_v", "linear_proj"]),
}
SAVED = {"gpt2": "gpt2_tp2", "llama": "llama_tp2_sequence", "yuan2": "yuan2_tp2_sequence"}  # of each family, after a step
LOADED = ("llama_zero1_overlap", "llama_stages_without_layers")
RANK, ALPHA = 3, 5.0


def plain(family: str, tp: int = 1, pp: int = 1, **keys) -> Recipe:
    """A recipe that trains all weights."""
    recipe = tiny("lora", tp, pp)
    recipe.launch.nproc_per_node = 2
    recipe.model = dataclasses.replace(recipe.model, **FAMILIES[family], ffn_hidden_size=None, make_vocab_size_divisible_by=16)
    recipe.parallel = dataclasses.replace(recipe.parallel, **keys)
    recipe.training.global_batch_size, recipe.training.train_iters = yuan2.SAMPLES, 3
    recipe.optimizer.clip_grad, recipe.optimizer.lr, recipe.optimizer.weight_decay = 1.0, 1e-2, 0.1
    recipe.derived = Derived()
    resolve(recipe, {}, "lora")
    return recipe


def of_case(name: str, **settings) -> Recipe:
    family, tp, pp, keys, targets = CASES[name]
    recipe = plain(family, tp, pp, **keys)
    recipe.lora = Lora(rank=RANK, alpha=ALPHA, target_modules=targets, **settings)
    resolve(recipe, {}, "lora")
    return recipe


def named(recipe, chunks):
    """(name in the whole model, parameter) of this rank's adapters."""
    from launcher.engine.lora import is_adapter

    return [(name, parameter) for name, parameter in yuan2.named(recipe, chunks) if is_adapter(name)]


def own_part(recipe, name, whole, parameter):
    """This rank's slice of a whole tensor; [gate; up] are cut each by itself."""
    gated = recipe.model.swiglu or "linear_fc1" not in name
    return yuan2.own_part(name if gated else "", whole, parameter)


class Reference:
    """A family's whole model, and of adapters the loss and gradients of W + alpha / r x B A put in the place of W."""

    def __init__(self, recipe, model):
        import torch

        from launcher.engine.lora import initial

        self.model, self.ids, weights = model, recipe.derived.vocab_size, dict(model.named_parameters())
        generator = torch.Generator().manual_seed(1)
        self.weights = {n: p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for n, p in weights.items()}
        self.a, self.b = {}, {}
        for name, weight in self.weights.items():
            if "linear_" in name and name.endswith("weight"):
                module = name.removesuffix(".weight")
                self.a[module] = initial(RANK, weight.shape[1], f"{recipe.training.seed} {module}")
                self.b[module] = 0.1 * torch.randn(weight.shape[0], RANK, generator=generator)

    def adapters(self, recipe):
        """{name: whole tensor} of the recipe's adapters."""
        chosen = [module for module in self.a if module.rsplit(".", 1)[1] in recipe.lora.target_modules]
        return {f"{module}_lora.{letter}": whole[module] for module in chosen for letter, whole in (("a", self.a), ("b", self.b))}

    def merged(self, adapters):
        weights = dict(self.weights)
        for name, b in adapters.items():
            if name.endswith(".b"):
                weight = name.replace("_lora.b", ".weight")
                weights[weight] = weights[weight] + ALPHA / RANK * b @ adapters[name[:-1] + "a"]
        return weights

    def logits(self, adapters):
        """[samples, s, vocabulary]."""
        import torch

        with torch.no_grad():
            return torch.cat([self._call(adapters, ids) for ids, _, _ in yuan2.samples()])

    def gradients(self, adapters):
        """The mean loss and its gradients by every adapter."""
        import torch

        leaves = {name: tensor.clone().requires_grad_() for name, tensor in adapters.items()}
        logits = torch.cat([self._call(leaves, ids) for ids, *_ in yuan2.samples()]).flatten(0, 1)
        labels = torch.cat([labels for _, labels, _ in yuan2.samples()])
        loss = torch.nn.functional.cross_entropy(logits[:, : self.ids].float(), labels)  # rows that pad the vocabulary have no share
        loss.backward()
        return loss.item(), {name: leaf.grad for name, leaf in leaves.items()}

    def _call(self, adapters, ids):
        import torch

        inputs = ids[None], torch.arange(yuan2.TOKENS)[None], None
        return torch.func.functional_call(self.model, self.merged(adapters), inputs)


def compared(recipe, state, expected):
    """Differences of logits, loss and gradients from the expected ones; one step is taken."""
    import torch
    from megatron.core import parallel_state

    from launcher.engine.step import run_microbatches

    (adapters, expected_logits, expected_loss, gradients), found = expected, {}
    mine = named(recipe, state.chunks)
    found["initial"] = float(not all(
        torch.equal(p, own_part(recipe, n, adapters[n], p) if n.endswith(".a") else torch.zeros_like(p)) for n, p in mine
    ))  # fmt: skip
    with torch.no_grad():
        for name, parameter in mine:
            parameter.copy_(own_part(recipe, name, adapters[name], parameter))
    if recipe.parallel.use_distributed_optimizer:
        state.optimizer.reload_model_params()
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    if (logits := yuan2.whole_logits(recipe, state.chunks)) is not None:
        found["logits"] = yuan2.apart_by(logits, expected_logits[rank::size])
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    totals = run_microbatches(recipe, state.chunks, yuan2.batches(recipe, state.chunks), yuan2.SAMPLES // size)
    if parallel_state.is_pipeline_last_stage():
        found["loss"] = abs((totals[0] / totals[1]).item() - expected_loss)
    if not recipe.parallel.use_distributed_optimizer:  # its ranks hold a share of each gradient
        for name, parameter in mine:
            found[f"gradient {name}"] = yuan2.apart_by(parameter.main_grad, own_part(recipe, name, gradients[name], parameter))
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return found | stepped(recipe, state, norm.item())


def stepped(recipe, state, norm):
    """One step: what is held for frozen weights, whether they move, and whether ranks that hold a whole tensor hold the same."""
    import torch
    from megatron.core import parallel_state

    every = [parameter for chunk in state.chunks for parameter in chunk.parameters()]
    trained = [parameter for parameter in every if parameter.requires_grad]
    frozen = [(parameter, parameter.detach().clone()) for parameter in every if not parameter.requires_grad]
    held = sum(parameter.numel() for chunk in state.chunks for buffer in chunk.buffers for parameter in buffer.params)
    _, grad_norm, _ = state.optimizer.step()
    group, apart = parallel_state.get_tensor_model_parallel_group(), 0.0
    for parameter in trained:
        if not parameter.tensor_model_parallel:
            others = [torch.empty_like(parameter) for _ in range(group.size())]
            torch.distributed.all_gather(others, parameter.detach(), group=group)
            apart += sum(not torch.equal(other, parameter) for other in others)
    return {
        "norm": abs(grad_norm / norm - 1),
        "trained besides": float({id(parameter) for parameter in trained} != {id(parameter) for _, parameter in named(recipe, state.chunks)}),
        "frozen moved": float(not all(torch.equal(*pair) for pair in frozen)),
        "frozen with a gradient": float(any(parameter.grad is not None or hasattr(parameter, "main_grad") for parameter, _ in frozen)),
        "buffers": float(held - sum(parameter.numel() for parameter in trained)),
        "apart": apart,
    }


def after(recipe, state):
    """The loss after one more step."""
    from launcher.engine.train import train_step

    train_step(recipe, state, yuan2.batches(recipe, state.chunks))
    return yuan2.evaluate(recipe, state)


def products(recipe, state):
    """Multiply-adds of all products of matrices of a step, forward and backward, on this rank."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from launcher.engine.step import run_microbatches

    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **more: 2 * a[0] * a[1] * b[1]}  # of shapes; torch counts the others
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run_microbatches(recipe, state.chunks, yuan2.batches(recipe, state.chunks), yuan2.SAMPLES // recipe.derived.data_parallel_size)
    return counter.get_total_flops() / 2


def without_a_product(recipe, full):
    """How many numbers of frozen matrices, the vocabulary's included, have a product for their gradient: of a step with
    adapters, `recipe`, whose layout is that of a step of all weights that took `full` products."""
    from launcher.engine.model import unwrap
    from launcher.engine.train import build

    yuan2.form_groups(recipe)
    state = build(recipe)
    tokens = yuan2.TOKENS * yuan2.SAMPLES // recipe.derived.data_parallel_size
    trained = sum(parameter.numel() for _, parameter in named(recipe, state.chunks))
    frozen = sum(p.numel() for n, p in unwrap(state.chunks[0]).named_parameters() if not p.requires_grad and p.dim() > 1 and "embedding" not in n)
    if not recipe.model.untie_embeddings_and_output_weights:
        frozen += recipe.derived.padded_vocab_size * recipe.model.hidden_size
    return frozen - (full - (products(recipe, state) - 3 * tokens * trained)) / tokens


def resumed_exactly(folder):
    """With dropout: two steps on, and the second again from the checkpoint of the first; how many adapters differ."""
    import torch

    from checkpoints.folder import newest_checkpoint
    from launcher.engine import checkpoint
    from launcher.engine.train import build, train_step

    recipe, ends = of_case(SAVED["llama"], dropout=0.3), []
    for source, resume in ((folder / "llama", False), (folder / "dropout", True)):
        yuan2.form_groups(recipe)
        state = build(recipe)
        for chunk in state.chunks:
            chunk.train()
        checkpoint.load(recipe, state, newest_checkpoint(source), resume)
        if not resume:
            train_step(recipe, state, yuan2.batches(recipe, state.chunks))
            checkpoint.save(recipe, state, folder / "dropout", folder / "tokenizer")
        train_step(recipe, state, yuan2.batches(recipe, state.chunks))
        ends.append([parameter.detach().clone() for _, parameter in named(recipe, state.chunks)])
    return float(sum(not torch.equal(*pair) for pair in zip(*ends, strict=True)))


def merged_apart(name, folder):
    """By how much the logits of the model without adapters, at a layout, filled from a checkpoint of adapters, are other than those
    with adapters that were saved beside it, in units of the largest."""
    import torch

    from checkpoints.folder import newest_checkpoint
    from launcher.engine.checkpoint import load_weights
    from launcher.engine.model import build_chunks, transformer_config

    family, tp, pp, keys, _ = CASES[name]
    recipe = plain(family, tp, pp, **keys)
    yuan2.form_groups(recipe)
    chunks = build_chunks(recipe, transformer_config(recipe))
    load_weights(recipe, chunks, newest_checkpoint(folder))
    logits = yuan2.whole_logits(recipe, chunks)
    return yuan2.apart_by(*(one[..., : recipe.derived.vocab_size] for one in (logits, torch.load(folder / "logits.pt"))))


def begin(folder):
    """Save a run of all weights for each family; of each case adapters, and the logits, loss and gradients to expect with them."""
    import torch

    from launcher.engine import checkpoint
    from launcher.engine.model import build_chunk, transformer_config, unwrap
    from launcher.engine.train import build

    expected = {}
    for family in FAMILIES:
        recipe = plain(family)
        yuan2.form_groups(recipe)
        state = build(recipe)
        config = dataclasses.replace(transformer_config(recipe), gradient_accumulation_fusion=False)
        one = Reference(recipe, build_chunk(recipe, config, pre=True, post=True))
        with torch.no_grad():
            for name, parameter in unwrap(state.chunks[0]).named_parameters():
                parameter.copy_(one.weights[name])
        checkpoint.save(recipe, state, folder / family, folder / "tokenizer")
        full = products(recipe, state)
        recipe.lora = Lora(rank=RANK)
        resolve(recipe, {}, "lora")
        expected[f"{family} products"] = without_a_product(recipe, full)
        for name in (name for name, case in CASES.items() if case[0] == family):
            adapters = one.adapters(of_case(name))
            expected[name] = (adapters, one.logits(adapters), *one.gradients(adapters))
    return expected


def main(folder):
    from launcher.engine.initialize import finish, initialize

    initialize(plain("gpt2"))
    import torch

    from checkpoints.folder import newest_checkpoint
    from launcher.engine import checkpoint
    from launcher.engine.train import build

    expected, results, next_ = begin(folder), {}, {}
    for name, (family, *_) in CASES.items():
        recipe = of_case(name)
        yuan2.form_groups(recipe)
        state = build(recipe)
        checkpoint.load(recipe, state, newest_checkpoint(folder / family), resume=False)
        results[name] = compared(recipe, state, expected[name])
        if name == SAVED[family]:
            state.iteration = 1
            checkpoint.save(recipe, state, folder / f"{family}_adapters", folder / "tokenizer")
            logits = yuan2.whole_logits(recipe, state.chunks)
            if torch.distributed.get_rank() == 0:
                torch.save(logits, folder / f"{family}_adapters" / "logits.pt")
                torch.save(torch.stack([ids for ids, *_ in yuan2.samples()]), folder / "ids.pt")
            next_[name] = after(recipe, state)
    for name in LOADED:
        recipe = of_case(name)
        yuan2.form_groups(recipe)
        state = build(recipe)
        checkpoint.load(recipe, state, newest_checkpoint(folder / "llama_adapters"), resume=True)
        assert state.iteration == 1
        next_[name] = after(recipe, state)
    about = {"resumed": resumed_exactly(folder)} | {f"{family} products": expected[f"{family} products"] for family in FAMILIES}
    for name in SAVED.values():
        about[f"merged at {name}"] = merged_apart(name, folder / f"{CASES[name][0]}_adapters")
    every = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, results | {"about": about})
    if torch.distributed.get_rank() == 0:
        worst = {name: {key: max(rank[name].get(key, 0.0) for rank in every) for key in set().union(*(rank[name] for rank in every))} for name in every[0]}
        (folder / "result.json").write_text(json.dumps(worst | {"next": next_}))
    finish()


if __name__ == "__main__":
    sys.exit(not yuan2.fork_ranks(Path(sys.argv[1]), 2, main))
