"""Adapters merged into the weights that they stand beside: W + alpha / rank x B A, a matrix at a time."""

from __future__ import annotations

from pathlib import Path

import torch

from checkpoints.adapters import SUFFIX, Adapters
from checkpoints.folder import CheckpointError
from checkpoints.formats.base import Derived, Source
from checkpoints.formats.torch_dist import Chunks, of_layer, read_index
from checkpoints.models.tensor import Tensor


class Merged(Derived):
    """A checkpoint's weights with the adapters of another one merged into them.

    Attributes:
        note: what was merged.
        merged: how many matrices.
    """

    def __init__(self, base: Source, folder: Path, note: Adapters):
        """`folder` is the checkpoint of the adapters.

        Raises:
            CheckpointError: the adapters are not of this model, or its weights are quantized.
        """
        if base.model.quantize:
            raise CheckpointError(f"{folder}: adapters cannot be merged into weights in {base.model.quantize}", "--quantize int8 of what is merged")
        super().__init__(base)
        self.path, self.format, self.layout = folder, "torch_dist", ""
        self.folders = [*base.folders, folder]
        own = (path for place in ("tokenizer", "hf") for path in sorted((folder / place).glob("*")) if path.is_file())
        self.companions = (*base.companions, *own)
        self.note, index = note, read_index(folder)
        self._pairs = {tensor.name: self._pair(tensor, index) for tensor in base.tensors if _module(tensor) in note.target_modules}
        self.merged = len(self._pairs)
        self.left_out |= {key: "the optimizer's" for key in index if key.startswith("optimizer.")}
        if more := sorted(key for key in index if not key.startswith("optimizer.") and key.split(".")[-2].removesuffix(SUFFIX) not in note.target_modules):
            raise CheckpointError(
                f"{folder} holds what is no adapter that its lora.json tells of: {', '.join(more[:8])}",
                "take another checkpoint of the run",
            )

    def _pair(self, tensor: Tensor, index: dict[str, Chunks]) -> tuple[Chunks, Chunks]:
        """A and B beside a matrix."""
        module, found = tensor.within.removesuffix(".weight"), []
        for name, shape in (("a", (self.note.rank, tensor.shape[1])), ("b", (tensor.shape[0], self.note.rank))):
            key = f"decoder.layers.{module}{SUFFIX}.{name}"
            there = of_layer(index[key], tensor.layer) if key in index else None
            if there is None or there.shape != shape:
                has = "is missing" if there is None else f"is {list(there.shape)}, and {list(shape)} was expected"
                raise CheckpointError(f"{self.path}: {key} of layer {tensor.layer} {has}", "take another checkpoint of the run")
            found.append(there)
        return found[0], found[1]

    def dtype(self, name: str) -> torch.dtype:
        """That of the weights."""
        return self._source.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """A tensor; where it has adapters the sum in fp32, which whoever takes it rounds once."""
        whole = self._source.read(name)
        if name not in self._pairs:
            return whole
        a, b = (one.read().float() for one in self._pairs[name])
        return whole.to(torch.float32, copy=True).addmm_(b, a, alpha=self.note.scale)


def _module(tensor: Tensor) -> str | None:
    """The name of the matrix that a tensor is; None for other tensors."""
    words = tensor.within.split(".")
    return words[-2] if tensor.layer is not None and words[-1] == "weight" else None
