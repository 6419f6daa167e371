"""An ordered map over processes that ends cleanly: a dead worker is an error, and nobody outlives the parent."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from data_tools.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")
_WINDOW = 4  # items per worker under way or waiting for their turn: bounds the memory


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`map(function, items)` on `workers` processes, results in the order of the items.

    `function` is pickled once per worker, or copied with the process where that is forked (see `_context`). Its exceptions are raised at the item's turn, so the first bad item is the
    one reported. Close the iterator to stop early. A worker that dies raises DataError (multiprocessing.Pool would
    wait for it for ever).
    """
    context = _context()
    gc.freeze()  # what is shared with forked processes is not looked at for garbage, here or there: that copies pages
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(function,))
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            with _uninterrupted() if context.get_start_method() == "spawn" else nullcontext():  # the pool starts its processes here, one by one
                pending.append(pool.submit(_call, item))
            if len(pending) >= _WINDOW * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        fix = "fewer workers take less memory (--workers); the system's log says if it was killed"
        raise DataError("a worker process died, most likely for want of memory", f"one of {workers} workers", fix) from error
    finally:
        pool.shutdown(cancel_futures=True)
        gc.unfreeze()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits. A process that is started meanwhile never hears of it: while it imported, it would die with a traceback."""
    resource_tracker.ensure_running()  # which starts a process too, and lets signals in behind it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _context() -> multiprocessing.context.BaseContext:
    """Forking copies a built tokenizer in a millisecond where spawning builds it anew in 0.6 s; but a process with
    threads must not fork, as what they hold stays locked in the copy."""
    alone = threading.active_count() == 1 and "torch" not in sys.modules
    return multiprocessing.get_context("fork" if alone and sys.platform == "linux" else "spawn")


_function: Callable[[Any], Any]


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent alone decides
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)
