"""`yuan doctor`: one screen that tells what there is, and fails where runs would."""

import re
import sys

import pytest

from launcher.doctor import machine, ranks
from tests.launcher.test_cli import yuan


def heads(out: str) -> dict[str, str]:
    """{head of a line: its text, continued lines joined}."""
    found: dict[str, str] = {}
    for line in out.splitlines():
        if line[:20].strip():
            last = line[:20].strip()
            found[last] = line[20:]
        else:
            found[last] += " " + line.strip()
    return found


def test_one_screen_with_real_ranks(tmp_path):
    run = yuan("doctor", "--ranks", "2", cwd=tmp_path, COLUMNS="100")
    assert run.returncode == 0 and run.stderr == "", run.stderr
    assert len(run.stdout.splitlines()) <= 24 and max(map(len, run.stdout.splitlines())) <= 100
    found = heads(run.stdout)
    assert re.match(r"\d+\.\d+\.\d+(, commit [0-9a-f]{12}.*)?, Python 3\.", found["yuan"])
    assert "megatron-core 0.16" in found["packages"] and "torch " in found["packages"]
    assert {"machine", "GPUs", "limits", "disk", "recipes", "slurm", "huge pages", "fused attention", "fused AdamW"} <= set(found)
    assert "./recipes (not there)" in found["recipes"] and "yuan's own (" in found["recipes"]
    assert re.fullmatch(r"rank 0 [\d,]+, rank 1 [\d,]+ GFLOP/s in (fp32|bf16)", found["matmul"])
    assert found["all-reduce"].endswith("GB/s, sums right") and found["processes"].startswith("2 x ")


def test_ranks_that_cannot_talk_are_told_with_their_log(tmp_path):
    run = yuan("doctor", "--ranks", "2", cwd=tmp_path, GLOO_SOCKET_IFNAME="nowhere0", CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 1
    assert "BROKEN" in heads(run.stdout)["processes"] and "mend: what ended the first rank stands above" in run.stdout
    assert "the run died, first of rank " in run.stderr and "nowhere0" in run.stderr


def test_without_ranks_it_needs_no_torch(tmp_path):
    code = "import sys; from launcher.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    run = yuan("doctor", "--ranks", "0", cwd=tmp_path, code=code)
    assert run.returncode == 0 and run.stdout.splitlines()[-1] == "False" and "matmul" not in heads(run.stdout)


@pytest.mark.parametrize(("package", "number", "broken"), [("megatron-core", "0.15.2", True), ("torch", None, True), ("apex", None, False)])
def test_packages_that_cannot_work(monkeypatch, package, number, broken):
    real = machine.installed
    monkeypatch.setattr(machine, "installed", lambda name: number if name == package else real(name))
    line = next(one for one in machine.findings() if one.name == "packages")
    assert line.broken == broken and ("megatron-core==0.16" in line.mend) == broken


def test_low_limits_come_with_their_mend(monkeypatch):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (256, 256))
    line = next(one for one in machine.findings() if one.name == "limits")
    assert "ulimit -n 4096" in line.mend and not line.broken


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's files")
def test_a_folder_that_cannot_be_written_is_broken(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    line = next(one for one in machine.findings() if one.name == "disk")
    assert line.broken and "run.dir=" in line.mend


def test_wrong_sums_are_no_matter_of_speed():
    good = {"rank": 0, "gflops": 1.0, "matmul_right": True, "all_reduce_right": True, "all_reduce_gbs": 1.0, "fast": {}, "parts": "norm: torch LayerNorm", "torch": []}
    lines = {one.name: one for one in ranks._lines([good, good | {"rank": 1, "all_reduce_right": False}], "cpu")}
    assert lines["all-reduce"].broken and lines["all-reduce"].text == "WRONG on rank 1" and not lines["matmul"].broken


def test_the_doctor_and_the_engine_want_the_same_megatron():
    from launcher.engine.cpu_port import MEGATRON_CORE

    assert machine.MEGATRON_CORE == MEGATRON_CORE
