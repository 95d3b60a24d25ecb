"""Forks, pools, workers, and interpreters that end: a child's handles read, its parent's go on, nothing hangs."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.queues import SimpleQueue
from typing import Any

import pytest

import logkv
from logkv import recovery
from logkv.engine import Engine
from tests.proof import forks
from tests.proof.common import fork
from tests.racing import LIMIT, Stop, number_in, racing, seal

SEGMENT = 65_536
KEYS = 1000


def forked(work: Callable[[], object]) -> int:
    """Runs something in the child of a fork: how that ended, as `os.waitstatus_to_exitcode` says it; a child that hangs is
    killed."""
    return ended(fork(work))


def ended(pid: int) -> int:
    killer = threading.Timer(LIMIT, os.kill, (pid, signal.SIGKILL))
    killer.start()
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        killer.cancel()
        killer.join()


def fill(path: str, count: int = 500) -> None:
    with logkv.open(path, segment_size=SEGMENT) as db:
        for key in (b"%d" % number for number in range(count)):
            db[key] = seal(key, int(key), 100)


# -- fork -----------------------------------------------------------------------------------------------------


def test_every_handle_of_a_child_reads_only(path: str) -> None:
    """And all of them follow the parent, which goes on and keeps its lock."""
    with logkv.open(path, segment_size=SEGMENT) as db, logkv.Writer(path, segment_size=SEGMENT) as writer, \
            logkv.Reader(path) as reader, logkv.open(path, "r") as other:
        db["before"] = "1"
        iterator = iter(db.items())
        heard, say = os.pipe()

        def child() -> None:
            os.read(heard, 1)
            for handle in (db, writer, reader, other):
                assert handle["before"] == b"2" and handle["after"] == b"3" and len(handle) == 3002
            assert dict(iterator)[b"before"] == b"2"
            assert sum(1 for _ in db) == sum(1 for _ in reader.items()) == 3002
            for refused in (lambda: db.put("x", "y"), lambda: db.delete("before"), lambda: db.pop("before"), db.popitem,
                            db.clear, db.sync, lambda: writer.put("x", "y"), lambda: writer.delete("before"),
                            writer.sync, lambda: db.update(x="y"), lambda: db.setdefault("x", "y")):
                with pytest.raises(logkv.ReadOnlyError):
                    refused()
            with pytest.raises(logkv.LockedError) as caught:
                logkv.open(path, segment_size=SEGMENT)
            assert caught.value.pid == os.getppid()
            with logkv.Reader(path) as own:
                assert own["after"] == b"3"
            for handle in (db, writer, reader, other):
                handle.close()
                with pytest.raises(logkv.ClosedError):
                    handle.get("before")

        pid = fork(child)
        db["before"] = "2"
        for number in range(3000):
            db[f"{number}"] = "x" * 100
        db["after"] = "3"
        os.write(say, b"!")
        assert ended(pid) == 0
        os.close(heard)
        os.close(say)
        writer.put("last", "4")
        assert reader["last"] == b"4"
    with logkv.open(path) as db:
        assert len(db) == 3003 and db.stats()["recovery"]["index"] == "clean"


def test_a_child_becomes_the_writer_after_its_parent(path: str) -> None:
    db = logkv.open(path)
    db["a"] = "1"
    heard, say = os.pipe()

    def child() -> None:
        os.read(heard, 1)
        with logkv.open(path) as mine:
            mine["b"] = "2"
            assert db["b"] == b"2"          # the handle that was inherited follows
        db.close()

    pid = fork(child)
    db.close()
    os.write(say, b"!")
    assert ended(pid) == 0
    os.close(heard)
    os.close(say)
    with logkv.open(path) as db:
        assert dict(db) == {b"a": b"1", b"b": b"2"}


def test_a_grandchild_reads(path: str) -> None:
    with logkv.open(path) as db:
        db["a"] = "1"

        def child() -> None:
            assert forked(lambda: db["a"]) == 0

            def write() -> None:
                with pytest.raises(logkv.ReadOnlyError):
                    db["a"] = "2"
            assert forked(write) == 0

        assert forked(child) == 0
        assert db["a"] == b"1"


@pytest.mark.parametrize("clearing", [False, True], ids=["puts", "clear"])
def test_forks_while_threads_write(path: str, clearing: bool) -> None:
    """Whatever the other threads were in the middle of: the child reads, and the parent loses nothing."""
    acknowledged = [-1, -1]

    def write(name: int) -> Callable[[Stop], None]:
        def work(stop: Stop) -> None:
            number = 0
            while not stop.is_set():
                key = b"%d/%d" % (name, number % KEYS)
                db[key] = seal(key, number, 100)
                acknowledged[name] = number
                number += 1
                if clearing and name == 0 and number % 20 == 0:
                    db.clear()
                if number % 100 == 0:
                    db.sync()
        return work

    def child() -> None:
        for name, most in enumerate(list(acknowledged)):
            for number in range(max(0, most - 20), most + 1):
                value = reader.get(key := b"%d/%d" % (name, number % KEYS))
                assert clearing if value is None else number_in(key, value) >= number or clearing
        for handle in (db, reader):
            for key, value in handle.items():
                number_in(key, value)
            assert len(handle) >= 0 and handle.stats()["keys"] >= 0
            with pytest.raises(logkv.ClosedError):
                handle.close()
                handle.get("x")

    with logkv.open(path, segment_size=SEGMENT) as db, logkv.Reader(path) as reader:
        with racing(*map(write, range(2))):
            for _ in range(30):
                assert forked(child) == 0
        if not clearing:
            for name, most in enumerate(acknowledged):
                for number in range(max(0, most - KEYS + 1), most + 1):
                    key = b"%d/%d" % (name, number % KEYS)
                    assert number_in(key, db[key]) == number
    report = logkv.verify(path)
    assert report.ok, report.problems


@pytest.mark.parametrize("end", ["clear", "close"])
def test_a_fork_between_a_closed_file_and_the_next_step(path: str, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """The child does not close a second time what was just closed, and becomes a reader."""
    real, forks = os.close, []

    def child() -> None:
        monkeypatch.undo()
        with pytest.raises((logkv.ReadOnlyError, logkv.ClosedError)):
            db.put("x", "y")

    def close(fd: int) -> None:
        real(fd)
        monkeypatch.setattr(os, "close", real)
        forks.append(forked(child))
        monkeypatch.setattr(os, "close", close)

    fill(path)
    with logkv.open(path, segment_size=SEGMENT) as db:
        monkeypatch.setattr(os, "close", close)
        getattr(db, end)()
        monkeypatch.undo()
    assert forks and not any(forks)
    with logkv.open(path) as db:
        db["x"] = "z"


def test_a_fork_while_another_thread_asks_for_the_stores_growth(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock that the other thread holds has nobody in the child who would let it go."""
    asked, go_on = threading.Event(), threading.Event()
    real = Engine.map_segment

    def slow(self: Engine, *arguments: Any) -> None:
        if threading.current_thread() is not threading.main_thread() and self is reader._engine:
            asked.set()
            assert go_on.wait(LIMIT)
        real(self, *arguments)

    with logkv.open(path, segment_size=SEGMENT) as db, logkv.Reader(path) as reader:
        db["0"] = "1"
        assert reader["0"] == b"1"
        for number in range(3000):
            db[f"{number}"] = "x" * 100
        monkeypatch.setattr(Engine, "map_segment", slow)

        def read(key: str) -> None:
            assert reader[key] == b"x" * 100

        def child() -> None:
            assert all(reader[f"{number}"] == b"x" * 100 for number in range(3000))
            reader.close()

        with racing(lambda stop: read("2999")):
            try:
                assert asked.wait(LIMIT)
                assert forked(child) == 0
            finally:
                go_on.set()


def test_a_fork_while_another_thread_builds_an_index(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child builds its own."""
    fill(path)
    os.unlink(os.path.join(path, "control"))
    begun, go_on = threading.Event(), threading.Event()
    real = recovery.rebuild

    def slow(*arguments: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go_on.wait(LIMIT)
        return real(*arguments)

    with logkv.Reader(path) as reader:
        monkeypatch.setattr(recovery, "rebuild", slow)
        with racing(lambda stop: reader._engine._index_damaged("so the test wants it") if reader._engine else None):
            try:
                assert begun.wait(LIMIT)

                def child() -> None:
                    assert len(reader) == 500
                    assert all(number_in(key, value) >= 0 for key, value in reader.items())

                assert forked(child) == 0
            finally:
                go_on.set()
        assert len(reader) == 500


def test_a_fork_while_another_thread_opens(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child neither waits for the opening nor keeps its lock."""
    fill(path)
    begun, go_on = threading.Event(), threading.Event()
    real = Engine.trust_in_index

    def slow(self: Engine, *arguments: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go_on.wait(LIMIT)
        return real(self, *arguments)

    def open_and_write(stop: Stop) -> None:
        with logkv.open(path, segment_size=SEGMENT) as db:
            db["new"] = "1"

    monkeypatch.setattr(Engine, "trust_in_index", slow)
    with racing(open_and_write):
        try:
            assert begun.wait(LIMIT)

            def child() -> None:
                with logkv.Reader(path) as reader:
                    assert len(reader) == 500
                with pytest.raises(logkv.LockedError):
                    logkv.open(path, segment_size=SEGMENT)

            assert forked(child) == 0
        finally:
            go_on.set()
    with logkv.open(path) as db:
        assert len(db) == 501 and db.stats()["recovery"]["index"] == "clean"


def test_forks_under_load() -> None:
    """Figure 7 in small: nothing lost, nothing written by a child."""
    figures = forks.run(puts=4000, children=8, seed=3)
    assert not figures.violations, "\n".join(figures.violations)
    assert figures.puts == 4000 and figures.children == 8 and figures.reads and figures.refused


# -- multiprocessing ------------------------------------------------------------------------------------------


CONTEXTS = [pytest.param(multiprocessing.get_context(method), id=method) for method in ("fork", "forkserver", "spawn")]


@contextmanager
def started(context: Any, target: Callable[..., None], *arguments: Any) -> Iterator[None]:
    process = context.Process(target=target, args=arguments)
    process.start()
    try:
        yield
    finally:
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
            process.join()
        assert process.exitcode == 0
        process.close()


def use(handle: logkv.Store | logkv.Reader, codec: str | None, go_on: Any, answers: SimpleQueue[Any]) -> None:
    """What a worker does with a handle that was passed to it."""
    answers.put((dict(handle), handle.codec))
    go_on.get()
    answers.put(handle["later"])
    try:
        assert isinstance(handle, logkv.Store)
        handle["x"] = handle["later"]
        answers.put("written")
    except (AssertionError, logkv.ReadOnlyError) as problem:
        answers.put(type(problem).__name__)
    handle.close()


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", ["Store", "Store for reading", "Reader"])
@pytest.mark.parametrize("codec", [None, "json"])
def test_a_handle_as_an_argument(path: str, context: Any, kind: str, codec: str | None) -> None:
    with logkv.open(path, codec=codec) as db:
        db["a"] = "1"
        answers, go_on = context.SimpleQueue(), context.SimpleQueue()
        handle = db if kind == "Store" else logkv.Reader(path, codec=codec) if kind == "Reader" else \
            logkv.open(path, "r", codec=codec)
        with started(context, use, handle, codec, go_on, answers):
            assert answers.get() == (dict(db), codec)
            db["later"] = "2"
            go_on.put(None)
            assert answers.get() == db["later"]
            assert answers.get() == ("AssertionError" if kind == "Reader" else "ReadOnlyError")
        db["last"] = handle["later"]
        assert dict(handle) == dict(db) and len(db) == 3
        handle.close()


def test_a_writer_is_not_passed_on(path: str) -> None:
    with logkv.Writer(path) as writer:
        with pytest.raises(TypeError):
            pickle.dumps(writer)
    with logkv.open(path) as db:
        db.close()
        with pytest.raises(logkv.ClosedError):
            pickle.dumps(db)


class Prices(Sequence[tuple[int, int]]):
    """What a Dataset of torch is: a length, and an item for each index."""

    def __init__(self, path: str) -> None:
        self.reader = logkv.Reader(path)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: Any) -> tuple[int, int]:
        key = b"%d" % index
        return index, number_in(key, self.reader[key])


def work_through(dataset: Prices, indices: SimpleQueue[Any], items: SimpleQueue[Any]) -> None:
    """A worker of the loader: gets batches of indices until it gets None."""
    while (batch := indices.get()) is not None:
        items.put([(os.getpid(), *dataset[index]) for index in batch])


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_dataset_in_the_workers_of_a_loader(path: str, context: Any) -> None:
    """As a DataLoader does it: each worker inherits the dataset by fork, or gets it pickled; the indices are dealt out."""
    fill(path, 640)
    dataset = Prices(path)
    assert dataset[7] == (7, 7)                     # it is in use when the workers begin
    items = context.SimpleQueue()
    queues = [context.SimpleQueue() for _ in range(2)]
    workers = [context.Process(target=work_through, args=(dataset, queue, items)) for queue in queues]
    for worker in workers:
        worker.start()
    got: list[tuple[int, int, int]] = []
    for start in range(0, len(dataset), 32):
        queues[start // 32 % 2].put(range(start, start + 32))
    for _ in range(0, len(dataset), 32):
        got += items.get()
    for queue in queues:
        queue.put(None)
    for worker in workers:
        worker.join(LIMIT)
        assert worker.exitcode == 0
    assert sorted((index, number) for _, index, number in got) == [(index, index) for index in range(640)]
    assert {pid for pid, _, _ in got} == {worker.pid for worker in workers}
    assert dataset[639] == (639, 639)
    dataset.reader.close()


# -- the end of an interpreter --------------------------------------------------------------------------------

OPENED = """
import logkv, os, sys, threading, time
path = sys.argv[1]
db = logkv.open(path, segment_size=65536)
for i in range(1000): db[str(i)] = "x" * 100
reader = logkv.Reader(path)
def until_closed():
    try: work()
    except logkv.ClosedError: pass
"""

ENDS = {
    "at the last line": "",
    "sys.exit": "sys.exit(0)",
    "with a thread that writes": """
def work():
    i = 0
    while True:
        db["more %d" % (i % 5000)] = "x" * 100
        reader.get("5"), len(reader)
        i += 1
for _ in range(3): threading.Thread(target=until_closed, daemon=True).start()
while len(db) < 2000: time.sleep(0.001)
""",
    "with a thread that syncs": """
def work():
    while True:
        db["again"] = "x"
        db.sync()
for _ in range(3): threading.Thread(target=until_closed, daemon=True).start()
while "again" not in db: time.sleep(0.001)
""",
    "with a thread that clears": """
def work():
    while True:
        db.clear()
        for i in range(1000): db[str(i)] = "x" * 100
threading.Thread(target=until_closed, daemon=True).start()
time.sleep(0.05)
""",
    "with threads that iterate": """
def work():
    while True:
        for pair in db.items(): pass
        for pair in reader.items(): pass
for _ in range(3): threading.Thread(target=until_closed, daemon=True).start()
time.sleep(0.05)
""",
    "in a thread that ends later": """
def work():
    time.sleep(0.1)
    db["late"] = "1"
threading.Thread(target=work).start()
""",
    "in a cycle": """
class Holder: pass
holder = Holder()
holder.me, holder.db, holder.reader = holder, db, reader
del db, reader, holder
""",
    "in a child that was forked": """
if os.fork() == 0:
    db.get("5")
    sys.exit(0)
assert os.wait()[1] == 0
""",
    "in a child that goes by os._exit": """
if os.fork() == 0:
    db.get("5")
    os._exit(0)
assert os.wait()[1] == 0
""",
    "in an atexit function": """
import atexit
atexit.register(lambda: db.get("5"))        # runs before logkv's own
""",
}


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program in an interpreter of its own, without Python's warning where a process with threads forks."""
    options = "-X", "faulthandler", "-W", "ignore:This process:DeprecationWarning"
    return subprocess.run([sys.executable, *options, "-c", code, *arguments], capture_output=True, text=True,
                          timeout=LIMIT)


@pytest.mark.parametrize("end", ENDS)
def test_an_interpreter_ends_with_open_stores(path: str, end: str) -> None:
    """They are closed: the next opening finds the index clean."""
    result = run(OPENED + ENDS[end], path)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    with logkv.open(path) as db:
        assert db.stats()["recovery"]["index"] == "clean"
        if "clears" not in end:
            assert all(db[f"{number}"] == b"x" * 100 for number in range(1000))
        assert db.verify().ok
        if "later" in end:
            assert db["late"] == b"1"


def test_a_child_that_ends_does_not_close_the_parents_store(path: str) -> None:
    code = OPENED + """
if os.fork() == 0:
    db.close(); reader.close()
    sys.exit(0)
assert os.wait()[1] == 0
db["after"] = "1"
assert reader["after"] == b"1"
os._exit(0)
"""
    result = run(code, path)
    assert result.returncode == 0 and not result.stderr, result.stderr
    with logkv.open(path) as db:                # nobody closed it, and nobody marked it closed
        assert db.stats()["recovery"]["index"] == "trusted"
        assert len(db) == 1001 and db["after"] == b"1"


@pytest.mark.parametrize("first", ["main", "sub"])
@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "sharing the GIL"])
def test_a_subinterpreter_is_refused(path: str, first: str, isolated: bool) -> None:
    """Subinterpreters do not share a process's stores: the import says so, and the main interpreter has them, also if
    it comes later."""
    code = """
import sys
try: import _interpreters as interpreters
except ImportError: import _xxsubinterpreters as interpreters
other_code = f"import sys; sys.path[:] = {sys.path}\\n" \\
    "try: import logkv\\nexcept ImportError as said: assert 'subinterpreter' in str(said)\\nelse: raise SystemError"
first, isolated = sys.argv[2], sys.argv[3] == "True"
def refused():
    other = interpreters.create(isolated=isolated) if sys.version_info < (3, 13) else \\
        interpreters.create("isolated" if isolated else "legacy")
    failed = interpreters.run_string(other, other_code)
    assert failed is None, failed
    interpreters.destroy(other)
if first == "sub": refused()
import logkv
with logkv.open(sys.argv[1]) as db:
    db["a"] = "1"
    refused()
    db["b"] = db["a"]
    assert len(db) == 2
"""
    result = run(code, path, first, str(isolated))
    assert result.returncode == 0, result.stderr
