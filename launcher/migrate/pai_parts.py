"""What Pai-Megatron-Patch's scripts have in common: machines, model, precision, layout, lengths, checkpoint, output."""

from __future__ import annotations

from typing import Any

from launcher.errors import UserError
from launcher.migrate import pai_traps as traps
from launcher.migrate.command import Call
from launcher.migrate.pai_orders import OLD
from launcher.migrate.positional import NUMBER, Order, number, read
from launcher.migrate.result import Line, Migration

VOCABULARY = 32000
SIZES = {  # layers, hidden size, feed-forward size, heads, key/value heads
    "7B": (32, 4096, 11008, 32, 32), "13B": (40, 5120, 13824, 40, 40), "70B": (80, 8192, 28672, 64, 8),
    "65B": (80, 8192, 22016, 64, 64),
}  # fmt: skip
SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
ARCHITECTURE = {
    "model.position_embedding_type": "rope", "model.normalization": "RMSNorm", "model.norm_epsilon": 1e-5, "model.swiglu": True,
    "model.add_bias_linear": False, "model.untie_embeddings_and_output_weights": True,
}  # fmt: skip
ADAM = {"optimizer.adam_beta1": 0.9, "optimizer.adam_beta2": 0.95, "optimizer.weight_decay": 0.1, "optimizer.clip_grad": 1.0}
FULL_RECOMPUTATION = {
    "parallel.recompute_granularity": "full", "parallel.recompute_method": "uniform", "parallel.recompute_num_layers": 1,
}  # fmt: skip
NEEDED = ("data.data_path", "data.train", "checkpoint.load", "generate.load", "generate.input")


class Reader:
    """The arguments of one command, each becoming one line."""

    def __init__(self, call: Call, orders: list[Order]):
        self.call = call
        self.order, self.words = read(call, orders)
        self.lines: list[Line] = []

    def text(self, name: str) -> str:
        """An argument's value; empty where this order has no such argument."""
        return self.words[name][1] if name in self.words else ""

    def value(self, name: str) -> Any:
        """An argument's value as a number."""
        return number(self.text(name))

    def fault(self, name: str, what: str, fix: str) -> UserError:
        """The error about one argument."""
        place, text = self.words[name]
        return UserError(f"argument {place} ({name}) is {text}{what}", self.call.place, fix)

    def line(self, name: str, became: dict[str, Any] | None = None, note: str = "", trap: str = "", lost: str = "") -> None:
        """What became of an argument; nothing where this order has no such argument."""
        if name in self.words:
            place, value = self.words[name]
            self.lines.append(Line(str(place), name, value, became or {}, note, trap, lost))

    def carry(self, **keys: str) -> None:
        """Arguments that become one key each: BATCH_SIZE="training.micro_batch_size"."""
        for name, key in keys.items():
            self.line(name, {key: self.value(name) if NUMBER.fits(self.text(name)) else self.text(name)})

    def fixed(self, name: str, value: str, became: dict[str, Any], note: str = "", trap: str = "") -> None:
        """What the script adds by itself."""
        self.lines.append(Line("fixed", name, value, became, note, trap))

    def done(self, verb: str, what: str, title: str) -> Migration:
        """The migration, its lines in the order of the arguments."""
        size = self.text("MODEL_SIZE").lower()
        self.lines.sort(key=lambda line: (line.place == "fixed", int(line.place) if line.place.isdigit() else 0))
        origin = f"{self.call.basename}: {len(self.words)} arguments in the order of {self.order.release}"
        done = Migration(
            verb, f"pai_llama2_{size}_{what}", f"{title} Llama-2 {size.upper()}", origin, self.call.text, self.lines
        )
        values = done.values
        gpus = values.get("launch.nproc_per_node", 1) * values.get("launch.nnodes", 1)
        paths = [str(values[key]) for key in NEEDED if values.get(key)]
        done.needs = ", ".join([f"{gpus} GPU{'s' * (gpus > 1)}", *paths])
        return done


def machines(r: Reader) -> int:
    """ENV: dsw is one machine with 8 GPUs, dlc what the cluster's environment says. Returns the number of GPUs."""
    if r.text("ENV") == "dsw":
        became = {"launch.nnodes": 1, "launch.nproc_per_node": 8}
        r.line("ENV", became, note="the script takes 8 GPUs, whatever the machine has")
        return 8
    known = r.call.variables
    nodes, gpus, rank = (known.get(name, "") for name in ("WORLD_SIZE", "KUBERNETES_CONTAINER_RESOURCE_GPU", "RANK"))
    lost = ""
    if not (nodes.isdigit() and gpus.isdigit()):
        lost = "machines and GPUs come from the cluster's environment (WORLD_SIZE is the number of machines): give "
        lost += "launch.nnodes, launch.nproc_per_node, launch.node_rank and launch.rdzv_endpoint"
    became = {
        "launch.nnodes": int(nodes) if nodes.isdigit() else 1,
        "launch.nproc_per_node": int(gpus) if gpus.isdigit() else 8,
    }
    if rank.isdigit():
        became["launch.node_rank"] = int(rank)
    if known.get("MASTER_ADDR"):
        became["launch.rdzv_endpoint"] = f"{known['MASTER_ADDR']}:{known.get('MASTER_PORT', '29500')}"
    r.line("ENV", became, lost=lost)
    return became["launch.nnodes"] * became["launch.nproc_per_node"]


def model(r: Reader, dropout_was: str = "0") -> None:
    """The shape of MODEL_SIZE, Llama's architecture, and the vocabulary with its EXTRA_VOCAB_SIZE rows."""
    for name in ("MEGATRON_PATH", "MEGATRON_PATCH_PATH"):
        r.line(name, note="dropped: yuan brings megatron-core with it")
    size = r.text("MODEL_SIZE")
    r.line("MODEL_SIZE", {"model.family": "llama"} | {f"model.{name}": value for name, value in zip(SHAPE, SIZES[size])})
    _vocabulary(r)
    r.fixed("architecture", "Llama-2", ARCHITECTURE)
    without = {"model.attention_dropout": 0.0, "model.hidden_dropout": 0.0}
    r.fixed("dropout", dropout_was, without, trap=traps.DROPOUT if dropout_was != "0" else "")


def _vocabulary(r: Reader) -> None:
    extra, tp = int(r.text("EXTRA_VOCAB_SIZE") or 0), int(r.text("TP") or 1)
    rows = VOCABULARY + extra
    if extra and rows % tp:
        what = f": {VOCABULARY} + {extra} rows of the vocabulary cannot be shared out over {tp} tensor-parallel ranks"
        raise r.fault("EXTRA_VOCAB_SIZE", what, f"such as {extra + tp - rows % tp}")
    padding = {"tokenizer.vocab_size": VOCABULARY, "model.make_vocab_size_divisible_by": rows // tp if extra else 1}
    if "EXTRA_VOCAB_SIZE" not in r.words:
        r.fixed("vocabulary", str(VOCABULARY), padding)
        return
    trap = traps.PADDING_TOKEN if not extra and r.order.release == OLD else ""
    r.line("EXTRA_VOCAB_SIZE", padding, note=f"{rows} rows", trap=trap)


def precision(r: Reader) -> None:
    """PR."""
    lost = "FP8 is missing: the recipe trains in bf16" if r.text("PR") == "fp8" else ""
    r.line("PR", {"training.precision": "bf16" if lost else r.text("PR")}, lost=lost)


def layout(r: Reader) -> None:
    """TP, PP, AC, DO, FL, TE and SP."""
    r.line("TP", {"parallel.tensor_model_parallel_size": r.value("TP")})
    r.line("PP", {"parallel.pipeline_model_parallel_size": r.value("PP")})
    modes = {"sel": {"parallel.recompute_granularity": "selective"}, "full": FULL_RECOMPUTATION, "none": {}}
    r.line("AC", modes[r.text("AC")], note="nothing is recomputed" if r.text("AC") == "none" else "")
    sharded = r.text("DO") == "true"
    r.line("DO", {"parallel.use_distributed_optimizer": sharded}, trap="" if sharded else traps.NAMES_OF_FILES)
    r.line("FL", note="dropped: yuan takes fused attention wherever it can")
    r.line("TE", note="dropped: yuan has one engine, megatron-core's models")
    if r.text("SP") == "true" and r.value("TP") == 1:
        r.line("SP", note="dropped without a word by the script: with TP 1 there is nothing to split")
    else:
        r.line("SP", {"parallel.sequence_parallel": r.text("SP") == "true"})


def length(r: Reader, real: int, counted: str) -> None:
    """SEQ_LEN and PAD_LEN: the script says the one and trains with the other, on samples of `real` tokens."""
    seq = r.value("SEQ_LEN")
    positions(r)
    if real == seq:
        r.line("PAD_LEN", note="dropped: there is one length, training.seq_length")
        return
    trap = traps.PAD_LEN.format(real=real, seq=seq, counted=counted)
    r.line("PAD_LEN", note=f"dropped: SEQ_LEN {seq} is what the command says", trap=trap)


def positions(r: Reader, trap: str = "") -> None:
    """SEQ_LEN. With RoPE the number of positions is a limit and no weight."""
    seq = r.value("SEQ_LEN")
    became = {"training.seq_length": seq, "model.max_position_embeddings": max(4096, seq)}
    r.line("SEQ_LEN", became, note="Llama-2 has 4096 positions", trap=trap)


def load(r: Reader) -> None:
    """PRETRAIN_CHECKPOINT_PATH, from which the tokenizer is read as well."""
    path = r.text("PRETRAIN_CHECKPOINT_PATH").rstrip("/")
    became = {"tokenizer.type": "SentencePieceTokenizer"}
    if path == "none":
        lost = "the tokenizer came from this folder: give tokenizer.tokenizer_model"
        r.line("PRETRAIN_CHECKPOINT_PATH", became, note="from random weights", lost=lost)
        return
    became |= {"checkpoint.load": path, "checkpoint.finetune": True, "tokenizer.tokenizer_model": f"{path}/tokenizer.model"}
    note = "weights alone, from step 0; the tokenizer is read from the same folder"
    r.line("PRETRAIN_CHECKPOINT_PATH", became, note=note, trap=traps.ALWAYS_ANEW)


def output(r: Reader, what: str, to_hf: bool = False) -> None:
    """OUTPUT_BASEPATH: the run's folder is one below it, and beside that, with `to_hf`, what it comes to in Hugging Face's format."""
    path = f"{r.text('OUTPUT_BASEPATH').rstrip('/')}/llama2_{r.text('MODEL_SIZE').lower()}_{what}"
    r.line("OUTPUT_BASEPATH", {"run.dir": path} | ({"checkpoint.export_hf": f"{path}_hf"} if to_hf else {}), trap=traps.SAME_FOLDER)
