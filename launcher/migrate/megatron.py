"""Megatron-LM's flags, and those of Yuan 2.0's fork, into recipe keys."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from launcher.errors import UserError, raise_all
from launcher.migrate import flags as table
from launcher.migrate.command import UNKNOWN, Call
from launcher.migrate.result import Line, Migration
from launcher.migrate.together import RULES, values_of
from launcher.recipe.keys import table as keys

# What a verb has a use for, of all that the flags say.
OF_SERVING = ("model.", "tokenizer.", "generate.", "serve.", "launch.", "training.precision", "training.seq_length",
              "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size",
              "parallel.distributed_timeout_minutes", "parallel.pipeline_model_parallel_layout")  # fmt: skip
NEEDED = ("preprocess.input", "data.data_path", "data.train_data_path", "data.train", "generate.load", "checkpoint.load",
          "tokenizer.vocab_file", "tokenizer.merge_file", "tokenizer.tokenizer_model")  # fmt: skip
USES = {"pretrain": ("",), "sft": ("",), "serve": OF_SERVING, "preprocess": ("tokenizer.", "preprocess.")}
SPECIAL = {
    "--group-query-attention", "--num-virtual-stages-per-pipeline-rank", "--pipeline-model-parallel-method",
    "--pipeline-model-parallel-blocks", "--flash-attn-drop", "--no-position-embedding", "--no-embedding-dropout",
    "--sft-stage", "--train-reset", "--accumulate-allreduce-grads-in-fp32",
}  # fmt: skip
YUAN_SERVERS = {  # layers, hidden size, heads, positions, tensor ranks, TOP_K
    "2.1B": (24, 2048, 32, 8192, 1, 5), "51B": (42, 8192, 64, 4096, 4, 1), "102B": (84, 8192, 64, 4096, 8, 1),
}  # fmt: skip


def pretrain(call: Call, name: str) -> Migration:
    """pretrain_gpt.py or pretrain_yuan.py with its flags."""
    lines = read_flags(call, "pretrain")
    name = name or _shape_name(call, lines)
    verb = "sft" if any(line.name == "--sft-stage" for line in lines) else "pretrain"
    title = f"{'Training' if verb == 'pretrain' else 'Fine-tuning'} as {name} did it"
    return Migration(verb, name, title, f"{call.place}: {len(lines)} flags", call.text, lines, _needs(lines))


def serve(call: Call, name: str) -> Migration:
    """tools/run_text_generation_server.py, of Megatron-LM and of Yuan 2.0, with its flags."""
    lines = read_flags(call, "serve")
    name = name or _shape_name(call, lines)
    values = values_of(lines)
    yuan = values.get("model.family") == "yuan2"
    if "serve.port" not in values:
        port = call.variables.get("PORT", "")
        became = {"serve.port": int(port) if port.isdigit() else 8900 if yuan else 5000}
        note = "" if port.isdigit() else "the old server's own"
        lines.append(Line("env" if port else "fixed", "PORT", port, became, note=note))
    trap = "the old server answers every machine that reaches it, without a password; yuan's answers this machine alone. "
    lines.append(Line("fixed", "host", "0.0.0.0", trap=trap + "As before: serve.host=0.0.0.0"))
    title = f"A server as {name} made it"
    return Migration("serve", name, title, f"{call.place}: {len(lines)} flags", call.text, lines, _needs(lines))


def yuan_server(call: Call, size: str) -> Migration:
    """Yuan 2.0's run_inference_server_*.sh where the script itself is not here: its variables are."""
    layers, hidden, heads, positions, ranks, top_k = YUAN_SERVERS[size]
    known = call.variables
    words = f"""--num-layers {layers} --hidden-size {hidden} --num-attention-heads {heads} --seq-length {positions}
        --max-position-embeddings {positions} --tensor-model-parallel-size {ranks} --pipeline-model-parallel-size 1 --use-lf-gate
        --position-embedding-type rope --norm-dtype RMSNorm --disable-bias-linear --swiglu --hidden-dropout 0
        --attention-dropout 0 --bf16 --tokenizer-type YuanTokenizer""".split()
    words += [
        "--top_k",
        known.get("TOP_K") or str(top_k),
        "--top_p",
        known.get("TOP_P") or "0.0",
        "--temperature",
        known.get("TEMP") or "1",
    ]
    words += ["--load", known.get("CHECKPOINT_PATH") or "$CHECKPOINT_PATH"]
    words += ["--tokenizer-model-path", known.get("TOKENIZER_MODEL_PATH") or "$TOKENIZER_MODEL_PATH"]
    launcher = [Line("torchrun", "--nproc_per_node", str(ranks), {"launch.nproc_per_node": ranks})]
    full = Call(call.program, words, {"PORT": "8000"} | known, launcher, call.text, call.line)
    return serve(full, f"yuan2_{size.lower()}_serve")


def preprocess(call: Call, name: str) -> Migration:
    """tools/preprocess_data.py with its flags."""
    lines = read_flags(call, "preprocess")
    name = name or _shape_name(call, lines)
    gone = [line.name for line in lines if line.name in ("--dataset-impl", "--chunk-size")]
    if gone:
        text = f"{' and '.join(gone)} left preprocess_data.py in 2023: releases since then refuse the command. Not needed here"
        next(line for line in lines if line.name == gone[0]).trap = text
    title = f"Text to token ids as {name} made them"
    return Migration("preprocess", name, title, f"{call.place}: {len(lines)} flags", call.text, lines, _needs(lines))


def read_flags(call: Call, verb: str) -> list[Line]:
    """Every flag as a line; what they mean together is settled at the end.

    Raises:
        UserError: all values that their flags cannot have.
    """
    faults: list[UserError] = []
    lines = list(call.launcher)
    for number, (name, words) in enumerate(_split(call, verb), 1):
        try:
            lines.append(_one(str(number), name, words, verb) if name.startswith("--") else _unknown(str(number), name, words))
        except UserError as error:
            faults.append(UserError(error.what, call.place, error.fix))
    raise_all(faults)
    for rule in RULES:
        try:
            rule(lines, verb)
        except UserError as error:
            raise UserError(error.what, call.place, error.fix) from None
    uses = USES[verb]
    for line in lines:
        useless = [key for key in line.became if not key.startswith(uses)]
        if useless:
            line.became = {key: value for key, value in line.became.items() if key not in useless}
            line.note = line.note or f"dropped: of no use to yuan {verb}"
    return lines


def _split(call: Call, verb: str) -> list[tuple[str, list[str]]]:
    """Each flag with its words; a variable that nothing sets, where no flag wants a value, stands alone."""
    found: list[tuple[str, list[str]]] = []
    for word in call.arguments:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            found.append((name, [value] if equals else []))
        elif word.lstrip('"').startswith(("$", "`")) and not (found and _wants_more(*found[-1], verb)):
            found.append((word, []))
        elif found:
            found[-1][1].append(word)
        else:
            raise UserError(
                f"{word!r} stands before the first flag", call.place, "flags begin with --, such as --num-layers 24"
            )
    return found


def _wants_more(name: str, words: list[str], verb: str) -> bool:
    """Whether a flag takes another word: one value; of a list the first, and a prefix after each weight."""
    name = table.SPELLINGS.get(name, name)
    flag = table.tool_flags(verb).get(name)
    if not name.startswith("--") or name in table.MEANS or (flag and flag.kind == "on"):
        return False
    return not words or bool(flag and flag.kind == "list" and isinstance(_number(words[-1]), (int, float)))


def _unknown(place: str, word: str, words: list[str]) -> Line:
    """A variable that nothing sets; `words` follow it without a flag of their own, and may be a value of what it holds."""
    if word.strip('"') in ("$@", "$*") and not words:
        return Line(place, word, "", note="dropped: no arguments are given")
    return Line(place, word, " ".join(words), lost="nothing here sets it: the flags that it stands for are missing")


def _one(place: str, written: str, words: list[str], verb: str) -> Line:
    known = table.tool_flags(verb)
    name = written if written in known else table.SPELLINGS.get(written, written)
    line = Line(place, written, " ".join(words))
    if written != name:
        line.note = f"today's name: {name}"
    if name in table.MEANS:
        _no_words(line, words)
        line.became = dict(table.MEANS[name])
    elif name in known:
        _valued(line, known[name], words)
    elif name == "--flash-attn-drop":
        _typed(line, "model.attention_dropout", line.value)  # what becomes of it is settled with --use-flash-attn
    elif name in SPECIAL or table.HARMLESS_VALUES.get(name) == _plain(words):
        line.note = line.note or "changes nothing at this value" if name not in SPECIAL else line.note
    elif why := table.why_dropped(name):
        line.note = f"dropped: {why}"
    elif lost := table.what_is_lost(name):
        line.lost = lost
    else:
        near = get_close_matches(name, [*known, *table.MEANS], n=1, cutoff=0.85)
        line.lost = "no flag of Megatron-LM's that yuan knows" + (f"; did you mean {near[0]}?" if near else "")
    return line


def _plain(words: list[str]) -> str:
    return words[0].removesuffix(".0") if len(words) == 1 else ""


def _no_words(line: Line, words: list[str]) -> None:
    if words:
        raise UserError(
            f"{line.name} takes no value, and {line.value!r} follows it", "", "take it out, or quote what it belongs to"
        )


def _valued(line: Line, flag: table.Flag, words: list[str]) -> None:
    if flag.kind == "on":
        _no_words(line, words)
        line.became = {flag.key: True}
        return
    if not words or words == [""]:
        raise UserError(f"{line.name} has no value", "", f"write {line.name} VALUE: {keys()[flag.key].doc}")
    if flag.kind == "value" and len(words) > 1:
        raise UserError(f"{line.name} takes one value, and has {line.value!r}", "", "quote a value with blanks in it")
    if UNKNOWN.search(line.value):
        line.lost = f"{line.value} is set nowhere here: fill in {flag.key}"
        if keys()[flag.key].type not in (str, Any):
            return
    if flag.kind == "list":
        line.became = {flag.key: _list(line, flag.key, words)}
        return
    others, note = table.VALUES.get(flag.name, ({}, ""))
    value = others.get(words[0], words[0])
    if table.choices(flag.key) and value not in table.choices(flag.key):
        line.lost = f"{words[0]} is not among what {flag.key} can be: {', '.join(map(str, table.choices(flag.key)))}"
        return
    if value != words[0]:
        line.note = note
    line.became = {flag.key: _typed(line, flag.key, value)}


def _typed(line: Line, key: str, text: str) -> Any:
    kind = keys()[key].type
    if kind not in (int, float):
        return text
    try:
        number = float(text)
        if kind is int and not number.is_integer():
            raise ValueError
        return int(text) if kind is int and text.lstrip("+-").isdigit() else kind(number)
    except (ValueError, OverflowError):
        what = f"{line.name} must be {keys()[key].expected.split(' or null')[0]}, not {text!r}"
        raise UserError(what, "", f"digits alone, such as {line.name} {8 if kind is int else 0.1}") from None


def _list(line: Line, key: str, words: list[str]) -> Any:
    """A prefix alone, a list of prefixes, or weights and prefixes; --rampup-batch-size is three whole numbers."""
    if keys()[key].type is not Any:
        return [_typed_item(line, key, word) for word in words]
    if len(words) == 1:
        return words[0]
    return [_number(word) if position % 2 == 0 else word for position, word in enumerate(words)]


def _typed_item(line: Line, key: str, word: str) -> Any:
    if key != "training.rampup_batch_size":
        return word
    if not word.isdigit():
        raise UserError(f"{line.name} takes whole numbers, not {word!r}", "", f"three of them, such as {line.name} 16 16 1000000")
    return int(word)


def _number(word: str) -> Any:
    try:
        number = float(word)
    except ValueError:
        return word
    return int(word) if word.isdigit() else number


def _shape_name(call: Call, lines: list[Line]) -> str:
    """A name for a command without a script: `pretrain_gpt_24x1024`."""
    values = values_of(lines)
    shape = [str(values[key]) for key in ("model.num_layers", "model.hidden_size") if key in values]
    return "_".join(filter(None, [call.basename.removesuffix(".py"), "x".join(shape)]))


def _needs(lines: list[Line]) -> str:
    values = values_of(lines)
    gpus = values.get("launch.nproc_per_node", 1) * values.get("launch.nnodes", 1)
    paths = [values.get(key) for key in NEEDED]
    named = [path if isinstance(path, str) else path[-1] for path in paths if path]
    return ", ".join(([f"{gpus} GPU{'s' * (gpus > 1)}"] if "model.num_layers" in values else []) + named)
