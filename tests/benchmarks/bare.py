"""megatron-core as it comes, for comparison: its GPTModel, data parallelism, optimizer and schedule, all at their defaults.

Without Transformer Engine that is the local layer spec: unfused attention and loss, torch's AdamW, clipping by copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from launcher.engine.model import DTYPES
from launcher.recipe.schema import Recipe


class BareLoop:
    """Model and optimizer of a recipe's shape on one rank, a GPT-2; `step()` trains one global batch."""

    def __init__(self, recipe: Recipe):
        self.recipe, on_gpu = recipe, recipe.derived.device == "cuda"
        m, dtype = recipe.model, DTYPES[recipe.training.precision]
        config = TransformerConfig(
            num_layers=m.num_layers,
            hidden_size=m.hidden_size,
            num_attention_heads=m.num_attention_heads,
            attention_dropout=m.attention_dropout,
            hidden_dropout=m.hidden_dropout,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            use_cpu_initialization=not on_gpu,
        )
        spec = get_gpt_layer_with_transformer_engine_spec() if HAVE_TE and on_gpu else get_gpt_layer_local_spec()
        model = GPTModel(
            config,
            spec,
            vocab_size=recipe.derived.padded_vocab_size,
            max_sequence_length=m.max_position_embeddings,
            share_embeddings_and_output_weights=True,
        )
        if on_gpu:
            model.cuda()
        if config.bf16:
            model = Float16Module(config, model)
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=config.bf16)
        self.model = DistributedDataParallel(config, ddp, model)
        o = recipe.optimizer
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(lr=o.lr, weight_decay=o.weight_decay, clip_grad=o.clip_grad, bf16=config.bf16, params_dtype=dtype),
            [self.model],
        )
        config.grad_scale_func, config.finalize_model_grads_func = self.optimizer.scale_loss, finalize_model_grads

    def step(self, batches: Iterator[dict]) -> None:
        """One optimizer step."""
        training = self.recipe.training
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=batches,
            model=self.model,
            num_microbatches=training.global_batch_size // training.micro_batch_size,
            seq_length=training.seq_length,
            micro_batch_size=training.micro_batch_size,
            forward_only=False,
        )
        self.optimizer.step()


def _forward(batches: Iterator[dict], model: torch.nn.Module):
    batch = {name: tensor.cuda() for name, tensor in next(batches).items()}
    mask = _causal_mask(batch["tokens"])
    return model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"]), partial(_mean, batch["loss_mask"])


def _causal_mask(tokens: torch.Tensor) -> torch.Tensor | None:
    """The local spec's softmax makes none of its own; Transformer Engine's attention knows that it is causal."""
    if HAVE_TE and tokens.is_cuda:
        return None
    length = tokens.shape[1]
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device).triu(1)


def _mean(mask: torch.Tensor, losses: torch.Tensor):
    loss = (losses.float() * mask).sum() / mask.sum()
    return loss, {"lm loss": loss.detach()}
