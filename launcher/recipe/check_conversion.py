"""Checks of a conversion: where from, where to, a layout that the model can take, and room on the disk."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path

from checkpoints.adapters import find_bases
from checkpoints.beside import beside
from checkpoints.folder import CheckpointError, holds_weights_alone
from checkpoints.models.gpt import tensors
from checkpoints.recognise import QUANTIZED, Found, recognise
from launcher.console import human_size
from launcher.errors import UserError
from launcher.recipe.check_data import parse_shard
from launcher.recipe.check_run import existing
from launcher.recipe.converted import model_of
from launcher.recipe.frozen import own_recipe
from launcher.recipe.pipeline import LayoutError, parse_layout
from launcher.recipe.problem import Case, Problem, nearest_divisors

TP, PP = "convert.tensor_model_parallel_size", "convert.pipeline_model_parallel_size"
LAYOUT, VIRTUAL = "convert.pipeline_model_parallel_layout", "convert.num_layers_per_virtual_pipeline_stage"
OPTIMIZER, TRAINED = "convert.optimizer", ("torch_dist", "torch")  # formats that hold a training, too
RANKS = {"torch_dist": (), "hf": (), "mindspore": (TP,)}  # what of a layout a format has; the others have both
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def places(case: Case) -> Iterator[Problem]:
    """The source holds a checkpoint; the target is free, apart from the source, and on a disk with room for it."""
    c = case.recipe.convert
    for key in ("convert.source", "convert.target"):
        if not case.value(key):
            yield Problem(f"{key} is not given", "no recipe and no word of the command line gives it", f"{key}=FOLDER")
    found, frozen = None, []
    if c.source:
        try:
            found = recognise(Path(c.source))
            if frozen := find_bases(found.path):
                found = recognise(frozen[-1])  # what is written is as large as the weights
        except CheckpointError as error:
            yield Problem(str(error), case.at("convert.source"), error.fix or "convert.source=the folder of a checkpoint, or of a run")
    if c.target:
        yield from _target(case, Path(c.target), [*([Path(c.source)] if c.source else []), *frozen])
    yield from _fused(case)
    if c.quantize and c.to not in QUANTIZED:
        what = f"{c.to} has no weights in {c.quantize}"
        yield Problem(what, case.at("convert.to", "convert.quantize"), f"convert.to={' or '.join(QUANTIZED)}, or convert.quantize=null")
    try:
        parse_shard(c.shard)
    except ValueError as error:
        yield Problem(str(error), case.at("convert.shard"), "such as convert.shard=0/4 for the first of four")
    yield from _training(case, found)
    if found:
        yield from _room(case, found)
    if c.hf_config is not None and not (Path(c.hf_config) / "config.json").is_file():
        fix = "convert.hf_config=the folder of a Hugging Face model, or null"
        yield Problem(f"no config.json in {c.hf_config}", case.at("convert.hf_config"), fix)


def _target(case: Case, target: Path, sources: Iterable[Path]) -> Iterator[Problem]:
    if target.is_dir() and any(target.iterdir()) or target.is_file():
        yield Problem(f"{target} is there already", case.at("convert.target"), "give another convert.target, or move that away")
    to = target.resolve()
    for source in sources:
        if to == (whence := source.resolve()) or whence in to.parents or to in whence.parents:
            yield Problem(
                "source and target lie one in the other" + (f": the adapters are of {source}" if str(source) != case.recipe.convert.source else ""),
                case.at("convert.source", "convert.target"),
                f"convert.target={str(case.recipe.convert.source).rstrip('/')}-converted",
            )
            return


def _fused(case: Case) -> Iterator[Problem]:
    if case.recipe.convert.to == "mindspore" and case.recipe.convert.fused_layout is None:
        yield Problem(
            "how query, key and value lie in MindSpore's files is not said, and the files do not say it",
            case.at("convert.fused_layout"),
            "convert.fused_layout=separate (wq, wk, wv), concat (w_qkv, MindFormers to 1.3) or grouped (w_qkv, from 1.5)",
        )


def _training(case: Case, found: Found | None) -> Iterator[Problem]:
    """The optimizer's state goes from a training's checkpoint into a format that holds it, as it is."""
    c = case.recipe.convert
    if c.optimizer == "none":
        return
    alone = f"{OPTIMIZER}=none, for the weights alone"
    if found and (found.format not in TRAINED or holds_weights_alone(found.path)):
        yield Problem(f"{found.path} holds weights alone, no optimizer's state", case.at("convert.source", OPTIMIZER), alone)
    if c.to not in TRAINED:
        yield Problem(f"{c.to} holds no optimizer's state", case.at("convert.to", OPTIMIZER), f"convert.to={' or '.join(TRAINED)}, or {alone}")
    for key in ("convert.dtype", "convert.quantize"):
        if case.value(key) is not None:
            yield Problem("a training goes along in the precision that it has", case.at(key, OPTIMIZER), f"{key}=null, or {alone}")


def _room(case: Case, found: Found) -> Iterator[Problem]:
    """The disk holds what will be written, as far as that is known without reading the weights; the conversion itself knows it to
    the byte."""
    target = case.recipe.convert.target
    needed = _bytes(case, found)
    if not target or needed is None:
        return
    there = existing(Path(target))
    begun = sum(path.stat().st_blocks * 512 for path in Path(f"{target}.part").rglob("*") if path.is_file())
    if (free := shutil.disk_usage(there).free + begun) < needed:
        yield Problem(
            f"the converted checkpoint takes {human_size(needed)}, and {human_size(free)} are free in {there}",
            case.at("convert.target"),
            "make room, or give a convert.target on another disk",
        )


def _bytes(case: Case, found: Found) -> int | None:
    """Of what will be written, at least: the model's numbers in the target's precision. Of files per rank each holds Yuan's
    filter whole, 2 h^2 numbers a layer. None where the model is told by the files of weights alone."""
    c = case.recipe.convert
    with contextlib.suppress(CheckpointError, UserError):
        own = own_recipe(found.path)
        said = beside(found, Path(c.hf_config) if c.hf_config else None)
        model = model_of(own) if own else said.model
        if model is None and case.recipe.model.num_layers and case.recipe.derived.vocab_size:
            model = model_of(case.recipe)
        if model is None:
            return None
        precision = c.dtype or (own.training.precision if own else said.precision)
        width = 1 if c.quantize or model.quantize and c.to in QUANTIZED else _BYTES.get(precision, 1)
        form = c.optimizer if c.optimizer != "keep" else "distributed" if own and own.parallel.use_distributed_optimizer else "plain"
        if form != "none":  # two moments, and fp32 weights, of which plain fp32 weights need no copy
            width += 8 if form == "plain" and precision == "fp32" else 12
        numbers = sum(prod(one.shape) for one in tensors(model))
        copies = c.tensor_model_parallel_size - 1 if TP in RANKS.get(c.to, (TP, PP)) and model.family == "yuan2" else 0
        return width * (numbers + copies * 2 * model.hidden_size**2 * model.num_layers)
    return None


def layout(case: Case) -> Iterator[Problem]:
    """Ranks that the format has, and that the model can be cut into."""
    c = case.recipe.convert
    for key in (TP, PP, LAYOUT, VIRTUAL):
        ranks = (TP, PP, LAYOUT, VIRTUAL) if c.to == "torch" else RANKS.get(c.to, (TP, PP, LAYOUT))
        if key not in ranks and case.value(key) not in (1, None):
            fix = f"{key}={'null' if key in (LAYOUT, VIRTUAL) else 1}, or convert.to=torch"
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
    each = case.recipe.convert.num_layers_per_virtual_pipeline_stage
    if each is not None and (text is not None or pp < 2 or layers % (each * pp) or layers == each * pp):
        what = f"{layers} layers are no several virtual stages of {each} layers on each of {pp} pipeline ranks"
        yield Problem(what, case.at(VIRTUAL, PP, LAYOUT), f"{VIRTUAL}=null, or PP x stages x layers of each = {layers}, without {LAYOUT}")
    if text is None:
        if each is None and layers % pp:
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
    if len(stages) % pp or len(stages) > pp and (pp == 1 or case.recipe.convert.to != "torch"):
        several = " or a multiple (interleaved) of it" if pp > 1 and case.recipe.convert.to == "torch" else ""
        yield Problem(f"the layout has {len(stages)} stages, not PP {pp}{several}", case.at(LAYOUT, PP), f"{PP}={len(stages)}")
    if flat != "E" + "t" * layers + "L":
        yield Problem(
            f"the layout places {flat.count('t')} layers between E and L, and the model has {layers}",
            case.at(LAYOUT, "model.num_layers"),
            f"one E first, {layers} times t, one L last",
        )
