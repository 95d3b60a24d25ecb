"""Threads that race each other: what goes wrong in one fails the test, and none is waited for for ever."""

from __future__ import annotations

import random
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

LIMIT = 20.0                    # seconds after which a thread hangs
NOISE = random.Random(0).randbytes(8192)


class Stop(threading.Event):
    """Set when the racing is to end: when its body has ended, or something went wrong."""


@contextmanager
def racing(*works: Callable[[Stop], None]) -> Iterator[Stop]:
    """Each runs in a thread of its own, beside the body.  At the end all are waited for, and what one raised is raised."""
    stop, failures = Stop(), list[BaseException]()

    def run(work: Callable[[Stop], None]) -> None:
        try:
            work(stop)
        except BaseException as problem:
            failures.append(problem)
            stop.set()

    interval = sys.getswitchinterval()
    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        yield stop
    finally:
        stop.set()
        deadline = time.monotonic() + LIMIT
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        sys.setswitchinterval(interval)
    if failures:
        raise failures[0]
    if any(thread.is_alive() for thread in threads):
        pytest.fail("a thread hangs")


def race(*works: Callable[[Stop], None]) -> None:
    """Each runs in a thread of its own until it returns."""
    left = threading.Semaphore(0)

    def counted(work: Callable[[Stop], None]) -> Callable[[Stop], None]:
        def run(stop: Stop) -> None:
            try:
                work(stop)
            finally:
                left.release()
        return run

    with racing(*map(counted, works)):
        for _ in works:
            assert left.acquire(timeout=LIMIT), "a thread hangs"


def seal(key: bytes, number: int, size: int = 0) -> bytes:
    """A value that tells its key, its write's number, and whether it is whole."""
    text = b"%d %b " % (number, key) + NOISE[:size]
    return b"%08x " % zlib.crc32(text) + text


def number_in(key: bytes, value: bytes) -> int:
    """The number of the write; fails if this value was never put for this key."""
    number = value.split(b" ", 2)[1]
    assert value.startswith(b"%08x %b %b " % (zlib.crc32(value[9:]), number, key)), (key, value[:60])
    return int(number)
