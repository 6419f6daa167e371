"""Pai-Megatron-Patch's scripts for Llama-2: their positional arguments and what the scripts add by themselves."""

from __future__ import annotations

import re
from typing import Any

from launcher.errors import UserError
from launcher.migrate.command import Call
from launcher.migrate.positional import (
    COUNT,
    NUMBER,
    PATH,
    RATE,
    SWITCH,
    TOKENS,
    WHOLE,
    Kind,
    Order,
    number,
    one_of,
    order,
    read,
)  # fmt: skip
from launcher.migrate.result import Line, Migration

VOCABULARY = 32000
SIZES = {  # layers, hidden size, feed-forward size, heads, key/value heads
    "7B": (32, 4096, 11008, 32, 32), "13B": (40, 5120, 13824, 40, 40), "70B": (80, 8192, 28672, 64, 8),
    "65B": (80, 8192, 22016, 64, 64),
}  # fmt: skip
KINDS = {
    "ENV": one_of("dsw", "dlc"), "MODEL_SIZE": one_of("7B", "13B", "70B"), "PR": one_of("fp16", "bf16", "fp8"),
    "AC": one_of("sel", "full", "none"), "ZERO": one_of("1", "2", "3"), "TRAIN_TOKENS": TOKENS, "WARMUP_TOKENS": TOKENS,
    "LR": RATE, "MIN_LR": Kind(lambda text: text in ("0", "0.0") or RATE.fits(text), "a learning rate such as 1e-6"),
    "TOP_P": Kind(lambda text: NUMBER.fits(text) and float(text) <= 1, "a number from 0 to 1"), "TEMPERATURE": NUMBER,
    "REPETITION_PENALTY": Kind(lambda text: NUMBER.fits(text) and float(text) > 0, "a number above 0"),
    **dict.fromkeys("MEGATRON_PATH MEGATRON_PATCH_PATH DATASET_PATH TRAIN_DATASET_PATH VALID_DATASET_PATH "
                    "PRETRAIN_CHECKPOINT_PATH CHECKPOINT_PATH INPUT_FILE OUTPUT_FILE OUTPUT_BASEPATH".split(), PATH),
    **dict.fromkeys("BATCH_SIZE GLOBAL_BATCH_SIZE SEQ_LEN PAD_LEN TP PP SAVE_INTERVAL EPOCH BS OUTPUT_SEQ_LEN GA_STEPS".split(), WHOLE),
    **dict.fromkeys("EXTRA_VOCAB_SIZE TOP_K INPUT_SEQ_LEN".split(), COUNT), **dict.fromkeys("DO FL SP TE GC".split(), SWITCH),
    "FLASH": SWITCH,
}  # fmt: skip
OLD, NEW = "Pai-Megatron-Patch 0.5", "Pai-Megatron-Patch 0.6 and later"
PRETRAIN = [
    order(OLD, "ENV MEGATRON_PATH MEGATRON_PATCH_PATH MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN "
               "EXTRA_VOCAB_SIZE PR TP PP AC DO FL SP SAVE_INTERVAL DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN_TOKENS "
               "WARMUP_TOKENS OUTPUT_BASEPATH", KINDS),
    order(NEW, "ENV MEGATRON_PATCH_PATH MODEL_SIZE BATCH_SIZE GLOBAL_BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN EXTRA_VOCAB_SIZE "
               "PR TP PP AC DO FL SP TE SAVE_INTERVAL DATASET_PATH PRETRAIN_CHECKPOINT_PATH TRAIN_TOKENS WARMUP_TOKENS "
               "OUTPUT_BASEPATH", KINDS),
]  # fmt: skip
FINETUNE = [
    order(OLD, "ENV MEGATRON_PATH MEGATRON_PATCH_PATH MODEL_SIZE BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN EXTRA_VOCAB_SIZE PR TP "
               "PP AC DO FL SP TRAIN_DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH EPOCH OUTPUT_BASEPATH", KINDS),
    order(NEW, "ENV MEGATRON_PATCH_PATH MODEL_SIZE BATCH_SIZE LR MIN_LR SEQ_LEN PAD_LEN EXTRA_VOCAB_SIZE PR TP PP AC DO FL SP "
               "TE TRAIN_DATASET_PATH VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH EPOCH OUTPUT_BASEPATH", KINDS),
]  # fmt: skip
GENERATE = [
    order(OLD, "ENV MEGATRON_PATH MEGATRON_PATCH_PATH CHECKPOINT_PATH MODEL_SIZE TP BS SEQ_LEN PAD_LEN EXTRA_VOCAB_SIZE PR TOP_K "
               "INPUT_SEQ_LEN OUTPUT_SEQ_LEN INPUT_FILE OUTPUT_FILE TOP_P TEMPERATURE REPETITION_PENALTY", KINDS),
    order(NEW, "ENV MEGATRON_PATCH_PATH CHECKPOINT_PATH MODEL_SIZE TP BS SEQ_LEN PAD_LEN EXTRA_VOCAB_SIZE PR TOP_K INPUT_SEQ_LEN "
               "OUTPUT_SEQ_LEN INPUT_FILE OUTPUT_FILE TOP_P TEMPERATURE REPETITION_PENALTY", KINDS),
]  # fmt: skip
DS_KINDS = KINDS | {"MODEL_SIZE": one_of("7B", "13B", "65B", "70B"), "PR": one_of("fp16", "bf16")}
DEEPSPEED = [
    order("its documentation", "ENV MODEL_SIZE BATCH_SIZE GA_STEPS LR SEQ_LEN PR ZERO GC TRAIN_DATASET_PATH VALID_DATASET_PATH "
                               "PRETRAIN_CHECKPOINT_PATH EPOCH OUTPUT_BASEPATH", DS_KINDS),
    order("its repository", "ENV MODEL_SIZE BATCH_SIZE GA_STEPS LR SEQ_LEN PR ZERO GC FLASH TRAIN_DATASET_PATH "
                            "VALID_DATASET_PATH PRETRAIN_CHECKPOINT_PATH EPOCH OUTPUT_BASEPATH", DS_KINDS),
]  # fmt: skip


def _llama(size: str) -> dict[str, Any]:
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    return {"model.family": "llama"} | {f"model.{name}": value for name, value in zip(names, SIZES[size])}


ARCHITECTURE = {
    "model.position_embedding_type": "rope", "model.normalization": "RMSNorm", "model.norm_epsilon": 1e-5, "model.swiglu": True,
    "model.add_bias_linear": False, "model.untie_embeddings_and_output_weights": True,
}  # fmt: skip


class _Reader:
    """The arguments of one command, each becoming one line."""

    def __init__(self, call: Call, orders: list[Order]):
        self.call = call
        self.order, self.words = read(call, orders)
        self.lines: list[Line] = []

    def text(self, name: str) -> str:
        return self.words[name][1]

    def text_or(self, name: str) -> str:
        return self.words[name][1] if name in self.words else ""

    def value(self, name: str) -> Any:
        return number(self.text(name))

    def line(self, name: str, became: dict[str, Any] | None = None, note: str = "", trap: str = "", lost: str = "") -> None:
        if name in self.words:
            place, value = self.words[name]
            self.lines.append(Line(str(place), name, value, became or {}, note, trap, lost))

    def fixed(self, name: str, value: str, became: dict[str, Any], note: str = "", trap: str = "") -> None:
        self.lines.append(Line("fixed", name, value, became, note, trap))

    def done(self, verb: str, what: str, title: str) -> Migration:
        size = self.text("MODEL_SIZE").lower()
        self.lines.sort(key=lambda line: (line.place == "fixed", int(line.place) if line.place.isdigit() else 0))
        origin = f"{self.call.basename}: {len(self.words)} arguments in the order of {self.order.release}"
        values = Migration(verb, "x", "", "", "", self.lines).values
        gpus = values.get("launch.nproc_per_node", 1) * values.get("launch.nnodes", 1)
        needs = [f"{gpus} GPU{'s' * (gpus > 1)}"]
        needs += [
            str(values[key])
            for key in ("data.data_path", "data.train", "checkpoint.load", "generate.load", "generate.input")
            if values.get(key)
        ]
        name = f"pai_llama2_{size}_{what}"
        return Migration(verb, name, f"{title} Llama-2 {size.upper()}", origin, self.call.text, self.lines, ", ".join(needs))


def _machines(r: _Reader) -> int:
    """ENV; the number of GPUs."""
    if r.text("ENV") == "dsw":
        r.line(
            "ENV", {"launch.nnodes": 1, "launch.nproc_per_node": 8}, note="the script takes 8 GPUs, whatever the machine has"
        )
        return 8
    known = {name: r.call.variables.get(name, "") for name in ("WORLD_SIZE", "KUBERNETES_CONTAINER_RESOURCE_GPU")}
    nodes, gpus = (int(text) if text.isdigit() else None for text in known.values())
    lost = ""
    if nodes is None or gpus is None:
        lost = (
            "machines and GPUs come from the cluster's environment (WORLD_SIZE is the number of machines): give launch.nnodes, "
        )
        lost += "launch.nproc_per_node, launch.node_rank and launch.rdzv_endpoint"
    became = {"launch.nnodes": nodes or 1, "launch.nproc_per_node": gpus or 8}
    if "RANK" in r.call.variables and r.call.variables["RANK"].isdigit():
        became["launch.node_rank"] = int(r.call.variables["RANK"])
    if r.call.variables.get("MASTER_ADDR"):
        became["launch.rdzv_endpoint"] = f"{r.call.variables['MASTER_ADDR']}:{r.call.variables.get('MASTER_PORT', '29500')}"
    r.line("ENV", became, lost=lost)
    return became["launch.nnodes"] * became["launch.nproc_per_node"]


def _model(r: _Reader) -> None:
    for name in ("MEGATRON_PATH", "MEGATRON_PATCH_PATH"):
        r.line(name, note="dropped: yuan brings megatron-core with it")
    r.line("MODEL_SIZE", _llama(r.text("MODEL_SIZE")))
    extra = r.value("EXTRA_VOCAB_SIZE") if "EXTRA_VOCAB_SIZE" in r.words else 0
    rows, tp = VOCABULARY + extra, r.value("TP") if "TP" in r.words else 1
    padding = {"tokenizer.vocab_size": VOCABULARY, "model.make_vocab_size_divisible_by": rows // tp if extra else 1}
    if extra and rows % tp:
        what = f"{VOCABULARY} + {extra} rows of the vocabulary cannot be shared out over {tp} tensor-parallel ranks"
        place, text = r.words["EXTRA_VOCAB_SIZE"]
        raise UserError(
            f"argument {place} (EXTRA_VOCAB_SIZE) is {text}: {what}", r.call.place, f"such as {extra + tp - rows % tp}"
        )
    trap = ""
    if not extra and r.order.release == OLD:
        trap = "version 0.5 adds a padding token with id 32000, for which an embedding of 32000 rows has none: a look-up out of range. "
        trap += "yuan masks padding and needs no token for it"
    if "EXTRA_VOCAB_SIZE" in r.words:
        r.line("EXTRA_VOCAB_SIZE", padding, note=f"{rows} rows", trap=trap)
    else:
        r.fixed("vocabulary", str(VOCABULARY), padding)
    r.fixed("architecture", "Llama-2", ARCHITECTURE)
    dropout = {"model.attention_dropout": 0.0, "model.hidden_dropout": 0.0}
    trap = "not given, and so Megatron's 0.1: Llama was trained without, and a trained model gets worse with every step. As before: "
    trains = "LR" in r.words and "PAD_LEN" in r.words
    r.fixed("dropout", "0.1" if trains else "0", dropout,
            trap=trap + "model.attention_dropout=0.1 model.hidden_dropout=0.1" if trains else "")  # fmt: skip


def _precision(r: _Reader) -> None:
    precision = r.text("PR")
    lost = "FP8 is missing: the recipe trains in bf16" if precision == "fp8" else ""
    r.line("PR", {"training.precision": "bf16" if lost else precision}, lost=lost)


def _layout(r: _Reader) -> None:
    r.line("TP", {"parallel.tensor_model_parallel_size": r.value("TP")})
    r.line("PP", {"parallel.pipeline_model_parallel_size": r.value("PP")})
    full = {
        "parallel.recompute_granularity": "full",
        "parallel.recompute_method": "uniform",
        "parallel.recompute_num_layers": 1,
    }
    modes = {"sel": {"parallel.recompute_granularity": "selective"}, "full": full, "none": {}}
    r.line("AC", modes[r.text("AC")], note="" if r.text("AC") != "none" else "nothing is recomputed")
    sharded = r.text("DO") == "true"
    r.line("DO", {"parallel.use_distributed_optimizer": sharded},
           trap="" if sharded else "with false the script writes model_optim_rng.pt, which its own generation cannot open; yuan's "
           "checkpoints are the same either way")  # fmt: skip
    r.line("FL", note="dropped: yuan takes fused attention wherever it can")
    r.line("TE", note="dropped: yuan has one engine, megatron-core's models")
    split = r.text("SP") == "true" and r.value("TP") > 1
    note = (
        "dropped without a word by the script: with TP 1 there is nothing to split"
        if r.text("SP") == "true" and not split
        else ""
    )
    r.line("SP", {} if note else {"parallel.sequence_parallel": split}, note=note)


def _length(r: _Reader, real: int, counted: str) -> None:
    """SEQ_LEN and PAD_LEN: the script says the one and trains with the other."""
    seq, pad = r.value("SEQ_LEN"), r.value("PAD_LEN")
    r.line("SEQ_LEN", {"training.seq_length": seq, "model.max_position_embeddings": max(4096, seq)},
           note="with RoPE the number of positions is a limit only; Llama-2's is 4096")  # fmt: skip
    if real == seq:
        r.line("PAD_LEN", note="dropped: there is one length, training.seq_length")
        return
    trap = f"samples really had {real} tokens, not SEQ_LEN's {seq}{counted}. As before: training.seq_length={real}"
    r.line("PAD_LEN", note=f"dropped: SEQ_LEN {seq} is what the command says", trap=trap if pad < seq else
           trap + f" (needs model.max_position_embeddings of {real} or more)")  # fmt: skip


def _load(r: _Reader) -> None:
    path = r.text("PRETRAIN_CHECKPOINT_PATH").rstrip("/")
    if path == "none":
        r.line("PRETRAIN_CHECKPOINT_PATH", {"tokenizer.type": "SentencePieceTokenizer"}, note="from random weights",
               lost="the tokenizer came from this folder: give tokenizer.tokenizer_model")  # fmt: skip
        return
    became = {"checkpoint.load": path, "checkpoint.finetune": True, "tokenizer.type": "SentencePieceTokenizer",
              "tokenizer.tokenizer_model": f"{path}/tokenizer.model"}  # fmt: skip
    trap = "the script always has --no-load-optim --no-load-rng: to go on with a run it starts Adam and the schedule anew. The same "
    trap += "command of yuan goes on with all of it. Files of the script's own format (release/mp_rank_00) want `yuan convert` first"
    r.line(
        "PRETRAIN_CHECKPOINT_PATH",
        became,
        note="weights alone, from step 0; the tokenizer is read from the same folder",
        trap=trap,
    )


def _output(r: _Reader, what: str) -> None:
    path = f"{r.text('OUTPUT_BASEPATH').rstrip('/')}/llama2_{r.text('MODEL_SIZE').lower()}_{what}"
    trap = "the script's folders bear no date: a second run overwrites the first's checkpoints. yuan goes on with a run, or refuses"
    r.line("OUTPUT_BASEPATH", {"run.dir": path}, trap=trap)


ADAM = {"optimizer.adam_beta1": 0.9, "optimizer.adam_beta2": 0.95, "optimizer.weight_decay": 0.1, "optimizer.clip_grad": 1.0}


def _tokens(r: _Reader, name: str) -> int:
    return int(float(r.text(name).replace("_", "")))


def pretrain(call: Call) -> Migration:
    """run_pretrain_megatron_llama.sh."""
    r = _Reader(call, PRETRAIN)
    _machines(r)
    _model(r)
    batch, seq = r.value("GLOBAL_BATCH_SIZE"), r.value("SEQ_LEN")
    r.line("BATCH_SIZE", {"training.micro_batch_size": r.value("BATCH_SIZE")})
    r.line("GLOBAL_BATCH_SIZE", {"training.global_batch_size": batch})
    r.line("LR", {"optimizer.lr": r.value("LR")})
    r.line("MIN_LR", {"optimizer.min_lr": r.value("MIN_LR")})
    text, pad = r.text("DATASET_PATH"), r.value("PAD_LEN")
    json = bool(re.search(r"\.jsonl?$", text.split(",")[-1]))
    real = pad - 1 if json else pad
    share = f": {100 * real / seq:.1f} % of the tokens that TRAIN_TOKENS asks for" if real < seq else ""
    _length(r, seq if pad == seq else real, share)
    _precision(r)
    _layout(r)
    every, steps = r.value("SAVE_INTERVAL"), _tokens(r, "TRAIN_TOKENS") // (batch * seq)
    note = f"more than the run's {steps} steps: the last alone is saved" if every > steps else ""
    r.line("SAVE_INTERVAL", {"checkpoint.save_interval": every}, note=note)
    _data(r, json)
    _load(r)
    _budget(r, batch * seq)
    _output(r, "pretrain")
    new = r.order.release == NEW
    r.fixed(
        "optimizer", "", ADAM | {"optimizer.lr_decay_style": "linear", "model.init_method_std": 0.006, "training.seed": 1234}
    )
    r.fixed(
        "evaluation", "", {"data.split": "98,2,0", "training.eval_interval": 10000 if new else 100, "training.eval_iters": 10}
    )
    r.fixed("logging", "", {"logging.log_interval": 1})
    return r.done("pretrain", "pretrain", "Continued pretraining of")


def _data(r: _Reader, json: bool) -> None:
    words = [word for word in r.text("DATASET_PATH").split(",") if word]
    if json:
        prefix = re.sub(r"\.jsonl?$", "", words[-1])
        became = {
            "preprocess.input": words[-1],
            "preprocess.output_prefix": prefix,
            "data.data_path": f"{prefix}_text_document",
        }
        r.line("DATASET_PATH", became, lost="text is made into token ids first: `yuan preprocess` with this recipe, from JSON lines "
               "whose key preprocess.json_keys names; the script joined `instruction` and `input` by a template of its own")  # fmt: skip
    elif len(words) == 1:
        r.line("DATASET_PATH", {"data.data_path": words[0]})
    else:
        blend = [number(word) if at % 2 == 0 and NUMBER.fits(word) else word for at, word in enumerate(words)]
        r.line("DATASET_PATH", {"data.data_path": blend}, note="a blend of weights and prefixes")


def _budget(r: _Reader, step: int) -> None:
    """TRAIN_TOKENS and WARMUP_TOKENS, which the script divides by the tokens of a step and rounds down."""
    train, warmup = _tokens(r, "TRAIN_TOKENS"), _tokens(r, "WARMUP_TOKENS")
    for name, value in (("TRAIN_TOKENS", train), ("WARMUP_TOKENS", warmup)):
        place, text = r.words[name]
        if name == "TRAIN_TOKENS" and value < step:
            what = f"argument {place} ({name}) is {text}, less than one step of {step} tokens: the script would train 0 steps"
            raise UserError(what, r.call.place, f"a multiple of {step} tokens: GLOBAL_BATCH_SIZE x SEQ_LEN")
        if name == "WARMUP_TOKENS" and value >= train:
            what = f"argument {place} ({name}) is {text}, and the whole training has {train} tokens"
            raise UserError(what, r.call.place, "a warm-up shorter than TRAIN_TOKENS; are the two swapped?")
    bash = "the script's arithmetic takes plain digits alone: it printed an error and started torchrun without --train-iters"
    plain = {name: bash if not r.text(name).isdigit() else "" for name in ("TRAIN_TOKENS", "WARMUP_TOKENS")}
    r.line("TRAIN_TOKENS", {"training.train_tokens": train}, note=f"{train // step} steps", trap=plain["TRAIN_TOKENS"])
    if 0 < warmup < step:
        trap = f"less than one step of {step} tokens: the script rounded the warm-up down to none. Here it is one step. As before: "
        r.line("WARMUP_TOKENS", {"optimizer.lr_warmup_tokens": step}, note="1 step", trap=trap + "optimizer.lr_warmup_tokens=0")
    else:
        became = {"optimizer.lr_warmup_tokens": warmup} if warmup else {}
        r.line("WARMUP_TOKENS", became, note=f"{warmup // step} steps", trap=plain["WARMUP_TOKENS"])


def finetune(call: Call) -> Migration:
    """run_finetune_megatron_llama.sh."""
    r = _Reader(call, FINETUNE)
    gpus = _machines(r)
    _model(r)
    ranks = r.value("TP") * r.value("PP")
    batch = {"training.micro_batch_size": r.value("BATCH_SIZE")}
    note = ""
    if gpus % ranks == 0:
        batch["training.global_batch_size"] = r.value("BATCH_SIZE") * (gpus // ranks)
        note = f"the script knows no other batch than one micro-batch on each of {gpus // ranks} replicas"
    r.line("BATCH_SIZE", batch, note=note)
    r.line("LR", {"optimizer.lr": r.value("LR")})
    r.line("MIN_LR", {"optimizer.min_lr": r.value("MIN_LR")})
    template = (
        "; its template alone takes some 40, and a sample whose answer falls off gives NaN" if r.value("PAD_LEN") < 256 else ""
    )
    _length(r, r.value("SEQ_LEN") if r.value("PAD_LEN") == r.value("SEQ_LEN") else r.value("PAD_LEN") - 1, template)
    _precision(r)
    _layout(r)
    r.line("TRAIN_DATASET_PATH", {"data.train": r.text("TRAIN_DATASET_PATH")})
    r.line("VALID_DATASET_PATH", {"data.valid": r.text("VALID_DATASET_PATH")})
    _load(r)
    r.line("EPOCH", {"training.epochs": r.value("EPOCH")})
    _output(r, "sft")
    schedule = {"optimizer.lr_decay_style": "cosine", "model.init_method_std": 0.01, "training.seed": 1234}
    r.fixed("optimizer", "", ADAM | schedule, note="without warm-up: with one, optimizer.lr_warmup_fraction=0.03")
    r.fixed("evaluation", "", {"training.eval_interval": 1000, "training.eval_iters": 10})
    r.fixed("logging", "", {"logging.log_interval": 1})
    return r.done("sft", "sft", "Fine-tuning of")


def generate(call: Call) -> Migration:
    """run_text_generation_megatron_llama.sh."""
    r = _Reader(call, GENERATE)
    _checked_sampling(r)
    tp, path = r.value("TP"), r.text("CHECKPOINT_PATH").rstrip("/")
    r.line("ENV", note="dropped: the script does not look at it")
    _model(r)
    trap = f"version 0.5 starts 4 processes whatever TP is: with TP {tp} several answer everything and write the same file"
    r.line("TP", {"parallel.tensor_model_parallel_size": tp, "launch.nproc_per_node": tp}, note="one process per rank",
           trap=trap if r.order.release == OLD and tp != 4 else "")  # fmt: skip
    r.line("CHECKPOINT_PATH", {"generate.load": path, "tokenizer.type": "SentencePieceTokenizer",
                               "tokenizer.tokenizer_model": f"{path}/tokenizer.model"},
           trap="the script wants model_rng.pt in release/, to be copied over by hand; yuan takes a run folder or any of its checkpoints")  # fmt: skip
    r.line("BS", {"generate.batch_size": r.value("BS")})
    seq = r.value("SEQ_LEN")
    r.line("SEQ_LEN", {"training.seq_length": seq, "model.max_position_embeddings": max(4096, seq)},
           trap=f"a prompt is cut to its first {seq} characters, and one whose tokens and answer exceed {seq} ends the whole job; yuan "
           "counts tokens, and gives one error in that line's place")  # fmt: skip
    r.line("PAD_LEN", note="dropped: the script makes no use of it")
    r.line("INPUT_SEQ_LEN", note="dropped: the script makes no use of it")
    _precision(r)
    top_k = r.value("TOP_K")
    r.line("TOP_K", {"generate.top_k": top_k}, note="greedy" if top_k == 1 else "")
    r.line("OUTPUT_SEQ_LEN", {"generate.max_new_tokens": r.value("OUTPUT_SEQ_LEN")})
    r.line("INPUT_FILE", {"generate.input": r.text("INPUT_FILE")})
    r.line("OUTPUT_FILE", {"generate.output": r.text("OUTPUT_FILE")},
           note="one line per prompt; the script wrote prompt and answer together, over several lines")  # fmt: skip
    r.line("TOP_P", {"generate.top_p": r.value("TOP_P")})
    r.line("TEMPERATURE", {"generate.temperature": r.value("TEMPERATURE")})
    penalty = r.value("REPETITION_PENALTY")
    r.line("REPETITION_PENALTY", {"generate.repetition_penalty": penalty}, trap="" if penalty == 1 else
           "the script divides negative logits too, which makes repeated tokens likelier; yuan multiplies them, as Hugging Face does")  # fmt: skip
    r.fixed("seed", "1234", {"generate.seed": 1234})
    return r.done("generate", "generate", "Answers of")


def _checked_sampling(r: _Reader) -> None:
    if r.value("TOP_K") and r.value("TOP_P"):
        (k, _), (p, _) = r.words["TOP_K"], r.words["TOP_P"]
        what = f"arguments {k} (TOP_K) {r.text('TOP_K')} and {p} (TOP_P) {r.text('TOP_P')} exclude each other"
        raise UserError(what, r.call.place, "one of them must be 0")
    if r.value("TEMPERATURE") == 0:
        raise UserError(f"argument {r.words['TEMPERATURE'][0]} (TEMPERATURE) is 0, by which the script divides", r.call.place,
                        "1.0; for the likeliest token always: TOP_K 1")  # fmt: skip
    if r.text("INPUT_FILE") == "none":
        raise UserError(
            f"argument {r.words['INPUT_FILE'][0]} (INPUT_FILE) is none, with which the script does nothing",
            r.call.place,
            "a file of prompts",
        )


def deepspeed(call: Call) -> Migration:
    """run_ds_train_huggingface_llama.sh: Hugging Face's trainer with DeepSpeed."""
    r = _Reader(call, DEEPSPEED)
    gpus, size = _machines(r), r.text("MODEL_SIZE")
    _model(r)
    batch = r.value("BATCH_SIZE") * r.value("GA_STEPS") * gpus
    r.line("BATCH_SIZE", {"training.micro_batch_size": r.value("BATCH_SIZE")})
    r.line(
        "GA_STEPS", {"training.global_batch_size": batch}, note=f"{r.text('BATCH_SIZE')} x {r.text('GA_STEPS')} x {gpus} GPUs"
    )
    r.line("LR", {"optimizer.lr": r.value("LR")})
    seq = r.value("SEQ_LEN")
    r.line("SEQ_LEN", {"training.seq_length": seq, "model.max_position_embeddings": max(4096, seq)})
    _precision(r)
    stages = {"1": "", "2": "stage 2 also shards the gradients, which yuan's distributed optimizer (stage 1) does not",
              "3": "stage 3 also shards gradients and weights, which yuan's distributed optimizer (stage 1) does not"}  # fmt: skip
    more = ": more memory per GPU; where it does not fit, parallel.tensor_model_parallel_size=2 or more"
    lost = stages[r.text("ZERO")]
    r.line("ZERO", {"parallel.use_distributed_optimizer": True}, note="ZeRO-1", lost=lost + more if lost else "")
    full = {
        "parallel.recompute_granularity": "full",
        "parallel.recompute_method": "uniform",
        "parallel.recompute_num_layers": 1,
    }
    r.line("GC", full if r.text("GC") == "true" else {})
    r.line("FLASH", note="dropped: yuan takes fused attention wherever it can", trap="" if r.text_or("FLASH") != "false" else
           "the script takes any word for true: `false` turned flash attention on")  # fmt: skip
    r.line("TRAIN_DATASET_PATH", {"data.train": r.text("TRAIN_DATASET_PATH")},
           trap="the script gives padding a loss, ends no answer and ignores `input`; yuan's loss is of the answer and its end alone")  # fmt: skip
    r.line("VALID_DATASET_PATH", {"data.valid": r.text("VALID_DATASET_PATH")}, trap="the script reads it and never evaluates")
    path = r.text("PRETRAIN_CHECKPOINT_PATH").rstrip("/")
    became = {"convert.source": path, "convert.target": f"{path}-torch_dist", "convert.to": "torch_dist", "checkpoint.load": f"{path}-torch_dist",
              "checkpoint.finetune": True, "tokenizer.type": "SentencePieceTokenizer", "tokenizer.tokenizer_model": f"{path}/tokenizer.model"}  # fmt: skip
    r.line("PRETRAIN_CHECKPOINT_PATH", became, note="Hugging Face's weights are converted first: `yuan convert` with this recipe",
           trap="the script makes the configuration anew: RMSNorm with 1e-6 for Llama-2's 1e-5" + (", and 64 key/value heads for 70B's 8" if size == "70B" else ""))  # fmt: skip
    r.line("EPOCH", {"training.epochs": r.value("EPOCH")})
    _output(r, "sft")
    r.fixed("optimizer", "", ADAM | {"optimizer.lr_decay_style": "constant"}, note="its schedule: no warm-up, a constant rate")
    r.fixed("saving", "500", {"checkpoint.save_interval": 500}, trap="the script saves every 500 steps and not at the end: a short run leaves nothing. "
            "yuan always saves the last step")  # fmt: skip
    migration = r.done("sft", "sft_deepspeed", "Fine-tuning of")
    migration.first = "convert"
    return migration
