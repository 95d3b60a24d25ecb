"""The store beside a plain dict, through every way of closing and opening that needs no second process."""

from __future__ import annotations

import os
import shutil
import tempfile

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

import logkv
from logkv import _core
from logkv.compaction import Compactor
from tests.proof import soak

SEGMENT = 65_536
KEYS = st.one_of(st.binary(max_size=3), st.sampled_from([b"hot", b"", b"k" * 300]))
VALUES = st.one_of(st.binary(max_size=50), st.sampled_from([b"", b"x" * 4_096, b"y" * 4_097, b"z" * 30_000, b"!" * 70_000]))


class Mapping(RuleBasedStateMachine):
    """Every step is done to the store and to a dict; a reader is attached all the time."""

    keys: Bundle[bytes] = Bundle("keys")

    @initialize()
    def begin(self) -> None:
        self.path = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.model: dict[bytes, bytes] = {}
        self.db = logkv.open(self.path, segment_size=SEGMENT, compaction="manual")
        self.reader = logkv.Reader(self.path)

    @rule(target=keys, key=KEYS)
    def a_key(self, key: bytes) -> bytes:
        return key

    @rule(key=keys, value=VALUES)
    def put(self, key: bytes, value: bytes) -> None:
        self.db[key] = value
        self.model[key] = value

    @rule(key=keys)
    def delete(self, key: bytes) -> None:
        assert self.db.delete(key) == (self.model.pop(key, None) is not None)

    @rule(key=keys)
    def get(self, key: bytes) -> None:
        assert self.db.get(key) == self.reader.get(key) == self.model.get(key)

    @rule(key=keys)
    def pop(self, key: bytes) -> None:
        assert self.db.pop(key, None) == self.model.pop(key, None)

    @rule(count=st.integers(100, 700))
    def put_many(self, count: int) -> None:
        for i in range(count):
            key = b"many %d" % i
            self.db[key] = self.model[key] = b"%d" % count

    @rule()
    def sync(self) -> None:
        self.db.sync()

    @rule()
    @precondition(lambda self: len(self.model) > 5)
    def clear(self) -> None:
        self.db.clear()
        self.model.clear()

    @rule(lose=st.sampled_from([[], ["index"], ["control"], ["index", "control"]]))
    def reopen(self, lose: list[str]) -> None:
        self.db.close()
        for name in lose:
            os.unlink(os.path.join(self.path, name))
        if "control" in lose:           # a reader cannot follow another control page than the one it has mapped
            self.reader.close()
        self.db = logkv.open(self.path, segment_size=SEGMENT, compaction="manual")
        if self.reader.closed:
            self.reader = logkv.Reader(self.path)

    @rule()
    def copy(self) -> None:
        """A copy of the open store is what a power cut at its best leaves."""
        shutil.copytree(self.path, self.path + ".copy")
        with logkv.open(self.path + ".copy", segment_size=SEGMENT) as db:
            assert dict(db) == self.model
        shutil.rmtree(self.path + ".copy")

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "db"):
            assert len(self.db) == len(self.reader) == len(self.model)

    def teardown(self) -> None:
        if hasattr(self, "db"):
            assert dict(self.db) == dict(self.reader) == self.model
            live = sum(len(_core.encode_record(1, 1, k, v, 0, 64)) for k, v in self.model.items())
            assert self.db.stats()["live_bytes"] == live
            self.reader.close()
            self.db.close()
            shutil.rmtree(self.path)


TestMapping = Mapping.TestCase
TestMapping.settings = settings(max_examples=25, stateful_step_count=30, deadline=None,
                                suppress_health_check=list(HealthCheck))


def test_compaction() -> None:
    """20,000 steps of another machine, in which most is merging; `make soak` has more."""
    steps = 0
    for seed in range(20):
        steps += soak.run(20, seed)
        if steps >= 20_000:
            return
    pytest.fail(f"only {steps} steps")


def test_a_tombstone_dropped_early_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Compactor._begin
    monkeypatch.setattr(Compactor, "_begin", lambda compactor, inputs, older, output: begin(compactor, inputs, [], output))
    with pytest.raises(AssertionError):
        for seed in range(10):
            soak.run(20, seed, shrink=False)
