"""Optimizer, learning-rate schedule and batch-size calculator, from a recipe to megatron-core's objects."""

import math

import torch
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor, optim_state_to_sharding_state
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from launcher.engine.model import DTYPES
from launcher.engine.optimizer_state import initialize_state
from launcher.recipe.schema import Recipe


def build_optimizer(recipe: Recipe, chunks: list) -> MegatronOptimizer:
    """megatron-core's optimizer over data-parallel model chunks: no weight decay on biases and norms, clipping, loss scale."""
    optimizer, training, parallel = recipe.optimizer, recipe.training, recipe.parallel
    rows = (parallel.zero or 0) >= 2  # which are fp32 in any precision
    config = OptimizerConfig(
        optimizer=optimizer.optimizer,
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        clip_grad=optimizer.clip_grad,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        fp16=training.precision == "fp16",
        bf16=training.precision == "bf16" and not rows,
        params_dtype=torch.float32 if rows else DTYPES[training.precision],
        loss_scale=training.loss_scale,
        initial_loss_scale=training.initial_loss_scale,
        min_loss_scale=training.min_loss_scale,
        loss_scale_window=training.loss_scale_window,
        hysteresis=training.hysteresis,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
        optimizer_cpu_offload=optimizer.optimizer_cpu_offload,
        use_precision_aware_optimizer=optimizer.optimizer_cpu_offload,  # its way of updating, in fp32 all the same
        optimizer_offload_fraction=optimizer.optimizer_offload_fraction,
        overlap_cpu_optimizer_d2h_h2d=optimizer.overlap_cpu_optimizer_d2h_h2d,
    )
    built = get_megatron_optimizer(config, chunks)
    initialize_state(built)
    if rows:
        return ShardedAdam(built.chained_optimizers, chunks[0], in_16_bits=training.precision != "fp32")
    torchs = all(isinstance(part.optimizer, torch.optim.AdamW) for part in built.chained_optimizers)
    return ClippingAdam(built.chained_optimizers) if torchs else built


class ClippingAdam(ChainedOptimizer):
    """megatron-core's step, but torch's fused AdamW clips the gradients as it reads them.

    That saves four passes over all gradients: megatron-core's own clipping without Apex makes a scaled copy of each and
    copies it back.
    """

    @torch.no_grad()
    def step(self) -> tuple[bool, float | None, None]:
        """Whether the weights were updated, and the norm before clipping: not where a gradient overflowed in fp16 (None) and
        not where the norm is no finite number; then weights and moments are as they were."""
        if self.prepare_grads():
            return False, None, None
        norm, limit = self.get_grad_norm(), self.config.clip_grad
        if not math.isfinite(norm):
            return False, norm, None
        divisor = max(1.0, (norm + 1e-6) / limit) if limit > 0 else 1.0
        for part in self.chained_optimizers:
            if part.optimizer is not None:
                part.optimizer.grad_scale = torch.tensor(divisor, device=torch.cuda.current_device())
        return self.step_with_ready_grads(), norm, None


class ShardedAdam(ClippingAdam):
    """Over the rows of ZeRO 2 and 3. Its checkpoints are of megatron-core's form without sharding, in 16 bits with the fp32
    weights beside the model's.

    Args:
        chunk: the ShardedDataParallel whose rows are optimized.
        in_16_bits: the training's precision is bf16.
    """

    def __init__(self, parts: list[MegatronOptimizer], chunk: torch.nn.Module, in_16_bits: bool):
        super().__init__(parts)
        self.names = {id(parameter): name for name, parameter in chunk.rows.items()}
        self.in_16_bits = in_16_bits

    def sharded_state_dict(self, model_sharded_state_dict: dict, is_loading: bool = False, **_) -> dict:
        """Of the moments, and in 16 bits of the fp32 weights; `model_sharded_state_dict` is {"model": the chunk's own}."""
        (part,), model = self.chained_optimizers, model_sharded_state_dict["model"]
        state, parameters = part.state_dict(), part.get_parameters()
        factories = {number: model[self.names[id(parameter)]] for number, parameter in enumerate(parameters)}
        step, groups = part._extract_common_per_param_step(state), [group["params"] for group in state["param_groups"]]
        optim_state_to_sharding_state(state, factories, exclude_keys=("step",))
        if step:
            state["state"]["common_step"] = step
        if not self.in_16_bits:
            return state
        prefix = "optimizer.state.fp32_param"
        weights = [[make_sharded_optimizer_tensor(factories[i], parameters[i].detach(), prefix) for i in group] for group in groups]
        return {"optimizer": state, "fp32_from_fp16_params": weights}

    def load_state_dict(self, state_dict: dict) -> None:
        """What megatron-core loaded for `sharded_state_dict`: tensors are there already, in place."""
        (part,), loaded = self.chained_optimizers, state_dict.get("optimizer", state_dict)
        own, parameters = part.optimizer.state, part.get_parameters()
        step = loaded["state"].get("common_step")
        loaded["state"] = {number: dict(own[parameter]) for number, parameter in enumerate(parameters)}
        loaded["state"] |= {} if step is None else {"common_step": step}
        part.load_state_dict(loaded)


def holds_weights(optimizer: MegatronOptimizer) -> bool:
    """Whether what is loaded into it fills the model, too: the rows of ZeRO 2 and 3 in 16 bits are the fp32 weights."""
    return isinstance(optimizer, ShardedAdam) and optimizer.in_16_bits


def build_scheduler(recipe: Recipe, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Learning rate and weight decay as functions of the samples consumed.

    Megatron-LM counts every length in samples: iterations are multiplied by the global batch size, and the optimizer
    starts at step 0, so that the first step of a warm-up trains with lr_warmup_init.
    """
    o, batch = recipe.optimizer, recipe.training.global_batch_size
    length = recipe.training.train_samples or recipe.derived.train_samples
    decay = _samples(o.lr_decay_iters, o.lr_decay_samples, batch) or length
    warmup = _samples(o.lr_warmup_iters, o.lr_warmup_samples, batch)
    if o.lr_warmup_fraction is not None:
        warmup = o.lr_warmup_fraction * decay
    growing = o.weight_decay_incr_style != "constant"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=o.lr_warmup_init,
        max_lr=o.lr,
        min_lr=o.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=o.lr_decay_style,
        start_wd=o.start_weight_decay if growing else o.weight_decay,
        end_wd=o.end_weight_decay if growing else o.weight_decay,
        wd_incr_steps=length,
        wd_incr_style=o.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # the recipe is the one truth; a resume with another one was checked before
        wsd_decay_steps=_samples(o.lr_wsd_decay_iters, o.lr_wsd_decay_samples, batch),
        lr_wsd_decay_style=o.lr_wsd_decay_style,
    )


def _samples(iterations: int | None, samples: int | None, batch: int) -> int:
    return samples or (iterations or 0) * batch


def init_batch_calculator(recipe: Recipe, rank: int) -> None:
    """Set up megatron-core's global calculator of microbatches, constant or ramping up."""
    init_num_microbatches_calculator(
        rank,
        recipe.training.rampup_batch_size,
        recipe.training.global_batch_size,
        recipe.training.micro_batch_size,
        recipe.derived.data_parallel_size,
    )
