"""A process that has imported the engine, and forks each command and its ranks: what would take a rank 7 s of CPU is done once.

A request {"words": [...], "cwd": ...} is a `yuan` command, {"frozen": ..., "worker": ...} a worker on every rank of a frozen recipe,
{"script": [...]} a script with its arguments. All but the start of processes is as ever: the command line, the checks, the launcher with its signals and logs, a session for each rank.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MKL_DYNAMIC": "FALSE", "THP_MEM_ALLOC_ENABLE": "1", "CUDA_VISIBLE_DEVICES": ""}


@cache
def _process() -> subprocess.Popen:
    root, command = Path(__file__).parents[3], [sys.executable, "-m", "tests.launcher.engine.warm"]
    return subprocess.Popen(command, cwd=root, env=os.environ | ALONE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(**request) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a request, carried out in this process's environment."""
    server = _process()
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as folder:
        written = [Path(folder) / name for name in ("out", "err")]
        print(json.dumps(request | {"env": dict(os.environ), "written": list(map(str, written))}), file=server.stdin, flush=True)
        return int(server.stdout.readline()), *(path.read_text(encoding="utf-8") for path in written)


class ForkedRank:
    """What `launcher.launch.processes` wants of a subprocess.Popen, of a worker that is forked."""

    def __init__(self, command: list[str], env: dict[str, str], **_: object):
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            _end(lambda: _work(command[1:], env))

    def poll(self) -> int | None:
        self._wait(os.WNOHANG)
        return self.returncode

    def wait(self) -> int | None:
        self._wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _wait(self, options: int) -> None:
        if self.returncode is None and (ended := os.waitpid(self.pid, options))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])


def _work(arguments: list[str], env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def _end(work) -> None:
    """Run `work` as the rest of a forked process, with the exit code of a Python process."""
    code: object = 1
    try:
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _answer(request: dict) -> None:
    """One request, in a process of its own."""
    for number, path in enumerate(request["written"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(request["env"])
    from launcher.launch import processes

    processes.subprocess = type("Forking", (), {"Popen": ForkedRank, "DEVNULL": subprocess.DEVNULL})
    if "script" in request:
        return _work(request["script"], request["env"])
    if "words" in request:
        from launcher.cli import main

        os.chdir(request["cwd"])
        sys.argv = ["yuan", *request["words"]]
        return main()
    from launcher.launch.torchrun import launch
    from launcher.recipe.frozen import read_frozen
    from launcher.run.folder import RunFolder

    frozen = Path(request["frozen"])
    sys.exit(launch(read_frozen(frozen), RunFolder(frozen.parent), Path(request["worker"]), "test"))


def _import() -> None:
    import launcher.cli
    from launcher.engine import cpu_port

    cpu_port.install()
    import launcher.engine.checkpoint
    import launcher.engine.generate.answer
    import launcher.engine.parts
    import launcher.engine.train
    import launcher.run.progress


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    _import()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _end(lambda: _answer(request))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=replies)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # pytest's Ctrl-C closes its end of the pipe
    main()
