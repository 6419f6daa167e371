"""Process groups and seeds: what a rank does before it builds a model."""

import logging
import os
import random
import warnings
from datetime import timedelta

import numpy as np
import torch

from launcher.engine import cpu_port
from launcher.recipe.schema import Recipe


def initialize(recipe: Recipe) -> None:
    """Join the other ranks, form Megatron's process groups, seed. Needs torchrun's environment variables.

    The seed is Megatron-LM's: training.seed + 100 x pipeline rank, so each stage draws weights of its own, while
    tensor-parallel ranks draw whole matrices and keep their slices (TP does not change the model).
    """
    on_gpu = recipe.derived.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        cpu_port.install()
        # With one generator for both parts, drawing dropout inside a "GPU" context does move the CPU's: said at each layer.
        logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
        if recipe.launch.cpu_threads:
            torch.set_num_threads(recipe.launch.cpu_threads)
    # That Transformer Engine and Apex are missing is said a dozen times at import, once per rank.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|full scope is deprecated)")
    from megatron.core import parallel_state, tensor_parallel

    cpu_port.save_without_a_manager()
    parallel = recipe.parallel
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    torch.distributed.init_process_group(backend="nccl" if on_gpu else "gloo", timeout=timeout)
    parallel_state.initialize_model_parallel(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        virtual_pipeline_size(recipe),
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    seed = recipe.training.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def virtual_pipeline_size(recipe: Recipe) -> int | None:
    """Model chunks per pipeline rank under the interleaved schedule; None without it."""
    parallel = recipe.parallel
    stages = parallel.pipeline_model_parallel_size
    if parallel.pipeline_model_parallel_layout is not None:
        from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

        layout = PipelineParallelLayerLayout.from_str(parallel.pipeline_model_parallel_layout, stages)
        chunks = layout.virtual_pipeline_model_parallel_size
    elif parallel.num_layers_per_virtual_pipeline_stage is None:
        chunks = 1
    else:
        chunks = recipe.model.num_layers // stages // parallel.num_layers_per_virtual_pipeline_stage
    return chunks if chunks > 1 else None


def finish() -> None:
    """Leave the process groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
