"""Several .bin/.idx pairs into one, byte for byte what one run over all of their input makes, in bounded memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from data_tools.errors import IndexedError
from data_tools.indexed import IndexedReader, IndexedWriter, bin_path

_SHARD = re.compile(r"(?P<stem>.+)_(?P<index>\d{5})-of-(?P<number>\d{5})(?P<key>_.+)?")
_SHARED = ("tokenizer", "append_eod", "json_keys")  # of the manifests: what one run has only one of
_OWN = ("documents", "tokens", "shard", "part_bytes", "input_sha256", "inputs")  # what each keeps of its own


def find_pairs(given: Sequence[str | Path]) -> list[str]:
    """The prefixes meant: prefixes and names of .bin or .idx as they are, in the order given; folders and patterns by name.

    Raises:
        IndexedError: nothing is there, one is given twice, or one of several shards is missing.
    """
    found = expand(given)
    seen: dict[Path, str] = {}
    for prefix in found:
        if (path := Path(prefix).resolve()) in seen:
            raise IndexedError(f"{prefix} is given twice", "", "name each data set once; to read one more often, blend: data.data_path")
        seen[path] = prefix
    _check_shards(found)
    return found


def expand(given: Sequence[str | Path]) -> list[str]:
    """The prefixes meant, without a look at whether they belong together."""
    return [prefix for one in given for prefix in _expand(str(one))]


def _expand(given: str) -> list[str]:
    path = Path(given)
    if path.is_dir():
        found = sorted(path.glob("*.idx"))
    elif any(sign in given for sign in "*?["):
        pattern = re.sub(r"\.(bin|idx)$", "", given) + ".idx"
        found = sorted(Path(path.anchor).glob(str(Path(pattern).relative_to(path.anchor)) if path.anchor else pattern))
    else:
        return [re.sub(r"\.(bin|idx)$", "", given)]
    if not found:
        raise IndexedError(f"no data set there: {given}", "", "give prefixes, or a folder or a pattern of .idx files")
    return [str(one.with_suffix("")) for one in found]


def _check_shards(prefixes: Sequence[str]) -> None:
    """All shards of a set are there, once and in order: what is left out silently is data lost."""
    sets: dict[tuple[str, str, int], list[int]] = {}
    for prefix in prefixes:
        if match := _SHARD.fullmatch(str(prefix)):
            sets.setdefault((match["stem"], match["key"] or "", int(match["number"])), []).append(int(match["index"]))
    for (stem, key, number), indices in sets.items():
        missing = [i for i in range(number) if i not in indices]
        if missing:
            names = ", ".join(f"{stem}_{i:05d}-of-{number:05d}{key}" for i in missing[:4]) + (" and others" if len(missing) > 4 else "")
            fix = f"make {'it' if len(missing) == 1 else 'them'} with yuan preprocess --shard {missing[0]}/{number}, or give all shards"
            raise IndexedError(f"{len(missing)} of {number} shards missing: {names}", "", fix)
        if indices != sorted(indices):
            raise IndexedError(f"the shards of {stem}{key} are not in order: {indices[:8]}", "", "give them by number, or the pattern of all")


def merge(
    prefixes: Sequence[str | Path], output: str | Path, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Write the documents of all pairs, one pair after the other, to the pair `output`; its manifest joins theirs.

    Args:
        prefixes: as `find_pairs` gives them.
        progress: called after every pair with the bytes of tokens written and those that there are.

    Returns:
        `documents`, `tokens`, and the rest of the new manifest.

    Raises:
        IndexedError: a pair is torn, or they do not belong together: another dtype, tokenizer or ending, the same input.
    """
    output = Path(re.sub(r"\.(bin|idx)$", "", str(output)))
    if output.resolve() in {Path(prefix).resolve() for prefix in prefixes}:
        raise IndexedError(f"{output} is one of those to merge", "--output", "give the result a name of its own")
    total = 0
    manifests: list[dict[str, Any] | None] = []
    for prefix in prefixes:  # opened one at a time, here and below: thousands of shards would be too many open files
        reader = IndexedReader(prefix)
        if reader.multimodal:
            raise IndexedError(f"{prefix} is multimodal: its sequences have modes, which would be lost", "", "merge it with Megatron-LM")
        dtype = reader.dtype if not manifests else dtype
        if reader.dtype != dtype:
            what = f"{prefixes[0]} holds {dtype} and {prefix} {reader.dtype}: they were made with different tokenizers"
            raise IndexedError(what, str(prefix), "make them with one tokenizer; data sets that differ are blended, not merged: data.data_path")
        manifests.append(reader.description)
        if manifests[0] and reader.description and manifests[0].get("inputs") == reader.description.get("inputs"):
            reader.description["inputs"] = manifests[0].get("inputs")  # one list in memory, not one per shard
        total += reader.tokens * dtype.itemsize
    _check_alike([str(prefix) for prefix in prefixes], manifests)
    output.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(output, dtype) as writer:
        for prefix in prefixes:
            with open(bin_path(prefix), "rb") as tokens:
                writer.add_stream(tokens, IndexedReader(prefix).pieces())
            if progress:
                progress(writer.tokens * dtype.itemsize, total)
        joined = _join([str(prefix) for prefix in prefixes], manifests) | {"documents": writer.documents, "tokens": writer.tokens}
        writer.finish(joined)
    return joined


def _check_alike(prefixes: Sequence[str], manifests: Sequence[dict[str, Any] | None]) -> None:
    """What the manifests tell; of pairs of other tools nothing is known."""
    told = [(prefix, manifest) for prefix, manifest in zip(prefixes, manifests) if manifest]
    inputs: dict[str, str] = {}
    for prefix, manifest in told:
        for key in _SHARED:
            first, here = told[0][1].get(key), manifest.get(key)
            if first != here:
                what = f"{told[0][0]} and {prefix} were made differently: {key} {_brief(first)} and {_brief(here)}"
                raise IndexedError(what, f"{prefix}.json", "make them alike; data sets that differ are blended, not merged: data.data_path")
        for part in _parts(manifest):
            same = json.dumps([part.get(key) for key in ("input_sha256", "shard", "part_bytes")])
            if part.get("input_sha256") and same in inputs:
                what = f"{inputs[same]} and {prefix} were made of the same text"
                raise IndexedError(what, f"{prefix}.json", "leave one out; to read one more often, blend: data.data_path")
            inputs[same] = prefix
    _check_inputs_alike(told)


def _check_inputs_alike(told: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Shards of a set are shares of one input: of one that grew meanwhile some lines would be in none, or in two."""
    first: dict[tuple[str, str, str], tuple[str, list[Any]]] = {}
    for prefix, manifest in told:
        if (match := _SHARD.fullmatch(prefix)) and "inputs" in manifest:
            sizes = [(Path(one["path"]).name, one["size"]) for one in manifest["inputs"]]
            other, wanted = first.setdefault((match["stem"], match["key"] or "", match["number"]), (prefix, sizes))
            if sizes != wanted:
                name, here, there = next(((a or b)[0], a and a[1], b and b[1]) for a, b in zip_longest(sizes, wanted) if a != b)
                what = f"{other} and {prefix} are shares of inputs that differ: {name} of {there or 'no'} and {here or 'no'} bytes"
                raise IndexedError(what, f"{prefix}.json", "make the shards again, all of one input")


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value.get('type')} of {value.get('vocab_size')} ids, {str(value.get('sha256'))[:8]}"
    return json.dumps(value)


def _parts(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """What a manifest was made of: itself, or what was merged into it."""
    if "merged" in manifest:
        return [{"inputs": manifest.get("inputs"), **part} for part in manifest["merged"]]
    return [{key: manifest[key] for key in _OWN if key in manifest}]


def _join(prefixes: Sequence[str], manifests: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """One manifest. What is not known of one is not told of all."""
    known = [manifest for manifest in manifests if manifest]
    if len(known) < len(manifests):
        return {"merged_from": [Path(prefix).name for prefix in prefixes]}
    joined: dict[str, Any] = {}
    for key, together in (("largest_id", max), ("blank_lines", sum), ("bad_lines", sum), ("input_bytes", sum)):
        if all(isinstance(manifest.get(key), int) for manifest in known):
            joined[key] = together(manifest[key] for manifest in known)
    joined["first_bad_lines"] = [line for manifest in known for line in manifest.get("first_bad_lines", [])][:5]
    joined |= {key: known[0][key] for key in (*_SHARED, "tokenizer_arguments") if key in known[0]}
    parts = [
        {"name": Path(prefix).name} | part for prefix, manifest in zip(prefixes, known) for part in _parts(manifest)
    ]
    if all(part.get("inputs") == parts[0].get("inputs") for part in parts):  # shards of one input: said once
        joined["inputs"] = parts[0].get("inputs")
        for part in parts:
            part.pop("inputs", None)
    return joined | {"merged": parts}
