"""Compaction: what is dead goes, nothing comes back, and nobody who reads or writes meanwhile notices."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import logkv
from benchmarks import baseline
from logkv import compaction, files, recovery
from logkv.opening import Options
from tests.proof.common import fork
from tests.proof.session import engine_of, merge, open_store, rotate, sealed_segments
from tests.racing import LIMIT, race

SEGMENT = 65_536
Model = dict[bytes, bytes]


@pytest.fixture
def path(quick_dir: Path) -> str:
    return str(quick_dir / "prices.db")


# -- stores of several segments, and what there should be of them ----------------------------------------------------


def opened(path: str, **options: object) -> logkv.Store:
    """A store that compacts only when it is told to, and seals at once."""
    how: dict[str, Any] = {"compaction": "manual", "background": False} | options
    return open_store(Path(path), "c", Options(segment_size=SEGMENT, **how))


def put(db: logkv.Store, model: Model, key: str | bytes, value: bytes) -> None:
    key = key.encode() if isinstance(key, str) else key
    db[key] = model[key] = value


def drop(db: logkv.Store, model: Model, key: str) -> None:
    del db[key], model[key.encode()]


def live_bytes(model: Model) -> int:
    return sum(baseline.record_size(len(key), len(value)) for key, value in model.items())


def check(db: logkv.Store, model: Model) -> None:
    """What is there, and what of each segment is alive, as a program finds it that has only docs/format.md."""
    assert dict(db) == model and len(db) == len(model)
    facts = db.stats()
    counted = {s["number"]: (s["live_records"], s["live_bytes"]) for s in facts["segments"]}
    found = dict.fromkeys(counted, (0, 0))
    with baseline.BaselineStore(db.path, "r", footers=True) as other:
        assert dict(other) == model
        for key, (segment, _, length) in other._index.items():
            records, size = found[segment.number]
            found[segment.number] = records + 1, size + baseline.record_size(len(key), length)
    assert counted == found
    assert facts["live_bytes"] == live_bytes(model)
    assert all(s["dead_bytes"] >= 0 for s in facts["segments"])


def reopen(db: logkv.Store, lose: str = "", **options: object) -> logkv.Store:
    """Closed and opened; `lose`: a file that is removed in between."""
    path = db.path
    db.close()
    if lose:
        os.unlink(os.path.join(path, lose))
    return opened(path, **options)


def segment_files(path: str) -> dict[int, Path]:
    return {int(file.stem): file for file in sorted(Path(path).glob("*.seg"))}


def records(path: str, kind: int) -> list[bytes]:
    """The keys of all records of a kind, in the order of the log."""
    return [key for _, found, key, _ in baseline.read_log(path) if found == kind]


def damage(file: Path, what: bytes) -> None:
    """Changes one bit of these bytes, which stand in the file once."""
    data = file.read_bytes()
    assert data.count(what) == 1
    with file.open("r+b") as opened_file:
        opened_file.seek(data.index(what))
        opened_file.write(bytes([what[0] ^ 1]))


def damage_footer(path: str, number: int) -> None:
    entry = next(s for s in baseline.read_manifest(path)["segments"] if s["number"] == number)
    with segment_files(path)[number].open("r+b") as file:
        file.seek(entry["end"] + 24)
        file.write(b"\xff\xff")


def is_due(db: logkv.Store) -> bool:
    return compaction.Need.of(compaction.shares(engine_of(db)), engine_of(db).options).due


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.002)


# -- a store and its model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_a_store_is_its_model(path: str, seed: int) -> None:
    """Overwrites, deletes, merges of any neighbours, of everything, and reopenings, in every mix."""
    dice, model = random.Random(seed), Model()
    how = dice.choice(("manual", "manual", "auto"))
    db = opened(path, compaction=how)
    keys = dice.choice((20, 300, 2000))
    deletes = dice.choice((0.05, 0.4, 0.7))
    for _ in range(30):
        for _ in range(dice.choice((10, 200, 800))):
            key = f"{dice.randrange(keys)}".encode()
            if dice.random() < deletes:
                assert db.delete(key) == (model.pop(key, None) is not None)
            else:
                put(db, model, key, dice.randbytes(dice.choice((0, 30, 300, 5000 if dice.random() < 0.02 else 100))))
        what = dice.random()
        sealed = sealed_segments(db)
        if what < 0.5 and sealed:
            first = dice.randrange(sealed)
            merge(db, first, dice.randrange(first, sealed))
        elif what < 0.6:
            db.compact()
            assert db.stats()["dead_bytes"] < SEGMENT // 8
        elif what < 0.7:
            db = reopen(db, dice.choice(("", "index", "control")), compaction=how)
        check(db, model)
    db = reopen(db)
    db.compact()
    check(db, model)
    db = reopen(db, "index")
    check(db, model)
    assert db.verify().ok
    db.close()


@pytest.mark.parametrize("lose", ["", "index", "control"])
def test_counts_of_a_store_with_damaged_footers(path: str, lose: str) -> None:
    model = Model()
    db = opened(path)
    for turn in range(3000):
        put(db, model, str(turn % 1300), b"x" * (turn % 200))
    for key in range(0, 1300, 3):
        drop(db, model, str(key))
    sealed = sealed_segments(db)
    merge(db, 1, sealed - 2)
    merged = next(s["number"] for s in db.stats()["segments"][1:] if s["sealed"])
    check(db, model)
    db.close()
    damage_footer(path, merged)
    damage_footer(path, 1)
    if lose:
        os.unlink(os.path.join(path, lose))
    with opened(path) as db:
        assert dict(db) == model
        assert db.stats()["recovery"].get("footers_unreadable", 0) == (2 if lose else 0)
        assert db.stats()["live_bytes"] == live_bytes(model)
        assert sum(s["live_records"] for s in db.stats()["segments"]) == len(model)


@pytest.mark.parametrize("lose", ["", "index"])
@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("last", ["020", "150"])
def test_counts_of_what_changes_while_it_moves(path: str, monkeypatch: pytest.MonkeyPatch, last: str, overwrite: bool,
                                               lose: str) -> None:
    """A put or delete of a key that was moved already, or was not, comes between two slots that a merge changes."""
    model = Model()
    db = opened(path)
    for number in range(200):
        put(db, model, f"{number:03}", b"x" * 100)
    rotate(db)
    breathe, moved = compaction.Compactor._breathe, iter(range(1000))

    def breathe_and_change(compactor: compaction.Compactor) -> None:
        breathe(compactor)
        if next(moved) == 50:
            for key in ("010", "160", last):
                (put(db, model, key, b"new") if overwrite else drop(db, model, key))

    monkeypatch.setattr(compaction.Compactor, "_breathe", breathe_and_change)
    monkeypatch.setattr(compaction, "SWING", 1)
    merge(db, 0, 0)
    check(db, model)
    db = reopen(db, lose)
    check(db, model)
    merge(db, 0, 0)
    check(db, model)
    db.close()


def test_deleted_everything(path: str) -> None:
    """What is left is next to nothing, and nothing comes back."""
    model = Model()
    with opened(path, compaction="auto") as db:
        for number in range(5000):
            put(db, model, str(number), bytes(100))
        for number in range(5000):
            drop(db, model, str(number))
        db.compact()
        check(db, {})
        facts = db.stats()
        assert facts["dead_bytes"] < 4096 and len(facts["segments"]) <= 2
    assert not records(path, baseline.DELETE) and not records(path, baseline.PUT)
    os.unlink(os.path.join(path, "index"))
    with logkv.Reader(path) as reader:
        assert not list(reader)


def test_compact_again_changes_nothing(path: str) -> None:
    model = Model()
    with opened(path) as db:
        for number in range(3000):
            put(db, model, str(number % 1000), bytes(100))
        db.compact()
        before = {number: file.stat().st_ino for number, file in segment_files(path).items()}
        merges = db.stats()["compaction"]["merges"]
        db.compact()
        assert db.stats()["compaction"]["merges"] == merges
        assert {number: file.stat().st_ino for number, file in segment_files(path).items()} == before
        check(db, model)


def test_progress_of_compact(path: str) -> None:
    steps: list[tuple[int, int]] = []
    with opened(path) as db:
        for number in range(5000):
            db[str(number % 3000)] = bytes(100)
        db.compact(progress=lambda done, total: steps.append((done, total)))
    total = steps[-1][1]
    assert total > 0 and steps[-1] == (total, total)
    assert steps == sorted(steps) and all(0 <= done <= total for done, _ in steps)


def test_what_progress_raises_ends_it(path: str) -> None:
    """As Ctrl-C does: what was begun is undone, and the store goes on."""
    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Enough

    model = Model()
    with opened(path) as db:
        for number in range(3000):
            put(db, model, str(number % 1000), bytes(100))
        with pytest.raises(Enough):
            db.compact(progress=stop)
        assert set(segment_files(path)) == {s["number"] for s in db.stats()["segments"]}
        check(db, model)
        db.compact()
        check(db, model)


# -- tombstones ------------------------------------------------------------------------------------------------------


def layers(path: str, deletes: int = 1) -> tuple[logkv.Store, Model]:
    """Segment 0 has a put of "gone" and more, the next ones a tombstone each, and other keys."""
    model = Model()
    db = opened(path)
    put(db, model, "gone", b"old")
    put(db, model, "kept", b"old")
    rotate(db)
    for turn in range(deletes):
        if turn:
            put(db, model, "gone", b"again")
        drop(db, model, "gone")
        put(db, model, f"beside {turn}", b"1")
        rotate(db)
    return db, model


def test_a_tombstone_stays_while_an_older_segment_has_its_key(path: str) -> None:
    db, model = layers(path)
    for _ in range(4):
        merge(db, 1, 1)
        assert records(path, baseline.DELETE) == [b"gone"]
        db = reopen(db, "index")
        check(db, model)
    merge(db, 0, 1)
    assert not records(path, baseline.DELETE) and b"gone" not in records(path, baseline.PUT)
    db = reopen(db, "index")
    check(db, model)
    db.close()


def test_a_tombstone_goes_when_the_older_segment_went(path: str) -> None:
    db, model = layers(path)
    merge(db, 0, 0)
    assert records(path, baseline.DELETE) == [b"gone"] and b"gone" not in records(path, baseline.PUT)
    merge(db, 1, 1)
    assert not records(path, baseline.DELETE)
    db = reopen(db, "index")
    check(db, model)
    db.close()


def test_a_tombstone_of_a_key_that_no_older_segment_has_goes(path: str) -> None:
    model = Model()
    with opened(path) as db:
        put(db, model, "kept", b"1")
        rotate(db)
        put(db, model, "brief", b"1")
        drop(db, model, "brief")
        rotate(db)
        merge(db, 1, 1)
        assert not records(path, baseline.DELETE)
        check(db, model)


def test_a_tombstone_behind_another_one(path: str) -> None:
    """The newer one may go as long as the older one stays, and that must."""
    db, model = layers(path, deletes=3)
    for first in (3, 2, 1, 2, 1):
        if first < sealed_segments(db):
            merge(db, first, first)
        db = reopen(db, "index")
        check(db, model)
        assert b"gone" in records(path, baseline.DELETE)
    merge(db, 0, sealed_segments(db) - 1)
    assert not records(path, baseline.DELETE)
    db = reopen(db, "index")
    check(db, model)
    db.close()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_tombstone_behind_a_footer_that_is_damaged(path: str, number: int) -> None:
    """A segment that cannot be searched may have any key: a put, a tombstone, a put behind a tombstone."""
    model = Model()
    db = opened(path)
    put(db, model, "gone", b"first")
    rotate(db)
    drop(db, model, "gone")
    rotate(db)
    put(db, model, "gone", b"second")
    rotate(db)
    drop(db, model, "gone")
    rotate(db)
    numbers = [s["number"] for s in db.stats()["segments"]]
    db.close()
    damage_footer(path, numbers[number])
    db = opened(path)
    merge(db, 3, 3)
    db = reopen(db, "index")
    assert "gone" not in db and dict(db) == model
    db.close()


@pytest.mark.parametrize("seed", range(6))
def test_partial_merges_bring_nothing_back(path: str, seed: int) -> None:
    dice, model = random.Random(seed), Model()
    db = opened(path)
    for _ in range(8):
        for _ in range(150):
            key = str(dice.randrange(40))
            if dice.random() < 0.6:
                assert db.delete(key) == (model.pop(key.encode(), None) is not None)
            else:
                put(db, model, key, dice.randbytes(20))
        rotate(db)
    for _ in range(12):
        sealed = sealed_segments(db)
        first = dice.randrange(sealed)
        merge(db, first, min(sealed - 1, first + dice.choice((0, 0, 1, 2))))
        db = reopen(db, dice.choice(("index", "index", "")))
        check(db, model)
    db.close()


# -- who reads meanwhile ---------------------------------------------------------------------------------------------


def churn(db: logkv.Store, model: Model, dice: random.Random, had: dict[bytes, set[bytes]] | None = None) -> None:
    """New values for keys that stay."""
    for _ in range(1500):
        key = b"stays %d" % dice.randrange(700)
        put(db, model, key, dice.randbytes(100))
        if had is not None:
            had[key].add(model[key])


@pytest.mark.parametrize("how", ["store", "reader", "own index"])
def test_iterators_across_compactions(path: str, how: str) -> None:
    """Each key that is there all the time is seen exactly once, with a value that it had; views are live."""
    dice, model = random.Random(1), Model()
    with opened(path) as db:
        for number in range(700):
            put(db, model, b"stays %d" % number, dice.randbytes(100))
        if how == "own index":
            os.rename(os.path.join(path, "index"), os.path.join(path, "index.aside"))
        handle: logkv.Store | logkv.Reader = db if how == "store" else logkv.Reader(path)
        if how == "own index":
            os.rename(os.path.join(path, "index.aside"), os.path.join(path, "index"))
        views = handle.keys(), handle.values(), handle.items()
        for _ in range(4):
            had = {key: {value} for key, value in model.items()}
            keys, pairs, values = iter(handle), iter(handle.items()), iter(handle.values())
            seen_keys, seen_pairs, seen_values = [next(keys)], [next(pairs)], [next(values)]
            for turn in range(3):
                churn(db, model, dice, had)
                if turn == 1:
                    db.compact()
                else:
                    merge(db, 0, sealed_segments(db) // 2)
                for _ in range(100):
                    seen_keys.append(next(keys))
                    seen_pairs.append(next(pairs))
                    seen_values.append(next(values))
            seen_keys += keys
            seen_pairs += pairs
            seen_values += values
            assert sorted(seen_keys) == sorted(model)
            assert sorted(key for key, _ in seen_pairs) == sorted(model) and len(seen_values) == len(model)
            assert all(value in had[key] for key, value in seen_pairs)
            assert sorted(views[0]) == sorted(model) and len(views[1]) == len(views[2]) == len(model)
            assert set(views[2]) == set(model.items()) and sorted(views[1]) == sorted(model.values())
        if handle is not db:
            handle.close()


@pytest.mark.parametrize("more", range(30))
def test_an_iterator_over_an_index_that_is_replaced(path: str, more: int) -> None:
    """Also where the new one comes to have seen as many changes as the old one had when the iterator looked."""
    with opened(path) as db:
        for number in range(20):
            db["overwritten"] = str(number)
        db["other"] = "1"
        rotate(db)
        with logkv.Reader(path) as reader:
            iterator = iter(reader.items())
            first, _ = next(iterator)
            with reopen(db, "index") as again:
                second = {b"overwritten": b"other", b"other": b"overwritten"}[first]
                again[second] = "newest"
                for number in range(more):
                    again[first] = str(number)
                assert list(iterator) == [(second, b"newest")]


def test_readers_in_another_process(path: str) -> None:
    """It opened the store before, reads and iterates while the store is compacted, and sees every key exactly once."""
    dice, model = random.Random(1), Model()
    with logkv.open(path, segment_size=SEGMENT) as db:
        for number in range(700):
            put(db, model, b"stays %d" % number, dice.randbytes(100))
        heard, say = os.pipe()
        stop_heard, stop_say = os.pipe()

        def read() -> None:
            os.close(stop_say)
            os.set_blocking(stop_heard, False)
            passes = 0
            with logkv.Reader(path) as reader:
                os.write(say, b"ready")
                while True:
                    done = False
                    with suppress(BlockingIOError):
                        done = os.read(stop_heard, 1) == b""
                    seen = []
                    for key, value in reader.items():
                        assert len(value) == 100
                        seen.append(key)
                    assert len(seen) == len(set(seen)) == 700
                    for key in seen[:200]:
                        assert len(reader[key]) == 100
                    passes += 1
                    if done:
                        break
                assert passes > 1 and set(dict(reader.items())) == set(seen)

        pid = fork(read)
        os.close(stop_heard)
        assert os.read(heard, 5) == b"ready"
        for _ in range(20):
            churn(db, model, dice)
            db.compact()
        os.close(stop_say)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert db.stats()["compaction"]["merges"] >= 20
        check_closed = dict(model)
    with logkv.Reader(path) as reader:
        assert dict(reader) == check_closed


def gone_but_mapped(path: str, pid: int | str = "self") -> set[str]:
    """Segments without a name that a process still holds."""
    return {line.split()[5] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
            if path in line and ".seg (deleted)" in line}


def test_a_merge_lets_go_of_what_it_dropped(path: str) -> None:
    model = Model()
    with opened(path) as db:
        for number in range(5000):
            put(db, model, str(number % 1000), bytes(100))
        assert dict(db) == model
        iterator = iter(db.items())
        next(iterator)
        db.compact()
        assert gone_but_mapped(path)        # for the iterator
        assert len(list(iterator)) == len(model) - 1
        del iterator
        len(db)
        assert not gone_but_mapped(path)


@pytest.mark.parametrize("how", ["get", "in", "len", "iteration", "refresh"])
def test_a_reader_lets_go_at_its_next_call(path: str, how: str) -> None:
    """In another process, so that only its own mappings count."""
    model = Model()
    with opened(path) as db:
        for number in range(5000):
            put(db, model, str(number % 1000), bytes(100))
        heard, say = os.pipe()
        order_heard, order_say = os.pipe()

        def read() -> None:
            db.close()
            with logkv.Reader(path) as reader:
                assert dict(reader) == model
                os.write(say, b"1")
                assert os.read(order_heard, 1)
                {"get": lambda: reader.get("1"), "in": lambda: "1" in reader, "len": lambda: len(reader),
                 "iteration": lambda: next(iter(reader)), "refresh": reader.refresh}[how]()
                os.write(say, b"2")
                assert os.read(order_heard, 1)
                assert dict(reader) == model

        pid = fork(read)
        assert os.read(heard, 1) == b"1"
        inherited = gone_but_mapped(path)
        db.compact()
        held = gone_but_mapped(path, pid)
        assert held and not inherited
        os.write(order_say, b"x")
        assert os.read(heard, 1) == b"2"
        left = gone_but_mapped(path, pid)
        os.write(order_say, b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert not left
        check(db, model)


# -- damage ----------------------------------------------------------------------------------------------------------


def damaged(path: str, **options: object) -> tuple[logkv.Store, Model, bytes]:
    """A store with a record of which a bit has changed, in a segment where much is dead."""
    model = Model()
    with opened(path) as db:
        for number in range(3000):
            put(db, model, str(number), b"value %d " % number + bytes(80))
        for number in range(2500):
            if number != 77:
                put(db, model, str(number), b"new")
        victim = next(s["number"] for s in db.stats()["segments"] if s["sealed"] and s["live_records"] == 1)
    assert victim == 1
    damage(segment_files(path)[victim], b"value 77 ")
    del model[b"77"]
    return opened(path, **options), model, b"77"


def test_a_damaged_record_is_never_copied(path: str) -> None:
    db, model, key = damaged(path)
    with db:
        for _ in range(2):
            with pytest.raises(logkv.CorruptionError, match="0000000001.seg") as caught:
                db.compact()
            assert caught.value.segment == 1 and caught.value.offset is not None
            assert 1 in segment_files(path)
            assert set(segment_files(path)) == {s["number"] for s in db.stats()["segments"]}
            with pytest.raises(logkv.CorruptionError):
                db[key]
            assert all(db[other] == value for other, value in model.items())
            db["more"] = model[b"more"] = b"1"
        db.clear()
        assert not db and 1 not in segment_files(path)


def test_damage_met_in_the_background(path: str) -> None:
    """It is said once, and in the stats as long as it is there, and everything else is compacted."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        db, model, key = damaged(path, compaction="auto", background=True)
        with db:
            dice = random.Random(1)

            def compacted() -> bool:
                for _ in range(500):
                    put(db, model, str(1000 + dice.randrange(500)), bytes(200))
                facts = db.stats()["compaction"]
                return facts["problem"] is not None and facts["merges"] > 3

            until(compacted)
            assert 1 in segment_files(path)
            assert all(db[other] == value for other, value in model.items())
            with pytest.raises(logkv.CorruptionError):
                db.compact()
    said = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    assert len(said) == 1 and "0000000001.seg" in said[0] and path in said[0]


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["compact", "both"])
def test_a_segment_without_a_record_between_two_others(path: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a failed sync leaves it: it is merged with its neighbours, and says nothing of versions."""
    model: Model = {}
    db = opened(path)
    for n in range(4):
        put(db, model, f"first {n}", bytes(5000))
    drop(db, model, "first 1")
    rotate(db)
    put(db, model, "lost?", b"no")

    def fails(fd: int) -> None:
        raise OSError(errno.EIO, "it fails")

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync_data", fails)
        for end in (db.sync, db.close):
            with pytest.raises(logkv.Error, match="it fails"):
                end()
    db = opened(path)
    assert [s["records"] for s in db.stats()["segments"]][1:] == [0, None]
    for _ in range(3):
        put(db, model, "last", bytes(1000))
    if how == "both":
        merge(db, 0, 1)
        check(db, model)
    db.compact()
    check(db, model)
    assert db.stats()["dead_bytes"] < 1000
    db.close()


def test_manual_never_merges_by_itself(path: str) -> None:
    with logkv.open(path, segment_size=SEGMENT, compaction="manual") as db:
        for number in range(20_000):
            db["hot"] = str(number).encode() + bytes(100)
        until(lambda: sum(not s["sealed"] for s in db.stats()["segments"]) <= 2)
        facts = db.stats()
        assert facts["compaction"]["merges"] == 0 and facts["dead_bytes"] > 20 * SEGMENT
        assert [s["number"] for s in facts["segments"]] == list(range(1, len(facts["segments"]) + 1))
        db.compact()
        assert db.stats()["compaction"]["merges"] > 0 and db.stats()["dead_bytes"] < 4096
    with logkv.open(path, segment_size=SEGMENT) as db:
        for number in range(20_000):
            db["hot"] = str(number).encode() + bytes(100)
        assert db.stats()["dead_bytes"] < 16 * SEGMENT
        assert db["hot"] == b"19999" + bytes(100)


@pytest.mark.parametrize("option, problem", [
    ({"compaction": "never"}, ValueError), ({"compaction_rate": 0}, ValueError),
    ({"compaction_rate": -1.5}, ValueError), ({"compaction_rate": "fast"}, TypeError),
    ({"compaction_rate": True}, TypeError)])
def test_options_that_make_no_sense(path: str, option: dict[str, object], problem: type[Exception]) -> None:
    with pytest.raises(problem, match="compaction"):
        logkv.open(path, **option)      # type: ignore[call-overload]


def test_a_rate_slows_what_is_done_in_the_background(path: str) -> None:
    def seconds(rate: float) -> float:
        """From where the background may begin until it has merged what there is."""
        store = f"{path} {rate}"
        with opened(store) as db:
            dice = random.Random(1)
            for _ in range(8000):
                db[str(dice.randrange(1500))] = bytes(200)
        began = time.monotonic()
        with logkv.open(store, segment_size=SEGMENT, compaction_rate=rate) as db:
            until(lambda: db.stats()["compaction"]["merges"] and not is_due(db))
            assert db.stats()["compaction"]["copied_bytes"] > SEGMENT // 2
        return time.monotonic() - began

    assert seconds(80_000) > 3 * seconds(1e9)


def test_who_may_compact(path: str, in_child: Callable[[Callable[[], None]], int]) -> None:
    db = logkv.open(path, segment_size=SEGMENT)
    with logkv.open(path, "r") as reading, pytest.raises(logkv.ReadOnlyError):
        reading.compact()
    with logkv.Writer(path, segment_size=SEGMENT) as writer:
        writer.compact()

    def child() -> None:
        with pytest.raises(logkv.ReadOnlyError):
            db.compact()

    assert in_child(child) == 0
    db.close()
    for handle in (db, reading, writer):
        with pytest.raises(logkv.ClosedError):
            handle.compact()
    assert not hasattr(logkv.Reader, "compact")


# -- in the middle of a merge ----------------------------------------------------------------------------------------


class Pause:
    """A merge on another thread that waits at one of its steps."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        if not self.reached.is_set():
            self.reached.set()
            assert self.go_on.wait(LIMIT)


STEPS = ["_copy", "_adopt", "_breathe", "_drop"]    # before the output is written, named, in use, the inputs unnamed


@contextmanager
def merging(db: logkv.Store, step: str, patch: pytest.MonkeyPatch) -> Iterator[list[BaseException]]:
    """While the body runs, `compact()` stands in front of a step; then it goes on.  What it raises is in the list."""
    pause, whole, raised = Pause(), getattr(compaction.Compactor, step), list[BaseException]()

    def paused(*arguments: object) -> object:
        pause()
        return whole(*arguments)

    def run() -> None:
        try:
            db.compact()
        except BaseException as problem:
            raised.append(problem)

    patch.setattr(compaction.Compactor, step, paused)
    patch.setattr(compaction, "SWING", 40)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        assert pause.reached.wait(LIMIT)
        yield raised
    finally:
        pause.go_on.set()
        thread.join(LIMIT)
        assert not thread.is_alive()


def filled(path: str, background: bool = True) -> tuple[logkv.Store, Model]:
    model = Model()
    db = opened(path, background=background)
    for number in range(4000):
        put(db, model, str(number % 1500), bytes(100))
    for number in range(0, 1500, 3):
        drop(db, model, str(number))
    return db, model


@pytest.mark.parametrize("step", STEPS)
def test_writes_in_the_middle_of_a_merge(path: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    db, model = filled(path)
    with merging(db, step, monkeypatch) as raised:
        for number in range(0, 1500, 7):
            put(db, model, str(number), b"meanwhile")
        for number in range(1, 1500, 21):
            if str(number).encode() in model:
                drop(db, model, str(number))
        assert dict(db) == model
        assert db.stats()["live_bytes"] == live_bytes(model)
    assert not raised
    check(db, model)
    db = reopen(db, "index")
    check(db, model)
    db.close()


@pytest.mark.parametrize("step", STEPS)
def test_clear_in_the_middle_of_a_merge(path: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    db, _ = filled(path)
    with merging(db, step, monkeypatch) as raised:
        db.clear()
        db["after"] = b"1"
        assert dict(db) == {b"after": b"1"}
    assert not raised
    check(db, {b"after": b"1"})
    assert set(segment_files(path)) == {s["number"] for s in db.stats()["segments"]}
    db = reopen(db, "index")
    check(db, {b"after": b"1"})
    db.close()


@pytest.mark.parametrize("step", STEPS)
def test_close_in_the_middle_of_a_merge(path: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for the end of the merge; what that was about to do is done or undone by the next opening."""
    db, model = filled(path)
    with merging(db, step, monkeypatch) as raised:
        closing = threading.Thread(target=db.close)
        closing.start()
        until(lambda: db.closed)
    closing.join(LIMIT)
    assert not closing.is_alive()
    assert [type(problem) for problem in raised] == [logkv.ClosedError]
    with opened(path) as again:
        check(again, model)
        assert again.stats()["recovery"]["index"] == "clean"
        assert set(segment_files(path)) == {s["number"] for s in again.stats()["segments"]}
        again.compact()
        check(again, model)


@pytest.mark.parametrize("step", STEPS)
def test_fork_in_the_middle_of_a_merge(path: str, step: str, monkeypatch: pytest.MonkeyPatch,
                                       in_child: Callable[[Callable[[], None]], int]) -> None:
    """The child reads on, also after the parent's merge; the parent's merge ends as any."""
    db, model = filled(path)
    heard, say = os.pipe()
    with merging(db, step, monkeypatch) as raised:
        def read() -> None:
            assert dict(db) == model
            with pytest.raises(logkv.ReadOnlyError):
                db.compact()
            os.read(heard, 1)
            assert dict(db) == model
            db.close()

        pid = fork(read)
    assert not raised
    os.write(say, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    check(db, model)
    db = reopen(db)
    check(db, model)
    db.close()


@pytest.mark.parametrize("lose", ["", "trust", "index", "control"])
@pytest.mark.parametrize("step", STEPS)
def test_death_in_the_middle_of_a_merge(path: str, step: str, lose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy is what a kill leaves, where its index is believed.  A reader comes before the next writer does."""
    db, model = filled(path)
    with merging(db, step, monkeypatch):
        copy = path + ".copy"
        subprocess.run(["cp", "-a", path, copy], check=True)
    db.close()
    if lose in ("", "trust"):
        believed = recovery.Trust(lose == "")
        monkeypatch.setattr(recovery, "trust", lambda *_: believed)
    else:
        os.unlink(os.path.join(copy, lose))
    with logkv.Reader(copy) as reader:
        assert dict(reader) == model
        with opened(copy) as again:
            check(again, model)
            assert (again.stats()["recovery"]["index"] == "trusted") == (lose == "")
            put(again, model, "more", b"1")
            again.compact()
            check(again, model)
            assert set(segment_files(copy)) == {s["number"] for s in again.stats()["segments"]}
        if lose != "control":           # whose successor a reader does not see
            assert dict(reader) == model


def test_clear_while_an_interrupted_merge_is_finished(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    db, _ = filled(path)
    with merging(db, "_breathe", monkeypatch):
        copy = path + ".copy"
        subprocess.run(["cp", "-a", path, copy], check=True)
    db.close()
    monkeypatch.undo()
    breathe, cleared = compaction.Compactor._breathe, list[bool]()

    def clear(compactor: compaction.Compactor) -> None:
        breathe(compactor)
        if not cleared:
            cleared.append(True)
            compactor._engine.clear(None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction.Compactor, "_breathe", clear)
        patch.setattr(compaction, "SWING", 4)
        patch.setattr(recovery, "trust", lambda *_: recovery.Trust(True))   # a copy is as good as what a kill leaves
        db = opened(copy)
    assert cleared and not db
    check(db, {})
    db.close()


# -- failures --------------------------------------------------------------------------------------------------------


CALLS = ["write_at", "sync_data", "allocate"]


@pytest.mark.parametrize("call", CALLS)
def test_every_call_of_a_compaction_that_fails(path: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The k-th one, for each k: the store is whole, goes on unless a sync failed, and compacts when all is well."""
    whole = getattr(files, call)
    for k in range(1, 200):
        store = f"{path}-{k}"
        db, model = filled(store, background=False)
        left = [k]

        def failing(*arguments: object, **options: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC if call != "sync_data" else errno.EIO, "it fails")
            return whole(*arguments, **options)

        monkeypatch.setattr(files, call, failing)
        raised = None
        try:
            db.compact()
        except logkv.Error as problem:
            raised = problem
        monkeypatch.setattr(files, call, whole)
        assert (raised is None) == (left[0] > 0), (k, raised)
        assert dict(db) == model
        if db.stats()["poisoned"] is None:
            put(db, model, "more", b"1")
            db.compact()
            check(db, model)
        else:
            with suppress(logkv.Error):
                db.close()
            db = opened(store)
            check(db, model)
            db.compact()
        db = reopen(db, "index")
        check(db, model)
        db.close()
        if raised is None:
            assert k > 3
            return
    pytest.fail("it never came to an end")


@contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    point = directory / "small"
    point.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(point)], capture_output=True)
    if done.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_full_disk(tmp_path: Path) -> None:
    """In the background: reads and writes go on, the user is told, and when there is room again it compacts."""
    with small_disk(tmp_path) as disk, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = Model()
        dice = random.Random(1)
        with opened(str(disk / "db")) as db:
            for _ in range(20_000):
                put(db, model, str(dice.randrange(7000)), bytes(100))
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        os.truncate(ballast, ballast.stat().st_size - (48 << 10))       # to open it, and for no output
        monkey = pytest.MonkeyPatch()
        monkey.setattr(compaction, "RETRY", (0.02, 0.02))
        with monkey.context(), logkv.open(disk / "db", segment_size=SEGMENT) as db:
            until(lambda: db.stats()["compaction"]["problem"] is not None)
            assert "No space left" in db.stats()["compaction"]["problem"]
            with pytest.raises(logkv.Error, match="compact") as raised:
                db.compact()
            assert raised.value.errno == errno.ENOSPC
            put(db, model, "1", b"written on a full disk")
            drop(db, model, "3")
            assert dict(db) == model and db.verify().ok
            ballast.unlink()
            until(lambda: db.stats()["compaction"]["problem"] is None)
            until(lambda: not is_due(db))
            assert db.stats()["compaction"]["merges"]
            db.compact()
        monkey.undo()
        with opened(str(disk / "db")) as db:
            check(db, model)
    said = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    assert said and all("No space left" in text for text in said)


def test_threads_that_write_and_compact(path: str) -> None:
    """All at once: writers with keys of their own, one who compacts, one who iterates."""
    done = threading.Barrier(3)
    with logkv.open(path, segment_size=SEGMENT) as db:
        models = [Model(), Model()]

        def write(number: int) -> Callable[[object], None]:
            def work(stop: object) -> None:
                dice = random.Random(number)
                for turn in range(6000):
                    key = b"%d %d" % (number, dice.randrange(400))
                    if dice.random() < 0.3:
                        assert db.delete(key) == (models[number].pop(key, None) is not None)
                    else:
                        put(db, models[number], key, b"%d" % turn + bytes(60))
                done.wait(LIMIT)
            return work

        def compact(stop: object) -> None:
            while done.n_waiting < 2:
                db.compact()
                keys = list(db)
                assert len(keys) == len(set(keys))
            done.wait(LIMIT)

        race(write(0), write(1), compact)
        assert db.stats()["compaction"]["merges"]
        check(db, models[0] | models[1])
