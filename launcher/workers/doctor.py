"""The worker of `yuan doctor`: one rank starts as in every run, computes a little, and tells what it found."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from launcher.workers.entry import Stop, run_worker

if TYPE_CHECKING:  # importing them takes 0.5 s, in which no signal is answered
    from launcher.recipe.schema import Recipe
    from launcher.run.folder import RunFolder

SIZES = {"cpu": 1024, "cuda": 8192}  # a matrix's width: some 20 ms of work
REDUCED_MIB = 16


def main(recipe: Recipe, folder: RunFolder, stop: Stop) -> None:
    """Leave `doctor_<rank>.json` in the run folder."""
    from launcher.engine.initialize import finish, initialize

    initialize(recipe)
    import torch

    rank, device = torch.distributed.get_rank(), recipe.derived.device
    record = {"rank": rank, **_matmul(device), **_all_reduce(device)}
    if rank == 0:
        from launcher.engine.parts import parts

        record |= {"torch": _torch(device), "fast": _fast_paths(device), "parts": parts(recipe)}
    (folder.path / f"doctor_{rank}.json").write_text(json.dumps(record), encoding="utf-8")
    finish()


def _matmul(device: str) -> dict:
    """Whether a product of whole numbers is exact, and the rate of large ones (fp32 on a CPU, bf16 on a GPU)."""
    import torch

    a, b = (torch.randint(-2, 3, (512, 512), device=device).float() for _ in range(2))
    right = torch.equal((a @ b).sum(1), a @ b.sum(1))  # every sum is below 2**24, so fp32 loses nothing
    n = SIZES[device]
    a = torch.randn(n, n, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    seconds = _best(lambda: a @ a, device)
    return {"matmul_right": right, "gflops": 2 * n**3 / seconds / 1e9}


def _all_reduce(device: str) -> dict:
    import torch

    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    values = torch.full((REDUCED_MIB * 2**18,), float(rank + 1), device=device)
    torch.distributed.all_reduce(values)
    right = bool((values == world * (world + 1) / 2).all())
    seconds = _best(lambda: torch.distributed.all_reduce(values), device)
    return {"all_reduce_right": right, "all_reduce_gbs": REDUCED_MIB * 2**20 / seconds / 1e9}


def _best(work, device: str) -> float:
    """Seconds of the fastest of five: the others had a neighbour."""
    import torch

    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def _torch(device: str) -> list[str]:
    """What torch says of the device, in parts of a line."""
    import torch

    if device == "cpu":
        return [f"{torch.get_num_threads()} threads per rank", "gloo"]
    properties = torch.cuda.get_device_properties(0)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return [f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB each", f"CUDA {torch.version.cuda}", f"NCCL {nccl}"]


def _fast_paths(device: str) -> dict[str, str]:
    """{fast path: "" where it is on, else why not}."""
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE

    fast = {"fused attention": _tried(_attend, device), "fused AdamW": _tried(_adam, device)}
    if device == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        fast["AVX-512"] = "" if capability == "AVX512" else f"this CPU has {capability} at most"
        fast["MKL"] = "" if torch.backends.mkl.is_available() else "this torch is built without it"
    else:
        fast["Transformer Engine"] = "" if HAVE_TE else _why_not("transformer_engine.pytorch")
    fast["gigatoken"] = _why_not("gigatoken")
    return fast


def _attend(device: str) -> None:
    import torch

    x = torch.randn(1, 2, 16, 32, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def _adam(device: str) -> None:
    import torch

    weight = torch.nn.Parameter(torch.ones(8, device=device))
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], fused=True).step()


def _tried(work, device: str) -> str:
    try:
        work(device)
    except Exception as error:  # whatever a kernel's absence raises
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return ""


def _why_not(module: str) -> str:
    import importlib

    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return "not installed" if error.name and module.startswith(error.name) else str(error)
    except Exception as error:  # a wheel for another torch or CUDA raises anything
        return f"installed, but does not import: {str(error).splitlines()[0]}"
    return ""


if __name__ == "__main__":
    run_worker(main)
