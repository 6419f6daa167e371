"""Which device a run will use, found without importing torch (which costs 3 s)."""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@cache
def gpu_count() -> int:
    """NVIDIA GPUs that the installed torch could use; CUDA_VISIBLE_DEVICES is heeded."""
    try:
        if version("torch").endswith("+cpu"):
            return 0
    except PackageNotFoundError:
        return 0
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) or len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    return min(present, len([one for one in visible.split(",") if one.strip() and one.strip() != "-1"]))


def resolve_device(launch: Any) -> str:
    """`launch.device` → cpu or cuda: auto is cuda where a GPU is present, and for a Slurm job, which runs elsewhere."""
    if launch.device == "auto":
        return "cuda" if launch.kind == "slurm" or gpu_count() else "cpu"
    return launch.device


def on_gpu(yes: Any, no: Any, *, _root_: Any) -> Any:
    """The value of `${on_gpu:yes,no}` in a recipe: `yes` where launch.device comes out as cuda."""
    return yes if resolve_device(_root_.launch) == "cuda" else no
