"""The ranks of one machine as processes: start, watch, forward signals, leave none behind.

Why not torch's elastic agent: it signals a rank's whole process group, which kills the checkpoint writers that
megatron-core forks, so a SIGTERM during a save loses the save; on a second Ctrl-C it leaves ranks behind; after a
failure its grace is as long as the one for saving; and importing it takes 3 s. What ranks get is the same:
torchrun's environment variables.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

# A rank that lost its peer fails by itself within moments on gloo; on NCCL it hangs until the launcher ends it.
GRACE_S = 15.0
CUT_GRACE_S = 1.0  # a rank that a stop signal ended before it had begun: its peers only wait for it
POLL_S = 0.05
CHATTER = ("SIGTERM", "SIGINT", "SIGHUP")
HELD_BACK = (signal.SIGTERM, signal.SIGINT)  # until a rank listens: it would die of them with a traceback
STOP_CODES = {-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT}


@dataclass
class Exit:
    """How a rank ended.

    Attributes:
        code: exit status; negative is the signal that killed it.
        time: when it was seen to be gone, seconds since the epoch.
        by_launcher: the launcher killed it, after another rank's failure or a second Ctrl-C.
    """

    rank: int
    code: int
    time: float
    by_launcher: bool = False


class StopSignals:
    """The launcher's own signals, remembered instead of obeyed while ranks run.

    Attributes:
        requested: name of the first one, None as long as none came.
        kill: a Ctrl-C after a stop had been asked for: end everything now.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.kill = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        for name in CHATTER:
            number = signal.Signals[name]
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and background jobs: leave it ignored
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        if self.requested is not None and number == signal.SIGINT:
            self.kill = True
        self.requested = self.requested or signal.Signals(number).name


def supervise(
    commands: dict[int, tuple[list[str], dict[str, str]]],
    stop: StopSignals,
    log: Callable[[str], None],
    elsewhere: Callable[[], str | None] = lambda: None,
) -> list[Exit]:
    """Run one process per rank until all have ended, in the order in which they ended.

    The first stop signal is passed on once, to each rank alone and not to its children. After a rank's failure the
    others have GRACE_S to fail by themselves, for their errors may tell more. Nothing survives the return, nor an
    exception here, nor (on Linux, see `launcher.workers.entry`) the launcher's own death.

    Args:
        commands: {rank: (command, environment)}.
        stop: entered already.
        log: takes one line of what happens.
        elsewhere: asked all the time; says what happened on another machine that ends this run, if something did.
    """
    ranks: dict[int, subprocess.Popen] = {}
    exits: list[Exit] = []
    told = False
    deadline: float | None = None
    killed: set[int] = set()
    try:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
        for rank, (command, environment) in commands.items():
            # Sessions of their own: the terminal's Ctrl-C reaches the launcher alone, once, and a rank's leftover
            # children can be swept together.
            ranks[rank] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
            )
            log(f"started rank {rank}, pid {ranks[rank].pid}")
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while len(exits) < len(ranks):
            ended = {exit.rank for exit in exits}
            alive = {rank: process for rank, process in ranks.items() if rank not in ended}
            for rank, process in alive.items():
                if process.poll() is not None:
                    exits.append(Exit(rank, process.returncode, time.time(), rank in killed))
                    log(f"rank {rank} ended: {'killed by the launcher' if rank in killed else how(process.returncode)}")
                    cut = stop.requested and process.returncode in STOP_CODES
                    if cut or (process.returncode != 0 and deadline is None):
                        deadline = time.monotonic() + (min(CUT_GRACE_S, GRACE_S) if cut else GRACE_S)
            cause = elsewhere()
            if cause and deadline is None:
                log(cause)
                deadline = time.monotonic() + GRACE_S
            if stop.requested and not told:
                told = True
                log(f"got {stop.requested}, telling the ranks")
                _signal(alive.values(), signal.SIGINT if stop.requested == "SIGINT" else signal.SIGTERM)
            if stop.kill or (deadline is not None and time.monotonic() > deadline):
                killed.update(rank for rank, process in alive.items() if process.poll() is None)
                _signal(alive.values(), signal.SIGKILL)
            time.sleep(POLL_S)
        return exits
    finally:
        _sweep(ranks)


def how(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + (": often the machine was out of memory" if name == "SIGKILL" else "")


def _signal(processes, number: signal.Signals) -> None:
    for process in processes:
        process.send_signal(number)  # does nothing to one that has ended


def _sweep(ranks: dict[int, subprocess.Popen]) -> None:
    """Kill what is left of every rank's session: the rank itself, or children it left behind."""
    for process in ranks.values():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        process.wait()
