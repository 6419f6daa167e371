"""A rank of the tests of generation. `run.name` says what it does: `make` checkpoints and references, or `answer` from them."""

import dataclasses
import json
from pathlib import Path

from launcher.recipe.frozen import write_frozen
from launcher.recipe.resolve import resolve
from launcher.recipe.schema import Recipe
from launcher.run.folder import RunFolder
from launcher.workers.entry import run_worker

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [7], [2, 7, 1, 8, 2, 8], [9, 9], [6, 28, 49, 6, 12, 0, 13]]
LIMITS = [12, 9, 12, 3, 12]
YUAN2 = {
    "family": "yuan2",
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "swiglu": True,
    "add_bias_linear": False,
}
FAMILIES = {
    "gpt2": {},
    "llama": {
        "family": "llama",
        "num_query_groups": 2,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
    },
    "yuan2": YUAN2,
}


def tiny(name: str, tp: int = 1, pp: int = 1) -> Recipe:
    """A model of 4 layers and 50 ids (14 more are padding), for 24 positions."""
    recipe = Recipe()
    m, t = recipe.model, recipe.training
    m.num_layers, m.hidden_size, m.num_attention_heads, m.init_method_std = 4, 32, 4, 0.3  # large: answers that vary
    m.attention_dropout = m.hidden_dropout = 0.0
    m.make_vocab_size_divisible_by = 32
    t.seq_length = m.max_position_embeddings = 24
    t.micro_batch_size, t.train_iters, recipe.optimizer.lr = 1, 1, 1e-3
    recipe.tokenizer.type, recipe.tokenizer.vocab_size = "NullTokenizer", 49
    recipe.parallel.tensor_model_parallel_size, recipe.parallel.pipeline_model_parallel_size = tp, pp
    recipe.launch.device, recipe.launch.nproc_per_node, recipe.launch.cpu_threads = "cpu", tp * pp, 1
    recipe.run.name = name
    resolve(recipe, {}, name)
    return recipe


def run(path: Path, recipe: Recipe) -> dict:
    """Run this file on the recipe's ranks with the run folder `path`; what rank 0 found."""
    from tests.launcher.engine.runs import launched

    folder = RunFolder(path)
    folder.logs.mkdir(parents=True)
    write_frozen(recipe, folder.recipe)
    launched(folder, __file__)
    return json.loads((path / "result.json").read_text())


def of_family(recipe, family):
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **FAMILIES[family]))


def uncached(model, prompt, limit, vocab_size):
    """The reference: a whole forward pass of the training model for every new token."""
    import torch

    ids = list(prompt)
    with torch.no_grad():
        for _ in range(limit):
            tokens = torch.tensor([ids])
            logits = model(tokens, torch.arange(len(ids))[None], None)
            ids.append(int(logits[0, -1, :vocab_size].argmax()))
    return ids[len(prompt) :]


def make(recipe, folder):
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    from launcher.engine.checkpoint import copy_tokenizer, save
    from launcher.engine.model import unwrap
    from launcher.engine.train import build

    references = {}
    for family in FAMILIES:
        one = of_family(recipe, family)
        state = build(one)
        run = folder.path / family
        copy_tokenizer(one, run / "tokenizer")
        save(one, state, run / "checkpoints", run / "tokenizer")
        destroy_num_microbatches_calculator()
        model = unwrap(state.chunks[0]).eval()
        references[family] = [uncached(model, p, n, recipe.derived.vocab_size) for p, n in zip(PROMPTS, LIMITS, strict=True)]
    return references


def answer(recipe, folder):
    import torch

    from checkpoints.folder import newest_checkpoint
    from launcher.engine.checkpoint import load_weights
    from launcher.engine.generate.cache import CachedModel, generation_config
    from launcher.engine.generate.decode import Prompt, answer_batch
    from launcher.engine.generate.sampling import Sampler
    from launcher.engine.model import build_chunks

    results = {}
    eod = recipe.derived.vocab_size - 1
    prompts = [Prompt(n, *pair) for n, pair in enumerate(zip(PROMPTS, LIMITS, strict=True), 1)]
    for family in FAMILIES:
        one = of_family(recipe, family)
        chunks = build_chunks(one, generation_config(one))
        load_weights(one, chunks, newest_checkpoint(folder.path.parent / "trained" / family))
        model = CachedModel(one, chunks)

        def run(prompts, model=model, **options):
            sampler = Sampler(dataclasses.replace(recipe.generate, **options), recipe.derived.vocab_size)
            return [dataclasses.asdict(answer) for answer in answer_batch(model, sampler, prompts, {eod})]

        results[family] = {
            "greedy": run(prompts, greedy=True),
            "sampled": run(prompts, temperature=2.0, seed=5),
            "sampled_alone": [answer for prompt in prompts for answer in run([prompt], temperature=2.0, seed=5)],
            "other_seed": run(prompts, temperature=2.0, seed=6),
            "penalised": run(prompts, greedy=True, repetition_penalty=1e6),
        }
        with torch.no_grad():
            for parameter in chunks[-1].parameters():
                parameter.fill_(float("nan"))
        results[family]["broken"] = run(prompts[:1], greedy=True)
    return results


def main(recipe, folder, stop):
    from launcher.engine.initialize import finish, initialize

    initialize(recipe)
    import torch

    result = {"make": make, "answer": answer}[recipe.run.name](recipe, folder)
    if torch.distributed.get_rank() == 0:
        Path(folder.path / "result.json").write_text(json.dumps(result))
    finish()


if __name__ == "__main__":
    run_worker(main)
