"""Ranks that start as in every run and compute a little: what they found, as lines."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import launcher.workers
from launcher.doctor.finding import Finding
from launcher.launch.torchrun import launch
from launcher.recipe.device import gpu_count, resolve_device
from launcher.recipe.frozen import write_frozen
from launcher.recipe.resolve import cores
from launcher.recipe.schema import Recipe
from launcher.run.folder import RunFolder

WORKER = Path(launcher.workers.__file__).with_name("doctor.py")


def default_ranks() -> int:
    """One per GPU; on a CPU two, so that there is somebody to talk to."""
    return gpu_count() or 2


def findings(ranks: int) -> list[Finding]:
    """Start `ranks` processes; a rank that fails shows its log on stderr, as in a run."""
    recipe = Recipe()
    recipe.model.attention_dropout = recipe.model.hidden_dropout = 0.0  # today's trainings
    recipe.training.seq_length, recipe.training.micro_batch_size = 4096, 2
    recipe.launch.nproc_per_node = recipe.derived.world_size = recipe.derived.data_parallel_size = ranks
    recipe.derived.device = resolve_device(recipe.launch)
    recipe.launch.cpu_threads = max(1, cores() // ranks) if recipe.derived.device == "cpu" else None
    recipe.parallel.distributed_timeout_minutes = 1
    folder = RunFolder(tempfile.mkdtemp(prefix="yuan-doctor-"))
    try:
        folder.logs.mkdir()
        write_frozen(recipe, folder.recipe)
        code = launch(recipe, folder, WORKER, "doctor")
        if code:
            mend = "what ended the first rank stands above; runs would end the same way"
            return [Finding("processes", f"{ranks} were started, and did not end well", mend, broken=True)]
        records = [json.loads((folder.path / f"doctor_{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)
    return _lines(records, recipe.derived.device)


def _lines(records: list[dict], device: str) -> list[Finding]:
    first = records[0]
    lines = [Finding(name, f"off: {why}" if why else "on") for name, why in first["fast"].items()]
    lines.append(Finding("parts", first["parts"]))
    lines.append(Finding("processes", f"{len(records)} x {device}: {', '.join(first['torch'])}"))
    kind = "fp32" if device == "cpu" else "bf16"
    rates = ", ".join(f"rank {one['rank']} {one['gflops']:,.0f}" for one in records)
    lines.append(_checked("matmul", f"{rates} GFLOP/s in {kind}", [one["rank"] for one in records if not one["matmul_right"]]))
    wrong = [one["rank"] for one in records if not one["all_reduce_right"]]
    rate = f"{min(one['all_reduce_gbs'] for one in records):.2f} GB/s, " if len(records) > 1 else "of one rank, "
    lines.append(_checked("all-reduce", f"{rate}sums right", wrong))
    return lines


def _checked(name: str, text: str, wrong: list[int]) -> Finding:
    if not wrong:
        return Finding(name, text)
    mend = "do not train on this machine: its hardware, its driver or its libraries compute wrongly"
    return Finding(name, f"WRONG on rank {', '.join(map(str, wrong))}", mend, broken=True)
