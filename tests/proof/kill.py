"""A writer is killed with SIGKILL at random moments; what is left must be what it had acknowledged.

The operations of a store's life follow from a seed, so every process knows what the store holds after so many of them:
the n that the writer acknowledged, or n + 1, as one was under way. The next writer begins with that one again.

Each writer is aimed at: at its opening or closing, at a rotation, a sealing, a merge, the index's growth, a clear, or
at any operation. When it comes there it sets a timer, of a random part of the time that the same took before, with
which the kernel kills it; so the moments are spread over that, whatever else the machine does. What it was in is in
memory that outlives it.

Half of the lives compact all the time. In a fifth the index is removed before each opening, so that all is rebuilt
from the log. In all of them one reader in this process and one in another are attached.

    python -m tests.proof.kill --cycles 1000 [--seconds S] [--seed N] [--dir DIR]
"""

from __future__ import annotations

import ctypes
import functools
import os
import random
import re
import select
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import logkv
from benchmarks.baseline import record_size
from logkv import compaction, files
from logkv.compaction import Compactor
from logkv.writer import Writing
from tests.proof.common import (NOISE, SEGMENT, SharedNumbers, Violation, arguments, difference, ended, explained, fork,
                                verdict)
from tests.proof.session import engine_of

CYCLES_A_LIFE = 40          # then the store is made anew
SAMPLE = 200                # keys that an attached reader gets, beside seeing all of them
PATIENCE = 300              # operations within which what is aimed at should come
SHARDS_FULL = 465, 1882      # keys at which the first shards of an index grow
PHASES = ("opening", "rotating", "sealing", "merging", "growing", "clearing", "closing")
TYPICAL = 300_000           # nanoseconds that a phase takes, before it is known
NUMBER = struct.Struct("<q")
LOOK, LET_GO = -1, -2       # what a distant watcher is told, beside a number of operations to compare with


# -- what is done -----------------------------------------------------------------------------------------------


class Operation(NamedTuple):
    kind: str               # put, delete, clear; sync, compact and reopen change nothing
    key: bytes = b""
    value: bytes = b""


class Script:
    """The operations of one life, in order: the same in every process that knows the seed."""

    def __init__(self, seed: int, compacting: bool = False) -> None:
        self._rng = random.Random(seed)
        self.compacting = compacting
        self._operations: list[Operation] = []
        many = self._rng.choice((10, 100, 300, 300, 800, 2500))
        self.keys = [b"", b"long" * 100, *(b"key %d" % i for i in range(many))]
        self.asked = [*self.keys, *(b"never put %d" % i for i in range(20))]    # of which gets are compared

    def __getitem__(self, index: int) -> Operation:
        while len(self._operations) <= index:
            self._operations.append(self._next())
        return self._operations[index]

    def _next(self) -> Operation:
        random = self._rng.random
        key, dice = self.keys[int(random() * len(self.keys))], random()
        if self.compacting and random() < 0.3:
            return Operation("delete", key) if random() < 0.995 else Operation("compact")
        if dice < 0.80:
            size = 40 + int(random() * 360)
            if dice < (0.10 if self.compacting else 0.02):
                size = self._rng.choice((4096, 4097, 6000, 30_000, 70_000))
            at = int(random() * (len(NOISE) - size))
            return Operation("put", key, b"%d " % len(self._operations) + NOISE[at:at + size])
        if dice < 0.98:
            return Operation("delete", key)
        return Operation("clear" if dice > 0.999 else "reopen" if dice > 0.996 else "sync")


class Model(dict[bytes, bytes]):
    """What a store holds after the first `done` operations."""

    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script = script
        self.done = 0
        self.count_before = 0       # the last of these operations
        self.live_bytes = 0

    def advance(self, done: int) -> None:
        while self.done < done:
            operation = self.script[self.done]
            self.count_before = len(self)
            if operation.kind in ("put", "delete"):
                before = self.pop(operation.key, None)
                if before is not None:
                    self.live_bytes -= record_size(len(operation.key), len(before))
            if operation.kind == "put":
                self[operation.key] = operation.value
                self.live_bytes += record_size(len(operation.key), len(operation.value))
            elif operation.kind == "clear":
                self.clear()
                self.live_bytes = 0
            self.done += 1

    def take(self, found: dict[bytes, bytes], count: int) -> None:
        """Advances over the operation that was under way if `found` has it; raises Violation if `found` is neither.

        count: what len() said; it may lack what a dead writer did last, until another one has come."""
        if found != self:
            before = dict(self)
            self.advance(self.done + 1)
        if found != self:
            raise Violation(f"not the state after {self.done - 1} operations ({difference(found, before)}), nor after "
                            f"{self.script[self.done - 1].kind} as well ({difference(found, self)})")
        if count not in (len(self), self.count_before):
            raise Violation(f"{len(self)} pairs seen, len() is {count}, and was {self.count_before} before that")


def read_all(store: logkv.Store[bytes] | logkv.Reader[bytes], keys: Sequence[bytes]) -> tuple[dict[bytes, bytes], int]:
    """A store's content while nobody writes, and its len(); raises Violation if gets of these keys say else."""
    pairs = list(store.items())
    found = dict(pairs)
    if len(pairs) != len(found):
        raise Violation(f"{len(pairs)} pairs seen, {len(found)} keys among them")
    for ask, expected in (store.get, found.get), (store.__contains__, found.__contains__):
        if list(map(ask, keys)) != list(map(expected, keys)):
            wrong = next((key for key in keys if ask(key) != expected(key)), b"a key that is right at the second look")
            raise Violation(f"{ask.__name__}({wrong[:20]!r}) and the iteration disagree")
    return found, len(store)


# -- who does it ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Aim:
    """The writer dies so many seconds after it began a phase for the n-th time; without a phase, its n-th operation."""

    phase: str | None
    turn: int
    delay: float


class Stage:
    """What a writer is in and what it has done, in memory that others share; there it is shot."""

    def __init__(self) -> None:
        self._cells = SharedNumbers()
        self._lock = threading.Lock()           # in the writer's process, which has several threads
        self._places = {phase: 1 + at for at, phase in enumerate(PHASES)}
        self._aim: Aim | None = None

    @property
    def acknowledged(self) -> int:
        return self._cells[0]

    @acknowledged.setter
    def acknowledged(self, done: int) -> None:
        self._cells[0] = done

    def set(self, done: int) -> None:
        """For the next writer."""
        self.acknowledged = done
        for cell in self._places.values():
            self._cells[cell] = 0

    def took(self, phase: str) -> float:
        """Seconds that it took when it was last finished."""
        return (self._cells[self._places[phase] + len(PHASES)] or TYPICAL) / 1e9

    def now(self) -> list[str]:
        """The phases that the writer is in, or died in."""
        return [phase for phase, cell in self._places.items()
                if self._cells[cell] and (phase != "growing" or self._cells[cell] == self.acknowledged + 1)]

    def play(self, aim: Aim) -> None:
        """In the writer's process: its engine tells where it is."""
        self._aim = aim
        self._mark(Writing, "_rotate", "rotating")
        self._mark(Writing, "seal_oldest", "sealing", lambda engine: bool(engine.full_segments()))
        self._mark(Compactor, "_merge_now", "merging")
        self._mark(Compactor, "_finish_interrupted", "merging",
                   lambda compactor: any(segment.replaced_by for segment in compactor._engine.manifest.segments))
        self._mark(Writing, "_begin_anew", "clearing")
        grow = Writing._index_pages

        def grow_marked(engine: Writing, pages: int) -> None:
            self._cells[self._places["growing"]] = self.acknowledged + 1    # until that operation has ended
            self._begun("growing")
            grow(engine, pages)

        setattr(Writing, "_index_pages", grow_marked)

    def _mark(self, owner: type, name: str, phase: str, really: Callable[[Any], bool] = lambda owner: True) -> None:
        method = getattr(owner, name)

        @functools.wraps(method)                # its name is what a worker's thread goes by
        def marked(self_: Any, *arguments: Any) -> Any:
            if not really(self_):
                return method(self_, *arguments)
            with self.phase(phase):
                return method(self_, *arguments)

        setattr(owner, name, marked)

    @contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        cell = self._places[phase]
        began = time.perf_counter_ns()
        self._add(cell, 1)
        self._begun(phase)
        try:
            yield
        finally:
            self._add(cell, -1)
            self._cells[cell + len(PHASES)] = time.perf_counter_ns() - began

    def _add(self, cell: int, number: int) -> None:
        with self._lock:
            self._cells[cell] += number

    def _begun(self, phase: str | None) -> None:
        aim = self._aim
        if aim is None or aim.phase != phase:
            return
        if aim.turn:
            self._aim = Aim(phase, aim.turn - 1, aim.delay)
            return
        self._aim = None
        die_in(aim.delay)

    def operate(self, turn: int) -> None:
        """The operation with this number begins."""
        aim = self._aim
        if aim is not None and aim.phase is None and aim.turn == turn:
            self._aim = None
            die_in(aim.delay)

    def miss(self) -> None:
        """What was aimed at did not come: the closing will do."""
        if self._aim is not None:
            self._aim = Aim("closing", 0, random.random() * self.took("closing"))


class _SignalEvent(ctypes.Structure):
    """`struct sigevent`."""

    _fields_ = [("value", ctypes.c_void_p), ("signal", ctypes.c_int), ("notify", ctypes.c_int),
                ("rest", ctypes.c_char * 48)]


_libc = ctypes.CDLL(None, use_errno=True)


def die_in(seconds: float) -> None:
    """The kernel kills this process with SIGKILL after so many seconds."""
    timer, event = ctypes.c_void_p(), _SignalEvent(signal=signal.SIGKILL)
    expires = (ctypes.c_long * 4)(0, 0, int(seconds), max(1, int(seconds % 1 * 1e9)))
    if _libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)) \
            or _libc.timer_settime(timer, 0, expires, None):
        raise OSError(ctypes.get_errno(), "no timer")


def compact_all_the_time() -> None:
    """In this process: nearly all that is dead is worth a merge, done in many steps, and soon puts wait for it."""
    compaction.SLACK, compaction.DEAD_SHARE = 4096, 0.05
    compaction.WAIT_SLACK, compaction.WAIT_SHARE = 32 << 10, 0.2
    compaction.WORTH, compaction.SWING = (0.02, 0.01), 64


def write(path: str, script: Script, done: int, count: int, sync: logkv.store.Sync, without_index: bool,
          stage: Stage, aim: Aim) -> None:
    """The victim: goes on where the last one was killed."""
    def start() -> logkv.Store[bytes]:
        if without_index:
            Path(path, files.INDEX).unlink(missing_ok=True)
        with stage.phase("opening"):
            return logkv.open(path, "c", sync=sync, segment_size=SEGMENT)

    def stop() -> None:
        engine = engine_of(store)
        for problem in engine.problem, engine.compactor.problem:
            if problem is not None:
                raise problem
        with stage.phase("closing"):
            store.close()

    if script.compacting:
        compact_all_the_time()
    stage.play(aim)
    store = start()
    for index in range(done, done + count):
        operation = script[index]
        stage.operate(index - done)
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
            stop()
            store = start()
        stage.acknowledged = index + 1
    stage.miss()
    stop()


class Watcher:
    """A reader that stays attached while writers die: each value it gets was put for that key, none is older than one
    it saw before, and once nobody writes it sees all of it."""

    def __init__(self, path: str, script: Script, seed: int) -> None:
        self._path, self._script, self._rng = path, script, random.Random(seed)
        self._model = Model(script)
        self._reader: logkv.Reader[bytes] | None = None
        self._newest: dict[bytes, int] = {}
        self.looks = 0

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def attach(self) -> logkv.Reader[bytes] | None:
        """The reader; None as long as there is no store, or none that readers can follow."""
        if self._reader is not None and self._rng.random() < 0.003:
            self.close()
        control = Path(self._path, files.CONTROL)
        if self._reader is None and control.exists() and control.stat().st_size:
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
        put = self._script[index] if index >= 0 else None
        if put is None or put.key != key or put.value != value:
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
                some = max(0, self._rng.randrange(len(self._script.asked)) - SAMPLE)
                self._model.take(*read_all(reader, self._script.asked[some:some + SAMPLE]))
        return self._model.done


class Distant:
    """A Watcher in another process: while it is not told anything, it waits or looks on."""

    def __init__(self, path: str, seed: int, script: Script) -> None:
        command, self._command = os.pipe()
        self._reply, reply = os.pipe()
        self._pid = fork(lambda: self._run(path, seed, script, command, reply))
        os.close(command)
        os.close(reply)

    def _run(self, path: str, seed: int, script: Script, command: int, reply: int) -> None:
        os.close(self._command)
        watcher = Watcher(path, script, seed)
        looking = False
        try:
            while True:
                if looking:
                    watcher.look()
                    if not select.select([command], [], [], 0.0005)[0]:
                        continue
                order = os.read(command, NUMBER.size)
                if not order:
                    break
                done, = NUMBER.unpack(order)
                looking = done == LOOK
                if done == LET_GO:
                    watcher.close()
                elif not looking:
                    done = watcher.compare(done)
                os.write(reply, b"%d %d" % (done, watcher.looks))
        except Exception as problem:
            os.write(reply, f"{type(problem).__name__}: {problem}".encode()[:4000])
        watcher.close()

    def tell(self, order: int) -> None:
        with suppress(BrokenPipeError):
            os.write(self._command, NUMBER.pack(order))

    def answer(self) -> tuple[int, int]:
        """(operations seen, values read so far); raises Violation"""
        answer = os.read(self._reply, 4096).decode()
        numbers = re.fullmatch(r"(-?\d+) (\d+)", answer)
        if numbers is None:
            raise Violation(f"attached reader in another process: {answer or 'it died'}")
        return int(numbers[1]), int(numbers[2])

    def close(self) -> None:
        os.close(self._command)
        os.close(self._reply)
        os.waitpid(self._pid, 0)


# -- what is checked --------------------------------------------------------------------------------------------


@dataclass
class Tally:
    cycles: int = 0
    killed: int = 0             # of the writers; the others came to their end
    acknowledged: int = 0
    looks: int = 0
    during: Counter[str] = field(default_factory=Counter)       # what the killed ones were in
    half_merged: int = 0        # kills that left inputs and output of a merge in the MANIFEST
    violations: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Of another process's share."""
        for name in ("cycles", "killed", "acknowledged", "looks", "half_merged"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.during += other.during
        self.violations += other.violations


class Life:
    """One store, from its creation through many deaths of its writer."""

    def __init__(self, path: str, seed: int, tally: Tally) -> None:
        self.path, self.tally = path, tally
        self.rng = random.Random(seed)
        self.never_index = self.rng.random() < 0.2
        self.script = Script(seed, self.rng.random() < 0.5)
        self.model = Model(self.script)
        self.sure = 0               # operations that everybody sees
        self.stage = Stage()
        self.near = Watcher(path, self.script, seed + 1)
        self.far = Distant(path, seed + 2, self.script)
        self.far_looks = 0

    def close(self) -> None:
        self.tally.looks += self.near.looks + self.far_looks
        self.near.close()
        self.far.close()

    def cycle(self) -> None:
        ways = (self.as_writer, self.as_writer, self.without_index, self.as_reader, self.as_reader_alone)
        way = self.rng.choice(ways)
        step = "killed"
        try:
            self.write_and_kill()
            self.ask_watchers(self.near, self.far)
            step = way.__name__
            if self.never_index:
                self.remove_index()
            way()
            step += ", afterwards"
            self.ask_watchers(self.rng.choice((self.near, self.far)))
        except (logkv.Error, Violation) as problem:
            where = " and ".join(self.stage.now()) or "an operation"
            raise Violation(f"killed during {where}, {step}: {type(problem).__name__}: {problem}") from problem

    def aim(self) -> tuple[Aim, int]:
        """Where the next writer dies, and how many operations it has until then."""
        rng, done = self.rng, self.model.done
        dice = rng.random()
        if dice < 0.25:
            return Aim("opening", 0, rng.random() * self.stage.took("opening")), 10
        if dice < 0.45:
            return Aim("closing", 0, rng.random() * self.stage.took("closing")), rng.choice((0, 0, 1, 30, 300))
        if dice < 0.70:
            phases = ("rotating", "sealing", *(("merging",) * (4 if self.script.compacting else 0)))
            phase = rng.choice(phases)
            return Aim(phase, rng.choice((0, 0, 0, 1)), rng.random() * self.stage.took(phase)), PATIENCE
        if dice < 0.90 and self.will_grow():
            return Aim("growing", 0, rng.random() * 60e-6), 5 * PATIENCE
        if dice < 0.77 and any(self.script[done + turn].kind == "clear" for turn in range(PATIENCE)):
            return Aim("clearing", 0, rng.random() * self.stage.took("clearing")), PATIENCE
        turn = rng.randrange(rng.choice((1, 4, 31, 301)))
        return Aim(None, turn, rng.random() * rng.choice((20e-6, 200e-6))), turn + 100

    def will_grow(self) -> bool:
        """Whether the index soon will: there will be more keys than what it has room for."""
        steady = (0.55 if self.script.compacting else 0.78) * len(self.script.keys)     # are alive in the end
        return any(len(self.model) < full < steady for full in SHARDS_FULL)

    def write_and_kill(self) -> None:
        done, (aim, count) = self.model.done, self.aim()
        sync: logkv.store.Sync = self.rng.choice(("os", "os", "os", "always", 0.05))
        self.script[done + count + 1]       # so that the child does not have to make it
        self.stage.set(done)
        self.far.tell(LOOK)
        pid = fork(lambda: write(self.path, self.script, done, count, sync, self.never_index, self.stage, aim))
        try:
            if self.rng.random() < 0.5:
                self.near.look()
        finally:
            status = ended(pid)
        _, self.far_looks = self.far.answer()
        self.sure = self.stage.acknowledged
        self.model.advance(self.sure)
        self.tally.acknowledged += self.model.done - done
        if status < 0:
            self.tally.killed += 1
            self.tally.during.update(self.stage.now() or ["an operation"])
        if status not in (0, -signal.SIGKILL):
            raise Violation(f"the writer failed: status {status}")
        with suppress(FileNotFoundError):
            manifest = Path(self.path, files.MANIFEST).read_bytes()
            self.tally.half_merged += re.search(rb'"replaced_by": [1-9]', manifest) is not None

    def ask_watchers(self, *watchers: Watcher | Distant) -> None:
        """They see what is there, whole.  What a dead writer was at may be seen only by who has read the log itself."""
        if self.far in watchers:
            self.far.tell(self.sure)
        done = self.near.compare(self.sure) if self.near in watchers else self.sure
        if self.far in watchers:
            done = max(done, self.far.answer()[0])
        self.model.advance(done)

    def as_writer(self) -> None:
        """Opened by the next writer, which believes the index, and closed."""
        with logkv.open(self.path, "c", segment_size=SEGMENT) as store:
            self.model.take(*read_all(store, self.script.asked))
            self.sure = self.model.done
            facts = store.stats()
            if len(store) != len(self.model):
                raise Violation(f"len() is {len(store)}, of {len(self.model)} keys")
            if facts["live_bytes"] != self.model.live_bytes or facts["dead_bytes"] < 0:
                raise Violation(f"{facts['live_bytes']} live bytes counted, {self.model.live_bytes} found, "
                                f"{facts['dead_bytes']} dead; recovery: {facts['recovery']}")
            self.ask_watchers(self.rng.choice((self.near, self.far)))

    def without_index(self) -> None:
        """All is rebuilt from the log."""
        self.remove_index()
        self.as_writer()

    def as_reader(self) -> None:
        """Nobody repairs anything before the next victim does."""
        try:
            with logkv.open(self.path, "r") as store:
                self.model.take(*read_all(store, self.script.asked))
        except logkv.NotFoundError:
            if self.model.done:
                raise

    def as_reader_alone(self) -> None:
        """A reader that has to build an index of its own."""
        self.remove_index()
        self.as_reader()

    def remove_index(self) -> None:
        """Perhaps the control page too: who has that mapped lets go of it first."""
        Path(self.path, files.INDEX).unlink(missing_ok=True)
        if self.rng.random() < 0.2:
            self.near.close()
            self.far.tell(LET_GO)
            self.far.answer()
            Path(self.path, files.CONTROL).unlink(missing_ok=True)


@contextmanager
def living(path: str, seed: int, tally: Tally) -> Iterator[Life]:
    life = Life(path, seed, tally)
    try:
        yield life
    finally:
        life.close()
        shutil.rmtree(path, ignore_errors=True)


def run(directory: str, cycles: int, seconds: float = float("inf"), seed: int = 1) -> Tally:
    """So many cycles, or what can be had in so many seconds; other seeds have other lives."""
    tally = Tally()
    deadline = time.monotonic() + seconds
    number = seed * 1_000_003
    while tally.cycles < cycles and time.monotonic() < deadline and len(tally.violations) < 20:
        number += 1
        with living(os.path.join(directory, f"life-{number}"), number, tally) as life:
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
    wanted = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=wanted.dir) as directory:
        tally = run(directory, wanted.cycles, wanted.seconds, wanted.seed)
    rate = tally.cycles / (time.monotonic() - began) * 60
    print("| cycles | of them killed | cycles a minute | acknowledged operations | live reads | violations |")
    print("|---:|---:|---:|---:|---:|---:|")
    print(f"| {tally.cycles:,} | {tally.killed:,} | {rate:,.0f} | {tally.acknowledged:,} | {tally.looks:,} "
          f"| {len(tally.violations)} |")
    print("killed during: " + ", ".join(f"{what} {count:,}" for what, count in tally.during.most_common())
          + f"; merges left half done: {tally.half_merged:,}")
    return verdict(tally.violations)


if __name__ == "__main__":
    sys.exit(main())
