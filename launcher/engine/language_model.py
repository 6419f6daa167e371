"""megatron-core's GPTModel with another way through the vocabulary's two ends, the table and the loss."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from launcher.engine.loss import linear_cross_entropy
from launcher.recipe.size import LOGIT_ROWS


class LanguageModel(GPTModel):
    """A GPTModel that gives, where there are labels, the sum of the masked losses; without labels its logits.

    `model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)`, all but the attention mask [b, s],
    is a number in fp32 on the last pipeline stage. With `loss_ids` the rows beyond so many ids, which pad the vocabulary,
    have no share in it; without, they have, as in Megatron-LM.
    """

    def __init__(self, *arguments, loss_ids: int | None = None, **more):
        super().__init__(*arguments, **more)
        self.loss_ids = loss_ids
        if self.pre_process and self.config.gradient_accumulation_fusion:
            table = self.embedding.word_embeddings
            table.__class__ = AccumulatingEmbedding  # megatron-core's class, made deep inside; the same tensors
            table.weight.zero_out_wgrad = False  # the zeros stood for what the table's own gradient was added to

    def _postprocess(self, hidden_states, *, labels, loss_mask, **rest):
        if labels is None or not self.post_process or self._fits(labels):
            output = super()._postprocess(hidden_states=hidden_states, labels=labels, loss_mask=loss_mask, **rest)
            return output if labels is None or not self.post_process else (output.float() * loss_mask).sum()
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
        tp = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True, group=tp)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=tp)
        return linear_cross_entropy(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            weight,
            labels.t().reshape(-1),
            loss_mask.t().reshape(-1),
            tp,
            add_to_main_grad=self.config.gradient_accumulation_fusion,
            tied_here=self.pre_process and self.share_embeddings_and_output_weights,
            expected_scale=self._expected_scale(loss_mask),
            ids=self.loss_ids,
        )

    def _fits(self, labels: torch.Tensor) -> bool:
        """A GPU keeps the logits of one chunk whole: in chunks the table's gradient takes more than they do."""
        return labels.is_cuda and labels.numel() <= LOGIT_ROWS["cuda"] and self.loss_ids is None

    def _expected_scale(self, loss_mask: torch.Tensor) -> float:
        """fp16: what the schedule will multiply the loss by, but for the number of microbatches."""
        if not self.config.fp16 or self.config.grad_scale_func is None:
            return 1.0
        tokens = 1.0 if self.config.calculate_per_token_loss else max(1.0, loss_mask.sum().item())
        return self.config.grad_scale_func(torch.ones(())).item() / tokens


class AccumulatingEmbedding(VocabParallelEmbedding):
    """The vocabulary's table, whose gradient adds the batch's few rows to `main_grad`.

    By itself it makes a gradient as large as the table, nearly all of it zeros, and adds that up.
    """

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        here = (input_ >= self.vocab_start_index) & (input_ < self.vocab_end_index)
        rows = _Rows.apply((input_ - self.vocab_start_index) * here, self.weight)
        if self.tp_group.size() > 1:
            rows = rows * here.unsqueeze(-1)
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(rows.transpose(0, 1).contiguous(), group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad_output):
        (ids,) = ctx.saved_tensors
        rows, main_grad = grad_output.reshape(-1, grad_output.shape[-1]), ctx.weight.main_grad
        main_grad.index_add_(0, ids.reshape(-1), rows.to(main_grad.dtype))
        ctx.weight.grad_added_to_main_grad = True
        return None, torch.empty_like(ctx.weight)  # unwritten, and so no memory: it tells the hooks that there is one
