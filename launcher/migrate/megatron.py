"""Megatron-LM's flags, and those of Yuan 2.0's fork, into recipe keys."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from launcher.errors import UserError, raise_all
from launcher.migrate import flags as table
from launcher.migrate.command import UNKNOWN, Call
from launcher.migrate.result import Line, Migration
from launcher.recipe.keys import table as keys

# What a verb has a use for, of all that the flags say.
OF_SERVING = ("model.", "tokenizer.", "generate.", "serve.", "launch.", "training.precision", "training.seq_length",
              "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size", "parallel.distributed_timeout_minutes",
              "parallel.pipeline_model_parallel_layout")  # fmt: skip
USES = {"pretrain": ("",), "sft": ("",), "serve": OF_SERVING, "preprocess": ("tokenizer.", "preprocess.")}
SPECIAL = {
    "--group-query-attention", "--num-virtual-stages-per-pipeline-rank", "--pipeline-model-parallel-method",
    "--pipeline-model-parallel-blocks", "--flash-attn-drop", "--no-position-embedding", "--no-embedding-dropout",
    "--sft-stage", "--train-reset",
}  # fmt: skip
YUAN_SERVERS = {  # layers, hidden size, heads, positions, tensor ranks, TOP_K
    "2.1B": (24, 2048, 32, 8192, 1, 5), "51B": (42, 8192, 64, 4096, 4, 1), "102B": (84, 8192, 64, 4096, 8, 1),
}  # fmt: skip
YUAN_VOCABULARY = {"tokenizer.vocab_size": 134958, "model.make_vocab_size_divisible_by": 211}
YUAN_FIXED = {"model.norm_epsilon": 1e-6, **YUAN_VOCABULARY}


def pretrain(call: Call, name: str) -> Migration:
    """pretrain_gpt.py or pretrain_yuan.py with its flags."""
    lines = read_flags(call, "pretrain")
    verb = "sft" if any(line.name == "--sft-stage" for line in lines) else "pretrain"
    title = f"{'Training' if verb == 'pretrain' else 'Fine-tuning'} as {name} did it"
    return Migration(verb, name, title, f"{call.place}: {len(lines)} flags", call.text, lines, _needs(lines))


def serve(call: Call, name: str) -> Migration:
    """tools/run_text_generation_server.py, of Megatron-LM and of Yuan 2.0, with its flags."""
    lines = read_flags(call, "serve")
    values = _values(lines)
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
    words += ["--top_k", known.get("TOP_K") or str(top_k), "--top_p", known.get("TOP_P") or "0.0", "--temperature", known.get("TEMP") or "1"]
    words += ["--load", known.get("CHECKPOINT_PATH") or "$CHECKPOINT_PATH"]
    words += ["--tokenizer-model-path", known.get("TOKENIZER_MODEL_PATH") or "$TOKENIZER_MODEL_PATH"]
    launcher = [Line("torchrun", "--nproc_per_node", str(ranks), {"launch.nproc_per_node": ranks})]
    full = Call(call.program, words, {"PORT": "8000"} | known, launcher, call.text, call.line)
    return serve(full, f"yuan2_{size.lower()}_serve")


def preprocess(call: Call, name: str) -> Migration:
    """tools/preprocess_data.py with its flags."""
    lines = read_flags(call, "preprocess")
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
    for number, (name, words) in enumerate(_split(call), 1):
        try:
            lines.append(_one(str(number), name, words, verb))
        except UserError as error:
            faults.append(UserError(error.what, call.place, error.fix))
    raise_all(faults)
    for rule in RULES:
        rule(lines, verb)
    uses = USES[verb]
    for line in lines:
        useless = [key for key in line.became if not key.startswith(uses)]
        if useless:
            line.became = {key: value for key, value in line.became.items() if key not in useless}
            line.note = line.note or f"dropped: of no use to yuan {verb}"
    return lines


def _split(call: Call) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    for word in call.arguments:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            found.append((name, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            raise UserError(f"{word!r} stands before the first flag", call.place, "flags begin with --, such as --num-layers 24")
    return found


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
        raise UserError(f"{line.name} takes no value, and {line.value!r} follows it", "", "take it out, or quote what it belongs to")


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
    value = table.VALUES.get(flag.name, {}).get(words[0], words[0])
    if flag.name == "--tokenizer-type" and words[0] == "YuanTokenizer":
        value, line.note = "SentencePieceTokenizer", "the file of Yuan's tokenizer is one of SentencePiece's"
    if table.choices(flag.key) and value not in table.choices(flag.key):
        line.lost = f"{words[0]} is not among what {flag.key} can be: {', '.join(map(str, table.choices(flag.key)))}"
        return
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
        raise UserError(f"{line.name} must be {keys()[key].expected.split(' or null')[0]}, not {text!r}", "", keys()[key].doc) from None


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
        raise UserError(f"{line.name} takes whole numbers, not {word!r}", "", keys()[key].doc)
    return int(word)


def _number(word: str) -> Any:
    try:
        number = float(word)
    except ValueError:
        return word
    return int(word) if word.isdigit() else number


# What flags mean together. Each rule may change the lines it is about and add what the program does by itself.


def _find(lines: list[Line], *names: str) -> Line | None:
    return next((line for line in reversed(lines) if line.name in names), None)


def _values(lines: list[Line]) -> dict[str, Any]:
    return {key: value for line in lines for key, value in line.became.items()}


def _repeated(lines: list[Line], verb: str) -> None:
    seen: dict[str, Line] = {}
    for line in lines:
        for key in line.became:
            if key in seen and seen[key].name.startswith("--") and seen[key].became.get(key) != line.became[key]:
                seen[key].note = f"dropped: {line.name} {line.value} comes later, and the last counts"
                seen[key].became = {}
            seen[key] = line


def _queries(lines: list[Line], verb: str) -> None:
    groups, switch = _find(lines, "--num-query-groups"), _find(lines, "--group-query-attention")
    if groups and not switch:
        groups.trap = "without --group-query-attention Megatron-LM ignores it, and so it is left out. If it was meant: "
        groups.trap += f"model.num_query_groups={groups.value}"
        groups.became, groups.note = {}, "dropped: --group-query-attention is not given"
    elif switch and not groups and not _find(lines, "--n-head-kv"):
        switch.note = "Megatron-LM's default of one group"
        switch.became = {"model.num_query_groups": 1}
    elif switch:
        switch.note = "its number has a flag of its own"


def _recompute(lines: list[Line], verb: str) -> None:
    """Older versions took a method alone for full recomputation; uniform goes layer by layer where no number is given."""
    values = _values(lines)
    method = _find(lines, "--recompute-method", "--activations-checkpoint-method", "--checkpoint-method")
    if not method:
        return
    if "parallel.recompute_granularity" not in values:
        method.became = {**method.became, "parallel.recompute_granularity": "full"}
        method.note = "a method is one of full recomputation"
    if "parallel.recompute_num_layers" not in values:
        method.became = {**method.became, "parallel.recompute_num_layers": 1}


def _virtual_stages(lines: list[Line], verb: str) -> None:
    line, values = _find(lines, "--num-virtual-stages-per-pipeline-rank"), _values(lines)
    if not line:
        return
    layers, stages = values.get("model.num_layers"), values.get("parallel.pipeline_model_parallel_size", 1)
    if line.value.isdigit() and layers and int(line.value) and layers % (stages * int(line.value)) == 0:
        each = layers // (stages * int(line.value))
        line.became = {"parallel.num_layers_per_virtual_pipeline_stage": each}
        line.note = f"{layers} layers / ({stages} stages x {line.value})"
    else:
        line.lost = f"{layers} layers cannot be shared out over {stages} stages x {line.value}: there are no virtual stages"


def _yuan(lines: list[Line], verb: str) -> None:
    """What Yuan 2.0's fork does by itself, and its uneven stages."""
    values = _values(lines)
    blocks, method = _find(lines, "--pipeline-model-parallel-blocks"), _find(lines, "--pipeline-model-parallel-method")
    if method:
        method.note = "dropped: the layout says it all"
    if blocks and all(part.isdigit() for part in blocks.value.split(",")):
        stages = ["t" * int(part) for part in blocks.value.split(",")]
        blocks.became = {"parallel.pipeline_model_parallel_layout": "E" + "|".join(stages) + "L"} if len(stages) > 1 else {}
    elif blocks:
        raise UserError(f"{blocks.name} must be whole numbers with commas, not {blocks.value!r}", "", "such as 2,3,3,2")
    model, sft, reset = _find(lines, "--tokenizer-model-path"), _find(lines, "--sft-stage"), _find(lines, "--train-reset")
    if model and model.became and not model.value.endswith(".model"):
        model.became = {"tokenizer.tokenizer_model": f"{model.value.rstrip('/')}/tokenizer.model"}
    if reset:
        reset.note, reset.became = "the run starts at step 0", {"checkpoint.finetune": True}
    data = _find(lines, "--data-path")
    if sft and data:
        sft.note = "yuan sft"
        sft.trap = "the released *_sft.sh keep pretraining's learning rate and steps, and cut half of the documents at random. The paper "
        sft.trap += "fine-tuned with optimizer.lr=8e-5 for training.epochs=4 (and training.train_iters=null)"
        prefix = data.value.split()[-1]
        data.became = {"data.train": f"{prefix}.jsonl"}
        data.lost = "yuan sft reads questions and answers as JSON lines, not token ids: give the file that they were made of"
    if values.get("model.family") != "yuan2":
        return
    fixed = dict(YUAN_FIXED)
    if "model.hidden_size" in values and "model.ffn_hidden_size" not in values:
        fixed["model.ffn_hidden_size"] = 4 * values["model.hidden_size"]
    trap = ""
    if _find(lines, "--layernorm-epsilon", "--norm-epsilon"):
        trap = "the fork computes RMSNorm with 1e-6 whatever the flag says; as the flag says: model.norm_epsilon"
    lines.append(Line("fixed", "Yuan 2.0's fork", "", fixed, note="fixed in its code", trap=trap))


def _dropout(lines: list[Line], verb: str) -> None:
    """Yuan's flash attention has a dropout of its own; --attention-dropout is of the path without."""
    flash = _find(lines, "--flash-attn-drop")
    attention, uses = _find(lines, "--attention-dropout"), _find(lines, "--use-flash-attn")
    if flash and uses:
        flash.became, flash.lost = {"model.attention_dropout": _typed(flash, "model.attention_dropout", flash.value)}, ""
        flash.note = "flash attention's own, which is what trains"
        if attention and attention.value != flash.value:
            attention.became, attention.note = {}, "dropped: flash attention has --flash-attn-drop"
    elif flash:
        flash.note, flash.lost = "dropped: without --use-flash-attn --attention-dropout counts", ""
    embedding = _find(lines, "--no-embedding-dropout")
    if embedding and _values(lines).get("model.hidden_dropout", 0.1) > 0:
        embedding.lost = "the embedding has model.hidden_dropout too"
    elif embedding:
        embedding.note = "so it is with model.hidden_dropout=0"


def _positions(lines: list[Line], verb: str) -> None:
    line, values = _find(lines, "--no-position-embedding"), _values(lines)
    if line and values.get("model.position_embedding_type", "learned_absolute") == "learned_absolute":
        line.became = {"model.position_embedding_type": "none"}
    elif line:
        line.note = f"so it is with {values['model.position_embedding_type']}"


def _family(lines: list[Line], verb: str) -> None:
    """Llama's family is told by its norm, its activation and its positions; it names the tensors in other formats."""
    values = _values(lines)
    llama = (values.get("model.normalization") == "RMSNorm", values.get("model.swiglu"), values.get("model.position_embedding_type") == "rope")
    if "model.num_layers" in values and "model.family" not in values and verb != "preprocess":
        family = "llama" if all(llama) else "gpt2"
        shape = "RMSNorm, SwiGLU and RoPE" if all(llama) else "not all of RMSNorm, SwiGLU and RoPE"
        lines.append(Line("derived", "family", "", {"model.family": family}, note=shape))


def _llama_dropout(lines: list[Line], verb: str) -> None:
    values = _values(lines)
    if verb != "pretrain" or values.get("model.family") != "llama" or {"model.attention_dropout", "model.hidden_dropout"} & values.keys():
        return
    trap = "not given, and so Megatron-LM's 0.1, which the recipe keeps. Llama was trained without: model.attention_dropout=0 "
    lines.append(Line("default", "dropout", "0.1", trap=trap + "model.hidden_dropout=0", note="kept"))


def _schedule(lines: list[Line], verb: str) -> None:
    """A decay much longer than the training: the rate never falls, and a warm-up fraction is one of the decay."""
    values = _values(lines)
    for unit in ("iters", "samples"):
        decay, train = values.get(f"optimizer.lr_decay_{unit}"), values.get(f"training.train_{unit}")
        if decay and train and decay >= 2 * train and values.get("optimizer.lr_decay_style") != "constant":
            line = _find(lines, f"--lr-decay-{unit}")
            line.trap = f"the decay is {decay / train:.0f} times as long as the training of {train}: the learning rate hardly falls"
            if fraction := values.get("optimizer.lr_warmup_fraction"):
                line.trap += f", and the warm-up is {fraction:g} of the decay, {fraction * decay / train:.0%} of the training"
            line.trap += f". The recipe keeps it; if it was not meant: optimizer.lr_decay_{unit}={train}"


def _sequence_parallel(lines: list[Line], verb: str) -> None:
    line, values = _find(lines, "--sequence-parallel"), _values(lines)
    if line and values.get("parallel.tensor_model_parallel_size", 1) == 1:
        line.became, line.note = {}, "dropped: with TP 1 there is nothing to split, and Megatron-LM turns it off"


def _folders(lines: list[Line], verb: str) -> None:
    """--load of the folder that --save writes is resuming, which the same command of yuan does by itself."""
    save, load = _find(lines, "--save"), _find(lines, "--load")
    finetune = _values(lines).get("checkpoint.finetune")
    if save and load and verb == "pretrain" and save.value == load.value:
        if finetune:
            save.became = {}
            save.trap = f"it saved into {save.value}, the very folder that it began from. The run has a folder of its own; "
            save.trap += "another one: run.dir"
        else:
            load.became, load.note = {}, "resuming: the same command of yuan does it by itself"
            load.lost = ""
    elif save and not load and verb == "pretrain":
        save.trap = "without --load the old command started anew each time, over what was there; yuan goes on. Anew: run.name=ANOTHER"
    elif load and finetune is None and verb == "pretrain":
        trap = "an iteration other than 0 in that checkpoint goes on from there; weights alone: checkpoint.finetune=true"
        load.trap = "" if _find(lines, "--no-load-optim") is None else trap


RULES = (_repeated, _queries, _recompute, _virtual_stages, _yuan, _dropout, _positions, _family, _llama_dropout, _schedule,
         _sequence_parallel, _folders)  # fmt: skip


def _needs(lines: list[Line]) -> str:
    values = _values(lines)
    gpus = values.get("launch.nproc_per_node", 1) * values.get("launch.nnodes", 1)
    paths = [values.get(key) for key in ("preprocess.input", "data.data_path", "data.train_data_path", "data.train", "generate.load", "checkpoint.load",
                                         "tokenizer.vocab_file", "tokenizer.merge_file", "tokenizer.tokenizer_model")]  # fmt: skip
    named = [path if isinstance(path, str) else path[-1] for path in paths if path]
    return ", ".join(([f"{gpus} GPU{'s' * (gpus > 1)}"] if "model.num_layers" in values else []) + named)
