"""Opening after whatever happened: a torn tail, a kill, a copy, a power cut, a failed sync, damage."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import logkv
from logkv import _core, files, manifest
from logkv.opening import Opening
from logkv.store import Options, Store, Writing, _acquire_writer

SEGMENT = 65_536
BOOT_AT = 32        # of the boot id in the control page
RunInChild = Callable[[Callable[[], None]], int]


def killed(path: str, in_child: RunInChild, work: Callable[[logkv.Store], None], **options: object) -> None:
    """Lets a child write and kills it before it can close."""

    def child() -> None:
        db = logkv.open(path, **options)     # type: ignore[arg-type]
        work(db)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(child) == -signal.SIGKILL


def power_cut(path: str) -> None:
    """What a restart of the system leaves of the trust in an index: another boot id."""
    with open(os.path.join(path, "control"), "r+b") as file:
        file.seek(BOOT_AT)
        file.write(b"another boot id!")


def segments(path: str) -> list[Path]:
    return sorted(Path(path).glob("*.seg"))


def log_end(path: str) -> int:
    """Bytes of the last segment that are not zeros at its end, rounded up to a record's alignment."""
    return -(-len(segments(path)[-1].read_bytes().rstrip(b"\0")) // 8) * 8


# -- the torn tail ----------------------------------------------------------------------------------------------


def test_every_byte_of_the_tail_cut_off(quick_dir: Path, in_child: RunInChild) -> None:
    """The store opens, holds exactly the records that were whole, and takes new ones that stay."""
    source = str(quick_dir / "source")
    pairs = [(f"key {i}".encode(), bytes([65 + i]) * (i * 7 % 60)) for i in range(8)]
    ends = [64]

    def work(db: logkv.Store) -> None:
        for key, value in pairs:
            db[key] = value

    killed(source, in_child, work)
    for key, value in pairs:
        ends.append(ends[-1] + -(-(20 + len(key) + len(value)) // 8) * 8)
    whole = segments(source)[0].read_bytes()
    assert ends[-1] == log_end(source)
    for cut in range(64, ends[-1] + 1):
        path = str(quick_dir / "cut")
        shutil.copytree(source, path)
        segments(path)[0].write_bytes(whole[:cut] + bytes(len(whole) - cut))
        held = max(n for n, end in enumerate(ends) if end <= cut)
        # the last bytes of a record may be padding, or zeros of its value: then nothing was torn
        while held < len(pairs) and not any(whole[cut:ends[held + 1]]):
            held += 1
        with logkv.open(path) as db:
            assert dict(db) == dict(pairs[:held]), cut
            assert db.stats()["recovery"]["cut_bytes"] <= max(0, cut - ends[held])
            db["new"] = "record"
            db["key 0"] = "overwritten"
        os.unlink(os.path.join(path, "index"))
        with logkv.open(path) as db:
            assert dict(db) == {**dict(pairs[:held]), b"new": b"record", b"key 0": b"overwritten"}, cut
        shutil.rmtree(path)


def test_a_file_cut_short(tmp_path: Path) -> None:
    """Truncated, not zeroed: as a copy that was interrupted leaves it."""
    source, path = str(tmp_path / "source"), str(tmp_path / "cut")
    with logkv.open(source) as db:
        for i in range(5):
            db[str(i)] = "x" * 50
    whole = segments(source)[0].read_bytes()
    for cut in [0, 1, 63, 64, 65, 100, 150, 300, log_end(source) - 56]:
        shutil.copytree(source, path)
        os.truncate(segments(path)[0], cut)
        for name in ("index", "control"):
            os.unlink(os.path.join(path, name))
        with logkv.open(path) as db:
            assert list(db) == [str(i).encode() for i in range(len(db))] or len(db) < 5
            db["new"] = "y"
        with logkv.open(path, "r") as db:
            assert db["new"] == b"y"
        shutil.rmtree(path)
    assert segments(source)[0].read_bytes() == whole


def test_garbage_behind_the_end_is_cut_and_stays_away(path: str) -> None:
    """A bad record with an intact one behind it: cut; then a new one of equal length; the old one must not come back."""
    with logkv.open(path) as db:
        db["a"] = "1" * 44
        db["b"] = "2" * 44
        end = log_end(path)
        db["c"] = "3" * 44
    image = bytearray(segments(path)[0].read_bytes())
    first = 64 + 72
    image[first + 30] ^= 1              # the second record's value
    image[end + 72:] = bytes(len(image) - end - 72)      # and no sync mark behind
    segments(path)[0].write_bytes(image)
    for name in ("index", "control"):
        os.unlink(os.path.join(path, name))
    with logkv.open(path) as db:
        assert dict(db) == {b"a": b"1" * 44}
        assert db.stats()["recovery"]["cut_bytes"] > 100 and len(db.stats()["cuts"]) == 1
        db["d"] = "4" * 44
    assert os.listdir(os.path.join(path, "lost+found"))
    os.unlink(os.path.join(path, "index"))
    with logkv.open(path) as db:
        assert dict(db) == {b"a": b"1" * 44, b"d": b"4" * 44}


# -- by trust, by rebuild: all ways agree ------------------------------------------------------------------------


def churn(seed: int, count: int) -> Callable[[logkv.Store], None]:
    def work(db: logkv.Store) -> None:
        rnd = random.Random(seed)
        for _ in range(count):
            key = b"%d" % rnd.randrange(700)
            if rnd.random() < 0.25:
                db.delete(key)
            else:
                db[key] = rnd.randbytes(rnd.choice([0, 5, 300]))
    return work


def churned(seed: int, count: int) -> dict[bytes, bytes]:
    model: dict[bytes, bytes] = {}
    rnd = random.Random(seed)
    for _ in range(count):
        key = b"%d" % rnd.randrange(700)
        if rnd.random() < 0.25:
            model.pop(key, None)
        else:
            model[key] = rnd.randbytes(rnd.choice([0, 5, 300]))
    return model


@pytest.mark.parametrize("how", ["trusted", "power cut", "no index", "no control", "neither", "copy", "reader"])
def test_all_ways_to_open_agree(path: str, in_child: RunInChild, how: str) -> None:
    killed(path, in_child, churn(1, 6_000), segment_size=SEGMENT)
    expected = churned(1, 6_000)
    if how == "power cut":
        power_cut(path)
    if how in ("no index", "neither"):
        os.unlink(os.path.join(path, "index"))
    if how in ("no control", "neither"):
        os.unlink(os.path.join(path, "control"))
    if how == "copy":
        shutil.copytree(path, path + ".copy")
        path += ".copy"
    if how == "reader":
        power_cut(path)
        with logkv.Reader(path) as reader:
            assert dict(reader) == expected and reader.stats()["index"]["private"]
            assert len(reader) == len(expected)
    with logkv.open(path, segment_size=SEGMENT) as db:
        assert dict(db) == expected and len(db) == len(expected)
        assert db.stats()["recovery"]["index"] == ("trusted" if how == "trusted" else "rebuilt")
        live = sum(-(-(20 + len(k) + len(v)) // 8) * 8 for k, v in expected.items())
        assert db.stats()["live_bytes"] == live
        db["more"] = "1"
    with logkv.open(path, "r") as db:
        assert db == {**expected, b"more": b"1"} and db.stats()["recovery"] == {}


def test_a_clean_store_needs_no_rebuild_anywhere(path: str) -> None:
    """Closed cleanly, an index is believed after a restart and in a copy: its checksums are compared instead."""
    with logkv.open(path, segment_size=SEGMENT) as db:
        churn(2, 6_000)(db)
    power_cut(path)
    shutil.copytree(path, path + ".copy")
    for place in (path, path + ".copy"):
        with logkv.open(place, segment_size=SEGMENT) as db:
            assert dict(db) == churned(2, 6_000)
            assert db.stats()["recovery"]["index"] == "clean"


def test_a_backup_restored_over_the_store_is_not_believed(path: str) -> None:
    """`cp -r` under a running writer, and back over the store in the same boot: the index of then, files of now."""
    with logkv.open(path) as db:
        for i in range(300):
            db[f"old {i}"] = "1"
        shutil.copytree(path, path + ".backup")
        for i in range(300):
            db[f"new {i}"] = "2"
    for name in os.listdir(path + ".backup"):       # over the files, as cp does: inodes stay
        Path(path, name).write_bytes(Path(path + ".backup", name).read_bytes())
    with logkv.open(path) as db:
        assert db.stats()["recovery"]["index"] == "rebuilt"
        assert dict(db) == {b"old %d" % i: b"1" for i in range(300)}


def test_a_hard_linked_store_is_not_believed(path: str, in_child: RunInChild) -> None:
    killed(path, in_child, churn(3, 500))
    for name in os.listdir(path):
        os.link(os.path.join(path, name), os.path.join(os.path.dirname(path), name + ".link"))
    with logkv.open(path) as db:
        assert db.stats()["recovery"]["index"] == "rebuilt" and dict(db) == churned(3, 500)


@pytest.mark.parametrize("what", ["MANIFEST.tmp", "index.tmp", "0000000099.seg"])
def test_leftovers_go_and_foreign_files_stay(path: str, what: str) -> None:
    with logkv.open(path) as db:
        db["a"] = "1"
    Path(path, what).write_bytes(segments(path)[0].read_bytes()[:64] if what.endswith("seg") else b"half")
    Path(path, "0000000098.seg").write_bytes(b"somebody's own file, " * 10)
    Path(path, "notes.txt").write_text("mine")
    with logkv.open(path) as db:
        assert dict(db) == {b"a": b"1"}
    assert not os.path.exists(os.path.join(path, what))
    assert Path(path, "notes.txt").read_text() == "mine" and os.path.exists(os.path.join(path, "0000000098.seg"))


def test_the_index_deleted_under_an_attached_reader(path: str) -> None:
    with logkv.open(path) as db:
        db["a"] = "1"
    with logkv.Reader(path) as reader:
        assert reader["a"] == b"1"
        os.unlink(os.path.join(path, "index"))
        with logkv.open(path) as db:
            db["b"] = "2"
            assert dict(reader) == {b"a": b"1", b"b": b"2"}
            db.clear()
            db["c"] = "3"
            assert dict(reader) == {b"c": b"3"}


def test_a_reader_changes_over_to_a_writers_index(path: str, in_child: RunInChild) -> None:
    """Without an index to trust it builds its own; as soon as a writer has one, it follows that."""
    killed(path, in_child, churn(4, 2_000))
    power_cut(path)
    with logkv.Reader(path) as reader:
        assert reader.stats()["index"]["private"] and dict(reader) == churned(4, 2_000)
        with logkv.open(path) as db:
            db["live"] = "1"
            assert reader["live"] == b"1" and not reader.stats()["index"]["private"]


@pytest.mark.parametrize("keys", [400, 500, 1_700, 1_800, 7_000, 28_000, 130_000, 300_000])
def test_growth_of_the_index(path: str, keys: int) -> None:
    """Through all classes of shards and splits, with deletes between; found in the writer, a reader, a rebuild."""
    with logkv.open(path) as db, logkv.Reader(path) as reader:
        for i in range(keys):
            db[i.to_bytes(4, "big")] = b""
            if i % 5 == 0:
                del db[(i // 2).to_bytes(4, "big")]
        gone = {i // 2 for i in range(0, keys, 5)}
        assert len(db) == len(reader) == keys - len(gone)
        for i in range(0, keys, max(1, keys // 2_000)):
            assert (i.to_bytes(4, "big") in db) == (i.to_bytes(4, "big") in reader) == (i not in gone)
        assert len(set(db)) == len(db)
        if keys >= 130_000:
            assert db.stats()["index"]["shards"] == (2 if keys == 300_000 else 1)
    os.unlink(os.path.join(path, "index"))
    with logkv.open(path) as db:
        assert len(db) == keys - len(gone) and len(set(db)) == len(db)


def test_an_idle_reader_of_an_index_that_outgrows_its_mapping(quick_dir: Path, in_child: RunInChild) -> None:
    """A reader maps an index with room to grow; one that grows beyond that while the reader looks away is mapped anew."""
    path = str(quick_dir / "prices.db")
    logkv.open(path).close()

    def fill() -> None:
        with logkv.Writer(path) as writer:
            for number in range(5_500_000):
                writer.put(b"%x" % number, b"")
            assert writer.stats()["index_bytes"] > 64 << 20
            os.kill(os.getpid(), signal.SIGKILL)

    with logkv.Reader(path) as idle, logkv.Reader(path) as counting:
        assert in_child(fill) == -signal.SIGKILL
        assert idle.get("12345") == b"" and len(idle) == 5_500_000
        assert counting.stats()["index"]["used"] == 5_500_000


def test_deleted_slots_are_reused(path: str) -> None:
    """A queue: always new keys, always few alive.  The index must not grow without end."""
    with logkv.open(path) as db:
        for i in range(60_000):
            db[i.to_bytes(4, "big")] = b""
            if i >= 100:
                assert db.delete((i - 100).to_bytes(4, "big"))
        assert len(db) == 100 and db.stats()["index_bytes"] <= 256 << 10


# -- durability -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", ["always", 0.05])
def test_sync_modes(path: str, sync: object, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    calls: list[int] = []
    real = files.sync_data
    monkeypatch.setattr(files, "sync_data", lambda fd: (calls.append(fd), real(fd))[1])
    with logkv.open(path, sync=sync) as db:     # type: ignore[arg-type]
        calls.clear()
        for i in range(10):
            db[str(i)] = "x"
        if sync == "always":
            assert len(calls) == 10
        else:
            deadline = time.monotonic() + 10
            while not calls and time.monotonic() < deadline:
                time.sleep(0.01)
            assert calls
    with logkv.open(path, "r") as db:
        assert len(db) == 10


def test_threads_share_a_sync(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading
    import time

    calls: list[int] = []
    real = files.sync_data

    def slow(fd: int) -> None:
        calls.append(fd)
        time.sleep(0.02)
        real(fd)

    with logkv.open(path, sync="always") as db:
        monkeypatch.setattr(files, "sync_data", slow)

        def work(name: int) -> None:
            for i in range(5):
                db[f"{name} {i}"] = "x"

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monkeypatch.undo()
        assert len(db) == 40 and len(calls) < 25


def fails(fd: int) -> None:
    """In place of `files.sync_data`."""
    raise OSError(errno.EIO, "Input/output error")


def close_after_a_failed_sync(db: logkv.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both raise."""
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync_data", fails)
        with pytest.raises(logkv.Error, match="a sync failed"):
            db.sync()
    with pytest.raises(logkv.Error, match="a sync failed"):
        db.close()


def test_a_failed_sync_poisons_the_writer(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every later write raises, reading goes on; the next writer writes what may be lost again before all else."""
    db = logkv.open(path)
    version = db.put("durable", "1")
    db.sync()
    db["later"] = "2"
    db.delete("durable")
    db["more"] = "3" * 5000
    monkeypatch.setattr(files, "sync_data", fails)
    with pytest.raises(logkv.Error, match="a sync failed .Input/output error.") as caught:
        db.sync()
    monkeypatch.undo()
    said = caught.value.strerror
    assert caught.value.errno == errno.EIO and said is not None
    assert f"(version {version}) is known to be on the device" in said
    assert f"until {datetime.fromtimestamp(version // 10**9, UTC):%Y-%m-%d %H:%M:%S}." in said
    assert f"; 3 writes of {32 + 32 + 5032:,} bytes after that (behind offset {64 + 32} of segment 1) may not" in said
    assert "opened again" in said and db.stats()["poisoned"] == said
    calls: list[Callable[[], object]] = [
        lambda: db.put("x", "y"), lambda: db.delete("later"), lambda: db.update({b"later": b"3"}),
        lambda: db.pop("later"), db.popitem, db.sync, db.clear, db.compact, lambda: db.backup(tmp_path / "backup")]
    expected = {b"later": b"2", b"more": b"3" * 5000}
    reader = logkv.Reader(path)
    for call in calls + calls:
        with pytest.raises(logkv.Error) as caught:
            call()
        assert caught.value.args[0] == said
        assert dict(db) == dict(reader) == expected
    assert not (tmp_path / "backup").exists()
    with pytest.raises(logkv.Error) as caught:
        db.close()
    assert caught.value.args[0] == said and db.closed
    db.close()
    assert dict(reader) == expected
    synced: list[bytes] = []
    real = files.sync_data
    monkeypatch.setattr(files, "sync_data", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}").encode()),
                                                        real(fd))[1])
    with logkv.open(path, compaction="manual") as db:   # else the old segment, of which nothing is alive, may be gone
        assert dict(db) == expected == dict(reader)
        assert segments(path)[-1].name == "0000000002.seg" and any(b"0000000002.seg" in name for name in synced)
        db["new"] = "4"
    os.unlink(os.path.join(path, "index"))
    with logkv.open(path) as db:
        assert dict(db) == {**expected, b"new": b"4"}
    reader.close()


def test_one_failed_sync_after_another(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is sealed: what is written again stands in several segments."""

    monkeypatch.setattr(Writing, "_request_sealing", lambda engine: None)
    expected = {b"first": bytes(50_000), b"second": bytes(20_000)}
    db = logkv.open(path, segment_size=65_536)
    db.update(expected)
    db.sync()                           # as far as into the second segment
    for turn in range(3):
        db["last"] = expected[b"last"] = b"%d" % turn
        close_after_a_failed_sync(db, monkeypatch)
        db = logkv.open(path, segment_size=65_536)
        assert dict(db) == expected
    db.close()


def test_a_log_that_ends_before_two_segments(path: str) -> None:
    """As a power cut leaves it that takes the end of a full segment, while its successor had one too."""
    with logkv.open(path, segment_size=65_536) as db:
        db["before"] = expected = bytes(30_000)
    with contextlib.closing(files.Directory(path)) as directory:
        found = manifest.read(directory)
        assert found is not None
        current = found[0]
        for _ in range(2):
            new = current.add_segment(65_536)
            header = _core.encode_segment_header(new.number, current.identity, current.seed, new.salt)
            Path(path, new.name).write_bytes(header.ljust(32_768, b"\0"))
        Path(path, files.MANIFEST).write_bytes(current.encode())
    with logkv.open(path, segment_size=65_536) as db:
        assert len(segments(path)) == 2
        for n in range(10):
            db[str(n)] = expected
    os.unlink(os.path.join(path, files.CONTROL))
    with logkv.open(path, segment_size=65_536) as db:
        assert len(db) == 11 and set(db.values()) == {expected}


def test_nothing_is_prepared_while_a_full_segment_is_not_sealed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the background thread is asked for may come late: all but the last two segments are sealed."""
    monkeypatch.setattr(Writing, "_request", lambda engine, task: None)
    with logkv.open(path, segment_size=65_536) as db:
        db["first"] = bytes(40_000)
        db["second"] = bytes(40_000)
        assert isinstance(db._engine, Writing)
        db._engine._prepare()
        assert len(segments(path)) == 2


def test_damage_before_several_segments_that_are_not_sealed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As failed syncs leave them; all of them are looked at for marks of what the device had."""

    monkeypatch.setattr(Writing, "_request_sealing", lambda engine: None)
    db = logkv.open(path, segment_size=65_536)
    db.update({b"first": bytes(50_000), b"second": bytes(20_000)})
    db.sync()
    db["last"] = "1"
    close_after_a_failed_sync(db, monkeypatch)
    logkv.open(path, segment_size=65_536).close()
    for file in segments(path)[:2]:
        file.write_bytes(file.read_bytes()[:64].ljust(65_536, b"\0"))
    os.unlink(os.path.join(path, files.CONTROL))
    assert len(segments(path)) == 3
    for flag in "rw":
        with pytest.raises(logkv.CorruptionError, match="damaged where it was on the device"):
            logkv.open(path, flag)


def test_a_kill_while_a_failed_sync_is_made_good(path: str, in_child: Callable[[Callable[[], None]], int],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """The MANIFEST names the copy and ends the old segment, to which the index still points: nobody may believe that."""
    db = logkv.open(path)
    db["durable"] = "1"
    db.sync()
    db["later"] = "2"

    close_after_a_failed_sync(db, monkeypatch)
    write = Opening.write_manifest

    def die(engine: Opening, *arguments: Any, **options: Any) -> None:
        write(engine, *arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    def dies() -> None:
        monkeypatch.setattr(Opening, "write_manifest", die)
        logkv.open(path)

    assert in_child(dies) == -signal.SIGKILL
    assert len(segments(path)) == 2
    expected = {b"durable": b"1", b"later": b"2"}
    with logkv.Reader(path) as reader:
        assert dict(reader) == expected
    with logkv.open(path) as db:
        assert dict(db) == expected


def test_what_a_failed_sync_says_of_several_segments(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was synced before; or what was is in a segment that is sealed by now."""
    db = logkv.open(path, segment_size=SEGMENT)
    db["only"] = "1"
    monkeypatch.setattr(files, "sync_data", fails)
    with pytest.raises(logkv.Error, match="nothing is known to be on the device; 1 write of 32 bytes after that"):
        db.sync()
    monkeypatch.undo()
    with pytest.raises(logkv.Error):
        db.close()
    db = logkv.open(path, segment_size=SEGMENT)
    last = db.put("synced", "1")
    db.sync()
    versions = {last: 0} | {db.put(f"{number}", bytes(900)): number + 1 for number in range(150)}
    monkeypatch.setattr(files, "sync_data", fails)
    with pytest.raises(logkv.Error, match="a sync failed") as caught:
        db.sync()
    monkeypatch.undo()
    said = re.search(r"version ([0-9]+)\) is known to be on the device; ([0-9]+) writes of ([0-9,]+) bytes",
                     str(caught.value))
    assert said is not None
    assert versions[int(said[1])] + int(said[2]) == 150         # none is counted twice, none forgotten
    assert int(said[3].replace(",", "")) == sum(-(-(920 + len(f"{number}")) // 8) * 8
                                                for number in range(150 - int(said[2]), 150))
    with pytest.raises(logkv.Error):
        db.close()
    with logkv.open(path, segment_size=SEGMENT) as db:
        assert len(db) == 152


@pytest.mark.parametrize("lost", [False, True])
def test_a_process_that_dies_after_a_failed_sync(path: str, in_child: RunInChild, monkeypatch: pytest.MonkeyPatch,
                                                 lost: bool) -> None:
    """The next one does not trust the cache above the durable mark: it writes all of it anew and syncs that.  What the
    system has dropped (its pages read as the device has them: zeros) is the log's end."""

    def work(db: logkv.Store) -> None:
        db["durable"] = "1"
        db.sync()
        for number in range(3):
            db[f"later {number}"] = "2" * 5000
        files.sync_data = fails
        with contextlib.suppress(logkv.Error):
            db.sync()

    killed(path, in_child, work)
    if lost:
        os.unlink(os.path.join(path, "index"))
        with open(segments(path)[0], "r+b") as file:
            file.seek(2 * 4096)
            file.write(bytes(4096))
    synced: list[str] = []
    real = files.sync_data
    monkeypatch.setattr(files, "sync_data", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1])
    with logkv.open(path) as db:
        expected = {b"durable": b"1"} | {b"later %d" % number: b"2" * 5000 for number in range(1 if lost else 3)}
        assert dict(db) == expected
        assert db.stats()["recovery"]["why"] == "a sync had failed"
        assert any(name.endswith("0000000002.seg") for name in synced)
        copied = segments(path)[1].read_bytes()
        assert all(key in copied for key in expected if key != b"durable") and b"durable" not in copied
        db["new"] = "3"
    with logkv.open(path) as db:        # once is enough
        assert dict(db) == expected | {b"new": b"3"} and db.stats()["recovery"]["index"] == "clean"


# -- damage -----------------------------------------------------------------------------------------------------


def flip(file: Path, offset: int) -> None:
    image = bytearray(file.read_bytes())
    image[offset] ^= 0x10
    file.write_bytes(image)


def test_a_damaged_record_raises_and_names_its_place(path: str) -> None:
    with logkv.open(path) as db:
        for i in range(5):
            db[str(i)] = "x" * 40
    flip(segments(path)[0], 64 + 2 * 64 + 30)
    with logkv.open(path, "r") as db:
        with pytest.raises(logkv.CorruptionError, match="expected crc32c") as caught:
            db["2"]
        assert caught.value.segment == 1 and caught.value.offset == 64 + 2 * 64
        assert db["1"] == db["3"] == b"x" * 40
    with logkv.open(path) as db:        # the index is whole: the rest is served, and written
        db["new"] = "1"
        assert db["new"] == b"1"
    os.unlink(os.path.join(path, "index"))
    for flag in "rw":                   # without it, what else stood there is not known
        with pytest.raises(logkv.CorruptionError, match="damaged where it was on the device") as caught:
            logkv.open(path, flag)
        assert caught.value.offset == 64 + 2 * 64 and caught.value.path == str(segments(path)[0])


def test_a_damaged_long_value_raises(path: str) -> None:
    with logkv.open(path) as db:
        db["long"] = "x" * 10_000
        db["short"] = "y"
    flip(segments(path)[0], 64 + 5_000)
    with logkv.open(path, "r") as db:
        with pytest.raises(logkv.CorruptionError, match="value checksum"):
            db["long"]
        assert "long" in db and db["short"] == b"y"
        with pytest.raises(logkv.CorruptionError):
            dict(db)


@pytest.mark.parametrize("where", ["key", "value", "version", "length"])
def test_damage_in_the_newest_record_never_serves_an_older_one(path: str, where: str) -> None:
    """The index is rebuilt from footers, which do not tell that a record is damaged: its get must raise."""
    with logkv.open(path, segment_size=SEGMENT) as db:
        for generation in (b"old", b"new", b"end"):
            if generation != b"end":
                db["the key"] = generation * 10
            for i in range(600):
                db[b"%s %d" % (generation, i)] = "x" * 80
    holder = segments(path)[1]
    at = holder.read_bytes().index(b"the key" + b"new")
    flip(holder, at + {"key": 3, "value": 10, "version": -10, "length": -16}[where])
    os.unlink(os.path.join(path, "index"))
    with logkv.open(path, segment_size=SEGMENT) as db:
        assert db.stats()["segments"][1]["sealed"] and db.stats()["recovery"]["footers_unreadable"] == 0
        with pytest.raises(logkv.CorruptionError):
            db["the key"]
        assert len(db) == 1801 and db["old 0"] == db["end 599"] == b"x" * 80


def test_a_damaged_link_is_named_where_it_stands(
    tmp_path: Path, begin_successor: Callable[[Path, bool], int]
) -> None:
    path = tmp_path / "prices.db"
    begin_successor(path, True)
    with open(path / "0000000002.seg", "r+b") as file:
        file.seek(64)
        file.write(b"?")
    for flag in "r", "w":
        with pytest.raises(logkv.CorruptionError) as raised:
            logkv.open(path, flag)
        assert (raised.value.path, raised.value.offset) == (str(path / "0000000002.seg"), 64)


def test_a_damaged_footer_falls_back_to_the_scan(path: str) -> None:
    with logkv.open(path, segment_size=SEGMENT) as db:
        churn(5, 6_000)(db)
    with logkv.open(path, segment_size=SEGMENT) as db:
        first = db.stats()["segments"][0]
        assert first["sealed"]
    flip(segments(path)[0], segments(path)[0].stat().st_size - 20)
    os.unlink(os.path.join(path, "index"))
    with logkv.open(path, segment_size=SEGMENT) as db:
        assert dict(db) == churned(5, 6_000)
        assert db.stats()["recovery"]["footers_unreadable"] == 1


@pytest.mark.parametrize("flag", "rw")
def test_a_damaged_shard_is_rebuilt(path: str, flag: str) -> None:
    with logkv.open(path) as db:
        churn(6, 3_000)(db)
    flip(Path(path, "index"), 3 * 4096 + 100)
    with logkv.open(path, flag) as db:
        assert dict(db) == churned(6, 3_000) and len(db) == len(churned(6, 3_000))


def test_a_damaged_manifest(path: str) -> None:
    with logkv.open(path) as db:
        db["a"] = "1"
    flip(Path(path, "MANIFEST"), 100)
    for flag in "rwcn":
        with pytest.raises(logkv.CorruptionError, match="checksum"):
            logkv.open(path, flag)


def test_a_missing_segment(path: str) -> None:
    with logkv.open(path, segment_size=SEGMENT) as db:
        churn(7, 3_000)(db)
    os.unlink(segments(path)[0])
    with logkv.open(path, "r") as db, pytest.raises(logkv.CorruptionError, match="missing"):
        dict(db)


@pytest.mark.parametrize("flag", "rw")
def test_a_missing_active_segment_and_no_index(path: str, flag: str) -> None:
    with logkv.open(path) as db:
        db["a"] = "1"
    os.unlink(segments(path)[0])
    os.unlink(os.path.join(path, "index"))
    with pytest.raises(logkv.CorruptionError, match="missing") as caught:
        logkv.open(path, flag)
    assert caught.value.path == str(Path(path, "0000000001.seg"))


# -- steps in the background ------------------------------------------------------------------------------------


def test_sealing_on_the_thread_and_in_line_agree(tmp_path: Path) -> None:
    """Files are the same but for what is random or timed."""
    sealed = []
    for background in (True, False):
        path = str(tmp_path / str(background))
        engine = _acquire_writer(path, "c", 0o666, Options(segment_size=SEGMENT, compaction="manual", background=background), 0)
        assert isinstance(engine, Writing)
        db = Store.__new__(Store)
        db._hold(engine, path)
        churn(8, 5_000)(db)
        assert dict(db) == churned(8, 5_000) and engine.problem is None
        db.close()
        with logkv.open(path, segment_size=SEGMENT, compaction="manual") as again:
            sealed.append([s["sealed"] for s in again.stats()["segments"]][:-2])
    assert sealed[0] == sealed[1] and all(sealed[0]) and len(sealed[0]) > 5


def test_a_put_waits_for_sealing_and_gets_its_error(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for a footer: the segment stays unsealed and whole; with room again, all goes on."""
    with logkv.open(path, segment_size=SEGMENT) as db:
        real = files.allocate

        def full(fd: int, size: int, *, start: int | None = None) -> None:
            if size > SEGMENT:
                raise OSError(28, "No space left on device")
            real(fd, size, start=start)

        monkeypatch.setattr(files, "allocate", full)
        with pytest.raises(logkv.Error, match="No space left"):
            for i in range(5_000):
                db[f"key {i}"] = "x" * 60
        count = len(db)
        assert count > 600 and f"key {count}" not in db
        monkeypatch.undo()
        db["after"] = "1"
        for i in range(2_000):
            db[f"key {i}"] = "y" * 60
    with logkv.open(path, "r") as db:
        assert db["after"] == b"1" and db["key 0"] == b"y" * 60


@pytest.mark.parametrize("kind, flags", [(6, 0), (7, 0), (1, 1), (1, 4)])
def test_records_of_a_newer_version_are_refused_not_cut(path: str, kind: int, flags: int) -> None:
    """A reserved kind or flag under a right checksum."""
    from logkv import _core, manifest

    with logkv.open(path) as db:
        db["a"] = "1"
    with files_of(path) as directory:
        found = manifest.read(directory)
    assert found is not None
    segment, end = found[0].segments[0], 64 + 24 + _core.MARK_SIZE
    record = bytearray(_core.encode_record(kind, 2**63, b"key", b"v" * 53, segment.salt, end)) + bytes(16)
    record[19] = flags
    salted = segment.salt ^ end // 8
    record[:4] = _core.checksum(bytes(record[4:20 + {0: 0, 1: 8, 4: 4}[flags] + 3 + 53]), salted).to_bytes(4, "little")
    with open(segments(path)[0], "r+b") as file:
        file.seek(end)
        file.write(record)
    for name in ("index", "control"):
        os.unlink(os.path.join(path, name))
    before = segments(path)[0].read_bytes()
    for flag in "rw":
        with pytest.raises(logkv.FormatError, match="newer versions"):
            logkv.open(path, flag)
    assert segments(path)[0].read_bytes() == before


def files_of(path: str) -> contextlib.closing[files.Directory]:
    return contextlib.closing(files.Directory(path))


def test_progress_of_a_rebuild(path: str) -> None:
    with logkv.open(path, segment_size=65_536) as db:
        for number in range(3000):
            db[f"{number}"] = bytes(100)
    for opening in (logkv.open, logkv.Writer, logkv.Reader):
        steps: list[tuple[int, int]] = []
        opening(path, progress=lambda done, total: steps.append((done, total))).close()
        assert not steps                        # a trusted index needs no time
        os.unlink(os.path.join(path, "index"))
        total = sum(file.stat().st_size for file in Path(path).glob("*.seg"))
        opening(path, progress=lambda done, total: steps.append((done, total))).close()
        assert steps[0] == (0, total) and steps[-1] == (total, total) and steps == sorted(steps) and len(steps) > 5
        if opening is logkv.Reader:             # it has built its own
            with pytest.raises(ZeroDivisionError):
                logkv.open(path, progress=lambda done, total: 1 // 0)
    logkv.open(path).close()


def test_a_reader_that_slept_through_two_indexes(path: str, in_child: Callable[[Callable[[], None]], int],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own is older than the one that a writer was about to replace when it died."""
    with logkv.open(path) as db:
        db["key"] = "old"
    with logkv.Reader(path) as reader:
        assert reader["key"] == b"old"
        os.unlink(os.path.join(path, "index"))
        with logkv.open(path) as db:
            db["key"] = "new"
        os.unlink(os.path.join(path, "index"))
        monkeypatch.setattr(Opening, "_cut", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert in_child(lambda: logkv.open(path).close()) == -signal.SIGKILL
        monkeypatch.undo()
        assert reader["key"] == b"new"
        with logkv.open(path) as db:
            db["key"] = "newest"
            assert reader["key"] == b"newest"
