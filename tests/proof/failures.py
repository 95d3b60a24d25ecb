"""Every failing system call, every failing allocation: a clear error, nothing damaged, nothing left behind.

A small C library (`shim.c`) stands between a child process and its C library.  Each case is an operation on a small store
of some shape, in which the k-th call of a kind fails, in one of the ways in which that kind can, once or from there on; or
the k-th allocation.  Then the handle, a reader that was attached all the time, a new writer and `verify` must find the
state before the operation or the one after it, and no descriptor, mapping, lock or file may be left.

    python -m tests.proof.failures [--seconds S] [--seed N] [--only REGEX] [--what calls|allocations]
"""

from __future__ import annotations

import copy
import ctypes
import errno
import faulthandler
import gc
import json
import mmap
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import GeneratorType
from typing import Any, NamedTuple

import logkv
from logkv import dbm, files, shelve, store
from logkv.opening import Options
from tests.proof.common import NOISE, SEGMENT, arguments, difference, ended, fork, scratch, verdict
from tests.proof.session import engine_of, merge, open_store, rotate

Model = dict[bytes, bytes]
Act = Callable[[], object]

ONE_CASE = 20           # seconds, after which it hangs
BATCH = 400             # cases of one process
TOGETHER = 32           # allocations that fail one by one before all is looked at

# Without the GIL CPython has an allocator of its own, and takes no other: only system calls can fail there.
ALLOCATOR = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"PYTHONMALLOC": "malloc"}

# -- the shim ----------------------------------------------------------------------------------------------------

ON, CALL, NUMBER, ERROR, EVER, PART, HITS, OWNER, MAPPED, OPEN = range(10)
FIRST_COUNT, WORDS = 16, 64
CALLS = ("open", "read", "write", "sync", "allocate", "truncate", "rename", "unlink", "mkdir", "link", "stat", "lock", "unlock",
         "dup", "mmap", "populate", "statfs", "list", "close", "punch", "thread", "memory")
MEMORY = CALLS.index("memory")
SHORT = 0               # in place of an errno: a part is done, and the call says so

# In which ways a call may fail; none where a failure would be a lie about what is there.
ERRORS = {
    "open": (errno.EACCES, errno.EMFILE, errno.EIO, errno.ENOSPC, errno.EINTR),
    "read": (errno.EIO, errno.EINTR, SHORT),
    "write": (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR, SHORT),
    "sync": (errno.EIO, errno.ENOSPC, errno.EINTR),
    "allocate": (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EINTR),
    "truncate": (errno.EIO, errno.ENOSPC, errno.EINTR),
    "rename": (errno.EIO, errno.ENOSPC, errno.EACCES),
    "unlink": (errno.EIO, errno.EACCES, errno.EROFS),
    "mkdir": (errno.ENOSPC, errno.EACCES, errno.EIO),
    "link": (errno.EIO, errno.EMLINK),
    "stat": (errno.EIO, errno.EACCES, errno.ENOMEM),
    "lock": (errno.ENOLCK, errno.EIO, errno.EAGAIN, errno.EINTR),
    "unlock": (errno.ENOLCK, errno.EIO, errno.EINTR),
    "dup": (errno.EMFILE,),
    "mmap": (errno.ENOMEM, errno.EACCES, errno.EAGAIN),
    "populate": (errno.EFAULT, errno.ENOMEM, errno.EINVAL, errno.EINTR),
    "statfs": (errno.EIO, errno.ENOSYS, errno.EINTR),
    "list": (errno.EIO, errno.ENOMEM),
    "close": (errno.EIO, errno.EINTR, errno.ENOSPC),
    "punch": (errno.EOPNOTSUPP, errno.EIO),
    "thread": (errno.EAGAIN,),
    "memory": (errno.ENOMEM,),
}


def build(directory: str) -> str:
    """Compiles the shim; its path."""
    library = os.path.join(directory, "shim.so")
    source = Path(__file__).with_name("shim.c")
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-o", library, str(source), "-ldl"], check=True)
    return library


class Shim:
    """What was loaded into this process before all else."""

    def __init__(self) -> None:
        loaded = ctypes.CDLL(None)
        self._words = memoryview((ctypes.c_int64 * WORDS).in_dll(loaded, "shim_words")).cast("B").cast("q")
        self._root = (ctypes.c_char * 4096).in_dll(loaded, "shim_root")

    def watch(self, root: str) -> None:
        """Files below this directory count."""
        self._root.value = root.encode() + b"/"

    def arm(self, call: int = -1, number: int = 0, error: int = 0, ever: bool = False) -> None:
        """The k-th call of a kind is to fail, once or from there on, as soon as `run` begins."""
        words = self._words
        for word, value in ((CALL, call), (NUMBER, number), (ERROR, error), (EVER, ever), (PART, error == SHORT), (HITS, 0),
                            (OWNER, threading.get_ident()), *((FIRST_COUNT + i, 0) for i in range(len(CALLS)))):
            words[word] = int(value)

    def run(self, act: Act) -> tuple[object, BaseException | None]:
        """What it returns or raises; nothing fails before or after.  This allocates nothing while something may fail."""
        words, result, problem = self._words, None, None
        [(i, i, i) for i in range(100)]     # CPython keeps some: so a `with` has a tuple for the end that lets its lock go
        words[ON] = 1
        try:
            result = act()
            words[ON] = 0
        except BaseException as raised:
            words[ON] = 0
            problem = raised
        return result, problem

    @property
    def hits(self) -> int:
        return self._words[HITS]

    @property
    def left(self) -> tuple[int, int]:
        """Descriptors on watched files; mappings of these, and pieces of memory that the extension module has mapped."""
        return self._words[OPEN], self._words[MAPPED]

    def counts(self) -> list[int]:
        return list(self._words[FIRST_COUNT:FIRST_COUNT + len(CALLS)])


# -- what is done ------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """An operation in which one call fails.  error: an errno, or SHORT."""

    operation: str
    call: str
    number: int
    error: int
    ever: bool

    def __str__(self) -> str:
        how = "short" if self.error == SHORT else errno.errorcode[self.error]
        return f"{self.operation}: {self.call} {self.number} {how}{' for ever' if self.ever else ''}"


class Wrong(Exception):
    """A promise that was broken."""


class Stage:
    """A store for one case, what it may hold, and who has it open."""

    def __init__(self, root: str, model: Model) -> None:
        self.path = os.path.join(root, "db")
        self.states = [model]           # that may be there; the last is what the operation leads to
        self.db: logkv.Store[bytes] | None = None
        self.reader: logkv.Reader[bytes] | None = None
        self.expected: object = None    # what the operation returns, if it is not None
        self.raises: tuple[type[BaseException], ...] = ()      # what it may raise beside errors of the system
        self.others: list[Any] = []     # what else is to be closed
        self.check: Callable[[], bool] | None = None    # whether what else was done is as it should be
        self.again: Act | None = None   # makes ready for the same operation on the same store; None: it takes a new one
        self.options = Options(segment_size=SEGMENT, compaction="manual", background=False)
        self.codec: str | None = None

    @property
    def model(self) -> Model:
        return self.states[-1]

    def then(self, model: Model) -> None:
        """What the operation leads to."""
        self.states.append(model)

    def open(self, flag: str = "w", **options: Any) -> logkv.Store[bytes]:
        fields = {name: getattr(self.options, name) for name in Options.__slots__} | options
        return open_store(Path(self.path), flag, Options(**fields))

    def write(self, **options: Any) -> logkv.Store[bytes]:
        """Opened for writing, with a reader beside it."""
        self.db = self.open(**options)
        self.reader = logkv.Reader(self.path)
        return self.db

    def put(self, key: bytes, size: int) -> None:
        """Before anything fails."""
        assert self.db is not None
        self.model[key] = self.db[key] = NOISE[:size]

    def kill(self) -> None:
        """The writer is gone as after a kill."""
        assert self.db is not None
        engine = engine_of(self.db)
        for key in [key for key, other in store._engines.items() if other is engine]:
            del store._engines[key]
        self.db._engine = None
        self.db._detach()
        engine.release()
        self.db = None

    def fill(self, left: int) -> None:
        """Puts until less than some bytes are left of what is allocated."""
        assert self.db is not None
        log = engine_of(self.db).log
        room = log.allocated - log.position[1]
        while room > left + 200:
            self.put(b"fill %d" % room, min(room - left - 100, 60_000))
            room = log.allocated - log.position[1]

    def fill_segment(self) -> None:
        """So that the next large put rotates."""
        assert self.db is not None
        log = engine_of(self.db).log
        while log.capacity - log.position[1] > 1000:
            self.put(b"more %d" % log.position[1], min(log.capacity - log.position[1] - 500, 8_000))


class Operation(NamedTuple):
    name: str
    shape: str
    prepare: Callable[[Stage], Act]


OPERATIONS: dict[str, Operation] = {}
SHAPES: dict[str, Callable[[logkv.Store[bytes], Model], None]] = {}


def operation(*shapes: str) -> Callable[[Callable[[Stage], Act]], Callable[[Stage], Act]]:
    """An operation on stores of these shapes: prepares a stage, and returns what is then done while a call fails."""
    def register(prepare: Callable[[Stage], Act]) -> Callable[[Stage], Act]:
        for shape in shapes:
            name = f"{prepare.__name__.replace('_', ' ')} ({shape})"
            OPERATIONS[name] = Operation(name, shape, prepare)
        return prepare
    return register


def shape(build_it: Callable[[logkv.Store[bytes], Model], None]) -> Callable[[logkv.Store[bytes], Model], None]:
    SHAPES[build_it.__name__] = build_it
    return build_it


# -- stores to begin with ----------------------------------------------------------------------------------------

def _fill(db: logkv.Store[bytes], model: Model, keys: range, size: int) -> None:
    for i in keys:
        key = b"key %d" % i
        db[key] = model[key] = NOISE[i:i + size]


@shape
def missing(db: logkv.Store[bytes], model: Model) -> None:
    """No store at all."""


@shape
def empty(db: logkv.Store[bytes], model: Model) -> None:
    """Nothing was ever put."""


@shape
def few(db: logkv.Store[bytes], model: Model) -> None:
    """One segment."""
    _fill(db, model, range(30), 100)
    _fill(db, model, range(5), 50)
    for i in range(10, 15):
        del db[b"key %d" % i], model[b"key %d" % i]


@shape
def sealed(db: logkv.Store[bytes], model: Model) -> None:
    """Some segments with footers, a part of them dead, tombstones among them."""
    _fill(db, model, range(60), 2000)
    for i in range(0, 30, 3):
        del db[b"key %d" % i], model[b"key %d" % i]
    _fill(db, model, range(40, 60), 3000)
    rotate(db)
    _fill(db, model, range(100, 110), 100)


@shape
def merged(db: logkv.Store[bytes], model: Model) -> None:
    """As `sealed`, and then merged; with an active segment of its own."""
    sealed(db, model)
    db.compact()
    _fill(db, model, range(50, 90), 700)


@shape
def dense(db: logkv.Store[bytes], model: Model) -> None:
    """One more key, and the index grows."""
    i, slots = 0, db.stats()["index"]["slots"]
    while db.stats()["index"]["used"] < slots // 16 * 15:
        _fill(db, model, range(i, i + 1), 8)
        i += 1


def templates(root: str) -> dict[str, Model]:
    """Makes a store of each shape."""
    models: dict[str, Model] = {}
    for name, build_it in SHAPES.items():
        models[name] = {}
        if name != "missing":
            options = Options(segment_size=SEGMENT, compaction="manual", background=False)
            with open_store(Path(root, name), "c", options) as db:
                build_it(db, models[name])
    return models


# -- operations: opening -----------------------------------------------------------------------------------------

EVERY = ("empty", "few", "sealed", "merged", "dense")


def _open(stage: Stage, flag: str = "w", **options: Any) -> Act:
    def act() -> None:
        stage.db = stage.open(flag, **options)
    return act


@operation("missing")
def create(stage: Stage) -> Act:
    return _open(stage, "c")


@operation("missing")
def create_in_a_directory(stage: Stage) -> Act:
    os.mkdir(stage.path)
    return _open(stage, "c")


@operation("missing")
def create_where_that_was_begun(stage: Stage) -> Act:
    stage.open("c").close()
    os.unlink(os.path.join(stage.path, "MANIFEST"))
    return _open(stage, "c")


@operation(*EVERY)
def open_clean(stage: Stage) -> Act:
    stage.reader = logkv.Reader(stage.path)
    return _open(stage)


@operation(*EVERY)
def open_anew(stage: Stage) -> Act:
    stage.then({})
    return _open(stage, "n")


@operation(*EVERY)
def open_after_a_kill(stage: Stage) -> Act:
    stage.write()
    stage.put(b"before the kill", 300)
    stage.kill()
    return _open(stage)


@operation("sealed")
def open_after_a_kill_while_a_segment_was_full(stage: Stage) -> Act:
    stage.write()
    engine = engine_of(stage.db)
    engine._request = lambda task: None             # type: ignore[method-assign]
    stage.fill_segment()
    stage.put(b"next", 3000)
    stage.kill()
    return _open(stage)


@operation("sealed")
def open_after_a_kill_in_a_merge(stage: Stage) -> Act:
    _begin_merge(stage)
    stage.kill()
    return _open(stage)


@operation("sealed")
def open_after_a_power_cut_in_a_merge(stage: Stage) -> Act:
    _begin_merge(stage)
    stage.kill()
    _another_boot(stage)
    return _open(stage)


def _begin_merge(stage: Stage) -> None:
    """Up to where the slots follow."""
    db = stage.write()
    engine = engine_of(db)

    class Enough(Exception):
        pass

    def stop() -> None:
        raise Enough

    engine.compactor._breathe = stop                # type: ignore[method-assign]
    with suppress(Enough):
        merge(db, 0, len(engine.manifest.segments) - 1)
    assert any(segment.replaced_by for segment in engine.manifest.segments)


def _another_boot(stage: Stage) -> None:
    with open(os.path.join(stage.path, "control"), "r+b") as control:
        control.seek(32)
        control.write(bytes(range(16)))


@operation(*EVERY)
def open_after_a_power_cut(stage: Stage) -> Act:
    stage.write()
    stage.put(b"before the cut", 300)
    stage.kill()
    _another_boot(stage)
    return _open(stage)


@operation("few", "sealed")
def open_with_a_torn_tail(stage: Stage) -> Act:
    """Whole records behind a gap are set aside."""
    stage.write()
    model = dict(stage.model)
    end = engine_of(stage.db).log.position[1]
    name = os.path.join(stage.path, engine_of(stage.db)._active.name)
    for i in range(3):
        stage.put(b"lost %d" % i, 300)
    stage.kill()
    _another_boot(stage)
    with open(name, "r+b") as segment:
        segment.seek(end)
        segment.write(bytes(100))
    stage.states = [model]
    stage.reader.close()
    stage.reader = None
    return _open(stage)


@operation("few", "sealed")
def open_after_a_failed_sync(stage: Stage) -> Act:
    db = stage.write()
    stage.put(b"durable", 300)
    db.sync()
    stage.put(b"perhaps not", 300)
    engine_of(db)._poison(OSError(errno.EIO, os.strerror(errno.EIO)))
    stage.kill()
    return _open(stage)


@operation(*EVERY)
def open_a_reader(stage: Stage) -> Act:
    def act() -> None:
        stage.reader = logkv.Reader(stage.path)

    def again() -> None:
        if stage.reader is not None:
            stage.reader.close()
            stage.reader = None

    stage.again = again
    return act


@operation("few", "sealed", "merged", "dense")
def open_a_reader_after_a_power_cut(stage: Stage) -> Act:
    stage.write()
    stage.put(b"before the cut", 300)
    stage.reader.close()
    stage.reader = None
    stage.kill()
    _another_boot(stage)
    return open_a_reader(stage)


@operation("few", "sealed")
def open_a_reader_beside_a_writer(stage: Stage) -> Act:
    stage.db = stage.open()
    stage.put(b"new", 300)
    return open_a_reader(stage)


# -- operations: writing -----------------------------------------------------------------------------------------

def _put(stage: Stage, key: bytes, size: int) -> Act:
    db, value = stage.db, NOISE[7:7 + size]
    assert db is not None
    stage.then({**stage.model, key: value})
    return lambda: db.put(key, value) and None


@operation("empty", "few", "sealed", "merged")
def put_small(stage: Stage) -> Act:
    stage.write()
    return _put(stage, b"new", 100)


@operation("few", "sealed")
def overwrite(stage: Stage) -> Act:
    stage.write()
    return _put(stage, b"key 20", 100)


@operation("empty", "few", "sealed")
def put_large(stage: Stage) -> Act:
    """Larger than a segment."""
    stage.write()
    return _put(stage, b"new", 200_000)


@operation("few", "sealed")
def put_that_grows_the_file(stage: Stage) -> Act:
    stage.write()
    stage.fill(100)
    return _put(stage, b"new", 300)


@operation("dense")
def put_that_grows_the_index(stage: Stage) -> Act:
    stage.write()
    return _put(stage, b"new", 10)


@operation("few", "sealed")
def put_that_rotates(stage: Stage) -> Act:
    stage.write()
    stage.fill_segment()
    return _put(stage, b"new", 3000)


@operation("few", "sealed")
def put_that_must_seal(stage: Stage) -> Act:
    """A segment is full and was not sealed; the next is full too."""
    stage.write()
    engine = engine_of(stage.db)
    engine._request = lambda task: None             # type: ignore[method-assign]
    stage.fill_segment()
    stage.put(b"next", 3000)
    stage.fill_segment()
    del engine._request
    return _put(stage, b"new", 3000)


@operation("few", "sealed")
def put_that_compacts(stage: Stage) -> Act:
    """So much is dead that the put does the work."""
    stage.write(compaction="auto")
    engine = engine_of(stage.db)
    engine._request = lambda task: None             # type: ignore[method-assign]
    for i in range(9):
        engine.compactor.make_space = lambda: None  # type: ignore[method-assign]
        for key in (b"key 20", b"key 21"):
            stage.put(key, 30_000 + i)
        while engine.full_segments():
            engine.seal_oldest()
    del engine._request, engine.compactor.make_space
    stage.fill(100)
    return _put(stage, b"key 22", 3000)


@operation("few", "sealed")
def put_that_is_synced(stage: Stage) -> Act:
    stage.write(sync="always")
    return _put(stage, b"new", 100)


@operation("few")
def put_that_waits_for_a_flush(stage: Stage) -> Act:
    stage.write(sync=1e-9)
    stage.put(b"first", 100)
    return _put(stage, b"new", 100)


@operation("few", "sealed")
def delete(stage: Stage) -> Act:
    db = stage.write()
    stage.then({key: value for key, value in stage.model.items() if key != b"key 20"})
    stage.expected = True
    return lambda: db.delete(b"key 20")


@operation("few")
def delete_that_is_synced(stage: Stage) -> Act:
    stage.options = Options(segment_size=SEGMENT, compaction="manual", background=False, sync="always")
    return delete(stage)


@operation("few", "sealed")
def delete_that_grows_the_file(stage: Stage) -> Act:
    act = delete(stage)
    stage.states.pop()
    stage.fill(0)
    assert stage.db is not None
    log = engine_of(stage.db).log
    while log.allocated - log.position[1] >= 40:
        stage.put(b"x", 0)
    stage.then({key: value for key, value in stage.model.items() if key != b"key 20"})
    return act


@operation("few", "sealed")
def pop(stage: Stage) -> Act:
    db = stage.write()
    stage.then({key: value for key, value in stage.model.items() if key != b"key 20"})
    stage.expected = stage.states[0][b"key 20"]
    return lambda: db.pop("key 20")


@operation("few", "sealed")
def sync(stage: Stage) -> Act:
    db = stage.write()
    stage.again = _nothing
    stage.put(b"new", 100)
    return db.sync


@operation("sealed")
def sync_of_two_segments(stage: Stage) -> Act:
    db = stage.write()
    engine = engine_of(db)
    engine._request = lambda task: None             # type: ignore[method-assign]
    stage.fill_segment()
    stage.put(b"next", 3000)
    del engine._request
    return db.sync


@operation(*EVERY)
def clear(stage: Stage) -> Act:
    db = stage.write()
    stage.then({})
    return db.clear


@operation("sealed")
def clear_with_a_successor(stage: Stage) -> Act:
    db = stage.write()
    engine_of(db)._prepare()
    stage.then({})
    return db.clear


@operation("few", "sealed", "merged")
def compact(stage: Stage) -> Act:
    return stage.write().compact


@operation("sealed")
def finish_a_merge(stage: Stage) -> Act:
    """That was killed."""
    _begin_merge(stage)
    stage.kill()
    stage.reader.close()
    db = stage.write()
    return db.compact


@operation("sealed", "dense")
def compact_into_a_small_index(stage: Stage) -> Act:
    """After most is deleted."""
    stage.options = Options(segment_size=16 * SEGMENT, compaction="manual", background=False)
    db = stage.write()
    for i in range(1000):
        db[b"many %d" % i] = b""
    for i in range(1000):
        del db[b"many %d" % i]
    return db.compact


@operation(*EVERY)
def close(stage: Stage) -> Act:
    db = stage.write()
    stage.put(b"new", 100)
    return db.close


@operation("few")
def close_without_a_change(stage: Stage) -> Act:
    return stage.write().close


# -- operations: in the background -------------------------------------------------------------------------------

def _in_background(stage: Stage, worker: str, task: str) -> Act:
    """Runs a task on the thread of a worker, and waits for its end."""
    engine: Any = engine_of(stage.db)
    done = threading.Lock()         # an Event without memory may keep a lock of its own, and its set() hang
    done.acquire()

    def set_done() -> None:
        done.release()

    engine.set_done = set_done                      # tasks are called by name
    runner = getattr(engine, worker)

    def act() -> None:
        runner.call(getattr(engine, task))
        runner.call(set_done)
        if not done.acquire(timeout=ONE_CASE / 2):
            raise Wrong("the background thread hangs")
    return act


@operation("few", "sealed")
def flush_in_background(stage: Stage) -> Act:
    stage.write(sync=3600, background=True)
    stage.put(b"new", 100)
    return _in_background(stage, "_worker", "_sync_now")


@operation("sealed")
def merge_in_background(stage: Stage) -> Act:
    stage.write(compaction="auto", background=True)
    return _in_background(stage, "_merger", "compact_soon")


@operation("few", "sealed")
def seal_in_background(stage: Stage) -> Act:
    stage.write(background=True)
    engine = engine_of(stage.db)
    engine._request = lambda task: None             # type: ignore[method-assign]
    stage.fill_segment()
    stage.put(b"next", 3000)
    del engine._request
    return _in_background(stage, "_worker", "seal_oldest")


@operation("few")
def prepare_in_background(stage: Stage) -> Act:
    stage.write(background=True)
    return _in_background(stage, "_worker", "_prepare")


# -- operations: reading -----------------------------------------------------------------------------------------

def _read(stage: Stage) -> logkv.Reader[bytes]:
    """A reader that has looked at no segment yet."""
    stage.again = _nothing
    stage.reader = logkv.Reader(stage.path)
    return stage.reader


def _nothing() -> None:
    """What is to be done before the same again."""


def _let_go(stage: Stage) -> Act:
    """Closes what was opened, so that it can be opened again."""
    def again() -> None:
        while stage.others:
            stage.others.pop().close()
    return again


@operation("few", "sealed", "merged")
def get(stage: Stage) -> Act:
    reader = _read(stage)
    stage.expected = stage.model[b"key 20"]
    return lambda: reader[b"key 20"]


@operation("sealed", "merged")
def get_in_a_writer(stage: Stage) -> Act:
    db = stage.write()
    stage.again = _nothing
    stage.expected = stage.model[b"key 20"]
    return lambda: db[b"key 20"]


@operation("empty", "few", "sealed", "merged")
def iterate(stage: Stage) -> Act:
    reader = _read(stage)
    stage.expected = sorted(stage.model)
    return lambda: sorted(reader)


@operation("sealed", "merged", "dense")
def items(stage: Stage) -> Act:
    reader = _read(stage)
    stage.expected = stage.model
    return lambda: dict(reader.items())


@operation("sealed")
def items_in_a_writer(stage: Stage) -> Act:
    db = stage.write()
    stage.again = _nothing
    stage.expected = stage.model
    return lambda: dict(db.items())


@operation("few", "sealed")
def get_after_growth(stage: Stage) -> Act:
    """Of a segment that has become longer, and of one that is new."""
    stage.write()
    reader = stage.reader
    assert reader is not None and b"key 20" in reader
    stage.fill_segment()
    stage.put(b"behind", 3000)
    stage.expected = stage.model[b"behind"]
    return lambda: reader[b"behind"]


@operation("dense")
def get_after_the_index_grew(stage: Stage) -> Act:
    stage.write()
    reader = stage.reader
    assert reader is not None and b"key 20" in reader
    for i in range(2000):
        stage.put(b"many %d" % i, 1)
    stage.expected = len(stage.model)
    return lambda: sum(key in reader for key in stage.model)


@operation("few", "sealed")
def get_after_clear(stage: Stage) -> Act:
    db = stage.write()
    reader = stage.reader
    assert reader is not None and b"key 20" in reader
    db.clear()
    stage.states = [{}]
    stage.put(b"behind", 300)
    stage.expected = [(b"behind", stage.model[b"behind"])]
    return lambda: list(reader.items())


@operation("sealed")
def get_after_compaction(stage: Stage) -> Act:
    db = stage.write()
    reader = stage.reader
    assert reader is not None and dict(reader) == stage.model
    db.compact()
    stage.expected = stage.model
    return lambda: dict(reader)


@operation("few", "sealed")
def refresh(stage: Stage) -> Act:
    stage.write()
    stage.again = _nothing
    reader = stage.reader
    assert reader is not None
    return reader.refresh


@operation("few", "sealed")
def refresh_of_a_reader_with_its_own_index(stage: Stage) -> Act:
    stage.write()
    stage.put(b"before the cut", 300)
    stage.reader.close()
    stage.kill()
    _another_boot(stage)
    reader = stage.reader = logkv.Reader(stage.path)
    stage.db = stage.open()
    return reader.refresh


@operation("few", "sealed", "merged")
def stats(stage: Stage) -> Act:
    reader = _read(stage)
    stage.expected = len(stage.model)
    return lambda: reader.stats()["keys"]


@operation("few", "sealed")
def stats_of_a_writer(stage: Stage) -> Act:
    db = stage.write()
    stage.again = _nothing
    stage.expected = len(stage.model)
    return lambda: db.stats()["keys"]


@operation("few", "sealed", "merged")
def verify(stage: Stage) -> Act:
    stage.again = _nothing
    stage.expected = []
    return lambda: logkv.verify(stage.path).problems


@operation("few", "sealed")
def verify_beside_a_writer(stage: Stage) -> Act:
    db = stage.write()
    stage.again = _nothing
    stage.expected = []
    return lambda: db.verify().problems


@operation("few")
def verify_after_a_power_cut(stage: Stage) -> Act:
    stage.write()
    stage.reader.close()
    stage.reader = None
    stage.kill()
    _another_boot(stage)
    return verify(stage)


@operation("few", "sealed")
def close_a_reader(stage: Stage) -> Act:
    reader = _read(stage)
    assert dict(reader) == stage.model
    return reader.close


# -- operations: each method, that of a small store mostly needs memory alone -------------------------------------

Method = Callable[[Any], object]
READING: dict[str, Method] = {
    "get": lambda db: db.get("key 20"),
    "get, missing": lambda db: db.get("nothing"),
    "[]": lambda db: db[b"key 20"],
    "in": lambda db: ("key 20" in db, "nothing" in db),
    "len": len,
    "list": lambda db: sorted(db),
    "keys": lambda db: sorted(db.keys()),
    "values": lambda db: sorted(db.values()),
    "items": lambda db: sorted(db.items()),
    "in items": lambda db: ("key 20", NOISE[20:120]) in db.items(),
    "in values": lambda db: NOISE[20:120] in db.values(),
    "keys &": lambda db: db.keys() & {"key 20", "nothing"},
    "keys -": lambda db: db.keys() - {"key 20"},
    "items |": lambda db: db.items() | {("a", b"b")},
    "isdisjoint": lambda db: db.keys().isdisjoint(["a", "b"]),
    "==": lambda db: db == dict(db),
    "|": lambda db: db | {"a": "b"},
    "copy": lambda db: db.copy(),
    "repr": repr,
    "repr of a view": lambda db: repr(db.items()),
    "stats": lambda db: db.stats()["keys"],
    "path, codec, closed": lambda db: (db.path, db.codec, db.closed),
    "refresh": lambda db: db.refresh(),
    "pickle": pickle.dumps,
    "verify": lambda db: db.verify().problems,
}
WRITING: dict[str, tuple[Method, list[Model]]] = {      # and what is put after each step
    "[] =": (lambda db: db.__setitem__("new", b"value"), [{b"new": b"value"}]),
    "[] = str": (lambda db: db.__setitem__("ne\u00fc", "v\u00e4lue"), [{"ne\u00fc".encode(): "v\u00e4lue".encode()}]),
    "put a buffer": (lambda db: db.put(b"new", memoryview(bytearray(b"value"))) and None, [{b"new": b"value"}]),
    "update": (lambda db: db.update({"a": "1", "b": "2"}, c="3"), [{b"a": b"1"}, {b"b": b"2"}, {b"c": b"3"}]),
    "|=": (lambda db: db.__ior__({"a": "1"}) and None, [{b"a": b"1"}]),
    "setdefault": (lambda db: db.setdefault("new", "value"), [{b"new": b"value"}]),
    "setdefault, there": (lambda db: db.setdefault("key 20", "value"), []),
    "pop with a default": (lambda db: db.pop("nothing", 7), []),
    "sync": (lambda db: db.sync(), []),
    "delete, missing": (lambda db: db.delete("nothing"), []),
}


def _method(name: str, method: Method, steps: list[Model], writing: bool) -> None:
    def prepare(stage: Stage) -> Act:
        db: Any = stage.write()
        stage.again = _nothing
        if not writing:
            db = stage.reader
            stage.expected = method(db)         # as where nothing fails
        for step in steps:
            stage.then({**stage.model, **step})
        return lambda: method(db)

    prepare.__name__ = name
    operation("few")(prepare)


for _name, _reads in READING.items():
    _method(f"reading: {_name}", _reads, [], False)
for _name, (_writes, _steps) in WRITING.items():
    _method(f"writing: {_name}", _writes, _steps, True)


@operation("few")
def popitem(stage: Stage) -> Act:
    db = stage.write()
    model = stage.model
    stage.states = [*({key: value for key, value in model.items() if key != gone} for gone in model), model]
    return lambda: db.popitem() and None


@operation("few")
def delete_by_statement(stage: Stage) -> Act:
    act = delete(stage)
    del act
    stage.expected = None
    db = stage.db
    assert db is not None
    return lambda: db.__delitem__("key 20")


@operation("few")
def copy_of_a_handle(stage: Stage) -> Act:
    db = stage.write()
    return lambda: stage.others.append(copy.copy(db))


@operation("few")
def iterate_and_write(stage: Stage) -> Act:
    """An iterator that was begun, and a key that has changed since."""
    db = stage.write()
    walk = iter(stage.reader.items())           # type: ignore[union-attr]
    first, _ = next(walk)
    for key in list(stage.model):
        stage.put(key, 33)
    stage.expected = {key: value for key, value in stage.model.items() if key != first}
    assert db is not None
    return lambda: dict(walk)


@operation("missing")
def open_with_a_writer(stage: Stage) -> Act:
    def act() -> None:
        stage.others.append(logkv.Writer(stage.path, segment_size=SEGMENT, compaction="manual"))
    return act


@operation("few")
def open_for_reading(stage: Stage) -> Act:
    stage.again = _let_go(stage)

    def act() -> None:
        stage.others.append(logkv.open(stage.path, "r"))
    return act


def _with_codec(codec: str, value: object) -> Callable[[Stage], Act]:
    def prepare(stage: Stage) -> Act:
        db = logkv.open(stage.path + "-other", "c", codec=codec, compaction="manual")
        db["old"] = value
        stage.others.append(db)
        stage.check = lambda: dict(db) in ({b"old": value}, {b"old": value, b"new": value})

        def act() -> object:
            db["new"] = value
            return db["new"], db.pop("new")

        stage.expected = (value, value)
        return act

    prepare.__name__ = f"codec {codec}"
    return prepare


for _codec, _value in (("str", "v\u00e4lue"), ("json", {"a": [1, "b"]}), ("pickle", ("a", 1.5))):
    operation("few")(_with_codec(_codec, _value))


@operation("few")
def shelf(stage: Stage) -> Act:
    shelf = shelve.open(stage.path + "-other", writeback=True)
    shelf["old"] = [1]
    shelf.sync()
    stage.others.append(shelf)
    stage.check = lambda: shelf["old"] in ([1], [1, 2])

    def act() -> None:
        if len(shelf["old"]) == 1:
            shelf["old"].append(2)
        shelf["new"] = 3
        shelf.sync()
    return act


# -- operations: other doors --------------------------------------------------

@operation("few")
def whichdb(stage: Stage) -> Act:
    stage.again = _nothing
    return lambda: dbm.whichdb(stage.path) and None


@operation("few")
def open_as_dbm(stage: Stage) -> Act:
    def act() -> None:
        stage.others.append(dbm.open(stage.path))
    return act


@operation("few")
def open_as_shelf(stage: Stage) -> Act:
    stage.again = _let_go(stage)

    def act() -> None:
        stage.others.append(shelve.open(stage.path, "r"))
    return act


@operation("few")
def reopen_a_pickled_reader(stage: Stage) -> Act:
    with logkv.Reader(stage.path) as reader:
        pickled = pickle.dumps(reader)

    open_a_reader(stage)                        # for what comes between

    def act() -> None:
        stage.reader = pickle.loads(pickled)
    return act


# -- operations: repair and backup ------------------------------------------------------------------------------------

@operation("few", "sealed")
def repair_of_a_whole_store(stage: Stage) -> Act:
    stage.again = _nothing
    stage.expected = False
    return lambda: logkv.repair(stage.path).changed


@operation("few", "sealed")
def repair(stage: Stage) -> Act:
    """Of a store in which a value is damaged; where that fails, it can be done again."""
    damaged = b"key 20" + stage.model[b"key 20"][:50]
    for segment in Path(stage.path).glob("*.seg"):
        at = segment.read_bytes().find(damaged)
        if at >= 0:
            with open(segment, "r+b") as file:
                file.seek(at + len(damaged))
                file.write(b"?!")
    stage.states = [{key: value for key, value in stage.model.items() if key != b"key 20"}]
    stage.expected = 1
    stage.check = lambda: len(logkv.repair(stage.path).lost) < 2
    return lambda: len(logkv.repair(stage.path).lost)


def _backed_up(stage: Stage, *states: Model) -> Callable[[], bool]:
    """Whether what is in the backup's directory, if it is one, is among these states, and can be made anew."""
    target = stage.path + "-backup"

    def check() -> bool:
        if os.path.exists(os.path.join(target, files.MANIFEST)):
            with logkv.Reader(target) as reader:
                if dict(reader.items()) not in states:
                    return False
        with logkv.Reader(stage.path) as reader:
            content = dict(reader.items())
            reader.backup(target)
        with logkv.Reader(target) as reader:
            return dict(reader.items()) == content and reader.verify().ok
    return check


@operation("few", "sealed")
def backup(stage: Stage) -> Act:
    db, model = stage.write(), stage.model
    stage.check = _backed_up(stage, dict(model))
    stage.expected = len(model)
    return lambda: db.backup(stage.path + "-backup").keys


@operation("few", "sealed")
def backup_that_adds_to_another(stage: Stage) -> Act:
    db, before = stage.write(), dict(stage.model)
    db.backup(stage.path + "-backup")
    stage.put(b"new", 300)
    stage.check = _backed_up(stage, before, dict(stage.model))
    stage.expected = len(stage.model)
    reader = stage.reader
    assert reader is not None
    return lambda: reader.backup(stage.path + "-backup", links=False).keys


# -- one case ----------------------------------------------------------------------------------------------------

SAYS_WHAT = re.compile(r"cannot |allow more open files|could not |failed|while |no memory")


def unreadable(case: Case) -> bool:
    """Whether the device seems not to give what it should have."""
    return case.call == "populate" and case.error == errno.EFAULT


def judge(case: Case, stage: Stage, result: object, problem: BaseException | None) -> None:
    """Raises Wrong if what came out is neither right nor a clear error."""
    if problem is None:
        told = "verify" in case.operation and (unreadable(case) or os.strerror(case.error) in str(result)) or \
            "whole" in case.operation and (case.call, case.error) != ("open", errno.EMFILE)     # another index is built
        if stage.expected is not None and result != stage.expected and not told:
            raise Wrong(f"returned {str(result)[:200]}")
        return
    text = f"{type(problem).__name__}: {problem}"
    if unreadable(case) and isinstance(problem, logkv.CorruptionError):
        return
    if case.call == "thread" and isinstance(problem, Wrong):        # there is none to wait for
        return
    if case.call == "memory" and (isinstance(problem, MemoryError) or
                                  isinstance(problem, RuntimeError) and "can't allocate" in text or     # CPython's, of locks
                                  isinstance(problem, SystemError) and "without " in text and "logkv" not in text and
                                  "cyfunction" not in text or                                           # of its frames,
                                  isinstance(problem, pickle.PicklingError) and "import of" in text):   # and pickle's
        return
    if isinstance(problem, stage.raises):
        return
    if not isinstance(problem, logkv.Error):
        raise Wrong(f"raised {text}")
    if isinstance(problem, logkv.LockedError) and (case.call, case.error) == ("lock", errno.EAGAIN):
        return
    if isinstance(problem, (logkv.CorruptionError, logkv.NotFoundError, logkv.FormatError, logkv.LockedError)) \
            and os.strerror(case.error) not in text:
        raise Wrong(f"claims what is not so: {text}")
    if not SAYS_WHAT.search(str(problem)):
        raise Wrong(f"does not say what was done: {text}")


def content_of(db: Any, stage: Stage, who: str) -> Model:
    found = dict(db.items())
    if found not in stage.states or len(db) != len(found):
        raise Wrong(f"{who} sees a state that never was: {difference(found, stage.model)}, {len(db)} keys")
    return found


def check_handles(stage: Stage, shim: Shim) -> None:
    """What is open goes on or says why it does not; then all is closed."""
    db = stage.db
    if db is not None and not db.closed:
        poisoned = db.stats()["poisoned"]
        try:
            content = content_of(db, stage, "the writer")
            if not poisoned:            # else the next writer may find the other state
                stage.states = [content]
        except logkv.Error as problem:
            raise Wrong(f"reading does not go on: {problem}") from problem
        try:
            db[b"probe"] = b"1"
            stage.states = [{**stage.model, b"probe": b"1"}]
            if poisoned:
                raise Wrong(f"a put was taken after: {poisoned}")
        except logkv.Error as problem:
            if not poisoned:
                raise Wrong(f"writes are refused, and no reason is known: {problem}") from problem
        if stage.reader is not None and not stage.reader.closed:
            content_of(stage.reader, stage, "the reader")
        try:
            db.close()
            if poisoned:
                raise Wrong("close() said nothing of writes that may not be on the device")
        except logkv.Error as problem:
            if not poisoned:
                raise Wrong(f"close() failed: {problem}") from problem
    stage.db = db = None                # what could not be let go without memory goes with the handle
    if stage.reader is not None and stage.reader.closed:
        stage.reader = None
    if shim.left != (0, 0):
        gc.collect()
    if stage.reader is not None and not stage.reader.closed:
        content_of(stage.reader, stage, "the reader")
    if stage.check is not None and not stage.check():
        raise Wrong("something else is there than what was put")
    for other in stage.others:
        try:
            other.close()
        except logkv.Error as problem:
            if "a sync failed" not in str(problem):
                raise
    stage.check = None
    stage.others.clear()


def check_store(stage: Stage, whole: bool) -> None:
    """Whoever opens it finds a state that may be there, and removes what was left; `whole`: and every byte is right."""
    with stage.open("c" if not os.path.exists(os.path.join(stage.path, "MANIFEST")) else "w") as db:
        stage.states = [content_of(db, stage, "the next writer")]
        names = {files.LOCK, files.MANIFEST, files.CONTROL, files.INDEX, files.LOST_FOUND,
                 *(segment.name for segment in engine_of(db).manifest.segments)}
        left = set(os.listdir(stage.path)) - names
        if left:
            raise Wrong(f"{', '.join(sorted(left))} stayed behind")
        db[b"again"] = b"2"
        stage.states = [{**stage.model, b"again": b"2"}]
    if stage.reader is not None and not stage.reader.closed:
        content_of(stage.reader, stage, "the reader, at the end,")
        stage.reader.close()
    report = logkv.verify(stage.path) if whole else None
    if report and (not report.ok or report.keys != len(stage.model)):
        raise Wrong(f"verify finds {report.keys} keys, {report.problems[:2]}")


def check_released(stage: Stage, shim: Shim, when: str, whole: bool) -> None:
    """No descriptor and no mapping is left of what was closed."""
    if not whole and shim.left == (0, 0):
        return
    gc.collect()
    root = os.path.dirname(stage.path).encode()
    with open("/proc/self/maps", "rb", buffering=0) as maps:
        text = b""
        while part := maps.read(1 << 20):
            text += part
    if root in text:
        raise Wrong(f"{when} {text.count(root)} mappings stayed")
    descriptors, memory = shim.left
    if descriptors or memory:
        names = []
        for fd in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                names.append(os.readlink(f"/proc/self/fd/{fd}"))
        raise Wrong(f"{when} {descriptors} descriptors stayed ({', '.join(n for n in names if root.decode() in n)}), "
                    f"{memory} mappings")


class Theatre:
    """Where cases are played, one after the other."""

    def __init__(self, root: str, shim: Shim, models: dict[str, Model]) -> None:
        self._templates = os.path.join(root, "templates")
        self._root = os.path.join(root, f"stage-{os.getpid()}")
        self._read: dict[str, dict[str, bytes]] = {}        # templates: names and contents
        self.shim = shim
        self.models = models
        shim.watch(self._root)
        gc.collect()
        gc.freeze()
        gc.disable()

    @contextmanager
    def _stage(self, operation: Operation) -> Iterator[tuple[Stage, Act]]:
        os.mkdir(self._root)
        stage = Stage(self._root, dict(self.models[operation.shape]))
        try:
            if operation.shape != "missing":
                self._put_up(operation.shape, stage.path)
            yield stage, operation.prepare(stage)
        finally:
            for handle in (stage.db, stage.reader, *stage.others):
                if handle is not None:
                    with suppress(Exception):
                        handle.close()
            shutil.rmtree(self._root)

    def _put_up(self, shape: str, path: str) -> None:
        """A copy of a template, which is a directory of a few small files."""
        if shape not in self._read:
            self._read[shape] = {file.name: file.read_bytes() for file in Path(self._templates, shape).iterdir()}
        os.mkdir(path)
        for name, data in self._read[shape].items():
            with open(os.path.join(path, name), "xb", buffering=0) as file:
                file.write(data)

    def counts(self, operation: Operation) -> list[int]:
        """How often it makes each kind of call; it must do well."""
        case = Case(operation.name, "none", 0, errno.EIO, False)
        with self._stage(operation) as (stage, act):
            self.shim.arm()
            outcome = list(self.shim.run(act))
            counts = self.shim.counts()
            if outcome[1] is not None:
                raise Wrong(f"{type(outcome[1]).__name__}: {outcome[1]}")
            del act
            self._check(case, stage, outcome)
        return counts

    def play(self, case: Case, whole: bool = True) -> tuple[int, str | None]:
        """How often something failed, and which promise was broken then.  whole: all is looked at, and not only what is
        there and what was left."""
        with self._stage(OPERATIONS[case.operation]) as (stage, act):
            hits, outcome = self._fail(case, act)
            del act                             # it may hold a handle, and the outcome frames
            try:
                if hits:
                    self._check(case, stage, outcome, whole)
            except Wrong as problem:
                return hits, str(problem)
        return hits, None

    def play_anew(self, cases: Sequence[Case]) -> tuple[int, str | None]:
        """How many of these cases of one operation were reached, each on a store of its own; and which promise was broken
        then.  The last is looked at in full: nothing of all of them may be left."""
        for i, case in enumerate(cases):
            hits, problem = self.play(case, whole=case is cases[-1])
            if problem is not None or not hits:
                return i + (hits > 0), problem
        return len(cases), None

    def play_again(self, cases: Sequence[Case]) -> tuple[int, str | None]:
        """As `play_anew`, but one after the other on the same store, with the same handles."""
        reached = 0
        with self._stage(OPERATIONS[cases[0].operation]) as (stage, act):
            assert stage.again is not None
            left: tuple[int, int] | None = None
            outcome: list[Any] = [None, None]
            try:
                for case in cases:
                    hits, outcome = self._fail(case, act)
                    reached += hits > 0
                    if not hits:
                        break
                    self._judge(case, stage, outcome)
                    stage.again()
                    left = left or self.shim.left
                    if self.shim.left != left and self._left() != left:
                        raise Wrong(f"{case}: {left} descriptors and mappings have become {self.shim.left}")
                outcome[:] = act(), None                # nothing is in its way now
                del act
                self._check(cases[0], stage, outcome)
            except Wrong as problem:
                return reached, str(problem)
            except BaseException as problem:
                return reached, f"again: {type(problem).__name__}: {problem}"
        return reached, None

    def _left(self) -> tuple[int, int]:
        """What is left behind, less what cycles hold."""
        gc.collect()
        return self.shim.left

    def repeats(self, name: str) -> bool:
        """Whether an operation can be done again on the same store, and then does the same.  Also fills what Python keeps
        from the first time on."""
        self.counts(OPERATIONS[name])
        with self._stage(OPERATIONS[name]) as (stage, act):
            counts = []
            while stage.again is not None and len(counts) < 2:
                self.shim.arm()
                self.shim.run(act)
                counts.append(self.shim.counts())
                stage.again()
        return len(counts) == 2 and counts[0] == counts[1]

    def _fail(self, case: Case, act: Act) -> tuple[int, list[Any]]:
        """How often something failed, and what it returned and raised."""
        self.shim.arm(CALLS.index(case.call), case.number, case.error, case.ever)
        _ignored.clear()
        outcome = list(self.shim.run(act))
        return self.shim.hits, outcome

    def _judge(self, case: Case, stage: Stage, outcome: list[Any]) -> None:
        judge(case, stage, *outcome)
        outcome.clear()
        if _ignored and not case.ever:
            raise Wrong(f"{_ignored[0]}")

    def _check(self, case: Case, stage: Stage, outcome: list[Any], whole: bool = True) -> None:
        try:
            self._judge(case, stage, outcome)
            went_on = stage.db is not None and not stage.db.closed
            check_handles(stage, self.shim)
            if stage.reader is None or stage.reader.closed:
                check_released(stage, self.shim, "when all was closed", False)
            if whole or not went_on:
                check_store(stage, whole)
            elif stage.reader is not None:
                stage.reader.close()
            check_released(stage, self.shim, "at the end", whole)
        except Wrong:
            raise
        except BaseException as other:
            raise Wrong(f"afterwards {type(other).__name__}: {other}") from other


def cases_of(name: str, counts: Sequence[int]) -> Iterator[Case]:
    """All system calls of an operation, in all ways in which they may fail."""
    for call, count in zip(CALLS, counts):
        for number in range(1, count + 1) if call != "memory" else ():
            for error in ERRORS[call]:
                if name.startswith("repair (") and error == errno.EFAULT:
                    continue                    # what the device does not give is lost: the report says so
                yield Case(name, call, number, error, False)
                if error != errno.EINTR:        # for ever: whoever tries again waits for ever
                    yield Case(name, call, number, error, True)


# -- all cases ---------------------------------------------------------------------------------------------------


class Tally:
    """What was played."""

    def __init__(self) -> None:
        self.counted: dict[str, int] = {"system calls": 0, "allocations": 0, "allocations for ever": 0}
        self.operations: set[str] = set()       # of which every allocation failed
        self.calls: set[str] = set()            # kinds of call that some operation makes
        self.reached: set[str] = set()          # operations, and the calls that failed in them
        self.violations: list[str] = []
        self.complete = True

    def as_json(self) -> dict[str, Any]:
        return {"counted": self.counted, "calls": sorted(self.calls), "reached": sorted(self.reached),
                "violations": self.violations, "complete": self.complete,
                "operations": sorted(self.operations)}


class Server:
    """In the child: plays cases in processes of their own, so that one that dies takes none but its last case along."""

    def __init__(self, root: str, seed: int, deadline: float, share: tuple[int, int], only: str) -> None:
        self._root = root
        self._dice = random.Random(seed)
        self._deadline = deadline
        self._share = share
        self._shim = Shim()
        self.tally = Tally()
        os.mkdir(os.path.join(root, "templates"))
        self._models = templates(os.path.join(root, "templates"))
        self._progress = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")
        self._operations = [name for name in OPERATIONS if re.search(only, name)]

    def calls(self) -> None:
        """System calls."""
        cases: list[Case] = []
        for name, counts in self._counts().items():
            cases += cases_of(name, counts)
        self._dice.shuffle(cases)
        self.tally.complete = self._play(cases[self._share[0]::self._share[1]])

    def allocations(self) -> None:
        """Each operation, on a store of one shape: every allocation fails once.  Then, while there is time, some of them
        and all that follow: no more can be had."""
        shapes: dict[str, str] = {}
        for name in self._operations:
            what, _, on = name.rpartition(" (")
            if what not in shapes or on == "few)":
                shapes[what] = name
        runs = [Case(name, "memory", self._share[0] + 1, errno.ENOMEM, False) for name in shapes.values()]
        self._dice.shuffle(runs)
        played: list[Case] = []
        while runs and time.monotonic() < self._deadline:
            played += self._play_all(runs)
        self.tally.complete = not runs
        self._dice.shuffle(played)
        self._play([case._replace(ever=True) for case in played])

    def _play_all(self, runs: list[Case]) -> list[Case]:
        """Plays operations in a process, each from one allocation on until none is left to fail, and takes them away then.
        What was played.  Of some cases one after the other only the last is looked at in full; where something is wrong
        there, all of them are played by themselves."""
        step = self._share[1]

        def some(case: Case) -> list[Case]:
            return [case._replace(number=case.number + i * step) for i in range(TOGETHER)]

        def play(theatre: Theatre, say: Callable[[object], None]) -> None:
            for self._progress[0], case in enumerate(runs):
                again = theatre.repeats(case.operation)
                reached = 1
                while reached and time.monotonic() < self._deadline:
                    self._progress[1] = case.number
                    signal.alarm(ONE_CASE)
                    reached, problem = (theatre.play_again if again else theatre.play_anew)(some(case))
                    say([self._progress[0], case.number, reached, problem])
                    if problem is not None:
                        return
                    case = case._replace(number=case.number + reached * step)
                if reached:
                    return

        lines, status = self._in_process(play)
        if status:
            lines.append([self._progress[0], self._progress[1], TOGETHER, status])
        played: list[Case] = []
        over = 0
        for at, number, reached, problem in lines:
            cases = some(runs[at]._replace(number=number))[:reached]
            runs[at] = runs[at]._replace(number=number + reached * step)
            played += cases
            if problem is not None:
                known = len(self.tally.violations)
                self._play(cases)
                if len(self.tally.violations) == known:
                    self.tally.violations.append(f"{cases[0]} to {cases[-1].number}, one after the other: {problem}")
                continue
            for case in cases:
                self._note(case, 1, None)
            if not reached:
                self.tally.operations.add(runs[at].operation)
                over = at + 1
        del runs[:over]
        return played

    def _counts(self) -> dict[str, list[int]]:
        """How often each operation makes each call."""
        counts: dict[str, list[int]] = {}

        def count(theatre: Theatre, say: Callable[[object], None]) -> None:
            for self._progress[0], name in enumerate(self._operations):
                signal.alarm(ONE_CASE)
                try:
                    say([name, theatre.counts(OPERATIONS[name])])
                except Wrong as problem:
                    say([name, str(problem)])

        lines, status = self._in_process(count)
        for name, found in lines:
            if isinstance(found, str):
                self.tally.violations.append(f"{name}, where nothing fails: {found}")
            else:
                counts[name] = found
                self.tally.calls.update(call for call, count in zip(CALLS, found) if count)
        if status:
            self.tally.violations.append(f"{self._operations[self._progress[0]]}, where nothing fails: {status}")
        return counts

    def _play(self, cases: list[Case]) -> bool:
        """These, or as many as time allows; whether it did."""
        at = 0
        while at < len(cases):
            batch = cases[at:at + BATCH]

            def play(theatre: Theatre, say: Callable[[object], None], batch: Sequence[Case] = batch) -> None:
                known: set[str] = set()
                for self._progress[0], case in enumerate(batch):
                    if time.monotonic() > self._deadline:
                        return
                    signal.alarm(ONE_CASE)
                    if case.call == "memory" and case.operation not in known:
                        known.add(case.operation)
                        theatre.repeats(case.operation)
                    hits, problem = theatre.play(case)
                    say([self._progress[0], hits, problem])
                    if problem is not None:
                        return                  # what it left would be taken for the next one's

            lines, status = self._in_process(play)
            for number, hits, problem in lines:
                self._note(batch[number], hits, problem)
            if status:
                self.tally.violations.append(f"{batch[self._progress[0]]}: {status}")
            if time.monotonic() > self._deadline:
                return False
            at += self._progress[0] + 1
        return True

    def _note(self, case: Case, hits: int, problem: str | None) -> None:
        if problem is not None:
            self.tally.violations.append(f"{case}: {problem}")
        kind = "system calls" if case.call != "memory" else "allocations for ever" if case.ever else "allocations"
        # That it would have failed for ever makes no other case, if nothing more was called.
        self.tally.counted[kind] += hits > case.ever
        if hits:
            self.tally.reached.add(f"{case.operation}: {case.call}")

    def _in_process(self, body: Callable[[Theatre, Callable[[object], None]], None]) -> tuple[list[Any], str]:
        """What a process says that runs `body`, and how it died, if it did."""
        with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
            def run() -> None:
                os.dup2(errors.fileno(), 2)
                faulthandler.enable()
                faulthandler.register(signal.SIGALRM, chain=True)
                sys.unraisablehook = _remember
                warnings.simplefilter("ignore", RuntimeWarning)

                def say(line: object) -> None:
                    print(json.dumps(line), file=said, flush=True)
                body(Theatre(self._root, self._shim, self._models), say)

            pid = fork(run)
            status = ended(pid)
            shutil.rmtree(os.path.join(self._root, f"stage-{pid}"), ignore_errors=True)
            said.seek(0)
            errors.seek(0)
            lines = [json.loads(line) for line in said]
            if not status:
                return lines, ""
            how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            return lines, f"died ({how}): {errors.read()[-3000:]}"


_ignored: list[str] = []        # exceptions that nobody has heard of


def _remember(what: Any) -> None:
    """But for CPython's: a generator that nobody goes on with is told so by an exception, which takes memory; a thread that
    had none to begin with is not in the list that it takes itself off."""
    if isinstance(what.object, GeneratorType) and what.exc_type is MemoryError:
        return
    if what.exc_type is KeyError and getattr(what.object, "__func__", None) is threading.Thread._bootstrap:     # type: ignore[attr-defined]
        return
    _ignored.append(f"{what.exc_type.__name__} ignored in {what.object!r}"[:200])


def run(seconds: float, seed: int = 1, *, share: tuple[int, int] = (0, 1), what: str = "", only: str = "") -> Tally:
    """All cases, or as many as there is time for, in an order by the seed; or the n-th of m shares of them.

    what: "calls" or "allocations"; "": first these, for half of the time at most, then those.
    only: operations whose names match this regular expression.
    """
    tally = Tally()
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(dir=scratch()) as root:
        library = build(root)
        for kind in ("calls", "allocations"):
            if what not in ("", kind):
                continue
            left = deadline - time.monotonic()
            left -= seconds / 2 if not what and kind == "calls" else 0
            done = subprocess.run(
                [sys.executable, "-m", "tests.proof.failures", "--child", json.dumps([kind, root, seed, left, share, only])],
                env={**os.environ, "LD_PRELOAD": f"{library} {os.environ.get('LD_PRELOAD', '')}",
                     "PYTHONFAULTHANDLER": "1", **(ALLOCATOR if kind == "allocations" else {})},
                stdout=subprocess.PIPE, text=True, check=True)
            said = json.loads(done.stdout)
            for name, number in said["counted"].items():
                tally.counted[name] += number
            tally.calls.update(said["calls"])
            tally.reached.update(said["reached"])
            tally.operations.update(said["operations"])
            tally.violations += said["violations"]
            tally.complete &= said["complete"]
            shutil.rmtree(os.path.join(root, "templates"))
    return tally


def child(arguments: str) -> int:
    kind, root, seed, seconds, share, only = json.loads(arguments)
    server = Server(root, seed, time.monotonic() + seconds, share, only)
    getattr(server, kind)()
    print(json.dumps(server.tally.as_json()))
    return 0


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--only", default="", help="operations whose names match this regular expression")
    parser.add_argument("--what", default="", choices=["", "calls", "allocations"])
    parser.add_argument("--child", help="used by itself")
    options = parser.parse_args()
    if options.child:
        return child(options.child)
    began = time.monotonic()
    tally = run(options.seconds, options.seed, what=options.what, only=options.only)
    print(f"{tally.counted['system calls']:,} failing system calls ({len(tally.reached)} kinds of call in operations), "
          f"{tally.counted['allocations']:,} failing allocations (all of {len(tally.operations)} operations), "
          f"{tally.counted['allocations for ever']:,} of them again for ever, in {time.monotonic() - began:.0f} s, "
          f"{'all there are' if tally.complete else 'not all there are'}; {len(tally.violations)} violations")
    return verdict(tally.violations)


if __name__ == "__main__":
    sys.exit(main())
