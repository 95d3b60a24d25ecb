"""File systems: ext4, XFS and Btrfs on loop devices, with reflink copies, snapshots, and disks that are full.

A store on each is filled, killed, copied and cloned, and everything that it acknowledged must be there.  On a full disk
a write raises Error with the system's ENOSPC, nothing is lost, and the process lives: a store into a mapped page for which
copy-on-write finds no room would kill it (SIGBUS), and then the report names the file.  Needs root, and loop devices.

    python -m tests.proof.places [--systems ext4 xfs btrfs btrfs-mixed] [--cases WORD...] [--seconds S] [--dir DIR]
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import logkv
from tests.proof.common import Violation, arguments, difference, ended, fork_heard, verdict

IMAGE = 320 << 20               # bytes of a loop device
SEGMENT = 4 << 20
SMALL = 64 << 10
WIDE = 64 << 20                 # no rotation: a store that is copied while open must not change meanwhile
REFUSED = (errno.ENOSPC, errno.EDQUOT)
KEYS = 20_000
ROOM, ROUNDS = 1 << 20, 8       # bytes that come free at a time, and how often
CHANGES = 60                    # of a round on a full disk, where each may take a tenth of a second


class System(NamedTuple):
    """A file system and how it is made."""

    name: str
    make: tuple[str, ...]
    clones: bool = False        # files can share their blocks
    snapshots: bool = False
    promised: bool = True       # what happens on a full one

    @property
    def missing(self) -> str | None:
        """Why it cannot be tried here, or None."""
        if os.geteuid():
            return "needs root"
        if shutil.which(self.make[0]) is None:
            return f"needs {self.make[0]}"
        known = Path("/proc/filesystems").read_text().split()
        return None if self.make[0].rpartition(".")[2] in known else "the kernel does not have it"


SYSTEMS = (
    System("ext4", ("mkfs.ext4", "-q", "-F")),
    System("xfs", ("mkfs.xfs", "-q", "-f", "-m", "reflink=1"), clones=True),
    System("btrfs", ("mkfs.btrfs", "-q", "-f"), clones=True, snapshots=True),
    System("btrfs-mixed", ("mkfs.btrfs", "-q", "-f", "--mixed"), clones=True, snapshots=True, promised=False),
)


@contextmanager
def mounted(system: System, directory: str) -> Iterator[Path]:
    """A new file system, until the end of the block."""
    image, point = os.path.join(directory, system.name + ".img"), Path(directory, system.name)
    with open(image, "wb") as file:
        file.truncate(IMAGE)
    run(*system.make, image)
    point.mkdir()
    run("mount", "-o", "loop", image, str(point))
    try:
        yield point
    finally:
        run("umount", str(point))
        os.unlink(image)


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def fill(volume: Path) -> None:
    """Takes what the file system has left, to the last block."""
    with open(volume / "ballast", "wb") as file:
        at, piece = 0, 64 << 20
        while piece >= 4096:
            try:
                os.posix_fallocate(file.fileno(), at, piece)
                at += piece
            except OSError as problem:
                if problem.errno != errno.ENOSPC:
                    raise
                piece //= 2
    for number in range(1000):          # what an allocation leaves, a write may still find
        size = 0
        try:
            with open(volume / f"ballast.{number}", "wb", buffering=0) as file:
                while done := file.write(bytes(4096)):
                    size += done
        except OSError:
            os.sync()
            if not size:
                return


def give(volume: Path, size: int) -> None:
    """Gives so many bytes back."""
    ballast = volume / "ballast"
    os.truncate(ballast, ballast.stat().st_size - size)
    os.sync()


def free(volume: Path) -> None:
    for file in volume.glob("ballast*"):
        file.unlink()
    os.sync()


# -- a child that says what killed it ---------------------------------------------------------------------------


class _Action(ctypes.Structure):
    _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_uint8 * 128), ("flags", ctypes.c_int),
                ("restorer", ctypes.c_void_p)]


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_SA_SIGINFO, _ADDRESS_AT = 4, 16        # in siginfo_t, of 64-bit Linux


def file_mapped_at(address: int) -> str:
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, _, _, _, _, *name = line.split()
            low, high = (int(end, 16) for end in span.split("-"))
            if low <= address < high:
                return os.path.basename(name[0]) if name else "memory"
    return "nowhere"


def report_bus_errors(say: int, doing: Callable[[], str]) -> object:
    """From here on a SIGBUS is said, with the file that was mapped there; keep what is returned."""

    @_Handler   # type: ignore[untyped-decorator]
    def handle(number: int, info: int, context: int) -> None:
        address = ctypes.cast(info + _ADDRESS_AT, ctypes.POINTER(ctypes.c_uint64))[0]
        os.write(say, f"SIGBUS: {file_mapped_at(address)}, {doing()}".encode())
        os._exit(0)

    action = _Action(handler=ctypes.cast(handle, ctypes.c_void_p), flags=_SA_SIGINFO)
    if ctypes.CDLL(None).sigaction(signal.SIGBUS, ctypes.byref(action), None):
        raise OSError("no handler for SIGBUS")
    return handle


# -- cases ------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """A store on a volume, beside a dict of what it acknowledged."""

    volume: Path
    seconds: float
    name: str = "store"
    model: dict[bytes, bytes] = field(default_factory=dict)
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    doing: str = "beginning"
    refused: int = 0

    @property
    def path(self) -> str:
        return str(self.volume / "trial" / self.name)

    def twin(self, name: str) -> Trial:
        """What is copied now, at another place of the volume."""
        return Trial(self.volume, self.seconds, name, dict(self.model))

    def open(self, **options: Any) -> logkv.Store[bytes]:
        return logkv.open(self.path, **{"segment_size": SEGMENT} | options)

    def put(self, db: logkv.Store[bytes], key: bytes, value: bytes) -> None:
        db[key] = value
        self.model[key] = value

    def remove(self, db: logkv.Store[bytes], key: bytes) -> None:
        db.delete(key)
        self.model.pop(key, None)

    def fill(self, db: logkv.Store[bytes], keys: int = KEYS) -> None:
        self.doing = "put"
        for number in range(keys):
            self.put(db, b"key %d" % number, self.value())

    def value(self) -> bytes:
        return self.rng.randbytes(self.rng.randrange(600))

    def tried(self, db: logkv.Store[bytes] | None, what: str, work: Callable[[], object]) -> bool:
        """Does what a full disk may refuse; whether it was done."""
        self.doing = what
        try:
            work()
        except logkv.Error as problem:
            self.refused += 1
            poisoned = db is not None and not db.closed and db.stats()["poisoned"]
            if problem.errno not in REFUSED and not poisoned:
                raise Violation(f"{what} on a full disk raised {problem!r}, not ENOSPC") from problem
            return False
        return True

    def check(self, store: logkv.Store[bytes] | logkv.Reader[bytes], when: str) -> None:
        self.doing = f"read, {when}"
        found = dict(store.items())
        if found != self.model or len(store) != len(self.model):
            raise Violation(f"{when}: {difference(found, self.model)}, length {len(store)} of {len(self.model)}")

    def check_closed(self, when: str) -> None:
        """Opened for reading, then for writing, with room; the whole log is verified."""
        with logkv.Reader(self.path) as reader:
            self.check(reader, f"{when}, for reading")
        with self.open() as db:
            self.check(db, f"{when}, for writing")
            self.put(db, b"one more", b"1")
        report = logkv.verify(self.path)
        if not report.ok:
            raise Violation(f"{when}: {report.problems[0]}")


def clone(trial: Trial, name: str) -> Trial:
    """A copy that shares its blocks."""
    for file in Path(trial.path).glob("**/*"):
        target = Path(trial.path).parent / name / file.relative_to(trial.path)
        target.parent.mkdir(exist_ok=True)
        if file.is_file() and file.name != "MANIFEST.tmp":
            run("cp", "--reflink=always", str(file), str(target))
    return trial.twin(name)


def snapshot(trial: Trial, name: str) -> Trial:
    os.sync()                           # a snapshot has what the system has written back
    run("btrfs", "subvolume", "snapshot", str(trial.volume / "trial"), str(trial.volume / name))
    return trial.twin(f"../{name}/store")


def everyday(trial: Trial) -> None:
    """Filled, overwritten, rotated, deleted from, closed, opened."""
    with trial.open() as db:
        trial.fill(db)
        trial.fill(db)
        for number in range(0, KEYS, 3):
            trial.remove(db, b"key %d" % number)
        trial.check(db, "before it was closed")
    trial.check_closed("after it was closed")


def killed(trial: Trial) -> None:
    """A writer that is killed, three times."""
    for turn in range(3):
        rows = [(b"%d/%d" % (turn, number), trial.value()) for number in range(5000)]

        def write(say: int) -> None:
            db = trial.open()
            for key, value in rows:
                db[key] = value
                os.write(say, b"+")

        pid, heard = fork_heard(write)
        done = 0
        while done < 2000:
            done += len(os.read(heard, 500))
        os.kill(pid, signal.SIGKILL)
        while rest := os.read(heard, 4096):
            done += len(rest)
        os.close(heard)
        ended(pid)
        trial.model.update(rows[:done])
        with trial.open() as db:        # a record that no reader sees yet may be whole
            if done < len(rows) and rows[done][0] in db:        # written, not yet acknowledged
                trial.model.update(rows[done:done + 1])
        trial.check_closed("after a kill")


def cloned_closed(trial: Trial, copy: Callable[[Trial, str], Trial] = clone) -> None:
    """Both sides of a copy that shares blocks are written."""
    with trial.open() as db:
        trial.fill(db)
    both = trial, copy(trial, "clone")
    for side in both:
        with side.open() as db:
            side.fill(db, KEYS // 4)
    for side in both:
        side.check_closed("after both sides were written")


def cloned_open(trial: Trial, copy: Callable[[Trial, str], Trial] = clone) -> None:
    """The copy is made of a store that is open and goes on."""
    with trial.open(segment_size=WIDE) as db:
        trial.fill(db)
        twin = copy(trial, "clone")
        trial.fill(db, KEYS // 4)
        with twin.open() as other:
            twin.fill(other, KEYS // 4)
        trial.check(db, "after its copy was written")
    trial.check_closed("after its copy was written")
    twin.check_closed("the copy")


def snapshot_open(trial: Trial) -> None:
    """A snapshot of an open store, and writes to both."""
    cloned_open(trial, snapshot)


def exercise(trial: Trial, db: logkv.Store[bytes]) -> None:
    """On a full disk: writes until they are refused, overwrites, deletes, syncs, and what was acknowledged is there."""
    number = 0
    for _ in range(3):
        size = 1000
        while trial.tried(db, "put", lambda: trial.put(db, b"new %d" % number, bytes(size))):
            number += 1
            size = min(2 * size, SEGMENT // 8)
        keys = trial.rng.sample(sorted(trial.model), CHANGES)
        for key in keys[:CHANGES // 2]:
            trial.tried(db, "overwrite", lambda: trial.put(db, key, trial.value()))
        for key in keys[CHANGES // 2:]:
            trial.tried(db, "delete", lambda: trial.remove(db, key))
        trial.check(db, "on a full disk")
        trial.tried(db, "sync", db.sync)
        with logkv.Reader(trial.path) as reader:
            trial.check(reader, "on a full disk, by a reader")


def end_full(trial: Trial, db: logkv.Store[bytes]) -> None:
    """Closed on the full disk, opened there, and opened when there is room again."""
    trial.tried(None, "close", db.close)
    with logkv.Reader(trial.path) as reader:
        trial.check(reader, "closed on a full disk")
    opened: list[logkv.Store[bytes]] = []
    if trial.tried(None, "open", lambda: opened.append(trial.open())):
        exercise(trial, opened[0])
        trial.tried(None, "close again", opened[0].close)
    if not trial.refused:
        raise Violation("the disk was not full")
    free(trial.volume)
    trial.check_closed("with room again")


def full(trial: Trial, synced: bool = False, copy: Callable[[Trial, str], Trial] | None = None, **options: Any) -> None:
    db = trial.open(**options)
    trial.fill(db)
    if synced:
        db.sync()
    twin = copy(trial, "clone") if copy else None
    fill(trial.volume)
    exercise(trial, db)
    end_full(trial, db)
    if twin is not None:
        twin.check_closed("the copy")


def full_fresh(trial: Trial) -> None:
    """The disk fills up while the store is written."""
    full(trial)


def full_synced(trial: Trial) -> None:
    """All pages were written back before: copy-on-write needs new blocks for each."""
    full(trial, synced=True)


def full_always(trial: Trial) -> None:
    """Every write is synced."""
    db = trial.open(sync="always")
    trial.fill(db, 200)
    fill(trial.volume)
    exercise(trial, db)
    end_full(trial, db)


def full_cloned_open(trial: Trial) -> None:
    """A copy shares the blocks of the open store."""
    full(trial, synced=True, copy=clone, segment_size=WIDE)


def full_snapshot_open(trial: Trial) -> None:
    """A snapshot shares the blocks of the open store."""
    full(trial, synced=True, copy=snapshot, segment_size=WIDE)


def full_cloned_closed(trial: Trial) -> None:
    """A copy shares the blocks of the store, which is opened on the full disk."""
    with trial.open() as db:
        trial.fill(db)
    twin = clone(trial, "clone")
    fill(trial.volume)
    opened: list[logkv.Store[bytes]] = []
    if trial.tried(None, "open", lambda: opened.append(trial.open())):
        exercise(trial, opened[0])
        end_full(trial, opened[0])
    else:
        free(trial.volume)
        trial.check_closed("with room again")
    twin.check_closed("the copy")


def inching(trial: Trial, value: Callable[[], bytes], copying: bool = False, **options: Any) -> None:
    """A little room at a time, each of which is written full."""
    db = trial.open(**options)
    trial.fill(db, 5000)
    db.sync()
    twin = clone(trial, "clone") if copying else None
    fill(trial.volume)
    number = 0
    for _ in range(ROUNDS):
        give(trial.volume, ROOM)
        before = number
        while number < before + 20_000 and trial.tried(db, "put", lambda: trial.put(db, b"inch %d" % number, value())):
            number += 1
        trial.check(db, "with a little room again")
        trial.tried(db, "sync", db.sync)
    if not number:
        raise Violation("there was never room")
    end_full(trial, db)
    if twin is not None:
        twin.check_closed("the copy")


def full_growth(trial: Trial, copying: bool = False) -> None:
    """Small records, for which the index grows."""
    inching(trial, lambda: b"", copying, segment_size=WIDE)


def full_cloned_growth(trial: Trial) -> None:
    """A copy shares the blocks of the index that grows."""
    full_growth(trial, True)


def full_rotation(trial: Trial) -> None:
    """Small segments, which are full and sealed all the time."""
    inching(trial, trial.value, segment_size=SMALL)


def full_cleared(trial: Trial, copying: bool = False) -> None:
    """Emptied on the full disk: wholly, or not at all."""
    db = trial.open(segment_size=WIDE)
    trial.fill(db)
    db.sync()
    twin = clone(trial, "clone") if copying else None
    fill(trial.volume)
    if not trial.tried(db, "clear", db.clear):
        trial.check(db, "which could not be emptied")
        exercise(trial, db)
        give(trial.volume, ROOM)
        trial.doing = "clear, with a little room again"
        db.clear()
    trial.model.clear()
    trial.check(db, "when it was emptied")
    trial.fill(db, 2 * CHANGES)
    fill(trial.volume)
    exercise(trial, db)
    end_full(trial, db)
    if twin is not None:
        twin.check_closed("the copy")


def full_cloned_cleared(trial: Trial) -> None:
    """A copy shares the blocks of the store that is emptied."""
    full_cleared(trial, True)


def full_under_syncs(trial: Trial) -> None:
    """Another thread syncs all the time, so that pages which were ready a moment ago must be copied again.  A little room
    comes whenever all is refused: what is refused stores nothing, and would prove nothing."""
    db = trial.open()
    trial.fill(db)
    db.sync()
    fill(trial.volume)
    stop = threading.Event()

    def sync() -> None:
        fds = [os.open(file, os.O_RDONLY) for file in Path(trial.path).iterdir()]
        while not stop.is_set():
            for fd in fds:
                os.fdatasync(fd)
        for fd in fds:
            os.close(fd)

    thread = threading.Thread(target=sync)
    thread.start()
    try:
        until = time.monotonic() + trial.seconds
        keys = sorted(trial.model)
        done = refused = 0
        while time.monotonic() < until:
            key = trial.rng.choice(keys)
            if trial.tried(db, "overwrite", lambda: trial.put(db, key, trial.value())):
                done, refused = done + 1, 0
            else:
                refused += 1
                if refused == CHANGES and (trial.volume / "ballast").stat().st_size > ROOM:
                    give(trial.volume, ROOM)
                    refused = 0
    finally:
        stop.set()
        thread.join()
    if not done or not trial.refused:
        raise Violation(f"{done} writes were done under syncs and {trial.refused} refused: nothing was tried")
    trial.check(db, "on a full disk")
    fill(trial.volume)
    end_full(trial, db)


CASES: dict[str, Callable[[Trial], None]] = {
    "everyday": everyday, "killed": killed, "full, fresh": full_fresh, "full, synced": full_synced,
    "full, sync always": full_always, "full, under syncs": full_under_syncs, "full, growth": full_growth,
    "full, rotation": full_rotation, "full, cleared": full_cleared,
}
CLONES: dict[str, Callable[[Trial], None]] = {
    "cloned, closed": cloned_closed, "cloned, open": cloned_open, "full, cloned, open": full_cloned_open,
    "full, cloned, closed": full_cloned_closed, "full, cloned, growth": full_cloned_growth,
    "full, cloned, cleared": full_cloned_cleared,
}
SNAPSHOTS: dict[str, Callable[[Trial], None]] = {
    "snapshot, open": snapshot_open, "full, snapshot, open": full_snapshot_open,
}


def cases(system: System) -> dict[str, Callable[[Trial], None]]:
    return CASES | (CLONES if system.clones else {}) | (SNAPSHOTS if system.snapshots else {})


def attempt(volume: Path, system: System, case: Callable[[Trial], None], seconds: float) -> str:
    """Runs a case in a child: "ok", or what was wrong."""
    trial = Trial(volume, seconds)
    if system.snapshots:
        run("btrfs", "subvolume", "create", str(volume / "trial"))
    else:
        (volume / "trial").mkdir()

    def body(say: int) -> None:
        kept = report_bus_errors(say, lambda: trial.doing)
        try:
            case(trial)
            os.write(say, b"ok")
        except Exception as problem:
            os.write(say, f"{type(problem).__name__} while {trial.doing}: {problem}".encode())
        del kept

    pid, heard = fork_heard(body)
    with open(heard) as pipe:
        said = pipe.read()
    status = ended(pid)
    free(volume)
    if status:
        said = f"{said} (ended with status {status})".lstrip()
    if said != "ok" and os.path.exists(os.path.join(trial.path, "MANIFEST")):
        report = logkv.verify(trial.path)
        said += "; afterwards the store is " + ("whole" if report.ok else f"damaged: {report.problems[0]}")
    for entry in volume.iterdir():
        if system.snapshots and entry.is_dir():
            run("btrfs", "subvolume", "delete", str(entry))
        elif entry.name == "trial":
            shutil.rmtree(entry)
    return said


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = arguments("stores on ext4, XFS and Btrfs, also full ones")
    parser.add_argument("--systems", nargs="+", choices=[system.name for system in SYSTEMS], metavar="NAME",
                        default=[system.name for system in SYSTEMS if system.promised])
    parser.add_argument("--cases", nargs="+", default=[""], metavar="WORD", help="only cases that have one of these words")
    parser.add_argument("--seconds", type=float, default=3, help="of the case under syncs")
    wanted = parser.parse_args(arguments_given)
    wrong = []
    print(f"{'file system':<12}{'case':<24}result")
    with tempfile.TemporaryDirectory(dir=wanted.dir) as directory:
        for system in SYSTEMS:
            if system.name not in wanted.systems:
                continue
            if system.missing:
                print(f"{system.name:<12}{'':<24}not tried: {system.missing}")
                continue
            with mounted(system, directory) as volume:
                for name, case in cases(system).items():
                    if any(word in name for word in wanted.cases):
                        said = attempt(volume, system, case, wanted.seconds)
                        print(f"{system.name:<12}{name:<24}{said}", flush=True)
                        if said != "ok":
                            wrong.append(f"{system.name}, {name}: {said}")
    return verdict(wrong)


if __name__ == "__main__":
    sys.exit(main())
