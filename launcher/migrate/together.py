"""What flags mean together: each rule may change the lines that it is about, and add what the program does by itself."""

from __future__ import annotations

from typing import Any

from launcher.errors import UserError
from launcher.migrate.result import Line

YUAN_VOCABULARY = {"tokenizer.vocab_size": 134958, "model.make_vocab_size_divisible_by": 211}
# Megatron-LM carries these out when all flags are read, over what others say of the same.
COUNTS_MORE = {"--recompute-activations", "--use-rotary-position-embeddings"}
YUAN_FIXED = {"model.norm_epsilon": 1e-6, **YUAN_VOCABULARY}


def find(lines: list[Line], *names: str) -> Line | None:
    return next((line for line in reversed(lines) if line.name in names), None)


def values_of(lines: list[Line]) -> dict[str, Any]:
    return {key: value for line in lines for key, value in line.became.items()}


def _precisions(lines: list[Line], verb: str) -> None:
    if find(lines, "--fp16") and find(lines, "--bf16"):
        raise UserError("--fp16 and --bf16 are both given, which Megatron-LM refuses", "", "leave one out")


def _repeated(lines: list[Line], verb: str) -> None:
    """Of a value given twice the last counts, but what Megatron-LM sets after reading all flags counts before any."""
    seen: dict[str, Line] = {}
    for line in list(lines):
        for key in list(line.became):
            first = seen.get(key)
            if first and first.name.startswith("--") and first.became.get(key) != line.became[key]:
                loser, winner = (line, first) if first.name in COUNTS_MORE and line.name not in COUNTS_MORE else (first, line)
                why = "counts whatever else is given" if winner is first else "comes later, and the last counts"
                loser.note = f"dropped: {winner.name} {winner.value}".rstrip() + f" {why}"
                del loser.became[key]
                seen[key] = winner
            else:
                seen[key] = line


def _queries(lines: list[Line], verb: str) -> None:
    groups, switch = find(lines, "--num-query-groups"), find(lines, "--group-query-attention")
    if groups and not switch:
        groups.trap = "without --group-query-attention Megatron-LM ignores it, and so it is left out. If it was meant: "
        groups.trap += f"model.num_query_groups={groups.value}"
        groups.became, groups.note = {}, "dropped: --group-query-attention is not given"
    elif switch and not groups and not find(lines, "--n-head-kv"):
        switch.note = "Megatron-LM's default of one group"
        switch.became = {"model.num_query_groups": 1}
    elif switch:
        switch.note = "its number has a flag of its own"


def _recompute(lines: list[Line], verb: str) -> None:
    """Older versions took a method alone for full recomputation; uniform goes layer by layer where no number is given."""
    values = values_of(lines)
    method = find(lines, "--recompute-method", "--activations-checkpoint-method", "--checkpoint-method")
    if not method:
        return
    if "parallel.recompute_granularity" not in values:
        method.became = {**method.became, "parallel.recompute_granularity": "full"}
        method.note = "a method is one of full recomputation"
    if "parallel.recompute_num_layers" not in values:
        method.became = {**method.became, "parallel.recompute_num_layers": 1}


def _accumulation(lines: list[Line], verb: str) -> None:
    """bf16 accumulates and reduces gradients in fp32 by itself, fp32 has no others; fp16 does so with the flag alone."""
    line, precision = find(lines, "--accumulate-allreduce-grads-in-fp32"), values_of(lines).get("training.precision", "fp32")
    if line and precision == "fp16":
        line.lost = "gradients are accumulated and reduced in fp16; training.precision=bf16 does it in fp32"
    elif line:
        line.note = f"so it is in {precision}"


def _virtual_stages(lines: list[Line], verb: str) -> None:
    line, values = find(lines, "--num-virtual-stages-per-pipeline-rank"), values_of(lines)
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
    values = values_of(lines)
    blocks, method = find(lines, "--pipeline-model-parallel-blocks"), find(lines, "--pipeline-model-parallel-method")
    if method:
        method.note = "dropped: the layout says it all"
    if blocks and all(part.isdigit() for part in blocks.value.split(",")):
        stages = ["t" * int(part) for part in blocks.value.split(",")]
        blocks.became = {"parallel.pipeline_model_parallel_layout": "E" + "|".join(stages) + "L"} if len(stages) > 1 else {}
    elif blocks:
        raise UserError(f"{blocks.name} must be whole numbers with commas, not {blocks.value!r}", "", "such as 2,3,3,2")
    model, sft, reset = find(lines, "--tokenizer-model-path"), find(lines, "--sft-stage"), find(lines, "--train-reset")
    if model and model.became and not model.value.endswith(".model"):
        model.became = {"tokenizer.tokenizer_model": f"{model.value.rstrip('/')}/tokenizer.model"}
    if reset:
        reset.note, reset.became = "the run starts at step 0", {"checkpoint.finetune": True}
    data = find(lines, "--data-path")
    if sft and data:
        sft.note, sft.became = "yuan sft", {"tokenizer.chat_template": "yuan"}
        sft.trap = "the released *_sft.sh keep pretraining's learning rate and steps, and cut half of the documents at random. "
        sft.trap += "The paper fine-tuned with optimizer.lr=8e-5 for training.epochs=4 (and training.train_iters=null)"
        prefix = data.value.split()[-1]
        data.became = {"data.train": f"{prefix}.jsonl"}
        data.lost = "yuan sft reads questions and answers as JSON lines, not token ids: give the file that they were made of"
    split = find(lines, "--split")
    if sft and split:
        split.became, split.note = {}, "dropped: questions and answers to evaluate on are data.valid"
    if values.get("model.family") != "yuan2":
        return
    fixed = dict(YUAN_FIXED)
    if "model.hidden_size" in values and "model.ffn_hidden_size" not in values:
        fixed["model.ffn_hidden_size"] = 4 * values["model.hidden_size"]
    trap = ""
    if find(lines, "--layernorm-epsilon", "--norm-epsilon"):
        trap = "the fork computes RMSNorm with 1e-6 whatever the flag says; as the flag says: model.norm_epsilon"
    lines.append(Line("fixed", "Yuan 2.0's fork", "", fixed, note="fixed in its code", trap=trap))


def _dropout(lines: list[Line], verb: str) -> None:
    """Yuan's flash attention has a dropout of its own; --attention-dropout is of the path without."""
    flash = find(lines, "--flash-attn-drop")
    attention, uses = find(lines, "--attention-dropout"), find(lines, "--use-flash-attn")
    if flash and uses:
        flash.became, flash.lost = {"model.attention_dropout": float(flash.value)}, ""
        flash.note = "flash attention's own, which is what trains"
        if attention and attention.value != flash.value:
            attention.became, attention.note = {}, "dropped: flash attention has --flash-attn-drop"
    elif flash:
        flash.note, flash.lost = "dropped: without --use-flash-attn --attention-dropout counts", ""
    embedding = find(lines, "--no-embedding-dropout")
    if embedding and values_of(lines).get("model.hidden_dropout", 0.1) > 0:
        embedding.lost = "the embedding has model.hidden_dropout too"
    elif embedding:
        embedding.note = "so it is with model.hidden_dropout=0"


def _positions(lines: list[Line], verb: str) -> None:
    line, values = find(lines, "--no-position-embedding"), values_of(lines)
    if line and values.get("model.position_embedding_type", "learned_absolute") == "learned_absolute":
        line.became = {"model.position_embedding_type": "none"}
    elif line:
        line.note = f"so it is with {values['model.position_embedding_type']}"


def _family(lines: list[Line], verb: str) -> None:
    """Llama's family is told by its norm, its activation and its positions; it names the tensors in other formats."""
    values = values_of(lines)
    llama = (
        values.get("model.normalization") == "RMSNorm",
        values.get("model.swiglu"),
        values.get("model.position_embedding_type") == "rope",
    )
    if "model.num_layers" in values and "model.family" not in values and verb != "preprocess":
        family = "llama" if all(llama) else "gpt2"
        shape = "RMSNorm, SwiGLU and RoPE" if all(llama) else "not all of RMSNorm, SwiGLU and RoPE"
        lines.append(Line("derived", "family", "", {"model.family": family}, note=shape))


def _llama_dropout(lines: list[Line], verb: str) -> None:
    values = values_of(lines)
    if (
        verb != "pretrain"
        or values.get("model.family") != "llama"
        or {"model.attention_dropout", "model.hidden_dropout"} & values.keys()
    ):
        return
    trap = "not given, and so Megatron-LM's 0.1, which the recipe keeps. Llama was trained without: model.attention_dropout=0 "
    lines.append(Line("default", "dropout", "0.1", trap=trap + "model.hidden_dropout=0", note="kept"))


def _gelu(lines: list[Line], verb: str) -> None:
    """Megatron-LM adds the bias and computes GELU in one kernel unless it is told not to, and that one is the tanh formula."""
    values = values_of(lines)
    has_bias = values.get("model.add_bias_linear", True) and not values.get("model.swiglu")
    if "model.num_layers" in values and has_bias and not find(lines, "--no-bias-gelu-fusion", "--openai-gelu"):
        lines.append(Line("default", "GELU", "tanh formula", {"model.openai_gelu": True}, note="--no-bias-gelu-fusion is not given"))


def _schedule(lines: list[Line], verb: str) -> None:
    """A decay much longer than the training: the rate never falls, and a warm-up fraction is one of the decay."""
    values = values_of(lines)
    for unit in ("iters", "samples"):
        decay, train = values.get(f"optimizer.lr_decay_{unit}"), values.get(f"training.train_{unit}")
        if decay and train and decay >= 2 * train and values.get("optimizer.lr_decay_style") != "constant":
            line = find(lines, f"--lr-decay-{unit}")
            line.trap = (
                f"the decay is {decay / train:.0f} times as long as the training of {train}: the learning rate hardly falls"
            )
            if fraction := values.get("optimizer.lr_warmup_fraction"):
                line.trap += f", and the warm-up is {fraction:g} of the decay, {fraction * decay / train:.0%} of the training"
            line.trap += f". The recipe keeps it; if it was not meant: optimizer.lr_decay_{unit}={train}"


def _sequence_parallel(lines: list[Line], verb: str) -> None:
    line, values = find(lines, "--sequence-parallel"), values_of(lines)
    if line and values.get("parallel.tensor_model_parallel_size", 1) == 1:
        line.became, line.note = {}, "dropped: with TP 1 there is nothing to split, and Megatron-LM turns it off"


def _folders(lines: list[Line], verb: str) -> None:
    """--load of the folder that --save writes is resuming, which the same command of yuan does by itself."""
    save, load = find(lines, "--save"), find(lines, "--load")
    finetune = values_of(lines).get("checkpoint.finetune")
    if save and load and verb == "pretrain" and save.value == load.value:
        if finetune:
            save.became, save.lost = {}, ""
            save.trap = f"it saved into {save.value}, the very folder that it began from. The run has a folder of its own; "
            save.trap += "another one: run.dir"
        else:
            load.became, load.note = {}, "resuming: the same command of yuan does it by itself"
            load.lost = ""
    elif save and not load and verb == "pretrain":
        save.trap = (
            "without --load the old command started anew each time, over what was there; yuan goes on. Anew: run.name=ANOTHER"
        )
    elif load and finetune is None and verb == "pretrain":
        trap = "an iteration other than 0 in that checkpoint goes on from there; weights alone: checkpoint.finetune=true"
        load.trap = "" if find(lines, "--no-load-optim") is None else trap


RULES = (_precisions, _repeated, _queries, _recompute, _accumulation, _virtual_stages, _yuan, _dropout, _positions, _family, _llama_dropout, _gelu, _schedule,
         _sequence_parallel, _folders)  # fmt: skip
