"""A store and a dict, through puts, deletes, rotations, merges of any neighbours, and reopenings: a state machine that
hypothesis drives, and shrinks to a short example where the two differ.

    python -m tests.proof.soak --seconds 600
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import logkv
from benchmarks.baseline import record_size
from logkv import files
from logkv.opening import Options
from tests.proof.common import NOISE, SEGMENT, arguments, scratch
from tests.proof.session import merge, open_store, rotate, sealed_segments

STEPS_A_RUN = 200
KEYS = st.integers(0, 7).map(lambda number: b"key %d" % number)
SIZES = st.sampled_from([0, 0, 10, 100, 100, 1000, 5000])


class Compacting(RuleBasedStateMachine):
    """Each step is done to a store and to a dict.  A reader is attached all the time, and an iterator most of it."""

    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(dir=scratch()))
        self.model: dict[bytes, bytes] = {}
        self.writes = 0
        self.open()
        self.reader = logkv.Reader(self.path)
        self.begin_scan()

    def open(self, compaction: str = "manual") -> None:
        self.db = open_store(self.path, "c", Options(segment_size=SEGMENT, compaction=compaction, background=False))

    def write(self, key: bytes, size: int) -> None:
        """A value that was never there before."""
        self.writes += 1
        self.db[key] = self.model[key] = b"%d " % self.writes + NOISE[:size]

    @rule(key=KEYS, size=SIZES)
    def put(self, key: bytes, size: int) -> None:
        self.write(key, size)

    @rule(at=st.integers(0, 99), size=SIZES)
    @precondition(lambda self: self.model)
    def overwrite(self, at: int, size: int) -> None:
        self.write(sorted(self.model)[at % len(self.model)], size)

    @rule(key=KEYS)
    def delete(self, key: bytes) -> None:
        assert self.db.delete(key) == (self.model.pop(key, None) is not None)
        self.constant.discard(key)

    @rule()
    def rotate(self) -> None:
        rotate(self.db)

    @rule(first=st.integers(0, 9), more=st.integers(0, 3))
    def merge(self, first: int, more: int) -> None:
        if sealed := sealed_segments(self.db):
            merge(self.db, first % sealed, first % sealed + more)
            self.count()

    @rule(first=st.integers(0, 9))
    def merge_one(self, first: int) -> None:
        self.merge(first, 0)

    @rule(chance=st.integers(0, 9))
    def compact(self, chance: int) -> None:
        if chance == 7:
            self.db.compact()
            self.count()

    @rule(lose_index=st.sampled_from([True, True, False]), compaction=st.sampled_from(["manual", "auto"]))
    def reopen(self, lose_index: bool, compaction: str) -> None:
        self.db.close()
        if lose_index:
            (self.path / files.INDEX).unlink()
        self.open(compaction)
        self.count()

    def count(self) -> None:
        """What of the segments is alive."""
        segments = self.db.stats()["segments"]
        assert sum(s["live_records"] for s in segments) == len(self.model)
        live = sum(record_size(len(key), len(value)) for key, value in self.model.items())
        assert sum(s["live_bytes"] for s in segments) == live
        assert all(s["dead_bytes"] >= 0 for s in segments)

    @rule()
    def scan(self) -> None:
        assert dict(self.db) == dict(self.reader) == self.model

    def begin_scan(self) -> None:
        self.constant = set(self.model)     # keys that are there from its beginning on
        self.seen: list[bytes] = []
        self.pairs: Iterator[tuple[bytes, bytes]] = iter(self.reader.items())

    @rule(count=st.integers(1, 8))
    def go_on_scanning(self, count: int) -> None:
        for _ in range(count):
            pair = next(self.pairs, None)
            if pair is None:
                assert len(self.seen) == len(set(self.seen)) and self.constant <= set(self.seen)
                self.begin_scan()
                break
            assert pair[0] not in self.model or pair[1] == self.model[pair[0]]
            self.seen.append(pair[0])

    @invariant()
    def agree(self) -> None:
        type(self).steps += 1
        assert len(self.db) == len(self.reader) == len(self.model)

    def teardown(self) -> None:
        try:
            self.scan()
            self.count()
        finally:
            self.reader.close()
            self.db.close()
            shutil.rmtree(self.path)


def run(examples: int, chance: int, *, shrink: bool = True) -> int:
    """So many runs of the machine, of some STEPS_A_RUN steps each; returns how many steps.  Raises where they differ."""
    before = Compacting.steps
    how = settings(max_examples=examples, stateful_step_count=STEPS_A_RUN, deadline=None, database=None,
                   phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
                   suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(seed(chance)(Compacting), settings=how)
    return Compacting.steps - before


def main() -> int:
    parser = arguments("a store beside a dict, for as long as you like")
    parser.add_argument("--seconds", type=float, default=600)
    wanted = parser.parse_args()
    until, dice, steps = time.monotonic() + wanted.seconds, random.Random(wanted.seed), 0
    while time.monotonic() < until:
        steps += run(20, dice.getrandbits(32))
        print(f"\r{steps:,} steps", end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
