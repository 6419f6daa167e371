"""Pai-Megatron-Patch's scripts for Llama-2: their positional arguments and what the scripts add by themselves."""

from __future__ import annotations

import re

from launcher.errors import UserError
from launcher.migrate import pai_traps as traps
from launcher.migrate.command import Call
from launcher.migrate.pai_orders import (
    DEEPSPEED,
    FINETUNE,
    GENERATE,
    NEW,
    OLD,
    PRETRAIN,
)
from launcher.migrate.pai_parts import (
    ADAM,
    FULL_RECOMPUTATION,
    Reader,
    layout,
    length,
    load,
    machines,
    model,
    output,
    positions,
    precision,
)  # fmt: skip
from launcher.migrate.positional import NUMBER, number
from launcher.migrate.result import Migration

UNUSED = "dropped: the script makes no use of it"
FUSED = "dropped: yuan takes fused attention wherever it can"
ZERO_IN_FP16 = (
    "in fp16 stage 1 alone: gradients and weights are not shared out, which takes more memory per GPU; in bf16, parallel.zero={}"
)
FROM_TEXT = (
    "text is made into token ids first: `yuan preprocess` with this recipe, from JSON lines whose key preprocess.json_keys "
    "names; the script joined `instruction` and `input` by a template of its own"
)


def pretrain(call: Call) -> Migration:
    """run_pretrain_megatron_llama.sh."""
    r = Reader(call, PRETRAIN)
    machines(r)
    model(r, dropout_was="0.1")
    step = r.value("GLOBAL_BATCH_SIZE") * r.value("SEQ_LEN")
    r.carry(BATCH_SIZE="training.micro_batch_size", GLOBAL_BATCH_SIZE="training.global_batch_size", LR="optimizer.lr")
    r.carry(MIN_LR="optimizer.min_lr")
    _data_and_length(r)
    precision(r)
    layout(r)
    _budget(r, step)
    load(r)
    output(r, "pretrain")
    r.fixed(
        "optimizer", "", ADAM | {"optimizer.lr_decay_style": "linear", "model.init_method_std": 0.006, "training.seed": 1234}
    )
    every = 10000 if r.order.release == NEW else 100
    r.fixed("evaluation", "", {"data.split": "98,2,0", "training.eval_interval": every, "training.eval_iters": 10})
    r.fixed("logging", "", {"logging.log_interval": 1})
    return r.done("pretrain", "pretrain", "Continued pretraining of")


def _data_and_length(r: Reader) -> None:
    """DATASET_PATH, SEQ_LEN and PAD_LEN. Of text in JSON one token of PAD_LEN is lost to the shift of the labels."""
    words = [word for word in r.text("DATASET_PATH").split(",") if word]
    json = bool(re.search(r"\.jsonl?$", words[-1]))
    seq, pad = r.value("SEQ_LEN"), r.value("PAD_LEN")
    real = seq if pad == seq else pad - json
    share = f": {100 * real / seq:.1f} % of the tokens that TRAIN_TOKENS asks for" if real < seq else ""
    length(r, real, share)
    if json:
        prefix = re.sub(r"\.jsonl?$", "", words[-1])
        became = {
            "preprocess.input": words[-1],
            "preprocess.output_prefix": prefix,
            "data.data_path": f"{prefix}_text_document",
        }
        r.line("DATASET_PATH", became, lost=FROM_TEXT)
    elif len(words) == 1:
        r.line("DATASET_PATH", {"data.data_path": words[0]})
    else:
        blend = [number(word) if at % 2 == 0 and NUMBER.fits(word) else word for at, word in enumerate(words)]
        r.line("DATASET_PATH", {"data.data_path": blend}, note="a blend of weights and prefixes")


def _budget(r: Reader, step: int) -> None:
    """TRAIN_TOKENS and WARMUP_TOKENS, which the script divides by the tokens of a step and rounds down; SAVE_INTERVAL."""
    train, warmup = (int(float(r.text(name).replace("_", ""))) for name in ("TRAIN_TOKENS", "WARMUP_TOKENS"))
    if train < step:
        what = f", less than one step of {step} tokens: the script would train 0 steps"
        raise r.fault("TRAIN_TOKENS", what, f"a multiple of {step} tokens: GLOBAL_BATCH_SIZE x SEQ_LEN")
    if warmup >= train:
        what = f", and the whole training has {train} tokens"
        raise r.fault("WARMUP_TOKENS", what, "a warm-up shorter than TRAIN_TOKENS; are the two swapped?")
    bash = {name: "" if r.text(name).isdigit() else traps.BASH_ARITHMETIC for name in ("TRAIN_TOKENS", "WARMUP_TOKENS")}
    r.line("TRAIN_TOKENS", {"training.train_tokens": train}, note=f"{train // step} steps", trap=bash["TRAIN_TOKENS"])
    if 0 < warmup < step:
        r.line("WARMUP_TOKENS", {"optimizer.lr_warmup_tokens": step}, note="1 step", trap=traps.WARMUP.format(step=step))
    else:
        became = {"optimizer.lr_warmup_tokens": warmup} if warmup else {}
        r.line("WARMUP_TOKENS", became, note=f"{warmup // step} steps", trap=bash["WARMUP_TOKENS"])
    every = r.value("SAVE_INTERVAL")
    note = f"more than the run's {train // step} steps: the last alone is saved" if every > train // step else ""
    r.line("SAVE_INTERVAL", {"checkpoint.save_interval": every}, note=note)


def finetune(call: Call) -> Migration:
    """run_finetune_megatron_llama.sh."""
    r = Reader(call, FINETUNE)
    gpus = machines(r)
    model(r, dropout_was="0.1")
    ranks, batch = r.value("TP") * r.value("PP"), {"training.micro_batch_size": r.value("BATCH_SIZE")}
    if gpus % ranks == 0:
        batch["training.global_batch_size"] = r.value("BATCH_SIZE") * (gpus // ranks)
    r.line("BATCH_SIZE", batch, note="the script knows no other batch than one micro-batch on each replica")
    r.carry(LR="optimizer.lr", MIN_LR="optimizer.min_lr", TRAIN_DATASET_PATH="data.train", VALID_DATASET_PATH="data.valid")
    r.carry(EPOCH="training.epochs")
    seq, pad = r.value("SEQ_LEN"), r.value("PAD_LEN")
    length(r, seq if pad == seq else pad - 1, traps.PAD_LEN_OF_ANSWERS if pad < 256 else "")
    precision(r)
    layout(r)
    load(r)
    output(r, "sft")
    r.fixed("template", "Alpaca", {"tokenizer.chat_template": "alpaca"}, note="its preamble, and headings before question and answer")
    schedule = {"optimizer.lr_decay_style": "cosine", "model.init_method_std": 0.01, "training.seed": 1234}
    r.fixed("optimizer", "", ADAM | schedule, note="without warm-up: with one, optimizer.lr_warmup_fraction=0.03")
    r.fixed("evaluation", "", {"training.eval_interval": 1000, "training.eval_iters": 10})
    r.fixed("logging", "", {"logging.log_interval": 1})
    return r.done("sft", "sft", "Fine-tuning of")


def generate(call: Call) -> Migration:
    """run_text_generation_megatron_llama.sh."""
    r = Reader(call, GENERATE)
    _check_sampling(r)
    tp, path = r.value("TP"), r.text("CHECKPOINT_PATH").rstrip("/")
    r.line("ENV", note="dropped: the script does not look at it")
    model(r)
    ranks = {"parallel.tensor_model_parallel_size": tp, "launch.nproc_per_node": tp}
    several = r.order.release == OLD and tp != 4
    r.line("TP", ranks, note="one process per rank", trap=traps.FOUR_PROCESSES.format(tp=tp) if several else "")
    tokenizer = {"tokenizer.type": "SentencePieceTokenizer", "tokenizer.tokenizer_model": f"{path}/tokenizer.model"}
    r.line("CHECKPOINT_PATH", {"generate.load": path} | tokenizer, trap=traps.COPY_BY_HAND)
    positions(r, traps.SEQ_LEN_OF_PROMPTS.format(seq=r.value("SEQ_LEN")))
    r.line("PAD_LEN", note=UNUSED)
    r.line("INPUT_SEQ_LEN", note=UNUSED)
    precision(r)
    r.carry(BS="generate.batch_size", OUTPUT_SEQ_LEN="generate.max_new_tokens", INPUT_FILE="generate.input")
    r.carry(TOP_P="generate.top_p", TEMPERATURE="generate.temperature")
    r.line("TOP_K", {"generate.top_k": r.value("TOP_K")}, note="greedy" if r.value("TOP_K") == 1 else "")
    note = "one line per prompt; the script wrote prompt and answer together, over several lines"
    r.line("OUTPUT_FILE", {"generate.output": r.text("OUTPUT_FILE")}, note=note)
    penalty = r.value("REPETITION_PENALTY")
    r.line("REPETITION_PENALTY", {"generate.repetition_penalty": penalty}, trap=traps.REPEATED_TOKENS if penalty != 1 else "")
    r.fixed("seed", "1234", {"generate.seed": 1234})
    return r.done("generate", "generate", "Answers of")


def _check_sampling(r: Reader) -> None:
    if r.value("TOP_K") and r.value("TOP_P"):
        (k, top_k), (p, top_p) = r.words["TOP_K"], r.words["TOP_P"]
        what = f"arguments {k} (TOP_K) {top_k} and {p} (TOP_P) {top_p} exclude each other"
        raise UserError(what, r.call.place, "one of them must be 0")
    if r.value("TEMPERATURE") == 0:
        raise r.fault("TEMPERATURE", ", by which the script divides", "1.0; for the likeliest token always: TOP_K 1")
    if r.text("INPUT_FILE") == "none":
        raise r.fault("INPUT_FILE", ", with which the script does nothing", "a file of prompts")


def deepspeed(call: Call) -> Migration:
    """run_ds_train_huggingface_llama.sh: Hugging Face's trainer with DeepSpeed."""
    r = Reader(call, DEEPSPEED)
    gpus = machines(r)
    model(r)
    batch = r.value("BATCH_SIZE") * r.value("GA_STEPS") * gpus
    factors = f"{r.text('BATCH_SIZE')} x {r.text('GA_STEPS')} x {gpus} GPUs"
    r.line("GA_STEPS", {"training.global_batch_size": batch}, note=factors)
    r.carry(BATCH_SIZE="training.micro_batch_size", LR="optimizer.lr", EPOCH="training.epochs")
    positions(r)
    precision(r)
    stage, in_fp16 = int(r.text("ZERO")), r.text("PR") == "fp16"
    lost = ZERO_IN_FP16.format(stage) if in_fp16 and stage > 1 else ""
    r.line("ZERO", {"parallel.zero": 1 if lost else stage}, lost=lost)
    r.line("GC", FULL_RECOMPUTATION if r.text("GC") == "true" else {})
    r.line("FLASH", note=FUSED, trap=traps.FLASH_FALSE if r.text("FLASH") == "false" else "")
    r.line("TRAIN_DATASET_PATH", {"data.train": r.text("TRAIN_DATASET_PATH")}, trap=traps.LOSS_OF_PADDING)
    r.line("VALID_DATASET_PATH", {"data.valid": r.text("VALID_DATASET_PATH")}, trap=traps.NEVER_EVALUATES)
    _load_hugging_face(r)
    output(r, "sft", to_hf=True)
    r.fixed("optimizer", "", ADAM | {"optimizer.lr_decay_style": "constant"}, note="its schedule: no warm-up, a constant rate")
    note = "its rows have no template; here the answer follows the question on a line of its own, and an input is read too"
    r.fixed("template", "none", {"tokenizer.chat_template": "plain"}, note=note)
    r.fixed("saving", "500", {"checkpoint.save_interval": 500}, trap=traps.SAVES_NOTHING)
    return r.done("sft", "sft_deepspeed", "Fine-tuning of")


def _load_hugging_face(r: Reader) -> None:
    """PRETRAIN_CHECKPOINT_PATH in Hugging Face's format, and the way back to it."""
    path = r.text("PRETRAIN_CHECKPOINT_PATH").rstrip("/")
    became = {"checkpoint.load": path, "checkpoint.finetune": True}
    became |= {"tokenizer.type": "SentencePieceTokenizer", "tokenizer.tokenizer_model": f"{path}/tokenizer.model"}
    trap = traps.NEW_CONFIGURATION + (traps.HEADS_OF_70B if r.text("MODEL_SIZE") == "70B" else "")
    r.line("PRETRAIN_CHECKPOINT_PATH", became, note="Hugging Face's folder, as it is", trap=trap)
