"""Interrupted, overtaken, ended in the middle: nothing is lost, nobody hangs, nothing crashes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import logkv
from logkv import _core, files, manifest, recovery
from logkv.writer import Writing
from tests.proof.session import engine_of

SEGMENT = 65_536
RunInChild = Callable[[Callable[[], None]], int]


def run(code: str, *arguments: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-X", "faulthandler", "-c", code, *arguments], capture_output=True, text=True,
                          timeout=timeout)


def test_a_forked_child_cannot_sync_or_mark(path: str, in_child: RunInChild) -> None:
    with logkv.open(path) as db:
        db["a"] = "1"
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.read(read, 1)
                for call in (db.sync, db.clear, lambda: db.put("x", "y")):
                    with pytest.raises(logkv.ReadOnlyError):
                        call()
                status = 0
            finally:
                os._exit(status)
        for i in range(100):
            db[f"b{i}"] = "x"
        os.write(write, b".")
        assert os.waitpid(pid, 0)[1] == 0
        assert len(db) == 101 and all(db[f"b{i}"] == b"x" for i in range(100))


@pytest.mark.parametrize("sync", ["'os'", "1.0", "0.01"])
@pytest.mark.parametrize("end", ["", "1 / 0", "sys.exit(3)"])
def test_a_program_that_does_not_close_its_store_ends(path: str, sync: str, end: str) -> None:
    code = f"import logkv, sys\ndb = logkv.open(sys.argv[1], sync={sync}, segment_size=65536)\n" \
           f"for i in range(2000): db[str(i)] = 'x' * 100\n{end}"
    assert run(code, path).returncode == {"": 0, "1 / 0": 1, "sys.exit(3)": 3}[end]
    with logkv.open(path, "r") as db:
        assert len(db) == 2_000


@pytest.mark.parametrize("sync", ["'always'", "'os'"])
def test_a_signal_handler_closes_the_store(path: str, sync: str) -> None:
    code = f"""if True:
        import logkv, os, signal, sys, threading
        db = logkv.open(sys.argv[1], sync={sync}, segment_size=65536)
        def end(*_):
            db.close()
            sys.exit(7)
        signal.signal(signal.SIGTERM, end)
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        i = 0
        while True:
            db["key %d" % (i % 1000)] = "x" * 100
            if i % 10 == 0: db.sync()
            i += 1
    """
    result = run(code, path)
    assert result.returncode == 7, result.stderr
    with logkv.open(path, "r") as db:
        assert all(value == b"x" * 100 for value in db.values())


def test_interrupts_at_random_moments(path: str) -> None:
    """An exception out of a signal's handler, wherever it strikes: what was acknowledged stays, or the writer refuses."""
    code = """if True:
        import logkv, random, signal, sys
        path, seed = sys.argv[1], int(sys.argv[2])
        dice = random.Random(seed)
        class Interrupt(Exception): pass
        def handler(*_): raise Interrupt
        signal.signal(signal.SIGALRM, handler)
        db = logkv.open(path, "n", segment_size=65536)
        model, unsure = {}, {}
        for i in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, dice.uniform(0.0001, 0.01), 1)   # again, if a finalizer swallows it
                while True:
                    key, value = b"%d" % dice.randrange(500), b"%d " % dice.randrange(10**9) * 30
                    unsure = {key: value}
                    if dice.random() < 0.2:
                        unsure = {key: None}
                        db.delete(key); model.pop(key, None)
                    else:
                        db[key] = value; model[key] = value
                    unsure = {}
                    if dice.random() < 0.01: db.sync()
            except (Interrupt, logkv.Error):
                signal.setitimer(signal.ITIMER_REAL, 0)
            for key in unsure:          # the interrupted one may have happened
                got = db.get(key)
                assert got in (model.get(key), unsure[key]), key
                if got is None: model.pop(key, None)
                else: model[key] = got
            if db.stats()["poisoned"]:
                assert dict(db) == model, "poisoned"
                try: db.close()
                except logkv.Error: pass
                db = logkv.open(path, segment_size=65536)
            assert dict(db) == model and len(db) == len(model), i
        db.close()
        with logkv.open(path, "r") as db:
            assert dict(db) == model
    """
    for seed in range(3):
        result = run(code, path, str(seed), timeout=60)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("call", ["rename", "sync", "open", "unlink", "stat"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_clear_that_fails_anywhere(path: str, call: str, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """It happened or it did not; and what is acknowledged afterwards stays."""
    for nth in range(1, 12):
        db = logkv.open(path, "n", segment_size=SEGMENT)
        db["old"] = "1"
        real = getattr(files.Directory, call)
        count = [0]

        def failing(*arguments: object, **options: object) -> object:
            count[0] += 1
            result = real(*arguments, **options)
            if count[0] == nth:
                raise kind(24, "injected")
            return result

        monkeypatch.setattr(files.Directory, call, failing)
        failed = False
        try:
            db.clear()
        except (kind, logkv.Error):
            failed = True
        monkeypatch.undo()
        expected = None
        try:
            db["new"] = "2"
            expected = {b"new": b"2"} | ({b"old": b"1"} if "old" in db else {})
        except logkv.Error:
            assert failed
        if expected is None:
            with pytest.raises(logkv.Error, match="closed and opened again"):
                db.close()
        else:
            db.close()
        with logkv.open(path, "r") as db:
            assert dict(db) == expected if expected is not None else dict(db) in ({}, {b"old": b"1"}), (call, nth)
        if not failed:
            break


def test_puts_wait_while_the_store_is_cleared(path: str) -> None:
    with logkv.open(path, segment_size=SEGMENT) as db:
        failures: list[BaseException] = []
        stop = threading.Event()

        def work(name: int) -> None:
            try:
                i = 0
                while not stop.is_set():
                    key = f"{name} {i}"
                    db[key] = "x" * 50
                    i += 1
                    assert db.get(key) in (b"x" * 50, None)
            except BaseException as problem:
                failures.append(problem)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(30):
            db.clear()
            time.sleep(0.002)
        stop.set()
        for thread in threads:
            thread.join()
        assert not failures
        content = dict(db)
    with logkv.open(path, "r") as db:
        assert dict(db) == content


def test_other_threads_wait_while_a_reader_builds_an_index(path: str) -> None:
    with logkv.open(path) as db:
        for i in range(60_000):
            db[str(i)] = "x"
    index = Path(path, "index")
    image = bytearray(index.read_bytes())
    image[-300_000] ^= 1
    index.write_bytes(image)
    missing: list[str] = []
    with logkv.Reader(path) as reader:

        def look(seed: int) -> None:
            dice = random.Random(seed)
            for _ in range(3_000):
                key = str(dice.randrange(60_000))
                if key not in reader:
                    missing.append(key)

        threads = [threading.Thread(target=look, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not missing and len(reader) == 60_000


def test_a_failed_sync_of_a_full_segment_does_not_seal_it(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the next attempt, which the system answers with success; all is written again by the next writer."""
    db = logkv.open(path, segment_size=SEGMENT)
    real = files.sync_data
    armed = [True]

    def fails_once(fd: int) -> None:
        if armed[0] and "000001.seg" in os.readlink(f"/proc/self/fd/{fd}"):
            armed[0] = False
            raise OSError(5, "Input/output error")
        real(fd)

    monkeypatch.setattr(files, "sync_data", fails_once)
    expected = {}
    try:
        for i in range(3_000):
            db[str(i)] = "x" * 60
            expected[str(i).encode()] = b"x" * 60
    except logkv.Error:
        pass
    assert not armed[0]
    monkeypatch.undo()
    with pytest.raises(logkv.Error, match="a sync failed"):
        db["more"] = "1"
    assert dict(db) == expected and not db.stats()["segments"][0]["sealed"]
    with pytest.raises(logkv.Error, match="a sync failed"):
        db.close()
    with logkv.open(path, segment_size=SEGMENT) as db:
        assert dict(db) == expected
    os.unlink(os.path.join(path, "index"))
    with logkv.open(path, segment_size=SEGMENT) as db:
        assert dict(db) == expected


def test_rescue_from_a_sealed_durable_place(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last sync was in a segment that has been sealed since; and the rescue is killed once."""
    db = logkv.open(path, segment_size=SEGMENT)
    expected = {b"%d" % i: b"y" * 60 for i in range(3_000)}
    for key, value in expected.items():
        db[key] = value
    monkeypatch.setattr(files, "sync_data", lambda fd: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    for call in (db.sync, db.close):
        with pytest.raises(logkv.Error, match="a sync failed"):
            call()
    monkeypatch.undo()
    monkeypatch.setattr(Writing, "_drop", lambda engine, segment: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError):
        logkv.open(path, segment_size=SEGMENT)
    monkeypatch.undo()
    for _ in range(2):
        with logkv.open(path, segment_size=SEGMENT) as db:
            assert dict(db) == expected
        os.unlink(os.path.join(path, "index"))


def test_many_damaged_records_do_not_stop_other_keys(path: str) -> None:
    """The shard that holds them grows all the same; a get of each raises."""
    with logkv.open(path) as db:
        for i in range(430):
            db[f"key {i:03}"] = "x" * 10
    segment = Path(path, "0000000001.seg")
    image = bytearray(segment.read_bytes())
    image[4096:4096 + 1024] = bytes(1024)
    image[64 + 4] ^= 0x40               # a length
    segment.write_bytes(image)
    with logkv.open(path) as db:
        for i in range(3_000):
            try:
                db[f"new {i}"] = "y"
            except logkv.CorruptionError:
                pytest.fail(f"a put of another key raised: {i}")
        damaged = 0
        for i in range(430):
            try:
                assert db[f"key {i:03}"] == b"x" * 10
            except logkv.CorruptionError:
                damaged += 1
        assert 20 < damaged < 40 and all(db[f"new {i}"] == b"y" for i in range(3_000))


def test_a_failing_clear_lets_the_store_go(path: str, monkeypatch: pytest.MonkeyPatch, in_child: RunInChild) -> None:
    with logkv.open(path) as db:
        db["a"] = "1"
    monkeypatch.setattr(manifest, "write_next", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(logkv.Error, match="No space left"):
        logkv.open(path, "n")
    monkeypatch.undo()
    assert in_child(lambda: logkv.open(path).close()) == 0


def test_a_store_where_lost_and_found_is(path: str) -> None:
    os.makedirs(os.path.join(path, "lost+found"))
    with logkv.open(path) as db:
        db["a"] = "1"
        assert dict(db) == {b"a": b"1"} and _core.FORMAT == 0


@pytest.mark.parametrize("wrong", [{"timeout": None}, {"timeout": "1"}, {"timeout": float("nan")}, {"timeout": -1},
                                   {"mode": "rb"}])
def test_wrong_arguments_leave_nothing(path: str, wrong: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError), match="timeout|mode"):
        logkv.open(path, **wrong)       # type: ignore[arg-type]
    assert not os.path.exists(path)


def test_waiting_for_one_store_does_not_hold_up_another(tmp_path: Path) -> None:
    code = "import logkv, sys\ndb = logkv.open(sys.argv[1])\nprint(flush=True)\nsys.stdin.read()\ndb.close()"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a")], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    assert holder.stdin is not None and holder.stdout is not None
    holder.stdout.readline()
    waiting = threading.Thread(target=lambda: logkv.open(tmp_path / "a", timeout=30).close())
    waiting.start()
    time.sleep(0.1)
    with logkv.open(tmp_path / "b") as db:
        db["b"] = "1"
        assert waiting.is_alive()
    holder.stdin.close()
    waiting.join()
    assert holder.wait() == 0
    holder.stdout.close()


def test_popitem_empties_a_store(path: str) -> None:
    with logkv.Store(path) as db:
        for i in range(20_000):
            db[str(i)] = "x"
        seen = {db.popitem()[0] for _ in range(20_000)}
        assert len(seen) == 20_000 and not db
        with pytest.raises(KeyError, match="empty"):
            db.popitem()


def test_a_directory_that_is_removed_under_its_writer(path: str) -> None:
    db = logkv.open(path)
    reader = logkv.Reader(path)
    db["a"] = "1"
    shutil.rmtree(path)
    with pytest.raises(logkv.Error, match="removed"):
        db.sync()
    with pytest.raises(logkv.Error, match="removed"):
        db.close()
    with logkv.open(path) as again:         # nothing of the old one is in the way
        again["b"] = "2"
    with pytest.raises(logkv.NotFoundError, match="opened again"):
        reader.refresh()
    reader.close()


def test_a_handler_closes_the_store_while_the_worker_waits_for_its_thread(path: str) -> None:
    """The handler's thread is in a sync, whose lock the worker waits for: closing must not wait for the worker then."""
    code = """if True:
        import logkv, sys, threading, time
        from logkv import files
        db = logkv.open(sys.argv[1], segment_size=65536)
        real, frames = files.sync_data, sys._current_frames

        def waits(frame):
            return frame.f_code.co_name in ("_patiently", "seal_oldest")

        def sync_data(fd):
            real(fd)
            worker = [t for t in threading.enumerate() if t.name == "logkv"]
            if threading.current_thread() is threading.main_thread() and worker:
                until = time.monotonic() + 5
                while not waits(frames()[worker[0].ident]) and time.monotonic() < until:
                    time.sleep(0.001)
                time.sleep(0.01)
                files.sync_data = real
                db.close()
                print("closed")
                sys.exit(7)

        i = 0
        while True:
            db["key %d" % (i % 1000)] = "x" * 100
            i += 1
            if i == 450:
                files.sync_data = sync_data
                db.sync()
    """
    result = run(code, path)
    assert result.returncode == 7 and "closed" in str(result.stdout), result.stderr


@pytest.mark.parametrize("what", ["put", "get"])
def test_a_handler_that_would_wait_for_its_own_thread_is_told_so(path: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while others have to wait: a put while the store is emptied, a get while the index is built."""
    told: list[str] = []

    def handler(*_: object) -> None:
        signal.alarm(10)            # ends what waits for ever
        try:
            db.put("a", "2") if what == "put" else db["a"]
        except logkv.Error as problem:
            told.append(str(problem))
        finally:
            signal.alarm(0)

    def too_long(*_: object) -> None:
        raise TimeoutError

    def strike(real: Callable[..., object]) -> Callable[..., object]:
        def struck(*arguments: object) -> object:
            os.kill(os.getpid(), signal.SIGUSR1)
            return real(*arguments)
        return struck

    before = [signal.signal(signal.SIGUSR1, handler), signal.signal(signal.SIGALRM, too_long)]
    try:
        with logkv.open(path) as db:
            db["a"] = "1"
            if what == "put":
                monkeypatch.setattr(Writing, "_create_segment", strike(Writing._create_segment))
                db.clear()
            else:
                monkeypatch.setattr(recovery, "rebuild", strike(recovery.rebuild))
                engine_of(db)._index_damaged("a test")
            monkeypatch.undo()
            assert "by this very thread" in told[0]
            db["b"] = "3"
            assert dict(db) == {**({} if what == "put" else {b"a": b"1"}), b"b": b"3"}
    finally:
        signal.signal(signal.SIGUSR1, before[0])
        signal.signal(signal.SIGALRM, before[1])
