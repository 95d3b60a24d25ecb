"""What all tests share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import logkv
from benchmarks.baseline import BaselineStore


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Where a store may be made."""
    return str(tmp_path / "prices.db")


@pytest.fixture
def quick_dir(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: for tests that open hundreds of stores."""
    if not os.path.isdir("/dev/shm"):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def in_child() -> Iterator[Callable[[Callable[[], None]], int]]:
    """Runs a function in a forked child and returns how that ended, as `os.waitstatus_to_exitcode` says it."""

    def run(work: Callable[[], None]) -> int:
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                work()
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    yield run


@pytest.fixture
def begin_successor() -> Callable[[Path, bool], int]:
    """Makes a store of two segments, its last record in the second; returns where the last one of the first begins."""

    def make(path: Path, synced: bool) -> int:
        store = BaselineStore(path, segment_size=65_536)
        store[b"kept"] = bytes(30_000)
        lost = store._log[0].end
        store[b"lost"] = bytes(30_000)
        store._add_segment(store._log[0])
        store._write_manifest()
        store[b"next"] = b"1"
        if synced:
            store.sync()
        store._files.close()
        return lost

    return make


@pytest.fixture
def store(path: str) -> Iterator[logkv.Store]:
    """A new store, closed at the end."""
    with logkv.open(path) as db:
        yield db
