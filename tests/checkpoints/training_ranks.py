"""Ranks that train, save, and go on from what was saved or converted, a layout after another: `main(FOLDER)`.

As in `ranks`, megatron-core is imported once and the ranks of every layout are forked from there. FOLDER/NAME/ are checkpoints;
FOLDER/found.json is, by name, the losses of two steps that a training made after saving there, or that one made which loaded it.
"""

import json
import os
import socket
import sys
from pathlib import Path

import torch

from launcher.engine import cpu_port

cpu_port.install()  # before megatron-core is imported

from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from checkpoints.folder import newest_checkpoint  # noqa: E402
from launcher.cli import app  # noqa: E402
from launcher.engine import checkpoint, train  # noqa: E402
from launcher.engine.data import loader, reads_data  # noqa: E402
from launcher.engine.initialize import initialize  # noqa: E402
from launcher.recipe import load  # noqa: E402
from launcher.recipe.schema import Recipe  # noqa: E402

LAYERS, HEADS, WIDTH, IDS = 4, 4, 32, 120  # padded to 128
MODELS = {
    "gpt2": ["model.position_embedding_type=learned_absolute"],
    "llama": [
        "model.family=llama", "model.position_embedding_type=rope", "model.normalization=RMSNorm", "model.swiglu=true", "model.add_bias_linear=false",
        "model.untie_embeddings_and_output_weights=true", "model.num_query_groups=2", "model.ffn_hidden_size=96",
    ],
    "yuan2": [
        "model.family=yuan2", "model.position_embedding_type=rope", "model.normalization=RMSNorm", "model.swiglu=true", "model.add_bias_linear=false",
        "model.untie_embeddings_and_output_weights=true", "model.ffn_hidden_size=96",
    ],
}  # fmt: skip


class Samples(torch.utils.data.Dataset):
    """Sequences in which the next id is one to three further; the same at every layout."""

    def __init__(self, recipe: Recipe):
        self.length = recipe.training.seq_length

    def __len__(self) -> int:
        return 64

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(1, 4, (self.length + 1,), generator=torch.Generator().manual_seed(number)).cumsum(0) % IDS
        return {"tokens": ids[:-1], "labels": ids[1:], "position_ids": torch.arange(self.length), "loss_mask": torch.ones(self.length)}


def recipe_of(model: str, tp: int, pp: int, dp: int, *words: str) -> Recipe:
    layout = [f"parallel.tensor_model_parallel_size={tp}", f"parallel.pipeline_model_parallel_size={pp}", f"launch.nproc_per_node={tp * pp * dp}"]
    sizes = [f"model.num_layers={LAYERS}", f"model.hidden_size={WIDTH}", f"model.num_attention_heads={HEADS}", "model.attention_dropout=0"]
    training = ["training.seq_length=16", "training.micro_batch_size=2", "training.global_batch_size=8", "training.train_iters=8", "optimizer.lr=0.01"]
    more = ["tokenizer.type=NullTokenizer", f"tokenizer.vocab_size={IDS - 1}", "model.make_vocab_size_divisible_by=64", "launch.device=cpu", "launch.cpu_threads=1", "model.hidden_dropout=0"]
    return load([*layout, *sizes, *training, *more, "optimizer.lr_warmup_iters=2", "data.data_path=none", *MODELS[model], *words], default="").recipe


def steps(recipe: Recipe, state: train.TrainState, count: int) -> list[float]:
    """The losses of some steps."""
    samples = Samples(recipe) if reads_data(recipe) else None
    batches = [loader(recipe, samples, state.consumed_train_samples) for _ in state.chunks]
    found = [train.train_step(recipe, state, batches)[0] for _ in range(count)]
    return train.from_last_stage(torch.stack(found)).tolist()


def begin(recipe: Recipe, folder: Path) -> list[float]:
    """Two steps, which are saved; the losses of the two after that."""
    state = train.build(recipe)
    steps(recipe, state, 2)
    save(recipe, state, folder)
    return steps(recipe, state, 2)


def go_on(recipe: Recipe, folder: Path, again: Path | None = None) -> list[float]:
    """Load what `folder` holds, and save it anew into `again`; the losses of two steps."""
    state = train.build(recipe)
    checkpoint.load(recipe, state, newest_checkpoint(folder), resume=False)
    assert (state.iteration, state.consumed_train_samples) == (2, 16)
    if again is not None:
        save(recipe, state, again)
    return steps(recipe, state, 2)


def begin_and_go_on(recipe: Recipe, folder: Path) -> list[float]:
    """`begin`, and the same two steps again from what it saved."""
    losses = begin(recipe, folder)
    destroy_num_microbatches_calculator()
    return losses + go_on(recipe, folder)


def save(recipe: Recipe, state: train.TrainState, folder: Path) -> None:
    if torch.distributed.get_rank() == 0:
        (folder / "tokenizer").mkdir(parents=True)
    torch.distributed.barrier()
    checkpoint.save(recipe, state, folder, folder / "tokenizer")


def forked(found: Path, work, recipe: Recipe) -> list[float]:
    """What `work(recipe)` gives on the ranks that it is laid out for, each of which is forked."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    children = []
    for number in range(recipe.derived.world_size):
        if child := os.fork():
            children.append(child)
            continue
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(recipe.derived.world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        initialize(recipe)
        losses = work(recipe)
        if number == 0:
            found.write_text(json.dumps(losses))
        torch.distributed.barrier()
        sys.exit()  # the usual way out, which ends the processes that megatron-core saves with
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit(f"ranks failed: {work}")
    return json.loads(found.read_text())


def convert(source: Path, target: Path, *words: object) -> str:
    """`yuan convert`; what it said."""
    done = CliRunner().invoke(app, ["convert", str(source), str(target), *map(str, words)])
    if done.exit_code:
        sys.exit(f"{words}: {done.output}\n{done.exception!r}")
    return done.output


TORCH, ZERO = "checkpoint.format=torch", "parallel.use_distributed_optimizer=true"
BF16, FP16 = "training.precision=bf16", "training.precision=fp16"
VIRTUAL, UNEVEN = "parallel.num_layers_per_virtual_pipeline_stage=1", "parallel.pipeline_model_parallel_layout=Et|tttL"
# By name: the model, TP, PP, DP and words of a training.
BEGUN = {
    "gpt2": ("gpt2", 2, 1, 1, TORCH), "gpt2_bf16": ("gpt2", 1, 1, 2, TORCH, ZERO, BF16), "llama_fp16": ("llama", 1, 1, 1, TORCH, FP16),
    "yuan2": ("yuan2", 1, 1, 1, ZERO),
}  # fmt: skip
# By name: what is converted, how, and TP, PP, DP and words of the training that goes on from that.
CONVERTED = {
    "gpt2_stages": ("gpt2", ["--to", "torch", "--pp", 2], (1, 2, 1, TORCH)),
    "gpt2_zero": ("gpt2", ["--optimizer", "distributed"], (1, 1, 1, ZERO)),
    "gpt2_bf16_stages": ("gpt2_bf16", ["--to", "torch", "--pp", 2, "--layout", "Et|tttL"], (1, 2, 1, TORCH, ZERO, BF16, UNEVEN)),
    "llama_fp16_interleaved": (
        "llama_fp16", ["--to", "torch", "--pp", 2, "--num-layers-per-virtual-pipeline-stage", 1], (1, 2, 1, TORCH, FP16, VIRTUAL),
    ),
    "yuan2_ranks": ("yuan2", ["--to", "torch", "--tp", 2, "--optimizer", "plain"], (2, 1, 1, TORCH)),
}  # fmt: skip


def main(folder: str) -> None:
    place, losses, said = Path(folder), {}, {}
    for name, (model, *layout) in BEGUN.items():
        losses[name] = forked(place / "losses", lambda recipe, name=name: begin(recipe, place / name), recipe_of(model, *layout))
    # The first stage's parameters before the table fill an odd number of 64s, and so its bucket is padded to a multiple of 128.
    recipe = recipe_of("gpt2", 1, 2, 1, ZERO, "training.seq_length=18")
    losses["padded"] = forked(place / "losses", lambda recipe: begin_and_go_on(recipe, place / "padded"), recipe)
    for name, (source, options, layout) in CONVERTED.items():
        said[name] = convert(place / source, place / name, *(() if "--optimizer" in options else ("--optimizer", "keep")), *options)
        again = place / f"{name}_saved" if TORCH in layout else None
        recipe = recipe_of(BEGUN[source][0], *layout)
        losses[name] = forked(place / "losses", lambda recipe, name=name, again=again: go_on(recipe, place / name, again), recipe)
    (place / "found.json").write_text(json.dumps({"losses": losses, "said": said}))
