"""Megatron-LM core_v0.16.1's arguments that a recipe can say: names, types, choices and defaults, as facts."""

import argparse

INTS = """num-layers hidden-size ffn-hidden-size num-attention-heads num-query-groups=1 kv-channels max-position-embeddings
    rotary-base=10000 make-vocab-size-divisible-by=128 tensor-model-parallel-size=1 pipeline-model-parallel-size=1
    num-layers-per-virtual-pipeline-stage decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers recompute-num-layers
    distributed-timeout-minutes=10 seq-length micro-batch-size global-batch-size train-iters train-samples seed=1234 hysteresis=2
    eval-interval=1000 eval-iters=100 exit-duration-in-mins exit-interval lr-decay-iters lr-decay-samples lr-warmup-iters=0
    lr-warmup-samples=0 lr-wsd-decay-iters lr-wsd-decay-samples num-workers=2 vocab-size save-interval log-interval=100
    tiktoken-num-special-tokens=1000"""
FLOATS = """rotary-percent=1.0 norm-epsilon=1e-5 init-method-std=0.02 attention-dropout=0.1 hidden-dropout=0.1 loss-scale
    initial-loss-scale=4294967296 min-loss-scale=1.0 loss-scale-window=1000 lr min-lr=0.0 lr-warmup-fraction lr-warmup-init=0.0
    weight-decay=0.01 start-weight-decay end-weight-decay clip-grad=1.0 adam-beta1=0.9 adam-beta2=0.999 adam-eps=1e-8
    rope-scaling-factor=8.0"""
TEXTS = "pipeline-model-parallel-layout split data-cache-path tokenizer-model vocab-file merge-file save load tiktoken-pattern"
LISTS = "rampup-batch-size data-path train-data-path valid-data-path test-data-path"
SWITCHES = """swiglu add-qkv-bias untie-embeddings-and-output-weights attention-softmax-in-fp32 sequence-parallel
    use-distributed-optimizer overlap-grad-reduce overlap-param-gather reset-position-ids reset-attention-mask eod-mask-loss
    finetune no-load-optim no-load-rng bf16 fp16 disable-bias-linear group-query-attention tokenizer-hf-include-special-tokens
    use-rope-scaling openai-gelu no-bias-gelu-fusion"""
CHOICES = {
    "position-embedding-type": ("learned_absolute", "rope", "mrope", "relative", "none"),
    "normalization": ("LayerNorm", "RMSNorm"),
    "recompute-granularity": (None, "full", "selective"),
    "recompute-method": (None, "uniform", "block"),
    "attention-backend": ("auto", "flash", "fused", "unfused", "local"),
    "optimizer": ("adam", "sgd", "muon", "dist_muon"),
    "lr-decay-style": ("linear", "constant", "cosine", "inverse-square-root", "WSD"),
    "lr-wsd-decay-style": ("exponential", "linear", "cosine", "minus_sqrt"),
    "weight-decay-incr-style": ("constant", "linear", "cosine"),
    "tokenizer-type": (None, "GPT2BPETokenizer", "SentencePieceTokenizer", "NullTokenizer", "HuggingFaceTokenizer", "TikTokenizer"),
    "ckpt-format": ("torch_dist", "torch", "zarr", "torch_dcp", "fsdp_dtensor"),
}


def parser() -> argparse.ArgumentParser:
    """A parser that takes them as Megatron-LM's does; it exits on anything else."""
    made = argparse.ArgumentParser(allow_abbrev=False)
    for kind, names in ((int, INTS), (float, FLOATS), (str, TEXTS)):
        for name, _, default in (word.partition("=") for word in names.split()):
            made.add_argument(f"--{name}", type=kind, default=kind(default) if default else None)
    for name in LISTS.split():
        made.add_argument(f"--{name}", nargs="*")
    for name in SWITCHES.split():
        made.add_argument(f"--{name}", action="store_true")
    for name, words in CHOICES.items():
        made.add_argument(f"--{name}", choices=[word for word in words if word], default=words[0])
    return made
