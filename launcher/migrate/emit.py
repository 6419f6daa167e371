"""A recipe as Megatron-LM's command line: the way back."""

from __future__ import annotations

import math
import re
import shlex
from typing import Any

from launcher.errors import UserError
from launcher.migrate.flags import flags, kind_of
from launcher.migrate.together import YUAN_FIXED
from launcher.recipe.keys import table as keys
from launcher.recipe.load import Loaded
from launcher.recipe.pipeline import LayoutError, parse_layout
from launcher.recipe.schema import Recipe

# Always said: Megatron-LM asks for them, or has no default.
ALWAYS = {"model.max_position_embeddings", "tokenizer.type", "run.dir", "parallel.tensor_model_parallel_size",
          "parallel.pipeline_model_parallel_size"}  # fmt: skip
# Derived here as Megatron-LM derives it, so that saying it is of no use.
DERIVED_ALIKE = {"model.ffn_hidden_size", "model.kv_channels", "training.global_batch_size", "data.split", "data.num_workers",
                 "tokenizer.vocab_size", "model.num_query_groups"}  # fmt: skip
SAID_OTHERWISE = {"model.family", "model.add_bias_linear", "training.precision", "training.train_tokens",
                  "run.name", "logging.tensorboard", "parallel.zero",
                  "optimizer.lr_decay_tokens", "optimizer.lr_warmup_tokens", "optimizer.lr_wsd_decay_tokens"}  # fmt: skip
OF_TRAINING = ("model.", "parallel.", "training.", "optimizer.", "lora.", "data.", "tokenizer.", "checkpoint.", "logging.")
OF_THE_FORK = {
    "--attention-dropout",
    "--attention-backend",
    *(f"--{key.split('.')[1].replace('_', '-')}" for key in YUAN_FIXED),
}  # said otherwise, or fixed
WIDTH = 110

Words = list[str]


def as_megatron(loaded: Loaded, everything: bool = False) -> list[str]:
    """The lines of the `torchrun pretrain_gpt.py` command that trains what a recipe trains, quoted for a shell.

    Args:
        loaded: a recipe for pretraining.
        everything: defaults and what Megatron-LM derives alike as well.

    Raises:
        UserError: it describes no training.
    """
    recipe = loaded.recipe
    if recipe.model.num_layers is None:
        raise UserError(f"{loaded.name} describes no model to train", "--as megatron", "name a recipe for pretraining")
    if recipe.data.train is not None or recipe.training.epochs is not None:
        what = f"{loaded.name} is for fine-tuning on questions and answers, which pretrain_gpt.py does not do"
        raise UserError(what, "data.train, training.epochs", "name a recipe for pretraining")
    groups = {"torchrun": launcher_of(recipe), **flags_of(loaded, everything)}
    script = "pretrain_yuan.py" if recipe.model.family == "yuan2" else "pretrain_gpt.py"
    lines = [f"# {loaded.name}, for Megatron-LM core_v0.16.1"]
    lines += [f"# {text}" for text in remarks(loaded)]
    launcher = groups.pop("torchrun")
    # Megatron-LM refuses TP > 1 without it: communication is to start in the order in which it was asked for.
    environment = ["CUDA_DEVICE_MAX_CONNECTIONS=1"] if recipe.parallel.tensor_model_parallel_size > 1 else []
    body = [shlex.join([*environment, "torchrun", *launcher, script])]
    for words in groups.values():
        body += _wrapped(words)
    return lines + [" \\\n    ".join(body)]


def _wrapped(words: list[Words]) -> list[str]:
    rows: list[str] = []
    for one in words:
        text = shlex.join(one)
        if rows and len(rows[-1]) + len(text) < WIDTH:
            rows[-1] += " " + text
        else:
            rows.append(text)
    return rows


def launcher_of(recipe: Recipe) -> Words:
    """torchrun's own options, from `launch`."""
    spec = recipe.launch
    words = ["--nproc_per_node", str(spec.nproc_per_node), "--nnodes", str(spec.nnodes)]
    if spec.nnodes > 1:
        host, _, port = (spec.rdzv_endpoint or "HOST_OF_NODE_0:29500").rpartition(":")
        words += ["--node_rank", str(spec.node_rank), "--master_addr", host, "--master_port", port]
    if spec.max_restarts:
        words += ["--max_restarts", str(spec.max_restarts)]
    return words


def flags_of(loaded: Loaded, everything: bool = False) -> dict[str, list[Words]]:
    """Each group's flags with their words: {"model": [["--num-layers", "24"], …], …}."""
    recipe, found = loaded.recipe, {}
    for name, flag in flags().items():
        group, leaf = flag.key.split(".")
        value = getattr(getattr(recipe, group), leaf)
        if flag.key == "training.train_samples" and recipe.training.train_tokens is not None:
            value = recipe.training.train_tokens // (recipe.training.seq_length or 1)
        if flag.key == "checkpoint.save_interval" and value is None:
            value = recipe.derived.train_iters  # Megatron-LM wants one beside --save: the end alone is saved
        words = _words(flag.key, name, value, loaded, everything)
        if words:
            found.setdefault("checkpoint" if group == "run" else group, []).append(words)
    model, training = found.setdefault("model", []), found.setdefault("training", [])
    if not recipe.model.add_bias_linear:
        model.append(["--disable-bias-linear"])
    if not (recipe.model.swiglu or recipe.model.openai_gelu):
        model.append(["--no-bias-gelu-fusion"])
    if recipe.training.precision != "fp32":
        training.append([f"--{recipe.training.precision}"])
    if (recipe.parallel.zero or 0) >= 2:
        sharded = ["--use-torch-fsdp2"] + ["--torch-fsdp2-no-reshard-after-forward"] * (recipe.parallel.zero == 2)
        found.setdefault("parallel", []).append(sharded)
    if recipe.optimizer.optimizer_cpu_offload:
        found["optimizer"].append(["--use-precision-aware-optimizer"])  # Megatron-LM asks for both
    if recipe.checkpoint.load is None and recipe.run.dir:
        found.setdefault("checkpoint", []).append(["--load", recipe.run.dir])
    return _as_yuan(found, recipe) if recipe.model.family == "yuan2" else found


def _words(key: str, name: str, value: Any, loaded: Loaded, everything: bool) -> Words:
    source = loaded.sources[key]
    if value is None or value is False or key == "model.openai_gelu":  # Megatron-LM's fused kernel computes that by itself
        return []
    if not everything and key not in ALWAYS:
        alike = source == "derived" and (key in DERIVED_ALIKE or _is_whole_decay(key, loaded.recipe))
        if alike or (source == "default" and value == keys()[key].default):
            return []
    if key == "model.num_query_groups":
        return ["--group-query-attention", name, str(value)]
    if key == "tokenizer.vocab_size" and loaded.recipe.tokenizer.type != "NullTokenizer":
        return []
    if kind_of(key) == "on":
        return [name]
    if key == "training.exit_duration_in_mins":
        value = math.ceil(value)
    return [name, *(map(_text, value) if isinstance(value, (list, tuple)) else [_text(value)])]


def _is_whole_decay(key: str, recipe: Recipe) -> bool:
    return key in ("optimizer.lr_decay_iters", "optimizer.lr_decay_samples") and recipe.optimizer.lr_decay_tokens is None


def _text(value: Any) -> str:
    """A number as argparse reads it back: 10.0 minutes are 10."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e16 else str(value)


def _as_yuan(found: dict[str, list[Words]], recipe: Recipe) -> dict[str, list[Words]]:
    """The spelling of Yuan 2.0's fork, which is older than Megatron-LM's flags of today."""
    tokenizer, stages = recipe.tokenizer.tokenizer_model or "", _blocks(recipe)
    changed: dict[str, list[Words]] = {}
    for group, all_words in found.items():
        for words in all_words:
            if words[0] == "--normalization":
                words = ["--norm-dtype", *words[1:]]
            elif words[0] == "--tokenizer-model" and recipe.tokenizer.type == "YuanTokenizer":
                words = ["--tokenizer-model-path", tokenizer.removesuffix("/tokenizer.model")]
            elif words[0] == "--pipeline-model-parallel-layout" and stages:
                words = ["--pipeline-model-parallel-method", "block", "--pipeline-model-parallel-blocks", stages]
            elif words[0] in OF_THE_FORK or (
                words[0] == "--ffn-hidden-size" and int(words[1]) == 4 * (recipe.model.hidden_size or 0)
            ):
                continue
            changed.setdefault(group, []).append(words)
    dropout = ["--use-flash-attn", "--flash-attn-drop", _text(recipe.model.attention_dropout), "--attention-dropout", "0"]
    changed["model"] += [["--use-lf-gate"], ["--lf-conv2d-group", "1"], ["--lf-conv2d-num-pad", "1"], dropout]
    return changed


def _blocks(recipe: Recipe) -> str:
    """Layers per stage as the fork writes them; empty where the layout is none of whole stages."""
    try:
        stages = parse_layout(recipe.parallel.pipeline_model_parallel_layout or "")
    except LayoutError:
        return ""
    layers = ["".join(stage).strip("EL") for stage in stages]
    return ",".join(str(len(one)) for one in layers) if all(re.fullmatch("t*", one) for one in layers) else ""


def remarks(loaded: Loaded) -> list[str]:
    """What the command does not say: keys without a flag, and where Megatron-LM does otherwise."""
    recipe, sources = loaded.recipe, loaded.sources
    texts = []
    if recipe.model.family == "yuan2":
        texts.append(
            "Megatron-LM has no filtered attention: --use-lf-gate and kin are flags of Yuan 2.0's own fork, and so is the script"
        )
    if recipe.derived.device == "cpu":
        texts.append("Megatron-LM needs GPUs; this recipe was resolved for a CPU. For GPUs add launch.device=cuda")
    if recipe.launch.kind == "slurm":
        texts.append("launch.kind=slurm: start this on every machine, with its own --node_rank")
    expressed = {flag.key for flag in flags().values()} | SAID_OTHERWISE
    for key, source in sources.items():
        group, leaf = key.split(".")
        if source in ("default", "derived") or key in expressed or not key.startswith(OF_TRAINING):
            continue
        texts.append(f"no flag in Megatron-LM: {key}={getattr(getattr(recipe, group), leaf)}")
    if recipe.training.exit_duration_in_mins is not None and recipe.training.exit_duration_in_mins % 1:
        texts.append("Megatron-LM counts whole minutes: training.exit_duration_in_mins is rounded up")
    if recipe.training.train_tokens is not None:
        texts.append(f"training.train_tokens={recipe.training.train_tokens} as samples of {recipe.training.seq_length} tokens")
    return texts
