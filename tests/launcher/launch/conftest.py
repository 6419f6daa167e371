"""Two machines: network namespaces of this one, joined by a cable."""

import os
import signal
import subprocess
from dataclasses import dataclass

import pytest

from tests.launcher.engine.conftest import small  # noqa: F401  its data and recipe train here too
from tests.launcher.engine.runs import losses, yuan


@dataclass
class Machine:
    name: str
    address: str

    def start(self, *command, **options) -> subprocess.Popen:
        """A command of this machine, as a child whose process id is the command's own."""
        return subprocess.Popen(["ip", "netns", "exec", self.name, *map(str, command)], **options)

    def pids(self) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """As a power cut: every process at once."""
        for pid in self.pids():
            os.kill(pid, signal.SIGSTOP)
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)


@dataclass
class LongRun:
    """120 steps of `small` in two processes of one machine: long enough to be broken in the middle."""

    words: list[str]
    curve: dict[int, float]


@pytest.fixture(scope="session")
def long_run(small) -> LongRun:  # noqa: F811
    words = ["training.train_iters=120", "optimizer.lr_decay_iters=120", "checkpoint.save_interval=20", "training.eval_iters=0"]
    yuan(small, "pretrain", "recipe=small", "run.name=one_machine", *words, "launch.nproc_per_node=2")
    return LongRun(words, losses(small, "one_machine"))


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="session")
def machines():
    """Two machines with a cable between them, and in each a second interface that leads nowhere, listed first."""
    tag = f"yuan{os.getpid()}"
    pair = [Machine(f"{tag}-{n}", f"10.77.0.{n + 1}") for n in (0, 1)]
    try:
        for machine in pair:
            ip("netns", "add", machine.name)
            ip("-n", machine.name, "link", "set", "lo", "up")
            ip("-n", machine.name, "link", "add", "decoy0", "type", "bridge")
            ip("-n", machine.name, "addr", "add", "192.168.77.1/24", "dev", "decoy0")
            ip("-n", machine.name, "link", "set", "decoy0", "up")
        ip("link", "add", "cable0", "netns", pair[0].name, "type", "veth", "peer", "name", "cable0", "netns", pair[1].name)
        for machine in pair:
            ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", "cable0")
            ip("-n", machine.name, "link", "set", "cable0", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        _remove(pair)
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', None) or error}")
    yield pair
    _remove(pair)


def _remove(pair: list[Machine]) -> None:
    for machine in pair:
        try:
            machine.kill()
            ip("netns", "del", machine.name)
        except (OSError, subprocess.CalledProcessError):
            pass
