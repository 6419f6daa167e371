"""Random recipes, and what megatron-core itself says of each: the one side of the differential test."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from launcher.recipe.check import CHECKS
from launcher.recipe.pipeline import parse_layout
from launcher.recipe.problem import Case, Problem
from launcher.recipe.resolve import resolve
from launcher.recipe.schema import Recipe

# What the cases vary, with the values of a sound one; a case holds what differs from these.
BASE: dict[str, Any] = {
    "launch.nnodes": 1,
    "launch.nproc_per_node": 1,
    "parallel.tensor_model_parallel_size": 1,
    "parallel.pipeline_model_parallel_size": 1,
    "parallel.pipeline_model_parallel_layout": None,
    "parallel.num_layers_per_virtual_pipeline_stage": None,
    "parallel.decoder_first_pipeline_num_layers": None,
    "parallel.decoder_last_pipeline_num_layers": None,
    "parallel.sequence_parallel": False,
    "parallel.use_distributed_optimizer": False,
    "parallel.overlap_grad_reduce": False,
    "parallel.overlap_param_gather": False,
    "parallel.recompute_granularity": None,
    "parallel.recompute_method": None,
    "parallel.recompute_num_layers": None,
    "model.num_layers": 8,
    "model.hidden_size": 48,
    "model.ffn_hidden_size": None,
    "model.num_attention_heads": 4,
    "model.num_query_groups": None,
    "model.kv_channels": None,
    "model.max_position_embeddings": None,
    "model.position_embedding_type": "learned_absolute",
    "model.rotary_percent": 1.0,
    "model.swiglu": False,
    "model.add_bias_linear": True,
    "training.seq_length": 24,
    "training.micro_batch_size": 1,
    "training.global_batch_size": None,
    "training.rampup_batch_size": None,
    "training.train_iters": 20,
    "training.train_samples": None,
    "training.precision": "fp32",
    "optimizer.lr": 0.1,
    "optimizer.min_lr": 0.0,
    "optimizer.lr_decay_style": "linear",
    "optimizer.lr_decay_iters": None,
    "optimizer.lr_decay_samples": None,
    "optimizer.lr_warmup_iters": 0,
    "optimizer.lr_warmup_samples": 0,
    "optimizer.lr_warmup_fraction": None,
    "optimizer.lr_warmup_init": 0.0,
    "optimizer.lr_wsd_decay_iters": None,
    "optimizer.weight_decay_incr_style": "constant",
    "optimizer.start_weight_decay": None,
    "optimizer.end_weight_decay": None,
}
LAYOUTS = (
    "Et*4|t*4L", "Ett|tt|tt|ttL", "E|t*4|t*4|L", "Et*8L", "Et*8|L", "Et(tt|)*2tttL", "Ett|t|tt|ttt|t*0|L", "Et*4||t*4L",
    "Et*4|tL*3", "Et*7L", "t*4|Et*4L", "Et*4|Lt*4", "EEt*4|t*4L", "|Et*4|t*4L", "Et*4|t*4L|", "Et*4|t*4",
)  # fmt: skip


def random_case(rng: random.Random) -> dict[str, Any]:
    """What differs from BASE: a layout that is likely to work, and a few values that may spoil it."""
    case: dict[str, Any] = {}
    tp, pp, dp = rng.choice((1, 1, 2, 2, 3, 4)), rng.choice((1, 1, 2, 2, 3, 4)), rng.choice((1, 1, 2, 3))
    case["parallel.tensor_model_parallel_size"], case["parallel.pipeline_model_parallel_size"] = tp, pp
    case["launch.nnodes"] = 2 if dp == 2 and rng.random() < 0.3 else 1
    dp //= case["launch.nnodes"]
    case["launch.nproc_per_node"] = tp * pp * dp if rng.random() < 0.95 else rng.randint(1, 12)
    case["model.num_attention_heads"] = tp * rng.choice((1, 2, 4)) if rng.random() < 0.95 else rng.randint(1, 9)
    case["model.hidden_size"] = case["model.num_attention_heads"] * rng.choice((24, 32)) + (rng.random() < 0.03)
    case["model.num_layers"] = pp * rng.choice((1, 2, 4, 6)) if rng.random() < 0.9 else rng.randint(1, 12)
    dp *= case["launch.nnodes"]
    case["training.micro_batch_size"] = micro = rng.choice((1, 1, 2, 3))
    case["training.seq_length"] = 24 if rng.random() < 0.95 else rng.randint(8, 24)
    batch = micro * dp * rng.choice((1, 2, 3, 4, 8, 12)) if rng.random() < 0.93 else rng.randint(1, 48)
    case["training.global_batch_size"] = batch
    for vary in rng.sample((_stages, _model, _length, _schedule, _decay, _recompute, _overlap, _ramp), rng.choice((1, 1, 2))):
        case |= vary(rng, case, batch, micro * dp)
    return {key: value for key, value in case.items() if value != BASE[key]}


def _maybe(rng: random.Random, choices: dict[str, tuple]) -> dict[str, Any]:
    return {key: rng.choice(values) for key, values in choices.items() if rng.random() < 0.5}


def _stages(rng, case, batch, at_once) -> dict[str, Any]:
    kind = rng.choice(("layout", "virtual", "virtual", "uneven", "both"))
    values: dict[str, Any] = {"training.global_batch_size": at_once * case["parallel.pipeline_model_parallel_size"]}
    if kind in ("layout", "both"):
        pp = case["parallel.pipeline_model_parallel_size"]
        fitting = [layout for layout in LAYOUTS if len(parse_layout(layout)) % pp == 0 or rng.random() < 0.2]
        values["parallel.pipeline_model_parallel_layout"] = rng.choice(fitting)
        values["model.num_layers"] = rng.choice((8, 8, 8, 7))
    if kind == "virtual" or (kind == "both" and rng.random() < 0.5):
        values["parallel.num_layers_per_virtual_pipeline_stage"] = rng.choice((1, 2, 3, 4))
    if kind == "uneven" or (kind == "both" and rng.random() < 0.3):
        values |= _maybe(rng, {f"parallel.decoder_{end}_pipeline_num_layers": (1, 2, 3, 4) for end in ("first", "last")})
    return values if rng.random() < 0.7 else values | {"training.global_batch_size": batch}


def _model(rng, case, batch, at_once) -> dict[str, Any]:
    return _maybe(
        rng,
        {
            "model.num_query_groups": (1, 2, 3, 4, 6),
            "model.kv_channels": (8, 12, 7),
            "model.ffn_hidden_size": (96, 100, 90),
            "model.max_position_embeddings": (16, 24, 32),
            "model.position_embedding_type": ("rope", "none"),
            "model.rotary_percent": (0.5, 0.75),
            "model.swiglu": (True,),
            "model.add_bias_linear": (False,),
            "training.precision": ("bf16", "fp16"),
            "parallel.sequence_parallel": (True,),
        },
    )


def _length(rng, case, batch, at_once) -> dict[str, Any]:
    values = {"training.train_iters": None, "training.train_samples": rng.choice((200, 400, 5))}
    return values | ({"training.train_iters": 20} if rng.random() < 0.15 else {})


def _schedule(rng, case, batch, at_once) -> dict[str, Any]:
    choices = {f"optimizer.lr_{part}_iters": (4, 10, 20, 30) for part in ("decay", "warmup")}
    choices |= {f"optimizer.lr_{part}_samples": (40, 100, 500) for part in ("decay", "warmup") if rng.random() < 0.3}
    if rng.random() < 0.3:
        choices["optimizer.lr_warmup_fraction"] = (0.1, 0.9)
    return _maybe(rng, choices)


def _decay(rng, case, batch, at_once) -> dict[str, Any]:
    return _maybe(
        rng,
        {
            "optimizer.lr_decay_style": ("constant", "cosine", "inverse-square-root", "WSD"),
            "optimizer.lr_wsd_decay_iters": (2, 8, 30),
            "optimizer.min_lr": (0.05, 0.1, 0.2),
            "optimizer.lr_warmup_init": (0.05, 0.2),
            "optimizer.weight_decay_incr_style": ("linear", "cosine"),
            "optimizer.start_weight_decay": (0.0, 0.1),
            "optimizer.end_weight_decay": (0.05, 0.1, 0.2),
        },
    )


def _recompute(rng, case, batch, at_once) -> dict[str, Any]:
    choices = {
        "parallel.recompute_granularity": ("full", "full", "selective"),
        "parallel.recompute_method": ("uniform", "block"),
        "parallel.recompute_num_layers": (1, 2, 3),
    }
    return {"parallel.recompute_granularity": "full"} | _maybe(rng, choices)


def _overlap(rng, case, batch, at_once) -> dict[str, Any]:
    names = ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
    return _maybe(rng, {f"parallel.{name}": (True,) for name in names})


def _ramp(rng, case, batch, at_once) -> dict[str, Any]:
    start, increment = (rng.choice((1, 2, 3)) * (at_once if rng.random() < 0.8 else 1) for _ in range(2))
    total = start + increment * rng.choice((1, 2, 4)) + (rng.random() < 0.1)
    values = {"training.rampup_batch_size": [start, increment, rng.choice((0, 7, 30, 100))], "training.global_batch_size": total}
    return values | ({"training.train_iters": None, "training.train_samples": 400} if rng.random() < 0.85 else {})


def resolved(case: dict[str, Any]) -> tuple[Recipe, dict[str, str]]:
    """The recipe of a case, as `yuan` would resolve it on a CPU."""
    recipe, sources = Recipe(), dict.fromkeys(BASE, "default")
    recipe.launch.device, recipe.launch.rdzv_endpoint = "cpu", "host:29500"
    recipe.tokenizer.type, recipe.tokenizer.vocab_size = "NullTokenizer", 50
    for key, value in (BASE | case).items():
        group, leaf = key.split(".")
        setattr(getattr(recipe, group), leaf, value)
        if value is not None and value != getattr(getattr(Recipe(), group), leaf):
            sources[key] = "command line"
    resolve(recipe, sources, "test")
    return recipe, sources


def our_problems(recipe: Recipe, sources: dict[str, str]) -> list[Problem]:
    """What `yuan check` says of it, files left out."""
    files = ("check_data", "check_checkpoint", "check_run")
    checks = [one for one in CHECKS["pretrain"] if one.__module__.rsplit(".", 1)[1] not in files]
    return [problem for one in checks for problem in one(Case(recipe, sources))]


def core_refusal(recipe: Recipe) -> str | None:
    """Why megatron-core 0.16 would not train this recipe, asked part by part as the engine builds them; None if it would."""
    try:
        _groups(recipe)
        config = _config(recipe)
        _layers(recipe, config)
        _attention(recipe, config)
        _batches(recipe, config)
        _scheduler(recipe)
        return None
    except (AssertionError, ValueError, RuntimeError, ZeroDivisionError, IndexError) as error:
        return f"{type(error).__name__}: {error}"


@contextmanager
def one_process(world_size: int = 1) -> Iterator[None]:
    """A world of so many ranks in this process: torch's fake backend sends nothing."""
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hook = sys.excepthook  # torch puts one around it each time
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        sys.excepthook = hook


def _groups(recipe: Recipe) -> None:
    from megatron.core import parallel_state

    from launcher.engine.initialize import virtual_pipeline_size

    p = recipe.parallel
    with one_process(recipe.derived.world_size), ExitStack() as at_end:
        at_end.callback(parallel_state.destroy_model_parallel)
        parallel_state.initialize_model_parallel(
            p.tensor_model_parallel_size,
            p.pipeline_model_parallel_size,
            virtual_pipeline_size(recipe),
            create_gloo_process_groups=False,
        )


def _config(recipe: Recipe):
    from launcher.engine.model import transformer_config

    return transformer_config(recipe)


def _layers(recipe: Recipe, config) -> None:
    """Every layer is built once; recomputation stays within each chunk (megatron-core's own walk over a chunk's layers)."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build

    virtual, pp = config.virtual_pipeline_model_parallel_size, config.pipeline_model_parallel_size
    if config.pipeline_model_parallel_layout is not None:
        counts = [chunk.count(LayerType.decoder) for rank in config.pipeline_model_parallel_layout.layout for chunk in rank]
    else:
        counts = [get_num_layers_to_build(config, v if virtual else None, rank) for rank in range(pp) for v in range(virtual or 1)]
    assert sum(counts) == config.num_layers and min(counts) >= 0, f"layers built: {counts}"
    if config.recompute_granularity == "full":
        for count in set(counts):
            layers = [lambda hidden_states, **_: (hidden_states, None)] * count
            block = SimpleNamespace(config=config, num_layers_per_pipeline_rank=count, _get_layer=layers.__getitem__)
            with patch("megatron.core.tensor_parallel.checkpoint", lambda function, _, *arguments: function(*arguments)):
                TransformerBlock._checkpointed_forward(block, None, None, None, None, None, None, None, False)


def _attention(recipe: Recipe, config) -> None:
    """What the matrices of a layer and of the vocabulary are cut into, and RoPE on a head."""
    import torch
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.utils import divide

    tp, m = config.tensor_model_parallel_size, recipe.model
    divide(config.ffn_hidden_size, tp)
    divide(recipe.derived.padded_vocab_size, tp)
    divide(config.num_attention_heads * config.kv_channels, config.num_attention_heads)
    divide(divide(config.num_attention_heads, tp), max(1, config.num_query_groups // tp))
    divide(config.num_attention_heads, config.num_query_groups)
    divide((config.num_attention_heads + 2 * config.num_query_groups) * config.kv_channels, tp)
    if config.sequence_parallel:
        divide(recipe.training.seq_length, tp)
    assert recipe.training.seq_length <= m.max_position_embeddings
    if m.position_embedding_type == "rope":
        alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
        rope = RotaryEmbedding(config.kv_channels, m.rotary_percent, use_cpu_initialization=True, cp_group=alone)
        with patch("torch.cuda.current_device", lambda: "cpu"):
            angles = rope(4)
        apply_rotary_pos_emb(torch.zeros(4, 1, 1, config.kv_channels), angles, config, cp_group=alone)


def _batches(recipe: Recipe, config) -> None:
    """Every step's micro batches; the interleaved schedule's own rule on each (its code needs running processes)."""
    from megatron.core import num_microbatches_calculator as microbatches

    t, dp = recipe.training, recipe.derived.data_parallel_size
    arguments = (0, t.rampup_batch_size, t.global_batch_size, t.micro_batch_size, dp, False)
    calculator = microbatches._build_num_microbatches_calculator(*arguments)
    consumed, samples = 0, t.train_samples or recipe.derived.train_samples
    while True:
        calculator.update(consumed, True)
        size = calculator.get_current_global_batch_size()
        if consumed + size > samples:
            break
        count, group = calculator.get(), config.microbatch_group_size_per_vp_stage
        if config.virtual_pipeline_model_parallel_size is not None:
            assert count >= group and count % group in (0, *range(config.pipeline_model_parallel_size, group)), "groups"
        consumed += size
    assert consumed > 0, "no step"


def _scheduler(recipe: Recipe) -> None:
    """The schedule is built and stepped to the end of the training. Megatron-LM hands a length of WSD's last phase on as
    None where it is not given in the training's own unit, and megatron-core asserts that it is."""
    import torch

    from launcher.engine.optimizer import build_scheduler

    o = recipe.optimizer
    phase = o.lr_wsd_decay_iters if recipe.training.train_iters else o.lr_wsd_decay_samples
    assert o.lr_decay_style != "WSD" or phase is not None
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = build_scheduler(recipe, optimizer)
    for _ in range(recipe.derived.train_iters):
        scheduler.step(recipe.training.global_batch_size)
