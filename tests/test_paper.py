"""Crashes that were thought of before there was any code to crash: those that no other test shows by itself."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import logkv
from benchmarks import baseline
from logkv import _core, compaction, files
from logkv.opening import Options
from logkv.writer import Writing
from tests.proof.common import SharedNumbers
from tests.proof.disk import Disk, State
from tests.proof.recorder import Recorder
from tests.proof.session import engine_of, merge, open_store, rotate

SEGMENT = 65_536
MANUAL = Options(segment_size=SEGMENT, compaction="manual", background=False)
RunInChild = Callable[[Callable[[], None]], int]


@pytest.fixture
def path(quick_dir: Path) -> Path:
    return quick_dir / "prices.db"


def opened(path: Path) -> logkv.Store:
    """A store that does nothing on another thread."""
    return open_store(path, "c", MANUAL)


def records_of(path: Path, number: int) -> bytes:
    return (path / files.segment_name(number)).read_bytes()


def without_index(path: Path) -> dict[bytes, bytes]:
    """What a rebuild finds, by a reader and by the twin; then by the next writer."""
    (path / "index").unlink(missing_ok=True)
    with logkv.Reader(path) as reader, baseline.BaselineStore(path, "r") as twin:
        found = dict(reader)
        assert dict(twin) == found
    with opened(path) as db:
        assert dict(db) == found
    assert logkv.verify(path).ok
    return found


def after_power_cuts(recorder: Recorder, path: Path, *, names: bool) -> Iterator[dict[bytes, bytes]]:
    """What opens after each event if what was not synced of the files is lost; `names`: of the directory nothing is."""
    disk = Disk()
    for at, event in enumerate(recorder.events):
        disk.apply(event)
        if at >= recorder.start:
            present = disk._named(disk.pending) if names else disk.names
            path.mkdir()
            State({name: disk.files[file].image([]) for name, file in present.items()}, "").write(str(path))
            with logkv.open(path, "w") as db:
                yield dict(db)
            shutil.rmtree(path)


# -- compaction and power cuts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [False, True])
def test_a_merge_drops_what_an_unsynced_write_superseded(path: Path, names: bool) -> None:
    """The first value was synced, a=2 was not: a power cut takes that, and the merge must not have taken the first."""
    path.mkdir()
    db = opened(path)
    db["a"], db["b"] = "first value", "1"
    rotate(db)
    db.sync()
    with Recorder(path) as recorder:
        db["a"] = "2"
        merge(db, 0, 0)
    assert b"afirst value" not in records_of(path, engine_of(db).manifest.segments[0].number)     # it did drop it
    db.close()
    found = list(after_power_cuts(recorder, path.with_name("cut"), names=names))
    assert all(each in ({b"a": b"first value", b"b": b"1"}, {b"a": b"2", b"b": b"1"}) for each in found)
    assert found[0][b"a"] == b"first value" and found[-1][b"a"] == b"2"


def test_a_tombstone_in_a_lower_file_than_the_older_put(path: Path) -> None:
    """A merge has moved the put to a file with a higher number; the list's order counts, not that of the numbers."""
    with opened(path) as db:
        db["gone"], db["dead"], db["kept"] = "1", "1", "1"
        rotate(db)
        del db["dead"]
        merge(db, 0, 0)
        del db["gone"]
        rotate(db)
        numbers = [segment.number for segment in engine_of(db).manifest.segments]
    assert numbers[0] > numbers[1] and all(b"gone" in records_of(path, number) for number in numbers[:2])
    assert without_index(path) == {b"kept": b"1"}


def test_no_merge_behind_a_segment_that_cannot_be_sealed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no footer that tells of its put, so the tombstone behind it stays."""
    allocate = files.allocate

    def no_room_for_a_footer(fd: int, size: int, *, start: int | None = None) -> None:
        if size % 4096:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(fd, size, start=start)

    db = opened(path)
    db["gone"], db["kept"] = "1", "1"
    monkeypatch.setattr(files, "allocate", no_room_for_a_footer)
    with pytest.raises(logkv.Error, match="No space"):
        rotate(db)
    del db["gone"]
    for call in (db.compact, lambda: rotate(db)):
        with pytest.raises(logkv.Error, match="No space"):
            call()
    assert not any(segment.sealed for segment in engine_of(db).manifest.segments)
    monkeypatch.undo()
    db.close()
    assert without_index(path) == {b"kept": b"1"}
    with opened(path) as db:
        db.compact()
    assert without_index(path) == {b"kept": b"1"}


def test_shards_split_while_slots_swing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps of a merge so many keys come that the index grows through all classes and splits."""
    db = open_store(path, "c", Options(segment_size=16 << 20, compaction="manual", background=False))
    model = {b"%d" % number: b"old" for number in range(30_000)}
    db.update(model)
    rotate(db)
    db["0"] = model[b"0"] = b"new"
    came, breathe = iter(range(200_000)), compaction.Compactor._breathe
    shards = {db.stats()["index"]["shards"]}

    def grow(compactor: compaction.Compactor) -> None:
        for number, _ in zip(came, range(30_000)):
            db[b"new %d" % number] = b""
        db[b"%d" % len(db)] = b"same key, moved or not"
        for number in range(len(db) % 97, 30_000, 97):
            db[b"%d" % number] = model[b"%d" % number] = b"overwritten"
        shards.add(db.stats()["index"]["shards"])
        breathe(compactor)

    monkeypatch.setattr(compaction.Compactor, "_breathe", grow)
    merge(db, 0, 0)
    monkeypatch.undo()
    assert len(shards) > 1
    found = dict(db)
    assert {key: value for key, value in found.items() if key in model} == model and len(db) == len(found)
    live = db.stats()["live_bytes"]
    assert live == sum(baseline.record_size(len(key), len(value)) for key, value in found.items())
    assert db.verify().ok
    db.close()
    assert without_index(path) == found


# -- rotation and sealing -----------------------------------------------------------------------------------------


class Killing:
    """`os`, as `logkv.files` sees it: before the call with this number that changes something, the process is killed;
    of a write, half is done first."""

    def __init__(self, at: int) -> None:
        self._left = at

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in ("open", "rename", "unlink", "fsync", "fdatasync", "pwrite", "posix_fallocate"):
            return real

        def call(*arguments: Any, **more: Any) -> Any:
            self._left -= name != "open" or arguments[1] & os.O_CREAT > 0
            if self._left == 0:
                if name == "pwrite":
                    real(arguments[0], bytes(arguments[1])[:len(arguments[1]) // 2], arguments[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)

        return call


@pytest.mark.parametrize("trusted", [True, False])
def test_killed_at_every_call_of_rotation_and_sealing(path: Path, in_child: RunInChild, trusted: bool) -> None:
    """The MANIFEST names a successor before that has acknowledged records; half a footer does no harm."""
    acknowledged = SharedNumbers()
    for at in range(1, 500):
        acknowledged[0] = 0

        def child() -> None:
            Writing._request_sealing = lambda engine: None      # type: ignore[method-assign]  # as late as it may be
            db = opened(path)
            files.os = Killing(at)      # type: ignore[assignment, attr-defined]
            for number in range(260):
                db[f"{number}"] = b"%d" % number * 300
                acknowledged[0] = number + 1

        status = in_child(child)
        if not trusted:
            (path / "index").unlink()
        with logkv.open(path, "w", segment_size=SEGMENT, compaction="manual") as db:
            whole = {b"%d" % number: b"%d" % number * 300 for number in range(len(db))}
            assert dict(db) == whole and len(db) - acknowledged[0] in (0, 1)
            db["more"] = "1"
        assert logkv.verify(path).problems == []
        assert without_index(path) == whole | {b"more": b"1"}
        shutil.rmtree(path)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert 20 < at < 499


@pytest.mark.parametrize("zeros", [4096, 3 * 4096, SEGMENT - 4096])
def test_a_full_segment_that_lost_its_last_pages_and_a_successor_that_did_not(path: Path, in_child: RunInChild,
                                                                              zeros: int) -> None:
    """None of the successor counts: there would be a hole.  What it has is set aside."""

    def child() -> None:
        Writing._request_sealing = lambda engine: None      # type: ignore[method-assign]
        db = opened(path)
        for number in range(80):
            db[f"{number:05}"] = b"x" * 1000
        assert engine_of(db).full_segments()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(child) == -signal.SIGKILL
    first = path / files.segment_name(1)
    data = first.read_bytes()
    end = -(-len(data.rstrip(b"\0")) // 8) * 8
    lost = max(64, -(-end // 4096) * 4096 - zeros)
    first.write_bytes(data[:lost] + bytes(len(data) - lost))
    for name in ("index", "control"):
        (path / name).unlink()
    with opened(path) as db:
        found = dict(db)
        assert sorted(found) == [b"%05d" % number for number in range(len(found))] and len(found) <= lost // 1000
        assert db.stats()["recovery"]["cut_bytes"] > 0
        db["more"] = "1"
    assert any(name.startswith("0000000002.seg") for name in os.listdir(path / "lost+found"))
    assert without_index(path) == found | {b"more": b"1"}


# -- opening and reading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cleared_late", [False, True])
def test_the_clean_mark_goes_before_the_first_store(path: Path, cleared_late: bool,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device: else a power cut would leave it beside an index of which a part is new.  `cleared_late`: it does
    not, and this test sees it."""
    with opened(path) as db:
        db["a"] = "1"
    sync = files.sync_data

    def sync_but_not_the_mark(fd: int) -> None:
        if not (cleared_late and os.readlink(f"/proc/self/fd/{fd}").endswith("/control")):
            sync(fd)

    monkeypatch.setattr(files, "sync_data", sync_but_not_the_mark)
    with Recorder(path) as recorder:
        db = opened(path)
        db["b"] = "2"
        db.sync()
    monkeypatch.undo()
    disk, marks = Disk(), set()
    for at, event in enumerate(recorder.events):
        disk.apply(event)
        stored = [disk.files[disk.names[name]].pending for name in ("index", "0000000001.seg") if name in disk.names]
        if at >= recorder.start and any(stored):
            _, pages = disk.files[disk.names["control"]].image([])
            marks.add(struct.unpack_from("<Q", pages[0], 24)[0] != 0)
    assert marks == {cleared_late}
    found = list(after_power_cuts(recorder, path.with_name("cut"), names=False))
    db.close()
    assert all(each.get(b"a") == b"1" for each in found) and found[-1] == {b"a": b"1", b"b": b"2"}


def test_a_reader_at_the_very_end_of_a_segment(path: Path) -> None:
    """The last record ends with the file.  Readers are there before, and nobody ever makes a file shorter."""
    with opened(path) as db, logkv.Reader(path) as reader:
        model, lengths = {}, dict[str, int]()
        for turn in range(6):
            engine = engine_of(db)
            db[b"first %d" % turn] = model[b"first %d" % turn] = b"1"       # of the next segment
            while engine.log.capacity - engine.log.position[1] > 8000:
                key = b"%d/%d" % (turn, len(model))
                db[key] = model[key] = bytes(3000)
                assert reader[key] == model[key]
            left = engine.log.capacity - engine.log.position[1]
            key = b"last %d" % turn
            db[key] = model[key] = b"x" * (left - 20 - 4 - len(key))    # above 4 KiB a value has a checksum of its own
            assert engine.log.position[1] == engine.log.capacity == os.path.getsize(path / engine._active.name)
            assert reader[key] == model[key] and dict(reader) == model
            with logkv.Reader(path) as late:
                assert late[key] == model[key] and late.verify().ok
            if turn % 2:
                db.sync()               # whose mark finds no room here
            for file in path.glob("*.seg"):
                length = file.stat().st_size
                assert length >= lengths.get(file.name, 0)
                lengths[file.name] = length
        assert dict(reader) == model
    assert without_index(path) == model


@pytest.mark.parametrize("trusted", [True, False])
def test_a_refused_put_does_not_appear_later(path: Path, in_child: RunInChild, trusted: bool) -> None:
    """The disk is full for it, at any of the steps at which it needs room; a kill, and the store is opened again."""
    refused = SharedNumbers()

    def child() -> None:
        db = opened(path)
        left = [refused[1]]
        whole = files.allocate

        def allocate(fd: int, size: int, *, whole_file: bool = False, **more: bool) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            whole(fd, size, **more)

        files.allocate = allocate       # type: ignore[assignment]
        for number in range(4000):
            try:
                db[f"{number}"] = bytes(100 + number % 3)
            except logkv.Error:
                refused[0] = number
                break
        os.kill(os.getpid(), signal.SIGKILL)

    seen = set()
    for step in range(12):
        refused[0], refused[1] = 0, step
        assert in_child(child) == -signal.SIGKILL
        seen.add(refused[0])
        if not trusted:
            (path / "index").unlink()
        with opened(path) as db:
            assert sorted(db) == sorted(b"%d" % number for number in range(refused[0]))
            db["more"] = "1"
        assert len(without_index(path)) == refused[0] + 1
        shutil.rmtree(path)
    assert len(seen) >= 5 and min(seen) > 100
