"""Checks of single values, of the model's shape and of the precision."""

from __future__ import annotations

from collections.abc import Iterator
from math import isinf

from launcher.console import plural
from launcher.recipe.problem import Case, Problem, nearest, nearest_divisors

REQUIRED = (
    "model.num_layers",
    "model.hidden_size",
    "model.num_attention_heads",
    "training.seq_length",
    "training.micro_batch_size",
    "optimizer.lr",
)

AT_LEAST = {  # lowest value allowed; None values are passed over
    1: """model.num_layers model.hidden_size model.ffn_hidden_size model.num_attention_heads model.num_query_groups
        model.kv_channels model.max_position_embeddings model.rotary_base model.make_vocab_size_divisible_by
        parallel.tensor_model_parallel_size parallel.pipeline_model_parallel_size
        parallel.num_layers_per_virtual_pipeline_stage parallel.decoder_first_pipeline_num_layers
        parallel.decoder_last_pipeline_num_layers parallel.recompute_num_layers parallel.distributed_timeout_minutes
        training.seq_length training.micro_batch_size training.global_batch_size training.train_iters
        training.train_samples training.train_tokens training.loss_scale_window training.hysteresis
        training.eval_interval training.exit_interval
        optimizer.lr_decay_iters optimizer.lr_decay_samples optimizer.lr_decay_tokens
        preprocess.workers tokenizer.vocab_size checkpoint.save_interval checkpoint.keep_last logging.log_interval
        launch.nproc_per_node launch.nnodes launch.cpu_threads training.epochs serve.port lora.rank
        convert.tensor_model_parallel_size convert.pipeline_model_parallel_size convert.workers""",
    0: """model.init_method_std model.attention_dropout model.hidden_dropout training.seed training.eval_iters
        optimizer.min_lr optimizer.lr_warmup_iters optimizer.lr_warmup_samples optimizer.lr_warmup_tokens
        optimizer.lr_warmup_fraction optimizer.lr_warmup_init optimizer.lr_wsd_decay_iters
        optimizer.lr_wsd_decay_samples optimizer.lr_wsd_decay_tokens optimizer.weight_decay optimizer.clip_grad
        optimizer.adam_beta1 optimizer.adam_beta2 data.num_workers launch.node_rank
        launch.max_restarts lora.dropout""",
}
ABOVE_ZERO = """model.norm_epsilon model.rotary_percent model.rope_scaling_factor optimizer.lr optimizer.adam_eps training.loss_scale
    training.initial_loss_scale training.min_loss_scale training.exit_duration_in_mins
    launch.gpu_memory_gib launch.gpu_peak_tflops launch.mfu lora.alpha"""
BELOW_ONE = """model.attention_dropout model.hidden_dropout optimizer.adam_beta1 optimizer.adam_beta2
    optimizer.lr_warmup_fraction lora.dropout"""
OF_TOKENS = ("optimizer.lr_decay_iters", "optimizer.lr_decay_samples")


def required(case: Case) -> Iterator[Problem]:
    """Values that nothing can be derived from."""
    for key in REQUIRED:
        if case.value(key) is None:
            yield Problem(
                f"{key} is not given",
                "no recipe and no word of the command line gives it",
                f"add {key}=…, or take a recipe that has it",
            )


def ranges(case: Case) -> Iterator[Problem]:
    """Each number by itself."""
    for low, keys in AT_LEAST.items():
        for key in keys.split():
            yield from _compare(case, key, lambda value: value >= low, f"at least {low}")
    for key in ABOVE_ZERO.split():
        yield from _compare(case, key, lambda value: value > 0, "above 0")
    for key in BELOW_ONE.split():
        yield from _compare(case, key, lambda value: value < 1, "below 1")
    for key in ("model.rotary_percent", "launch.mfu"):
        yield from _compare(case, key, lambda value: value <= 1, "at most 1")


def names(case: Case) -> Iterator[Problem]:
    """A run's name is that of its folder below runs/, and leads nowhere else."""
    name = case.recipe.run.name or ""
    if {".", ".."} & set(name.split("/")):
        yield Problem(f"run.name {name!r} leads out of runs/", case.at("run.name"), "run.name=NAME, and run.dir=PATH for another place")


def generation_ranges(case: Case) -> Iterator[Problem]:
    """The numbers of `generate`."""
    for key in ("generate.max_new_tokens", "generate.batch_size"):
        yield from _compare(case, key, lambda value: value >= 1, "at least 1")
    for key in ("generate.temperature", "generate.top_k", "generate.top_p", "generate.seed"):
        yield from _compare(case, key, lambda value: value >= 0, "at least 0")
    yield from _compare(case, "generate.top_p", lambda value: value <= 1, "at most 1")
    yield from _compare(case, "generate.repetition_penalty", lambda value: value > 0, "above 0")


def _compare(case: Case, key: str, holds, rule: str) -> Iterator[Problem]:
    value = case.value(key)
    if key in OF_TOKENS and case.sources.get(key) == "derived":
        return  # of the tokens that were given: `learning_rate` judges those
    if value is not None and (isinf(value) or not holds(value)):  # NaN holds nothing, and so is refused
        rule += ", and finite" if isinf(value) else ""
        yield Problem(f"{key} must be {rule}, not {value}", case.at(key), f"give a value {rule}", by_itself=True)


def shapes(case: Case) -> Iterator[Problem]:
    """Sizes of the model that must fit each other."""
    m, t = case.recipe.model, case.recipe.training
    hidden, heads, groups = m.hidden_size or 0, m.num_attention_heads or 0, m.num_query_groups or 0
    if hidden > 0 and heads > 0 and m.kv_channels is None:
        yield Problem(
            f"hidden_size {hidden} cannot be shared out over {plural(heads, 'head')}",
            case.at("model.hidden_size", "model.num_attention_heads"),
            f"model.hidden_size={nearest(hidden, heads)}, or model.num_attention_heads={nearest_divisors(hidden, heads)}"
            f", or model.kv_channels={max(1, hidden // heads)}",
        )
    if heads > 0 and groups > 0 and heads % groups:
        yield Problem(
            f"{plural(heads, 'head')} cannot be shared out over {plural(groups, 'query group')}",
            case.at("model.num_attention_heads", "model.num_query_groups"),
            f"model.num_query_groups={nearest_divisors(heads, groups)}",
        )
    if t.seq_length and m.max_position_embeddings and t.seq_length > m.max_position_embeddings:
        yield Problem(
            f"seq_length {t.seq_length} is longer than the model's {m.max_position_embeddings} positions",
            case.at("training.seq_length", "model.max_position_embeddings"),
            f"training.seq_length={m.max_position_embeddings}, or model.max_position_embeddings={t.seq_length}",
        )
    turned = int((m.kv_channels or 0) * m.rotary_percent) if 0 < m.rotary_percent <= 1 else 2
    if m.position_embedding_type == "rope" and m.kv_channels and (turned % 2 or turned == 0):
        yield Problem(
            f"RoPE turns pairs, and {turned} channels of a head are no pairs",
            case.at("model.kv_channels", "model.rotary_percent"),
            f"model.kv_channels={nearest(m.kv_channels, 2)}, or model.rotary_percent=1.0",
        )


YUAN2 = {  # what Yuan 2.0 is in every size: its parts and formats know no other
    "model.position_embedding_type": "rope", "model.rotary_percent": 1.0, "model.use_rope_scaling": False, "model.normalization": "RMSNorm",
    "model.swiglu": True, "model.add_bias_linear": False, "model.add_qkv_bias": False,
    "model.untie_embeddings_and_output_weights": False,
}  # fmt: skip


def family(case: Case) -> Iterator[Problem]:
    """Yuan 2.0 is one architecture: each query head has a key of its own, and the filter's convolutions halve the width."""
    m = case.recipe.model
    if m.family != "yuan2":
        if m.rotary_bf16:
            what = "rotary_bf16 is for the released weights of Yuan 2.0: other families turn by angles in fp32"
            yield Problem(what, case.at("model.rotary_bf16", "model.family"), "model.rotary_bf16=false")
        return
    for key, value in YUAN2.items():
        if case.value(key) != value:
            shown = str(value).lower() if isinstance(value, bool) else value
            yield Problem(f"Yuan 2.0 has {key.removeprefix('model.')} {shown}", case.at(key), f"{key}={shown}; bases/yuan2 has all that is Yuan 2.0's")
    heads, groups = m.num_attention_heads or 0, m.num_query_groups or 0
    if 0 < groups != heads > 0:
        what = f"Yuan 2.0 has a key for each query head: {plural(heads, 'head')}, {plural(groups, 'query group')}"
        yield Problem(what, case.at("model.num_query_groups", "model.num_attention_heads"), f"model.num_query_groups={heads}")
    if m.hidden_size and m.hidden_size % 2:
        what = f"Yuan 2.0's filter halves hidden_size {m.hidden_size}"
        yield Problem(what, case.at("model.hidden_size"), f"model.hidden_size={nearest(m.hidden_size, 2)}")


def precision(case: Case) -> Iterator[Problem]:
    """Loss scaling belongs to fp16; a CPU computes fp16 slowly; int8 is for answers."""
    t = case.recipe.training
    if case.recipe.model.quantize:
        yield Problem("weights in int8 cannot be trained, only answer", case.at("model.quantize"), "model.quantize=null")
    if t.precision == "fp16":
        for key in ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"):
            if t.loss_scale is not None and case.given(f"training.{key}"):
                what = f"training.{key} is of a dynamic loss scale, and this one is fixed"
                fix = "training.loss_scale=null for a dynamic one, or leave it out"
                yield Problem(what, case.at(f"training.{key}", "training.loss_scale"), fix, "warning")
        if t.min_loss_scale > t.initial_loss_scale:
            yield Problem(
                "the loss scale starts below its floor",
                case.at("training.initial_loss_scale", "training.min_loss_scale"),
                f"training.min_loss_scale={t.initial_loss_scale}",
            )
        if case.recipe.derived.device == "cpu":
            yield Problem("fp16 on a CPU is slow", case.at("training.precision"), "training.precision=fp32 or bf16", "warning")
        return
    for key in ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"):
        if case.given(f"training.{key}"):
            yield Problem(
                f"training.{key} does nothing in {t.precision}",
                case.at(f"training.{key}"),
                "training.precision=fp16, or leave it out",
                "warning",
            )
