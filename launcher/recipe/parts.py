"""Which parts of the engine a recipe asks for, said without the engine."""

from __future__ import annotations

from launcher.recipe.schema import Recipe

# By these Transformer Engine is told which attention to use; megatron-core sets them, and fails where they say otherwise.
ATTENTION_ENV = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


def transformer_engine_ruled_out(recipe: Recipe) -> list[str]:
    """The keys whose values do not go with Transformer Engine's layers, which are used on a GPU where there are none.

    A document mask: Megatron's spec tells Transformer Engine that the mask is causal, and it looks at no other. Yuan's filter: it
    stands between the norm and the projection that Transformer Engine fuses. int8 weights, and adapters, whose input is what that
    norm gives.
    """
    asked = {
        "model.family": recipe.model.family == "yuan2",
        "data.reset_attention_mask": recipe.data.reset_attention_mask,
        "model.quantize": recipe.model.quantize,
        "lora.rank": recipe.lora.rank,
    }
    return [key for key, used in asked.items() if used]
