"""From a recipe to megatron-core's GPTModel: configuration, layer spec, chunks of the pipeline, data parallelism."""

import math
from collections.abc import Callable
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from launcher.engine.initialize import virtual_pipeline_size
from launcher.engine.language_model import LanguageModel
from launcher.engine.lora import adapt
from launcher.engine.sharded import ShardedDataParallel
from launcher.recipe.parts import transformer_engine_ruled_out
from launcher.recipe.schema import Recipe
from launcher.recipe.size import loss_ids

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def transformer_engine(recipe: Recipe) -> bool:
    """Whether Transformer Engine's layers are used: where it is installed, there is a GPU, and nothing rules them out."""
    return HAVE_TE and recipe.derived.device == "cuda" and not transformer_engine_ruled_out(recipe)


def transformer_config(recipe: Recipe) -> TransformerConfig:
    """megatron-core's configuration; the values that are not in a recipe are those of Megatron-LM's defaults."""
    model, parallel, dtype = recipe.model, recipe.parallel, DTYPES[recipe.training.precision]
    on_cpu = recipe.derived.device == "cpu"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.swiglu,
        activation_func=activation(recipe),
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        init_method_std=model.init_method_std,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        attention_softmax_in_fp32=model.attention_softmax_in_fp32,
        # Transformer Engine's; of others the layer spec decides. megatron-core refuses a second choice in one process.
        attention_backend=AttnBackend[model.attention_backend if transformer_engine(recipe) else "auto"],
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_size(recipe),
        pipeline_model_parallel_layout=parallel.pipeline_model_parallel_layout,
        num_layers_in_first_pipeline_stage=parallel.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=parallel.decoder_last_pipeline_num_layers,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers,
        cpu_offloading=parallel.cpu_offloading_num_layers > 0,
        cpu_offloading_num_layers=parallel.cpu_offloading_num_layers,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=on_cpu,
        # gloo sends from the tensor's memory after the call returns; megatron-core would have freed it by then.
        deallocate_pipeline_outputs=not on_cpu,
        # Interleaving sends and receives in pairs as they come; otherwise NCCL batches them. gloo cannot batch.
        overlap_p2p_comm=virtual_pipeline_size(recipe) is not None,
        batch_p2p_comm=not on_cpu and virtual_pipeline_size(recipe) is None,
        # launcher/engine/cpu_port.py has its kernel, a GPU's is in Apex. It adds to a buffer that ZeRO 2 and 3 have not.
        gradient_accumulation_fusion=on_cpu and (parallel.zero or 0) < 2,
        masked_softmax_fusion=False,
        bias_activation_fusion=fused_activation(recipe),
        bias_dropout_fusion=not on_cpu,
        apply_rope_fusion=transformer_engine(recipe) and model.position_embedding_type == "rope",
        persist_layer_norm=False,
        # Rows differ in how many of their tokens are trained: a mean of means would weigh these unequally.
        calculate_per_token_loss=recipe.data.train is not None,
    )


def activation(recipe: Recipe) -> Callable[[torch.Tensor], torch.Tensor]:
    """What stands between the two matrices of a feed-forward layer, under the name by which megatron-core knows its fused form."""
    if recipe.model.swiglu:
        return torch.nn.functional.silu
    by_itself = recipe.model.openai_gelu and not fused_activation(recipe)
    return partial(torch.nn.functional.gelu, approximate="tanh") if by_itself else torch.nn.functional.gelu


def fused_activation(recipe: Recipe) -> bool:
    """Whether a GPU adds the bias and computes the activation in one kernel: megatron-core's for GELU, which it asks for by the
    exact function, is of the tanh formula, 5e-4 from it."""
    model = recipe.model
    return recipe.derived.device == "cuda" and (model.swiglu or model.openai_gelu and model.add_bias_linear)


def build_chunk(recipe: Recipe, config: TransformerConfig, pre: bool, post: bool, vp_stage: int | None = None) -> LanguageModel:
    """One chunk of the model on this rank; `pre` holds the embedding, `post` the output layer and the loss."""
    model, kind, more = recipe.model, LanguageModel, {}
    if transformer_engine(recipe):
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        from launcher.engine.layers import block_spec, layer_spec

        layer = layer_spec(bool(model.quantize), model.attention_backend)
        if model.family == "yuan2":
            from launcher.engine.models import yuan2

            kind, layer = yuan2.Yuan2Model, yuan2.layer_spec(layer)
            more = {"rotary_by_position": recipe.data.reset_position_ids, "rotary_bf16": model.rotary_bf16}
        spec = block_spec(config, vp_stage, layer)
    if (ids := loss_ids(recipe)) is not None:
        more["loss_ids"] = ids
    return kind(
        config,
        spec,
        vocab_size=recipe.derived.padded_vocab_size,
        max_sequence_length=model.max_position_embeddings,
        pre_process=pre,
        post_process=post,
        parallel_output=True,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        rope_scaling=model.use_rope_scaling,
        rope_scaling_factor=model.rope_scaling_factor,
        vp_stage=vp_stage,
        **more,
    )


def build_chunks(recipe: Recipe, config: TransformerConfig) -> list[LanguageModel]:
    """This rank's model chunks, one without interleaving, in the recipe's precision and on this rank's device."""
    chunks = []
    for vp_stage in range(config.virtual_pipeline_model_parallel_size or 1):
        stage = vp_stage if config.virtual_pipeline_model_parallel_size else None
        pre = parallel_state.is_pipeline_first_stage(ignore_virtual=stage is None, vp_stage=stage)
        post = parallel_state.is_pipeline_last_stage(ignore_virtual=stage is None, vp_stage=stage)
        chunk = build_chunk(recipe, config, pre, post, stage)
        if recipe.lora.rank:
            adapt(recipe, chunk)
        for parameter in chunk.parameters():
            mark_tensor_parallel(parameter)
        if recipe.derived.device == "cuda":
            chunk.cuda(torch.cuda.current_device())
        chunks.append(Float16Module(config, chunk) if config.fp16 or config.bf16 else chunk)
    return chunks


def mark_tensor_parallel(parameter: torch.nn.Parameter) -> None:
    """Give a parameter the attributes that the gradient norm needs to count a replicated tensor once."""
    from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes

    set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)


def wrap_data_parallel(recipe: Recipe, config: TransformerConfig, chunks: list) -> list:
    """megatron-core's data parallelism: contiguous gradient buffers, reduced in fp32 under bf16; or ZeRO 2 and 3."""
    parallel = recipe.parallel
    if (parallel.zero or 0) >= 2:
        wrapped = [ShardedDataParallel(config, chunk, unwrap(chunk), parallel.zero) for chunk in chunks]
        config.no_sync_func = wrapped[0].no_sync
        return wrapped
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=recipe.training.precision == "bf16",
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    if parallel.overlap_grad_reduce:  # one bucket otherwise: nothing to overlap
        ddp.bucket_size = max(40_000_000, 1_000_000 * parallel_state.get_data_parallel_world_size())
    wrapped = [
        # Buckets help the first chunk alone; the others' gradients are whole when the schedule reduces them.
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    config.no_sync_func = [chunk.no_sync for chunk in wrapped] if parallel.overlap_grad_reduce else None
    if parallel.overlap_grad_reduce and len(wrapped) == 1:
        config.no_sync_func = wrapped[0].no_sync
    return wrapped


def unwrap(module: torch.nn.Module) -> LanguageModel:
    """The GPTModel inside data-parallel and precision wrappers."""
    while hasattr(module, "module"):
        module = module.module
    return module


def perplexity(loss: float) -> float:
    """exp(loss), capped as Megatron-LM caps it."""
    return math.exp(min(20.0, loss))
