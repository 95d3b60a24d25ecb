"""Power cuts: every state that one could leave, recovered and compared with the history.

A workload runs once against the real engine while a `Recorder` notes, in order, what reaches the files: each system
call that changes or syncs something, and each page that a store through a mapping changed (those are no calls, so all
files are read back at every call and at both ends of every operation).  `Disk` replays these events: what was synced
is durable, all else is pending.  A `State` is the durable part and any pending changes: pages in any order, as of any
moment, cut at any sector; sizes without data; names in part.  `Explorer` writes states into a directory, opens them
with the real engine and demands that

* what is recovered is what some prefix of the history left, not shorter than what was acknowledged as durable, not
  longer than what was begun (P1, P3, P4, P9);
* what is appended then is there when the store is opened again, and nothing else (P5, P10);
* a power cut during that recovery loses nothing more: its own states are explored in the same way (P13).

    python -m tests.proof.crash --states 100000
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import stat
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from benchmarks.baseline import BaselineStore
from logkv import files, manifest, store, writer
from logkv.writer import Options

PAGE = 4096
SECTOR = 512
SEGMENT = 64 << 10              # the smallest segment: it rotates often
ZEROS = bytes(PAGE)
SIZE = -1                       # in place of a page's number: the file's size
BOOT = slice(32, 48)            # where the control page names the boot
FOREIGN_BOOT = b"yet another boot"
DEPTH = 2                       # power cuts during the recovery from one, during the recovery from that
NESTED_LIMIT = 24               # states of one recovery
DERIVED = {files.LOCK, files.CONTROL, files.INDEX, files.INDEX_NEXT}     # files that the log does not need


# -- what happened ------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Changed:
    """A file's content is another, by a call or through a mapping."""

    file: int
    size: int
    pages: dict[int, bytes]


@dataclass(frozen=True, slots=True)
class Named:
    """A name went, came, or changed: unlink has no `new`, create has no `old`."""

    file: int
    old: str | None
    new: str | None


@dataclass(frozen=True, slots=True)
class Synced:
    """A file's content, or the directory's names (None), are on the device."""

    file: int | None


@dataclass(frozen=True, slots=True)
class Begun:
    """The operation with this index began: its effect may be there from here on."""

    index: int


@dataclass(frozen=True, slots=True)
class Durable:
    """Everything up to this operation was acknowledged as durable; 0: the store was."""

    index: int


Event = Changed | Named | Synced | Begun | Durable


class _Calls:
    """`os`, as `logkv.files` sees it while it is recorded."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if dir_fd is None or not flags & os.O_CREAT:
            return os.open(path, flags, mode, dir_fd=dir_fd)
        with self._recorder.call():
            fd = os.open(path, flags, mode, dir_fd=dir_fd)
            self._recorder.found(path)
            return fd

    def rename(self, old: str, new: str, **directories: int) -> None:
        with self._recorder.call() as recorder:
            os.rename(old, new, **directories)
            file = recorder.names.pop(old)
            recorder.names[new] = file
            recorder.events.append(Named(file, old, new))

    def unlink(self, name: str, *, dir_fd: int) -> None:
        with self._recorder.call() as recorder:
            os.unlink(name, dir_fd=dir_fd)
            recorder.events.append(Named(recorder.names.pop(name), name, None))

    def link(self, old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        with self._recorder.call() as recorder:
            os.link(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            recorder.found(new)

    def fdatasync(self, fd: int) -> None:
        self.fsync(fd)

    def fsync(self, fd: int) -> None:
        with self._recorder.call() as recorder:     # no need to really do it
            status = os.fstat(fd)
            if not stat.S_ISDIR(status.st_mode):
                recorder.events.append(Synced(recorder.inodes[status.st_ino]))
            elif status.st_ino == recorder.inode:
                recorder.events.append(Synced(None))

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        with self._recorder.call():
            return os.pwrite(fd, data, offset)

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        with self._recorder.call():
            os.posix_fallocate(fd, offset, length)

    def ftruncate(self, fd: int, length: int) -> None:
        with self._recorder.call():
            os.ftruncate(fd, length)


class Recorder:
    """Notes what happens to one store's files, while it is entered.  Files are known by their inodes, not names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inode = path.stat().st_ino
        self.events: list[Event] = []
        self.names: dict[str, int] = {}
        self.inodes: dict[int, int] = {}
        self.meanwhile: Callable[[], None] | None = None    # what another thread does at every call
        self._fds: list[int] = []               # an inode that is held open is not given out again
        self._contents: list[bytes] = []

    def __enter__(self) -> Self:
        """What is there already is durable."""
        for found in sorted(self.path.rglob("*")):
            if found.is_file():
                self.found(str(found.relative_to(self.path)))
        self.notice()
        self.events += [Synced(file) for file in self.inodes.values()] + [Synced(None)]
        self.start = len(self.events)           # here begins what is recorded
        files.os = _Calls(self)                 # type: ignore[assignment, attr-defined]
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        files.os = os                           # type: ignore[attr-defined]
        for fd in self._fds:
            os.close(fd)

    @contextmanager
    def call(self) -> Iterator[Recorder]:
        """Around a system call: what was stored before it comes before it.  Then another thread may come in."""
        self.notice()
        yield self
        self.notice()
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
            self.meanwhile = meanwhile

    def found(self, name: str) -> None:
        """A file has this name; noted if that is new."""
        if name in self.names:
            return
        fd = os.open(self.path / name, os.O_RDONLY)
        inode = os.fstat(fd).st_ino
        if inode in self.inodes:
            os.close(fd)
        else:
            self.inodes[inode] = len(self._fds)
            self._fds.append(fd)
            self._contents.append(b"")
        self.names[name] = self.inodes[inode]
        self.events.append(Named(self.names[name], None, name))

    def notice(self) -> None:
        """Finds the pages that changed since the last time."""
        for file, fd in enumerate(self._fds):
            before = self._contents[file]
            size = os.fstat(fd).st_size
            after = os.pread(fd, size, 0)
            if before == after:
                continue
            pages = {}
            for at in range(0, size, PAGE):
                page, old = after[at:at + PAGE], before[at:at + PAGE]
                if page != old and (old or any(page)):      # what is new and zero is the size's doing
                    pages[at // PAGE] = page.ljust(PAGE, b"\0")
            self.events.append(Changed(file, size, pages))
            self._contents[file] = after

    def note(self, event: Begun | Durable) -> None:
        """An operation begins or was acknowledged."""
        self.notice()
        self.events.append(event)


# -- what a power cut could leave ---------------------------------------------------------------------------------

Key = TypeVar("Key")
Change = TypeVar("Change")
Image = tuple[int, tuple[bytes, ...]]           # of a file: its size, its pages


def choose(pending: Sequence[tuple[Key, Change]], dice: random.Random) -> tuple[str, list[tuple[Key, Change]]]:
    """Some of the pending changes, in their order, and how they were chosen; a key is what reaches the device alone."""
    how = dice.choice(("prefix", "without", "only", "earlier", "mixed"))
    if how == "prefix":
        stop = dice.randint(0, len(pending))
        return f"the first {stop} of {len(pending)}", list(pending[:stop])
    if how == "mixed":
        stops = {key: dice.randint(0, len(pending)) for key in dict(pending)}
        return "a mix of moments", [change for at, change in enumerate(pending) if at < stops[change[0]]]
    one = dice.choice(list(dict(pending)))
    if how == "without":
        return f"all without {one}", [change for change in pending if change[0] != one]
    if how == "only":
        return f"only {one}", [change for change in pending if change[0] == one]
    stop = dice.randint(0, len(pending))
    return f"all, {one} of an earlier moment", [c for at, c in enumerate(pending) if c[0] != one or at < stop]


@dataclass(slots=True)
class File:
    """Durable bytes and what is pending since: pages and sizes in the order of time."""

    name: str
    size: int = 0
    last_size: int = 0
    pages: dict[int, bytes] = field(default_factory=dict)
    pending: list[tuple[int, Any]] = field(default_factory=list)

    def change(self, event: Changed) -> None:
        if event.size != self.last_size:
            self.last_size = event.size
            self.pending.append((SIZE, event.size))
        self.pending += event.pages.items()

    def sync(self) -> None:
        self.pages.update(self.pending)
        self.size = self.pages.pop(SIZE, self.size)     # type: ignore[assignment]
        self.pending.clear()

    def image(self, chosen: list[tuple[int, Any]], size: int | None = None) -> Image:
        """The file with these changes."""
        latest = dict(chosen)
        chosen_size = latest.pop(SIZE, self.size)
        size = chosen_size if size is None else size
        pages = {**self.pages, **latest}
        return size, tuple([pages.get(at, ZEROS) for at in range(-(-size // PAGE))])

    def draw(self, dice: random.Random) -> tuple[str, Image]:
        """Some of the changes; perhaps the size without the data, or a page of which only some sectors were written."""
        how, chosen = choose(self.pending, dice)
        size, pages = self.image(chosen, dice.choice((None, self.last_size)))
        written = [at for at in dict(self.pending) if at != SIZE and at < len(pages)]
        if written and dice.random() < 0.4:
            at = dice.choice(written)
            versions = [self.pages.get(at, ZEROS)] + [change for page, change in self.pending if page == at]
            new, old = pages[at], dice.choice(versions)
            sector = dice.randrange(PAGE // SECTOR) * SECTOR
            torn = dice.choice((new[:sector] + old[sector:], old[:sector] + new[sector:],
                                new[:sector] + old[sector:sector + SECTOR] + new[sector + SECTOR:]))
            pages = pages[:at] + (torn,) + pages[at + 1:]
            how += f", page {at} torn at sector {sector // SECTOR}"
        return how, (size, pages)


@dataclass(frozen=True, slots=True)
class State:
    """One directory that a power cut could leave."""

    images: dict[str, Image]
    how: str

    @property
    def key(self) -> int:
        """Equal for equal content."""
        return hash(frozenset(self.images.items()))

    def write(self, path: str) -> None:
        """Fills a directory, as the next boot finds it."""
        for name, (size, pages) in self.images.items():
            data = b"".join(pages)[:size].rstrip(b"\0")
            if name == files.CONTROL and any(data):
                data = data[:BOOT.start].ljust(BOOT.start, b"\0") + FOREIGN_BOOT + data[BOOT.stop:]
            if "/" in name:
                os.makedirs(os.path.dirname(f"{path}/{name}"), exist_ok=True)
            fd = os.open(f"{path}/{name}", os.O_WRONLY | os.O_CREAT)
            os.write(fd, data)
            if len(data) < size:
                os.ftruncate(fd, size)
            os.close(fd)


class Disk:
    """Replays events: what is durable and what is pending after each."""

    def __init__(self) -> None:
        self.files: dict[int, File] = {}
        self.names: dict[str, int] = {}
        self.pending: list[tuple[Named, Named]] = []    # keyed by itself: each reaches the device alone

    def apply(self, event: Event) -> None:
        if isinstance(event, Changed):
            self.files[event.file].change(event)
        elif isinstance(event, Named):
            if event.new is not None and event.file not in self.files:
                self.files[event.file] = File(event.new)
            self.pending.append((event, event))
        elif isinstance(event, Synced) and event.file is not None:
            self.files[event.file].sync()
        elif isinstance(event, Synced):
            self.names = self._named(self.pending)
            self.pending.clear()

    def _named(self, chosen: list[tuple[Named, Named]]) -> dict[str, int]:
        """The names with these changes.  A rename is whole: it brings the file along even if its creation is lost."""
        names = dict(self.names)
        for _, change in chosen:
            if change.old is not None and names.get(change.old) == change.file:
                del names[change.old]
            if change.new is not None:
                names[change.new] = change.file
        return names

    def draw(self, dice: random.Random) -> State:
        """Nothing of what is pending, or all, or one thing in part, or everything in part.

        What the log does not need is mostly there as a whole or not at all: it must not matter.
        """
        mood = dice.choice(("nothing", "everything", "one", "one", "one", "each", "each"))
        rest = mood if mood in ("nothing", "everything") else dice.choice(("nothing", "everything"))
        changing: list[int | None] = [f for f, file in self.files.items() if file.pending and file.name not in DERIVED]
        if self.pending:
            changing.append(None)
        one = dice.choice(changing) if mood == "one" and changing else -1
        if mood == "one" and self.pending and dice.random() < 0.3:
            one = None
        how = [rest]
        if self.pending and (mood == "each" or one is None):
            what, chosen = choose(self.pending, dice)
            names = self._named(chosen)
            how.append(f"names: {what}")
        else:
            names = self._named(self.pending) if rest == "everything" else self.names
        images = {}
        for name, number in names.items():
            file = self.files[number]
            in_part = mood == "each" and (file.name not in DERIVED or file.name != files.LOCK and dice.random() < 0.2)
            if file.pending and (number == one or in_part):
                what, images[name] = file.draw(dice)
                how.append(f"{name}: {what}")
            elif file.name in DERIVED and mood != "nothing" and file.name != files.LOCK:
                images[name] = file.image(dice.choice((file.pending, [])))
            else:
                images[name] = file.image(file.pending if rest == "everything" else [])
        return State(images, "; ".join(how))


# -- what should be there -----------------------------------------------------------------------------------------

class History:
    """The operations in their order.  State i is what the first i of them left on top of `base`."""

    def __init__(self, base: dict[bytes, bytes]) -> None:
        self.base = base
        self._operations: list[tuple[bytes, bytes | None] | None] = []
        self._now = dict(base)
        self._digest = digest(base)
        self._indices: dict[int, list[int]] = defaultdict(list, {self._digest: [0]})

    def __len__(self) -> int:
        return len(self._operations)

    def add(self, key: bytes | None, value: bytes | None = None) -> int:
        """A put, a delete (no value), a clear (no key); returns the index of the state that it leads to."""
        if key is None:
            self._now.clear()
            self._digest = 0
        else:
            before = self._now.pop(key, None)
            if before is not None:
                self._digest ^= hash((key, before))
            if value is not None:
                self._now[key] = value
                self._digest ^= hash((key, value))
        self._operations.append(None if key is None else (key, value))
        self._indices[self._digest].append(len(self))
        return len(self)

    def find(self, content: dict[bytes, bytes]) -> list[int]:
        """The states that are exactly this."""
        return self._indices.get(digest(content), [])

    def state(self, index: int) -> dict[bytes, bytes]:
        """What the first operations left."""
        content = dict(self.base)
        for operation in self._operations[:index]:
            if operation is None:
                content.clear()
            elif operation[1] is None:
                content.pop(operation[0], None)
            else:
                content[operation[0]] = operation[1]
        return content

    @property
    def now(self) -> dict[bytes, bytes]:
        return self._now


def digest(content: dict[bytes, bytes]) -> int:
    """Equal for equal content, and quick to change with it."""
    value = 0
    for pair in content.items():
        value ^= hash(pair)
    return value


def difference(found: dict[bytes, bytes], expected: dict[bytes, bytes]) -> str:
    """In a few words."""
    def some(keys: set[bytes]) -> str:
        return f"{len(keys)} ({', '.join(sorted(repr(key)[:20] for key in keys)[:3])})" if keys else "0"

    other = {key for key in found.keys() & expected.keys() if found[key] != expected[key]}
    return (f"missing {some(expected.keys() - found.keys())}, other values {some(other)}, "
            f"too many {some(found.keys() - expected.keys())}")


# -- the store under test -----------------------------------------------------------------------------------------

class Later:
    """In place of `logkv.worker.Worker`: what waits is done between two operations, when the session says so."""

    def __init__(self, engine: writer.Writing) -> None:
        self._waiting: dict[str, Callable[[], None]] = {}

    def call(self, method: Callable[[], None]) -> None:
        self._waiting.setdefault(method.__name__, method)

    def call_later(self, delay: float, method: Callable[[], None]) -> None:
        self.call(method)

    def stop(self) -> None:
        self._waiting.clear()

    def work(self) -> None:
        """Does what is waiting."""
        while self._waiting:
            self._waiting.pop(next(iter(self._waiting)))()


def open_store(path: Path, flag: str, options: Options) -> store.Store:
    """`logkv.open` with these options."""
    handle = store.Store.__new__(store.Store)
    if flag == "r":
        handle._hold(store._acquire_reader(str(path)), str(path))
    else:
        handle._hold(store._acquire_writer(str(path), flag, 0o666, options, 0), str(path))
    return handle


class Session:
    """A store and its history.  What is done to it is told to the recorder before it begins and after it returned."""

    def __init__(self, path: Path, sync: float | str, dice: random.Random, recorder: Recorder | None = None) -> None:
        self.path = path
        self.options = Options(sync=sync, segment_size=SEGMENT)
        self.dice = dice
        self.recorder = recorder
        self.history = History({})
        self.diligence = dice.choice((0.0, 0.05, 0.3, 1.0))     # how soon what waits in the background is done
        self._store: store.Store | None = None

    @property
    def store(self) -> store.Store:
        assert self._store is not None
        return self._store

    @property
    def _engine(self) -> writer.Writing:
        engine = self.store._engine
        assert isinstance(engine, writer.Writing)
        return engine

    def open(self, flag: str = "c") -> None:
        self._store = open_store(self.path, flag, self.options)

    def _note(self, event: Begun | Durable) -> None:
        if self.recorder is not None:
            self.recorder.note(event)

    def begin(self) -> None:
        """What is in the store now is where its history begins, and durable."""
        self.history = History(dict(self.store))
        self._note(Durable(0))

    @property
    def room(self) -> int:
        """Bytes that the active segment has left."""
        return int(self._engine.log.capacity - self._engine.log.position[1])

    def set_clock_back(self) -> None:
        """From here on versions are ahead of the clock and rise by one."""
        log = self._engine.log
        log.settle_state(*log.position, 1 << 62)

    def put(self, key: bytes, size: int) -> None:
        """Stores a value of about that size that was never there before."""
        self._put(key, size)
        self._work()

    def _put(self, key: bytes, size: int) -> None:
        mark = b"%x." % (len(self.history) | self.dice.getrandbits(16) << 16)
        value = mark + self.dice.randbytes(max(0, size - len(mark)))
        self._note(Begun(self.history.add(key, value)))
        self.store.put(key, value)
        self._acknowledge()

    def delete(self, key: bytes) -> None:
        self._note(Begun(self.history.add(key)))
        self.store.delete(key)
        self._acknowledge()
        self._work()

    def clear(self) -> None:
        self._note(Begun(self.history.add(None)))
        self.store.clear()
        self._acknowledge()
        self._work()

    def _acknowledge(self) -> None:
        if self.options.sync == "always":
            self._note(Durable(len(self.history)))
        elif self.recorder is not None:
            self.recorder.notice()

    def sync(self) -> None:
        for _ in range(self.dice.choice((1, 1, 2))):
            covered = len(self.history)
            with self._others():
                self.store.sync()
            self._note(Durable(covered))
        self._work()

    def close(self) -> None:
        self.store.close()
        self._note(Durable(len(self.history)))

    def _work(self) -> None:
        if self.dice.random() < self.diligence:
            with self._others():
                self._engine._worker.work()     # type: ignore[attr-defined]

    @contextmanager
    def _others(self) -> Iterator[None]:
        """While this goes on, other threads put what fits: that takes no lock, so it may come at any call."""
        if self.recorder is not None and self.options.sync != "always":
            self.recorder.meanwhile = self._put_meanwhile
        try:
            yield
        finally:
            if self.recorder is not None:
                self.recorder.meanwhile = None

    def _put_meanwhile(self) -> None:
        log = self._engine.log
        if self.dice.random() < 0.4 and log.position[1] + 200 < log.allocated:
            self._put(b"meanwhile %d" % self.dice.randrange(3), 100)

    def kill(self) -> None:
        """Ends as a killed process does: nothing more is written."""
        engine = self._engine
        for key in [key for key, other in store._engines.items() if other is engine]:
            del store._engines[key]
        self.store._engine = None
        self.store._detach()
        engine.release()

    def abandon(self) -> None:
        """Lets everything go, whatever state it is in."""
        if self._store is not None and self._store._engine is not None:
            with suppress(Exception):
                self._store.close()


# -- workloads ----------------------------------------------------------------------------------------------------

Workload = Callable[[Session, random.Random], None]
WORKLOADS: dict[str, tuple[Workload, float | str]] = {}       # by name, with what `sync=` they are opened


def workload(sync: float | str = "os") -> Callable[[Workload], Workload]:
    """The function's name is the workload's."""
    def enter(function: Workload) -> Workload:
        WORKLOADS[function.__name__] = function, sync
        return function

    return enter


@workload()
def puts(db: Session, dice: random.Random) -> None:
    """New keys, a sync now and then."""
    for n in range(60):
        db.put(b"key %d" % n, dice.randint(1, 300))
        if dice.random() < 0.1:
            db.sync()
    db.close()


@workload()
def overwrites(db: Session, dice: random.Random) -> None:
    """A few keys again and again."""
    for _ in range(80):
        db.put(b"key %d" % dice.randrange(8), dice.randint(1, 600))
        if dice.random() < 0.1:
            db.sync()
    db.close()


@workload()
def equal_sizes(db: Session, dice: random.Random) -> None:
    """A record could stand exactly where another stood."""
    db.set_clock_back()
    size = dice.choice((90, 480, 1200))
    for _ in range(80):
        db.put(b"key %d" % dice.randrange(8), size)
        if dice.random() < 0.05:
            db.sync()
    db.close()


@workload()
def deletes(db: Session, dice: random.Random) -> None:
    """Keys come and go."""
    for _ in range(100):
        key = b"key %d" % dice.randrange(12)
        if dice.random() < 0.5:
            db.delete(key)
        else:
            db.put(key, dice.randint(1, 400))
        if dice.random() < 0.1:
            db.sync()
    db.close()


@workload()
def rotation(db: Session, dice: random.Random) -> None:
    """Segments become full and are sealed."""
    for n in range(250):
        db.put(b"key %d" % dice.randrange(100), dice.randint(700, 1500))
        if dice.random() < 0.05:
            db.delete(b"key %d" % dice.randrange(100))
        if dice.random() < 0.03:
            db.sync()
    db.close()


@workload()
def big_values(db: Session, dice: random.Random) -> None:
    """Values of several pages, with a checksum of their own, some larger than a segment."""
    for _ in range(24):
        size = dice.choice((4000, 4096, 4097, 8192, 12_000, 30_000, 70_000, 150_000))
        db.put(b"key %d" % dice.randrange(6), size + dice.randrange(3))
        if dice.random() < 0.3:
            db.put(b"small", 20)
        if dice.random() < 0.2:
            db.sync()
    db.close()


@workload()
def sync_marks(db: Session, dice: random.Random) -> None:
    """A mark after nearly every put, over page and segment boundaries."""
    for _ in range(80):
        db.put(b"key %d" % dice.randrange(20), dice.choice((50, 500, 2500)))
        if dice.random() < 0.8:
            db.sync()
    db.close()


@workload()
def reopening(db: Session, dice: random.Random) -> None:
    """Closed and opened again, also without a change between."""
    for _ in range(6):
        for _ in range(dice.randrange(10)):
            db.put(b"key %d" % dice.randrange(10), dice.randint(1, 4000))
            if dice.random() < 0.2:
                db.sync()
        db.close()
        db.open()
    db.close()


@workload()
def clearing(db: Session, dice: random.Random) -> None:
    """Emptied, also when there is nothing, and when segments wait to be sealed."""
    for _ in range(5):
        for _ in range(dice.choice((0, 3, 12, 60))):
            db.put(b"key %d" % dice.randrange(30), dice.randint(1, 2500))
        if dice.random() < 0.5:
            db.sync()
        db.clear()
    db.put(b"last", 30)
    db.close()


@workload()
def index_growth(db: Session, dice: random.Random) -> None:
    """More keys than the first shard holds; some go again."""
    for n in range(600):
        db.put(b"%d" % n, 1)
        if dice.random() < 0.02:
            db.delete(b"%d" % dice.randrange(n + 1))
        if dice.random() < 0.005:
            db.sync()
    db.close()


@workload()
def mixed(db: Session, dice: random.Random) -> None:
    """Everything."""
    for _ in range(150):
        key = b"key %d" % dice.randrange(40)
        what = dice.random()
        if what < 0.75:
            db.put(key, dice.choice((10, 100, 1000, 3000, 9000)))
        elif what < 0.90:
            db.delete(key)
        elif what < 0.97:
            db.sync()
        elif what < 0.98:
            db.clear()
        else:
            db.close()
            db.open()
    db.close()


@workload(sync="always")
def synced_writes(db: Session, dice: random.Random) -> None:
    """Every write is acknowledged as durable."""
    for _ in range(60):
        key = b"key %d" % dice.randrange(15)
        if dice.random() < 0.2:
            db.delete(key)
        else:
            db.put(key, dice.choice((20, 200, 2000, 6000)))
    db.close()


@workload(sync=3600.0)
def flushed(db: Session, dice: random.Random) -> None:
    """Synced in the background."""
    for _ in range(120):
        db.put(b"key %d" % dice.randrange(30), dice.choice((20, 200, 2000, 6000)))
    db.close()


# -- the search ---------------------------------------------------------------------------------------------------

@dataclass(slots=True)
class Report:
    """What was checked, and what was wrong."""

    workload: str = ""
    distinct: int = 0                   # states that were recovered
    from_recovery: int = 0              # of these, states of a power cut during a recovery
    recoveries_enumerated: int = 0
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        for name in ("distinct", "from_recovery", "recoveries_enumerated", "seconds", "violations"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a state's recovery came to: which states of the history it is; a problem, whichever they are."""

    indices: list[int]
    content: dict[bytes, bytes] | None = None       # only if it is none of them
    problem: str = ""


class Explorer:
    """Draws states of one recorded run, and of the recoveries from them, and judges each."""

    def __init__(self, root: Path, dice: random.Random, report: Report, *, label: str, keep: Path | None,
                 nested: float, deadline: float) -> None:
        self.root = root
        self.dice = dice
        self.report = report
        self.label = label
        self.keep = keep
        self.nested = nested            # the share of recoveries that are explored themselves
        self.deadline = deadline
        self._seen: set[int] = set()

    def explore(self, recorder: Recorder, history: History, limit: int, *, created: bool, depth: int = 0) -> None:
        """Checks up to `limit` distinct states, drawn at all boundaries alike."""
        known: dict[tuple[int, bool], Outcome] = {}
        share = limit / (2 * sum(weight(event) for event in recorder.events))
        fruitless = 0
        while fruitless < 3:
            before = len(known)
            disk, low, high, exists = Disk(), 0, 0, created
            for at, event in enumerate(recorder.events):
                disk.apply(event)
                if isinstance(event, Begun):
                    high = event.index
                elif isinstance(event, Durable):
                    low, exists = event.index, True
                if at < recorder.start:
                    continue
                draws = weight(event) * share
                for _ in range(int(draws) + (self.dice.random() < draws % 1)):
                    state = disk.draw(self.dice)
                    key = state.key
                    if (key, exists) not in known:
                        if len(known) >= limit or time.monotonic() > self.deadline:
                            return
                        if key not in self._seen:
                            self._seen.add(key)
                            self.report.distinct += 1
                            self.report.from_recovery += depth > 0
                        known[key, exists] = self.recover(state, history, exists, depth)
                    where = f"event {at} of {len(recorder.events)}, depth {depth}"
                    self._judge(state, known[key, exists], history, low, high, where)
            fruitless = 0 if len(known) > before else fruitless + 1

    def _judge(self, state: State, outcome: Outcome, history: History, low: int, high: int, where: str) -> None:
        problem = outcome.problem
        if not problem and outcome.content is not None:
            against = [f"against {at}: {difference(outcome.content, history.state(at))}" for at in (low, high)]
            problem = "it is no state of the history; " + "; ".join(against)
        elif not problem and not any(low <= index <= high for index in outcome.indices):
            problem = f"it is state {outcome.indices}"
        if problem:
            violations = self.report.violations
            violations.append(f"{self.label}, {where}: [{state.how}] expected a state from {low} to {high}: {problem}")
            if self.keep is not None:
                state.write(str(self.keep / f"{self.label.replace(' ', '-')}-{len(violations)}"))

    def recover(self, state: State, history: History, exists: bool, depth: int) -> Outcome:
        """Opens a state, appends to it, opens it again; perhaps explores that as well."""
        path = self.root / str(depth)
        path.mkdir(exist_ok=True)
        try:
            state.write(str(path))
            flag = "w" if exists else "c"
            sync = self.dice.choice(("os", "always", 3600.0))
            if self.dice.random() >= self.nested or depth == DEPTH:
                return self._recover(Session(path, sync, self.dice), flag, history)
            with Recorder(path) as recorder:
                session = Session(path, sync, self.dice, recorder)
                outcome = self._recover(session, flag, history)
            if not outcome.problem:
                self.report.recoveries_enumerated += 1
                self.explore(recorder, session.history, NESTED_LIMIT, created=exists, depth=depth + 1)
            return outcome
        finally:
            empty(str(path))

    def _recover(self, session: Session, flag: str, history: History) -> Outcome:
        step = "open"
        try:
            first = flag == "w" and session.recorder is None and self.dice.random() < 0.06
            seen = self._read(session, self.dice.choice((store.Reader, BaselineStore))) if first else None
            session.open(flag)
            step = "read"
            session.begin()
            found = session.history.base
            indices = history.find(found)
            if seen is not None and seen != found:
                return Outcome(indices, problem=f"a reader had seen something else: {difference(seen, found)}")
            step = "append"
            self._append(session)
            if session.recorder is None and self.dice.random() < 0.6:
                session.kill()
            else:
                session.close()
            step = "open again"
            expected = session.history.now
            if session.recorder is None:
                if self.dice.random() < 0.5:        # or the index is believed
                    os.unlink(session.path / files.CONTROL)
                again = self._read(session, self.dice.choice(12 * (store.Reader, store.Store) + (BaselineStore,)))
                if again != expected:
                    return Outcome(indices, problem=f"opened again: {difference(again, expected)}")
            return Outcome(indices, None if indices else found)
        except Exception as problem:
            return Outcome([], problem=f"cannot {step}: {problem!r}")
        finally:
            session.abandon()

    def _read(self, session: Session, by: type) -> dict[bytes, bytes]:
        """What a reader, the next writer, or a program that has only docs/format.md sees."""
        if by is BaselineStore:
            with BaselineStore(session.path, "r") as baseline:
                return dict(baseline)
        with open_store(session.path, "r" if by is store.Reader else "w", session.options) as db:
            return dict(db)

    def _append(self, db: Session) -> None:
        """Writes a little; or records that end where some ended that were cut off; or up to a segment's last bytes."""
        before = list(db.history.base.items())
        how = self.dice.choice(("little", "alike", "alike", "full")) if before else "little"
        if how == "full":
            db.put(b"appended", max(0, db.room - 48))
        for _ in range(self.dice.choice((0, 1, 1, 2, 2, 3, 5))):
            if how == "alike":
                key, value = self.dice.choice(before)
                db.put(key, len(value))
            else:
                db.put(b"appended %d" % self.dice.randrange(3), self.dice.choice((10, 100, 400, 6000, 20_000)))
        if before and self.dice.random() < 0.2:
            db.delete(self.dice.choice(before)[0])
        if self.dice.random() < 0.3:
            db.sync()


def weight(event: Event) -> int:
    """How closely the moment after it is looked at: around names and syncs more can go wrong than between two puts."""
    return 6 if isinstance(event, Named) else 3 if isinstance(event, Synced) else 1


def empty(path: str) -> None:
    """Removes what is in a directory."""
    with os.scandir(path) as found:
        for entry in found:
            if entry.is_dir():
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)


class _Seeded:
    """`secrets`, as the engine uses it."""

    def __init__(self, dice: random.Random) -> None:
        self.randbits = dice.getrandbits
        self.token_bytes = dice.randbytes


@contextmanager
def determined(dice: random.Random) -> Iterator[None]:
    """All on one thread, and identities, salts and seeds from these dice: a run can be repeated."""
    places: list[tuple[Any, str, Any]] = [(manifest, "secrets", _Seeded(dice)), (writer, "secrets", _Seeded(dice)),
                                          (writer, "Worker", Later)]
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, value in places:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(places, before):
            setattr(module, name, value)


def record(name: str, path: Path, dice: random.Random) -> tuple[Recorder, History]:
    """Runs a workload in an empty directory."""
    run, sync = WORKLOADS[name]
    with Recorder(path) as recorder:
        session = Session(path, sync, dice, recorder)
        try:
            session.open()
            session.begin()
            if dice.random() < 0.5:
                session.set_clock_back()
            run(session, dice)
        finally:
            session.abandon()
    return recorder, session.history


def enumerate_crashes(name: str, *, seed: int = 0, limit: int = 1000, nested: float = 0.01, keep: Path | None = None,
                      seconds: float = 3600) -> Report:
    """Records a workload and checks up to `limit` distinct states that a power cut could leave of it.

    `nested`: the share of recoveries of which the power cuts are explored too.  `keep`: where states that break the
    contract are written to.
    """
    began = time.monotonic()
    report = Report(name)
    dice = random.Random(f"{name} {seed}")
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with determined(dice), tempfile.TemporaryDirectory(dir=memory) as directory:
        root = Path(directory)
        path = root / "recorded"
        path.mkdir()
        recorder, history = record(name, path, dice)
        explorer = Explorer(root, dice, report, label=f"{name} {seed}", keep=keep, nested=nested,
                            deadline=began + seconds)
        explorer.explore(recorder, history, limit, created=False)
    report.seconds = time.monotonic() - began
    return report


def main(arguments: list[str] | None = None) -> int:
    """The command line: all workloads, seed after seed."""
    parser = argparse.ArgumentParser(prog="python -m tests.proof.crash", description="Power cuts, by enumeration.")
    parser.add_argument("--states", type=int, default=20_000, help="distinct states to check")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--workload", choices=sorted(WORKLOADS), help="only this one")
    parser.add_argument("--nested", type=float, default=0.01, help="share of recoveries that are explored too")
    parser.add_argument("--keep", type=Path, help="write states that break the contract here")
    options = parser.parse_args(arguments)
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    names = [options.workload] if options.workload else list(WORKLOADS)
    totals = {name: Report(name) for name in names}
    whole = Report("all")
    began = time.monotonic()
    seed = options.seed
    while whole.distinct < options.states and time.monotonic() - began < options.seconds:
        for name in names:
            left = options.seconds - (time.monotonic() - began)
            limit = min(1000, -(-options.states // len(names)))
            report = enumerate_crashes(name, seed=seed, limit=limit, nested=options.nested, keep=options.keep,
                                       seconds=left)
            totals[name].add(report)
            whole.add(report)
            for violation in report.violations[:5]:
                print(violation, flush=True)
        seed += 1
    print(f"{'workload':<16}{'states':>10}{'of recoveries':>16}{'violations':>12}{'states/s':>10}")
    for report in [*totals.values(), whole]:
        print(f"{report.workload:<16}{report.distinct:>10,}{report.from_recovery:>16,}{len(report.violations):>12,}"
              f"{report.distinct / max(report.seconds, 1e-9):>10,.0f}")
    print(f"seeds {options.seed} to {seed - 1}; {whole.recoveries_enumerated:,} recoveries were explored themselves")
    return 1 if whole.violations else 0


if __name__ == "__main__":
    sys.exit(main())
