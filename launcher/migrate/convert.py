"""Scripts that convert checkpoints: Pai-Megatron-Patch's and Yuan 2.0's."""

from __future__ import annotations

import re
from typing import Any

from launcher.errors import UserError
from launcher.migrate.command import UNKNOWN, Call
from launcher.migrate.pai_orders import KINDS
from launcher.migrate.positional import COUNT, PATH, SWITCH, WHOLE, one_of, order, read
from launcher.migrate.result import Line, Migration

MODELS = one_of("llama-7b", "llama-13b", "llama-30b", "llama-65b", "llama2-7b", "llama2-13b", "llama2-70b", "codellama-7b",
                "codellama-13b", "codellama-34b")  # fmt: skip
CONVERTER_KINDS = KINDS | {
    "MN": MODELS, "mg2hf": SWITCH, "SOURCE_CKPT_PATH": PATH, "TARGET_CKPT_PATH": PATH, "HG_CKPT_PATH": PATH,
    "MODEL_SIZE": one_of("7B", "8B", "13B", "70B"),
    **dict.fromkeys(("NUM_EXPERTS", "EXPERTS_TOPK", "EP", "NUM_EXPERT_SPLITS"), COUNT),
}  # fmt: skip
CONVERTER = [
    order(
        "Pai-Megatron-Patch", "MEGATRON_PATH SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP MN EXTRA_VOCAB_SIZE mg2hf", CONVERTER_KINDS
    )
]
MCORE = "MODEL_SIZE HG_CKPT_PATH MEGATRON_PATH SOURCE_CKPT_PATH TARGET_CKPT_PATH TP PP EXTRA_VOCAB_SIZE NUM_EXPERTS "
MCORE += "EXPERTS_TOPK EP "
MCORE_CONVERTER = [
    order("its documentation", MCORE + "mg2hf", CONVERTER_KINDS),
    order("its repository", MCORE + "NUM_EXPERT_SPLITS mg2hf", CONVERTER_KINDS),
]
YUAN_SIZES = {"2.1B": (1, 1), "51B": (16, 4), "102B": (32, 8)}  # pipeline stages as released, tensor ranks for answers


def conversion(call: Call, lines: list[Line], name: str, origin: str, what: str) -> Migration:
    """A migration to `yuan convert`."""
    source = Migration("convert", name, "", "", "", lines).values.get("convert.source", "the source")
    return Migration("convert", name, what, origin, call.text, lines, str(source))


def pai(call: Call) -> Migration:
    """model_convertor.sh and hf2megatron_convertor.sh: 8 arguments."""
    used, words = read(call, CONVERTER)
    back = words["mg2hf"][1] == "true"
    lines = [_direction(name, place, value, back) for name, (place, value) in words.items()]
    lines += [_other(name, place, value, words) for name, (place, value) in words.items()]
    lines = sorted((line for line in lines if line), key=lambda line: int(line.place))
    what = "From Pai-Megatron-Patch's format to Hugging Face's" if back else "From Hugging Face's format into one to train from"
    name = f"pai_{words['MN'][1].replace('-', '_')}_to_{'hf' if back else 'megatron'}"
    return conversion(call, lines, name, f"{call.basename}: {len(words)} arguments in the order of {used.release}", what)


def _direction(name: str, place: int, value: str, back: bool) -> Line | None:
    """Source, target and which way."""
    path = value.rstrip("/")
    if name == "SOURCE_CKPT_PATH":
        trap = "the script wants the release/ or iter_ folder itself, and looks for the configuration above it" if back else ""
        return Line(str(place), name, value, {"convert.source": path}, trap=trap)
    if name == "TARGET_CKPT_PATH":
        trap = "the script copies tokenizer and configuration before the folder is there, and goes on without them"
        return Line(str(place), name, value, {"convert.target": path}, trap=trap)
    if name != "mg2hf":
        return None
    if back:
        trap = "the script writes RMSNorm's epsilon as 1e-6 (Llama-2: 1e-5) and no rope_theta"
        return Line(str(place), name, value, {"convert.to": "hf", "convert.dtype": "fp16"}, "Megatron to Hugging Face", trap)
    trap = "the script writes fp16 whatever the source is, which cuts bf16's range. As before: convert.dtype=fp16"
    note = "Hugging Face to Megatron's own format, which loads at any TP and PP; the script's own format: convert.to=pai"
    return Line(str(place), name, value, {"convert.to": "torch_dist"}, note, trap)


def _other(name: str, place: int, value: str, words: dict[str, tuple[int, str]]) -> Line | None:
    if name in ("TP", "PP"):
        key = {"TP": "convert.tensor_model_parallel_size", "PP": "convert.pipeline_model_parallel_size"}[name]
        return Line(str(place), name, value, {key: int(value)}, "for formats that have ranks")
    if name == "MEGATRON_PATH":
        return Line(str(place), name, value, note="dropped: nothing of Megatron-LM is needed")
    if name == "HG_CKPT_PATH":
        return Line(str(place), name, value, {"convert.hf_config": value.rstrip("/")})
    if name in ("MN", "MODEL_SIZE"):
        trap = (
            "llama-13b and llama-30b look for shards numbered 00000, which the published folders do not have"
            if value in ("llama-13b", "llama-30b")
            else ""
        )
        return Line(str(place), name, value, note="dropped: the shapes are read from the source", trap=trap)
    if name == "EXTRA_VOCAB_SIZE":
        lost = (
            "rows for new tokens are not added on the way: a training pads the vocabulary by model.make_vocab_size_divisible_by"
        )
        return Line(str(place), name, value, note="" if int(value) else "nothing is added", lost=lost if int(value) else "")
    if name in ("NUM_EXPERTS", "EXPERTS_TOPK", "EP", "NUM_EXPERT_SPLITS"):
        dense = int(words["NUM_EXPERTS"][1]) == 0
        lost = "" if dense or name != "NUM_EXPERTS" else "mixtures of experts are missing"
        return Line(str(place), name, value, note="" if lost else "dropped: of experts, and there are none", lost=lost)
    return None


def pai_mcore(call: Call) -> Migration:
    """hf2mcore_convertor.sh: 12 arguments in its documentation, 13 in its repository."""
    used, words = read(call, MCORE_CONVERTER)
    back = words["mg2hf"][1] == "true"
    lines = [
        _direction(name, place, value, back) or _other(name, place, value, words) for name, (place, value) in words.items()
    ]
    found = [line for line in lines if line]
    if used.release == "its documentation":
        found[
            -1
        ].trap = "the script takes 13 arguments: with these 12 it always converts from Hugging Face, whatever mg2hf says"
    size = words["MODEL_SIZE"][1]
    if size == "70B":
        line = next(one for one in found if one.name == "MODEL_SIZE")
        line.trap = "the script takes Llama-3's vocabulary and rope_theta for 70B; yuan reads both from the source"
    what = "To Hugging Face's format" if back else "From Hugging Face's format into one to train from"
    origin = f"{call.basename}: {len(words)} arguments in the order of {used.release}"
    return conversion(call, found, f"pai_llama_{size.lower()}_mcore_to_{'hf' if back else 'megatron'}", origin, what)


def yuan(call: Call) -> Migration:
    """Yuan 2.0's ckpt_partitions_51B.sh and ckpt_partitions_102B.sh, with their variables."""
    size = re.search(r"(2\.1B|51B|102B)", call.basename).group(1)
    stages, ranks = YUAN_SIZES[size]
    lines, missing = [], []
    for name, key in (("LOAD_CHECKPOINT_PATH", "convert.source"), ("SAVE_CHECKPOINT_PATH", "convert.target")):
        value = call.variables.get(name, "")
        if not value or UNKNOWN.search(value):
            missing.append(name)
        lines.append(Line("variable", name, value, {key: value.rstrip("/")}))
    if missing:
        raise UserError(f"{' and '.join(missing)} of {call.basename} have no value", call.place,
                        f"{missing[0]}=PATH before the command, or fill it in in the script")  # fmt: skip
    middle = call.variables.get("SAVE_SPLITED_CHECKPOINT_PATH", "")
    lines.append(Line("variable", "SAVE_SPLITED_CHECKPOINT_PATH", middle, note="dropped: there are no files in between"))
    lines.append(
        Line(
            "variable",
            "TOKENIZER_MODEL_PATH",
            call.variables.get("TOKENIZER_MODEL_PATH", ""),
            note="dropped: weights have no need of it",
        )
    )
    became: dict[str, Any] = {
        "convert.to": "yuan",
        "convert.tensor_model_parallel_size": ranks,
        "convert.pipeline_model_parallel_size": 1,
    }
    trap = "the scripts build the model on the way: some 100 GiB of memory, and a GPU. yuan moves one tensor at a time"
    lines.append(
        Line(
            "fixed",
            "layout",
            f"{stages}pp 1tp",
            became,
            f"to 1pp {ranks}tp; yuan serve answers at any layout from convert.to=torch_dist",
            trap,
        )
    )
    return conversion(call, lines, f"yuan2_{size.lower()}_to_{ranks}tp", f"{call.basename}: its variables",
                      f"Yuan 2.0 {size}, from {stages} stages to {ranks} tensor-parallel ranks")  # fmt: skip


YUAN_TOOL_KEYS = {
    "--load": "convert.source", "--save": "convert.target",
    "--target-tensor-model-parallel-size": "convert.tensor_model_parallel_size",
    "--target-pipeline-model-parallel-size": "convert.pipeline_model_parallel_size",
}  # fmt: skip
PARTS_OF_A_TOOL = ("--pipeline-generate-layer", "--tensor-generate-layer")
YUAN_TOOL_TRAPS = {
    "merge_tp_partitions.py": "the tool joins gate and up in the wrong order: the result loads, and is wrong",
    "convert_hf.py": "the tool carries on where shapes do not match, and wants configuration and checkpoint in one folder",
}


def yuan_tool(call: Call, name: str) -> Migration:
    """Yuan 2.0's split_tp_partitions.py, merge_pp_partitions.py, merge_tp_partitions.py and convert_hf.py."""
    to = "hf" if call.basename == "convert_hf.py" else "yuan"
    lines, words = [], iter(call.arguments)
    given = {word: next(words, "") for word in words if word in YUAN_TOOL_KEYS or word in PARTS_OF_A_TOOL}
    for flag, value in given.items():
        key = YUAN_TOOL_KEYS.get(flag)
        if key is None:
            note = "dropped: it has the tool do some ranks alone; yuan does them all"
            lines.append(Line("flag", flag, value, note=note))
        elif flag in ("--load", "--save"):
            lost = f"{value} is set nowhere here: fill in {key}" if UNKNOWN.search(value) else ""
            lines.append(Line("flag", flag, value, {key: value.rstrip("/")}, lost=lost))
        elif WHOLE.fits(value):
            lines.append(Line("flag", flag, value, {key: int(value)}))
        else:
            raise UserError(f"{flag} must be a whole number above 0, not {value!r}", call.place, f"{flag} 8")
    for flag in ("--load", "--save"):
        if flag not in given:
            raise UserError(f"{flag} is not given", call.place, f"add {flag} FOLDER")
    note = "all other flags describe the model, which is read from the checkpoint"
    lines.append(Line("fixed", "format", to, {"convert.to": to}, note, YUAN_TOOL_TRAPS.get(call.basename, "")))
    name = name or call.basename.removesuffix(".py")
    return conversion(
        call, lines, name, f"{call.place}: {len(given)} flags that say what to do", f"A conversion as {name} did it"
    )
