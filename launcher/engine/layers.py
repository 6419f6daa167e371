"""The layer spec for machines without Transformer Engine: megatron-core's modules, with torch's fused attention and norms."""

from contextlib import nullcontext

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.nn.functional import scaled_dot_product_attention

from launcher.engine.attention import causal_attention_with_dropout, document_mask, documents
from launcher.engine.quantized import Int8ColumnParallelLinear, Int8RowParallelLinear


class Norm:
    """torch's LayerNorm or RMSNorm, its parameters marked for sequence parallelism.

    Under sequence parallelism each tensor-parallel rank normalises its slice of the sequence, so the gradients of the
    norm's parameters must be summed over these ranks; megatron-core does so for parameters marked `sequence_parallel`.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype if config.use_cpu_initialization else None)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class FusedAttention(DotProductAttention):
    """Causal attention through `torch.nn.functional.scaled_dot_product_attention`.

    Takes query [sq, b, heads, d], key and value [sk, b, groups, d], returns [sq, b, heads x d], heads and groups being
    those of this tensor-parallel rank. `attention_mask`, where given, is the document of each position [b, s]: attention stays
    within it. On a CPU that is a call for each document, half the work and no mask, and dropout, for which torch has no fused
    kernel there, is this repository's own; on a GPU each layer makes the mask.
    """

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None):
        dropout, on_cpu = self.attention_dropout.p if self.training else 0.0, query.device.type == "cpu"
        apart = documents(attention_mask) if on_cpu and attention_mask is not None else None
        hidden = None if apart or attention_mask is None else document_mask(attention_mask)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        drawing = dropout > 0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if drawing else nullcontext():
            if apart is None:
                context = self._attend(query, key, value, hidden, dropout)
            else:
                context = torch.cat([self._sample(query, key, value, *one, dropout) for one in enumerate(apart)])
        return context.permute(2, 0, 1, 3).reshape(context.shape[2], context.shape[0], -1)

    def _sample(self, query, key, value, number: int, places: list[slice], dropout: float) -> torch.Tensor:
        """One sample of the batch, [1, heads, s, d], its documents apart."""
        parts = [[x[number : number + 1, :, one] for x in (query, key, value)] for one in places]
        return torch.cat([self._attend(*part, None, dropout) for part in parts], dim=2)

    def _attend(self, query, key, value, hidden, dropout: float) -> torch.Tensor:
        """[b, heads, sq, d] of query [b, heads, sq, d], key and value [b, groups, sk, d]; `hidden` is None or a `document_mask`."""
        if dropout > 0 and query.device.type == "cpu":
            repeats = query.shape[1] // key.shape[1]
            if repeats > 1:
                key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
            arguments = [x.flatten(0, 1) for x in (query, key, value)]
            return causal_attention_with_dropout(*arguments, dropout, self.softmax_scale).view(query.shape)
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if hidden is None else ~hidden,
            is_causal=hidden is None,
            dropout_p=dropout,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )


class UnfusedAttention(DotProductAttention):
    """megatron-core's own, matrix products and a softmax; `attention_mask` as FusedAttention's."""

    def forward(self, query, key, value, attention_mask, *rest, **more):
        hidden = None if attention_mask is None else document_mask(attention_mask)
        return super().forward(query, key, value, hidden, *rest, **more)


def layer_spec(int8: bool = False, attention_backend: str = "auto") -> ModuleSpec:
    """One transformer layer; with `int8` one that answers with int8 weights. Tensors bear Transformer Engine's names in
    torch_dist checkpoints, whichever spec trains."""
    core_attention = UnfusedAttention if attention_backend == "unfused" else FusedAttention
    columns, rows = (Int8ColumnParallelLinear, Int8RowParallelLinear) if int8 else (ColumnParallelLinear, RowParallelLinear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=columns, core_attention=core_attention, linear_proj=rows
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=columns, linear_fc2=rows)),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def block_spec(config: TransformerConfig, vp_stage: int | None, layer: ModuleSpec) -> TransformerBlockSubmodules:
    """The layers of one model chunk, and its final norm."""
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=Norm)
