"""Launching: how a run of several ranks ends, and what the user sees of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def start(folder: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, str(HERE / "job.py"), str(folder), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def run(folder: Path, *words: str) -> tuple[int, str]:
    job = start(folder, *words)
    out, err = job.communicate(timeout=60)
    assert out == ""  # what is for people goes to stderr
    return job.returncode, err


def wait_for(*paths: Path) -> None:
    for _ in range(600):
        if all(path.exists() and path.read_text() for path in paths):
            return
        time.sleep(0.05)
    raise AssertionError(f"{paths} did not appear")


def training(folder: Path, scenario: str, *words: str) -> tuple[subprocess.Popen, list[int]]:
    """A job whose ranks are in their loop, and their process ids."""
    job = start(folder, scenario, *words)
    pids = [folder / "pid_0", folder / "pid_1"]
    wait_for(*pids)
    return job, [int(pid.read_text()) for pid in pids]


def gone(pid: int) -> bool:
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_success_keeps_the_terminal_clean_and_each_rank_its_log(tmp_path, monkeypatch):
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    code, err = run(tmp_path, "success")
    assert code == 0
    assert err == "shown to the user\n" * 2
    for rank in (0, 1):
        log = (tmp_path / "logs" / f"rank_{rank}.log").read_text()
        assert f"rank {rank} of 2" in log.splitlines()[0]
        assert f"stdout of rank {rank}" in log
        assert "a library complains" in log
        assert "printed by a child process" in log
        assert f"RANK={rank}\nLOCAL_RANK={rank}\nWORLD_SIZE=2\nMASTER_ADDR=127.0.0.1\nOMP_NUM_THREADS=1\n" in log
        assert "CUDA_VISIBLE_DEVICES=\nCUDA_DEVICE_MAX_CONNECTIONS=1\n" in log
        assert "attention []" in log  # megatron-core would refuse what a user's shell says
        assert "path False" in log  # the script's folder does not shadow modules
    assert "ended: exit code 0" in (tmp_path / "logs" / "launcher.log").read_text()


def test_the_rank_that_failed_first_is_shown_first(tmp_path):
    code, err = run(tmp_path, "first_raises")
    assert code == 1
    lines = err.splitlines()
    assert lines[0] == "the run died, first of rank 1: RuntimeError: the boom"
    assert f"the last lines of {tmp_path}/logs/rank_1.log:" in lines
    assert '    raise RuntimeError("the boom")' in err
    assert lines[-1].strip() == "rank 0: ConnectionError: lost the peer"
    record = json.loads((tmp_path / "logs" / "rank_1.error.json").read_text())
    assert (record["rank"], record["type"], record["message"], record["user_errors"]) == (1, "RuntimeError", "the boom", [])
    assert "first_raises" in record["traceback"]


def test_a_rank_that_hangs_after_anothers_failure_is_ended(tmp_path):
    code, err = run(tmp_path, "first_raises_other_hangs")
    assert code == 1
    assert err.startswith("the run died, first of rank 1: RuntimeError: the boom\n")
    assert err.endswith("rank 0: ended by the launcher\n")
    assert gone(int((tmp_path / "pid_0").read_text()))


def test_a_killed_rank_is_the_cause_though_its_peers_error_was_written_sooner(tmp_path):
    code, err = run(tmp_path, "killed")
    assert code == 1
    assert err.startswith("the run died, first of rank 1: killed by SIGKILL: often the machine was out of memory\n")
    assert "then:\n    rank 0: ConnectionError: lost the peer" in err


def test_a_crash_in_c_leaves_the_python_stack(tmp_path):
    code, err = run(tmp_path, "crash")
    assert code == 1
    assert err.startswith("the run died, first of rank 0: killed by SIGSEGV")
    assert "in crash" in err


def test_a_workers_user_error_reads_as_one_before_the_launch(tmp_path):
    code, err = run(tmp_path, "user_error")
    assert code == 2
    assert err == "error: the checkpoint is of another model\n  where: runs/x\n  fix:   give its recipe\n"


def test_several_user_errors_of_a_worker_are_all_shown(tmp_path):
    code, err = run(tmp_path, "two_user_errors")
    assert code == 2
    assert err == "error: the first mistake\nerror: the second mistake\n"


@pytest.mark.parametrize(("number", "verb"), [(signal.SIGTERM, "pretrain"), (signal.SIGHUP, "sft")])
def test_a_signal_to_the_launcher_has_every_rank_save_and_end(tmp_path, number, verb):
    job, pids = training(tmp_path, "train", f"verb={verb}")
    job.send_signal(number)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 3
    assert err == f"{verb} stopped by {number.name}; the same command goes on from step 7\n"
    for rank in (0, 1):
        assert "asked by SIGTERM" in (tmp_path / "logs" / f"rank_{rank}.log").read_text()
        assert (tmp_path / f"saved_{rank}").read_text() == "whole"  # by a child, which the signal must not reach
    assert all(gone(pid) for pid in pids)


def test_ctrl_c_has_every_rank_save_and_end(tmp_path):
    job, pids = training(tmp_path, "train")
    os.killpg(job.pid, signal.SIGINT)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 3
    assert err == "pretrain stopped by SIGINT; the same command goes on from step 7\n"
    assert [(tmp_path / f"saved_{rank}").read_text() for rank in (0, 1)] == ["whole", "whole"]
    assert all(gone(pid) for pid in pids)


def test_ctrl_c_before_a_rank_listens_is_no_crash(tmp_path, monkeypatch):
    monkeypatch.setenv("SLOW_RANK", "0")
    job = start(tmp_path, "waits_for_its_peer")
    wait_for(tmp_path / "importing", tmp_path / "pid_1")
    os.killpg(job.pid, signal.SIGINT)
    out, err = job.communicate(timeout=60)
    assert (job.returncode, err) == (3, "pretrain stopped by SIGINT; there is no checkpoint yet: the same command starts anew\n")
    assert "asked by SIGINT to end before the start" in (tmp_path / "logs" / "rank_0.log").read_text()
    log = (tmp_path / "logs" / "launcher.log").read_text()
    assert "rank 1 ended: killed by the launcher" in log and "memory" not in log


def test_a_second_ctrl_c_kills(tmp_path):
    job, pids = training(tmp_path, "deaf")
    os.killpg(job.pid, signal.SIGINT)
    time.sleep(0.5)
    assert job.poll() is None
    os.killpg(job.pid, signal.SIGINT)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 130
    assert err == "pretrain killed by a second Ctrl-C; there is no checkpoint yet: the same command starts anew\n"
    assert all(gone(pid) for pid in pids)


def test_ranks_die_with_a_killed_launcher_and_the_folder_is_free(tmp_path):
    job, pids = training(tmp_path, "deaf")
    job.kill()
    job.wait()
    assert all(gone(pid) for pid in pids)
    job.stdout.close(), job.stderr.close()
    (tmp_path / "recipe.yaml").unlink()
    assert run(tmp_path, "success")[0] == 0


def test_one_folder_takes_one_job_at_a_time(tmp_path):
    job, _ = training(tmp_path, "train")
    code, err = run(tmp_path, "train")
    assert code == 2
    assert f"another job is writing this run: pid {job.pid} on" in err
    job.terminate()
    job.communicate(timeout=60)
    assert job.returncode == 3


def test_a_dead_run_is_started_again(tmp_path):
    code, err = run(tmp_path, "fails_once", "max_restarts=1")
    assert code == 0
    assert "RuntimeError: only the first time" in err
    assert err.endswith("restart 1 of 1; there is no checkpoint yet: the same command starts anew\n")
    log = (tmp_path / "logs" / "rank_0.log").read_text()
    assert log.count("rank 0 of 2, pid") == 2
    assert log.endswith("went well\n")
    assert not (tmp_path / "logs" / "rank_0.error.json").exists()


def test_a_run_that_dies_again_ends_after_its_last_restart(tmp_path):
    code, err = run(tmp_path, "first_raises", "max_restarts=2")
    assert code == 1
    assert err.count("the run died, first of rank 1: RuntimeError: the boom") == 3
    assert "restart 1 of 2" in err and "restart 2 of 2" in err and "restart 3" not in err


def test_a_users_mistake_is_not_tried_again(tmp_path):
    code, err = run(tmp_path, "user_error", "max_restarts=2")
    assert code == 2 and "restart" not in err
    assert (tmp_path / "logs" / "rank_0.log").read_text().count("rank 0 of 2, pid") == 1


def test_a_hang_shows_where_every_rank_stands(tmp_path):
    code, err = run(tmp_path, "hangs")
    assert code == 0
    assert err.split(" s, usually 0.0")[0] == "\nno step for 1" and err.count("no step") == 1
    assert err.endswith(" s: where each rank stands is in logs/rank_*.log of the run\n")
    for rank in (0, 1):
        log = (tmp_path / "logs" / f"rank_{rank}.log").read_text()
        assert log.count("no step for 1 s, usually 0.0") == 1 and "in seventh_step\n" in log


def test_a_rest_is_no_hang(tmp_path):
    assert run(tmp_path, "rests") == (0, "")


def test_no_child_of_a_rank_is_left_behind(tmp_path):
    assert run(tmp_path, "leaves_a_child")[0] == 1
    assert gone(int((tmp_path / "child_0").read_text()))
    assert gone(int((tmp_path / "child_1").read_text()))


def test_two_jobs_at_once_meet_among_themselves(tmp_path):
    jobs = [start(tmp_path / name, "meet") for name in ("a", "b")]
    for job in jobs:
        err = job.communicate(timeout=120)[1]
        assert job.returncode == 0, err
    assert [(tmp_path / name / f"sum_{rank}").read_text() for name in "ab" for rank in (0, 1)] == ["11"] * 4


def test_two_machines_meet_at_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = "127.0.0.1:%d" % server.getsockname()[1]
    machines = [start(tmp_path, "meet", "nproc_per_node=1", "nnodes=2", f"node_rank={n}", f"rdzv_endpoint={endpoint}") for n in (0, 1)]
    for machine in machines:
        err = machine.communicate(timeout=120)[1]
        assert machine.returncode == 0, err
    assert [(tmp_path / f"sum_{rank}").read_text() for rank in (0, 1)] == ["11", "11"]


def test_several_machines_need_a_meeting_point(tmp_path):
    code, err = run(tmp_path, "meet", "nnodes=2")
    assert code == 2
    assert "launch.rdzv_endpoint=HOST_OF_NODE_0:29500" in err


def test_a_worker_runs_under_torchrun_itself(tmp_path):
    assert run(tmp_path, "meet")[0] == 0
    for rank in (0, 1):
        (tmp_path / f"sum_{rank}").unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*command, str(HERE / "worker.py"), str(tmp_path / "recipe.yaml")], check=True, capture_output=True, timeout=120)
    assert [(tmp_path / f"sum_{rank}").read_text() for rank in (0, 1)] == ["11", "11"]
