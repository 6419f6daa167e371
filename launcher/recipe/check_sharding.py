"""Checks of what is shared out over the data-parallel ranks, and of what waits in the host's memory."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from launcher.console import plural
from launcher.recipe.check_stages import LAYOUT, PP, pipeline
from launcher.recipe.estimate.stages import chunks
from launcher.recipe.parts import transformer_engine_ruled_out
from launcher.recipe.problem import Case, Problem

ZERO, DISTRIBUTED = "parallel.zero", "parallel.use_distributed_optimizer"
OFFLOADED = "parallel.cpu_offloading_num_layers"


def zero(case: Case) -> Iterator[Problem]:
    """ZeRO's stage 1 is the distributed optimizer; 2 and 3 are FSDP2, which takes the place of Megatron's data parallelism."""
    p = case.recipe.parallel
    if p.zero is None:
        return
    if p.zero not in (1, 2, 3):
        yield Problem(f"ZeRO has the stages 1, 2 and 3, and no {p.zero}", case.at(ZERO), f"{ZERO}=1 or 2 or 3, or null", by_itself=True)
        return
    if bool(p.use_distributed_optimizer) != (p.zero == 1):
        what = "ZeRO's stage 1 is the distributed optimizer" if p.zero == 1 else f"ZeRO's stage {p.zero} shares out the optimizer by itself"
        fix = f"{DISTRIBUTED}={str(p.zero == 1).lower()}" + (", or parallel.zero=1" if p.zero != 1 else "")
        yield Problem(f"{what}, and use_distributed_optimizer is {str(p.use_distributed_optimizer).lower()}", case.at(ZERO, DISTRIBUTED), fix)
    if p.zero == 1:
        return
    yield from _fully_sharded(case)


def _fully_sharded(case: Case) -> Iterator[Problem]:
    p, stage = case.recipe.parallel, case.recipe.parallel.zero
    if p.pipeline_model_parallel_size > 1:
        what = f"ZeRO's stage {stage} would gather a pipeline stage's weights anew for every micro-batch in flight"
        yield Problem(what, case.at(ZERO, PP), f"{PP}=1, or {ZERO}=1")
    for key in ("parallel.overlap_grad_reduce", "parallel.overlap_param_gather"):
        if case.value(key):
            what = f"{key.split('.')[1]} is of Megatron's data parallelism; ZeRO's stage {stage} overlaps by itself"
            yield Problem(what, case.at(key, ZERO), f"{key}=false")
    if case.recipe.training.precision == "fp16":
        what = f"ZeRO's stage {stage} has no loss scale that all ranks agree on"
        yield Problem(what, case.at("training.precision", ZERO), f"training.precision=bf16, or {ZERO}=1")
    if case.recipe.lora.rank:
        what = f"ZeRO's stage {stage} shares out what is trained, and of adapters that is little; frozen weights it leaves"
        yield Problem(what, case.at(ZERO, "lora.rank"), f"{ZERO}=1, or lora.rank=null")
    if case.recipe.checkpoint.format == "torch":
        what = f"the torch format has a file for each tensor-parallel rank, and with ZeRO's stage {stage} none holds a whole tensor"
        yield Problem(what, case.at("checkpoint.format", ZERO), "checkpoint.format=torch_dist")
    if case.recipe.derived.data_parallel_size == 1:
        what = f"ZeRO's stage {stage} shares out over the data-parallel ranks, and there is one"
        yield Problem(what, case.at(ZERO), f"{ZERO}=null, or launch.nproc_per_node={2 * case.recipe.launch.nproc_per_node}", "warning")


def idle(case: Case) -> Iterator[Problem]:
    """A rank that trains nothing has no optimizer. megatron-core 0.16 saves Adam's step from rank 0 alone; with the distributed
    optimizer it asks every rank for one, and in 16 bits every rank's state for fp32 weights."""
    recipe, adapters = case.recipe, bool(case.recipe.lora.rank)
    whole = not adapters and not recipe.parallel.use_distributed_optimizer and recipe.training.precision == "fp32"
    of_layout = recipe.parallel.pipeline_model_parallel_layout is not None  # without one each stage has layers
    if whole or not of_layout or any(one.severity == "error" for one in pipeline(case)):
        return
    trained = [any(one.layers or not adapters and (one.embedding or one.output) for one in stage) for stage in chunks(recipe)]
    if ranks := [str(rank) for rank, some in enumerate(trained) if not some]:
        what = f"pipeline rank {' and '.join(ranks)} would train nothing{', without layers for adapters' if adapters else ''}, and have no optimizer to save"
        keys = [LAYOUT, *(["lora.rank"] if adapters else [DISTRIBUTED, "training.precision"])]
        yield Problem(what, case.at(*keys), "a layout with a t on each rank" + (", or lora.rank=null" if adapters else ""))


def offloading(case: Case) -> Iterator[Problem]:
    """Host memory helps a GPU; a CPU's is the same."""
    recipe = case.recipe
    asked = [key for key in (OFFLOADED, "optimizer.optimizer_cpu_offload") if case.value(key)]
    for key in asked if recipe.derived.device == "cpu" else ():
        yield Problem(f"{key.split('.')[1]} moves to the host's memory what a GPU has no room for; this is a CPU", case.at(key, "launch.device"), _off(key))
    for key in asked if case.launching and recipe.derived.device == "cuda" and find_spec("transformer_engine") is None else ():
        what = f"megatron-core's {key.split('.')[1]} needs Transformer Engine, which is not installed"
        yield Problem(what, case.at(key), f"pip install transformer-engine[pytorch], or {_off(key)}")
    if OFFLOADED in asked:
        yield from _activations(case)
    if recipe.optimizer.optimizer_cpu_offload and not recipe.parallel.use_distributed_optimizer:
        what = "megatron-core updates in the host's memory what the distributed optimizer shares out, and nothing else"
        yield Problem(what, case.at("optimizer.optimizer_cpu_offload", DISTRIBUTED), f"{DISTRIBUTED}=true")
    if recipe.optimizer.optimizer_cpu_offload and recipe.training.precision == "fp32":
        what = "megatron-core updates in the host's memory the fp32 copies of 16-bit weights alone"
        yield Problem(what, case.at("optimizer.optimizer_cpu_offload", "training.precision"), "training.precision=bf16")
    if not 0 <= recipe.optimizer.optimizer_offload_fraction <= 1:
        key = "optimizer.optimizer_offload_fraction"
        yield Problem(f"{key} is a share, not {case.value(key)}", case.at(key), "give a value from 0 to 1", by_itself=True)


def _activations(case: Case) -> Iterator[Problem]:
    recipe, number = case.recipe, case.recipe.parallel.cpu_offloading_num_layers
    p, layers = recipe.parallel, recipe.model.num_layers or 0
    if not 0 < number < max(layers, 1):
        what = f"of {plural(layers, 'layer')} the last one's activations are needed at once: {number} cannot wait in the host's memory"
        yield Problem(what, case.at(OFFLOADED, "model.num_layers"), f"{OFFLOADED}={max(layers - 1, 0)}")
    if p.pipeline_model_parallel_size > 1:
        what = "megatron-core moves no activations to the host's memory under a pipeline"
        yield Problem(what, case.at(OFFLOADED, PP), f"{PP}=1, or {_off(OFFLOADED)}")
    if p.recompute_granularity is not None:
        what = "activations are computed again or wait in the host's memory, not both"
        yield Problem(what, case.at(OFFLOADED, "parallel.recompute_granularity"), f"parallel.recompute_granularity=null, or {_off(OFFLOADED)}")
    for key in transformer_engine_ruled_out(recipe):
        what = "Transformer Engine's layers alone move their activations to the host's memory, and these are not they"
        yield Problem(what, case.at(OFFLOADED, key), _off(OFFLOADED))


def _off(key: str) -> str:
    return f"{key}=0" if key == OFFLOADED else f"{key}=false"
