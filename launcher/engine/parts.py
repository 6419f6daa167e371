"""Which of the possible parts a training runs with, in words: for a run's first lines and `yuan doctor`."""

from __future__ import annotations

from launcher.engine.model import transformer_engine
from launcher.recipe.estimate.activations import fused_attention
from launcher.recipe.schema import Recipe
from launcher.recipe.size import LOGIT_ROWS, whole_logits


def parts(recipe: Recipe, optimizer: object | None = None) -> str:
    """Attention, norm, loss, what torch.compile was asked for, and of a built megatron-core optimizer what updates the weights."""
    told = [f"attention: {attention(recipe)}", f"norm: {_norm(recipe)}", f"loss: {_loss(recipe)}"]
    if recipe.training.torch_compile:
        told.append(f"torch.compile: {'nothing, under Transformer Engine' if transformer_engine(recipe) else 'norms, activation, residual sums'}")
    if optimizer is not None:
        told.append(f"optimizer: {_adam(optimizer)}")
    return "; ".join(told)


def attention(recipe: Recipe) -> str:
    if transformer_engine(recipe):
        return f"Transformer Engine ({recipe.model.attention_backend})"
    if not fused_attention(recipe):
        return "megatron-core, unfused"
    blocks = recipe.derived.device == "cpu" and recipe.model.attention_dropout
    return "blocks with dropout" if blocks else "torch SDPA"


def _norm(recipe: Recipe) -> str:
    return f"{'Transformer Engine' if transformer_engine(recipe) else 'torch'} {recipe.model.normalization}"


def _loss(recipe: Recipe) -> str:
    return "megatron-core" if whole_logits(recipe) else f"chunks of {LOGIT_ROWS[recipe.derived.device]} tokens"


def _adam(optimizer) -> str:
    adam = optimizer.chained_optimizers[0].optimizer
    name = f"{type(adam).__module__.split('.')[0]} {type(adam).__name__}"
    return f"{name}, fused" if adam is not None and adam.param_groups[0].get("fused") else name
