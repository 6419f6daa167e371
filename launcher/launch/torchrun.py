"""Launch a worker as torchrun does: one process per rank, placed by torchrun's environment variables.

With several machines each runs the same command with its own `launch.node_rank`; their launchers meet at the first
machine's (`launch.rdzv_endpoint`, see `launcher.launch.machines`).
"""

from __future__ import annotations

import os
import socket
import sys
from contextlib import closing
from datetime import datetime
from pathlib import Path

from launcher.errors import UserError, raise_all
from launcher.launch.failure import Failure, as_outcome, failures, report, report_elsewhere
from launcher.launch.machines import Alone, First, Other, meet
from launcher.launch.outcome import Outcome
from launcher.launch.processes import STOP_CODES, Exit, StopSignals, supervise
from launcher.recipe.parts import ATTENTION_ENV
from launcher.recipe.schema import Recipe
from launcher.run.folder import RunFolder
from launcher.workers.entry import PARENT_ENV

STOPPED = 3  # exit code: a signal ended the run in good order, and the same command goes on with it


def launch(recipe: Recipe, folder: RunFolder, worker: Path, verb: str) -> int:
    """Run `worker` on every rank of this machine until all have ended, here and on the other machines.

    SIGTERM, SIGHUP and Ctrl-C ask the ranks to save and end; a second Ctrl-C kills them. A dead run is started again
    on all machines together, up to `launch.max_restarts` times.

    Args:
        recipe: resolved, frozen as `folder.recipe`.
        folder: from `open_run`.
        worker: the script each rank runs with the frozen recipe's path as its argument.
        verb: names the job in messages.

    Returns:
        0 when every rank ended well, STOPPED (3) when a signal asked them to, 1 when the run died, 130 after a second
        Ctrl-C.

    Raises:
        UserError: a worker met a mistake the user can mend, or another machine did not come.
    """
    if recipe.launch.kind != "torchrun":
        raise UserError(f"yuan {verb} starts its processes on this machine", f"launch.kind={recipe.launch.kind}", "launch.kind=torchrun")
    restarts = recipe.launch.max_restarts
    with StopSignals() as stop:
        for attempt in range(restarts + 1):
            verdict, found = _attempt(recipe, folder, worker, stop, restarts_left=attempt < restarts)
            if verdict.kind == "mistake":  # reads as if it had been raised before the launch
                raise_all([UserError(**mistake) for mistake in verdict.mistakes])
            if verdict.kind == "killed":
                _say(f"{verb} killed by a second Ctrl-C{_resume_hint(verb, folder)}")
                return 130
            if verdict.kind in ("stopped", "cut"):
                _say(f"{verb} stopped by {verdict.text}{_resume_hint(verb, folder)}")
                return STOPPED
            if verdict.kind == "done":
                return 0
            here = verdict.kind == "failed" and verdict.machine == recipe.launch.node_rank
            _say(report(found, folder) if here else report_elsewhere(verdict, found))
            if not verdict.again or attempt == restarts:
                return 1
            _say(f"\nrestart {attempt + 1} of {restarts}{_resume_hint(verb, folder)}")
    raise AssertionError("every attempt ends in a verdict")


def _attempt(
    recipe: Recipe, folder: RunFolder, worker: Path, stop: StopSignals, restarts_left: bool
) -> tuple[Outcome, list[Failure]]:
    """One start of every rank: how it ended on all machines, and the failures on this one."""
    with closing(_reserve_port()) as reserved, (folder.logs / "launcher.log").open("a", encoding="utf-8") as log:

        def write(line: str) -> None:
            where = f"machine {recipe.launch.node_rank}: " if recipe.launch.nnodes > 1 else ""  # they share this file
            print(f"{datetime.now().astimezone().isoformat(timespec='milliseconds')} {where}{line}", file=log, flush=True)

        with closing(meet(recipe, stop, _say, reserved.getsockname()[1])) as machines:
            found: list[Failure] = []
            if stop.requested:
                own = Outcome("cut", recipe.launch.node_rank, stop.requested)
            else:
                for rank in local_ranks(recipe):
                    folder.rank_error(rank).unlink(missing_ok=True)
                exits = supervise(commands(recipe, folder.recipe, worker, machines), stop, write, machines.poll)
                own, found = _outcome(recipe, folder, stop, exits)
            verdict = machines.finish(own, restarts_left and not stop.requested)
            write(f"ended: {own.kind}, all: {verdict.kind} {verdict.text}".rstrip())
            return verdict, found


def _outcome(recipe: Recipe, folder: RunFolder, stop: StopSignals, exits: list[Exit]) -> tuple[Outcome, list[Failure]]:
    machine = recipe.launch.node_rank
    if stop.kill:
        return Outcome("killed", machine), []
    if stop.requested and any(exit.code in STOP_CODES for exit in exits):
        # A rank without its handlers yet died of the signal itself; its peers' errors follow from it.
        return Outcome("cut", machine, stop.requested), []
    found = failures(exits, folder)
    if found:
        return as_outcome(found, machine), found
    return Outcome("stopped" if stop.requested else "done", machine, stop.requested or ""), []


def local_ranks(recipe: Recipe) -> range:
    """The ranks of this machine."""
    first = recipe.launch.node_rank * recipe.launch.nproc_per_node
    return range(first, first + recipe.launch.nproc_per_node)


def commands(
    recipe: Recipe, frozen: Path, worker: Path, machines: Alone | First | Other
) -> dict[int, tuple[list[str], dict[str, str]]]:
    """{rank: (command, environment)} of this machine."""
    command = [sys.executable, str(worker), str(frozen)]
    return {rank: (command, environment(recipe, local, machines)) for local, rank in enumerate(local_ranks(recipe))}


def environment(recipe: Recipe, local_rank: int, machines: Alone | First | Other) -> dict[str, str]:
    """A rank's environment: the user's, torchrun's variables, and what Megatron and the recipe ask for."""
    spec = recipe.launch
    env = {name: value for name, value in os.environ.items() if name not in ATTENTION_ENV}
    env |= {
        "RANK": str(local_ranks(recipe)[local_rank]),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(spec.nnodes * spec.nproc_per_node),
        "LOCAL_WORLD_SIZE": str(spec.nproc_per_node),
        "GROUP_RANK": str(spec.node_rank),
        "MASTER_ADDR": machines.address,
        "MASTER_PORT": str(machines.port),
        PARENT_ENV: str(os.getpid()),
    }
    if (recipe.parallel.zero or 0) < 2:  # FSDP2 gathers and sums beside the arithmetic, in queues of their own
        env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron: keeps TP's communication in the order it was issued
    if spec.cpu_threads:
        env |= {"OMP_NUM_THREADS": str(spec.cpu_threads), "MKL_NUM_THREADS": str(spec.cpu_threads)}
    if recipe.derived.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
        env.setdefault("MKL_DYNAMIC", "FALSE")  # as many threads under load as without: another number rounds otherwise
        env.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: huge pages for large tensors, 512 times fewer page faults
        # glibc: what is freed stays in the heap for the next step. Given back to the system and fetched again, its pages took
        # a third of a step: 345M, 13.8 s instead of 8.9; for that the process peaks at 8.2 GiB instead of 7.5.
        env.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 30))
        env.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 30))
    if machines.interface:
        # gloo asks the resolver for the host's own name, which often fails, or picks an interface nobody else reaches.
        env.setdefault("GLOO_SOCKET_IFNAME", machines.interface)
    return env


def _reserve_port() -> socket.socket:
    """A free port that stays ours: bound but not listening, so the kernel gives it to nobody who asks for any port,
    while rank 0's store, which binds it by number with SO_REUSEADDR as we do, may."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("", 0))
    return reserved


def _resume_hint(verb: str, folder: RunFolder) -> str:
    """What the same command would do, with verbs that leave checkpoints."""
    if verb not in ("pretrain", "sft"):
        return ""
    iteration = folder.latest_iteration()
    if iteration is None:
        return "; there is no checkpoint yet: the same command starts anew"
    return f"; the same command goes on from step {iteration}"


def _say(text: str) -> None:
    clear = "\r\x1b[2K" if sys.stderr.isatty() else ""  # the live line may still stand there
    print(clear + text, file=sys.stderr, flush=True)
