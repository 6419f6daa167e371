"""Launch a worker as torchrun does: one process per rank, placed by torchrun's environment variables.

With several machines each runs the same command with its own `launch.node_rank`; rank 0's process on the first machine
is the meeting point (`launch.rdzv_endpoint`).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from contextlib import closing
from datetime import datetime
from pathlib import Path

from launcher.errors import UserError
from launcher.launch.failure import failures, raise_user_error, report
from launcher.launch.processes import Exit, StopSignals, supervise
from launcher.recipe.schema import Recipe
from launcher.run.folder import RunFolder
from launcher.workers.entry import PARENT_ENV

STOP_CODES = {-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT}


def launch(recipe: Recipe, folder: RunFolder, worker: Path, verb: str) -> int:
    """Run `worker` on every rank of this machine until all have ended.

    SIGTERM, SIGHUP and Ctrl-C ask the ranks to save and end; a second Ctrl-C kills them. A dead run is started again
    up to `launch.max_restarts` times.

    Args:
        recipe: resolved, frozen as `folder.recipe`.
        folder: from `open_run`.
        worker: the script each rank runs with the frozen recipe's path as its argument.
        verb: names the job in messages.

    Returns:
        0 when it is complete or was stopped as asked, 1 when it died, 130 after a second Ctrl-C.

    Raises:
        UserError: a worker met a mistake the user can mend.
    """
    with StopSignals() as stop:
        for attempt in range(recipe.launch.max_restarts + 1):
            exits = _attempt(recipe, folder, worker, stop)
            found = failures(exits, folder)
            if stop.kill:
                _say(f"{verb} killed by a second Ctrl-C{_resume_hint(verb, folder)}")
                return 130
            if stop.requested and any(exit.code in STOP_CODES for exit in exits):
                found = []  # a rank without its handlers yet died of the signal itself; its peers' errors follow from it
            if not found:
                break
            raise_user_error(found[0])
            _say(report(found, folder))
            if stop.requested or attempt == recipe.launch.max_restarts:
                return 1
            _say(f"\nrestart {attempt + 1} of {recipe.launch.max_restarts}{_resume_hint(verb, folder)}")
    if stop.requested:
        _say(f"{verb} stopped by {stop.requested}{_resume_hint(verb, folder)}")
    return 0


def _attempt(recipe: Recipe, folder: RunFolder, worker: Path, stop: StopSignals) -> list[Exit]:
    ranks = range(recipe.launch.nproc_per_node)
    first = recipe.launch.node_rank * recipe.launch.nproc_per_node
    for local in ranks:
        folder.rank_error(first + local).unlink(missing_ok=True)
    command = [sys.executable, str(worker), str(folder.recipe)]
    with closing(_reserve_port()) as reserved, (folder.logs / "launcher.log").open("a", encoding="utf-8") as log:
        address, port = _meeting_point(recipe, reserved)

        def write(line: str) -> None:
            print(datetime.now().astimezone().isoformat(timespec="milliseconds"), line, file=log, flush=True)

        commands = {first + local: (command, environment(recipe, local, address, port)) for local in ranks}
        return supervise(commands, stop, write)


def environment(recipe: Recipe, local_rank: int, address: str, port: int) -> dict[str, str]:
    """A rank's environment: the user's, torchrun's variables, and what Megatron and the recipe ask for."""
    spec = recipe.launch
    env = dict(os.environ)
    env |= {
        "RANK": str(spec.node_rank * spec.nproc_per_node + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(spec.nnodes * spec.nproc_per_node),
        "LOCAL_WORLD_SIZE": str(spec.nproc_per_node),
        "GROUP_RANK": str(spec.node_rank),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        PARENT_ENV: str(os.getpid()),
    }
    env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron: keeps TP's communication in the order it was issued
    if spec.cpu_threads:
        env |= {"OMP_NUM_THREADS": str(spec.cpu_threads), "MKL_NUM_THREADS": str(spec.cpu_threads)}
    if recipe.derived.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
        env.setdefault("MKL_DYNAMIC", "FALSE")  # as many threads under load as without: another number rounds otherwise
        env.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: huge pages for large tensors, 512 times fewer page faults
        if spec.nnodes == 1 and sys.platform == "linux":
            # gloo asks the resolver for the host's own name, which on laptops and in containers often fails.
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return env


def _meeting_point(recipe: Recipe, reserved: socket.socket) -> tuple[str, int]:
    if recipe.launch.nnodes == 1:
        return "127.0.0.1", reserved.getsockname()[1]
    host, _, port = (recipe.launch.rdzv_endpoint or "").rpartition(":")
    if not host or not port.isdigit():
        what = f"several machines need a meeting point, and launch.rdzv_endpoint is {recipe.launch.rdzv_endpoint!r}"
        raise UserError(what, "launch.rdzv_endpoint", "launch.rdzv_endpoint=HOST_OF_NODE_0:29500")
    return host, int(port)


def _reserve_port() -> socket.socket:
    """A free port that stays ours: bound but not listening, so the kernel gives it to nobody who asks for any port,
    while rank 0's store, which binds it by number with SO_REUSEADDR as we do, may."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("", 0))
    return reserved


def _resume_hint(verb: str, folder: RunFolder) -> str:
    """What the same command would do, with verbs that leave checkpoints."""
    if verb != "pretrain":
        return ""
    iteration = folder.latest_iteration()
    if iteration is None:
        return "; there is no checkpoint yet: the same command starts anew"
    return f"; the same command goes on from step {iteration}"


def _say(text: str) -> None:
    clear = "\r\x1b[2K" if sys.stderr.isatty() else ""  # the live line may still stand there
    print(clear + text, file=sys.stderr, flush=True)
