"""Several machines: what one run on two of them computes, and what happens when one is lost."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launcher.engine.runs import losses
from tests.launcher.launch.test_launch import gone, start, wait_for

YUAN = Path(sys.executable).with_name("yuan")


class Job:
    """One training on both machines."""

    def __init__(self, folder, machines, name, *words):
        self.folder, self.machines, self.run = folder, machines, folder / "runs" / name
        self.words = ["pretrain", "recipe=small", f"run.name={name}", *words, "launch.nnodes=2", "launch.rdzv_endpoint=10.77.0.1:29500"]
        self.launchers = [self.start(rank) for rank in (0, 1)]

    def start(self, rank: int) -> subprocess.Popen:
        command = [YUAN, *self.words, f"launch.node_rank={rank}"]
        return self.machines[rank].start(*command, cwd=self.folder, stderr=subprocess.PIPE, text=True)

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while not (self.run / "metrics.jsonl").exists() or f'"iteration": {step},' not in (self.run / "metrics.jsonl").read_text():
            assert time.monotonic() < deadline, [launcher.communicate(timeout=5)[1] for launcher in self.launchers if launcher.poll()]
            time.sleep(0.02)

    def rank_pid(self, rank: int) -> int:
        return int(re.findall(rf"rank {rank} of 2, pid (\d+)", (self.run / "logs" / f"rank_{rank}.log").read_text())[-1])

    def ends(self) -> list[tuple[int, str]]:
        return [(launcher.returncode, err) for launcher, err in [(one, one.communicate(timeout=180)[1]) for one in self.launchers]]


def test_two_machines_compute_what_one_does_and_a_lost_one_is_named_and_may_come_back(small, machines, long_run):
    # A power cut: the other machine ends soon and says which one it lost.
    job = Job(small, machines, "two_machines", *long_run.words)
    job.wait_for_step(50)
    machines[1].kill()
    (code, err), (killed, _) = job.ends()
    assert (code, killed) == (1, -signal.SIGKILL)
    assert re.search(r"the run died, first of machine 1 \(\S+\) was lost: its connection closed", err), err
    assert machines[0].pids() == []  # nothing is left behind

    # The same again with restarts: a killed rank, then a lost machine that comes back.
    job = Job(small, machines, "two_machines", *long_run.words, "launch.max_restarts=2")
    job.wait_for_step(60)
    os.kill(job.rank_pid(1), signal.SIGKILL)
    job.wait_for_step(80)
    machines[1].kill()
    _, first_err = job.launchers[1].communicate(timeout=60)
    job.launchers[1] = job.start(1)
    (code, err), (other_code, other_err) = job.ends()
    assert (code, other_code) == (0, 0), err + other_err
    assert "the run died, first of machine 1: rank 1: killed by SIGKILL" in err
    assert "the run died, first of rank 1: killed by SIGKILL" in first_err
    for text in (err, first_err):
        assert "\nrestart 1 of 2; the same command goes on from step " in text
    assert "restart 2 of 2" in err and "(final)" not in err
    assert losses(small, "two_machines") == long_run.curve


def machine(folder, rank, port, scenario="meet", *words):
    return start(folder, scenario, "nproc_per_node=1", "nnodes=2", f"node_rank={rank}", f"rdzv_endpoint=127.0.0.1:{port}", *words)


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_machines_with_different_recipes_are_told_before_anything_starts(tmp_path, port):
    jobs = [machine(tmp_path, 0, port), machine(tmp_path, 1, port, "meet", "max_restarts=3")]
    err = jobs[1].communicate(timeout=60)[1]
    assert jobs[1].returncode == 2
    assert err.startswith("error: machine 1 has launch.max_restarts=3, machine 0 has 0\n  where: launch.max_restarts\n")
    jobs[1] = machine(tmp_path, 1, port)  # mended: the first one still waits
    for job in jobs:
        err = job.communicate(timeout=60)[1]
        assert job.returncode == 0, err


def test_two_machines_with_one_number(tmp_path, port):
    jobs = [machine(tmp_path / "0", 0, port, "meet", "nnodes=3")]
    jobs += [machine(tmp_path / str(n), 1, port, "meet", "nnodes=3") for n in (1, 2)]
    deadline = time.monotonic() + 60
    while all(job.poll() is None for job in jobs[1:]) and time.monotonic() < deadline:
        time.sleep(0.05)
    refused = next(job for job in jobs[1:] if job.poll() is not None)
    assert refused.returncode == 2 and "error: machine 1 is here already: " in refused.communicate()[1]
    for job in jobs:
        if job is not refused:
            job.terminate()
            assert job.communicate(timeout=60)[1].endswith("pretrain stopped by SIGTERM; there is no checkpoint yet: the same command starts anew\n")
            assert job.returncode in (3, -signal.SIGTERM)  # one that machine 0 told to stop may be on its way out already


@pytest.mark.parametrize(("rank", "who", "option"), [(0, "machine 1 of 2", "launch.node_rank=1"), (1, "machine 0", "launch.node_rank=0")])
def test_a_machine_that_does_not_come(tmp_path, port, rank, who, option):
    job = machine(tmp_path, rank, port, "impatient")
    err = job.communicate(timeout=60)[1]
    assert job.returncode == 2
    assert f"error: {who} did not come to 127.0.0.1:{port} within 0.05 minutes\n" in err and f"start the same command there with {option};" in err


def test_a_machine_that_falls_silent_is_lost(tmp_path, port):
    jobs = [machine(tmp_path, n, port, "silent") for n in (0, 1)]
    wait_for(tmp_path / "pid_0", tmp_path / "pid_1")
    jobs[1].send_signal(signal.SIGSTOP)  # closes no connection, as a machine without power
    err = jobs[0].communicate(timeout=60)[1]
    assert jobs[0].returncode == 1
    assert re.search(r"the run died, first of machine 1 \(\S+\) was lost: nothing was heard of it for \d s", err)
    assert "rank 0: ended by the launcher" in err
    jobs[1].send_signal(signal.SIGCONT)
    err = jobs[1].communicate(timeout=60)[1]
    assert jobs[1].returncode == 1
    assert all(gone(int((tmp_path / f"pid_{rank}").read_text())) for rank in (0, 1))


def test_the_first_machine_is_lost_and_comes_back(tmp_path, port):
    jobs = [machine(tmp_path, n, port, "until_told", "max_restarts=1") for n in (0, 1)]
    pids = [tmp_path / "pid_0", tmp_path / "pid_1"]
    wait_for(*pids)
    before = pids[1].read_text()
    jobs[0].kill()
    jobs[0].communicate()
    jobs[0] = machine(tmp_path, 0, port, "until_told", "max_restarts=1")
    deadline = time.monotonic() + 60
    while pids[1].read_text() in ("", before):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (tmp_path / "go").touch()
    err = [job.communicate(timeout=60)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], err
    assert err[1].startswith("the run died, first of machine 0 (127.0.0.1) was lost: its connection closed\n")
    assert "\nrestart 1 of 1; " in err[1] and err[0] == ""


def test_a_mistake_on_one_machine_ends_all_with_its_words_and_is_not_retried(tmp_path, port):
    jobs = [machine(tmp_path, n, port, "mistake_on_1", "max_restarts=3") for n in (0, 1)]
    for job in jobs:
        err = job.communicate(timeout=60)[1]
        assert (job.returncode, err) == (2, "error: this disk is full\n  where: /data\n  fix:   make room\n")


def test_a_signal_to_one_machine_stops_all(tmp_path, port):
    jobs = [machine(tmp_path, n, port, "stops_together") for n in (0, 1)]
    wait_for(tmp_path / "pid_0", tmp_path / "pid_1")
    jobs[1].terminate()
    for job in jobs:
        err = job.communicate(timeout=60)[1]
        assert job.returncode == 3 and err.startswith("pretrain stopped by SIGTERM")


def test_a_taken_port_is_named(tmp_path, port):
    with socket.create_server(("", port)):
        job = machine(tmp_path, 0, port)
        err = job.communicate(timeout=60)[1]
    assert job.returncode == 2 and f"error: port {port} cannot be opened for the other machines: Address already in use" in err


def test_strangers_at_the_meeting_point_do_no_harm(tmp_path, port):
    first = machine(tmp_path, 0, port)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            stranger = socket.create_connection(("127.0.0.1", port))
            break
        except OSError:
            time.sleep(0.05)
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n\xff\x00")
    other = machine(tmp_path, 1, port)
    for job in (first, other):
        err = job.communicate(timeout=60)[1]
        assert job.returncode == 0, err
    stranger.close()
