"""Fine-tuning's data sets: prepared rows, packed, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from data_tools.packing import Packed
from launcher.recipe.finetuning import packed, steps_of_epoch
from launcher.recipe.schema import Recipe
from launcher.recipe.tokenizer import tokenizer_of


class RowSamples(Dataset):
    """`size` samples: `samples` again and again, each epoch in an order of its own (with a seed). An epoch of `whole_batches` is
    filled up with samples without any loss, as `transformers` ends each with a smaller batch: more epochs than were meant at
    first go on where these end.

    A sample is tokens, labels, position_ids and document [s] int64 and loss_mask [s] float32 (see `Packed.sample`). By
    `loss_normalization` "sample" the mask of each row sums to 1.
    """

    def __init__(self, samples: Packed, recipe: Recipe, size: int, whole_batches: bool, seed: int | None):
        self.samples, self.size, self.seed = samples, size, seed
        steps, batch = steps_of_epoch(recipe, len(samples)), recipe.training.global_batch_size
        self.epoch = steps * batch if whole_batches else len(samples)
        self.per_row = recipe.training.loss_normalization == "sample"
        self.filling = tokenizer_of(recipe.tokenizer).eod
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return self.size

    @property
    def share(self) -> float:
        """Of all positions, those whose label is trained."""
        return self.samples.supervised / (self.epoch * self.samples.seq_length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        epoch, place = divmod(index, self.epoch)
        real = place < len(self.samples)
        sample = self.samples.sample(self._shuffled(epoch, place) if real else 0, self.filling)
        mask = sample["loss_mask"]
        if not real:
            mask[:] = 0
        elif self.per_row:
            of_row = np.bincount(sample["document"], weights=mask)
            mask /= np.maximum(of_row, 1)[sample["document"]]
        return {name: torch.from_numpy(array) for name, array in sample.items()}

    def _shuffled(self, epoch: int, place: int) -> int:
        if self.seed is None:
            return place
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.samples))
        return int(self._order[1][place])


def build_row_sets(recipe: Recipe) -> tuple[RowSamples, RowSamples | None]:
    """The training samples of the whole run, and the validation set once, in its order, filled up to whole batches."""
    training = recipe.training
    train, valid = packed(recipe, recipe.derived.train_rows), packed(recipe, recipe.derived.valid_rows)
    sets = RowSamples(train, recipe, recipe.derived.train_samples, training.epochs is not None, training.seed)
    if valid is None:
        return sets, None
    return sets, RowSamples(valid, recipe, steps_of_epoch(recipe, len(valid)) * training.global_batch_size, True, None)
