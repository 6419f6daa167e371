"""From one format into another: tensor by tensor, each exactly once, with a checksum of each on both sides."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from checkpoints.files.stored import DTYPES, NAMES, raw
from checkpoints.folder import MANIFEST, RELEASE, TRACKER, CheckpointError, flush, flush_one, manifest
from checkpoints.formats import dialects, hf, mindspore, rank_files, torch_dist
from checkpoints.formats.base import Source, Target
from checkpoints.formats.dialects import Dialect
from checkpoints.formats.rank_target import RankFiles, even
from checkpoints.models import megatron
from checkpoints.models.gpt import SCALE
from checkpoints.models.mindformers import Fused
from checkpoints.models.model import Model
from checkpoints.models.tensor import Tensor, padded
from checkpoints.recognise import QUANTIZED, Found, recognise
from data_tools.errors import DataError
from data_tools.lock import Lock

READ, WRITTEN = ("hf", "torch_dist", "mindspore", "torch"), ("hf", "torch_dist", "mindspore", *dialects.FORMATS)
BARE = ("hf", "mindspore")  # formats whose folder is the checkpoint itself, no folder of several
_MARK = ".conversion"  # in a folder that a conversion is writing, and that the next one may remove
Progress = Callable[[str, int], None]  # called with what is done ("writing", "checking") and the bytes since the last call


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
        stages: the layers of each pipeline stage; None shares them out evenly.
        transformer_impl: whose names torch has: `local` or `transformer_engine`, as Megatron-LM's option of that name.
        pai_release: of Pai: `v0.6` and later, or `v0.5`.
        fused_layout: of MindSpore's matrices.
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


def open_source(
    found: Found, model: Model | None = None, vocab_size: int | None = None, fused_layout: Fused | None = None, hf_config: Path | None = None
) -> Source:
    """The checkpoint that `recognise` found.

    Args:
        model: what it is a model of, where something beside the weights says it; else what they carry themselves.
        vocab_size: ids before padding, for formats that do not say.
        fused_layout: how MindSpore's fused matrices lie, where nothing beside them says it.
        hf_config: a Hugging Face folder with the model's config.json, for files per rank that do not say what they are.

    Raises:
        CheckpointError: it is damaged, its format is not read, or something is not said that nobody should guess.
    """
    if found.format == "hf":
        return hf.open_source(found.path)
    if found.format == "torch_dist":
        if model is None:
            model = megatron.model_with_ids(vars(torch_dist.settings(found.path)), f"{found.path}/common.pt", vocab_size)
        return torch_dist.open_source(found.path, model)
    if found.format == "mindspore":
        return mindspore.open_source(found.path, model, fused_layout, hf_config)
    if found.format == "torch":
        return rank_files.open_source(found.path, found.tensor, found.pipeline, model, vocab_size, hf_config)
    raise CheckpointError(f"{found.path} is in the format {found.format}, and {' and '.join(READ)} are read")


def convert(
    source: Source,
    folder: Path,
    wanted: Wanted,
    carry: Callable[[Path], None],
    progress: Progress = lambda what, count: None,
    zeroed: Callable[[str, int], None] = lambda name, count: None,
) -> dict[str, int]:
    """Write `source` into `folder`, which is there when it is whole: read back, and every tensor found to be what was written.

    `carry` is given the folder of the weights before that, to put there what belongs to a model besides. `zeroed` is told of
    each tensor in which numbers became 0, too small for their new type: its name, and how many. Returns each tensor's checksum.

    Raises:
        CheckpointError: `folder` is there already, the format cannot hold this model, a tensor is damaged.
    """
    with beside(folder, source.path) as part:
        weights = part if wanted.to in BARE else part / RELEASE
        weights.mkdir(exist_ok=True)
        target = make_target(source, weights, wanted)
        sums = copy(source, target, lambda count: progress("writing", count), wanted.allow_nan, zeroed)
        written = open_source(recognise(weights), target.model, fused_layout=wanted.fused_layout)
        compare(written, sums, lambda count: progress("checking", count))
        write_manifest(weights, source, target, wanted, sums)
        carry(weights)
        if wanted.to == "pai" and source.model.family == "llama":  # its tools look there for the model and the tokenizer
            config, files = _huggingface(source, wanted)
            hf.write_json(part / "config.json", config)
            for name, path in files.items():
                shutil.copy2(path, part / name)
        if weights != part:
            (part / TRACKER).write_text(RELEASE, encoding="utf-8")
    return sums


def make_target(source: Source, weights: Path, wanted: Wanted) -> Target:
    """The target that writes `source` as `wanted` into the folder `weights`."""
    types = dtypes(source, DTYPES[wanted.dtype] if wanted.dtype else None, wanted.to)
    if source.model.quantize and wanted.to not in QUANTIZED:
        raise CheckpointError(f"{wanted.to} has no weights in {source.model.quantize}: {' and '.join(QUANTIZED)} have")
    if wanted.to == "torch_dist":
        return torch_dist.TorchDist(weights, source.model, types, rows(source.model, wanted))
    if wanted.to in dialects.FORMATS:
        stages = wanted.stages or even(source.model.num_layers, wanted.pipeline)
        return RankFiles(weights, source.model, types, _dialect(wanted), wanted.tensor, stages)
    if wanted.to not in WRITTEN:
        raise CheckpointError(f"{wanted.to} cannot be written, {' and '.join(WRITTEN)} can")
    config, beside = _huggingface(source, wanted)
    if wanted.to == "hf":
        return hf.HuggingFace(weights, source.model, types, config, beside)
    if wanted.fused_layout is None:
        raise CheckpointError("how query, key and value lie in MindSpore's files is not said: --fused-layout separate, concat or grouped")
    return mindspore.MindSpore(weights, source.model, types, wanted.tensor, wanted.fused_layout, config, beside)


def rows(model: Model, wanted: Wanted) -> int:
    """Rows of the vocabulary's tables as they are written, padding included."""
    if wanted.to in dialects.FORMATS:
        return _dialect(wanted).rows(model.vocab_size, wanted.tensor)
    return padded(model.vocab_size, dialects.VOCABULARY_MULTIPLE) if wanted.to == "torch_dist" else model.vocab_size


def _dialect(wanted: Wanted) -> Dialect:
    if wanted.to == "torch":
        return dialects.core(wanted.transformer_impl)
    return dialects.yuan() if wanted.to == "yuan" else dialects.pai(wanted.pai_release)


def _huggingface(source: Source, wanted: Wanted) -> tuple[dict[str, Any], dict[str, Path]]:
    """The config.json that goes with the weights, and the other files of the model and its tokenizer."""
    beside = {path.name: path for path in (*source.companions, *(hf.companions(wanted.hf_config) if wanted.hf_config else ()))}
    base = beside.pop("config.json", None)
    given = None if base is None else hf.read_config(base.parent)
    config = (wanted.config or {} if given is None else {}) | hf.config_for(replace(source.model, quantize=None), given, str(base))
    return config, beside


def dtypes(source: Source, dtype: torch.dtype | None, to: str = "") -> dict[str, torch.dtype]:
    """The type that each tensor of a source is to have: `dtype` where one is given, else its own.

    Quantized weights stay as they are; their scales are fp16 for MindSpore, as its operators want them.
    """
    found = {tensor.name: source.dtype(tensor.name) for tensor in source.tensors}
    for name, own in found.items():
        if name.endswith(SCALE):
            found[name] = torch.float16 if to == "mindspore" else torch.float32
        elif own.is_floating_point:
            found[name] = dtype or own
    return found


def nbytes(source: Source, types: Mapping[str, torch.dtype]) -> int:
    """Bytes of all tensors of a source in `types`."""
    return sum(torch.Size(tensor.shape).numel() * types[tensor.name].itemsize for tensor in source.tensors)


@contextmanager
def beside(folder: Path, source: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name, `folder`, when all went well; what a dead conversion left is removed.

    Raises:
        CheckpointError: `folder` is there already and holds something, is or lies in `source` or the reverse, or another
            conversion writes it.
    """
    part, fix = folder.with_name(folder.name + ".part") if folder.name else folder, "give another target"
    if folder.name in ("", "..") or folder.is_symlink():
        kind = "a link" if folder.is_symlink() else "no name"
        raise CheckpointError(f"{folder} is {kind}: what is converted gets a folder of its own", fix)
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is there already", fix + ", or move that away")
    whence, to, by = source.resolve(), folder.resolve(), part.resolve()
    if whence in (to, *to.parents) or to in whence.parents or by in (whence, *whence.parents):
        raise CheckpointError(f"{source} is what is read, and it would be written into: {folder} is written as {part} first", fix)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        _begin(part, source)
        try:
            yield part
            (part / _MARK).unlink()
            flush(part)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        part.rename(folder)
        flush_one(folder.parent)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    try:
        lock = Lock(folder.with_name(folder.name + ".lock"))
    except DataError as error:
        raise CheckpointError(f"{folder}: {error.what}", "wait for it, or give another target") from error
    try:
        yield
    finally:
        lock.release()


def _begin(part: Path, source: Path) -> None:
    """An empty folder that bears our mark. One without it, of whatever name, is nobody's to remove."""
    if part.is_symlink() or part.exists():
        if part.is_symlink() or not part.is_dir() or any(part.iterdir()) and not (part / _MARK).is_file():
            raise CheckpointError(f"{part} is in the way, and no conversion left it", "move it away, or give another target")
        shutil.rmtree(part)
    part.mkdir()
    (part / _MARK).write_text(f"pid {os.getpid()}\nsource {source}\n", encoding="utf-8")


def copy(
    source: Source,
    target: Target,
    progress: Callable[[int], None] = lambda count: None,
    allow_nan: bool = False,
    zeroed: Callable[[str, int], None] = lambda name, count: None,
) -> dict[str, int]:
    """Write every tensor of `source` into `target`, and end it; `zeroed` as in `convert`. Returns each one's checksum, as written.

    Raises:
        CheckpointError: a tensor holds NaN or infinity (unless `allow_nan`), would not fit its new type, or is not what the
            conversion that made `source` wrote.
    """
    sums: dict[str, int] = {}
    told = _told(source)
    with ThreadPoolExecutor(1) as beside:  # zlib lets go of Python's lock: checksums cost no time while there is writing
        for tensor in target.order():
            found = source.read(tensor.name)
            whole = _as(found, target.dtypes[tensor.name], tensor.name, allow_nan)
            if whole.dtype != found.dtype and (count := int(found.count_nonzero() - whole.count_nonzero())):
                zeroed(tensor.name, count)
            if tensor.name in sums:
                raise ValueError(f"{tensor.name} was asked for twice")
            its_sum = beside.submit(checksum, whole)
            before = its_sum if whole is found or tensor.name not in told else beside.submit(checksum, found)
            del found  # else one more tensor is in memory while the next is read
            target.put(tensor, whole)
            sums[tensor.name] = its_sum.result()
            if tensor.name in told and told[tensor.name] != f"{before.result():08x}":
                what = f"{source.path}: {tensor.name} is not what {MANIFEST} there says that was written"
                raise CheckpointError(what, f"convert anew what it was made of; if it was changed on purpose, move {MANIFEST} elsewhere")
            progress(whole.nbytes)
    if left := {tensor.name for tensor in source.tensors} - sums.keys():
        raise ValueError(f"not asked for: {sorted(left)}")
    target.finish()
    return sums


def _told(source: Source) -> dict[str, str]:
    """The checksums that the conversion which made `source` wrote beside it, of the tensors that are read as it wrote them:
    neither quantized since nor of another vocabulary."""
    tensors = manifest(source.path).get("tensors")
    found: dict[str, str] = {}
    for tensor in source.tensors if isinstance(tensors, dict) else ():
        said, dtype = tensors.get(tensor.name), source.dtype(tensor.name)
        if isinstance(said, dict) and (said.get("shape"), said.get("dtype")) == (list(tensor.shape), NAMES.get(dtype, str(dtype))):
            found[tensor.name] = said.get("crc32", "")
    return found


def _as(whole: torch.Tensor, dtype: torch.dtype, name: str, allow_nan: bool) -> torch.Tensor:
    finite = _finite(whole)
    if not finite and not allow_nan:
        raise CheckpointError(f"{name} holds NaN or infinity; --allow-nan converts it as it is", "--allow-nan, or an older checkpoint")
    cast = whole.to(dtype)
    if cast.dtype != whole.dtype and finite and not _finite(cast):
        raise CheckpointError(f"{name} holds numbers up to {whole.abs().max().item():.3g}, which {NAMES[dtype]} cannot", "--dtype bf16 or fp32")
    if name.endswith(SCALE) and not cast.all():
        raise CheckpointError(f"{name} holds numbers below {whole.min().item():.3g}, which are 0 in {NAMES[dtype]}")
    return cast


def _finite(tensor: torch.Tensor) -> bool:
    """One pass without a copy: NaN spreads to the extremes."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes in C order. It finds accidents; sha256 would take longer than copying."""
    return zlib.crc32(raw(tensor))


def compare(source: Source, sums: Mapping[str, int], progress: Callable[[int], None] = lambda count: None) -> None:
    """Read a written checkpoint back, and hold every tensor to the checksum it was written with.

    Raises:
        CheckpointError: tensors differ, which are named: the disk or the memory is at fault.
    """
    def found(tensor: Tensor) -> tuple[str, int]:
        whole = source.read(tensor.name)
        progress(whole.nbytes)
        return tensor.name, checksum(whole)

    backwards = source.tensors[::-1]  # what was written last is still in the system's cache
    with ThreadPoolExecutor(2) as readers:  # so two tensors are in memory
        wrong = [name for name, its_sum in readers.map(found, backwards) if its_sum != sums[name]]
    if wrong:
        raise CheckpointError(f"{source.path}: {', '.join(wrong[:8])} read back otherwise than written", "see to the disk and the memory there, and start again")


def write_manifest(folder: Path, source: Source, target: Target, wanted: Wanted, sums: Mapping[str, int]) -> None:
    """Say in conversion.json what became of what: the source, every tensor's shape, type and checksum, and what was left out."""
    manifest: dict[str, Any] = {
        "source": str(source.path),
        "from": source.format,
        "to": wanted.to,
        "fused_layout": wanted.fused_layout,
        "model": vars(target.model),
        "errors": getattr(source, "errors", {}),
        "left_out": source.left_out,
        "tensors": {
            tensor.name: {
                "shape": list(tensor.shape),
                "dtype": NAMES.get(target.dtypes[tensor.name], str(target.dtypes[tensor.name])),
                "crc32": f"{sums[tensor.name]:08x}",
            }
            for tensor in target.order()
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
