"""Weights in int8, a scale for each output: half the bytes of bf16, for answers alone.

    scale[i] = 2 max|w[i]| / 255        q[i] = round(w[i] / scale[i]) in -128 … 127        w[i] ≈ scale[i] q[i]

Round to nearest, symmetric, weights alone: no data are needed. It is what Golden Stick's w8a16 does for MindSpore. The
matrices of the layers become so; embeddings, output layer, norms and biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import sqrt

import torch

from checkpoints.files.stored import NAMES
from checkpoints.folder import CheckpointError
from checkpoints.formats.base import Derived, Source
from checkpoints.models.gpt import SCALE

_BLOCK = 1 << 17  # numbers at a time: their fp32 copies stay in a core's cache; 64 times as many took 8 times as long


def quantize(whole: torch.Tensor, name: str = "a weight") -> tuple[torch.Tensor, torch.Tensor, float]:
    """A weight [out, in] as int8 [out, in] and scales fp32 [out]; and the error, relative: |w - scale q| / |w|.

    A row of zeros gets the scale 1.

    Raises:
        CheckpointError: it holds NaN or infinity, for which there is no scale.
    """
    numbers, scales = torch.empty(whole.shape, dtype=torch.int8), torch.empty(len(whole), dtype=torch.float32)
    wrong = size = 0.0
    step = max(1, _BLOCK // max(1, whole.shape[1]))
    with _one_thread():
        for first in range(0, len(whole), step):
            rows = whole[first : first + step].float()
            largest = rows.abs().amax(1)
            if not largest.isfinite().all():
                raise CheckpointError(f"{name} holds NaN or infinity, and cannot be quantized", "take an older checkpoint, or leave out --quantize")
            scale = torch.where(largest > 0, 2 * largest / 255, 1.0)
            q = (rows / scale[:, None]).round_().clamp_(-128, 127)
            numbers[first : first + step], scales[first : first + step] = q, scale
            size += rows.square().sum(dtype=torch.float64).item()
            wrong += q.mul_(scale[:, None]).sub_(rows).square_().sum(dtype=torch.float64).item()
    return numbers, scales, sqrt(wrong / size) if size else 0.0


@contextmanager
def _one_thread() -> Iterator[None]:
    """115 million numbers a second; with two threads on two busy cores, which wait for each other at every block, 2 to 10."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Quantized(Derived):
    """A source whose layers' matrices are int8, each made when it is asked for.

    Attributes:
        errors: relative errors of the weights that were read, by name.
    """

    def __init__(self, source: Source):
        """Raises:
        CheckpointError: its weights are quantized already.
        """
        if source.model.quantize:
            raise CheckpointError(f"{source.path} has weights in {source.model.quantize} already", "leave out --quantize")
        super().__init__(source)
        self.model = replace(source.model, quantize="int8")
        self._scaled = {tensor.name.removesuffix(SCALE) + "weight" for tensor in self.tensors if tensor.within.endswith(SCALE)}
        self._scales: dict[str, torch.Tensor] = {}
        self.errors: dict[str, float] = {}

    def dtype(self, name: str) -> torch.dtype:
        """int8, fp32 for scales, else the source's."""
        if name.endswith(SCALE):
            return torch.float32
        return torch.int8 if name in self._scaled else self._source.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """A tensor; the scales best after their weight, with which they are made."""
        if name.endswith(SCALE):
            if name not in self._scales:
                self.read(name.removesuffix(SCALE) + "weight")
            return self._scales.pop(name)
        whole = self._source.read(name)
        if name not in self._scaled:
            return whole
        numbers, self._scales[name.removesuffix("weight") + SCALE], self.errors[name] = quantize(whole, name)
        return numbers


class Dequantized(Derived):
    """A source of int8 weights as the numbers that they stand for, scale x q, rounded once."""

    def __init__(self, source: Source, dtype: torch.dtype | None = None):
        """`dtype` is what they become; by default the type of the embedding, which is not quantized."""
        super().__init__(source)
        self.model = replace(source.model, quantize=None)
        self._scaled = {tensor.name.removesuffix(SCALE) + "weight" for tensor in source.tensors if tensor.within.endswith(SCALE)}
        self._dtype = dtype or source.dtype(source.tensors[0].name)

    @property
    def lost(self) -> str:
        """What the numbers keep, in words."""
        return "in fp32" if self._dtype == torch.float32 else f"rounded to {NAMES[self._dtype]}"

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype if name in self._scaled else self._source.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """A tensor, whole."""
        numbers = self._source.read(name)
        if name not in self._scaled:
            return numbers
        scales = self._source.read(name.removesuffix("weight") + SCALE).float()
        whole, step = torch.empty(numbers.shape, dtype=self._dtype), max(1, _BLOCK // max(1, numbers.shape[1]))
        for first in range(0, len(numbers), step):
            rows = slice(first, first + step)
            whole[rows] = numbers[rows].float().mul_(scales[rows, None])
        return whole
