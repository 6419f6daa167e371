"""From one format into another: tensor by tensor, each exactly once, with a checksum of each on both sides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from isal.isal_zlib import crc32

from checkpoints.adapters import find_base, read_note
from checkpoints.files.stored import DTYPES, NAMES  # noqa: F401  for others, as are some more of these names
from checkpoints.folder import MANIFEST, RELEASE, TRACKER, CheckpointError, flush, holds_weights_alone, name_of
from checkpoints.formats import hf, mindspore, rank_files, torch_dist
from checkpoints.formats.base import Source, Target
from checkpoints.lora import Merged
from checkpoints.models import megatron
from checkpoints.models.gpt import SCALE
from checkpoints.models.mindformers import Fused
from checkpoints.models.model import Model
from checkpoints.parallel import Copying, compare, spread
from checkpoints.part import WHOLE, Busy, Damaged, Part, Shard, Stopped, Tell, expect_free, fingerprint
from checkpoints.recognise import Found, recognise
from checkpoints.wanted import BARE, READ, Wanted, dtypes, huggingface, make_target, nbytes, rows  # noqa: F401

_WORTHWHILE = 1 << 30  # bytes: fewer are read back sooner than processes start, 3 s for torch in each
Progress = Callable[[str, int], None]  # called with what is done ("kept", "writing", "checking") and the bytes since the last call


def open_source(
    found: Found, model: Model | None = None, vocab_size: int | None = None, fused_layout: Fused | None = None, hf_config: Path | None = None,
    states: bool = False,
) -> Source:  # fmt: skip
    """The checkpoint that `recognise` found; adapters are merged into the weights that they stand beside.

    Args:
        model: what it is a model of, where something beside the weights says it; else what they carry themselves.
        vocab_size: ids before padding, for formats that do not say.
        fused_layout: how MindSpore's fused matrices lie, where nothing beside them says it.
        hf_config: a Hugging Face folder with the model's config.json, for files per rank that do not say what they are.
        states: the optimizer's tensors too, with all rows of the vocabulary, and where the training stands.

    Raises:
        CheckpointError: it is damaged, its format is not read, or something is not said that nobody should guess.
    """
    source = _opened(found, model, vocab_size, fused_layout, hf_config, states)
    megatron.expect_plain(source.training, str(found.path))
    config = hf_config / "config.json" if hf_config else None
    source.reading = {
        "source_fused_layout": fused_layout, "hf_config": crc32(config.read_bytes()) if config and config.is_file() else None
    }  # fmt: skip
    return source


def _opened(
    found: Found, model: Model | None, vocab_size: int | None, fused_layout: Fused | None, hf_config: Path | None, states: bool
) -> Source:  # fmt: skip
    if states and (found.format not in ("torch_dist", "torch") or holds_weights_alone(found.path)):
        raise CheckpointError(f"{found.path} holds weights alone, no optimizer's state", "leave out --optimizer")
    if note := read_note(found.path):
        if states:
            raise CheckpointError(f"{found.path} holds adapters: the optimizer's state of these is not carried", "leave out --optimizer")
        frozen = recognise(find_base(found.path, note))
        return Merged(open_source(frozen, model, vocab_size, fused_layout, hf_config), found.path, note)
    if found.format == "hf":
        return hf.open_source(found.path)
    if found.format == "torch_dist":
        if model is None:
            model = megatron.model_with_ids(vars(torch_dist.settings(found.path)), f"{found.path}/common.pt", vocab_size)
        return torch_dist.open_source(found.path, model, states)
    if found.format == "mindspore":
        return mindspore.open_source(found.path, model, fused_layout, hf_config)
    if found.format == "torch":
        return rank_files.open_source(found.path, found.tensor, found.pipeline, model, vocab_size, hf_config, states)
    raise CheckpointError(
        f"{found.path} is in the format {found.format}, and {' and '.join(READ)} are read",
        "save it in one of these with the program that wrote it",
    )


def convert(
    source: Source,
    folder: Path,
    wanted: Wanted,
    carry: Callable[[Path], None],
    progress: Progress = lambda what, count: None,
    zeroed: Callable[[str, int], None] = lambda name, count: None,
    *,
    workers: int = 1,
    shard: Shard = WHOLE,
    reopen: Callable[[], Source] | None = None,
    tell: Tell = lambda what, text: None,
) -> dict[str, int] | None:
    """Write `source` into `folder`, which is there when it is whole: read back, and every tensor found to be what was written.

    Args:
        carry: is given the folder of the weights before that, to put there what belongs to a model besides.
        zeroed: is told of each tensor in which numbers became 0, too small for their new type: its name, and how many.
        workers: processes, with `reopen`, which can be pickled and gives the source in each.
        shard: (i, n): write only the i-th of n shares of the tensors, from 0; the last one to finish does the rest.
        tell: is told what was found of an earlier conversion.

    Returns:
        Each tensor's checksum; None where other shares are still to be written.

    Raises:
        CheckpointError: `folder` is there already, the format cannot hold this model, a tensor is damaged.
        Stopped: there is no room, or a worker died; as after any interruption the same call goes on with what was written.
    """
    expect_free(folder, source.folders)
    part = Part(folder, shard)
    weights = part.checkpoint if wanted.to in BARE else part.checkpoint / _name(source)
    target = make_target(source, weights, wanted)
    if {tensor.name for tensor in target.order()} != {tensor.name for tensor in source.tensors}:
        raise ValueError(f"the tensors of {source.model} are not those of {target.model}")
    if workers > 1 and reopen is None:
        raise ValueError("several workers each open the source: reopen is wanted")
    make = partial(Copying, source, target, wanted.allow_nan) if workers == 1 else partial(_copying, reopen, weights, wanted)
    plan = _plan(source, target, wanted)
    with part.begun(plan, tell):
        try:
            _write(part, target, make, workers, progress, tell)
        except Stopped:  # whoever reads a file that gets shorter is killed by the system: a worker died, and it was not for want of memory
            _expect_unchanged(part, source, plan["source"])
            raise
        _expect_unchanged(part, source, plan["source"])
        if shard == WHOLE:
            return _end(part, source, target, wanted, carry, progress, zeroed, workers)
    return _end_of_shares(part, lambda: _end(part, source, target, wanted, carry, progress, zeroed, workers), tell, len(target.order()))


def _name(source: Source) -> str:
    return RELEASE if source.state is None else name_of(source.state.iteration)


def _copying(reopen: Callable[[], Source], weights: Path, wanted: Wanted) -> Copying:
    source = reopen()
    return Copying(source, make_target(source, weights, wanted), wanted.allow_nan)


def _plan(source: Source, target: Target, wanted: Wanted) -> dict[str, dict[str, Any]]:
    """What makes the tensors in the files what they are: where any of it is another, nothing written is gone on with."""
    options = {key: value for key, value in asdict(wanted).items() if key not in ("hf_config", "config")}
    return {
        "source": fingerprint(source.folders, source.companions),
        "options": options
        | source.reading
        | {f"{group}.{key}": value for group, model in (("source", source.model), ("model", target.model)) for key, value in vars(model).items()},
        "files": dict(target.files.sizes),
    }


def _expect_unchanged(part: Part, source: Source, then: Mapping[str, Any]) -> None:
    """What was read is one checkpoint, and not the half of one and the half of another."""
    now = fingerprint(source.folders, source.companions)
    if changed := [name for name in {**then, **now} if then.get(name) != now.get(name)]:
        part.forget_own()
        what = f"{source.path} was changed while it was read: {changed[0]}" + (f" and {len(changed) - 1} more" if len(changed) > 1 else "")
        raise CheckpointError(what, "when nobody writes it any more, the same command again")


def _write(part: Part, target: Target, make: Callable[[], Copying], workers: int, progress: Progress, tell: Tell) -> None:
    """Write the share's tensors that are not written yet."""
    sizes = {tensor.name: torch.Size(tensor.shape).numel() * target.dtypes[tensor.name].itemsize for tensor in target.order()}
    done = part.written()
    if done and (gone := target.files.absent()):
        if part.shard != WHOLE:
            raise CheckpointError(f"{part.checkpoint} has lost {gone[0]}, which was being written", f"stop the other shares, and remove {part.path}")
        tell("anew", f"{gone[0]} was being written, and is gone")
        part.forget()
        done = {}
    if done:
        tell("kept", f"{len(done):,} of {len(sizes):,} tensors, {sum(sizes[name] for name in done) / 1e6:,.1f} MB, which are written already")
    _expect_room(part, target)
    target.files.create()
    flush(part.path)
    share = _share(target, sizes, part.shard)
    progress("kept", sum(sizes[name] for names in share for name in names if name in done))
    journal = part.journal(target.files.paths())
    groups = spread(make, [names for names in share if any(name not in done for name in names)], workers)
    with closing(groups):  # workers that write stop before anything is removed
        for group in groups:
            for one in group:
                journal.note(asdict(one))
                progress("writing", sizes[one.name] if one.name not in done else 0)
    journal.flush()  # while it is read back


def _share(target: Target, sizes: Mapping[str, int], shard: Shard) -> list[tuple[str, ...]]:
    """The i-th of n shares of about as many bytes, in the target's order: names, those together that are made of one another."""
    groups: list[tuple[str, ...]] = []
    for tensor in target.order():
        together = tensor.within.endswith(SCALE)  # made with the weight before it
        groups.append((*groups.pop(), tensor.name) if together else (tensor.name,))
    (index, number), total, at, found = shard, sum(sizes.values()), 0, []
    for names in groups:
        if total * index <= at * number < total * (index + 1):
            found.append(names)
        at += sum(sizes[name] for name in names)
    return found


def _expect_room(part: Part, target: Target) -> None:
    needed, free = target.files.missing(), shutil.disk_usage(part.path).free
    if needed > free:
        whole = sum(target.files.sizes.values())
        what = f"{part.folder} takes {whole / 1e9:,.1f} GB, {needed / 1e9:,.1f} of them are still to be written, and {free / 1e9:,.1f} are free there"
        raise Stopped(what, "make room, or give a target on another disk")


def _end_of_shares(part: Part, end: Callable[[], dict[str, int]], tell: Tell, count: int) -> dict[str, int] | None:
    """Whoever finds that all shares are written ends the conversion, alone."""
    try:
        with part.alone(seconds=10):
            written = len(part.written())
            if written == count and part.checkpoint.is_dir():
                with part.kept_if_stopped():
                    return end()
            if part.checkpoint.is_dir():
                text = f"{written:,} of {count:,} tensors are written; the share that ends last, or this command again, ends the conversion"
            else:
                text = "the process of another one has ended the conversion"
    except Busy:
        text = "all are written; the process of another one reads them back and ends the conversion"
    tell("shares", text)
    return None


def _end(
    part: Part, source: Source, target: Target, wanted: Wanted, carry: Callable[[Path], None], progress: Progress,
    zeroed: Callable[[str, int], None], workers: int,
) -> dict[str, int]:  # fmt: skip
    """All tensors are written: write the rest, read everything back, and give the folder its name."""
    written = part.written()
    if missing := [tensor.name for tensor in target.order() if tensor.name not in written]:
        raise ValueError(f"not written: {', '.join(missing[:8])}")
    sums = {tensor.name: written[tensor.name]["crc32"] for tensor in target.order()}
    for name in (name for name in sums if written[name]["zeroed"]):
        zeroed(name, written[name]["zeroed"])
    if hasattr(source, "errors"):
        source.errors = {name: written[name]["error"] for name in sums if written[name]["error"] is not None}
    weights = target.files.folder
    part.tidy(target.files.paths())
    target.finish()
    several = workers if sum(target.files.sizes.values()) > _WORTHWHILE else 1
    try:
        compare(partial(_reopened, weights, target.model, wanted), sums, lambda count: progress("checking", count), several)
    except Damaged as error:
        part.forget(error.names)
        raise
    source.left_out |= target.state.left_out if target.state else {}
    write_manifest(weights, source, target, wanted, sums)
    carry(weights)
    if wanted.to == "pai" and source.model.family == "llama":  # its tools look there for the model and the tokenizer
        config, files = huggingface(source, wanted)
        hf.write_json(part.checkpoint / "config.json", config)
        for name, path in files.items():
            shutil.copy2(path, part.checkpoint / name)
    if weights != part.checkpoint:
        (part.checkpoint / TRACKER).write_text(RELEASE if source.state is None else str(source.state.iteration), encoding="utf-8")
    part.commit()
    return sums


def _reopened(weights: Path, model: Model, wanted: Wanted) -> Source:
    return open_source(recognise(weights), model, fused_layout=wanted.fused_layout, states=wanted.states)


def write_manifest(folder: Path, source: Source, target: Target, wanted: Wanted, sums: Mapping[str, int]) -> None:
    """Say in conversion.json what became of what: the source, every tensor's shape, type and checksum, and what was left out."""
    manifest: dict[str, Any] = {
        "source": str(source.path),
        "from": source.format,
        "to": wanted.to,
        "fused_layout": wanted.fused_layout,
        "model": vars(source.model),
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
