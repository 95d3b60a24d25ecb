"""What the harnesses share: scratch space, processes that are forked and heard, memory they share, and how they end."""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import logkv

SEGMENT = 64 << 10              # the smallest segment: it rotates often
NOISE = random.Random(0).randbytes(1 << 18)


class Violation(Exception):
    """The store broke a promise."""


def scratch() -> str | None:
    """Where temporary stores go: memory if there is any."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


@contextmanager
def explained(reader: logkv.Reader) -> Iterator[None]:
    """What a reader finds broken is said together with how that reader was opened."""
    try:
        yield
    except (Violation, logkv.Error) as problem:
        how = reader._engine.recovered if reader._engine is not None else "closed"
        raise Violation(f"{type(problem).__name__}: {problem}; the reader: {how}") from problem


def difference(found: Mapping[bytes, bytes], expected: Mapping[bytes, bytes]) -> str:
    """In a few words."""
    def some(keys: set[bytes], what: str) -> str:
        return f"{len(keys)} {what}" + (f" ({', '.join(sorted(repr(key[:20]) for key in keys)[:3])})" if keys else "")

    other = {key for key in found.keys() & expected.keys() if found[key] != expected[key]}
    return ", ".join((some(expected.keys() - found.keys(), "missing"), some(other, "different"),
                      some(found.keys() - expected.keys(), "too many")))


# -- processes --------------------------------------------------------------------------------------------------


def fork(body: Callable[[], None]) -> int:
    """The pid of a child that runs `body` and exits with 0, or with 1 and a traceback."""
    pid = os.fork()
    if pid:
        return pid
    try:
        body()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def fork_heard(body: Callable[[int], None]) -> tuple[int, int]:
    """The pid of a child that runs `body` with the end of a pipe to write to, and the end at which it is heard."""
    heard, say = os.pipe()
    pid = fork(lambda: body(say))
    os.close(say)
    return pid, heard


def ended(pid: int) -> int:
    """Waits for a child: its exit code, or the signal that killed it as a negative number."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Child:
    """A child that returns something: whatever JSON can say."""

    def __init__(self, name: str, body: Callable[[], object]) -> None:
        def say(fd: int) -> None:
            with open(fd, "w") as pipe:
                json.dump(body(), pipe)

        self.name = name
        self._pid, self._heard = fork_heard(say)

    def result(self) -> Any:
        """Waits for it; raises Violation if it failed."""
        with open(self._heard) as pipe:
            text = pipe.read()
        status = ended(self._pid)
        if status:
            raise Violation(f"{self.name} ended with status {status}")
        return json.loads(text)


class SharedNumbers:
    """Numbers in memory that forked processes share, each changed by one aligned store."""

    def __init__(self) -> None:
        self._cells = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")

    def __getitem__(self, cell: int) -> int:
        return self._cells[cell]

    def __setitem__(self, cell: int, number: int) -> None:
        self._cells[cell] = number


# -- command lines ----------------------------------------------------------------------------------------------


def arguments(description: str) -> argparse.ArgumentParser:
    """What all of them take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", default=scratch(), help="where the temporary stores go")
    return parser


def verdict(violations: Sequence[str]) -> int:
    """Says what is wrong; the exit status."""
    for violation in violations[:20]:
        print(violation, file=sys.stderr)
    return 1 if violations else 0
