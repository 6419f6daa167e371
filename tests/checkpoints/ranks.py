"""Ranks that load converted checkpoints, at several layouts one after another: `main(FOLDER)`.

megatron-core is imported once, and the ranks of every layout are forked from there: an import takes as long as all they do.
This is no script: the processes that megatron-core spawns to save import the main one again, and this would be slow.
FOLDER/*/ are converted checkpoints, FOLDER/torch/*/ such of a file per rank at TP 2 x PP 2, FOLDER/../hf/*/ what they were converted
from, FOLDER/../others/*/ such in other formats, FOLDER/ids.pt the prompt [s], FOLDER/rows* rows to train on; FOLDER/TPxPP.pt is what rank 0 of a layout found.
"""

import os
import socket
import sys
from pathlib import Path

import torch

from launcher.engine import cpu_port

cpu_port.install()  # before megatron-core is imported

from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator  # noqa: E402

from checkpoints.folder import newest_checkpoint  # noqa: E402
from checkpoints.formats.torch_dist import key_of  # noqa: E402
from checkpoints.models import gpt  # noqa: E402
from checkpoints.models.model import Model  # noqa: E402
from checkpoints.recognise import checkpoint_in  # noqa: E402
from data_tools.packing import Packed  # noqa: E402
from data_tools.sft import Rows  # noqa: E402
from launcher.engine import checkpoint, model, train  # noqa: E402
from launcher.engine.data import loader, reads_data  # noqa: E402
from launcher.engine.generate.cache import CachedModel, generation_config  # noqa: E402
from launcher.engine.initialize import initialize  # noqa: E402
from launcher.engine.rows import RowSamples  # noqa: E402
from launcher.recipe import load  # noqa: E402
from launcher.recipe.frozen import own_recipe  # noqa: E402
from launcher.recipe.inference import inference_recipe  # noqa: E402
from launcher.recipe.resolve import resolve  # noqa: E402
from launcher.recipe.schema import Recipe  # noqa: E402
from tests.checkpoints.published import LAYOUTS, SAVED, TUNED, VARIANTS, VOCABULARY  # noqa: E402
from tests.launcher.engine.yuan2_worker import form_groups  # noqa: E402


def logits(path: Path, ids: torch.Tensor, *words: str) -> torch.Tensor | None:
    """The logits [s, vocabulary] after every token, as `yuan generate` loads the checkpoint; on the last stage."""
    loaded = load([f"generate.load={path}", *words, "launch.device=cpu", "launch.cpu_threads=1", "training.precision=fp32"], default="generate")
    recipe, _ = inference_recipe(loaded, checkpoint_in(path))
    chunks = model.build_chunks(recipe, generation_config(recipe))
    checkpoint.load_weights(recipe, chunks, checkpoint_in(path))
    ids = ids[: recipe.model.max_position_embeddings] % recipe.derived.vocab_size
    with torch.no_grad():
        found = CachedModel(recipe, chunks).prefill(ids.expand(len(ids), -1), torch.arange(len(ids)) + 1, len(ids))
    return None if found is None else found[:, : recipe.derived.vocab_size].clone()


def trained(path: Path, tp: int, pp: int) -> None:
    """Begin a training from the checkpoint, and save it at once as a run does, into `path`-run."""
    recipe, run = own_recipe(newest_checkpoint(path)), path.with_name(path.name + "-run")
    recipe.parallel.tensor_model_parallel_size, recipe.parallel.pipeline_model_parallel_size = tp, pp
    recipe.launch.device, recipe.launch.nproc_per_node = "cpu", tp * pp
    recipe.training.micro_batch_size, recipe.training.train_iters, recipe.optimizer.lr = 1, 1, 1e-3
    padded, recipe.derived = recipe.derived.padded_vocab_size, type(recipe.derived)()
    resolve(recipe, {}, "run")
    recipe.derived.padded_vocab_size = padded
    destroy_num_microbatches_calculator()  # the last one's
    state = train.build(recipe)
    checkpoint.load(recipe, state, newest_checkpoint(path), resume=False)
    if torch.distributed.get_rank() == 0:
        (run / "tokenizer").mkdir(parents=True)
    torch.distributed.barrier()
    checkpoint.save(recipe, state, run / "checkpoints", run / "tokenizer")


def losses(folder: Path, path: Path, *words: str) -> list[float]:
    """Of two steps of fine-tuning from a checkpoint whose model no recipe describes."""
    length = ["training.train_iters=2", "training.seq_length=16", "training.micro_batch_size=1", "training.global_batch_size=4", "optimizer.lr=0.01"]
    more = ["tokenizer.type=NullTokenizer", f"tokenizer.vocab_size={VOCABULARY - 1}", f"data.train={folder / 'rows'}", "training.precision=bf16"]
    ranks = [f"launch.nproc_per_node={torch.distributed.get_world_size()}", "launch.device=cpu", "launch.cpu_threads=1"]
    recipe = load([f"checkpoint.load={path}", *length, *more, *ranks, "parallel.use_distributed_optimizer=true", *words], default="").recipe
    form_groups(recipe)
    state = train.build(recipe)
    checkpoint.load(recipe, state, checkpoint_in(path), resume=False)
    samples = RowSamples(Packed(Rows(folder / "rows"), 16, True), recipe, 8, True, 1) if reads_data(recipe) else None
    batches = [loader(recipe, samples, 0) for _ in state.chunks]
    return train.from_last_stage(torch.stack([train.train_step(recipe, state, batches)[0] for _ in range(2)])).tolist()


def parameters(values: dict, tp: int) -> dict:
    """Of a model with these values: {name: (shape, axis)} of the parameters built, {key: global shape} of its sharded
    tensors, and the same two as `checkpoints.models` describes them."""
    recipe = Recipe()
    for key, value in {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 24, **values}.items():
        setattr(recipe.model, key, value)
    recipe.tokenizer.type, recipe.tokenizer.vocab_size, recipe.model.make_vocab_size_divisible_by = "NullTokenizer", 49, 25
    recipe.parallel.tensor_model_parallel_size, recipe.launch.nproc_per_node, recipe.launch.device = tp, tp, "cpu"
    resolve(recipe, {}, "built")
    chunk = model.unwrap(model.build_chunks(recipe, model.transformer_config(recipe))[0])
    built = {
        name: (tuple(one.shape), one.partition_dim if one.tensor_model_parallel else None) for name, one in chunk.named_parameters()
    }
    sharded: dict = {}
    _sharded(chunk.sharded_state_dict(metadata={"singleton_local_shards": False}), sharded)
    described = Model.of(vars(recipe.model), "the recipe", vocab_size=50)  # 49 and the end of document; no padding
    tensors = gpt.tensors(described)
    local = {one.name: (tuple(one.split(torch.empty(one.shape, device="meta"), tp)[0].shape), one.axis) for one in tensors}
    stacked = {key_of(one, described): ((described.num_layers,) if one.layer is not None else ()) + one.shape for one in tensors}
    return {"built": built, "described": local, "sharded": sharded, "stacked": stacked}


def _sharded(value, found: dict) -> None:
    """Keys and global shapes of the tensors in a sharded state, gate and up together as they are saved."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for one in value:
            _sharded(one, found)
    elif hasattr(value, "build"):
        _sharded(value.build(), found)
    elif hasattr(value, "global_shape") and "_extra_state" not in value.key:
        found[value.key] = tuple(value.global_shape)


def rank(folder: Path, tp: int, pp: int) -> None:
    setting = Recipe()
    setting.parallel.tensor_model_parallel_size, setting.parallel.pipeline_model_parallel_size = tp, pp
    setting.derived.device, setting.launch.cpu_threads = "cpu", 1
    initialize(setting)
    ids = torch.load(folder / "ids.pt")
    paths = sorted(path for path in folder.iterdir() if (path / "release").is_dir())
    words = f"parallel.tensor_model_parallel_size={tp}", f"parallel.pipeline_model_parallel_size={pp}"
    found: dict = {"logits": {path.name: logits(path, ids, *words) for path in paths}}
    if tp == pp:
        as_they_are = [*sorted((folder.parent / "hf").iterdir()), *sorted((folder.parent / "others").iterdir())]
        found["direct"] = {path.name: logits(path, ids, *words) for path in as_they_are}
    else:
        found["files"] = {path.name: logits(path, ids, *words) for path in sorted((folder / "torch").iterdir())}
    if (tp, pp) != (2, 2):
        starts = (folder.parent / "hf" / TUNED, folder / TUNED, folder / "torch" / TUNED)
        found["losses"] = {str(path.parent): losses(folder, path, *words) for path in starts}
    if (tp, pp) == (1, 2):
        interleaved = "parallel.num_layers_per_virtual_pipeline_stage=1"
        found["losses"]["interleaved"] = losses(folder, starts[0], *words, interleaved)
    if (tp, pp) == (2, 1):
        found["parameters"] = {name: parameters(values, tp) for name, values in VARIANTS.items()}
    if (tp, pp) == (2, 2):
        own_layout = sorted(path for path in (folder / "torch").iterdir() if (path / "release").is_dir())
        found["logits"] |= {f"torch/{path.name}": logits(path, ids) for path in own_layout}
        for path in [path for path in paths if path.name in SAVED] + own_layout:
            trained(path, tp, pp)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == tp * pp - 1:
        torch.save(found, folder / f"{tp}x{pp}.pt")


def launch(folder: Path, tp: int, pp: int, port: int) -> None:
    """Fork the ranks of a layout, and wait for them; the first that fails ends this process."""
    children = []
    for number in range(tp * pp):
        if child := os.fork():
            children.append(child)
            continue
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(tp * pp), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        rank(folder, tp, pp)
        sys.exit()  # the usual way out, which ends the processes that megatron-core saves with
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    if failed:
        sys.exit(f"{len(failed)} ranks of TP {tp} x PP {pp} failed")


def main(folder: str) -> None:
    """Every layout, one after another."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        free = listener.getsockname()[1]
    for number, layout in enumerate(LAYOUTS):
        launch(Path(folder), *layout, free + number)
