"""torch.compile on what lies between a layer's matrix products: norms, SwiGLU, and bias, dropout and residual in one.

Not on the whole layer: megatron-core's linear layers add to a buffer of gradients, at which torch.compile breaks off; in 13
pieces the layer took the same time as these parts do, and three times as long to compile.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

NORMS = (torch.nn.LayerNorm, torch.nn.RMSNorm)


def ask_for_fused(config: TransformerConfig) -> None:
    """megatron-core has torch.compile on its fused functions: on a CPU they are not asked for otherwise. GELU's has another
    formula than the exact one, and is left alone."""
    config.bias_dropout_fusion = True
    config.bias_activation_fusion = config.bias_activation_fusion or config.gated_linear_unit


def compile_norms(chunks: list[torch.nn.Module]) -> None:
    """Every norm that is not Transformer Engine's."""
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, NORMS):
            module.forward = torch.compile(module.forward)
