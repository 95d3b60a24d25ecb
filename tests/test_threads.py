"""Threads that share a handle, or several of one store: nothing acknowledged is lost, nobody reads what was never written,
nobody hangs."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import logkv
from logkv.engine import Engine
from tests.proof.common import Child, SharedNumbers
from tests.racing import LIMIT, Stop, number_in, race, racing, seal

SEGMENT = 65_536
THREADS = 4


class Owner:
    """A thread that writes keys of its own and knows what they hold."""

    def __init__(self, store: logkv.Store, name: int, keys: int) -> None:
        self.store, self.dice = store, random.Random(name)
        self.keys = [b"%d/%d" % (name, number) for number in range(keys)]
        self.model: dict[bytes, bytes] = {}

    def step(self, number: int) -> None:
        key, dice = self.dice.choice(self.keys), self.dice.random()
        if dice < 0.6:
            value = seal(key, number, 5000 if dice < 0.01 else int(dice * 200))
            self.store[key] = value
            self.model[key] = value
        elif dice < 0.7:
            assert self.store.delete(key) == (self.model.pop(key, None) is not None)
        elif dice < 0.8:
            assert self.store.pop(key, None) == self.model.pop(key, None)
        else:
            assert self.store.get(key) == self.model.get(key) and (key in self.store) == (key in self.model)

    def look_around(self) -> None:
        """What the other threads have is whole, and one's own is all there."""
        found = {}
        for key, value in self.store.items():
            number_in(key, value)
            assert key not in found
            found[key] = value
        assert all(found.get(key) == self.model.get(key) for key in self.keys)


def test_threads_share_a_store(path: str) -> None:
    with logkv.open(path, segment_size=SEGMENT) as db:
        owners = [Owner(db, name, 700) for name in range(THREADS)]

        def own(owner: Owner) -> Callable[[Stop], None]:
            def work(stop: Stop) -> None:
                for number in range(2500):
                    owner.step(number)
                    if number % 500 == 499:
                        owner.look_around()
                    if stop.is_set():
                        break
            return work

        def count(stop: Stop) -> None:
            while not stop.is_set():
                assert 0 <= len(db) <= db.stats()["index"]["slots"]
                assert sum(1 for _ in db) <= THREADS * 700
                db.sync()

        with racing(count):
            race(*map(own, owners))
        expected = {key: value for owner in owners for key, value in owner.model.items()}
        facts = db.stats()
        assert facts["active"] > 5 and facts["problem"] is None
        assert dict(db) == expected and len(db) == len(expected)
        report = db.verify()
        assert report.ok, report.problems
    with logkv.open(path) as db:
        assert dict(db) == expected and db.stats()["recovery"]["index"] == "clean"


@pytest.mark.parametrize("sync", ["os", "always", 0.01])
def test_threads_share_a_writer_and_a_reader(path: str, sync: logkv.store.Sync) -> None:
    """What one thread was told is stored, every other thread sees from then on."""
    writes = 200 if sync == "always" else 3000
    acknowledged = [-1] * THREADS

    def write(name: int) -> Callable[[Stop], None]:
        def work(stop: Stop) -> None:
            last = 0
            for number in range(writes):
                key = b"%d/%d" % (name, number)
                version = writer.put(key, seal(key, number, 100))
                assert version > last
                last = version
                acknowledged[name] = number
        return work

    def read(name: int) -> Callable[[Stop], None]:
        def work(stop: Stop) -> None:
            dice = random.Random(name)
            while not stop.is_set():
                owner = dice.randrange(THREADS)
                if (most := acknowledged[owner]) >= 0:
                    number = dice.choice((most, dice.randint(0, most)))
                    key = b"%d/%d" % (owner, number)
                    assert number_in(key, reader[key]) == number
                if dice.random() < 0.002:
                    least = sum(acknowledged) + THREADS
                    assert sum(number_in(key, value) >= 0 for key, value in reader.items()) >= least
                    assert len(reader) >= least and len(writer) >= least
        return work

    with logkv.Writer(path, segment_size=SEGMENT, sync=sync) as writer, logkv.Reader(path) as reader:
        with racing(*map(read, range(2))):
            race(*map(write, range(THREADS)))
        assert len(reader) == len(writer) == THREADS * writes
        assert reader.verify().ok


def test_a_store_is_verified_while_threads_write_it(path: str) -> None:
    def write(name: int) -> Callable[[Stop], None]:
        def work(stop: Stop) -> None:
            for number in range(20_000):
                db[f"{name}/{number % 3000}"] = str(number)
        return work

    with logkv.open(path, segment_size=SEGMENT) as db, racing(*map(write, range(2))):
        for _ in range(5):
            report = db.verify()
            assert report.ok, report.problems


def test_clear_beside_threads_that_write(path: str) -> None:
    """A put that began after the last clear stays, one that had returned before it is gone."""
    begun = ended = 0
    last: dict[bytes, tuple[int, int]] = {}         # of each key's put: clears ended before it, clears begun after it

    def write(name: int) -> Callable[[Stop], None]:
        def work(stop: Stop) -> None:
            number = 0
            while not stop.is_set():
                key = b"%d/%d" % (name, number)
                before = ended
                db[key] = seal(key, number, 50)
                last[key] = before, begun
                if (value := db.get(key)) is not None:
                    number_in(key, value)
                number += 1
        return work

    def walk(stop: Stop) -> None:
        while not stop.is_set():
            for key, value in db.items():
                number_in(key, value)
            assert len(db) >= 0

    with logkv.open(path, segment_size=SEGMENT) as db:
        with racing(*map(write, range(3)), walk):
            for _ in range(30):
                begun += 1
                db.clear()
                ended += 1
                enough = len(last) + 300
                while len(last) < enough:
                    threading.Event().wait(0.001)
        content = dict(db)
        for key, (before, after) in last.items():
            if before == ended:
                assert key in content
            elif after < begun:
                assert key not in content
    with logkv.open(path, "r") as db:
        assert dict(db) == content


def test_each_pair_is_popped_by_one_thread(path: str) -> None:
    with logkv.open(path, segment_size=SEGMENT) as db:
        db.update({f"{number}": f"value {number}" for number in range(3000)})
        expected = dict(db)
        popped: list[list[tuple[bytes, bytes]]] = [[] for _ in range(THREADS)]

        def pop(name: int) -> Callable[[Stop], None]:
            def work(stop: Stop) -> None:
                dice = random.Random(name)
                with suppress(KeyError):
                    while True:
                        key = b"%d" % dice.randrange(3000)
                        if (value := db.pop(key, None)) is not None:
                            popped[name].append((key, value))
                        popped[name].append(db.popitem())
            return work

        race(*map(pop, range(THREADS)))
        pairs = [pair for some in popped for pair in some]
        assert len(pairs) == 3000 and dict(pairs) == expected and not db


# -- one reader, many threads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["_map_location", "_index_grew"])
def test_threads_that_learn_at_once_that_the_store_has_grown(path: str, question: str,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """All are told to look again, also those that ask when another one's question was answered already."""
    met = threading.Barrier(THREADS)
    real = getattr(Engine, question)

    def together(self: Engine, *known: int) -> bool:
        if self is reader._engine:
            with suppress(threading.BrokenBarrierError):    # the next question is one thread's alone
                met.wait(2)
        answer: bool = real(self, *known)
        return answer

    with logkv.open(path, segment_size=SEGMENT) as db, logkv.Reader(path) as reader:
        db["first"] = "1"
        assert reader["first"] == b"1"
        for number in range(4000):
            db[f"{number}"] = "x" * 50
        monkeypatch.setattr(Engine, question, together)
        got: list[bytes] = []
        race(*[lambda stop: got.append(reader["3999"])] * THREADS)
        assert got == [b"x" * 50] * THREADS
        assert not reader.stats()["index"]["private"]       # nobody took it for damaged either


def test_threads_share_an_iterator(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key comes to one of them, also where all learn at once that the index has grown before they can go on."""
    met = threading.Barrier(THREADS)
    real = Engine._index_grew

    def together(self: Engine, known: int) -> bool:
        if self is reader._engine:
            with suppress(threading.BrokenBarrierError):
                met.wait(2)
        return real(self, known)

    with logkv.open(path, segment_size=SEGMENT) as db, logkv.Reader(path) as reader:
        for number in range(4000):
            db[f"{number}"] = ""
        monkeypatch.setattr(Engine, "_index_grew", together)
        iterator = iter(reader)
        got: list[list[bytes]] = [[] for _ in range(THREADS)]
        race(*[lambda stop, mine=mine: mine.extend(iterator) for mine in got])   # type: ignore[misc]
        assert sorted(key for mine in got for key in mine) == sorted(db)


class Board(SharedNumbers):
    """What the writing process says: rounds begun by a clear, keys of this round that are there."""

    STOP, ROUND, KEYS = 0, 1, 2


def test_threads_share_a_reader_while_another_process_writes(path: str) -> None:
    """It rotates, grows the index, clears the store, and goes on."""
    board = Board()

    def write() -> list[int]:
        with logkv.open(path, segment_size=SEGMENT) as db:
            most = 0
            while not board[Board.STOP]:
                db.clear()
                board[Board.KEYS] = 0
                board[Board.ROUND] += 1
                for number in range(random.choice((100, 1000, 6000))):
                    key = b"%d/%d" % (board[Board.ROUND], number)
                    db[key] = seal(key, number, 80)
                    board[Board.KEYS] = number + 1
                most = max(most, db.stats()["index_bytes"])
            return [db.stats()["active"], most]

    with logkv.open(path) as db:
        first = db.stats()["index_bytes"]
    writer = Child("the writer", write)

    def read(name: int) -> Callable[[Stop], None]:
        def work(stop: Stop) -> None:
            dice = random.Random(name)
            while board[Board.ROUND] < 30 and not stop.is_set():
                round_, keys = board[Board.ROUND], board[Board.KEYS]
                if keys and round_ == board[Board.ROUND]:
                    number = dice.choice((keys - 1, dice.randrange(keys)))
                    key = b"%d/%d" % (round_, number)
                    value = reader.get(key)
                    if value is not None:
                        assert number_in(key, value) == number
                    else:       # a clear begins a moment before its round does
                        assert missing_after_clear(key, round_)
                if dice.random() < 0.003:
                    for key, value in reader.items():
                        number_in(key, value)
                    assert len(reader) <= 6000
        return work

    def missing_after_clear(key: bytes, round_: int) -> bool:
        for _ in range(10_000):
            if board[Board.ROUND] != round_:
                return True
            threading.Event().wait(0.001)
        return False

    try:
        with logkv.Reader(path) as reader:
            race(*map(read, range(THREADS)))
    finally:
        board[Board.STOP] = 1
        active, most = writer.result()
    assert active > 10 and most > first


# -- the end --------------------------------------------------------------------------------------------------


USES: dict[str, Callable[[logkv.Store], object]] = {
    "get": lambda db: db.get("500"),
    "in": lambda db: "nothing" in db,
    "len": len,
    "keys": lambda db: sum(1 for _ in db),
    "items": lambda db: [number_in(key, value) for key, value in db.items()],
    "stats": lambda db: db.stats(),
    "repr": repr,
    "verify": lambda db: db.verify().ok,
    "refresh": lambda db: db.refresh(),
    "copy": lambda db: db.__copy__().close(),
    "sync": lambda db: db.sync(),
    "put": lambda db: db.put(b"500", seal(b"500", 2)),
    "pop": lambda db: db.pop("700", None),
    "popitem": lambda db: db.popitem(),
    "clear": lambda db: db.clear(),
}
READS = [name for name in USES if name not in ("sync", "put", "pop", "popitem", "clear")]


@pytest.mark.parametrize("uses", [READS, list(USES)], ids=["reads", "all"])
def test_closing_under_threads(path: str, uses: list[str]) -> None:
    """Every use ends as usual or with ClosedError; a handle that stays open does not notice."""
    with logkv.open(path, segment_size=SEGMENT) as db:
        for key in (b"%d" % number for number in range(1000)):
            db[key] = seal(key, int(key), 50)
    writing = uses is not READS

    def use(name: str, handle: logkv.Store, ready: threading.Semaphore) -> Callable[[Stop], None]:
        def work(stop: Stop) -> None:
            ready.release()
            with suppress(logkv.ClosedError):
                while not stop.is_set():
                    with suppress(KeyError):
                        USES[name](handle)
        return work

    for turn in range(8):
        ready = threading.Semaphore(0)
        handle = logkv.open(path, "c" if writing else "r", segment_size=SEGMENT)
        other = logkv.open(path, "c" if writing else "r", segment_size=SEGMENT) if turn % 2 else handle
        with handle, other:
            with racing(*[use(name, handle, ready) for name in uses]):
                for _ in uses:
                    assert ready.acquire(timeout=LIMIT)
                threading.Event().wait(0.02 * random.random())
                handle.close()
                assert handle.closed
            if other is not handle:
                assert all(number_in(key, value) >= 0 for key, value in other.items())
    report = logkv.verify(path)
    assert report.ok, report.problems


def test_threads_close_one_handle_at_once(path: str) -> None:
    """It is closed once: another handle of the store stays open."""
    with logkv.open(path) as db:
        for _ in range(100):
            twin = logkv.open(path)
            race(*[lambda stop: twin.close()] * THREADS)
            assert twin.closed
        db["still"] = "open"
        assert db["still"] == b"open"


def test_threads_open_and_close_one_store(path: str) -> None:
    def visit(name: int) -> Callable[[Stop], None]:
        def work(stop: Stop) -> None:
            for number in range(60):
                key = b"%d/%d" % (name, number)
                with logkv.open(path, timeout=LIMIT) as db:
                    db[key] = seal(key, number)
                with logkv.Reader(path) as reader:
                    assert number_in(key, reader[key]) == number
        return work

    race(*map(visit, range(THREADS)))
    with logkv.open(path) as db:
        assert len(db) == THREADS * 60 and db.stats()["recovery"]["index"] == "clean"


# -- several handles ------------------------------------------------------------------------------------------


def test_one_store_by_many_paths(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store is known by its directory, not by the path that leads there; the last handle lets the lock go."""
    link = path + ".link"
    os.symlink(path, link)
    monkeypatch.chdir(Path(path).parent)
    names: list[str | bytes | Path] = [path, link, Path(path).name, os.fsencode(path), Path(path)]

    handles: list[logkv.Store] = []
    for number, name in enumerate(names):
        handles.append(logkv.open(name))
        handles[-1][f"{number}"] = str(number)
        assert handles[-1].path == os.fsdecode(name)
    readers = [logkv.Reader(name) for name in names]
    for handle in [*handles, *readers]:
        assert sorted(handle) == [b"0", b"1", b"2", b"3", b"4"]
    while len(handles) > 1:
        handles.pop(0).close()
        handles[-1]["0"] = "again"
        assert all(reader["0"] == b"again" for reader in readers)
    code = "import logkv, sys\ntry: logkv.open(sys.argv[1])\nexcept logkv.LockedError as problem: print(problem.pid)"
    assert subprocess.check_output([sys.executable, "-c", code, path], text=True) == f"{os.getpid()}\n"
    handles.pop().close()
    subprocess.run([sys.executable, "-c", "import logkv, sys\nlogkv.open(sys.argv[1]).close()", path], check=True)
    for reader in readers:
        assert reader["0"] == b"again"
        reader.close()


def test_handles_for_reading_and_writing_beside_each_other(path: str) -> None:
    """Whichever is closed first, the others go on."""
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        handles = [logkv.open(path), logkv.open(path, "r"), logkv.Writer(path)]
        for number, index in enumerate(order):
            writers = [handles[i] for i in (0, 2) if i in order[number:]]
            if writers:
                writers[0].put("key", f"{order} {number}")
                assert all(handles[i]["key"] == f"{order} {number}".encode() for i in order[number:])
            handles[index].close()
        with pytest.raises(logkv.ClosedError):
            handles[1].get("key")
