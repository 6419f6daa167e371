"""Training data: megatron-core's GPTDataset and blending, dealt to the ranks in Megatron-LM's order."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import get_blend_from_list
from torch.utils.data import DataLoader, Dataset

from launcher.recipe.schema import Recipe
from launcher.recipe.tokenizer import tokenizer_of


class SequentialBatches:
    """Deals sample indices: microbatches of one data-parallel rank, in order, from `consumed` upward.

    Of every micro_batch_size x data-parallel size consecutive indices, rank r takes the r-th slice, so the order of the
    samples does not depend on how many ranks there are. An incomplete last group is dropped.
    """

    def __init__(self, total: int, consumed: int, micro_batch_size: int, rank: int, size: int):
        self.total, self.consumed = total, consumed
        self.micro_batch_size, self.rank, self.size = micro_batch_size, rank, size

    def __iter__(self) -> Iterator[list[int]]:
        group, first = self.micro_batch_size * self.size, self.rank * self.micro_batch_size
        for start in range(self.consumed, self.total - group + 1, group):
            yield list(range(start + first, start + first + self.micro_batch_size))


def sample_counts(recipe: Recipe) -> list[int]:
    """Samples of the train, validation and test sets that the whole run may consume, as Megatron-LM counts them."""
    training, derived = recipe.training, recipe.derived
    evaluation = training.eval_iters * training.global_batch_size
    train = training.train_samples or derived.train_samples
    return [train, (derived.train_iters // training.eval_interval + 1) * evaluation, evaluation]


def build_datasets(recipe: Recipe) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """The three sets; None where this rank reads no data or a set has no share. Rank 0 builds the sample indices first."""
    data = recipe.data
    sources = [data.train_data_path, data.valid_data_path, data.test_data_path]
    blend = None if data.data_path is None else get_blend_from_list(_words(data.data_path))
    per_split = None if blend else [get_blend_from_list(_words(source)) for source in sources]
    config = GPTDatasetConfig(
        random_seed=recipe.training.seed,
        sequence_length=recipe.training.seq_length,
        blend=blend,
        blend_per_split=per_split,
        split=data.split if blend else None,
        path_to_cache=str(cache_folder(recipe)),
        tokenizer=tokenizer_of(recipe.tokenizer),
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        create_attention_mask=data.reset_attention_mask,  # causal attention needs no mask of its own
    )
    reads = lambda: reads_data(recipe)  # noqa: E731  the builder wants a function and calls it on every rank
    return BlendedMegatronDatasetBuilder(GPTDataset, sample_counts(recipe), reads, config).build()


def cache_folder(recipe: Recipe) -> Path:
    """Where megatron-core keeps its sample indices: a folder per content of the .idx files.

    Its own key is made of names and settings; data written anew under the same name would be read by the old indices.
    """
    data = recipe.data
    sources = [data.data_path, data.train_data_path, data.valid_data_path, data.test_data_path]
    prefixes = [word for source in sources for word in _words(source) or [] if Path(f"{word}.idx").is_file()]
    digest = hashlib.sha256()
    for prefix in prefixes:
        with open(f"{prefix}.idx", "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    base = Path(data.data_cache_path) if data.data_cache_path else Path(prefixes[0]).parent / "cache"
    return base / digest.hexdigest()[:16]


def reads_data(recipe: Recipe) -> bool:
    """Whether this rank reads samples: tensor rank 0 of the first and last stage (of every stage with a document mask)."""
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        return False
    ends = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
    return ends or recipe.data.reset_attention_mask


def loader(recipe: Recipe, dataset: Dataset | None, consumed: int) -> Iterator[dict] | None:
    """Microbatches of this rank from sample `consumed` on; None where it reads none."""
    if dataset is None:
        return None
    batches = SequentialBatches(
        len(dataset),
        consumed,
        recipe.training.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    workers = recipe.data.num_workers
    return iter(
        DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=recipe.derived.device == "cuda",
            worker_init_fn=_outlive_the_signal,
            # A generator of its own: otherwise opening the loader would move the one that draws dropout.
            generator=torch.Generator(),
        )
    )


def _outlive_the_signal(worker: int) -> None:
    """A signal to the whole process group asks the rank to save and end; its loaders end with it, not before."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def next_batch(recipe: Recipe, batches: Iterator[dict] | None) -> dict[str, torch.Tensor | None]:
    """The next microbatch on every rank that needs it.

    Returns tokens, labels, position_ids [b, s] int64, loss_mask [b, s] float32 and attention_mask [b, 1, s, s] bool or
    None; all None on the stages between first and last. Tensor rank 0 reads and broadcasts.
    """
    names = ["tokens", "labels", "position_ids", "loss_mask", "attention_mask"]
    masked = recipe.data.reset_attention_mask
    ends = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
    if not ends and not masked:
        return dict.fromkeys(names)
    sample = next(batches) if batches is not None else None
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        batch = {name: tensor.cuda(non_blocking=True) for name, tensor in sample.items()}
    else:
        batch = tensor_parallel.broadcast_data(["tokens", "labels", "position_ids"], sample, torch.int64)
        batch |= tensor_parallel.broadcast_data(["loss_mask"], sample, torch.float32)
        if masked:
            batch |= tensor_parallel.broadcast_data(["attention_mask"], sample, torch.bool)
    return {name: batch.get(name) for name in names}


def _words(path) -> list[str] | None:
    """A prefix or a blend as Megatron-LM's list of words: ['0.7', 'a', '0.3', 'b'] or ['a']."""
    if path is None:
        return None
    return [str(word) for word in path] if isinstance(path, (list, tuple)) else [str(path)]
