"""What a conversion is to write: the format, the types, the layout; and the target that writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from checkpoints.files.stored import DTYPES
from checkpoints.folder import CheckpointError
from checkpoints.formats import dialects, hf, mindspore
from checkpoints.formats.base import Source, Target
from checkpoints.formats.dialects import Dialect
from checkpoints.formats.rank_target import RankFiles, even, interleaved
from checkpoints.formats.torch_dist_target import TorchDist
from checkpoints.models import published
from checkpoints.models.gpt import SCALE
from checkpoints.models.mindformers import Fused
from checkpoints.models.tensor import padded
from checkpoints.optimizer import Form, TrainingState
from checkpoints.recognise import QUANTIZED

READ, WRITTEN = ("hf", "torch_dist", "mindspore", "torch"), ("hf", "torch_dist", "mindspore", *dialects.FORMATS)
BARE = ("hf", "mindspore")  # formats whose folder is the checkpoint itself, no folder of several


@dataclass(frozen=True)
class Wanted:
    """What to write.

    Attributes:
        to: one of WRITTEN.
        dtype: fp32, bf16, fp16; None keeps each tensor's.
        hf_config: a Hugging Face folder whose config.json and tokenizer are to go with the weights.
        config: values for config.json where no such file comes with the weights, such as eos_token_id.
        allow_nan: take weights that hold NaN or infinity.
        tensor, pipeline: ranks, in formats that have them.
        stages: the layers of each pipeline stage; None shares them out evenly. More than `pipeline` go round its ranks.
        transformer_impl: whose names torch has: `local` or `transformer_engine`, as Megatron-LM's option of that name.
        pai_release: of Pai: `v0.6` and later, or `v0.5`.
        fused_layout: of MindSpore's matrices.
        optimizer: whether the state of the training goes along, where the source was opened with it: `none`; `keep`, in the
            form that it has; in the form `plain` or `distributed`.
    """

    to: str
    dtype: str | None = None
    hf_config: Path | None = None
    config: Mapping[str, Any] | None = None
    allow_nan: bool = False
    tensor: int = 1
    pipeline: int = 1
    stages: Sequence[int] | None = None
    transformer_impl: str = "local"
    pai_release: str = "v0.6"
    fused_layout: Fused | None = None
    optimizer: str = "none"

    @property
    def states(self) -> bool:
        """Whether the optimizer's tensors are written too."""
        return self.optimizer != "none"


def make_target(source: Source, weights: Path, wanted: Wanted) -> Target:
    """The target that writes `source` as `wanted` into the folder `weights`."""
    types = dtypes(source, DTYPES[wanted.dtype] if wanted.dtype else None, wanted.to)
    if source.model.quantize and wanted.to not in QUANTIZED:
        raise CheckpointError(
            f"{wanted.to} has no weights in {source.model.quantize}: {' and '.join(QUANTIZED)} have",
            f"--to {' or '.join(QUANTIZED)}",
        )
    if wanted.to not in BARE and (kind := types[source.tensors[0].name]) not in DTYPES.values():
        what = f"{source.path} has weights of {kind}, and {wanted.to} is for training and answering in {', '.join(DTYPES)}"
        raise CheckpointError(what, f"--dtype {' or '.join(DTYPES)}")
    stages = list(wanted.stages or even(source.model.num_layers, wanted.pipeline))
    state, model = _state(source, wanted, stages), replace(source.model, vocab_size=rows(source, wanted)) if source.state else source.model
    if wanted.to == "torch_dist":
        return TorchDist(weights, model, types, rows(source, wanted), state)
    if wanted.to in dialects.FORMATS:
        return RankFiles(weights, model, types, _dialect(wanted), wanted.tensor, stages, wanted.pipeline, state)
    if wanted.to not in WRITTEN:
        raise CheckpointError(f"{wanted.to} cannot be written, {' and '.join(WRITTEN)} can", f"--to {', '.join(WRITTEN)}")
    config, beside = huggingface(source, wanted)
    if wanted.to == "hf":
        return hf.HuggingFace(weights, source.model, types, config, beside)
    if wanted.fused_layout is None:
        raise CheckpointError(
            "how query, key and value lie in MindSpore's files is not said: --fused-layout separate, concat or grouped",
            "--fused-layout separate, concat or grouped",
        )
    return mindspore.MindSpore(weights, source.model, types, wanted.tensor, wanted.fused_layout, config, beside)


def rows(source: Source, wanted: Wanted) -> int:
    """Rows of the vocabulary's tables as they are written, padding included: a training goes on with those that it has."""
    if source.state is not None:
        return next(tensor.shape[0] for tensor in source.tensors if tensor.vocabulary)
    if wanted.to in dialects.FORMATS:
        return _dialect(wanted).rows(source.model.vocab_size, wanted.tensor)
    return padded(source.model.vocab_size, dialects.VOCABULARY_MULTIPLE) if wanted.to == "torch_dist" else source.model.vocab_size


def _state(source: Source, wanted: Wanted, stages: Sequence[int]) -> TrainingState | None:
    """Where the training stands, as the target is to say it.

    Raises:
        CheckpointError: the target cannot hold it.
    """
    if source.state is None:
        return None
    if wanted.to not in ("torch_dist", "torch") or wanted.dtype:
        what = f"{wanted.to} holds no optimizer's state" if not wanted.dtype else "an optimizer's state is of weights of the type that it has"
        raise CheckpointError(what, "--to torch or torch_dist, without --dtype, or leave out --optimizer")
    form = None if wanted.optimizer == "keep" else cast(Form, wanted.optimizer)
    settings: dict[str, Any] = {"use_distributed_optimizer": (form or source.state.form) == "distributed"}
    if wanted.to == "torch_dist":
        return source.state.to(form, None, **settings)
    layout = "|".join("t" * layers for layers in stages) if wanted.stages else None
    settings |= {
        "tensor_model_parallel_size": wanted.tensor, "pipeline_model_parallel_size": wanted.pipeline, "transformer_impl": wanted.transformer_impl,
        "pipeline_model_parallel_layout": f"E{layout}L" if layout and len(set(stages)) > 1 else None,
        "num_layers_per_virtual_pipeline_stage": None, "virtual_pipeline_model_parallel_size": None,
        "decoder_first_pipeline_num_layers": None, "decoder_last_pipeline_num_layers": None,
    } | interleaved(stages, wanted.pipeline)  # fmt: skip
    return source.state.to(form, (wanted.pipeline, wanted.tensor), **settings)


def _dialect(wanted: Wanted) -> Dialect:
    if wanted.to == "torch":
        return dialects.core(wanted.transformer_impl)
    return dialects.yuan() if wanted.to == "yuan" else dialects.pai(wanted.pai_release)


def huggingface(source: Source, wanted: Wanted) -> tuple[dict[str, Any], dict[str, Path]]:
    """The config.json that goes with the weights, and the other files of the model and its tokenizer."""
    beside = {path.name: path for path in (*source.companions, *(published.companions(wanted.hf_config) if wanted.hf_config else ()))}
    base = beside.pop("config.json", None)
    given = None if base is None else published.read_config(base.parent)
    config = (wanted.config or {} if given is None else {}) | published.config_for(replace(source.model, quantize=None), given, str(base))
    return config, beside


def dtypes(source: Source, dtype: torch.dtype | None, to: str = "") -> dict[str, torch.dtype]:
    """The type that each tensor of a source is to have: `dtype` where one is given, else its own.

    Quantized weights stay as they are; their scales are fp16 for MindSpore, as its operators want them.
    """
    found = {tensor.name: source.dtype(tensor.name) for tensor in source.tensors}
    for name, own in found.items():
        if name.endswith(SCALE):
            found[name] = torch.float16 if to == "mindspore" else torch.float32
        elif own.is_floating_point and not source.state:
            found[name] = dtype or own
    return found


def nbytes(source: Source, types: Mapping[str, torch.dtype]) -> int:
    """Bytes of all tensors of a source in `types`."""
    return sum(torch.Size(tensor.shape).numel() * types[tensor.name].itemsize for tensor in source.tensors)
