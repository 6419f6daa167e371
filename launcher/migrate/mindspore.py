"""ckpt_convert.sh and kin: weights for MindSpore on Ascend."""

from __future__ import annotations

import re

from launcher.errors import UserError
from launcher.migrate.command import Call
from launcher.migrate.convert import conversion
from launcher.migrate.pai_parts import ARCHITECTURE, SHAPE, SIZES
from launcher.migrate.positional import WHOLE
from launcher.migrate.result import Line, Migration

OPTIONS = {
    "-f": "--function", "-p": "--precision", "-w": "--world_size", "-y": "--yaml_path", "-d": "--dataset",
    "-dp": "--dataset_path",
    "-ts": "--train_strategy", "-is": "--infer_strategy", "-sc": "--src_ckpt_path", "-dc": "--dst_ckpt_path",
    "-pp": "--pipeline_parallel", "-tm": "--transfer_mode",
}  # fmt: skip
HEADS = (32, 40, 64)  # of 7B, 13B and 70B
FUNCTIONS = ("distributed_weight_transfer", "pt_to_ms", "train_to_infer", "quant_weight")
MODEL = re.compile(r"llama-?2[-_](7|13|70)b", re.I)
DTYPES = {"fp16": "fp16", "bf16": "bf16", "fp32": "fp32", "w8a16": "fp16"}


def mindspore(call: Call) -> Migration:
    """ckpt_convert.sh, ckpt_convert_for_16p.sh and ckpt_convert_n_to_m.sh: weights for MindSpore on Ascend."""
    given = _options(call)
    function = given.get("--function", "distributed_weight_transfer")
    if function not in FUNCTIONS:
        raise UserError(f"-f {function}: there is no such function", call.place, "functions: " + ", ".join(FUNCTIONS))
    for needed in ("--world_size", "--src_ckpt_path"):
        if not given.get(needed):
            short = next(short for short, long in OPTIONS.items() if long == needed)
            raise UserError(f"{short} ({needed}) is not given", call.place, f"add {short} VALUE")
    width, source = given["--world_size"], given["--src_ckpt_path"].rstrip("/")
    if not WHOLE.fits(width):
        raise UserError(f"-w (--world_size) is {width!r}, and must be a whole number above 0", call.place, "2, 4, 8 or 16")
    if all(heads % int(width) for heads in HEADS):
        what = f"-w (--world_size) is {width}, and the attention heads of no Llama-2 ({', '.join(map(str, HEADS))}) can be shared so"
        raise UserError(what, call.place, "2, 4, 8 or 16")
    fused = "qkv" in f"{source} {given.get('--yaml_path', '')}"
    target = given.get("--dst_ckpt_path", "").rstrip("/")
    folder = f"{target or f'../ckpt/llama2_7b/qkv/{width}_llama-2-7b'}/fp16_{width}p{'_qkv' if fused else ''}"
    lines = [_line(name, value, fused, folder, width) for name, value in given.items()]
    if not target:
        lines.append(
            Line("fixed", "--dst_ckpt_path", "", {"convert.target": folder}, note="the simplified script's own folder")
        )
    lines += _model(call, given, function)
    layout = {"convert.fused_layout": "concat" if fused else "separate"}
    trap = (
        "the script undoes the fusion in equal thirds, which is wrong with fewer key/value heads (70B), and its errors go to "
    )
    trap += "./log while it prints 'Convert finish!'. yuan needs neither NPU nor a compiled model, and stops at a fault"
    became = {"convert.to": "mindspore", "convert.pipeline_model_parallel_size": 1} | layout
    lines.append(
        Line(
            "fixed",
            "layout",
            "qkv" if fused else "",
            became,
            "told by `qkv` in the paths" if fused else "no `qkv` in the paths",
            trap,
        )
    )
    return conversion(
        call, lines, f"mindspore_to_{width}p", f"{call.basename}: {function}", f"Weights for MindSpore on {width} devices"
    )


def _model(call: Call, given: dict[str, str], function: str) -> list[Line]:
    """What the weights are of: MindSpore's files do not say it, the names of files do."""
    if function == "pt_to_ms":  # Hugging Face's folder says it
        return []
    size = MODEL.search(f"{given.get('--yaml_path', '')} {given['--src_ckpt_path']} {given.get('--dst_ckpt_path', '')}")
    if size is None and call.basename != "ckpt_convert_n_to_m.sh":
        lost = "MindSpore's files do not say what the model is, and no name here does: fill in convert.hf_config, a folder with its config.json"
        return [Line("fixed", "model", "", lost=lost)]
    named = f"{size[1] if size else 7}B"
    became = {"model.family": "llama"} | {f"model.{key}": value for key, value in zip(SHAPE, SIZES[named])}
    became |= {"model.max_position_embeddings": 4096} | ARCHITECTURE
    return [Line("fixed", "model", f"Llama-2 {named}", became, "told by the paths" if size else "the simplified script's own")]


def _options(call: Call) -> dict[str, str]:
    given, words = {}, list(call.arguments)
    while words:
        name = words.pop(0)
        name = OPTIONS.get(name, name)
        if name not in OPTIONS.values():
            raise UserError(
                f"{name!r} is no option of {call.basename}",
                call.place,
                "options: " + ", ".join(f"{a} ({b})" for a, b in OPTIONS.items()),
            )
        if not words or words[0] in OPTIONS:
            raise UserError(f"{name} has no value", call.place, f"write {name} VALUE")
        given[name] = words.pop(0)
    return given


def _line(name: str, value: str, fused: bool, folder: str, width: str) -> Line:
    line = Line("option", name, value)
    if name == "--src_ckpt_path":
        line.became = {"convert.source": value.rstrip("/")}
    elif name == "--dst_ckpt_path":
        line.became, line.note = {"convert.target": folder}, "the folder that the script writes below it"
    elif name == "--world_size":
        line.became = {"convert.tensor_model_parallel_size": int(width)}
    elif name == "--precision":
        ours = DTYPES.get(value)
        line.became = {"convert.dtype": ours} if ours else {}
        line.lost = "" if ours else f"the precision {value} is missing: {', '.join(DTYPES)}; activations in int8 want data and an NPU"
    elif name == "--function":
        line.note = "source and target say it"
        if value == "train_to_infer":
            line.note = "no strategy file: stages and copies of a training are told by the tensors that its ranks hold"
        if value == "quant_weight":
            line.became, line.note = {"convert.quantize": "int8"}, "w8a16: weights alone, for which no data are needed"
    elif name == "--pipeline_parallel":
        line.note = "the source's own stages are found out"
    elif name in ("--dataset", "--dataset_path"):
        line.note = "dropped: rounding weights to nearest needs no data"
    else:
        line.note = "dropped: no model is compiled, so no configuration and no strategy file is needed"
    return line
