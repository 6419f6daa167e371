"""A watch over the steps of a rank: when none comes for long, its stack goes into its log.

A hang says nothing by itself: one rank waits for a disk or a lock, the others wait for it in a collective, and all GPUs
show 100 %. Every rank watches itself, and so the logs together show who waits for whom. Ending the run is left to the
collectives' own limit (parallel.distributed_timeout_minutes).
"""

from __future__ import annotations

import faulthandler
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

LEAST_S = 180.0
USUAL = 5  # times the median of the latest steps
POLL_S = 1.0


class Watchdog:
    """Idle until the first `step`, and again after `rest`."""

    def __init__(self, say: Callable[[str], None]):
        """`say` takes the line that tells a user, once per hang."""
        self._say = say
        self._last: float | None = None
        self._seconds: deque[float] = deque(maxlen=100)
        self._thread: threading.Thread | None = None

    def step(self) -> None:
        """A step is done."""
        now = time.monotonic()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def rest(self) -> None:
        """Something else than a step comes, and may take its time: a checkpoint, the end."""
        self._last = None

    def _watch(self) -> None:
        told: float | None = None
        while True:
            time.sleep(min(POLL_S, LEAST_S / 4))
            last, usual = self._last, statistics.median(self._seconds or [0.0])
            silent = time.monotonic() - (last or time.monotonic())
            if last is None or last == told or silent < max(USUAL * usual, LEAST_S):
                continue
            told = last
            print(f"no step for {silent:.0f} s, usually {usual:.2f} s; all threads:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            self._say(f"no step for {silent:.0f} s, usually {usual:.2f} s")
