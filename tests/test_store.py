"""The contract of the handles: what a mapping of bytes to bytes does, and what it refuses."""

from __future__ import annotations

import array
import gc
import os
import random
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, ItemsView, KeysView, Mapping, MutableMapping, ValuesView
from pathlib import Path

import pytest

import logkv

KEY_MAX = 65_535


# -- a mapping --------------------------------------------------------------------------------------------------


def test_a_store_is_a_mutable_mapping(store: logkv.Store) -> None:
    assert isinstance(store, MutableMapping)
    store["btc"] = "4411.99"
    store[b"eth"] = bytearray(b"301.5")
    store["ltc"] = memoryview(b"77.1")
    assert store["btc"] == store.get(b"btc") == b"4411.99"
    assert "eth" in store and b"eth" in store and "xrp" not in store
    assert len(store) == 3
    assert dict(store) == {b"btc": b"4411.99", b"eth": b"301.5", b"ltc": b"77.1"}
    del store["eth"]
    assert store.get("eth") is None and store.get("eth", 0) == 0
    with pytest.raises(KeyError, match="eth"):
        store["eth"]
    with pytest.raises(KeyError):
        del store["eth"]
    assert store.delete("eth") is False and store.delete("ltc") is True


def test_views_are_live_and_set_like(store: logkv.Store) -> None:
    keys, values, items = store.keys(), store.values(), store.items()
    assert isinstance(keys, KeysView) and isinstance(values, ValuesView) and isinstance(items, ItemsView)
    store.update({"a": "1", "b": "2"}, c="3")
    assert sorted(keys) == [b"a", b"b", b"c"] and sorted(values) == [b"1", b"2", b"3"]
    assert ("a", "1") in items and (b"a", b"2") not in items and ("z", "1") not in items and "a1" not in items
    assert "a" in keys and "1" in values and b"9" not in values
    assert keys & {b"a", b"z"} == {b"a"} and keys - {b"a"} == {b"b", b"c"}
    assert len(keys) == len(values) == len(items) == 3


def test_dict_methods(store: logkv.Store) -> None:
    assert store.setdefault("a", "1") == b"1" and store.setdefault("a", "2") == b"1"
    assert store.pop("a") == b"1" and store.pop("a", None) is None
    with pytest.raises(KeyError):
        store.pop("a")
    store.update([("x", "1"), ("y", "2")])
    key, value = store.popitem()
    assert {key: value}.items() <= {b"x": b"1", b"y": b"2"}.items() and len(store) == 1
    store.clear()
    assert len(store) == 0 and not store and list(store) == []
    with pytest.raises(KeyError):
        store.popitem()
    store["after"] = "clear"
    assert store == {b"after": b"clear"} and store != {b"after": b"x"}
    with pytest.raises(TypeError):
        reversed(store)     # type: ignore[call-overload]


def test_versions_rise(store: logkv.Store) -> None:
    before = time.time_ns()
    versions = [store.put("k", str(i)) for i in range(1000)]
    assert versions == sorted(set(versions))
    assert abs(versions[0] - before) < 10_000_000_000


def test_text_and_bytes_are_one_key(store: logkv.Store) -> None:
    store["schön"] = "é"
    assert store["schön".encode()] == "é".encode()
    with pytest.raises(UnicodeEncodeError):
        store["\ud800"] = "lone surrogate"


@pytest.mark.parametrize("key", [1, None, 1.5, bytearray(b"k"), memoryview(b"k"), ("k",)])
def test_a_key_of_another_type_is_a_type_error(store: logkv.Store, key: object) -> None:
    for call in (lambda: store.put(key, b""), lambda: store[key], lambda: store.get(key), lambda: key in store,  # type: ignore[arg-type,index]
                 lambda: store.delete(key)):    # type: ignore[arg-type]
        with pytest.raises(TypeError, match="a key must be bytes or str"):
            call()
    assert len(store) == 0


@pytest.mark.parametrize("value", [1, None, 1.5, ["x"]])
def test_a_value_of_another_type_is_a_type_error(store: logkv.Store, value: object) -> None:
    with pytest.raises(TypeError, match="a value must be bytes, str or a contiguous buffer"):
        store["k"] = value      # type: ignore[assignment]
    with pytest.raises(TypeError, match="contiguous"):
        store["k"] = memoryview(b"abcdef")[::2]
    assert len(store) == 0
    store["k"] = array.array("H", [1, 2])   # type: ignore[assignment]
    assert store["k"] == array.array("H", [1, 2]).tobytes()


# -- sizes at the edges -----------------------------------------------------------------------------------------

SEGMENT = 65_536
EDGE_VALUES = [0, 1, 7, 8, 9, 99, 4_000, 4_095, 4_096, 4_097, 8_192, 32_000, 32_768 - 120, 32_768, 40_000,
               SEGMENT - 64 - 48 - 64, SEGMENT - 64, SEGMENT, SEGMENT + 1, 3 * SEGMENT, 5_000_000]


@pytest.mark.parametrize("size", EDGE_VALUES)
def test_values_of_every_size(path: str, size: int) -> None:
    """Within, at and across pages, allocation steps and segments; read live, reopened, and recovered."""
    rnd = random.Random(size)
    pairs = {b"before": b"x" * 1000, b"value": rnd.randbytes(size), b"after": b"y" * 1000, b"again": rnd.randbytes(size)}
    with logkv.open(path, segment_size=SEGMENT) as db, logkv.Reader(path) as reader:
        for key, value in pairs.items():
            db[key] = value
            assert reader[key] == value
        assert dict(db) == dict(reader) == pairs
    with logkv.open(path, "r") as db:
        assert dict(db) == pairs
    os.unlink(os.path.join(path, "index"))
    with logkv.open(path, "w", segment_size=SEGMENT) as db:
        assert db.stats()["recovery"]["index"] == "rebuilt"
        assert dict(db) == pairs


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 9, 255, 256, 4_096, 65_534, KEY_MAX])
def test_keys_of_every_size(path: str, size: int) -> None:
    key = random.Random(size).randbytes(size)
    with logkv.open(path, segment_size=SEGMENT) as db:
        db[key] = b"value"
        db[b"other"] = b""
        assert db[key] == b"value" and db[b"other"] == b"" and key in db
        assert sorted(db) == sorted([key, b"other"])
    os.unlink(os.path.join(path, "index"))
    with logkv.open(path, segment_size=SEGMENT) as db:
        assert db[key] == b"value"
        assert db.delete(key)
        assert key not in db and len(db) == 1


def test_a_hundred_megabytes(path: str) -> None:
    value = random.Random(1).randbytes(1 << 20) * 96
    with logkv.open(path) as db:
        db["big"] = value
        db["small"] = "s"
        assert db["big"] == value
    os.unlink(os.path.join(path, "index"))
    with logkv.open(path) as db:
        assert db["big"] == value and db["small"] == b"s"


def test_what_is_too_long_is_refused(store: logkv.Store) -> None:
    store["k"] = "v"
    with pytest.raises(ValueError, match="at most 65,535 bytes, this one has 65,536"):
        store[b"x" * (KEY_MAX + 1)] = b""
    assert b"x" * (KEY_MAX + 1) not in store
    assert store.get(b"x" * (KEY_MAX + 1)) is None
    assert not store.delete(b"x" * (KEY_MAX + 1))
    huge = memoryview(bytearray(1)).cast("B")
    del huge
    mapped = _four_gibibytes()
    if mapped is not None:
        with pytest.raises(ValueError, match="at most 4,294,967,295 bytes, this one has 4,294,967,296"):
            store["k"] = mapped
    assert dict(store) == {b"k": b"v"}


def _four_gibibytes() -> memoryview | None:
    """4 GiB of address space that nobody touches."""
    import mmap

    try:
        return memoryview(mmap.mmap(-1, 1 << 32, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_NORESERVE))
    except (OSError, AttributeError):
        return None


# -- opening ----------------------------------------------------------------------------------------------------


def test_flags(path: str) -> None:
    for flag in "rw":
        with pytest.raises(logkv.NotFoundError):
            logkv.open(path, flag)
        with pytest.raises(FileNotFoundError):
            logkv.open(path, flag)
    with logkv.open(path, "c") as db:
        db["a"] = "1"
    with logkv.open(path, "w") as db:
        assert db["a"] == b"1"
    with logkv.open(path, "n") as db:
        assert dict(db) == {}
        db["b"] = "2"
    with logkv.open(path, "r") as db:
        assert dict(db) == {b"b": b"2"}
    with pytest.raises(ValueError, match='flag must be "r", "w", "c" or "n"'):
        logkv.open(path, "x")


def test_an_empty_directory_becomes_a_store(tmp_path: Path) -> None:
    with logkv.open(tmp_path) as db:
        db["a"] = "1"
    with logkv.Reader(tmp_path) as reader:
        assert reader["a"] == b"1"


@pytest.mark.parametrize("flag", "rwcn")
def test_a_file_is_refused(tmp_path: Path, flag: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(logkv.FormatError, match="is a file; a LogKV store is a directory"):
        logkv.open(file, flag)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("flag", "rwcn")
def test_a_foreign_directory_is_refused(tmp_path: Path, flag: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(logkv.FormatError, match="notes.txt"):
        logkv.open(tmp_path, flag)
    assert os.listdir(tmp_path) == ["notes.txt"] and (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("flag", "rwcn")
def test_segments_without_a_manifest_are_not_thrown_away(path: str, flag: str) -> None:
    with logkv.open(path) as db:
        db["a"] = "1"
    os.unlink(os.path.join(path, "MANIFEST"))
    with pytest.raises(logkv.CorruptionError, match="MANIFEST"):
        logkv.open(path, flag)
    assert os.path.getsize(os.path.join(path, "0000000001.seg"))


def test_a_newer_format_is_refused_and_not_touched(path: str) -> None:
    with logkv.open(path) as db:
        db["a"] = "1"
    file = Path(path, "MANIFEST")
    file.write_bytes(file.read_bytes().replace(b"LogKV MANIFEST 0", b"LogKV MANIFEST 7"))
    before = {name: Path(path, name).read_bytes() for name in os.listdir(path)}
    for flag in "rwcn":
        with pytest.raises(logkv.FormatError, match="format 7"):
            logkv.open(path, flag)
    assert {name: Path(path, name).read_bytes() for name in os.listdir(path)} == before


def test_a_missing_parent(tmp_path: Path) -> None:
    with pytest.raises(logkv.NotFoundError, match="to hold the store"):
        logkv.open(tmp_path / "no" / "store")


def test_wrong_options(path: str) -> None:
    for wrong in ({"sync": "never"}, {"sync": 0}, {"sync": -1.0}, {"segment_size": 1000}, {"segment_size": 2 << 30}):
        with pytest.raises(ValueError):
            logkv.open(path, **wrong)       # type: ignore[arg-type]
    for wrong in ({"sync": None}, {"sync": True}, {"segment_size": "big"}):
        with pytest.raises(TypeError):
            logkv.open(path, **wrong)       # type: ignore[arg-type]
    with pytest.raises(TypeError):
        logkv.open(7)           # type: ignore[arg-type]
    assert not os.path.exists(path)


def test_rights_of_new_files(path: str) -> None:
    old = os.umask(0o027)
    try:
        with logkv.open(path, mode=0o666) as db:
            db["a"] = "1"
            modes = {name: os.stat(os.path.join(path, name)).st_mode & 0o777 for name in os.listdir(path)}
    finally:
        os.umask(old)
    assert set(modes.values()) == {0o640} and os.stat(path).st_mode & 0o777 == 0o750


def test_missing_rights(path: str, in_child: Callable[[Callable[[], None]], int]) -> None:
    with logkv.open(path) as db:
        db["a"] = "1"
    for name in os.listdir(path):
        os.chmod(os.path.join(path, name), 0o444)
    os.chmod(path, 0o555)
    os.chmod(os.path.dirname(path), 0o755)
    os.chmod(os.path.dirname(os.path.dirname(path)), 0o755)
    os.chmod(os.path.dirname(os.path.dirname(os.path.dirname(path))), 0o755)

    def as_nobody() -> None:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        with logkv.open(path, "r") as db:
            assert db["a"] == b"1"
        with pytest.raises(logkv.Error, match="Permission denied"):
            logkv.open(path, "w")
        with pytest.raises(logkv.Error, match="Permission denied"):
            logkv.open(os.path.join(path, "deeper"))

    assert in_child(as_nobody) == 0


# -- handles ----------------------------------------------------------------------------------------------------


def test_a_closed_store_says_so(path: str) -> None:
    db = logkv.open(path)
    db["a"] = "1"
    iterator = iter(db)
    db.close()
    db.close()
    assert db.closed and "closed" in repr(db)
    for call in (lambda: db["a"], lambda: db.get("a"), lambda: "a" in db, lambda: len(db), lambda: list(db),
                 lambda: db.put("a", "2"), lambda: db.delete("a"), lambda: db.sync(), lambda: db.stats(),
                 lambda: db.clear(), lambda: next(iterator), lambda: db.pop("a"), lambda: db.__enter__()):
        with pytest.raises(logkv.ClosedError, match="closed"):
            call()
    with pytest.raises(logkv.ClosedError):
        db["a"] = "2"


def test_a_reader_cannot_write(path: str) -> None:
    with logkv.open(path) as db:
        db["a"] = "1"
    with logkv.open(path, "r") as db:
        for call in (lambda: db.put("a", "2"), lambda: db.delete("a"), lambda: db.pop("a"), lambda: db.clear(),
                     lambda: db.update(b="1")):
            with pytest.raises(logkv.ReadOnlyError, match="for reading only"):
                call()
        db.sync()               # there is nothing to wait for
        assert dict(db) == {b"a": b"1"}
    with logkv.Reader(path) as reader:
        assert isinstance(reader, Mapping) and not hasattr(reader, "put")
        assert reader == {b"a": b"1"} and "1 keys" in repr(reader)


def test_readers_follow_a_writer_live(path: str) -> None:
    with logkv.Writer(path, segment_size=65_536) as writer, logkv.Reader(path) as reader:
        for i in range(20_000):     # through rotations, seals and growth of the index
            writer.put(f"key {i}", f"value {i}")
            assert reader[f"key {i}"] == b"value %d" % i
        assert len(reader) == 20_000
        assert writer.delete("key 7") and "key 7" not in reader
        assert len(writer.stats()["segments"]) > 5


def test_handles_of_one_process_share_a_core(path: str) -> None:
    first = logkv.open(path, segment_size=65_536)
    second = logkv.open(path, segment_size=65_536)
    first["a"] = "1"
    assert second["a"] == b"1"
    with pytest.raises(ValueError, match="segment_size"):
        logkv.open(path)
    with pytest.raises(logkv.LockedError, match="in this process"):
        logkv.open(path, "n", segment_size=65_536)
    first.close()
    second["b"] = "2"
    assert second["a"] == b"1"
    second.close()
    with logkv.open(path) as third:     # the last one let the lock go, and with it the options
        assert dict(third) == {b"a": b"1", b"b": b"2"}


def test_a_second_writer_is_told_who_writes(path: str, in_child: Callable[[Callable[[], None]], int]) -> None:
    parent = os.getpid()
    with logkv.open(path) as db:
        db["a"] = "1"

        def second() -> None:
            began = time.monotonic()
            with pytest.raises(logkv.LockedError, match=f"pid {parent}") as caught:
                logkv.open(path, timeout=0.2)
            assert caught.value.pid == parent and time.monotonic() - began >= 0.2
            with logkv.open(path, "r") as reader:
                assert reader["a"] == b"1"

        assert in_child(second) == 0
        db["b"] = "2"       # the child's end did not take the lock away
        assert in_child(second) == 0


def test_a_writer_waits_for_the_lock(path: str) -> None:
    with logkv.open(path) as db:
        child = subprocess.Popen([sys.executable, "-c", "import logkv, sys\n"
                                  "with logkv.open(sys.argv[1], timeout=30) as db: db['child'] = 'was here'", path])
        time.sleep(0.3)
        assert child.poll() is None
        db["parent"] = "too"
    assert child.wait(30) == 0
    with logkv.open(path, "r") as db:
        assert dict(db) == {b"parent": b"too", b"child": b"was here"}


def test_the_child_of_a_fork_reads(path: str, in_child: Callable[[Callable[[], None]], int]) -> None:
    with logkv.open(path) as db:
        db["a"] = "1"

        def child() -> None:
            assert db["a"] == b"1"
            with pytest.raises(logkv.ReadOnlyError):
                db["a"] = "2"
            db.close()

        assert in_child(child) == 0
        db["b"] = "2"
        assert dict(db) == {b"a": b"1", b"b": b"2"}


def test_the_child_of_a_fork_follows_its_parent(path: str) -> None:
    """Through rotations, growth of the index and clear(), as any reader."""
    with logkv.open(path, segment_size=65_536) as db:
        go, ready = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.read(go, 1)
                good = len(db) == 3_000 and all(db[str(i)] == b"x" * 100 for i in range(3_000))
                os.read(go, 1)
                os._exit(0 if good and dict(db) == {b"after": b"clear"} else 1)
            finally:
                os._exit(2)
        for i in range(3_000):
            db[str(i)] = "x" * 100
        os.write(ready, b".")
        time.sleep(0.2)
        db.clear()
        db["after"] = "clear"
        os.write(ready, b".")
        assert os.waitpid(pid, 0)[1] == 0
        os.close(go)
        os.close(ready)


def test_threads_use_a_store_that_is_closed_under_them(path: str) -> None:
    """They finish or get ClosedError; what they were told is stored is there."""
    for turn in range(5):
        db = logkv.open(path, segment_size=65_536)
        stored: list[set[str]] = [set() for _ in range(4)]
        failures: list[BaseException] = []

        def work(n: int, db: logkv.Store = db, turn: int = turn, failures: list[BaseException] = failures,
                 stored: list[set[str]] = stored) -> None:
            try:
                for i in range(1_000_000):
                    key = f"{turn} {n} {i}"
                    db[key] = "x" * 100
                    stored[n].add(key)
                    assert db[key] == b"x" * 100 and len(db) > i
                    if i % 100 == 0:
                        assert sum(1 for _ in zip(db.items(), range(50))) == 50 or i < 50
            except logkv.ClosedError:
                pass
            except BaseException as problem:
                failures.append(problem)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 20
        while not all(stored) and time.monotonic() < deadline:
            time.sleep(0.01)
        db.close()
        for thread in threads:
            thread.join()
        assert not failures
        with logkv.open(path, "r") as again:
            for keys in stored:
                assert keys and all(key in again for key in keys)


def test_a_dropped_writer_warns_and_lets_go(path: str) -> None:
    db = logkv.open(path)
    db["a"] = "1"
    with pytest.warns(ResourceWarning, match="was not closed"):
        del db
        gc.collect()
    with logkv.open(path) as again:
        assert again["a"] == b"1"
    reader = logkv.Reader(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del reader
        gc.collect()


def test_a_renamed_store_stays_open(path: str) -> None:
    with logkv.open(path, segment_size=65_536) as db:
        db["a"] = "1"
        os.rename(path, path + ".moved")
        for i in range(3_000):
            db[f"key {i}"] = "x" * 100
    with logkv.open(path + ".moved", "r") as db:
        assert len(db) == 3_001


# -- iteration --------------------------------------------------------------------------------------------------


def test_iteration_survives_changes(path: str) -> None:
    """What is there all the time is seen exactly once, whatever else is written and however the index grows."""
    rnd = random.Random(3)
    with logkv.open(path, segment_size=65_536) as db:
        steady = {b"steady %d" % i: b"%d" % i for i in range(3_000)}
        db.update(steady)
        for k in range(200):
            db[f"goes {k}"] = "x"
        seen: list[bytes] = []
        for n, (key, value) in enumerate(db.items()):
            if key in steady:
                seen.append(key)
                assert value in (steady[key], b"changed")
            if n % 3 == 0:
                db[f"new {n}"] = rnd.randbytes(20)
                db[rnd.choice(list(steady)[:50])] = b"changed"
                db.delete(f"goes {n // 3}")
        assert sorted(seen) == sorted(steady)


def test_iteration_does_not_show_what_was_deleted_meanwhile(store: logkv.Store) -> None:
    for i in range(100):
        store[str(i)] = "x"
    iterator = iter(store)
    first = next(iterator)
    for i in range(100):
        if str(i).encode() != first:
            del store[str(i)]
    assert list(iterator) == []


def test_iteration_survives_a_clear(path: str) -> None:
    with logkv.open(path, segment_size=65_536) as db, logkv.Reader(path) as reader:
        for mapping in (db, reader):
            db.clear()
            for i in range(5_000):
                db[f"old {i}"] = "x" * 50
            iterator = iter(mapping.items())
            assert next(iterator)[0].startswith(b"old")
            db.clear()
            for i in range(100):
                db[f"new {i}"] = "y"
            rest = list(iterator)
            assert all(key.startswith(b"new") for key, _ in rest) and len(set(rest)) == len(rest)
            assert len(mapping) == len(list(mapping)) == 100


# -- limits and sizes -------------------------------------------------------------------------------------------


def test_one_short_key_takes_little_disk(path: str) -> None:
    with logkv.open(path) as db:
        db["btc"] = "4411.99"
        files = [os.stat(os.path.join(path, name)) for name in os.listdir(path)] + [os.stat(path)]
        assert sum(file.st_blocks * 512 for file in files) <= 100 * 1024


def test_the_index_takes_few_bytes_a_key(path: str) -> None:
    with logkv.open(path) as db:
        for i in range(125_000):
            db[i.to_bytes(4, "little")] = b""
        assert db.stats()["index_bytes"] / len(db) <= 13


def test_a_full_disk_is_a_clean_error(path: str) -> None:
    """RLIMIT_FSIZE stands for it: the call that asks for room fails, before the record's first byte."""
    code = """if True:
        import logkv, resource, signal, sys
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        db = logkv.open(sys.argv[1], segment_size=1 << 20)
        db["before"] = "1"
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        done = 0
        try:
            while True:
                db[str(done)] = b"x" * 1000
                done += 1
        except logkv.Error as problem:
            assert problem.errno == 27 and "room" in str(problem), problem
        assert 100 < done < 200, done
        assert str(done) not in db and len(db) == done + 1
        db["small"] = "fits where the other did not"
        try:
            db["again"] = b"x" * 1000
            raise SystemExit("no error")
        except logkv.Error:
            pass
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        db["after"] = b"x" * 1000
        db.close()
        with logkv.open(sys.argv[1], segment_size=1 << 20) as db:
            assert len(db) == done + 3 and db["before"] == b"1" and db["after"] and str(done) not in db
    """
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_little_address_space(path: str) -> None:
    """Under RLIMIT_AS a segment cannot be mapped ahead: what is there is mapped, and mapped again when it grew."""
    code = """if True:
        import logkv, resource, sys
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 320_000_000,) * 2)
        with logkv.open(sys.argv[1]) as db, logkv.Reader(sys.argv[1]) as reader:
            for i in range(300_000):
                db[str(i)] = "x" * 60
                if i % 10_000 == 0:
                    assert reader[str(i)] == b"x" * 60
            assert len(set(db)) == len(reader) == 300_000
    """
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_stats_of_a_store_whose_segment_is_missing(path: str) -> None:
    with logkv.open(path, segment_size=65_536) as db:
        for number in range(2000):
            db[f"key {number}"] = bytes(100)
    os.unlink(os.path.join(path, "0000000001.seg"))
    with logkv.open(path, "r") as db:
        assert db.stats()["segments"][0]["bytes"] == 0 and db.stats()["keys"] == 2000
