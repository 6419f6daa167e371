"""The bench for GPUs runs as it is, at a tiny size on a CPU."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


def test_it_tells_both_loops_and_what_they_ran_on():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.benchmarks.gpu_train", "shapes=tiny"]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], env=os.environ | place, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.splitlines()[-1])
    (result,) = told["results"]
    # embedding and positions; layers of 12 h^2 and 13 h; the last norm
    assert told["device"] == "CPU" and result["parameters"] == 512 * 64 + 32 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64
    for name in ("yuan", "bare megatron-core"):
        assert result[name]["tokens_per_second"] > 0 and 0 < result[name]["of_peak"] and name in run.stdout
