"""A writer is killed with SIGKILL at random moments; what is left must be what it had acknowledged.

The operations of a store's life follow from a seed, so every process knows what the store holds after so many of them:
the n that the writer acknowledged, or n + 1, as one was under way.  The next writer begins with that one again.

    python -m tests.proof.kill --cycles 1000 [--compacting] [--without-index] [--seconds S] [--seed N] [--dir DIR]

With `--compacting` the writer compacts all the time; without, half of the stores' lives are so.  With `--without-index` the
index is removed before each opening, so that all is rebuilt from the log.
"""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import logkv
from benchmarks.baseline import BaselineError, read_manifest
from logkv import compaction
from tests.proof.common import (NOISE, SEGMENT, Violation, arguments, difference, ended, explained, fork, fork_heard,
                                scratch, verdict)

CYCLES_A_LIFE = 40          # then the store is made anew
OPERATIONS_A_CYCLE = 4000   # their acknowledgements fit into a pipe
DELAYS = 0.0, 0.001, 0.004, 0.02, 0.02          # seconds after which it is killed, at most
DELAYS_COMPACTING = 0.0, 0.004, 0.05, 0.05, 0.2
NUMBER = struct.Struct("<Q")


# -- what is done -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Operation:
    kind: str               # put, delete, clear; sync, compact and reopen change nothing
    key: bytes = b""
    value: bytes = b""


class Script:
    """The operations of one life, in order: the same in every process that knows the seed."""

    def __init__(self, seed: int, compacting: bool = False) -> None:
        self._rng = random.Random(seed)
        self.compacting = compacting
        self._operations: list[Operation] = []
        many = self._rng.choice((10, 300, 3000))
        self.keys = [b"", b"long" * 100, *(b"key %d" % i for i in range(many))]
        self.strangers = [b"never put %d" % i for i in range(20)]

    def __getitem__(self, index: int) -> Operation:
        while len(self._operations) <= index:
            self._operations.append(self._next())
        return self._operations[index]

    def _next(self) -> Operation:
        rng = self._rng
        key, dice = rng.choice(self.keys), rng.random()
        if self.compacting and rng.random() < 0.3:
            return Operation("delete", key) if rng.random() < 0.995 else Operation("compact")
        if dice < 0.80:
            size = rng.randrange(40, 400)
            if dice < (0.10 if self.compacting else 0.02):
                size = rng.choice((4096, 4097, 6000, 30_000, 70_000))
            at = rng.randrange(len(NOISE) - size)
            return Operation("put", key, b"%d " % len(self._operations) + NOISE[at:at + size])
        if dice < 0.98:
            return Operation("delete", key)
        return Operation("clear" if dice > 0.9995 else "reopen" if dice > 0.997 else "sync")


class Model(dict[bytes, bytes]):
    """What a store holds after the first `done` operations."""

    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script = script
        self.done = 0

    def advance(self, done: int) -> None:
        while self.done < done:
            operation = self.script[self.done]
            if operation.kind == "put":
                self[operation.key] = operation.value
            elif operation.kind == "delete":
                self.pop(operation.key, None)
            elif operation.kind == "clear":
                self.clear()
            self.done += 1

    def take(self, found: dict[bytes, bytes]) -> None:
        """Advances over the operation that was under way if `found` has it; raises Violation if `found` is neither."""
        if found == self:
            return
        before = dict(self)
        self.advance(self.done + 1)
        if found != self:
            raise Violation(f"not the state after {self.done - 1} operations ({difference(found, before)}), nor after "
                            f"{self.script[self.done - 1].kind} as well ({difference(found, self)})")

    @property
    def live_bytes(self) -> int:
        return sum(-(-(20 + len(k) + len(v) + 4 * (len(v) > 4096)) // 8) * 8 for k, v in self.items())


def read_all(store: logkv.Store | logkv.Reader, script: Script) -> dict[bytes, bytes]:
    """A store's content while nobody writes, asked for in every way; raises Violation if the answers differ."""
    pairs = list(store.items())
    found = dict(pairs)
    if not len(pairs) == len(found) == len(store):
        raise Violation(f"{len(pairs)} pairs seen, {len(found)} keys among them, len() is {len(store)}")
    for key in [*script.keys, *script.strangers]:
        if store.get(key) != found.get(key) or (key in store) != (key in found):
            raise Violation(f"get({key[:20]!r}) and the iteration disagree")
    return found


# -- who does it ------------------------------------------------------------------------------------------------


def compact_all_the_time() -> None:
    """In this process: nearly everything dead is worth a merge, and each is done in many steps."""
    compaction.SLACK, compaction.DEAD_SHARE, compaction.WORTH, compaction.SWING = 4096, 0.05, 0.02, 64


def write(path: str, script: Script, done: int, count: int, sync: logkv.store.Sync, without_index: bool,
          acknowledge: int) -> None:
    """The victim: goes on where the last one was killed."""
    def start() -> logkv.Store:
        if without_index:
            Path(path, "index").unlink(missing_ok=True)
        return logkv.open(path, "c", sync=sync, segment_size=SEGMENT)

    if script.compacting:
        compact_all_the_time()
    os.write(acknowledge, NUMBER.pack(done))
    store = start()
    for index in range(done, done + count):
        operation = script[index]
        if operation.kind == "put":
            store[operation.key] = operation.value
        elif operation.kind == "delete":
            store.delete(operation.key)
        elif operation.kind == "clear":
            store.clear()
        elif operation.kind == "sync":
            store.sync()
        elif operation.kind == "compact":
            store.compact()
        else:
            store.close()
            store = start()
        os.write(acknowledge, NUMBER.pack(index + 1))
    store.close()


class Watcher:
    """A reader that stays attached while writers die: each value it gets was put for that key, none is older than one
    it saw before, and once nobody writes it sees all of it."""

    def __init__(self, path: str, script: Script, seed: int) -> None:
        self._path, self._script, self._rng = path, script, random.Random(seed)
        self._model = Model(script)
        self._reader: logkv.Reader | None = None
        self._newest: dict[bytes, int] = {}
        self.looks = 0

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def attach(self) -> logkv.Reader | None:
        """The reader; None as long as there is no store."""
        if self._reader is not None and self._rng.random() < 0.003:
            self.close()
        if self._reader is None:
            try:
                self._reader = logkv.Reader(self._path)
            except logkv.NotFoundError:
                if self._model.done:
                    raise
        return self._reader

    def look(self) -> None:
        """A few reads beside the writer."""
        reader = self.attach()
        if reader is None:
            return
        with explained(reader):
            if self._rng.random() < 0.01:
                for key, value in reader.items():
                    self._check(key, value)
            for key in self._rng.choices(self._script.keys, k=20):
                if (found := reader.get(key)) is not None:
                    self._check(key, found)

    def _check(self, key: bytes, value: bytes) -> None:
        self.looks += 1
        number = value.partition(b" ")[0]
        index = int(number) if number.isdigit() and len(number) < 10 else -1
        if index < 0 or self._script[index] != Operation("put", key, value):
            raise Violation(f"{key[:20]!r} had a value that was never put: {value[:40]!r}")
        if index < self._newest.get(key, -1):
            raise Violation(f"{key[:20]!r} fell back from operation {self._newest[key]} to {index}")
        self._newest[key] = index

    def compare(self, done: int) -> int:
        """The whole content after `done` operations or one more; nobody writes."""
        self._model.advance(done)
        reader = self.attach()
        if reader is not None:
            with explained(reader):
                self._model.take(read_all(reader, self._script))
        return self._model.done


class Distant:
    """A Watcher in another process."""

    def __init__(self, path: str, seed: int, script: Script) -> None:
        command, self._command = os.pipe()
        self._reply, reply = os.pipe()
        self._pid = fork(lambda: self._run(path, seed, script, command, reply))
        os.close(command)
        os.close(reply)

    def _run(self, path: str, seed: int, script: Script, command: int, reply: int) -> None:
        os.close(self._command)
        watcher = Watcher(path, script, seed)
        try:
            while True:
                watcher.look()
                if select.select([command], [], [], 0.0002)[0]:
                    order = os.read(command, 8)
                    if not order:
                        break
                    os.write(reply, b"%d %d" % (watcher.compare(NUMBER.unpack(order)[0]), watcher.looks))
        except Exception as problem:
            os.write(reply, f"{type(problem).__name__}: {problem}".encode()[:4000])
        watcher.close()

    def compare(self, done: int) -> tuple[int, int]:
        """(operations seen, values read so far)"""
        try:
            os.write(self._command, NUMBER.pack(done))
        except BrokenPipeError:
            pass
        answer = os.read(self._reply, 4096).decode()
        words = answer.split(" ")
        if not words[0].isdigit():
            raise Violation(f"attached reader in another process: {answer or 'it died'}")
        return int(words[0]), int(words[1])

    def close(self) -> None:
        os.close(self._command)
        os.close(self._reply)
        os.waitpid(self._pid, 0)


# -- what is checked --------------------------------------------------------------------------------------------


@dataclass
class Tally:
    cycles: int = 0
    killed: int = 0
    acknowledged: int = 0
    looks: int = 0
    outputs: int = 0            # of merges, that were there when the writer had been killed
    interrupted: int = 0        # kills after which the inputs were still there too
    violations: list[str] = field(default_factory=list)


class Life:
    """One store, from its creation through many deaths of its writer."""

    def __init__(self, path: str, seed: int, tally: Tally, compacting: bool, without_index: bool) -> None:
        self.path, self.tally, self.never_index = path, tally, without_index
        self.rng = random.Random(seed)
        self.script = Script(seed, compacting or self.rng.random() < 0.5)
        self.model = Model(self.script)
        self.merged: set[int] = set()       # numbers of segments
        self.watched = self.rng.random() < 0.75      # else `control` may go too: attached readers have that page mapped
        self.near = Watcher(path, self.script, seed + 1) if self.watched else None
        self.far = Distant(path, seed + 2, self.script) if self.watched else None

    def close(self) -> None:
        self.tally.outputs += len(self.merged)
        if self.near is not None:
            self.tally.looks += self.near.looks
            self.near.close()
        if self.far is not None:
            self.far.close()

    def cycle(self) -> None:
        self.write_and_kill()
        self.ask_watchers()
        ways = (self.as_writer, self.as_writer, self.without_index, self.as_reader, self.as_reader_alone)
        way = self.rng.choice(ways)
        if self.never_index:
            self.remove_index()
        try:
            way()
        except (logkv.Error, Violation) as problem:
            raise Violation(f"{way.__name__}: {type(problem).__name__}: {problem}") from problem
        self.ask_watchers()

    def write_and_kill(self) -> None:
        rng, done = self.rng, self.model.done
        count = rng.choice((0, 1, 30, 500, *[OPERATIONS_A_CYCLE] * 8))
        sync: logkv.store.Sync = rng.choice(("os", "os", "os", "always", 0.05))
        delay = rng.choice(DELAYS_COMPACTING if self.script.compacting else DELAYS) * rng.random()
        self.script[done + count + 1]       # so that the child does not have to make it
        pid, acknowledged = fork_heard(lambda say: write(self.path, self.script, done, count, sync, self.never_index, say))
        os.read(acknowledged, NUMBER.size)  # it is about to open the store
        until = time.perf_counter() + delay
        looking = self.near is not None and rng.random() < 0.7
        try:
            while (left := until - time.perf_counter()) > 0:
                if looking and self.near is not None:
                    self.near.look()
                elif left > 0.0001:
                    time.sleep(left)
        finally:
            os.kill(pid, signal.SIGKILL)
            status = ended(pid)
            with open(acknowledged, "rb") as pipe:
                answers = pipe.read()
        if answers:
            self.model.advance(NUMBER.unpack_from(answers, len(answers) - NUMBER.size)[0])
        self.tally.acknowledged += self.model.done - done
        self.tally.killed += status < 0
        self.count_merges()
        if status not in (0, -signal.SIGKILL):
            raise Violation(f"the writer failed: status {status}")

    def count_merges(self) -> None:
        with suppress(BaselineError):
            segments = read_manifest(self.path)["segments"]
            self.merged |= {s["number"] for s in segments if s["merged"]}
            self.tally.interrupted += any(s["replaced_by"] for s in segments)

    def ask_watchers(self) -> None:
        if self.near is not None:
            self.model.advance(self.near.compare(self.model.done))
        if self.far is not None:
            done, _ = self.far.compare(self.model.done)
            self.model.advance(done)

    def as_writer(self) -> None:
        """Opened by the next writer, which believes the index, and closed."""
        with logkv.open(self.path, "c", segment_size=SEGMENT) as store:
            self.model.take(read_all(store, self.script))
            facts = store.stats()
            if facts["live_bytes"] != self.model.live_bytes or facts["dead_bytes"] < 0:
                raise Violation(f"{facts['live_bytes']} live bytes counted, {self.model.live_bytes} found, "
                                f"{facts['dead_bytes']} dead; recovery: {facts['recovery']}")
            self.ask_watchers()

    def without_index(self) -> None:
        """All is rebuilt from the log."""
        self.remove_index()
        self.as_writer()

    def as_reader(self) -> None:
        """Nobody repairs anything before the next victim does."""
        try:
            with logkv.open(self.path, "r") as store:
                self.model.take(read_all(store, self.script))
        except logkv.NotFoundError:
            if self.model.done:
                raise

    def as_reader_alone(self) -> None:
        """A reader that has to build an index of its own."""
        self.remove_index()
        self.as_reader()

    def remove_index(self) -> None:
        for name in ("index", "control")[:1 if self.watched else self.rng.randint(1, 2)]:
            Path(self.path, name).unlink(missing_ok=True)


@contextmanager
def living(path: str, seed: int, tally: Tally, compacting: bool, without_index: bool) -> Iterator[Life]:
    life = Life(path, seed, tally, compacting, without_index)
    try:
        yield life
    finally:
        life.close()
        shutil.rmtree(path, ignore_errors=True)


def run(directory: str, cycles: int, seconds: float = float("inf"), seed: int = 1, *, compacting: bool = False,
        without_index: bool = False) -> Tally:
    """So many cycles, or what can be had in so many seconds."""
    tally = Tally()
    deadline = time.monotonic() + seconds
    number = seed * 1_000_003
    while tally.cycles < cycles and time.monotonic() < deadline and len(tally.violations) < 20:
        number += 1
        with living(os.path.join(directory, f"life-{number}"), number, tally, compacting, without_index) as life:
            try:
                for _ in range(min(CYCLES_A_LIFE, cycles - tally.cycles)):
                    tally.cycles += 1
                    life.cycle()
                    if time.monotonic() > deadline:
                        break
            except (logkv.Error, Violation) as problem:
                tally.violations.append(f"life {number}, cycle {tally.cycles}: {problem}")
    return tally


def main() -> int:
    parser = arguments("kill -9, again and again")
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--compacting", action="store_true", help="the writer compacts all the time")
    parser.add_argument("--without-index", action="store_true", help="the index is removed before each opening")
    wanted = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=wanted.dir) as directory:
        tally = run(directory, wanted.cycles, wanted.seconds, wanted.seed, compacting=wanted.compacting,
                    without_index=wanted.without_index)
    rate = tally.cycles / (time.monotonic() - began) * 60
    print("| cycles | of them killed | cycles a minute | acknowledged operations | live reads | merges seen | interrupted "
          "| violations |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    print(f"| {tally.cycles:,} | {tally.killed:,} | {rate:,.0f} | {tally.acknowledged:,} | {tally.looks:,} "
          f"| {tally.outputs:,} | {tally.interrupted:,} | {len(tally.violations)} |")
    return verdict(tally.violations)


if __name__ == "__main__":
    sys.exit(main())
