"""Failing system calls and allocations: a part of what `tests.proof.failures` plays, and all of where something was wrong."""

from __future__ import annotations

import errno
import heapq
import os
import shutil
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

import logkv
from logkv import files, store
from logkv.opening import Opening
from tests.proof import failures
from tests.proof.common import SEGMENT
from tests.proof.session import engine_of
from tests.racing import LIMIT

needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="the shim is compiled")


def needs_allocator(what: str) -> None:
    if what == "allocations" and not failures.ALLOCATOR:
        pytest.skip("no allocation of CPython can fail without the GIL")


@pytest.fixture
def path(quick_dir: Path) -> str:
    return str(quick_dir / "prices.db")


@needs_compiler
@pytest.mark.parametrize("what", ["calls", "allocations"])
def test_some_of_all(what: str) -> None:
    needs_allocator(what)
    tally = failures.run(10, what=what)
    assert not tally.violations and tally.counted["system calls" if what == "calls" else "allocations"] > 50
    if what == "calls":         # none slips past the shim
        assert tally.calls - {"memory"} == set(failures.CALLS) - {"memory"}


@needs_compiler
@pytest.mark.parametrize("what, operation", [
    ("calls", r"open after a failed sync .few"),        # where the rescue stopped, no opening went further
    ("calls", r"while a segment was full"),             # a page that could not be read was taken for an empty one
    ("calls", r"get after the index grew"),             # a reader had no index for good
    ("calls", r"clear .few"),                           # reading did not go on, a descriptor stayed, close() said nothing
    ("calls", r"close a reader"),
    ("calls", r"stats .few"),                           # the system's error, and not what was being done
    ("allocations", r"close without a change"),         # lock and mappings stayed
    ("allocations", r"writing: .. =.few|reading: get"),
    ("allocations", r"^backup .few"),                   # the lock stayed, and a descriptor
    ("allocations", r"^open clean .few"),               # what had failed stayed, and its lock
    ("allocations", r"^open for reading .few"),         # a crash
])
def test_where_something_was_wrong(what: str, operation: str) -> None:
    """Every call, every way in which it fails."""
    needs_allocator(what)
    tally = failures.run(300, what=what, only=operation)
    assert not tally.violations and tally.complete and tally.reached


def test_an_opening_that_fails_when_all_is_open(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory was closed before the engine that needed it."""
    class Full(weakref.WeakValueDictionary[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            raise MemoryError

    monkeypatch.setattr(store, "_engines", Full())
    with pytest.raises(MemoryError):
        logkv.open(path)
    monkeypatch.undo()
    with logkv.open(path) as db:
        assert db.stats()["recovery"]["index"] == "clean"


def test_close_says_what_the_background_could_not_sync(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody had been told."""
    db = logkv.open(path, sync=3600)
    db["a"] = "1"
    monkeypatch.setattr(files, "sync_data", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    engine, told = engine_of(db), threading.Event()
    monkeypatch.setattr(engine, "failed_in_background", lambda problem: told.set())
    engine._worker.call(engine._sync_now)
    assert told.wait(LIMIT)
    monkeypatch.undo()
    with pytest.raises(logkv.Error, match="a sync failed"):
        db.close()
    assert db.closed
    with logkv.open(path) as db:
        assert dict(db) == {b"a": b"1"}


def test_a_rescue_that_ends_before_its_index(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old index leads behind the end that the rescue has given to the old segment."""
    db = logkv.open(path, segment_size=SEGMENT)
    db["durable"] = "1"
    db.sync()
    db["later"] = "2"
    engine_of(db)._poison(OSError(errno.EIO, "Input/output error"))
    with pytest.raises(logkv.Error):
        db.close()
    monkeypatch.setattr(Opening, "_rebuild", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(logkv.Error, match="cannot open the store"):
        logkv.open(path, segment_size=SEGMENT)
    monkeypatch.undo()
    with logkv.open(path, segment_size=SEGMENT) as db:
        assert dict(db) == {b"durable": b"1", b"later": b"2"}


def test_no_thread_is_to_be_had(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the background would do, puts do; and as soon as there is one, it goes on."""
    def fails(thread: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", fails)
    with logkv.open(path, segment_size=SEGMENT) as db:
        for i in range(2_000):
            db[f"key {i}"] = "x" * 100
        assert sum(segment["sealed"] for segment in db.stats()["segments"]) > 1
        monkeypatch.undo()
        engine = engine_of(db)
        engine._worker.call(engine.check_open)
        assert engine._worker._thread is not None
    with logkv.open(path, "r") as db:
        assert len(db) == 2_000


def test_a_thread_without_memory_goes_on_when_there_is_some(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failed, synced = threading.Event(), threading.Event()
    real, pop = files.sync_data, heapq.heappop

    def fails(queue: list[tuple[float, int, str]]) -> tuple[float, int, str]:
        if queue[0][2] != "sync" or failed.is_set():
            return pop(queue)
        monkeypatch.setattr(files, "sync_data", lambda fd: (real(fd), synced.set()))
        failed.set()
        raise MemoryError

    with logkv.open(path, sync=0.01) as db:
        monkeypatch.setattr("heapq.heappop", fails)
        db["a"] = "1"
        assert failed.wait(LIMIT) and synced.wait(LIMIT)


def test_a_thread_that_ended_is_followed_by_another(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython's ends where it has no memory to begin."""
    monkeypatch.setattr("threading.Thread.run", lambda thread: None)
    synced = threading.Event()
    with logkv.open(path, sync=3600) as db:
        db["a"] = "1"
        engine = engine_of(db)
        assert engine._worker._thread is not None
        engine._worker._thread.join(LIMIT)
        monkeypatch.undo()
        real = files.sync_data
        monkeypatch.setattr(files, "sync_data", lambda fd: (real(fd), synced.set()))
        engine._worker.call(engine._sync_now)
        assert synced.wait(LIMIT)
