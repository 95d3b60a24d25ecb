"""Backups: of stores that live writers change, into directories that are killed, full, damaged, or somebody else's."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import logkv
from benchmarks.baseline import BaselineStore
from logkv import backup, files
from logkv.compaction import Compactor
from tests.proof import backups
from tests.proof.common import SharedNumbers, ended, fork
from tests.proof.session import History

SEGMENT = 65_536
RunInChild = Callable[[Callable[[], None]], int]


def fill(db: logkv.Store, seed: int = 1, count: int = 3000) -> None:
    """Overwrites and deletes over several segments."""
    rnd = random.Random(seed)
    for number in range(count):
        key = b"key %d" % rnd.randrange(700)
        if rnd.random() < 0.2:
            db.delete(key)
        else:
            db[key] = b"%d/%d " % (seed, number) + bytes(rnd.randrange(200))


@pytest.fixture
def source(quick_dir: Path) -> Iterator[logkv.Store]:
    """A store of several segments, open for writing."""
    with logkv.open(quick_dir / "prices.db", segment_size=SEGMENT, compaction="manual") as db:
        fill(db)
        yield db


@pytest.fixture
def dest(quick_dir: Path) -> Path:
    return quick_dir / "prices.backup"


def segments(path: Path | str) -> list[Path]:
    return sorted(Path(path).glob("*.seg"))


def inodes(path: Path | str) -> set[int]:
    return {file.stat().st_ino for file in segments(path)}


def image(path: Path) -> dict[str, bytes] | None:
    """All that is in a directory; None: there is none."""
    if not path.exists():
        return None
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def check(path: Path, expected: dict[bytes, bytes]) -> None:
    """A backup, for everybody who reads; its copy, for who writes too."""
    assert logkv.verify(path).problems == []
    with logkv.Reader(path) as reader:
        assert dict(reader) == expected and len(reader) == len(expected)
    with BaselineStore(path, "r") as baseline:
        assert dict(baseline) == expected
    restored = path.parent / "restored.db"
    shutil.copytree(path, restored)
    with logkv.open(restored, "w", segment_size=SEGMENT) as db:
        assert dict(db) == expected and db.stats()["recovery"]["cut_bytes"] == 0
        fill(db, 99)
        db.compact()
        now = dict(db)
    assert logkv.verify(restored).problems == []
    with logkv.Reader(restored) as reader:
        assert dict(reader) == now
    shutil.rmtree(restored)


# -- what it is ---------------------------------------------------------------------------------------------------


def test_a_backup_is_a_store_of_one_moment(source: logkv.Store, dest: Path) -> None:
    expected = dict(source)
    made = source.backup(dest)
    fill(source, 2)
    assert (made.path, made.keys) == (str(dest), len(expected))
    assert made.linked > 3 and made.copied in (1, 2) and made.kept == 0
    assert made.linked + made.copied == len(segments(dest)) - 1     # and one to write to
    assert not {"control", "index", "backup.tmp"} & {*os.listdir(dest)}
    check(dest, expected)
    assert dict(source) != expected


@pytest.mark.parametrize("kind", [logkv.Reader, logkv.Writer, logkv.Store])
def test_by_every_handle(quick_dir: Path, dest: Path, kind: Any) -> None:
    path = quick_dir / "prices.db"
    with logkv.open(path, segment_size=SEGMENT) as db:
        fill(db)
        expected = dict(db)
    with kind(path) as handle:
        version = handle.backup(os.fsencode(dest)).version
        assert version == handle.stats()["last_version"]
    check(dest, expected)
    with pytest.raises(logkv.ClosedError):
        handle.backup(dest)


def test_by_a_child_of_a_fork(source: logkv.Store, dest: Path, in_child: RunInChild) -> None:
    assert in_child(lambda: source.backup(dest)) == 0
    check(dest, dict(source))


def test_of_a_store_without_an_index_to_trust(source: logkv.Store, dest: Path, quick_dir: Path) -> None:
    copied, expected = quick_dir / "copied.db", dict(source)
    shutil.copytree(source.path, copied)
    with logkv.Reader(copied) as reader:
        assert reader.stats()["index"]["private"]
        reader.backup(dest)
    check(dest, expected)


@pytest.mark.parametrize("work", [
    lambda db: None, lambda db: db.update({b"a": b"1"}), lambda db: db.sync(), lambda db: db.clear(),
    lambda db: (fill(db), db.clear()), lambda db: (fill(db), db.clear(), fill(db, 2), db.compact()),
    lambda db: db.update({b"large": bytes(300_000), b"small": b""}),
    lambda db: (fill(db), [db.delete(key) for key in list(db)]),
], ids=["new", "one", "synced", "cleared", "cleared after", "compacted", "large", "all deleted"])
def test_of_stores_of_all_kinds(quick_dir: Path, dest: Path, work: Callable[[logkv.Store], None]) -> None:
    with logkv.open(quick_dir / "prices.db", segment_size=SEGMENT) as db:
        work(db)
        db.backup(dest)
        check(dest, dict(db))
        db["more"] = "1"
        db.backup(dest)
        check(dest, dict(db))


def test_the_codec_goes_along(quick_dir: Path, dest: Path) -> None:
    with logkv.open(quick_dir / "prices.db", codec="json") as db:
        db["btc"] = {"close": 4411.99}
        db.backup(dest)
    with logkv.open(dest, codec="json") as db:
        assert db["btc"] == {"close": 4411.99}


@pytest.mark.filterwarnings("ignore:compaction of .* failed:RuntimeWarning")
def test_while_a_merge_is_half_done(source: logkv.Store, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The MANIFEST lists what is merged beside what it was made of: only the first is needed."""
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Compactor, "_drop", fail)
    with pytest.raises(logkv.Error):
        source.compact()
    engine = source._engine
    assert engine is not None
    replaced = {segment.name for segment in engine.manifest.segments if segment.replaced_by}
    source.backup(dest)
    assert replaced and not replaced & {*os.listdir(dest)}
    monkeypatch.undo()
    check(dest, dict(source))
    source.compact()


def test_after_a_clear_or_a_merge_in_the_middle(source: logkv.Store, dest: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Files go while they are being linked: the backup begins with another MANIFEST."""
    link = files.Directory.link
    for number, change in enumerate((source.compact, source.clear, lambda: fill(source, 7))):
        fill(source, 5)
        before = dict(source)
        calls = 0

        def link_late(directory: files.Directory, other: files.Directory, name: str) -> bool:
            nonlocal calls
            calls += 1
            if calls == 2:
                change()
            return link(directory, other, name)

        monkeypatch.setattr(files.Directory, "link", link_late)
        source.backup(dest.with_name(f"{number}.backup"))
        monkeypatch.undo()
        assert calls >= 2
        assert change == source.compact or dict(source) != before
        check(dest.with_name(f"{number}.backup"), dict(source))


# -- links and copies ---------------------------------------------------------------------------------------------


def test_links_really_are_links(source: logkv.Store, dest: Path) -> None:
    made = source.backup(dest)
    shared = inodes(dest) & inodes(source.path)
    assert len(shared) == made.linked
    assert sum(file.stat().st_size for file in segments(dest) if file.stat().st_ino in shared) == made.linked_bytes
    expected, files_then = dict(source), image(dest)
    source.compact()
    fill(source, 3)
    source.clear()
    assert image(dest) == files_then
    check(dest, expected)


def test_who_writes_to_a_backup_changes_nothing_of_the_store(source: logkv.Store, dest: Path) -> None:
    source.backup(dest)
    expected = dict(source)
    source.close()
    before = image(Path(source.path))
    with logkv.open(dest, "w", segment_size=SEGMENT) as db:
        fill(db, 4)
        db.compact()
        db.clear()
    assert image(Path(source.path)) == before
    with logkv.Reader(source.path) as reader:
        assert dict(reader) == expected


def test_copies_only(source: logkv.Store, dest: Path) -> None:
    made = source.backup(dest, links=False)
    assert made.linked == 0 and made.copied == len(segments(dest)) - 1 and not inodes(dest) & inodes(source.path)
    check(dest, dict(source))
    assert source.backup(dest, links=False).kept >= made.copied - 2


def test_a_close_that_fails_says_nothing_new(source: logkv.Store, dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is on the device by then."""
    real, closed = os.close, []

    def close(fd: int) -> None:
        real(fd)
        closed.append(fd)
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patched:
        patched.setattr(os, "close", close)
        for links in (True, False):
            source.backup(dest, links=links)
    with logkv.Reader(dest) as made:
        assert len(closed) > 10 and dict(made) == dict(source)


def test_copies_in_place_of_links_that_were_there(source: logkv.Store, dest: Path) -> None:
    source.backup(dest)
    for _ in range(3):
        made = source.backup(dest, links=False)
        assert not inodes(dest) & inodes(source.path)
        check(dest, dict(source))
    assert made.kept > 3


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_where_there_are_no_links(source: logkv.Store, dest: Path, monkeypatch: pytest.MonkeyPatch,
                                  number: int) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    made = source.backup(dest)
    assert made.linked == 0 and made.copied > 3
    check(dest, dict(source))
    assert source.backup(dest).kept >= made.copied - 2


def test_on_another_device(source: logkv.Store, tmp_path: Path) -> None:
    there = tmp_path / "prices.backup"
    if os.stat(tmp_path).st_dev == os.stat(source.path).st_dev:
        pytest.skip("there is only one")
    assert source.backup(there).linked == 0
    check(there, dict(source))


@pytest.mark.parametrize("mode, umask", [(0o666, 0o022), (0o600, 0o022), (0o666, 0o027), (0o640, 0)])
def test_who_may_not_read_the_store_may_not_read_the_backup(quick_dir: Path, dest: Path, mode: int, umask: int) -> None:
    before = os.umask(umask)
    try:
        with logkv.open(quick_dir / "prices.db", mode=mode, segment_size=SEGMENT) as db:
            fill(db)
            db.backup(dest, links=False)
        rights = {stat.S_IMODE(file.stat().st_mode) for file in dest.iterdir()}
        assert rights == {mode & ~umask}
        assert stat.S_IMODE(dest.stat().st_mode) == stat.S_IMODE(Path(quick_dir, "prices.db").stat().st_mode)
    finally:
        os.umask(before)


# -- again into the same directory --------------------------------------------------------------------------------


def test_only_what_is_new_is_added(source: logkv.Store, dest: Path) -> None:
    first = source.backup(dest)
    before = {file.name: file.stat().st_ino for file in segments(dest)}
    fill(source, 2)
    second = source.backup(dest)
    after = {file.name: file.stat().st_ino for file in segments(dest)}
    assert second.kept == first.linked and second.linked > 3 and second.copied in (1, 2)
    assert len({*before.items()} & {*after.items()}) == first.linked
    assert second.keys == len(source) and second.version > first.version
    check(dest, dict(source))
    third = source.backup(dest)
    assert third.kept - second.kept - second.linked in (0, 1) and third.linked <= 1     # which was full, or just sealed
    check(dest, dict(source))


def test_after_merges_what_went_goes_and_the_directory_stays_small(source: logkv.Store, dest: Path) -> None:
    for seed in range(4):
        fill(source, seed)
        if seed % 2:
            source.compact()
        source.backup(dest)
        check(dest, dict(source))
        assert len(segments(dest)) <= len(segments(source.path)) + 1
    source.clear()
    source.backup(dest)
    assert len(segments(dest)) == 2
    check(dest, {})


def test_readers_of_a_backup_go_on(source: logkv.Store, dest: Path) -> None:
    """They keep what they have opened."""
    source.backup(dest)
    expected = dict(source)
    with logkv.Reader(dest) as reader:
        source.compact()
        fill(source, 2)
        source.backup(dest)
        assert dict(reader) == expected
    with logkv.Reader(dest) as reader:
        assert dict(reader) == dict(source) != expected


def test_a_restored_store_is_backed_up_where_it_came_from(source: logkv.Store, dest: Path, quick_dir: Path) -> None:
    """It numbers its files on from those of the backup: a name may mean another file in either."""
    source.backup(dest)
    restored = quick_dir / "restored"
    shutil.copytree(dest, restored)
    with logkv.open(restored, "w", segment_size=SEGMENT, compaction="manual") as db:
        for seed in range(3):
            fill(db, 10 + seed)
            db.backup(dest)
            check_dest = dest.parent / "looked at"
            shutil.copytree(dest, check_dest)
            check(check_dest, dict(db))
            shutil.rmtree(check_dest)
        assert db.backup(dest).kept > 3


def test_a_backup_can_be_backed_up(source: logkv.Store, dest: Path, quick_dir: Path) -> None:
    source.backup(dest)
    again = quick_dir / "again.backup"
    with logkv.Reader(dest) as reader:
        made = reader.backup(again)
        assert made.copied <= 1                 # all of it but the first record of the last segment is sealed
    check(again, dict(source))
    fill(source, 2)
    source.backup(again)
    check(again, dict(source))


# -- what is refused ----------------------------------------------------------------------------------------------


def another_store(db: logkv.Store, dest: Path) -> None:
    with logkv.open(dest) as other:
        other["a"] = "1"


def backup_of_another_store(db: logkv.Store, dest: Path) -> None:
    with logkv.open(dest.with_name("other.db")) as other:
        other["a"] = "1"
        other.backup(dest)


def opened_for_writing(db: logkv.Store, dest: Path) -> None:
    db.backup(dest)
    logkv.open(dest, "w").close()


def copy_of_the_store(db: logkv.Store, dest: Path) -> None:
    shutil.copytree(db.path, dest)


def somebodys_files(db: logkv.Store, dest: Path) -> None:
    dest.mkdir()
    (dest / "notes.txt").write_text("mine")


def segments_alone(db: logkv.Store, dest: Path) -> None:
    """A store whose MANIFEST is lost, not an unfinished backup."""
    shutil.copytree(db.path, dest)
    (dest / "MANIFEST").unlink()


def a_file(db: logkv.Store, dest: Path) -> None:
    dest.write_text("mine")


def later_writes(db: logkv.Store, dest: Path) -> None:
    """The store was restored from an older backup, and is about to be backed up over a newer one."""
    db.backup(dest.with_name("older"))
    fill(db, 8)
    db.backup(dest)
    db.close()
    shutil.rmtree(db.path)
    dest.with_name("older").rename(db.path)


def a_damaged_manifest(db: logkv.Store, dest: Path) -> None:
    db.backup(dest)
    data = bytearray((dest / "MANIFEST").read_bytes())
    data[200] ^= 1
    (dest / "MANIFEST").write_bytes(data)


REFUSED: dict[Callable[[logkv.Store, Path], None], tuple[type[Exception], str]] = {
    another_store: (logkv.FormatError, "another store"),
    backup_of_another_store: (logkv.FormatError, "another store"),
    opened_for_writing: (logkv.FormatError, "opened for writing"),
    copy_of_the_store: (logkv.FormatError, "not a backup"),
    somebodys_files: (logkv.FormatError, "'notes.txt'"),
    segments_alone: (logkv.FormatError, "no MANIFEST"),
    a_file: (logkv.FormatError, "is a file"),
    later_writes: (logkv.FormatError, "later writes"),
    a_damaged_manifest: (logkv.CorruptionError, "checksum"),
}


@pytest.mark.parametrize("made", REFUSED, ids=lambda made: made.__name__)
def test_what_is_no_backup_of_this_store_is_refused_and_untouched(
        source: logkv.Store, dest: Path, made: Callable[[logkv.Store, Path], None]) -> None:
    made(source, dest)
    before = image(dest) if dest.is_dir() else dest.read_bytes()
    kind, words = REFUSED[made]
    with logkv.Reader(source.path) as reader, pytest.raises(kind, match=words):
        reader.backup(dest)
    after = image(dest) if dest.is_dir() else dest.read_bytes()
    if isinstance(after, dict):
        assert isinstance(before, dict)
        after.pop("LOCK", None), before.pop("LOCK", None)         # it may be locked before it is known to be older
    assert after == before


@pytest.mark.parametrize("place", ["", "below", "below/further", "../link", "../link/below"])
def test_the_store_itself_is_refused(source: logkv.Store, place: str) -> None:
    path = Path(source.path)
    path.with_name("link").symlink_to(path)
    source.close()
    before = image(path)
    with logkv.Reader(path) as reader, pytest.raises(ValueError, match="inside it"):
        reader.backup(path / place)
    assert image(path) == before


def test_a_directory_in_use_is_refused(source: logkv.Store, dest: Path, in_child: RunInChild) -> None:
    """By a writer in another process or this one, or by another backup."""
    source.backup(dest)
    lock = files.lock(files.Directory(str(dest)), 0)
    before = image(dest)
    with pytest.raises(logkv.LockedError):
        source.backup(dest)
    assert image(dest) == before
    files.unlock(lock)
    with logkv.open(dest) as db:
        db["a"] = "1"
        with pytest.raises(logkv.Error):
            source.backup(dest)
        assert in_child(lambda: pytest.raises(logkv.Error, source.backup, dest) and None) == 0
        db["b"] = "2"


def test_no_parent_directory(source: logkv.Store, dest: Path) -> None:
    with pytest.raises(logkv.NotFoundError):
        source.backup(dest / "below")
    assert not dest.exists()


# -- damage and failures ------------------------------------------------------------------------------------------


@pytest.fixture(params=["missing", "empty", "older"])
def target(request: pytest.FixtureRequest, quick_dir: Path, dest: Path) -> Path:
    """Where a backup goes that will fail, and the store is at prices.db, closed."""
    with logkv.open(quick_dir / "prices.db", segment_size=SEGMENT, compaction="manual") as db:
        fill(db)
        if request.param == "older":
            db.backup(dest)
        fill(db, 2)
        db.compact()
        fill(db, 3)
    if request.param == "empty":
        dest.mkdir()
    return dest


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("place", ["sealed record", "open record", "footer", "header", "missing", "short"])
def test_a_damaged_store_is_named_and_the_backup_stays(target: Path, quick_dir: Path, place: str, links: bool) -> None:
    path = quick_dir / "prices.db"
    with logkv.Reader(path) as reader:
        sealed = [s["number"] for s in reader.stats()["segments"] if s["sealed"]]
        last = reader.stats()["segments"][-1]["number"]
        expected = dict(reader)
    damaged = path / files.segment_name(last if place == "open record" else sealed[-1])
    data = bytearray(damaged.read_bytes())
    if place == "missing":
        damaged.unlink()
    elif place == "short":
        os.truncate(damaged, 30_000)
    else:
        at = {"footer": len(data.rstrip(b"\0")) - 30, "header": 20}.get(place) or data.index(b"3/") + 1
        data[at] ^= 1
        damaged.write_bytes(data)
    before = image(target)
    with logkv.Reader(path) as reader, pytest.raises(logkv.CorruptionError) as caught:
        reader.backup(target, links=links)
    assert caught.value.path == str(damaged)
    assert image(target) == before
    if place not in ("missing", "short"):
        data[at] ^= 1
        damaged.write_bytes(data)
        with logkv.Reader(path) as reader:
            reader.backup(target, links=links)
        check(target, expected)


class Calls:
    """`os`, as `logkv.files` sees it, with something that happens at the call with a number; only calls count that
    change something."""

    COUNTED = {"open", "mkdir", "link", "rename", "unlink", "fsync", "fdatasync", "pwrite", "posix_fallocate"}

    def __init__(self, at: int, happens: Callable[[str], None]) -> None:
        self.count = 0
        self._at = at
        self._happens = happens

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.COUNTED:
            return real

        def call(*arguments: Any, **more: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **more)
            self.count += 1
            if self.count == self._at:
                self._happens(name)
            return real(*arguments, **more)

        return call


def test_any_failing_call_leaves_the_directory_as_it_was(target: Path, quick_dir: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, or a device that fails, at every call; and then it works."""
    with logkv.Reader(quick_dir / "prices.db") as reader:
        before, expected = image(target), dict(reader)
        older = (target / "MANIFEST").exists()
        at = 0
        while True:
            at += 1
            failed: list[str] = []

            def fail(name: str) -> None:
                failed.append(name)
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(files, "os", Calls(at, fail))
            try:
                reader.backup(target, links=at % 2 == 0)
            except logkv.Error as problem:
                assert problem.errno == errno.ENOSPC
            monkeypatch.undo()
            if not failed:
                break
            now = image(target)
            if now is not None and "MANIFEST" in now and (before is None or now["MANIFEST"] != before.get("MANIFEST")):
                check(target, expected)         # it was there already when something failed
                shutil.rmtree(target)
                if older:
                    return                      # what follows is the same
                if before is not None:
                    target.mkdir()
                continue
            if now is not None and before is not None:
                now.pop("LOCK", None), before.pop("LOCK", None)
            assert now == before, (at, failed)
        assert at > 20
    check(target, expected)


def test_killed_at_every_call_and_made_again(target: Path, quick_dir: Path, in_child: RunInChild) -> None:
    """What is there then is the older backup, the new one, or none; and the next one does not mind."""
    path = quick_dir / "prices.db"
    with logkv.Reader(path) as reader:
        expected = dict(reader)
    allowed = [expected]
    if (target / "MANIFEST").exists():
        with logkv.Reader(target) as reader:
            allowed.append(dict(reader))
    whole = quick_dir / "as it was"
    if target.exists():
        shutil.copytree(target, whole)
    for at in range(1, 1000):
        def child() -> None:
            killing = Calls(at, lambda name: os.kill(os.getpid(), signal.SIGKILL))
            files.os = killing          # type: ignore[assignment, attr-defined]
            with logkv.Reader(path) as reader:
                reader.backup(target, links=at % 3 > 0)

        status = in_child(child)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        try:
            with logkv.Reader(target) as reader:
                assert dict(reader) in allowed
        except (logkv.NotFoundError, logkv.FormatError):
            assert len(allowed) == 1
        with logkv.Reader(path) as reader:
            reader.backup(target)
        assert logkv.verify(target).problems == []
        with logkv.Reader(target) as reader:
            assert dict(reader) == expected
        assert not [name for name in os.listdir(target) if name.endswith(".tmp")]
        shutil.rmtree(target)
        if whole.exists():
            shutil.copytree(whole, target)
    assert at > 20


def killed_before_the_end(db: logkv.Reader | logkv.Store, dest: Path) -> None:
    """All is there but the MANIFEST."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backup.manifest, "adopt_next", lambda directory: os.kill(os.getpid(), signal.SIGKILL))
        db.backup(dest)


def test_an_unfinished_backup_is_not_taken_for_one(quick_dir: Path, source: logkv.Store, dest: Path,
                                                   in_child: RunInChild) -> None:
    assert in_child(lambda: killed_before_the_end(source, dest)) == -signal.SIGKILL
    before = image(dest)
    for flag in "rwcn":
        with pytest.raises(logkv.FormatError, match="not finished"):
            logkv.open(dest, flag)
    with logkv.open(quick_dir / "other.db") as other:
        other["a"] = "1"
        with pytest.raises(logkv.FormatError, match="holds"):
            other.backup(dest)
    assert image(dest) == before
    source.backup(dest)
    check(dest, dict(source))


def test_an_older_backup_that_was_opened_after_a_kill(source: logkv.Store, dest: Path, in_child: RunInChild) -> None:
    """A writer removes what the unfinished one left, links above all, and changes nothing of the store."""
    source.backup(dest)
    expected = dict(source)
    fill(source, 2)
    source.close()
    before = image(Path(source.path))
    with logkv.Reader(source.path) as reader:
        assert in_child(lambda: killed_before_the_end(reader, dest)) == -signal.SIGKILL
    with logkv.open(dest, "w", segment_size=SEGMENT) as db:
        assert dict(db) == expected
        fill(db, 3)
        db.compact()
    assert logkv.verify(dest).ok and logkv.verify(source.path).ok
    assert image(Path(source.path)) == before


def test_progress_and_an_interrupt(target: Path, quick_dir: Path) -> None:
    before = image(target)
    with logkv.Reader(quick_dir / "prices.db") as reader:
        for stop in range(4):
            def interrupt(done: int, total: int) -> None:
                nonlocal stop
                stop -= 1
                if stop < 0:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                reader.backup(target, progress=interrupt)
            assert image(target) == before
        steps: list[tuple[int, int]] = []
        reader.backup(target, progress=lambda done, total: steps.append((done, total)))
        total = steps[0][1]
        assert steps[0] == (0, total) and steps[-1] == (total, total) and steps == sorted(steps) and len(steps) > 5


# -- beside a writer in another process ---------------------------------------------------------------------------


def operations(seed: int) -> Iterator[tuple[str, bytes, bytes]]:
    """What the writer does, without an end: (what, key, value)."""
    rnd = random.Random(seed)
    number = 0
    while True:
        number += 1
        key = b"key %d" % rnd.randrange(200)
        what = rnd.random()
        if what < 0.0004:
            yield "clear", b"", b""
        elif what < 0.001:
            yield "compact", b"", b""
        elif what < 0.2:
            yield "delete", key, b""
        else:
            yield "put", key, b"%d " % number + bytes(rnd.randrange(1500))


@pytest.mark.parametrize("seed, sync", [(1, "os"), (2, 0.05), (3, "os")])
def test_beside_a_live_writer_it_is_a_prefix_of_its_history(quick_dir: Path, seed: int, sync: Any) -> None:
    """Which rotates, seals, merges, clears: at least what was acknowledged before, at most what was begun by then."""
    path, dest = quick_dir / "prices.db", quick_dir / "prices.backup"
    numbers = SharedNumbers()       # operations that were begun, and that were acknowledged
    logkv.open(path, segment_size=SEGMENT).close()

    def write() -> None:
        with logkv.open(path, segment_size=SEGMENT, sync=sync) as db:
            for what, key, value in operations(seed):
                if what in ("put", "delete", "clear"):
                    numbers[0] += 1
                if what == "put":
                    db[key] = value
                elif what == "delete":
                    db.delete(key)
                elif what == "clear":
                    db.clear()
                else:
                    db.compact()
                numbers[1] = numbers[0]

    history = History({})
    ahead = operations(seed)
    writer = fork(write)
    generations = set()
    try:
        with logkv.Reader(path) as reader:
            for turn in range(400):
                if turn >= 40 and len(generations) > 1:
                    break
                while numbers[1] < 200 * turn:      # something new
                    os.sched_yield()
                low = numbers[1]
                made = reader.backup(dest, links=turn % 4 > 0)
                high = numbers[0]
                while len(history) < high:
                    what, key, value = next(ahead)
                    if what != "compact":
                        history.add(None if what == "clear" else key, value if what == "put" else None)
                with logkv.Reader(dest) as copied:
                    found = history.find(dict(copied))
                    generations.add(copied.stats()["epoch"])
                    assert made.keys == len(copied)
                assert any(low <= index <= high for index in found), (low, high, found)
                if turn % 8 == 0:
                    assert logkv.verify(dest).problems == []
    finally:
        os.kill(writer, signal.SIGKILL)
        ended(writer)
    assert len(generations) > 1         # it was cleared meanwhile
    with logkv.open(dest, "w", segment_size=SEGMENT) as db:
        fill(db)
    assert logkv.verify(path).ok


def test_by_the_command_beside_a_writer(source: logkv.Store, dest: Path) -> None:
    """A process of its own, which opens a reader."""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-m", "logkv", "backup", source.path, dest], capture_output=True,
                              check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        assert f"holds {len(source)} keys" in done.stdout.decode()
        fill(source, 2)
    with logkv.Reader(dest) as reader:
        assert len(reader) > 0


# -- power cuts ---------------------------------------------------------------------------------------------------


def test_power_cuts() -> None:
    report = backups.run(seconds=60, states=400)
    assert report.violations == []
    assert report.distinct >= 300 and report.nested and report.unfinished


def no_file_is_synced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(backup, "files", SimpleNamespace(**{**vars(files), "sync_data": lambda fd: None}))


def no_name_is_synced(patch: pytest.MonkeyPatch) -> None:
    """Before the MANIFEST that needs them; its own name is."""
    adopt = backup.manifest.adopt_next
    sync = files.Directory.sync

    def adopt_synced(directory: files.Directory) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(files.Directory, "sync", sync)
            adopt(directory)

    patch.setattr(backup, "manifest", SimpleNamespace(**{**vars(backup.manifest), "adopt_next": adopt_synced}))
    patch.setattr(files.Directory, "sync", lambda directory: None)


def no_mark_of_what_is_unfinished(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(backup, "files", SimpleNamespace(**{**vars(files), "BACKUP_BEGUN": files.LOCK}))


def the_older_goes_first(patch: pytest.MonkeyPatch) -> None:
    write_next = backup.manifest.write_next

    def clean_and_write(directory: files.Directory, new: Any) -> int:
        for name in backup.recovery.leftovers(directory, new):
            directory.unlink(name)
        return write_next(directory, new)

    patch.setattr(backup, "manifest", SimpleNamespace(**{**vars(backup.manifest), "write_next": clean_and_write}))


def what_is_not_sealed_keeps_its_name(patch: pytest.MonkeyPatch) -> None:
    copy = backup._Copying._copy

    def copy_over(copying: Any, segment: Any, current: Any) -> Any:
        if segment.sealed:
            return copy(copying, segment, current)
        next_number, copying._next = copying._next, segment.number
        with suppress(OSError):
            copying.target.unlink(segment.name)
        try:
            return copy(copying, segment, current)
        finally:
            copying._next = next_number

    patch.setattr(backup._Copying, "_copy", copy_over)


@pytest.mark.parametrize("bug", [no_file_is_synced, no_name_is_synced, no_mark_of_what_is_unfinished,
                                 the_older_goes_first, what_is_not_sealed_keeps_its_name], ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_seen(bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)
    assert backups.run(seconds=60, states=2000).violations
