"""Optimizer, learning-rate schedule and batch-size calculator, from a recipe to megatron-core's objects."""

import math

import torch
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from launcher.engine.model import DTYPES
from launcher.engine.optimizer_state import initialize_state
from launcher.recipe.schema import Recipe


def build_optimizer(recipe: Recipe, chunks: list) -> MegatronOptimizer:
    """megatron-core's optimizer over data-parallel model chunks: no weight decay on biases and norms, clipping, loss scale."""
    optimizer, training, parallel = recipe.optimizer, recipe.training, recipe.parallel
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
        bf16=training.precision == "bf16",
        params_dtype=DTYPES[training.precision],
        loss_scale=training.loss_scale,
        initial_loss_scale=training.initial_loss_scale,
        min_loss_scale=training.min_loss_scale,
        loss_scale_window=training.loss_scale_window,
        hysteresis=training.hysteresis,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    built = get_megatron_optimizer(config, chunks)
    initialize_state(built)
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
