"""Training data: megatron-core's GPTDataset and blending, dealt to the ranks in Megatron-LM's order."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import get_blend_from_list
from torch.utils.data import DataLoader, Dataset, default_collate

from launcher.engine.rows import build_row_sets
from launcher.errors import UserError
from launcher.recipe.sample_index import cache_folder, is_whole, note_path, sample_counts, words, write_note
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


def build_datasets(recipe: Recipe) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """The three sets; None where this rank reads no data or a set has no share. Rank 0 builds the sample index first,
    where `yuan data index` has not. Of fine-tuning's rows there is no test set."""
    if recipe.data.train is not None:
        return (*build_row_sets(recipe), None) if reads_data(recipe) else (None, None, None)
    if torch.distributed.get_rank() == 0:
        build_index(recipe)
    return _builder(recipe, cache_folder(recipe), lambda: reads_data(recipe)).build()


def build_index(recipe: Recipe) -> bool:
    """Build megatron-core's sample index of the recipe's data where it is not there; without GPUs or process groups.

    It is made beside the cache folder and moved there, so that no one reads half of it, whoever else builds the same.

    Returns:
        Whether it had to be built.

    Raises:
        UserError: the folder cannot be written.
    """
    note = note_path(recipe)
    if is_whole(note):
        return False
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{note.parent.name}.", suffix=".part", dir=note.parent.parent) as part:
            with _as_if_alone():
                _builder(recipe, Path(part), lambda: True).build()
            write_note(note, [path.replace(note.parent / path.name) for path in sorted(Path(part).iterdir())])
    except OSError as error:
        fix = "see to the space and the rights there, or data.data_cache_path=ANOTHER_FOLDER"
        raise UserError(f"the sample index cannot be written: {error}", str(note.parent), fix) from error
    return True


def _builder(recipe: Recipe, cache: Path, reads: Callable[[], bool]) -> BlendedMegatronDatasetBuilder:
    data = recipe.data
    sources = [data.train_data_path, data.valid_data_path, data.test_data_path]
    blend = None if data.data_path is None else get_blend_from_list(words(data.data_path))
    per_split = None if blend else [get_blend_from_list(words(source)) for source in sources]
    config = GPTDatasetConfig(
        random_seed=recipe.training.seed,
        sequence_length=recipe.training.seq_length,
        blend=blend,
        blend_per_split=per_split,
        split=data.split if blend else None,
        path_to_cache=str(cache),
        tokenizer=tokenizer_of(recipe.tokenizer),
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        create_attention_mask=False,  # causal attention needs none, and documents are told by their numbers: `_collated`
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, sample_counts(recipe), reads, config)


@contextmanager
def _as_if_alone() -> Iterator[None]:
    """megatron-core's builder waits for all ranks after each set, and asks for its rank even where there is no group."""
    kept = torch.distributed.is_initialized, torch.distributed.get_rank
    torch.distributed.is_initialized, torch.distributed.get_rank = lambda: False, lambda *_, **__: 0
    try:
        yield
    finally:
        torch.distributed.is_initialized, torch.distributed.get_rank = kept


def reads_data(recipe: Recipe) -> bool:
    """Whether this rank reads samples: tensor rank 0 of each stage that needs them."""
    return parallel_state.get_tensor_model_parallel_rank() == 0 and needs_data(recipe)


def needs_data(recipe: Recipe) -> bool:
    """Whether this stage does: the first and the last, all with a document mask or with Yuan's RoPE by position id."""
    by_position = recipe.model.family == "yuan2" and recipe.data.reset_position_ids
    ends = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
    return ends or recipe.data.reset_attention_mask or by_position


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
    apart = recipe.data.reset_attention_mask and recipe.data.train is None  # samples of rows tell their documents
    eod = tokenizer_of(recipe.tokenizer).eod if apart else None
    return iter(
        DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=recipe.derived.device == "cuda",
            worker_init_fn=_outlive_the_signal,
            collate_fn=partial(_collated, eod),
            # A generator of its own: otherwise opening the loader would move the one that draws dropout.
            generator=torch.Generator(),
        )
    )


def _collated(eod: int | None, samples: list[dict]) -> dict[str, torch.Tensor]:
    """A microbatch of samples, with `eod` the document of each position [b, s] too: behind that token begins the next."""
    batch = default_collate(samples)
    if eod is not None:
        ends = batch["tokens"] == eod
        batch["document"] = ends.cumsum(1) - ends.long()
    return batch


def _outlive_the_signal(worker: int) -> None:
    """A signal to the whole process group asks the rank to save and end; its loaders end with it, not before."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def next_batch(recipe: Recipe, batches: Iterator[dict] | None) -> dict[str, torch.Tensor | None]:
    """The next microbatch on every rank that needs it.

    Returns tokens, labels, position_ids [b, s] int64, loss_mask [b, s] float32 and attention_mask, which is the document of each
    position [b, s] int64 where they are kept apart; all None on the stages that need none. Tensor rank 0 reads and broadcasts.
    """
    names = ["tokens", "labels", "position_ids", "loss_mask"]
    masked = recipe.data.reset_attention_mask
    if not needs_data(recipe):
        return dict.fromkeys([*names, "attention_mask"])
    sample = next(batches) if batches is not None else None
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        batch = {name: tensor.cuda(non_blocking=True) for name, tensor in sample.items()}
    else:
        batch = tensor_parallel.broadcast_data(["tokens", "labels", "position_ids"] + ["document"] * masked, sample, torch.int64)
        batch |= tensor_parallel.broadcast_data(["loss_mask"], sample, torch.float32)
    return {name: batch[name] for name in names} | {"attention_mask": batch["document"] if masked else None}
