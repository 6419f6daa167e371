"""megatron-core's GPTModel one token at a time: keys and values are kept, so a new token costs one position.

megatron-core's own static inference decodes 5 times slower than Hugging Face on a CPU, its dynamic one wants a GPU and
flash-attn. Here the model's modules stay as they were trained; only the attention between the projections is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch.nn.functional import scaled_dot_product_attention

from launcher.engine.model import DTYPES, transformer_config, unwrap
from launcher.recipe.schema import Recipe


def generation_config(recipe: Recipe):
    """The configuration of a model that will only generate, for `build_chunks`."""
    config = transformer_config(recipe)
    config.perform_initialization = False  # a checkpoint follows; drawing weights would take longer than reading them
    config.apply_rope_fusion = False  # the fused kernel takes one position per step, not one per row
    return config


@dataclass
class Step:
    """What the attention of every layer must know of the step that runs.

    Attributes:
        length: positions in the cache.
        last: [b], where each prompt's last token stands.
        rows: 0 … b - 1; None while the prompts are read.
        positions: [b], where each row's new token stands.
        filled: positions that any row looks at, the longest row's length.
        mask: [b, 1, 1, filled], true where a row may look.
    """

    length: int = 0
    last: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    filled: int = 0
    mask: torch.Tensor | None = None


class CachedAttention(torch.nn.Module):
    """Takes the place of a layer's core attention: query [s, b, heads, d], key and value [s, b, groups, d].

    Prompts are right-padded, and their padding is in the cache too: causality hides it from the prompt, the mask from
    the tokens that follow, and these overwrite it one by one. So no row ever looks at nothing, and no softmax is NaN.
    """

    def __init__(self, step: Step, scale: float | None):
        super().__init__()
        self.step, self.scale = step, scale
        self.keys = self.values = torch.empty(0)  # [b, groups, length, d]

    def forward(self, query, key, value, attention_mask=None, **_):
        step = self.step
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        arguments = {"scale": self.scale, "enable_gqa": query.shape[1] != key.shape[1]}
        if step.rows is None:
            batch, groups, tokens, width = key.shape
            # Zeros: a shorter row's slots that nobody has written yet get the weight 0, and 0 x NaN would be NaN.
            self.keys, self.values = (key.new_zeros(batch, groups, step.length, width) for _ in range(2))
            self.keys[:, :, :tokens], self.values[:, :, :tokens] = key, value
            context = scaled_dot_product_attention(query, key, value, is_causal=True, **arguments)
        else:
            self.keys[step.rows, :, step.positions], self.values[step.rows, :, step.positions] = key[:, :, 0], value[:, :, 0]
            keys, values = self.keys[:, :, : step.filled], self.values[:, :, : step.filled]
            context = scaled_dot_product_attention(query, keys, values, attn_mask=step.mask, **arguments)
        return context.permute(2, 0, 1, 3).flatten(2)

    def keep(self, rows: torch.Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]


class CachedConv(torch.nn.Module):
    """Takes the place of a convolution of Yuan's filter, [s, b, in] to [s, b, out]: it keeps each row's last token.

    For a layer these are the normed input of the last token, h, and what the first convolution made of it, h/2.
    """

    def __init__(self, step: Step, conv: torch.nn.Module):
        super().__init__()
        self.step, self.conv = step, conv
        self.before = torch.empty(0)  # [1, b, in]

    def forward(self, x, joined=None):
        step = self.step
        before, self.before = self.before, x
        if step.rows is None:  # the prompts, right-padded
            before, self.before = None, x[step.last, torch.arange(x.shape[1], device=x.device)][None]
        return self.conv(x, before=before)

    def keep(self, rows: torch.Tensor) -> None:
        self.before = self.before[:, rows]


class CachedModel:
    """This rank's part of the model, with a cache for one batch. Every rank of the model calls the same methods.

    Logits are whole (gathered over tensor-parallel ranks), on the ranks of the last pipeline stage; None on the others.
    """

    def __init__(self, recipe: Recipe, chunks: list):
        """`chunks`: of `build_chunks`, with their weights. Their attention is replaced for good."""
        self.chunks: list[GPTModel] = [unwrap(chunk).eval() for chunk in chunks]
        self.step = Step()
        self.caches: list[CachedAttention | CachedConv] = []
        self.hidden_size, self.dtype = recipe.model.hidden_size, DTYPES[recipe.training.precision]
        self._rotary: torch.Tensor | None = None
        self._every: tuple[torch.Tensor, torch.Tensor] | None = None  # tokens and rows whose logits are wanted, not the last ones'
        for chunk in self.chunks:
            for layer in chunk.decoder.layers:
                attention = layer.self_attention
                attention.core_attention = CachedAttention(self.step, chunk.config.softmax_scale)
                self.caches.append(attention.core_attention)
                if recipe.model.family == "yuan2":
                    lfa = attention.filter
                    lfa.conv1, lfa.conv2 = CachedConv(self.step, lfa.conv1), CachedConv(self.step, lfa.conv2)
                    self.caches += [lfa.conv1, lfa.conv2]

    def prefill(self, ids: torch.Tensor, lengths: torch.Tensor, length: int) -> torch.Tensor | None:
        """Read right-padded prompts [b, s] of `lengths` [b] into a fresh cache of `length` positions.

        Returns the logits after each row's last token, [b, padded vocabulary].
        """
        self._rotary = None
        if hasattr(self.chunks[0], "rotary_pos_emb"):
            self._rotary = self.chunks[0].rotary_pos_emb(length)  # [length, 1, 1, d]
        self.step.length, self.step.last, self.step.rows = length, lengths - 1, None
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        rotary = None if self._rotary is None else self._rotary[: ids.shape[1]]
        return self._forward(ids, positions, rotary, lengths - 1)

    def read(self, ids: torch.Tensor) -> torch.Tensor | None:
        """The logits after every token of one prompt [s], [s, padded vocabulary]."""
        row = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        self._every = torch.arange(len(ids), device=ids.device), row
        try:
            return self.prefill(ids[None], torch.tensor([len(ids)], device=ids.device), len(ids))
        finally:
            self._every = None

    def decode(self, ids: torch.Tensor, positions: torch.Tensor, filled: int) -> torch.Tensor | None:
        """One new token per row, ids [b] at positions [b], all below `filled`. Returns the logits after it."""
        step = self.step
        step.rows, step.positions, step.filled = torch.arange(len(ids), device=ids.device), positions, filled
        seen = torch.arange(filled, device=ids.device) <= positions[:, None]
        step.mask = seen[:, None, None]
        rotary = None if self._rotary is None else self._rotary[positions].transpose(0, 1)  # [1, b, 1, d]
        return self._forward(ids[:, None], positions[:, None], rotary, torch.zeros_like(positions))

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows of the batch alone."""
        for cache in self.caches:
            cache.keep(rows)

    def _forward(self, ids, positions, rotary, last) -> torch.Tensor | None:
        """Through all stages; under interleaving each rank has its turn once per chunk."""
        logits = None
        for number, chunk in enumerate(self.chunks):
            if chunk.pre_process:
                hidden = chunk.embedding(input_ids=ids, position_ids=positions)
            else:
                hidden = torch.empty(ids.shape[1], ids.shape[0], self.hidden_size, dtype=self.dtype, device=ids.device)
                torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            chunk.decoder.set_input_tensor(hidden)
            hidden = chunk.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
            if chunk.post_process:
                places = self._every or (last, torch.arange(len(last), device=last.device))
                hidden = hidden[places][None]
                weight = chunk.shared_embedding_or_output_weight() if chunk.share_embeddings_and_output_weights else None
                logits = chunk.output_layer(hidden, weight=weight, runtime_gather_output=True)[0][0]
            else:
                torch.distributed.send(hidden.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return logits
