"""Checks of how processes share a model and a batch: Megatron's rules on TP, DP and machines; `check_stages` has PP's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from math import gcd
from shutil import which

from launcher.console import plural
from launcher.recipe.device import gpu_count
from launcher.recipe.endpoint import host_and_port, is_loopback
from launcher.recipe.parts import ATTENTION_ENV, transformer_engine_ruled_out
from launcher.recipe.problem import Case, Problem, nearest, nearest_divisors

TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"


def world(case: Case) -> Iterator[Problem]:
    """TP x PP processes hold one model; the whole must be a multiple of that."""
    p, processes = case.recipe.parallel, case.recipe.derived.world_size
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    ranks = tp * pp
    if ranks > 0 and processes > 0 and processes % ranks:
        nodes = case.recipe.launch.nnodes
        per_node = ranks // gcd(ranks, nodes)
        fixes = [f"launch.nproc_per_node={nearest(processes // nodes, per_node)}"]
        fixes += [f"{PP}={nearest_divisors(processes // tp, pp)}"] * (processes % tp == 0)
        fixes += [f"{TP}={nearest_divisors(processes // pp, tp)}"] * (processes % pp == 0)
        yield Problem(
            f"{plural(processes, 'process')} cannot be shared out over TP {tp} x PP {pp} = {ranks}",
            case.at("launch.nnodes", "launch.nproc_per_node", TP, PP),
            ", or ".join(fixes),
        )


def batch(case: Case) -> Iterator[Problem]:
    """The global batch is made of whole micro batches on every data-parallel rank."""
    t, dp = case.recipe.training, case.recipe.derived.data_parallel_size
    micro, total = t.micro_batch_size or 0, t.global_batch_size or 0
    if not dp or micro <= 0 or total <= 0 or total % (micro * dp) == 0:
        return
    fix = f"training.global_batch_size={nearest(total, micro * dp)}"
    if total % dp == 0:
        fix += f", or training.micro_batch_size={nearest_divisors(total // dp, micro)}"
    yield Problem(
        f"global_batch_size {total} is no multiple of micro_batch_size {micro} x data-parallel size {dp} = {micro * dp}",
        case.at("training.global_batch_size", "training.micro_batch_size"),
        fix,
    )


def tensor_parallel(case: Case) -> Iterator[Problem]:
    """Heads, groups and the feed-forward width are cut into TP parts; sequence parallelism also cuts the sequence."""
    m, p, t = case.recipe.model, case.recipe.parallel, case.recipe.training
    tp = p.tensor_model_parallel_size
    if tp < 1:
        return
    for key, value in (("model.num_attention_heads", m.num_attention_heads), ("model.ffn_hidden_size", m.ffn_hidden_size)):
        if value and value % tp:
            yield Problem(
                f"{key} {value} cannot be cut into TP {tp} parts",
                case.at(key, TP),
                f"{key}={nearest(value, tp)}, or {TP}={nearest_divisors(value, tp)}",
            )
    groups = m.num_query_groups if case.given("model.num_query_groups") else 0  # derived: the heads' fault, said above
    if groups > 0 and groups % tp and tp % groups:
        yield Problem(
            f"num_query_groups {groups} is neither a multiple nor a divisor of TP {tp}",
            case.at("model.num_query_groups", TP),
            f"{TP}={nearest_divisors(groups, tp)}, or model.num_query_groups={nearest(groups, tp)}",
        )
    keys = 2 * groups * (m.kv_channels or 0)
    if 0 < groups < tp and tp % groups == 0 and keys % tp:  # heads that several ranks share are cut all the same
        yield Problem(
            f"keys and values of {plural(groups, 'group')} x {m.kv_channels} channels cannot be cut into TP {tp} parts",
            case.at("model.num_query_groups", "model.kv_channels", TP),
            f"model.num_query_groups={tp}, or model.kv_channels={nearest(m.kv_channels, tp)}, or {TP}={groups}",
        )
    if not p.sequence_parallel:
        return
    if tp == 1:
        yield Problem(
            "sequence parallelism shares the sequence over tensor-parallel ranks, and there is one",
            case.at("parallel.sequence_parallel", TP),
            f"parallel.sequence_parallel=false, or {TP}=2",
            "warning",  # Megatron turns it off
        )
    elif t.seq_length and t.seq_length % tp:
        yield Problem(
            f"sequence parallelism cannot cut seq_length {t.seq_length} into TP {tp} parts",
            case.at("training.seq_length", TP),
            f"training.seq_length={nearest(t.seq_length, tp)}",
        )


def data_parallel(case: Case) -> Iterator[Problem]:
    """What the distributed optimizer and the overlaps need."""
    p = case.recipe.parallel
    if p.overlap_param_gather and not p.use_distributed_optimizer:
        yield Problem(
            "overlap_param_gather works with the distributed optimizer",
            case.at("parallel.overlap_param_gather"),
            "parallel.use_distributed_optimizer=true",
        )
    if p.overlap_param_gather and not p.overlap_grad_reduce:
        yield Problem(
            "overlap_param_gather works with overlap_grad_reduce",
            case.at("parallel.overlap_param_gather"),
            "parallel.overlap_grad_reduce=true",
        )


def machines(case: Case) -> Iterator[Problem]:
    """Several machines must find each other; Slurm tells them where by itself."""
    launch = case.recipe.launch
    if launch.kind == "torchrun" and launch.nnodes > 1:
        yield from _meeting(case)
    if launch.kind == "torchrun":  # a Slurm job gets no such variable of this shell's
        yield from _connections(case)
        yield from _attention(case)
    if 0 < launch.nnodes <= launch.node_rank:
        yield Problem(
            f"machine number {launch.node_rank} of {launch.nnodes}: numbers start at 0",
            case.at("launch.node_rank", "launch.nnodes"),
            "launch.node_rank=0" + (f" … {launch.nnodes - 1}" if launch.nnodes > 1 else ""),
        )


def _connections(case: Case) -> Iterator[Problem]:
    """Megatron: with one hardware queue TP's communication starts before the arithmetic that was issued after it."""
    queues = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if queues != "1" and case.recipe.derived.device == "cuda" and case.recipe.parallel.tensor_model_parallel_size > 1:
        what = f"CUDA_DEVICE_MAX_CONNECTIONS={queues} in the environment: tensor parallelism overlaps its communication at 1 alone"
        yield Problem(what, case.at(TP), "unset CUDA_DEVICE_MAX_CONNECTIONS; yuan sets it to 1", "warning")


def _attention(case: Case) -> Iterator[Problem]:
    """What scripts used to choose the attention by, and ranks do not get."""
    for name in ATTENTION_ENV:
        if (value := os.environ.get(name)) is not None:
            fix = f"unset {name}, and choose by model.attention_backend=flash, fused or unfused"
            yield Problem(f"{name}={value} in the environment is not heard", case.at("model.attention_backend"), fix, "warning")


def _meeting(case: Case) -> Iterator[Problem]:
    launch, fix = case.recipe.launch, "launch.rdzv_endpoint=FIRST_MACHINE:29500, the same on every machine"
    if not launch.rdzv_endpoint:
        what, severity = f"{launch.nnodes} machines need a place to meet", "error" if case.launching else "warning"
        yield Problem(what, case.at("launch.nnodes"), f"{fix}, or launch.kind=slurm", severity)
        return
    found, at = host_and_port(launch.rdzv_endpoint), case.at("launch.nnodes", "launch.rdzv_endpoint")
    if found is None:
        yield Problem(f"{launch.rdzv_endpoint} is no host and port to meet at", at, fix)
    elif is_loopback(found[0]):
        what = f"{found[0]} is to every machine its own address: {launch.nnodes} machines do not meet there"
        yield Problem(what, at, fix, "warning")  # several launchers of one machine do


def compiler(case: Case) -> Iterator[Problem]:
    """torch.compile writes C++ for a CPU, and has it compiled where the training runs; Transformer Engine leaves it nothing."""
    fused = case.recipe.derived.device == "cuda" and not transformer_engine_ruled_out(case.recipe)
    if case.recipe.training.torch_compile and fused and (not case.launching or find_spec("transformer_engine")):
        what = "torch_compile changes nothing where Transformer Engine is installed: norms and what follows its matrices are its own"
        yield Problem(what, case.at("training.torch_compile"), "training.torch_compile=false", "warning")
    name = os.environ.get("CXX", "g++")
    if case.recipe.training.torch_compile and case.recipe.derived.device == "cpu" and which(name) is None:
        what, fix = f"torch.compile needs a C++ compiler, and there is no {name} here", "install g++, or training.torch_compile=false"
        yield Problem(what, case.at("training.torch_compile", "launch.device"), fix, "error" if case.launching else "warning")


def gpus(case: Case) -> Iterator[Problem]:
    """A process needs a GPU of its own: here and now where it is about to start, else on the machine that will run it."""
    launch, present = case.recipe.launch, gpu_count()
    if case.recipe.derived.device != "cuda" or launch.kind == "slurm" or launch.nproc_per_node <= present:
        return
    yield Problem(
        f"{plural(launch.nproc_per_node, 'process')} {'wants a GPU' if launch.nproc_per_node == 1 else 'want a GPU each'}, and on this machine torch can use {present}",
        case.at("launch.nproc_per_node", "launch.device"),
        f"launch.nproc_per_node={present}, or launch.device=cpu" if present else "launch.device=cpu, or a machine with GPUs",
        "error" if case.launching else "warning",
    )
