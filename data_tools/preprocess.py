"""Text into Megatron's indexed datasets, one per key, documents in input order whatever the workers.

The input is cut into parts. A worker writes a part's tokens into a file of its own in `<output_prefix>.unfinished/`; this
process moves them in order into one file there, the .bin to be. A run that was stopped continues from the parts that are whole.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.encode import BAD_SHOWN, BlockEncoder, Counts, Part, PartFiles, too_many_bad
from data_tools.errors import InputError
from data_tools.indexed import IndexedWriter, NotMovedError
from data_tools.lock import Lock
from data_tools.parallel import ordered_map
from data_tools.records import JSON_FORMATS
from data_tools.sources import Block, Format, Source, blocks, find_sources
from data_tools.tokenizers import Tokenizer

_SMALLEST_PART, _LARGEST_PART = 1 << 21, 1 << 24
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_PARTS = 64  # of a small input, so that the workers end together


def dataset_prefix(output_prefix: str | Path, key: str) -> str:
    """Megatron-LM's name for the output of one key, without .bin or .idx."""
    return f"{output_prefix}_{key}_document"


def sharded_prefix(output_prefix: str | Path, shard: tuple[int, int]) -> str:
    """The output prefix of the i-th of n shares, named so that sorting by name keeps their order."""
    return str(output_prefix) if shard == (0, 1) else f"{output_prefix}_{shard[0]:05d}-of-{shard[1]:05d}"


def preprocess(
    input: str | Path | Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    workers: int = 1,
    format: Format | None = None,
    max_bad: int = 0,
    shard: tuple[int, int] = (0, 1),
    part_bytes: int | None = None,
    progress: Callable[[list[Counts]], None] | None = None,
) -> dict[str, Counts]:
    """Tokenize `input` into `<output_prefix>_<key>_document.bin` and `.idx` for every key (a share: `sharded_prefix`).

    Beside each pair goes a .json, its manifest (`IndexedReader.description`): what made it, out of what. The files
    appear when all is done and replace older ones; a run that ends early leaves the older ones alone.

    Args:
        input: files, folders or patterns (see `sources.find_sources`).
        append_eod: end every document that has tokens with the end-of-document id.
        workers: processes; with 1 all is done in this one.
        format: what lies in the files; otherwise told by their names and first bytes.
        max_bad: how many lines may be left out because they cannot be read.
        shard: (i, n): only the i-th of n equal shares of the input, from 0; `merge` joins them.
        part_bytes: input per part; otherwise chosen by the size of the input.
        progress: called after every part with the counts so far, one per key.

    Returns:
        The counts of each key.

    Raises:
        DataError: bad input (the first bad line, whatever the workers), or a dead worker.
    """
    keys = tuple(json_keys)
    if not keys or len(set(keys)) < len(keys):
        raise InputError(f"each key once, and at least one, not {list(keys)}", "preprocess.json_keys", "--json-keys text")
    sources = find_sources(input, format)
    bare = next((source for source in sources if source.format not in JSON_FORMATS), None)
    if bare and len(keys) > 1:
        raise InputError(f"a line of {bare.format} is one text, and has no {' and '.join(keys)}", bare.path, "one key, which names the output")
    encoder = BlockEncoder(tokenizer, keys, append_eod, max_bad)
    return encode_files(encoder, sources, output_prefix, workers, shard=shard, part_bytes=part_bytes, progress=progress)


def encode_files(
    encoder: BlockEncoder,
    sources: Sequence[Source],
    output_prefix: str | Path,
    workers: int = 1,
    *,
    shard: tuple[int, int] = (0, 1),
    part_bytes: int | None = None,
    progress: Callable[[list[Counts]], None] | None = None,
) -> dict[str, Counts]:
    """What `preprocess` does, with another encoder too: a pair for each of its keys. Arguments and errors as there."""
    output_prefix = sharded_prefix(output_prefix, shard)
    size = part_bytes or max(_SMALLEST_PART, min(_LARGEST_PART, sum(source.size for source in sources) // _PARTS))
    Path(output_prefix).parent.mkdir(parents=True, exist_ok=True)
    encoder = replace(encoder, folder=f"{output_prefix}.unfinished")
    plan = {**encoder.plan(), "shard": list(shard), "part_bytes": size, "inputs": [asdict(source) for source in sources]}
    encoder.tokenizer.engine  # built once, before the workers are forked
    with ExitStack() as stack:
        stack.callback(Lock(Path(f"{output_prefix}.lock")).release)  # of the folder, which runs of other keys would share
        try:
            return _encode_and_join(encoder, sources, output_prefix, workers, plan, progress)
        except NotMovedError:  # behind a part of other text than the earlier run's
            shutil.rmtree(encoder.folder)
            return _encode_and_join(encoder, sources, output_prefix, workers, plan, progress)


def _encode_and_join(
    encoder: BlockEncoder,
    sources: Sequence[Source],
    output_prefix: str,
    workers: int,
    plan: dict[str, Any],
    progress: Callable[[list[Counts]], None] | None,
) -> dict[str, Counts]:
    keys, folder = encoder.keys, Path(encoder.folder)
    counts, parts = {key: Counts() for key in keys}, hashlib.sha256()
    bad: list[tuple[str, str, str]] = []
    with ExitStack() as stack:
        _open_folder(folder, plan)
        stack.callback(_remove_if_empty, folder)
        joined = [folder / f"joined.{i}.bin" for i in range(len(keys))]
        _forget_lost(folder, encoder.dtypes, joined)
        outputs = zip((dataset_prefix(output_prefix, key) for key in keys), encoder.dtypes, joined, strict=True)
        writers = [stack.enter_context(IndexedWriter(*output)) for output in outputs]
        cut = chain.from_iterable(blocks(source, plan["part_bytes"], keys, start, end) for source, start, end in shares(sources, plan["shard"]))
        for part in stack.enter_context(closing(_encode_all(encoder, enumerate(cut), workers))):
            _join(part, folder, writers)
            parts.update(part.input_sha256.encode())
            for total, done in zip(counts.values(), part.counts, strict=True):
                total.add(done)
            bad += part.bad_lines[: BAD_SHOWN - len(bad)]
            if counts[keys[0]].bad > encoder.max_bad:
                raise too_many_bad(encoder.max_bad, bad)
            if progress:
                progress(list(counts.values()))
        if not all(total.tokens for total in counts.values()):
            shutil.rmtree(folder)
            raise _empty(counts, sources[0].path, plan["shard"])
        for writer in writers:  # all of them before any appears: what a kill loses is begun anew
            writer.flush()
        for writer, total in zip(writers, counts.values(), strict=True):
            writer.appear(_manifest(encoder.tokenizer, plan, total, parts.hexdigest(), bad))
        shutil.rmtree(folder)
    return counts


def shares(sources: Sequence[Source], shard: Sequence[int]) -> Iterator[tuple[Source, int, int]]:
    """The (source, start, end) in bytes of the i-th of n equal shares; what has to be read as a whole belongs to the
    share in which it begins."""
    index, number = shard
    total, before = sum(source.size for source in sources), 0
    low, high = total * index // number, total * (index + 1) // number
    for source in sources:
        start, end = max(low - before, 0), min(high - before, source.size)
        if source.is_seekable and start < end:
            yield source, start, end
        elif not source.is_seekable and low <= before < high:
            yield source, 0, source.size
        before += source.size


def _open_folder(folder: Path, plan: dict[str, object]) -> None:
    """The folder of unfinished work for this plan; another plan's is removed."""
    note = folder / "plan.json"
    text = json.dumps(plan, indent=1)
    if folder.is_dir() and (not note.is_file() or note.read_text(encoding="utf-8") != text):
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    note.write_text(text, encoding="utf-8")


def _forget_lost(folder: Path, dtypes: Sequence[np.dtype], joined: Sequence[Path]) -> None:
    """Parts whose tokens had been moved and may not be there: all, where this machine was started anew since, whose disk may not
    have had them."""
    note, here = folder / "machine", [platform.node(), _BOOT.read_text().strip() if _BOOT.is_file() else ""]
    host, _, boot = note.read_text(encoding="utf-8").partition(" ") if note.is_file() else (here[0], "", here[1])
    lost = host == here[0] and boot != here[1]
    sizes, ends = [path.stat().st_size if path.is_file() and not lost else 0 for path in joined], [0] * len(joined)
    for number in count():
        files = PartFiles(folder, number)
        if (part := files.read(dtypes)) is None:
            break
        ends = [end + one.tokens * dtype.itemsize for end, one, dtype in zip(ends, part.counts, dtypes, strict=True)]
        if any(size < end and not files.tokens(i).is_file() for i, (size, end) in enumerate(zip(sizes, ends, strict=True))):
            files.begin()
    note.write_text(" ".join(here), encoding="utf-8")


def _remove_if_empty(folder: Path) -> None:
    """Nothing is kept of a run in which no part became whole."""
    if folder.is_dir() and not any(path.suffix == ".json" and path.name != "plan.json" for path in folder.iterdir()):
        shutil.rmtree(folder)


def _encode_all(encode: BlockEncoder, items: Iterator[tuple[int, Block]], workers: int) -> Generator[Part, None, None]:
    yield from map(encode, items) if workers == 1 else ordered_map(encode, items, workers)


def _join(part: Part, folder: Path, writers: list[IndexedWriter]) -> None:
    files = PartFiles(folder, part.number)
    for i, writer in enumerate(writers):
        writer.move_file(files.tokens(i), *files.read_sizes(i, part.counts[i].documents))


def _empty(counts: dict[str, Counts], path: str, shard: Sequence[int]) -> InputError:
    """megatron-core cannot read a dataset without tokens (it maps an empty file into memory)."""
    key, count = next((key, count) for key, count in counts.items() if not count.tokens)
    what = f"{count.documents} documents and no text under {key!r}" if count.documents else "no documents"
    if shard[1] > 1:
        return InputError(f"{what} in share {shard[0]} of {shard[1]}", path, "fewer shards")
    return InputError(what, path, 'each line is an object such as {"text": "..."}')


def _manifest(tokenizer: Tokenizer, plan: dict[str, object], count: Counts, inputs_hash: str, bad: list[tuple[str, str, str]]) -> dict[str, object]:  # fmt: skip
    return {
        "documents": count.documents,
        "tokens": count.tokens,
        "largest_id": count.largest_id,
        "blank_lines": count.blank,
        "bad_lines": count.bad,
        "first_bad_lines": [f"{place}: {what}" for place, what, _ in bad],
        "input_bytes": count.bytes,
        "input_sha256": inputs_hash,  # of the sha256 of each part, in hex, one after another
        "encoded_by": tokenizer.engine,
        "tokenizer_arguments": {**{name: str(path) for name, path in tokenizer.files.items()}, **tokenizer.options},
        **plan,
    }
