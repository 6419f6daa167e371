"""A large checkpoint of Yuan's shape from 32 stages to 8 tensor ranks: memory and time beside `cp` of the bytes written.

    python -m tests.benchmarks.convert [FOLDER] [--gb 8] [--rounds 2] [--workers 1 2]

Makes the source in FOLDER (default: the temporary folder; five times the size must be free), converts it, and removes both. A
file system's cache blurs such times: each way is measured twice, by turns, and the bytes are flushed to the disk.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from checkpoints.formats.dialects import yuan
from checkpoints.formats.rank_target import RankFiles
from checkpoints.models import gpt
from checkpoints.models.model import Model

STAGES, RANKS, VOCABULARY = 32, 8, 135_040


def model_of(gigabytes: float) -> Model:
    """A Yuan 2.0 of 34 layers, uneven over 32 stages, of about so many bytes in bf16: 18 h² a layer, and the embedding on the
    first and the last stage."""
    layers, hidden = STAGES + 2, 512
    while 2 * (layers * 18 * hidden**2 + 2 * VOCABULARY * hidden) < gigabytes * 1e9:
        hidden += 64
    return Model(
        "yuan2", layers, hidden, 4 * hidden, 16, 16, hidden // 16, 4096, VOCABULARY, position_embedding_type="rope",
        normalization="RMSNorm", norm_epsilon=1e-6, swiglu=True, add_bias_linear=False, attention_dropout=0.0, hidden_dropout=0.0,
    )  # fmt: skip


def make(folder: Path, model: Model) -> None:
    """The source, of random numbers that repeat from tensor to tensor."""
    target = RankFiles(folder / "release", model, _bf16(model), yuan(), 1, [1] * 10 + [2, 2] + [1] * 20)
    largest = max(torch.Size(one.shape).numel() for one in target.order())
    random = torch.randn(largest, generator=torch.Generator().manual_seed(1)).bfloat16()
    target.files.create()
    for one in target.order():
        target.put(one, random[: torch.Size(one.shape).numel()].view(one.shape))
    target.finish()
    (folder / "latest_checkpointed_iteration.txt").write_text("release", encoding="utf-8")


def _bf16(model: Model) -> dict[str, torch.dtype]:
    return {one.name: torch.bfloat16 for one in gpt.tensors(model)}


def measured(work: Callable[[], None]) -> tuple[float, float, float]:
    """Seconds, seconds of CPU, and GiB at most resident, of a process that `work` waits for; its bytes are on the disk then."""
    os.sync()
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    work()
    os.sync()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - started, cpu, after.ru_maxrss / 2**20


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("folder", nargs="?", type=Path)
    arguments.add_argument("--gb", type=float, default=8.0)
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--workers", type=int, nargs="+", default=[1])
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="yuan-convert-") as place:
        folder, model = Path(place), model_of(given.gb)
        make(folder / "source", model)
        size = bytes_of(folder / "source")
        shape = f"{model}, {size / 1e9:.2f} GB in {STAGES} files, largest tensor {2 * VOCABULARY * model.hidden_size / 2**20:.0f} MiB"
        print(shape, flush=True)
        yuan_command = [str(Path(sys.executable).with_name("yuan")), "convert", str(folder / "source"), str(folder / "target"), "--to", "yuan"]
        for _ in range(given.rounds):
            for workers in given.workers:
                told("convert", [*yuan_command, "--tp", str(RANKS), "--workers", str(workers)], folder / "target", f"{workers} process(es)")
                told("cp -r", ["cp", "-r", str(folder / "target"), str(folder / "copy")], folder / "copy", "")
                shutil.rmtree(folder / "target")
                shutil.rmtree(folder / "copy")


def told(name: str, command: list[str], written: Path, what: str) -> None:
    """Run a command, and print its time beside the bytes of what it wrote; of several processes the largest one's memory."""
    seconds, cpu, memory = measured(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    more = f", at most {memory:.2f} GiB, {what}" if what else ""
    print(f"{name:8} {seconds:6.1f} s ({bytes_of(written) / seconds / 1e6:,.0f} MB/s), {cpu:5.1f} s of CPU{more}", flush=True)


def bytes_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
