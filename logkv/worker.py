"""One background thread for one writing engine: it seals, prepares and flushes while puts go on."""

from __future__ import annotations

import heapq
import itertools
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logkv.writer import Writing

PAUSE = 0.05        # seconds without memory


class Worker:
    """Runs bound methods of an engine that it does not keep alive.  Its thread begins with the first call."""

    def __init__(self, engine: Writing) -> None:
        self._engine = weakref.ref(engine)
        self._lock = threading.RLock()      # taken by itself where signals may strike: `with` of a Condition would leak it
        self._wake = threading.Condition(self._lock)
        self._queue: list[tuple[float, int, str]] = []
        self._order = itertools.count()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def call(self, method: Callable[..., Any]) -> None:
        """Runs a method of the engine soon."""
        self.call_later(0.0, method)

    def call_later(self, delay: float, method: Callable[..., Any]) -> None:
        """Runs a method of the engine after `delay` seconds."""
        with self._lock:
            if self._stopped:
                return
            name = method.__name__
            if delay > 0.0 or all(name != waiting for _, _, waiting in self._queue):
                heapq.heappush(self._queue, (time.monotonic() + delay, next(self._order), name))
            if self._thread is None or not self._thread.is_alive():     # or it had no memory to begin with
                self._begin()
            self._wake.notify()

    def _begin(self) -> None:
        """Where no thread is to be had, the next call tries again, and a put does what it cannot wait for."""
        self._thread = threading.Thread(target=_run, args=(self._engine, self), name="logkv", daemon=True)
        try:
            self._thread.start()
        except BaseException as problem:    # if it runs nevertheless, it finds that it is not the worker's
            self._thread = None
            if not isinstance(problem, RuntimeError):
                raise

    def next_task(self) -> str | None:
        """Waits for the next task that is due; None when the worker was stopped, or has another thread."""
        with self._wake:
            while self.runs_here() and not self._stopped:
                if not self._queue:
                    self._wake.wait(1.0)
                    if not self._queue and self._engine() is None:
                        return None
                    continue
                due = self._queue[0][0] - time.monotonic()
                if due <= 0:
                    return heapq.heappop(self._queue)[2]
                self._wake.wait(min(due, 1.0))
                if self._engine() is None:
                    return None
            return None

    def runs_here(self) -> bool:
        """Whether the calling thread is the worker's."""
        return self._thread is threading.current_thread()

    def stop(self) -> None:
        """Drops what is waiting and returns when the thread has finished what it was at."""
        with self._lock:
            self._stopped = True
            self._queue.clear()
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread() and not sys.is_finalizing():
            self._thread.join()
        self._thread = None


def _next(worker: Worker) -> str | None:
    """What the worker is to do; lack of memory does not end its thread."""
    while True:
        try:
            return worker.next_task()
        except MemoryError:
            time.sleep(PAUSE)


def _run(engine: weakref.ref[Writing], worker: Worker) -> None:
    while (name := _next(worker)) is not None:
        alive = engine()
        if alive is None:
            return
        try:
            getattr(alive, name)()
        except BaseException as problem:      # it is kept, and raised by the write that meets it again
            alive.failed_in_background(problem)
        del alive
