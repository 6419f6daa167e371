"""How every worker process starts and ends: its log, its signals, its recipe, and a trace of what killed it.

A worker gets the path of the frozen recipe as its one argument, and its place from torchrun's environment variables
(RANK, WORLD_SIZE, ...): `torchrun --nproc-per-node 2 launcher/workers/pretrain.py runs/x/recipe.yaml` works as well.
Nothing but the standard library is imported before the signal handlers stand: importing torch takes 3 s, and a Ctrl-C
then would leave a traceback.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from launcher.workers.watchdog import Watchdog

if TYPE_CHECKING:
    from launcher.recipe.schema import Recipe
    from launcher.run.folder import RunFolder

PARENT_ENV = "YUAN_LAUNCHER_PID"
_terminal: TextIO | None = None


class Stop:
    """Whether this process was asked to save and end.

    Attributes:
        requested: name of the signal ("SIGTERM", "SIGINT"), None as long as nobody asked. Ranks may see it at
            different steps: agree on it over all ranks before acting on it.
        watchdog: to be told of every step.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.watchdog = Watchdog(self._hangs)
        self._time = 0.0
        self._pid = os.getpid()

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        # The launcher starts ranks with both held back: what came meanwhile arrives now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))

    def _handle(self, number: int, _frame: object) -> None:
        if os.getpid() != self._pid:  # a forked child, such as a checkpoint writer: ends as if it had no handler
            os._exit(128 + number)
        # One Ctrl-C can arrive twice, from the terminal and from the launcher; a person's second comes later.
        if number == signal.SIGINT and self.requested == "SIGINT" and time.monotonic() - self._time > 1:
            os._exit(128 + number)
        if self.requested is None:
            self._time = time.monotonic()
            self.requested = signal.Signals(number).name

    @staticmethod
    def _hangs(text: str) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one line per machine; every rank has its stack in its log
            print(f"\n{text}: where each rank stands is in logs/rank_*.log of the run", file=terminal(), flush=True)


def terminal() -> TextIO:
    """The terminal (stderr) that this worker was started on; what is printed elsewhere goes to the rank's log."""
    return _terminal or sys.stderr


def run_worker(main: Callable[[Recipe, RunFolder, Stop], None]) -> None:
    """Run `main(recipe, folder, stop)` as this rank's whole life; call it under `if __name__ == "__main__"`.

    Ends the process with exit code 0, or 1 with `logs/rank_<R>.error.json` beside the log when `main` raises.
    """
    stop = Stop()
    stop.listen()
    _die_with_parent()
    launcher = os.environ.get(PARENT_ENV)
    if launcher and os.getppid() != int(launcher):  # it died before we asked
        os._exit(1)
    _forget_script_folder()
    frozen = Path(sys.argv[1]).absolute()
    rank = int(os.environ.get("RANK", "0"))

    from launcher.run.folder import RunFolder

    folder = RunFolder(frozen.parent, frozen.name)
    folder.logs.mkdir(parents=True, exist_ok=True)
    _redirect(folder.rank_log(rank), rank)
    try:
        from launcher.recipe.frozen import read_frozen

        recipe = read_frozen(frozen)
        if stop.requested:  # nothing has begun, and no peer gets further without this rank
            print(f"asked by {stop.requested} to end before the start")
            os._exit(128 + signal.Signals[stop.requested])
        main(recipe, folder, stop)
    except Exception as error:
        traceback.print_exc()
        _write_error(folder.rank_error(rank), rank, error)
        _leave(1)  # the ordinary way out waits for threads and process groups that wait for this very rank
    _leave(0)  # and takes 2 s of CPU to take torch apart


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies, even by SIGKILL (Linux alone can)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _forget_script_folder() -> None:
    """Take the script's folder out of the import path: its pretrain.py, generate.py would shadow other modules."""
    here = os.path.realpath(os.path.dirname(sys.argv[0]))
    if sys.path and os.path.realpath(sys.path[0]) == here:
        del sys.path[0]


def _redirect(log: Path, rank: int) -> None:
    """Send file descriptors 1 and 2 into the log, C libraries' output and children's too; keep the terminal's."""
    global _terminal
    _terminal = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="replace")
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    print(f"==== {now} rank {rank} of {os.environ.get('WORLD_SIZE', '1')}, pid {os.getpid()} ====")
    faulthandler.enable()  # a segmentation fault leaves the Python stack in the log
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)  # `kill -USR1 PID` shows where a hanging rank stands


def _write_error(path: Path, rank: int, error: Exception) -> None:
    """What killed this rank, for the launcher to show."""
    from launcher.errors import UserError
    from launcher.whole import write_whole

    mistakes = error.each if isinstance(error, UserError) else ()
    record = {
        "rank": rank,
        "time": time.time(),
        "type": type(error).__qualname__,
        "message": str(error),
        "traceback": traceback.format_exc(),
        "user_errors": [{"what": one.what, "where": one.where, "fix": one.fix} for one in mistakes],
    }
    write_whole(path, json.dumps(record, indent=2) + "\n")
