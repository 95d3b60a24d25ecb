"""Directories as users treat them: copied, restored, linked, moved, on other devices and media, other boots and namespaces."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import logkv
from logkv import files
from tests.proof import places

RunInChild = Callable[[Callable[[], None]], int]
SEGMENT = 65_536
MANIFEST_NOTES = 72, 136     # where they are in the control page
FIRST = {b"key %d" % number: b"first %d" % number for number in range(2000)}
THEN = {b"key %d" % number: b"then %d" % number for number in range(1000, 3000)}
BOTH = FIRST | THEN

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def copy(source: str, target: str, *options: str) -> None:
    subprocess.run(["cp", "-r", *options, source + "/.", target], check=True)


def how(path: str, flag: str = "w") -> str:
    """Whether the index was believed."""
    with logkv.open(path, flag) as db:
        return str(db.stats()["recovery"].get("index", "in use"))


def check(path: str, expected: dict[bytes, bytes]) -> None:
    """For a reader, for a writer, which may write, and for `verify`."""
    with logkv.Reader(path) as reader:
        assert dict(reader.items()) == expected
    with logkv.open(path, "w", segment_size=SEGMENT) as db:
        assert dict(db.items()) == expected
        db[b"one more"] = b"1"
        del db[b"one more"]
    assert logkv.verify(path).ok


def killed(path: str, in_child: RunInChild, pairs: dict[bytes, bytes] = FIRST) -> None:
    """A store whose writer died with it open."""

    def child() -> None:
        db = logkv.open(path, segment_size=SEGMENT)
        db.update(pairs)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(child) == -signal.SIGKILL


# -- copies -----------------------------------------------------------------------------------------------------


def test_a_copy_of_an_open_store(path: str, tmp_path: Path) -> None:
    """What was written before the copy is in it, and nothing else; both go on by themselves."""
    twin = str(tmp_path / "twin.db")
    with logkv.open(path) as db:        # one large segment: nothing is sealed in the background meanwhile
        db.update(FIRST)
        copy(path, twin)
        db.update(THEN)
        assert how(twin) == "rebuilt"
        check(twin, FIRST)
        assert dict(db.items()) == BOTH
    check(path, BOTH)


def test_a_backup_restored_over_the_closed_store(path: str, tmp_path: Path) -> None:
    backup = str(tmp_path / "backup")
    with logkv.open(path, segment_size=SEGMENT) as db:
        db.update(FIRST)
    copy(path, backup)
    with logkv.open(path, "w", segment_size=SEGMENT) as db:
        db.update(THEN)
    copy(backup, path)
    check(path, FIRST)


def test_a_backup_of_an_open_store_restored_over_it(path: str, tmp_path: Path, in_child: RunInChild) -> None:
    """In the same boot, over the store of a writer that was killed: its index is not believed."""
    backup = str(tmp_path / "backup")
    with logkv.open(path, segment_size=1 << 20) as db:
        db.update(FIRST)
        copy(path, backup)
    killed(path, in_child, THEN)
    copy(backup, path)
    assert how(path) == "rebuilt"
    check(path, FIRST)


def test_a_backup_restored_under_a_running_writer(path: str, tmp_path: Path, in_child: RunInChild) -> None:
    """What that writer sees then is not promised; who opens the store after its death has the backup's content, or is
    told of damage: never an index that belongs to something else."""
    backup = str(tmp_path / "backup")
    with logkv.open(path, segment_size=1 << 20) as db:
        db.update(FIRST)
    copy(path, backup)

    def child() -> None:
        db = logkv.open(path, segment_size=1 << 20)
        db.update(THEN)
        copy(backup, path)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(child) == -signal.SIGKILL
    with logkv.open(path, "w") as db:
        assert db.stats()["recovery"]["index"] != "trusted"
        assert {key: db[key] for key in FIRST} == FIRST
        assert {key: value for key, value in db.items() if BOTH.get(key) != value and FIRST.get(key) != value} == {}


@pytest.mark.parametrize("closed", [True, False])
def test_a_hard_linked_store(path: str, tmp_path: Path, in_child: RunInChild, closed: bool) -> None:
    """`cp -rl`: two names of one store; what one writes the other has.  Without a clean close its index is not believed."""
    if closed:
        with logkv.open(path, segment_size=SEGMENT) as db:
            db.update(FIRST)
    else:
        killed(path, in_child)
    twin = str(tmp_path / "twin.db")
    copy(path, twin, "-l")
    assert how(twin) == ("clean" if closed else "rebuilt")
    shutil.rmtree(path)
    check(twin, FIRST)


@pytest.mark.parametrize("there", ["/dev/shm", "/tmp"])
def test_a_copy_on_another_device_and_back(path: str, there: str, in_child: RunInChild) -> None:
    killed(path, in_child)
    if not os.path.isdir(there):
        pytest.skip(f"there is no {there}")
    with tempfile.TemporaryDirectory(dir=there) as directory:
        away = os.path.join(directory, "away.db")
        copy(path, away)
        shutil.rmtree(path)
        assert how(away) == "rebuilt"
        check(away, FIRST)
        with logkv.open(away, "w", segment_size=SEGMENT) as db:
            db.update(THEN)
        copy(away, path)
    assert how(path) == "clean"
    check(path, BOTH)


def test_moved_while_open(path: str, tmp_path: Path) -> None:
    """Writer and readers go on, through rotation and growth; the old path leads to nothing."""
    moved = str(tmp_path / "elsewhere" / "moved.db")
    os.mkdir(os.path.dirname(moved))
    with logkv.open(path, segment_size=SEGMENT) as db, logkv.Reader(path) as reader:
        db.update(FIRST)
        os.rename(path, moved)
        db.update(THEN)
        assert dict(reader.items()) == dict(db.items()) == BOTH
        reader.refresh()
        db.sync()
        with pytest.raises(logkv.NotFoundError):
            logkv.open(path, "r")
        with logkv.Reader(moved) as other:
            assert dict(other.items()) == BOTH
    assert how(moved) == "clean"
    check(moved, BOTH)


# -- what an index is believed by -------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["w", "r"])
def test_another_boot(path: str, in_child: RunInChild, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    """After a clean close the index is good under any boot; after a kill only under the same."""
    with logkv.open(path, segment_size=SEGMENT) as db:
        db.update(FIRST)
    monkeypatch.setattr(files, "boot_id", lambda: b"another boot id!")
    assert how(path, flag) != "rebuilt"
    monkeypatch.undo()
    killed(path, in_child, THEN)
    assert how(path, "r") != "rebuilt"
    monkeypatch.setattr(files, "boot_id", lambda: b"another boot id!")
    assert how(path, flag) == "rebuilt"
    check(path, BOTH)


def test_no_boot_id_believes_nothing(path: str, in_child: RunInChild, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system does not say, an equal answer proves nothing."""
    monkeypatch.setattr(files, "boot_id", lambda: bytes(16))
    killed(path, in_child)
    assert how(path) == "rebuilt"


def replaced(path: str, name: str) -> None:
    """The same bytes in another inode, of the same device."""
    file = Path(path, name)
    file.with_name("aside").write_bytes(file.read_bytes())
    file.with_name("aside").rename(file)


def linked(path: str, name: str) -> None:
    os.link(os.path.join(path, name), path + "-" + name)


def noted(path: str, number: int) -> None:
    """The control page's notes on the MANIFEST say another number in this one's place: all else stays as it is."""
    control = Path(path, "control")
    data = bytearray(control.read_bytes())
    at = data.find(number.to_bytes(8, "little"), *MANIFEST_NOTES)
    assert at >= 0
    while at >= 0:
        data[at:at + 8] = (1 << 40).to_bytes(8, "little")
        at = data.find(number.to_bytes(8, "little"), *MANIFEST_NOTES)
    with control.open("r+b") as file:
        file.write(data)


def generation(path: str) -> int:
    with logkv.Reader(path) as reader:
        return int(reader.stats()["generation"])


def manifest_ctime(path: str) -> None:
    """The same inode and the same bytes, written again: what `cp` over a file does."""
    file = Path(path, "MANIFEST")
    before, data = file.stat(), file.read_bytes()
    while file.stat().st_ctime_ns == before.st_ctime_ns:
        with file.open("r+b") as again:
            again.write(data)
    assert file.stat().st_ino == before.st_ino


@pytest.mark.parametrize("change", [
    pytest.param(lambda path: None, id="nothing"),
    pytest.param(lambda path: replaced(path, "control"), id="inode of control"),
    pytest.param(lambda path: replaced(path, "index"), id="inode of the index"),
    pytest.param(lambda path: linked(path, "control"), id="links of control"),
    pytest.param(lambda path: linked(path, "index"), id="links of the index"),
    pytest.param(lambda path: replaced(path, "MANIFEST"), id="the MANIFEST"),
    pytest.param(lambda path: noted(path, os.stat(path + "/MANIFEST").st_ino), id="inode of the MANIFEST"),
    pytest.param(lambda path: noted(path, generation(path)), id="generation of the MANIFEST"),
    pytest.param(manifest_ctime, id="ctime of the MANIFEST"),
])
def test_each_sign_by_itself(path: str, in_child: RunInChild, change: Callable[[str], None],
                             request: pytest.FixtureRequest) -> None:
    """Of a store that was killed: the index is believed as it is, and not after any one of these."""
    killed(path, in_child)
    change(path)
    expected = "trusted" if request.node.callspec.id == "nothing" else "rebuilt"
    assert how(path, "r") in (expected, "in use" if expected == "trusted" else "rebuilt")
    assert how(path) == expected
    check(path, FIRST)


def test_another_device(path: str, in_child: RunInChild, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is as the control page says, but for its device."""
    killed(path, in_child)
    real = os.fstat

    def fstat(fd: int) -> os.stat_result:
        status = list(real(fd))
        status[2] += 1
        return os.stat_result(status, {"st_ctime_ns": real(fd).st_ctime_ns, "st_blocks": real(fd).st_blocks,
                                       "st_mtime_ns": real(fd).st_mtime_ns})

    monkeypatch.setattr(os, "fstat", fstat)
    assert how(path) == "rebuilt"


# -- read-only media and rights ---------------------------------------------------------------------------------


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Mounts something for the time of a test; skips it where that may not be."""
    points: list[Path] = []

    def mount(*options: str) -> str:
        point = tmp_path / f"mount{len(points)}"
        point.mkdir()
        done = subprocess.run(["mount", *options, str(point)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr.strip()}")
        points.append(point)
        return str(point)

    yield mount
    for point in reversed(points):
        subprocess.run(["umount", str(point)], check=True)


@as_root
@pytest.mark.parametrize("trusted", [True, False])
def test_a_read_only_mount(path: str, mounts: Callable[..., str], in_child: RunInChild, trusted: bool) -> None:
    """Readers work, with the store's index or with one of their own; a writer says why not, and nothing is touched."""
    killed(path, in_child)
    if trusted:
        how(path)
    else:
        os.unlink(os.path.join(path, "index"))
    where = mounts("--bind", "-o", "ro", os.path.dirname(path))
    subprocess.run(["mount", "-o", "remount,bind,ro", where], check=True)
    there = os.path.join(where, os.path.basename(path))
    with logkv.Reader(there) as reader:
        assert dict(reader.items()) == FIRST
    assert logkv.verify(there).ok
    for flag in "wcn":
        with pytest.raises(logkv.Error, match="[Rr]ead-only file system"):
            logkv.open(there, flag)
    check(path, FIRST)


@pytest.mark.parametrize("trusted", [True, False])
def test_without_the_right_to_write(trusted: bool, in_child: RunInChild) -> None:
    """As a user who may only read."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "prices.db")
        killed(path, in_child)
        if trusted:
            how(path)
        else:
            os.unlink(os.path.join(path, "index"))
        for name in os.listdir(path):
            os.chmod(os.path.join(path, name), 0o444)
        os.chmod(path, 0o555)
        os.chmod(directory, 0o755)

        def child() -> None:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            with logkv.Reader(path) as reader:
                assert dict(reader.items()) == FIRST
            assert logkv.verify(path).ok
            for flag in "wcn":
                with pytest.raises(logkv.Error, match="Permission denied"):
                    logkv.open(path, flag)

        try:
            assert in_child(child) == 0
        finally:
            os.chmod(path, 0o755)
        for name in os.listdir(path):
            os.chmod(os.path.join(path, name), 0o644)
        check(path, FIRST)


# -- the lock ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [b"1\n", b"999999999\n", b"", b"garbage \0\xff" * 100, b"-5\n"])
def test_a_stale_lock_file(path: str, text: bytes) -> None:
    """What stands in LOCK is for people: nothing is decided by it."""
    with logkv.open(path) as db:
        db.update(FIRST)
    Path(path, "LOCK").write_bytes(text)
    check(path, FIRST)


def test_a_lock_left_by_a_dead_process(path: str, in_child: RunInChild) -> None:
    killed(path, in_child)
    assert int(Path(path, "LOCK").read_bytes()) > 0
    check(path, FIRST)


def test_garbage_in_a_lock_that_is_held(path: str, in_child: RunInChild) -> None:
    with logkv.open(path):
        Path(path, "LOCK").write_bytes(b"garbage")

        def child() -> None:
            with pytest.raises(logkv.LockedError, match="pid unknown") as caught:
                logkv.open(path)
            assert caught.value.pid is None

        assert in_child(child) == 0


@as_root
def test_a_lock_file_without_rights(path: str, in_child: RunInChild) -> None:
    """A reader does without it; a writer says what is in the way."""
    killed(path, in_child)
    os.chmod(os.path.join(path, "LOCK"), 0o000)
    for directory in (path, *(str(parent) for parent in Path(path).parents)):
        if os.stat(directory).st_uid == 0 and not os.stat(directory).st_mode & 0o005:
            os.chmod(directory, os.stat(directory).st_mode | 0o055)
    for name in os.listdir(path):
        if name != "LOCK":
            os.chmod(os.path.join(path, name), 0o666)

    def child() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        with logkv.Reader(path) as reader:
            assert dict(reader.items()) == FIRST
        with pytest.raises(logkv.Error, match="Permission denied"):
            logkv.open(path, "w")

    assert in_child(child) == 0


# -- namespaces -------------------------------------------------------------------------------------------------

WRITE = """
import sys
import logkv
with logkv.open(sys.argv[1], "w") as db:
    print("open", flush=True)
    sys.stdin.readline()
    for number in range(1000, 3000):
        db[f"key {number}"] = f"then {number}"
    print("written", flush=True)
    sys.stdin.readline()
"""


def test_a_writer_in_another_namespace(path: str) -> None:
    """Its pid means nothing here, its mounts are its own: lock, control page and index are shared all the same."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces can be made here")
    with logkv.open(path) as db:
        db.update(FIRST)
    with subprocess.Popen([*unshare, sys.executable, "-c", WRITE, path], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as writer, logkv.Reader(path) as reader:
        assert writer.stdin is not None and writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        with pytest.raises(logkv.LockedError) as caught:
            logkv.open(path, "w")
        assert caught.value.pid in (1, 2)       # as that process sees itself
        writer.stdin.write("\n")
        writer.stdin.flush()
        assert writer.stdout.readline() == "written\n"
        assert dict(reader.items()) == BOTH
        writer.kill()                           # and with it, all that is in the namespace
        writer.wait()
        with logkv.open(path, "w", timeout=30) as db:
            assert dict(db.items()) == BOTH
    check(path, BOTH)


# -- copying on write, full disks -------------------------------------------------------------------------------


@pytest.mark.parametrize(("magic", "copies"), [(0xEF53, False), (0x01021994, False), (0x58465342, True), (0x9123683E, True),
                                               (0, True)])
def test_which_file_systems_copy_on_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, magic: int, copies: bool) -> None:
    """ext4 and tmpfs do not; XFS and Btrfs do, and what is not known may."""
    monkeypatch.setattr(files, "filesystem_magic", lambda fd: magic)
    assert files.copies_on_write(-1) is copies


@pytest.fixture(params=["much is left", "little is left"])
def copying(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any file system is taken for one that copies on write."""
    monkeypatch.setattr(files, "IN_PLACE", {})
    monkeypatch.setattr(files, "LITTLE", 0 if request.param == "much is left" else 1 << 62)


@pytest.mark.parametrize("sync", ["os", "always"])
def test_where_pages_are_made_writable_first(path: str, in_child: RunInChild, monkeypatch: pytest.MonkeyPatch,
                                             copying: None, sync: str) -> None:
    """Growth, rotation, deletes, syncs, `clear`, all ways to open: nothing else than without."""
    count = 10_000 if sync == "os" else 300
    pairs = {b"key %d" % number: b"%d" % number * 10 for number in range(count)}
    with logkv.open(path, segment_size=SEGMENT, sync=sync) as db:       # type: ignore[arg-type]
        db.update(FIRST if sync == "os" else {})
        db.clear()
        db.update(pairs)
        db.update(dict.fromkeys(list(pairs)[::2], b"again"))
        for key in list(pairs)[::3]:
            del db[key]
        expected = {key: b"again" if number % 2 == 0 else value
                    for number, (key, value) in enumerate(pairs.items()) if number % 3}
        assert dict(db.items()) == expected
        db.sync()
    assert how(path) == "clean"
    check(path, expected)
    killed(path, in_child, THEN)
    assert how(path) == "trusted"
    os.unlink(os.path.join(path, "index"))
    assert how(path) == "rebuilt"
    check(path, expected | THEN)


@pytest.mark.parametrize("copying", ["little is left"], indirect=True)
@pytest.mark.parametrize(("name", "size"), [("control", 0), ("0000000001.seg", 4096)])
@pytest.mark.parametrize("room_again", [True, False])
def test_a_change_that_finds_no_room_changes_nothing(path: str, in_child: RunInChild, copying: None, name: str, size: int,
                                                     room_again: bool) -> None:
    """Behind the end of its file a page has no room either: a store there is a SIGBUS, as on a full disk that
    copies on write."""
    file, long, before = Path(path, name), bytes(8192), {b"a": b"1", b"b": b"2"}

    def child() -> None:
        db = logkv.open(path)
        db.update(before)
        whole = file.read_bytes()
        os.truncate(file, size)
        changes = [lambda: db.put("a", long), lambda: db.put("c", long)]
        for change in [*changes, lambda: db.delete("b")] if name == "control" else changes:
            with pytest.raises(logkv.Error) as caught:
                change()
            assert caught.value.errno == errno.ENOSPC
            assert dict(db.items()) == before and len(db) == 2
        db.sync()
        with file.open("ab") as end:
            end.write(whole[size:])
        if room_again:
            for change in changes:
                change()
            db.delete("b")
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(child) == -signal.SIGKILL
    with logkv.open(path, "w") as db:
        recovery = db.stats()["recovery"]
        assert recovery["index"] == "trusted" and recovery["cut_bytes"] == 0
        assert dict(db.items()) == ({b"a": long, b"c": long} if room_again else before)
    assert logkv.verify(path).ok


# -- other file systems -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", places.SYSTEMS, ids=lambda system: system.name)
def test_other_file_systems(system: places.System, tmp_path: Path) -> None:
    """The everyday cases, and copies that share blocks; `python -m tests.proof.places` fills the disks too."""
    if system.missing:
        pytest.skip(system.missing)
    try:
        with places.mounted(system, str(tmp_path)) as volume:
            for name, case in places.cases(system).items():
                if not name.startswith("full"):
                    assert places.attempt(volume, system, case, 1) == "ok", name
    except subprocess.CalledProcessError as problem:
        if problem.cmd[0] != "mount":
            raise
        pytest.skip("no loop devices here")
