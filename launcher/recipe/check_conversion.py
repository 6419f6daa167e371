"""Checks of a conversion: where from, where to, a layout that the model can take, and room on the disk."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from checkpoints.folder import CheckpointError
from checkpoints.recognise import QUANTIZED, Found, recognise
from launcher.recipe.check_run import existing
from launcher.recipe.pipeline import LayoutError, parse_layout
from launcher.recipe.problem import Case, Problem, nearest_divisors
from launcher.recipe.size import parameters

TP, PP = "convert.tensor_model_parallel_size", "convert.pipeline_model_parallel_size"
LAYOUT = "convert.pipeline_model_parallel_layout"
RANKS = {"torch_dist": (), "hf": (), "mindspore": (TP,)}  # what of a layout a format has; the others have both
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, None: 4}  # unknown: at most fp32


def places(case: Case) -> Iterator[Problem]:
    """The source holds a checkpoint; the target is free, apart from the source, and on a disk with room for it."""
    c = case.recipe.convert
    for key in ("convert.source", "convert.target"):
        if not case.value(key):
            yield Problem(f"{key} is not given", "no recipe and no word of the command line gives it", f"{key}=FOLDER")
    found = None
    if c.source:
        try:
            found = recognise(Path(c.source))
        except CheckpointError as error:
            yield Problem(str(error), case.at("convert.source"), "convert.source=the folder of a checkpoint, or of a run")
    if c.target:
        yield from _target(case, Path(c.target))
    yield from _fused(case)
    if c.quantize and c.to not in QUANTIZED:
        what = f"{c.to} has no weights in {c.quantize}"
        yield Problem(what, case.at("convert.to", "convert.quantize"), f"convert.to={' or '.join(QUANTIZED)}, or convert.quantize=null")
    if found:
        yield from _room(case, found)
    if c.hf_config is not None and not (Path(c.hf_config) / "config.json").is_file():
        fix = "convert.hf_config=the folder of a Hugging Face model, or null"
        yield Problem(f"no config.json in {c.hf_config}", case.at("convert.hf_config"), fix)


def _target(case: Case, target: Path) -> Iterator[Problem]:
    if target.is_dir() and any(target.iterdir()) or target.is_file():
        yield Problem(f"{target} is there already", case.at("convert.target"), "give another convert.target, or move that away")
    if not case.recipe.convert.source:
        return
    source = Path(case.recipe.convert.source).resolve()
    if target.resolve() == source or source in target.resolve().parents or target.resolve() in source.parents:
        yield Problem(
            "source and target lie one in the other",
            case.at("convert.source", "convert.target"),
            f"convert.target={str(case.recipe.convert.source).rstrip('/')}-converted",
        )


def _fused(case: Case) -> Iterator[Problem]:
    if case.recipe.convert.to == "mindspore" and case.recipe.convert.fused_layout is None:
        yield Problem(
            "how query, key and value lie in MindSpore's files is not said, and the files do not say it",
            case.at("convert.fused_layout"),
            "convert.fused_layout=separate (wq, wk, wv), concat (w_qkv, MindFormers to 1.3) or grouped (w_qkv, from 1.5)",
        )


def _room(case: Case, found: Found) -> Iterator[Problem]:
    """Weights alone are written: no more than the source holds, nor than the model has in the target's precision.

    Of files per rank each holds Yuan's filter whole, 2 h² numbers a layer.
    """
    c, m, needed = case.recipe.convert, case.recipe.model, found.size
    with contextlib.suppress(TypeError):  # a size of the model is not given: the source has its own recipe
        size = parameters(case.recipe)
        needed = min(needed, size * _BYTES[c.dtype])
        if m.family == "yuan2" and TP in RANKS.get(c.to, (TP, PP)):
            needed += needed * (c.tensor_model_parallel_size - 1) * 2 * m.hidden_size**2 * m.num_layers // size
    if not c.target:
        return
    there = existing(Path(c.target))
    free = shutil.disk_usage(there).free
    if free < needed:
        yield Problem(
            f"the converted checkpoint takes {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free in {there}",
            case.at("convert.target"),
            "make room, or give a convert.target on another disk",
        )


def layout(case: Case) -> Iterator[Problem]:
    """Ranks that the format has, and that the model can be cut into."""
    c = case.recipe.convert
    for key in (TP, PP, LAYOUT):
        if key not in RANKS.get(c.to, (TP, PP, LAYOUT)) and case.value(key) not in (1, None):
            fix = f"{key}={'null' if key == LAYOUT else 1}, or convert.to=torch"
            yield Problem(f"{c.to} is no format of so many ranks", case.at("convert.to", key), fix)
    if c.tensor_model_parallel_size < 1 or c.pipeline_model_parallel_size < 1:
        return  # refused by `ranges`
    yield from _tensor(case, c.tensor_model_parallel_size)
    if case.recipe.model.num_layers:
        yield from _stages(case, case.recipe.model.num_layers, c.pipeline_model_parallel_size)


def _tensor(case: Case, tp: int) -> Iterator[Problem]:
    m, padded = case.recipe.model, case.recipe.derived.padded_vocab_size
    sizes = {"model.num_attention_heads": m.num_attention_heads, "model.ffn_hidden_size": m.ffn_hidden_size}
    if m.num_query_groups and m.num_query_groups > tp:  # fewer groups than ranks: each rank gets a copy, if TP is a multiple
        sizes["model.num_query_groups"] = m.num_query_groups
    elif m.num_query_groups and tp % m.num_query_groups:
        yield Problem(
            f"num_query_groups {m.num_query_groups} is neither a multiple nor a divisor of TP {tp}",
            case.at("model.num_query_groups", TP),
            f"{TP}={m.num_query_groups}",
        )
    if case.recipe.convert.to in ("yuan", "pai"):  # the others pad it, or leave it whole, where TP asks for that
        sizes["derived.padded_vocab_size"] = padded
    for key, size in sizes.items():
        if size and size % tp:
            yield Problem(f"{key} {size} cannot be cut into TP {tp} parts", case.at(key, TP), f"{TP}={nearest_divisors(size, tp)}")


def _stages(case: Case, layers: int, pp: int) -> Iterator[Problem]:
    text = case.recipe.convert.pipeline_model_parallel_layout
    if text is None:
        if layers % pp:
            yield Problem(
                f"{layers} layers cannot be shared out over {pp} pipeline stages evenly",
                case.at("model.num_layers", PP),
                f"{PP}={nearest_divisors(layers, pp)}, or {LAYOUT}",
            )
        return
    try:
        stages = parse_layout(text)
    except LayoutError as error:
        yield Problem(str(error), case.at(LAYOUT), "such as 'Et*3|t*3L': E embedding, t layer, L loss, | between stages")
        return
    flat = "".join(stages)
    if len(stages) != pp:
        yield Problem(f"the layout has {len(stages)} stages, not PP {pp}", case.at(LAYOUT, PP), f"{PP}={len(stages)}")
    if flat != "E" + "t" * layers + "L":
        yield Problem(
            f"the layout places {flat.count('t')} layers between E and L, and the model has {layers}",
            case.at(LAYOUT, "model.num_layers"),
            f"one E first, {layers} times t, one L last",
        )
