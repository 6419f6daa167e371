"""One step forward, and one backward: the loss, and what megatron-core's schedules call for it."""

from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from launcher.engine.data import next_batch
from launcher.recipe.schema import Recipe


def masked_loss(loss_mask: torch.Tensor, total: torch.Tensor):
    """The model's sum of masked losses, the number of these tokens (of rows, where the mask of each sums to 1), and both for
    the log.

    megatron-core's schedule divides by the number of tokens and of microbatches before the backward pass; with
    calculate_per_token_loss it divides the gradients by the number in the whole global batch instead.
    """
    tokens = loss_mask.float().sum().round().to(torch.int)
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.float()])}


def forward_step(recipe: Recipe, batches, model: torch.nn.Module):
    """Run one microbatch through a model chunk; the schedule calls the returned function where there is a loss."""
    batch = next_batch(recipe, batches)
    inputs = batch["tokens"], batch["position_ids"], batch["attention_mask"]
    output = model(*inputs, labels=batch["labels"], loss_mask=batch["loss_mask"])
    return output, partial(masked_loss, batch["loss_mask"])


def run_microbatches(recipe: Recipe, chunks: list, batches: list, count: int, forward_only: bool = False) -> torch.Tensor:
    """Run `count` microbatches through the pipeline.

    Returns [sum of losses, number of tokens] over the microbatches and the data-parallel ranks on the last pipeline
    stage, zeros on the others.
    """
    outputs = get_forward_backward_func()(
        forward_step_func=partial(forward_step, recipe),
        data_iterator=batches if len(chunks) > 1 else batches[0],
        model=chunks,
        num_microbatches=count,
        seq_length=recipe.training.seq_length,
        micro_batch_size=recipe.training.micro_batch_size,
        decoder_seq_length=recipe.training.seq_length,
        forward_only=forward_only,
    )
    totals = torch.zeros(2, device="cuda")
    if parallel_state.is_pipeline_last_stage():
        totals = torch.stack([output["lm loss"] for output in outputs]).sum(dim=0)
        torch.distributed.all_reduce(totals, group=parallel_state.get_data_parallel_group())
    return totals


def from_last_stage(values: torch.Tensor) -> torch.Tensor:
    """Give every rank the values of the last pipeline stage (the world's last rank is always on it)."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(values, src=torch.distributed.get_world_size() - 1)
    return values
