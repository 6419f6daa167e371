"""Yuan 2.0: Llama's layer with filtered queries and keys (Wu et al. 2023, arXiv 2311.15786, localized filtering attention).

    u = input_norm(x)                                     v = W_v u
    w = filter_norm(u + conv2(conv1(u)))                  q, k = W_qk w
    conv(x)[t] = W_0 x[t-1] + W_1 x[t] + b                conv1: h to h/2, conv2: h/2 to h, nothing between them

So a token's query and key see the two tokens before it, its value only itself. All else is Llama's: RMSNorm, RoPE,
SwiGLU, no biases but the two convolutions'.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.parallel_state import get_tensor_model_parallel_rank
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import pad

from launcher.engine.language_model import LanguageModel
from launcher.engine.models.causal_conv import CausalConv


class LocalizedFilter(MegatronModule):
    """RMSNorm(u + conv2(conv1(u))) of the normed input u [s, b, h], whole on every tensor-parallel rank.

    Under sequence parallelism each rank filters its part of the sequence, s / TP tokens, and megatron-core sums the
    gradients of parameters marked `sequence_parallel`.
    """

    def __init__(self, config: TransformerConfig, norm: type):
        super().__init__(config)
        self.conv1 = CausalConv(config, config.hidden_size, config.hidden_size // 2)
        self.conv2 = CausalConv(config, config.hidden_size // 2, config.hidden_size)
        self.norm = norm(config, config.hidden_size, config.layernorm_epsilon)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, normed: torch.Tensor, joined: torch.Tensor | None) -> torch.Tensor:
        return self.norm(normed + self.conv2(self.conv1(normed, joined), joined))


@dataclass
class FilteredAttentionSubmodules:
    """What megatron-core's SelfAttentionSubmodules names, with two projections for one, and the kind of the filter's norm."""

    linear_qk: type
    linear_v: type
    core_attention: type
    linear_proj: type
    norm: type


class FilteredAttention(Attention):
    """megatron-core's attention with queries and keys of the filtered input. Rows of linear_qk: for each head q, then k."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: FilteredAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection=None,
    ):
        super().__init__(config, submodules, layer_number, attn_mask_type, "self", cp_comm_type, pg_collection)
        self.filter = LocalizedFilter(config, submodules.norm)
        self.linear_qk = self._projection(submodules.linear_qk, 2 * self.query_projection_size)
        self.linear_v = self._projection(submodules.linear_v, self.query_projection_size)
        self.q_layernorm = self.k_layernorm = None

    def _projection(self, kind: type, width: int) -> torch.nn.Module:
        return kind(
            self.config.hidden_size,
            width,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **more):
        filtered = self.filter(hidden_states, joined(attention_mask, self.config))
        return super().forward(hidden_states, attention_mask, key_value_states=filtered, **more)

    def get_query_key_value_tensors(self, hidden_states, key_value_states, output_gate=False, split_qkv=True):
        """Query, key and value [s, b, heads, d]; `key_value_states` is the filtered input."""
        qk = self.linear_qk(key_value_states)[0].unflatten(-1, (-1, 2, self.hidden_size_per_attention_head))
        value = self.linear_v(hidden_states)[0].unflatten(-1, (-1, self.hidden_size_per_attention_head))
        query, key = qk.unbind(-2)
        return query, key, value


def joined(document: torch.Tensor | None, config: TransformerConfig) -> torch.Tensor | None:
    """Where the filter may look at the token before: where attention may. None, everywhere, where documents are not kept apart.

    From each position's document [b, s] to [s, b, 1], of this rank's tokens under sequence parallelism.
    """
    if document is None:
        return None
    whole = pad(document[:, 1:] == document[:, :-1], (1, 0)).t()[..., None]
    return whole.chunk(config.tensor_model_parallel_size)[get_tensor_model_parallel_rank()] if config.sequence_parallel else whole


def layer_spec(llama: ModuleSpec) -> ModuleSpec:
    """Yuan 2.0's layer, made of `llama`, the spec of a layer with an input norm of its own."""
    layer, attention = llama.submodules, llama.submodules.self_attention
    parts = attention.submodules
    layer.self_attention = ModuleSpec(
        module=FilteredAttention,
        params=attention.params,
        submodules=FilteredAttentionSubmodules(
            linear_qk=parts.linear_qkv,
            linear_v=parts.linear_qkv,
            core_attention=parts.core_attention,
            linear_proj=parts.linear_proj,
            norm=layer.input_layernorm,
        ),
    )
    del layer.sharded_state_dict_keys_map["input_layernorm."]  # two projections follow it: it is part of neither
    return llama


class BFloat16Rotary(RotaryEmbedding):
    """The angles with which the released weights were trained: positions, frequencies and products rounded to bf16.

    Their code keeps the frequencies as a buffer, which the conversion of the model to bf16 rounds. Above position 256
    neighbours share an angle, in twos, then fours, and so on.
    """

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        positions = torch.arange(max_seq_len, device=self.inv_freq.device) + offset  # an arange in bf16 rounds otherwise
        return torch.outer(positions.bfloat16(), self.inv_freq.bfloat16())


class Yuan2Model(LanguageModel):
    """A model whose RoPE turns by position id where `rotary_by_position` (megatron-core's: by place in the sample)."""

    def __init__(self, config: TransformerConfig, *args, rotary_by_position: bool, rotary_bf16: bool, **more):
        super().__init__(config, *args, **more)
        self.rotary_by_position = rotary_by_position
        if rotary_bf16:
            self.rotary_pos_emb = BFloat16Rotary(
                config.kv_channels,
                more["rotary_percent"],
                rotary_base=more["rotary_base"],
                use_cpu_initialization=config.use_cpu_initialization,
                cp_group=self.pg_collection.cp,
            )

    def _preprocess(self, input_ids, position_ids, *args, **more):
        decoder_input, rotary, *rest = super()._preprocess(input_ids, position_ids, *args, **more)
        if self.rotary_by_position:
            rotary = rotary[position_ids.t(), 0]  # [s, 1, 1, d] to [s, b, 1, d]
        return decoder_input, rotary, *rest
