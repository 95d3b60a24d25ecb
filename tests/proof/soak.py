"""A store and a dict, through everything that may happen to a store: a state machine that hypothesis drives, and
shrinks to a short example where the two differ.

Writes by several handles; rotations, merges of any neighbours, clears; closing and opening again with the index and
without. A writer is killed: nothing more is written, and the next one goes on with what is there. Or the power fails,
at any moment since it did the last time, also in the middle of an operation or of a recovery: a state of the files
that this could leave is drawn, must be one that the dict had between what was durable then and what had begun, and the
machine goes on from there.

    python -m tests.proof.soak --seconds 600 [--steps N] [--seed N]
"""

from __future__ import annotations

import copy
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis.stateful import (RuleBasedStateMachine, initialize, invariant, precondition, rule,
                                 run_state_machine_as_test)

import logkv
from benchmarks.baseline import record_size
from logkv import files
from tests.proof.common import NOISE, arguments, difference, scratch, verdict
from tests.proof.disk import Disk
from tests.proof.events import Begun, Durable
from tests.proof.recorder import Recorder
from tests.proof.session import Session, determined, merge, sealed_segments

STEPS_A_RUN = 100
EXAMPLES = 10                   # runs at a time
KEYS = st.one_of(st.integers(0, 7).map(lambda number: b"key %d" % number),
                 st.one_of(st.binary(max_size=3), st.sampled_from([b"", b"k" * 300])))
SIZES = st.sampled_from([0, 0, 10, 100, 100, 1000, 4096, 5000, 30_000])
SEGMENTS = 10                   # that are sealed, at which no other is: all files are looked at after each step
LOST = st.sampled_from([(), (), (files.INDEX,), (files.CONTROL,), (files.INDEX, files.CONTROL)])    # at an opening


class Machine(RuleBasedStateMachine):
    """Each step is done to a store and to a dict.  A reader is attached all the time, and an iterator most of it."""

    counted: Counter[str] = Counter()

    @initialize(number=st.integers(0, 2**32), sync=st.sampled_from(["os", "os", "always", 3600.0]),
                recorded=st.booleans())
    def begin(self, number: int, sync: float | str, recorded: bool) -> None:
        self.dice = random.Random(number)
        self.sync_mode, self.recorded = sync, recorded
        self.resources = ExitStack()
        self.resources.enter_context(determined(self.dice))
        self.root = Path(self.resources.enter_context(tempfile.TemporaryDirectory(dir=scratch())))
        self.boots = 0
        self.boot("c")
        self.session.begin()
        self.read_on()

    def boot(self, flag: str) -> None:
        """The system is up, and a writer opens the store. What happens from here on is recorded in half of the runs."""
        self.path = self.root / str(self.boots)
        self.path.mkdir(exist_ok=True)
        self.boots += 1
        self.existed = flag == "w"          # there was a store already
        self.up = False
        self.recording = ExitStack()
        self.recorder = self.recording.enter_context(Recorder(self.path)) if self.recorded else None
        self.session = Session(self.path, self.sync_mode, self.dice, self.recorder)
        self.session.open(flag)
        self.others: list[logkv.Store[bytes]] = []

    def read_on(self) -> None:
        """A new reader."""
        self.reader = logkv.Reader(self.path)
        self.begin_scan()
        self.up = True

    @property
    def db(self) -> logkv.Store[bytes]:
        return self.session.store

    @property
    def model(self) -> dict[bytes, bytes]:
        return self.session.history.now

    # -- writing ----------------------------------------------------------------------------------------

    @rule(key=KEYS, size=SIZES)
    def put(self, key: bytes, size: int) -> None:
        self.session.put(key, size)

    @rule(at=st.integers(0, 99), size=SIZES)
    @precondition(lambda self: self.model)
    def overwrite(self, at: int, size: int) -> None:
        self.session.put(self.a_key(at), size)

    @rule(at=st.integers(0, 99))
    @precondition(lambda self: self.model)
    def delete(self, at: int) -> None:
        key = self.a_key(at)
        self.session.delete(key)
        self.constant.discard(key)

    @rule(key=KEYS)
    def delete_what_may_be_missing(self, key: bytes) -> None:
        assert (key in self.db) == (key in self.reader) == (key in self.model)
        self.session.delete(key)
        self.constant.discard(key)

    @rule(count=st.integers(50, 400))
    def update(self, count: int) -> None:
        """Many keys: the index grows."""
        many = count // 8 if self.sync_mode == "always" else count      # each is synced
        pairs = {b"many %d" % i: b"%d" % count for i in range(many)}
        for key, value in pairs.items():
            index = self.session.history.add(key, value)
        self.note(Begun(index))
        self.db.update(pairs)
        self.acknowledge()

    @rule(at=st.integers(0, 9), key=KEYS, size=SIZES)
    def write_by_another_handle(self, at: int, key: bytes, size: int) -> None:
        """There are three at the most; some of them are closed again."""
        if at == 9 and self.others:
            self.others.pop().close()
            return
        if len(self.others) <= at % 2:
            self.others.append(copy.copy(self.db))
        value = b"%d by another " % len(self.session.history) + NOISE[:size]
        self.note(Begun(self.session.history.add(key, value)))
        self.others[at % len(self.others)][key] = value
        self.acknowledge()

    @rule()
    @precondition(lambda self: len(self.model) > 5)
    def clear(self) -> None:
        self.session.clear()
        self.constant.clear()

    def a_key(self, at: int) -> bytes:
        return sorted(self.model)[at % len(self.model)]

    def note(self, event: Begun | Durable) -> None:
        if self.recorder is not None:
            self.recorder.note(event)

    def acknowledge(self) -> None:
        if self.sync_mode == "always":
            self.note(Durable(len(self.session.history)))

    # -- what changes nothing ---------------------------------------------------------------------------

    @rule()
    def sync(self) -> None:
        self.session.sync()

    @rule()
    @precondition(lambda self: sealed_segments(self.db) < SEGMENTS)
    def rotate(self) -> None:
        self.session.rotate()

    @rule(first=st.integers(0, 9), more=st.integers(0, 3))
    def merge(self, first: int, more: int) -> None:
        if sealed := sealed_segments(self.db):
            merge(self.db, first % sealed, first % sealed + more)
            self.count()

    @rule()
    def merge_any(self) -> None:
        self.session.merge()
        self.count()

    @rule(chance=st.integers(0, 4))
    def compact(self, chance: int) -> None:
        if chance == 4:
            self.session.compact()
            self.count()

    def count(self) -> None:
        """What of the segments is alive."""
        segments = self.db.stats()["segments"]
        assert sum(s["live_records"] for s in segments) == len(self.model)
        live = sum(record_size(len(key), len(value)) for key, value in self.model.items())
        assert sum(s["live_bytes"] for s in segments) == live
        assert all(s["dead_bytes"] >= 0 for s in segments)

    @rule(lost=LOST)
    def reopen(self, lost: tuple[str, ...]) -> None:
        while self.others:
            self.others.pop().close()
        self.session.close()
        self.open_without(lost)

    @rule(killed=st.booleans())
    def move(self, killed: bool) -> None:
        """The next writer gives the locations out anew; an iterator may not be able to go on."""
        if killed:
            self.die()
            self.counted["kills"] += 1
        else:
            while self.others:
                self.others.pop().close()
            self.session.close()
        self.session.open("w", crowded=True)
        self.begin_scan()
        self.count()

    @rule()
    def shrink_index(self) -> None:
        self.session.shrink_index()

    def open_without(self, lost: tuple[str, ...]) -> None:
        """The next writer; a reader cannot follow another control page than the one that it has mapped."""
        anew = files.CONTROL in lost
        if anew:
            self.reader.close()
        directory = files.Directory(str(self.path))
        for name in lost:
            directory.unlink(name)
        directory.close()
        self.session.open("w")
        if anew:
            self.read_on()
        self.count()

    # -- crashes ----------------------------------------------------------------------------------------

    @rule(lost=LOST)
    def kill(self, lost: tuple[str, ...]) -> None:
        self.die()
        self.counted["kills"] += 1
        self.open_without(lost)

    def die(self) -> None:
        """The process is gone: nothing more is written."""
        for handle in self.others:
            handle._engine = None
            handle._detach()
        self.others.clear()
        self.session.kill()

    @rule(back=st.one_of(st.just(0), st.integers(0, 12), st.integers(0, 1000)))
    @precondition(lambda self: self.recorder is not None)
    def cut_power(self, back: int) -> None:
        """So many events ago: what came later has not happened."""
        recorder, history = self.recorder, self.session.history
        assert recorder is not None
        recorder.notice()
        stop = max(recorder.start, len(recorder.events) - back)
        disk, low, high, exists = Disk(), 0, 0, self.existed
        for event in recorder.events[:stop]:
            disk.apply(event)
            if isinstance(event, Begun):
                high = event.index
            elif isinstance(event, Durable):
                low, exists = event.index, True
        self.counted["power cuts"] += 1
        self.counted["during a recovery"] += self.existed and Durable(0) not in recorder.events[recorder.start:stop]
        state = disk.draw(self.dice)
        self.reader.close()
        self.die()
        self.recording.close()
        shutil.rmtree(self.path)
        self.path = self.root / str(self.boots)
        self.path.mkdir()
        state.write(str(self.path))
        self.boot("w" if exists else "c")
        found = dict(self.db)
        assert any(low <= index <= high for index in history.find(found)), \
            f"after [{state.how}] it is state {history.find(found)}, expected one from {low} to {high}: " \
            f"{difference(found, history.state(low))} against the first"
        self.session.begin()
        self.read_on()
        self.count()

    # -- reading ----------------------------------------------------------------------------------------

    @rule()
    def scan(self) -> None:
        assert dict(self.db) == dict(self.reader) == self.model

    @rule(key=KEYS)
    def get(self, key: bytes) -> None:
        assert self.db.get(key) == self.reader.get(key) == self.model.get(key)

    def begin_scan(self) -> None:
        self.constant = set(self.model)     # keys that are there from its beginning on
        self.seen: list[bytes] = []
        self.pairs: Iterator[tuple[bytes, bytes]] = iter(self.reader.items())

    @rule(count=st.integers(1, 100))
    def go_on_scanning(self, count: int) -> None:
        for _ in range(count):
            pair = next(self.pairs, None)
            if pair is None:
                assert len(self.seen) == len(set(self.seen)) and self.constant <= set(self.seen)
                self.begin_scan()
                break
            assert pair[0] not in self.model or pair[1] == self.model[pair[0]]
            self.seen.append(pair[0])

    @rule()
    def copy_files(self) -> None:
        """A copy of the open store is what a power cut at its best leaves."""
        copied = shutil.copytree(self.path, self.root / "copy")
        with logkv.Reader(copied) as reader:
            assert dict(reader) == self.model
        shutil.rmtree(copied)

    @invariant()
    def agree(self) -> None:
        self.counted["steps"] += 1
        assert len(self.db) == len(self.reader) == len(self.model)

    def teardown(self) -> None:
        if not hasattr(self, "resources"):
            return
        with self.resources, self.recording:
            try:
                if self.up:
                    self.scan()
                    self.count()
            finally:
                self.reader.close()
                while self.others:
                    self.others.pop().close()
                self.session.abandon()


@dataclass
class Result:
    """What was done, and where the two differed."""

    counted: Counter[str] = field(default_factory=Counter)      # steps; of these kills and power cuts
    violations: list[str] = field(default_factory=list)

    def add(self, other: Result) -> None:
        """Of another process."""
        self.counted += other.counted
        self.violations += other.violations

    @property
    def steps(self) -> int:
        return self.counted["steps"]

    def __str__(self) -> str:
        return ", ".join(f"{number:,} {what}" for what, number in self.counted.most_common())


def run(steps: int, seconds: float = float("inf"), seed: int = 1, *, shrink: bool = True) -> Result:
    """So many steps, or what can be had in so many seconds; each is one execution of a rule.  Other seeds take other
    steps."""
    deadline = time.monotonic() + seconds
    dice, result = random.Random(seed), Result()
    Machine.counted = result.counted
    how = settings(max_examples=EXAMPLES, stateful_step_count=STEPS_A_RUN, deadline=None, database=None,
                   phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
                   suppress_health_check=list(HealthCheck))
    while result.steps < steps and time.monotonic() < deadline and not result.violations:
        try:
            run_state_machine_as_test(seeded(dice.getrandbits(32))(Machine), settings=how)
        except Exception as problem:
            result.violations.append("".join(traceback.format_exception(problem, limit=-4)))    # and the steps to it
    return result


def main() -> int:
    parser = arguments("a store beside a dict, for as long as you like")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--steps", type=int, default=sys.maxsize)
    wanted = parser.parse_args()
    until, dice, whole = time.monotonic() + wanted.seconds, random.Random(wanted.seed), Result()
    while whole.steps < wanted.steps and time.monotonic() < until and not whole.violations:
        whole.add(run(min(wanted.steps - whole.steps, EXAMPLES * STEPS_A_RUN), seed=dice.getrandbits(32)))
        print(f"\r{whole}", end="", flush=True)
    print()
    return verdict(whole.violations)


if __name__ == "__main__":
    sys.exit(main())
