"""Why a run died: which rank's failure came first, and what the user is shown of it."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass
from typing import Any

from launcher.launch.outcome import Outcome
from launcher.launch.processes import Exit, how
from launcher.run.folder import RunFolder

TAIL_LINES = 20
# A rank killed by one of these was not killed by its peers' failure; its peers' errors, though written sooner than its
# end was seen, follow from it. SIGABRT is not among them: NCCL's watchdog aborts when a peer is lost.
FIRST_CAUSES = {-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE}


@dataclass
class Failure:
    """A rank that failed: its exit, and what it wrote of the exception that ended it, if that was one."""

    exit: Exit
    error: dict[str, Any] | None

    @property
    def order(self) -> tuple[bool, bool, float]:
        """First causes first; ranks that the launcher ended last."""
        return self.exit.by_launcher, self.exit.code not in FIRST_CAUSES, self.error["time"] if self.error else self.exit.time

    def line(self) -> str:
        if self.exit.by_launcher:
            return f"rank {self.exit.rank}: ended by the launcher"
        if self.error is None:
            return f"rank {self.exit.rank}: {how(self.exit.code)}"
        return f"rank {self.exit.rank}: {self.error['type']}: {self.error['message'].strip()}"


def failures(exits: list[Exit], folder: RunFolder) -> list[Failure]:
    """The ranks that ended in failure, the first cause first."""
    found = [Failure(exit, _error(folder, exit.rank)) for exit in exits if exit.code != 0]
    return sorted(found, key=lambda failure: failure.order)


def report(found: list[Failure], folder: RunFolder) -> str:
    """The lines a user sees of a run that died: the first cause, the end of that rank's log, then the others."""
    first = found[0]
    log = folder.rank_log(first.exit.rank)
    lines = [f"the run died, first of {first.line().splitlines()[0]}", "", f"the last lines of {log}:"]
    lines += [f"    {line}" for line in _tail(folder, first.exit.rank)]
    if found[1:]:
        lines += ["", "then:"] + [f"    {_shorten(failure.line())}" for failure in found[1:]]
    return "\n".join(lines)


def as_outcome(found: list[Failure], machine: int) -> Outcome:
    """What the other machines hear of these failures: a mistake of the user's, or the first cause."""
    first = found[0]
    mistakes = first.error["user_errors"] if first.error else []
    return Outcome("mistake" if mistakes else "failed", machine, _shorten(first.line()), list(first.order), mistakes)


def report_elsewhere(verdict: Outcome, found: list[Failure]) -> str:
    """The lines a user sees on a machine other than the one where the run died."""
    where = "" if verdict.kind == "lost" else f"machine {verdict.machine}: "
    lines = [f"the run died, first of {where}{verdict.text}"]
    return "\n".join(lines + (["", "then:"] + [f"    {_shorten(failure.line())}" for failure in found] if found else []))


def _error(folder: RunFolder, rank: int) -> dict[str, Any] | None:
    path = folder.rank_error(rank)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _tail(folder: RunFolder, rank: int) -> list[str]:
    """The end of a rank's log, of its newest start alone."""
    log = folder.rank_log(rank)
    if not log.exists():
        return ["(no log: the process ended before it opened one)"]
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 64 * 1024))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    starts = [number for number, line in enumerate(lines) if re.match(r"==== .* rank \d+ of \d+, pid \d+ ====$", line)]
    return lines[starts[-1] if starts else 0 :][-TAIL_LINES:]


def _shorten(line: str) -> str:
    line = line.splitlines()[0]
    return line if len(line) <= 160 else line[:157] + "..."
