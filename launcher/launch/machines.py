"""Several machines as one job: their launchers meet, start their ranks together, and agree how it ended.

The first machine's launcher listens at launch.rdzv_endpoint; the others hold one TCP connection each to it for as long
as one attempt lasts, and meet anew for the next. JSON objects as lines go both ways: hello, start, beat, abort, ended,
verdict. A lost machine shows as a closed connection at once, or as silence. No torch: its store takes 3 s to import,
and cannot tell which machine is gone.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

from launcher.errors import UserError
from launcher.launch.connection import Line, family_of, interface_of
from launcher.launch.outcome import Outcome, worst
from launcher.launch.processes import GRACE_S, StopSignals
from launcher.recipe.endpoint import host_and_port
from launcher.recipe.schema import Recipe

END_S = GRACE_S + 45.0  # from "abort" until every machine has ended its ranks
# What every machine must have alike; paths, the run's folder and threads may be each one's own.
SHARED = ("model", "parallel", "training", "optimizer", "derived")
SHARED_LAUNCH = ("nnodes", "nproc_per_node", "max_restarts")


class Alone:
    """One machine: nobody to meet."""

    def __init__(self, port: int):
        self.address, self.port = "127.0.0.1", port
        self.interface = "lo" if sys.platform == "linux" else None

    def poll(self) -> str | None:
        return None

    def finish(self, own: Outcome, restarts_left: bool) -> Outcome:
        own.again = own.kind == "failed" and restarts_left
        return own

    def close(self) -> None:
        pass


class First:
    """The first machine's side: it waits for the others, starts each attempt, and gives the verdict."""

    def __init__(self, recipe: Recipe, port: int, stop: StopSignals, say: Callable[[str], None]):
        self.recipe, self.port, self.stop = recipe, port, stop
        self.lines: dict[int, Line] = {}
        self.names: dict[int, str] = {}
        self.parts: dict[int, Outcome] = {}
        self.started = False
        self._aborted_at: float | None = None
        try:
            self._gather(_Waiting(recipe, say))
        except UserError as error:
            mistake = {"what": f"machine 0: {error.what}", "where": error.where, "fix": error.fix}
            self._tell(verdict=Outcome("mistake", 0, mistakes=[mistake]).as_dict())
            self.close()
            raise
        # The address that the others reach this machine by: its own name may resolve to 127.0.1.1 here.
        self.address = next((line.connection.getsockname()[0] for line in self.lines.values()), "127.0.0.1")
        self.interface = interface_of(self.address)
        if not stop.requested:
            self.started = True
            self._tell(start=True, port=port)

    def _gather(self, waiting: _Waiting) -> None:
        """Let in every other machine."""
        endpoint, nnodes = meeting_point(self.recipe), self.recipe.launch.nnodes
        guests: list[Line] = []
        try:
            server = socket.create_server(("", endpoint[1]), family=family_of(endpoint))
        except OSError as error:
            what = f"port {endpoint[1]} cannot be opened for the other machines: {error.strerror}"
            fix = "give another port; another job may use this one"
            raise UserError(what, f"launch.rdzv_endpoint={self.recipe.launch.rdzv_endpoint}", fix) from None
        with server:
            while len(self.lines) < nnodes - 1 and not self.stop.requested:
                if select.select([server], [], [], 0.05)[0]:
                    guests.append(Line(server.accept()[0]))
                guests = [guest for guest in guests if not self._welcomed(guest)]
                for rank, line in list(self.lines.items()):
                    line.receive()
                    line.beat()
                    if line.lost:
                        del self.lines[rank]
                missing = [str(n) for n in range(1, nnodes) if n not in self.lines]
                if missing:
                    waiting.wait(f"machine {', '.join(missing)} of {nnodes}", f"launch.node_rank={missing[0]}")

    def _welcomed(self, guest: Line) -> bool:
        """Take in a machine that says hello, or tell it why not. True: the guest needs no more attention."""
        hellos = [message for message in guest.receive() if "hello" in message]
        guest.beat()
        if not hellos:
            return guest.lost is not None  # one who was refused stays until it hangs up: closing might lose the reason
        rank, theirs, mine = hellos[0]["hello"], hellos[0].get("recipe"), shared(self.recipe)
        if not isinstance(rank, int) or not 0 < rank < self.recipe.launch.nnodes:
            guest.send(refused=[f"there is no machine {rank} beside machine 0 of {self.recipe.launch.nnodes}", "launch.node_rank"])
        elif rank in self.lines:
            guest.send(refused=[f"machine {rank} is here already: {self.names[rank]}", "launch.node_rank"])
        elif theirs != mine:
            theirs = theirs if isinstance(theirs, dict) else {}
            key = next((key for key in mine if theirs.get(key) != mine[key]), "recipe")
            guest.send(refused=[f"machine {rank} has {key}={theirs.get(key)}, machine 0 has {mine.get(key)}", key])
        else:
            self.lines[rank], self.names[rank] = guest, str(hellos[0].get("host"))
            return True
        return False

    def poll(self) -> str | None:
        """To be called often: hears and answers the others. Returns why this attempt cannot go on, if so."""
        for rank, line in self.lines.items():
            for message in line.receive():
                if "ended" in message:
                    self.parts[rank] = Outcome(**message["ended"])
            if rank not in self.parts and line.lost:
                self.parts[rank] = Outcome("lost", rank, f"machine {rank} ({self.names[rank]}) was lost: {line.lost}")
            line.beat()
        broken = [part for part in self.parts.values() if part.breaks]
        if broken and self._aborted_at is None:
            self._aborted_at = time.monotonic()
            self._tell(abort=worst(broken).text or "another machine ended")
        if self._aborted_at and time.monotonic() > self._aborted_at + END_S:
            for rank in set(self.lines) - set(self.parts):
                self.parts[rank] = Outcome("lost", rank, f"machine {rank} ({self.names[rank]}) did not end its ranks")
        return (worst(broken).text or "another machine ended") if broken else None

    def finish(self, own: Outcome, restarts_left: bool) -> Outcome:
        """This machine's ranks have ended: wait for the others' and tell all how the whole ended."""
        self.parts[0] = own
        while self.started and len(self.parts) <= len(self.lines) and not self.stop.kill:
            self.poll()
            time.sleep(0.05)
        if self.stop.kill:
            self.parts[0] = Outcome("killed")
        verdict = worst(self.parts.values())
        verdict.again = verdict.kind in ("failed", "lost") and restarts_left
        self._tell(verdict=verdict.as_dict())
        return verdict

    def _tell(self, **message: object) -> None:
        for line in self.lines.values():
            line.send(**message)

    def close(self) -> None:
        """Leave once the others have hung up: closing on unread lines would throw the verdict away."""
        deadline = time.monotonic() + 5
        for line in self.lines.values():
            while not line.closed and time.monotonic() < deadline:
                line.receive()
                time.sleep(0.01)
            line.connection.close()


class Other:
    """Every other machine's side."""

    def __init__(self, recipe: Recipe, stop: StopSignals, say: Callable[[str], None]):
        self.recipe, self.stop, self.rank = recipe, stop, recipe.launch.node_rank
        self.verdict: Outcome | None = None
        self._abort: str | None = None
        self.address, self.port, self.interface = "", 0, None
        self.line: Line | None = None
        waiting = _Waiting(recipe, say)
        while not self._join() and not stop.requested:
            waiting.wait("machine 0", "launch.node_rank=0")
            time.sleep(0.2)

    def _join(self) -> bool:
        """Meet the first machine and wait for its start; False where it is not there (any more)."""
        endpoint = meeting_point(self.recipe)
        try:
            connection = socket.create_connection(endpoint, timeout=5.0)
        except OSError:
            return False
        if connection.getsockname() == connection.getpeername():  # TCP can meet itself on a free port of its own machine
            connection.close()
            return False
        self.line = line = Line(connection)
        line.send(hello=self.rank, host=socket.gethostname(), recipe=shared(self.recipe))
        while not line.lost and not self.stop.requested:
            for message in line.receive():
                if "refused" in message:
                    what, where = message["refused"]
                    raise UserError(what, where, "give every machine the same command, with a launch.node_rank of its own")
                if "verdict" in message:
                    self.verdict = Outcome(**message["verdict"])
                    return True
                if "start" in message:
                    self.address, self.port = connection.getpeername()[0], message["port"]
                    self.interface = interface_of(connection.getsockname()[0])
                    return True
            line.beat()
            time.sleep(0.05)
        connection.close()
        self.line = None
        return False

    def poll(self) -> str | None:
        for message in self.line.receive():
            self._abort = message.get("abort", self._abort)
            if "verdict" in message:
                self.verdict = Outcome(**message["verdict"])
        if self.verdict is None and self.line.lost:
            host = (self.recipe.launch.rdzv_endpoint or "").rpartition(":")[0]
            self.verdict = Outcome("lost", 0, f"machine 0 ({host}) was lost: {self.line.lost}")
        self.line.beat()
        broken = self.verdict is not None and self.verdict.breaks
        return self.verdict.text or self.verdict.kind if broken else self._abort

    def finish(self, own: Outcome, restarts_left: bool) -> Outcome:
        if self.line is None:  # stopped before the meeting
            return own
        self.line.send(ended=own.as_dict())
        while self.verdict is None and not self.stop.kill:
            self.poll()
            time.sleep(0.05)
        if self.verdict is None:
            return Outcome("killed", self.rank)
        if self.verdict.kind == "lost" and self.verdict.machine == 0:  # nobody is there to say so
            self.verdict.again = restarts_left
        return self.verdict

    def close(self) -> None:
        if self.line is not None:
            self.line.connection.close()


def meet(recipe: Recipe, stop: StopSignals, say: Callable[[str], None], port: int) -> Alone | First | Other:
    """Wait until every machine is there; a stop signal ends the waiting.

    Args:
        port: one of this machine's that nobody else is given: where rank 0 will listen, if it runs here.

    Raises:
        UserError: a machine did not come in time, or has another recipe; the meeting point is wrong.
    """
    if recipe.launch.nnodes == 1:
        return Alone(port)
    return Other(recipe, stop, say) if recipe.launch.node_rank else First(recipe, port, stop, say)


def shared(recipe: Recipe) -> dict[str, object]:
    """The values that every machine must have alike, by dotted key, as JSON gives them back."""
    tree = asdict(recipe)
    flat = {f"{group}.{key}": value for group in SHARED for key, value in tree[group].items()}
    flat |= {f"launch.{key}": tree["launch"][key] for key in SHARED_LAUNCH}
    return json.loads(json.dumps(flat))


def meeting_point(recipe: Recipe) -> tuple[str, int]:
    """launch.rdzv_endpoint as host and port.

    Raises:
        UserError: it is not given, or is not HOST:PORT.
    """
    found = host_and_port(recipe.launch.rdzv_endpoint)
    if found is None:
        what = f"several machines need a meeting point, and launch.rdzv_endpoint is {recipe.launch.rdzv_endpoint!r}"
        raise UserError(what, "launch.rdzv_endpoint", "launch.rdzv_endpoint=HOST_OF_NODE_0:29500")
    return found


class _Waiting:
    """Says once that somebody is waited for, when it takes more than a moment, and does not wait for ever."""

    def __init__(self, recipe: Recipe, say: Callable[[str], None]):
        self.endpoint, self.minutes = recipe.launch.rdzv_endpoint, recipe.parallel.distributed_timeout_minutes
        self.speak, self.since, self.said = say, time.monotonic(), False

    def wait(self, who: str, option: str) -> None:
        waited = time.monotonic() - self.since
        if waited > 60 * self.minutes:
            what = f"{who} did not come to {self.endpoint} within {self.minutes} minutes"
            fix = f"start the same command there with {option}; the first machine's ports must be open to the others"
            raise UserError(what, f"launch.rdzv_endpoint={self.endpoint}", fix)
        if waited > 3 and not self.said:
            self.said = True
            self.speak(f"waiting    for {who} at {self.endpoint}")
