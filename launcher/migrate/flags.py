"""Megatron-LM's command line and a recipe's keys: the one table, read in both directions.

The names are those of Megatron-LM core_v0.16.1's arguments; `SPELLINGS` has older ones and those of Yuan 2.0's fork.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

from launcher.recipe.keys import table as keys

# Keys whose flag is their last part with dashes: model.num_layers, --num-layers. A key that is true or false has a flag
# without a value that turns it on; lists and data paths take several words.
SAME_NAME = """
    model.num_layers model.hidden_size model.ffn_hidden_size model.num_attention_heads model.kv_channels
    model.max_position_embeddings model.position_embedding_type model.rotary_base model.rotary_percent model.normalization
    model.use_rope_scaling model.rope_scaling_factor model.openai_gelu model.norm_epsilon model.swiglu model.add_qkv_bias model.untie_embeddings_and_output_weights model.init_method_std
    model.attention_dropout model.hidden_dropout model.attention_backend model.attention_softmax_in_fp32 model.make_vocab_size_divisible_by
    parallel.tensor_model_parallel_size parallel.pipeline_model_parallel_size parallel.pipeline_model_parallel_layout
    parallel.num_layers_per_virtual_pipeline_stage parallel.decoder_first_pipeline_num_layers
    parallel.decoder_last_pipeline_num_layers parallel.sequence_parallel parallel.use_distributed_optimizer
    parallel.overlap_grad_reduce parallel.overlap_param_gather parallel.recompute_granularity parallel.recompute_method
    parallel.recompute_num_layers parallel.cpu_offloading_num_layers parallel.distributed_timeout_minutes
    training.seq_length training.micro_batch_size training.global_batch_size training.rampup_batch_size training.train_iters
    training.train_samples training.seed training.loss_scale training.initial_loss_scale training.min_loss_scale
    training.loss_scale_window training.hysteresis training.eval_interval training.eval_iters training.exit_duration_in_mins
    training.exit_interval
    optimizer.optimizer optimizer.lr optimizer.min_lr optimizer.lr_decay_style optimizer.lr_decay_iters
    optimizer.lr_decay_samples optimizer.lr_warmup_iters optimizer.lr_warmup_samples optimizer.lr_warmup_fraction
    optimizer.lr_warmup_init optimizer.lr_wsd_decay_style optimizer.lr_wsd_decay_iters optimizer.lr_wsd_decay_samples
    optimizer.weight_decay optimizer.start_weight_decay optimizer.end_weight_decay optimizer.weight_decay_incr_style
    optimizer.clip_grad optimizer.adam_beta1 optimizer.adam_beta2 optimizer.adam_eps
    optimizer.optimizer_cpu_offload optimizer.optimizer_offload_fraction optimizer.overlap_cpu_optimizer_d2h_h2d
    data.data_path data.split data.train_data_path data.valid_data_path data.test_data_path data.reset_position_ids
    data.reset_attention_mask data.eod_mask_loss data.num_workers data.data_cache_path
    tokenizer.tokenizer_model tokenizer.vocab_file tokenizer.merge_file tokenizer.vocab_size
    tokenizer.tokenizer_hf_include_special_tokens tokenizer.tiktoken_pattern tokenizer.tiktoken_num_special_tokens
    checkpoint.save_interval checkpoint.finetune checkpoint.no_load_optim checkpoint.no_load_rng
    logging.log_interval
"""
OTHER_NAME = {
    "model.num_query_groups": "--num-query-groups",  # together with --group-query-attention
    "tokenizer.type": "--tokenizer-type",
    "checkpoint.format": "--ckpt-format",
    "checkpoint.load": "--load",
    "run.dir": "--save",
}
PREPROCESS = {
    "--input": "preprocess.input", "--output-prefix": "preprocess.output_prefix", "--json-keys": "preprocess.json_keys",
    "--append-eod": "preprocess.append_eod", "--workers": "preprocess.workers",
}  # fmt: skip
SERVER = {
    "--port": "serve.port", "--host": "serve.host", "--temperature": "generate.temperature", "--top_p": "generate.top_p",
    "--top_k": "generate.top_k", "--top-p": "generate.top_p", "--top-k": "generate.top_k",
    "--out-seq-length": "generate.max_new_tokens",
    "--repetition-penalty": "generate.repetition_penalty", "--load": "generate.load", "--seed": "generate.seed",
    "--inference-max-requests": "generate.batch_size", "--inference-max-batch-size": "generate.batch_size",
}  # fmt: skip
TORCHRUN = {"nproc_per_node": "launch.nproc_per_node", "nnodes": "launch.nnodes", "node_rank": "launch.node_rank",
            "max_restarts": "launch.max_restarts", "rdzv_endpoint": "launch.rdzv_endpoint"}  # fmt: skip

TOKENS = {  # of forks that count in tokens
    "--train-tokens": "training.train_tokens", "--lr-decay-tokens": "optimizer.lr_decay_tokens",
    "--lr-warmup-tokens": "optimizer.lr_warmup_tokens",
}  # fmt: skip

# Flags that stand for fixed values of keys.
MEANS: dict[str, dict[str, Any]] = {
    "--bf16": {"training.precision": "bf16"},
    "--fp16": {"training.precision": "fp16"},
    "--disable-bias-linear": {"model.add_bias_linear": False},
    "--recompute-activations": {"parallel.recompute_granularity": "selective"},
    "--checkpoint-activations": {
        "parallel.recompute_granularity": "full", "parallel.recompute_method": "uniform", "parallel.recompute_num_layers": 1,
    },
    "--use-rotary-position-embeddings": {"model.position_embedding_type": "rope"},
    "--use-llama2-rotary-position-embeddings": {"model.position_embedding_type": "rope"},
    "--use-dist-ckpt": {"checkpoint.format": "torch_dist"},
    "--use-lf-gate": {"model.family": "yuan2"},
    "--use-torch-fsdp2": {"parallel.zero": 3},
    "--torch-fsdp2-no-reshard-after-forward": {"parallel.zero": 2},
}  # fmt: skip
# Older names, and those of Yuan 2.0's and Pai's forks, with the name of today.
SPELLINGS = {
    "--batch-size": "--micro-batch-size", "--model-parallel-size": "--tensor-model-parallel-size",
    "--warmup": "--lr-warmup-fraction", "--layernorm-epsilon": "--norm-epsilon", "--n-head-kv": "--num-query-groups",
    "--norm-dtype": "--normalization", "--tokenizer-model-path": "--tokenizer-model",
    "--persistent-save-interval": "--save-interval",
    "--activations-checkpoint-method": "--recompute-method", "--checkpoint-method": "--recompute-method",
    "--checkpoint-num-layers": "--recompute-num-layers", "--activations-checkpoint-num-layers": "--recompute-num-layers",
    "--override-opt-param-scheduler": "--override-opt_param-scheduler",
    "--use-checkpoint-opt-param-scheduler": "--use-checkpoint-opt_param-scheduler",
    "--use-checkpoint-lr-scheduler": "--use-checkpoint-opt_param-scheduler",
    "--override-lr-scheduler": "--override-opt_param-scheduler", "--dist-ckpt-format": "--ckpt-format",
}  # fmt: skip
VALUES = {  # other programs' values of a flag, with the recipe's, and what there is to know of that
    "--tokenizer-type": (
        {"GPTSentencePieceTokenizer": "SentencePieceTokenizer", "Llama2Tokenizer": "SentencePieceTokenizer"},
        "in Megatron-LM 0.16 one tokenizer under these names; before, SentencePieceTokenizer had five ids more",
    ),
    "--attention-backend": ({"local": "unfused"}, "Megatron-LM's local attention is the unfused one"),
}

_FUSIONS = "yuan chooses its kernels by itself; the results are the same but for rounding"
_MEMORY = "memory and garbage collection are left to torch and Python; the results are the same"
_LOGGING = "a run folder always has metrics.jsonl and TensorBoard's scalars"
_NOT_LOGGED = "it changes no result; yuan records no such figure"
_DATASETS = "it only tunes how data are read; the samples are the same"
_PREPROCESSING = "yuan preprocess shares out its work by itself; the token ids are the same"
_SAVING = "it only tunes how checkpoints are written; what they hold is the same"
_LOADING = "yuan finds a checkpoint's format out by itself, and refuses one that is not there or does not fit"
_COMMUNICATION = "it only tunes communication; the results are the same"
_ENGINE = "yuan has one engine, megatron-core's models"
_DEBUGGING = "it is for debugging and profiling"
# Flags without bearing on the result: why they are left out. A name that ends in * is the beginning of many.
WITHOUT_BEARING = {
    _FUSIONS: """--use-flash-attn --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion
        --no-rope-fusion --no-gradient-accumulation-fusion --no-persist-layer-norm --cross-entropy-loss-fusion
        --cross-entropy-fusion-impl --use-te-activation-func --fused-rmsnorm --no-query-key-layer-scaling
        --no-apply-query-key-layer-scaling --apply-query-key-layer-scaling --use-fused-weighted-squared-relu --flash-decode
        --enable-cuda-graph --cuda-graph-* --external-cuda-graph""",
    "GELU is then the exact one, as here without model.openai_gelu": "--no-bias-gelu-fusion",
    "dropout draws from generators of megatron-core's own": "--te-rng-tracker --inference-rng-tracker",
    _MEMORY: "--manual-gc --manual-gc-interval --no-manual-gc-eval --empty-unused-memory-level",
    _LOGGING: """--tensorboard-dir --tensorboard-log-interval --tensorboard-queue-size --log-validation-ppl-to-tensorboard
        --no-log-loss-scale-to-tensorboard --log-loss-scale-to-tensorboard --log-batch-size-to-tensorboard
        --log-learning-rate-to-tensorboard --log-throughput --log-progress""",
    _NOT_LOGGED: """--log-timers-to-tensorboard --log-memory-to-tensorboard --log-memory-interval --log-world-size-to-tensorboard
        --log-params-norm --log-num-zeros-in-grad --log-energy --log-max-attention-logit --timing-log-level --timing-log-option
        --logging-level --wandb-* --log-straggler --no-one-logger --one-logger-* --app-tag-run-* --no-barrier-with-level-1-timing
        --config-logger-dir""",
    _DATASETS: """--no-mmap-bin-files --no-create-attention-mask-in-dataloader --num-dataset-builder-threads
        --mid-level-dataset-surplus --mmap-warmup""",
    "there is one format of .bin and .idx": "--data-impl --dataset-impl",
    _PREPROCESSING: "--chunk-size --partitions --keep-sequential-samples",
    "it is the language of --split-sentences": "--lang",
    _SAVING: """--async-save --use-persistent-ckpt-worker --ckpt-fully-parallel-save --no-ckpt-fully-parallel-save
        --ckpt-fully-parallel-load --ckpt-assume-constant-structure --dist-ckpt-*
        --distrib-optim-fully-reshardable-mem-efficient --process-checkpoint""",
    _LOADING: "--auto-detect-ckpt-format --dist-ckpt-strictness --exit-on-missing-checkpoint",
    "weights that are loaded take the place of the first ones in any case": "--no-initialization",
    "moments, gradients and main weights are fp32; with optimizer.optimizer_cpu_offload it is set by itself":
        "--use-precision-aware-optimizer",
    "a run of yuan saves and ends on SIGTERM and Ctrl-C by itself": "--exit-signal-handler",
    _COMMUNICATION: """--no-overlap-p2p-communication --overlap-p2p-communication-warmup-flush --no-align-grad-reduce
        --no-align-param-gather --ddp-* --no-scatter-gather-tensors-in-pipeline --use-ring-exchange-p2p --use-nccl-ub --use-sharp
        --sharp-enabled-group --tp-comm-* --disable-tp-comm-* --distributed-backend --distributed-timeout-seconds-after-init
        --nccl-communicator-config-path --use-tp-pp-dp-mapping --high-priority-stream-groups --defer-embedding-wgrad-compute
        --wgrad-deferral-limit --overlap-param-gather-with-optimizer-step --microbatch-group-size-per-virtual-pipeline-stage
        --disable-gloo-process-groups --pipeline-model-parallel-comm-backend --local-rank --local_rank --standalone
        --no-contiguous-buffers-in-local-ddp --no-async-tensor-model-parallel-allreduce""",
    _ENGINE: "--use-mcore-models --transformer-impl --use-legacy-models --DDP-impl --lazy-mpu-init",
    "weights start as random either way, from the same distribution": "--use-cpu-initialization",
    "tokenizers are those of today": "--no-legacy-tokenizer",
    "yuan runs no code that comes with a tokenizer or model": "--trust-remote-code",
    "a run of yuan stops at a loss or gradient that is not finite, and saves nothing of that step": "--check-for-nan-in-loss-and-grad",
    _DEBUGGING: """--profile --profile-step-start --profile-step-end --profile-ranks --use-pytorch-profiler
        --record-memory-history --memory-snapshot-path --check-weight-hash-across-dp-replicas-interval
        --rerun-mode --error-injection-* --check-for-spiky-loss --check-for-large-grads --train-sync-interval
        --run-workload-inspector-server --disable-straggler-on-startup --straggler-*""",
    "the new run's own schedule counts": "--override-opt_param-scheduler",
    "answers are counted in tokens; yuan has no such limit": "--max-tokens-to-oom --inference-batch-times-seqlen-threshold",
    "yuan's server needs no switch for it": "--inference-server",
    "the filter is padded alike in training and inference": "--lf-conv2d-num-pad",
}  # fmt: skip
# Flags that change the result and have no key: what the migrated recipe does instead.
WITHOUT_KEY = {
    "--dataloader-type": "each sample is read once, in the order of the shuffled index; cyclic shuffles anew in every epoch",
    "--save-retain-interval": "all checkpoints are kept; to keep the newest alone: checkpoint.keep_last=N",
    "--distribute-saved-activations": "what recomputation starts from is held whole by every tensor-parallel rank: more memory",
    "--deterministic-mode": "kernels on GPUs are not restricted to those that repeat to the last bit",
    "--no-check-for-nan-in-loss-and-grad": "a run of yuan stops at a loss or gradient that is not finite",
    "--spec": "the layers are those of megatron-core's GPT: no specification of one's own is read",
    "--legacy-tokenizer": "tokenizers are those of today: SentencePieceTokenizer adds no ids of its own to the file's",
    "--context-parallel-size": "context parallelism is missing: each rank holds whole sequences, and needs the memory",
    "--cp-comm-type": "context parallelism is missing",
    "--num-experts": "mixtures of experts are missing: the recipe describes a dense model",
    "--moe-*": "mixtures of experts are missing: the recipe describes a dense model",
    "--expert-*": "mixtures of experts are missing: the recipe describes a dense model",
    "--multi-latent-attention": "multi-latent attention is missing: the recipe's attention is the usual one",
    "--mtp-*": "multi-token prediction is missing",
    "--fim-rate": "fill-in-the-middle is missing: documents are trained on as they are",
    "--fim-spm-rate": "fill-in-the-middle is missing",
    "--fp8-*": "FP8 is missing: the recipe trains in training.precision",
    "--fp4-*": "FP4 is missing: the recipe trains in training.precision",
    "--mock-data": "there are no made-up data: give data.data_path",
    "--data-args-path": "write the file's words into data.data_path",
    "--per-split-data-args-path": "write the file's lists into data.train_data_path and its kin",
    "--skip-train": "there is no run that only evaluates",
    "--use-checkpoint-args": "the shapes have to be in the recipe: check them against the checkpoint's",
    "--use-checkpoint-opt_param-scheduler": "on resuming the recipe's schedule counts, not the checkpoint's",
    "--pretrained-checkpoint": "it is what checkpoint.load with checkpoint.finetune=true does",
    "--no-save-optim": "checkpoints hold the optimizer's state, two thirds of their size and more",
    "--no-save-rng": "checkpoints hold the random state",
    "--decoupled-lr": "input and output layer learn at the rate of the others",
    "--embedding-init-method-std": "the embedding starts with model.init_method_std",
    "--init-method-xavier-uniform": "weights start normally distributed, with model.init_method_std",
    "--rotary-interleaved": "RoPE turns the two halves of a head, not neighbours",
    "--rotary-seq-len-interpolation-factor": "RoPE is not scaled",
    "--squared-relu": "the activation is GELU or SwiGLU",
    "--quick-geglu": "the activation is GELU or SwiGLU",
    "--apply-layernorm-1p": "norms are not centred around one",
    "--qk-layernorm": "queries and keys are not normalized",
    "--window-size": "attention sees the whole sequence",
    "--qk-*": "queries and keys are not normalized",
    "--grad-reduce-in-bf16": "gradients are reduced in fp32",
    "--fp32-residual-connection": "the residual stream has the training's precision",
    "--fp16-lm-cross-entropy": "the loss is computed in fp32",
    "--recompute-modules": "selective recomputation is that of the attention",
    "--use-megatron-fsdp": "gradients and weights are shared out with parallel.zero=2 or 3",
    "--data-parallel-sharding-strategy": "gradients and weights are shared out with parallel.zero=2 or 3",
    "--calculate-per-token-loss": "the loss is averaged per micro-batch",
    "--account-for-embedding-in-pipeline-split": "give parallel.pipeline_model_parallel_layout",
    "--account-for-loss-in-pipeline-split": "give parallel.pipeline_model_parallel_layout",
    "--data-parallel-random-init": "data-parallel replicas start alike",
    "--decrease-batch-size-if-needed": "a batch that does not fit the ranks is refused",
    "--iterations-to-skip": "no step is left out",
    "--full-validation": "an evaluation takes training.eval_iters batches",
    "--lf-conv2d-group": "the filter's convolutions have one group",
    "--split-sentences": "documents are not cut into sentences",
    "--keep-newlines": "documents are not cut into sentences",
    "--target-*": "it belongs to a conversion: migrate the conversion's own script",
    "--rl-*": "reinforcement learning is missing",
    "--grpo-*": "reinforcement learning is missing",
    "--perform-rl-step": "reinforcement learning is missing",
    "--retro-*": "retrieval is missing",
    "--flash-attn-drop": "it means something with --use-flash-attn alone",
    "--add-bos": "no token is put before an answer's prompt",
    "--max-padding-length": "samples have training.seq_length tokens",
    "--extra-vocab-size": "the vocabulary is padded by model.make_vocab_size_divisible_by",
    "--patch-tokenizer-type": "give tokenizer.type",
    "--tiktoken-special-tokens": "give tokenizer.tiktoken_special_tokens, a list",
    "--dataset": "pretraining reads .bin and .idx files",
}
HARMLESS_VALUES = {
    "--context-parallel-size": "1",
    "--lf-conv2d-group": "1",
    "--fim-rate": "0",
    "--num-experts": "0",
    "--optimizer": "adam",
    "--dataloader-type": "single",
    "--spec": "local",
    "--recompute-modules": "core_attn",
}


@dataclass(frozen=True)
class Flag:
    """One flag and its key. `kind`: `value` takes a word, `list` several, `on` none."""

    name: str
    key: str
    kind: Literal["value", "list", "on"]


@cache
def flags() -> dict[str, Flag]:
    """Flag → its key, for pretrain_gpt.py."""
    named = {key: "--" + key.split(".")[1].replace("_", "-") for key in SAME_NAME.split()} | OTHER_NAME
    return {name: Flag(name, key, kind_of(key)) for key, name in named.items()}


@cache
def tool_flags(tool: str) -> dict[str, Flag]:
    """The same for `preprocess` and `serve`, whose own meanings come before those of a training."""
    own = TOKENS | {"preprocess": PREPROCESS, "serve": SERVER}.get(tool, {})
    return flags() | {name: Flag(name, key, kind_of(key)) for name, key in own.items()}


def kind_of(key: str) -> Literal["value", "list", "on"]:
    """How many words a key's flag takes."""
    kind = keys()[key].type
    return "on" if kind is bool else "list" if kind is Any or get_origin(kind) is list else "value"


def choices(key: str) -> tuple[Any, ...]:
    """The values that a key may have; empty where it is not one of a few."""
    kind = keys()[key].type
    return get_args(kind) if get_origin(kind) is Literal else ()


@cache
def _without_bearing() -> dict[str, str]:
    return {name: why for why, names in WITHOUT_BEARING.items() for name in names.split()}


def why_dropped(name: str) -> str | None:
    """Why a flag has no bearing on the result; None where it has one or is not known."""
    return _by_name(name, _without_bearing())


def what_is_lost(name: str) -> str | None:
    """What the result misses without a flag that has no key; None where it is not known."""
    return _by_name(name, WITHOUT_KEY)


def _by_name(name: str, known: dict[str, str]) -> str | None:
    if name in known:
        return known[name]
    return next((text for start, text in known.items() if start.endswith("*") and name.startswith(start[:-1])), None)
