"""A worker without an engine: what it does is named by the recipe's run.name."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

if os.environ["RANK"] == os.environ.get("SLOW_RANK"):  # in its imports when the signal comes
    Path(sys.argv[1]).with_name("importing").write_text("yes")
    time.sleep(2)

from checkpoints.folder import begin, commit
from launcher.workers.entry import run_worker, terminal

RANK = int(os.environ["RANK"])
CHILD = "import sys, time; time.sleep(0.5); open(sys.argv[1], 'w').write('whole')"


def main(recipe, folder, stop):
    print("stdout of rank", RANK)
    warnings.warn("a library complains", stacklevel=1)
    (folder.path / f"pid_{RANK}").write_text(str(os.getpid()))
    globals()[recipe.run.name](folder, stop)


def success(folder, stop):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS"):
        print(f"{name}={os.environ[name]}")
    print(f"attention {[name for name in os.environ if name.startswith('NVTE_')]}")
    os.system("echo printed by a child process")
    print(f"path {os.path.dirname(os.path.realpath(__file__)) in map(os.path.realpath, sys.path)}")
    print("shown to the user", file=terminal())


def first_raises(folder, stop):
    if RANK == 1:
        raise RuntimeError("the boom")
    while not folder.rank_error(1).exists():
        time.sleep(0.01)
    raise ConnectionError("lost the peer")


def first_raises_other_hangs(folder, stop):
    if RANK == 1:
        raise RuntimeError("the boom")
    time.sleep(1000)


def killed(folder, stop):
    """Rank 1 is killed as by the out-of-memory killer; rank 0 notices at once and fails too."""
    mark = folder.path / "about_to_die"
    if RANK == 1:
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while not mark.exists():
        time.sleep(0.001)
    raise ConnectionError("lost the peer")


def waits_for_its_peer(folder, stop):
    while True:
        time.sleep(1000)


def crash(folder, stop):
    import faulthandler

    if RANK == 0:
        faulthandler._sigsegv()


def user_error(folder, stop):
    from launcher.errors import UserError

    raise UserError("the checkpoint is of another model", "runs/x", "give its recipe")


def two_user_errors(folder, stop):
    from launcher.errors import UserError, raise_all

    raise_all([UserError("the first mistake"), UserError("the second mistake")])


def train(folder, stop):
    """Until asked to stop; a child process is in the middle of a write when that happens."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder.path / f"saved_{RANK}")])
    while stop.requested is None:
        time.sleep(0.02)
    print("asked by", stop.requested)
    assert child.wait() == 0
    if RANK == 0:
        commit(begin(folder.checkpoints, 7))


def completes(folder, stop):
    """As a training of two steps that has saved its last."""
    if RANK == 0:
        commit(begin(folder.checkpoints, 2))


def deaf(folder, stop):
    time.sleep(1000)


silent = deaf


def until_told(folder, stop):
    while not (folder.path / "go").exists():
        time.sleep(0.02)


def mistake_on_1(folder, stop):
    from launcher.errors import UserError

    if RANK == 1:
        raise UserError("this disk is full", "/data", "make room")
    while not folder.rank_error(1).exists():
        time.sleep(0.01)
    raise ConnectionError("lost the peer")


def stops_together(folder, stop):
    """As a training, whose ranks agree to stop when one of them was asked to."""
    while stop.requested is None and not (folder.path / "stop").exists():
        time.sleep(0.02)
    (folder.path / "stop").touch()


def hangs(folder, stop):
    """Steps of 10 ms; then rank 1 never ends its seventh, and rank 0 waits for it."""
    from launcher.workers import watchdog

    watchdog.LEAST_S = 1.0
    for _ in range(6):
        time.sleep(0.01)
        stop.watchdog.step()
    seventh_step(folder)


def seventh_step(folder):
    peer = folder.rank_log(1 - RANK)  # which may not have begun yet
    while not (peer.exists() and "seventh_step" in peer.read_text()):
        time.sleep(0.02)
    time.sleep(3)  # once told is enough


def rests(folder, stop):
    from launcher.workers import watchdog

    watchdog.LEAST_S = 0.2
    stop.watchdog.step()
    stop.watchdog.rest()
    time.sleep(2)


def fails_once(folder, stop):
    if not (folder.path / f"failed_{RANK}").exists():
        (folder.path / f"failed_{RANK}").touch()
        raise RuntimeError("only the first time")
    print("went well")


def leaves_a_child(folder, stop):
    child = subprocess.Popen(["sleep", "1000"])
    (folder.path / f"child_{RANK}").write_text(str(child.pid))
    if RANK == 1:
        raise RuntimeError("the boom")


def meet(folder, stop):
    import torch

    torch.distributed.init_process_group("gloo")
    total = torch.tensor([10.0**RANK])
    torch.distributed.all_reduce(total)
    (folder.path / f"sum_{RANK}").write_text(str(int(total)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_worker(main)
