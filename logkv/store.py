"""The handles: `Reader`, `Writer`, `Store`, and `open`."""

from __future__ import annotations

import atexit
import errno
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack, overload

from logkv import _core, codecs, files, views
from logkv.backup import Backup, back_up
from logkv.codecs import Codec, SupportsCodec
from logkv.engine import Engine, Progress
from logkv.errors import ClosedError, Error, LockedError, ReadOnlyError
from logkv.manifest import Manifest
from logkv.opening import Options
from logkv.verification import Report, verify_directory
from logkv.writer import Writing, writers

V = TypeVar("V")
Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Key = bytes | str
Sync = float | Literal["os", "always"]
Compaction = Literal["auto", "manual"]
_MISSING = object()


class _Options(TypedDict, total=False):
    sync: Sync
    segment_size: int
    timeout: float
    compaction: Compaction
    compaction_rate: float | None
    progress: Progress | None


_Key = tuple[int, int, bool]                    # device, inode, writable
_engines: weakref.WeakValueDictionary[_Key, Engine] = weakref.WeakValueDictionary()     # held by their handles
_busy: dict[_Key, _Busy] = {}                   # those that are being opened or closed
_engines_lock = threading.RLock()


class _Busy:
    """A thread is opening or closing an engine."""

    def __init__(self) -> None:
        self._under_way = threading.Lock()
        self._under_way.acquire()
        self._thread = threading.get_ident()

    def end(self) -> None:
        self._under_way.release()

    def wait(self, path: str, deadline: float | None) -> None:
        """Raises LockedError at the deadline, and where this thread would wait for itself: in a signal's handler."""
        left = -1 if deadline is None else max(0.0, deadline - time.monotonic())
        if self._thread == threading.get_ident() or not self._under_way.acquire(timeout=left):
            raise LockedError(errno.EAGAIN, f"{path} is just being opened or closed in this process", pid=os.getpid())
        self._under_way.release()


def _shared(directory: files.Directory, writable: bool, make: Callable[[], Engine],
            deadline: float | None) -> tuple[Engine, bool]:
    """The process's engine for a store, and whether it is new.  One that another thread is just opening or closing is
    waited for."""
    busy: _Busy | None = None
    held: Engine | None = None
    try:
        with files.full_disk_is_an_error(directory.path, "open the store"):
            key = (*directory.identity(), writable)
        while busy is None:
            with _engines_lock:
                engine, other = _engines.get(key), _busy.get(key)
                if engine is not None and engine.log.closed:    # it could not go on: who holds it lets it go
                    del _engines[key]
                elif engine is not None:
                    engine.users += 1
                    held = engine
                    directory.close()
                    return held, False
                if other is None:
                    busy = _busy[key] = _Busy()
            if other is not None:
                other.wait(directory.path, deadline)
        held = make()
        held.users, held.key = 1, key
        with _engines_lock:
            _engines[key] = held
        return held, True
    except BaseException:
        try:
            if held is not None:
                _release(held)          # which may need its directory, and that may be this one
        finally:
            directory.close()
        raise
    finally:
        if busy is not None:
            _end(busy, key)


def _end(busy: _Busy, key: _Key) -> None:
    """Who waits goes on.  Without a lock, and without an allocation."""
    if _busy.get(key) is busy:
        del _busy[key]
    busy.end()


def _acquire_reader(path: str, progress: Progress | None = None) -> Engine:
    directory = files.Directory(path)
    return _shared(directory, False, lambda: Engine(directory, progress=progress), None)[0]


def _acquire_writer(path: str, flag: str, mode: int, options: Options, timeout: float,
                    progress: Progress | None = None) -> Writing:
    if not isinstance(mode, int):
        raise TypeError(f"mode must be an int, not {type(mode).__name__}")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds, not {type(timeout).__name__}")
    if not timeout >= 0:
        raise ValueError(f"timeout must be at least 0 seconds, not {timeout}")
    deadline = time.monotonic() + timeout
    directory = files.Directory(path, create=flag in "cn", mode=mode)

    def check(current: Manifest) -> None:
        if flag != "n":
            codecs.check_name(options.codec, current.codec, path)

    def make() -> Engine:
        left = max(0.0, deadline - time.monotonic()) if timeout else 0
        made = Writing(directory, options, create=flag in "cn", timeout=left, check=check, progress=progress)
        try:
            if flag == "n" and not made.created:
                made.clear(options.codec)
        except BaseException:
            with suppress(Error):       # what was raised says more
                made.close()
            raise
        return made

    engine, new = _shared(directory, True, make, deadline)
    assert isinstance(engine, Writing)
    try:
        if not new and flag == "n":
            raise LockedError(errno.EAGAIN, f"{path} is open for writing in this process: it cannot be replaced",
                              pid=os.getpid())
        if engine.options != options:
            raise ValueError(f"{path} is open in this process with {engine.options}; it cannot be opened with "
                             f"{options} beside that")
    except BaseException:
        _release(engine)
        raise
    return engine


def _release(engine: Engine) -> None:
    """One handle less; the last one closes it."""
    with _engines_lock:
        busy = _leaving(engine)
        engine.users -= 1
    if busy is not None:
        _close(engine, busy)


def _leaving(engine: Engine) -> _Busy | None:
    """With the lock held, before a handle goes: if it is the last one, who comes waits until the engine is closed."""
    if engine.users > 1:
        return None
    busy = _Busy()
    if _engines.get(engine.key) is engine:
        _busy[engine.key] = busy
        del _engines[engine.key]
    return busy


def _close(engine: Engine, busy: _Busy) -> None:
    try:
        engine.close()
    except MemoryError:
        engine.release()                # what it ended before
        raise
    finally:
        _end(busy, engine.key)


def _after_fork_in_child() -> None:
    global _engines_lock
    _engines_lock = threading.RLock()
    _busy.clear()
    files.forget_locks()
    for key, engine in list(_engines.items()):
        if engine.writable:
            del _engines[key]
    for writer in writers():
        writer.after_fork()
    for engine in _engines.values():
        engine.after_fork()


def _close_all() -> None:
    """At the interpreter's end, while threads can still be waited for."""
    for engine in list(_engines.values()):
        try:
            engine.close()
        except Error as problem:        # the others are closed all the same
            warnings.warn(f"{engine.directory.path} was not closed well: {problem}", RuntimeWarning)


atexit.register(_close_all)
os.register_at_fork(after_in_child=_after_fork_in_child)


class _Handle(_core.ReadHandle[V]):
    """What every handle has: a path, an engine, a codec, an end."""

    _engine: Engine | None = None
    _path: str = ""
    _absolute: str = ""
    _asked: Any = None              # the argument `codec`
    _decodes = False
    _writes = False                 # or did before a fork
    _popping: Iterator[bytes] | None = None

    def _hold(self, engine: Engine, path: str, codec: Any = None) -> None:
        try:
            resolved = codecs.resolve(codec)
            if not (resolved is codecs.AS_STORED and not engine.writable):
                codecs.check_name(resolved.name, engine.codec, path)
            self._absolute = os.path.abspath(path)
        except BaseException:
            _release(engine)
            raise
        self._engine, self._path, self._asked = engine, path, codec
        self._decodes = resolved.decode is not None
        self._writes = engine.writable
        self._attach(engine.log, resolved.encode, resolved.decode)

    def _own_state(self) -> dict[str, Any]:
        """What a subclass keeps in a handle."""
        return {name: value for name, value in dict(vars(self)).items() if not hasattr(_Handle, name)}

    @property
    def path(self) -> str:
        """The store's directory, as it was given."""
        return self._path

    @property
    def codec(self) -> str | None:
        """The name of what the store's values are encoded with; None: they are bytes."""
        return self._open_engine().codec

    def _open_engine(self) -> Engine:
        engine = self._engine           # once: another thread may be closing the handle
        if engine is None or self.closed:
            raise ClosedError(f"the store {self._path} is closed")
        return engine

    def close(self) -> None:
        """Closes this handle; again is fine.  The last one that writes makes everything durable and lets the writer's
        lock go.  Raises Error if that fails; the handle is closed then too."""
        own = vars(self)
        with _engines_lock:
            engine = self._engine
            if engine is None:
                return
            busy = _leaving(engine)     # where memory ends here or before, nothing has happened
            if own.pop("_engine", None) is not None:        # by nobody else, in a signal's handler
                engine.users -= 1
                self._detach()
        self._popping = None
        if busy is not None:
            _close(engine, busy)

    def __enter__(self) -> Self:
        self._open_engine()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        engine = self._engine
        if engine is not None and _release is not None:     # else this module has gone first: the interpreter ends
            try:
                if engine.writable and engine.log.writable:
                    warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=2)
            finally:
                self.close()

    def __copy__(self) -> Self:
        """Another handle of the same store, with the same rights."""
        twin = type(self).__new__(type(self))
        with _engines_lock:
            engine = self._open_engine()
            engine.users += 1
        twin._hold(engine, self._path, self._asked)
        twin._absolute, twin._writes = self._absolute, self._writes
        vars(twin).update(self._own_state())
        return twin

    def __deepcopy__(self, memo: object) -> Self:
        return self.__copy__()

    def __repr__(self) -> str:
        state = "closed" if self._engine is None or self.closed else "open"
        if state == "open" and isinstance(self, Mapping):
            with suppress(Error):       # nothing that prints a handle should fail because of the store
                state = f"{len(self)} keys"
        return f"<logkv.{type(self).__name__} {self._path!r}, {state}>"

    def stats(self) -> dict[str, Any]:
        """What is known of the store now: keys, bytes alive and dead, index, segments, how it was opened.
        O(segments and shards of the index)."""
        return self._open_engine().stats()

    def backup(self, dest: Path, *, links: bool = True, progress: Progress | None = None) -> Backup:
        """Copies the store to the directory `dest`, which is a store then: to restore it, open it, or a copy of it.
        Nobody is stopped: this and other processes read and write on.

        What was acknowledged before the call is in the copy; of what comes meanwhile, some of the first.  When this
        returns the copy was read back and checked, and is on the device.  `dest` may be an earlier backup of the same
        store that nobody has opened for writing: then only what is new is added, and that backup stays whole until
        this one is.

        links: segments that are sealed, and so never change, get a second name (a hard link) where the file system
            allows it.  They then share their bytes on the device with the store: a bad sector there hits both.  False:
            all are copied.
        progress: called as progress(done, total), in bytes.

        Raises FormatError (`dest` holds something else), LockedError (it is in use), ValueError (it is inside the
        store), CorruptionError (what is to be copied is damaged: it names the file) and Error (a full disk, a writer
        whose sync has failed); `dest` is then what it was.  O(bytes that are new in `dest`).
        """
        engine = self._open_engine()
        if engine.writable and engine.log.poisoned:
            raise Error(engine.log.poisoned)
        return back_up(engine.directory, os.fsdecode(dest), links=links, progress=progress)


class _Reading(_Handle[V]):
    """The reading half of the mapping, beside what `_core.ReadHandle` does."""

    def keys(self) -> views.Keys:
        """A live, set-like view of the keys."""
        return views.Keys(self)

    def values(self) -> views.Values[V]:
        """A live view of the values."""
        return views.Values(self)

    def items(self) -> views.Items[V]:
        """A live, set-like view of the pairs."""
        return views.Items(self)

    def copy(self) -> dict[bytes, V]:
        """A dict of all pairs."""
        return dict(self.items())

    def __or__(self, other: Mapping[Key, Any]) -> dict[bytes, Any]:
        return self.copy() | self._pairs_of(other) if isinstance(other, Mapping) else NotImplemented

    def __ror__(self, other: Mapping[Key, Any]) -> dict[bytes, Any]:
        return self._pairs_of(other) | self.copy() if isinstance(other, Mapping) else NotImplemented

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same pairs; a str of the other side stands for its bytes in UTF-8."""
        if not isinstance(other, Mapping):
            return NotImplemented
        if not isinstance(other, _Reading):
            try:
                other = self._pairs_of(other)
            except UnicodeEncodeError:      # such a str stands for no bytes
                return False
        return len(self) == len(other) and all(other.get(key, _MISSING) == value for key, value in self.items())

    __hash__ = None                 # type: ignore[assignment]

    def _pairs_of(self, other: Mapping[Any, Any]) -> dict[Any, Any]:
        return {views.as_bytes(key): self._as_stored(value) for key, value in other.items()}

    def _as_stored(self, value: object) -> object:
        return value if self._decodes else views.as_bytes(value)

    def __reduce__(self) -> Any:
        self._open_engine()
        return _reopen, (type(self), self._absolute, self._asked), self._own_state()

    def verify(self, *, progress: Progress | None = None) -> Report:
        """Reads everything that the store holds and reports damage; see `logkv.verify`."""
        with files.full_disk_is_an_error(self._path, "verify the store"):
            directory = self._open_engine().directory.again()
        return verify_directory(directory, progress)

    def refresh(self) -> None:
        """Looks at the store anew.  Needed only where no writer could be seen before: a reader follows a live writer
        without it."""
        self._open_engine().refresh()


def _reopen(kind: type[_Reading[Any]], path: str, codec: Any) -> Any:
    """What was pickled, opened for reading."""
    handle = kind.__new__(kind)
    handle._hold(_acquire_reader(path), path, codec)
    return handle


class Reader(_Reading[V], Mapping[bytes, V]):
    """A read-only mapping of a store that follows its writer live, in this process or another.

    Any number of readers may be open; they take no lock and never wait.  Pickled, a Reader opens the store again where it
    is unpickled.
    """

    @overload
    def __init__(self: Reader[bytes], path: Path, *, codec: Literal["bytes"] | None = None,
                 progress: Progress | None = None) -> None: ...
    @overload
    def __init__(self: Reader[str], path: Path, *, codec: Literal["str"], progress: Progress | None = None) -> None: ...
    @overload
    def __init__(self: Reader[Any], path: Path, *, codec: str | Codec | None,
                 progress: Progress | None = None) -> None: ...
    @overload
    def __init__(self, path: Path, *, codec: SupportsCodec[V], progress: Progress | None = None) -> None: ...

    def __init__(self, path: Path, *, codec: Any = None, progress: Progress | None = None) -> None:
        """Opens the store at `path`.

        codec: what the values are encoded with, as for `logkv.open`; "bytes": the stored bytes, whatever it is.
        progress: called while an index is built, as for `logkv.open`.

        Raises NotFoundError, FormatError, CorruptionError, Error, ValueError (the store has another codec).  O(1) beside
        a live or closed writer; after a power cut it builds an index of its own in memory, at some 100 ns a record.
        """
        codecs.resolve(codec)
        name = os.fsdecode(path)
        self._hold(_acquire_reader(name, progress), name, codec)


class _WritingHandle(_Handle[V]):
    def sync(self) -> None:
        """Returns when everything that was written is on the device; a handle that only reads has nothing to wait for.
        Raises Error if that fails, and then every later write does too: the system may have dropped what it could not
        write."""
        engine = self._open_engine()
        if isinstance(engine, Writing):
            engine.sync()
        elif self._writes:
            raise ReadOnlyError(f"{self._path} is open for reading only in the child of a fork")

    def compact(self, *, progress: Progress | None = None) -> None:
        """Drops all that is dead: deleted and overwritten records, and tombstones that nothing needs any more.  Reads and
        writes go on meanwhile.

        progress: called as progress(done, total), in bytes of records.  What was done stays done where this raises:
        CorruptionError (a record is damaged: its segment stays), Error (a full disk), ReadOnlyError, ClosedError.  Takes
        the time to copy what is alive in segments of which something is dead; the disk needs room for the largest segment.
        """
        engine = self._open_engine()
        if not isinstance(engine, Writing) or not engine.log.writable:
            raise ReadOnlyError(f"{self._path} is open for reading only")
        engine.compactor.everything(progress or (lambda done, total: None))


class Writer(_WritingHandle[V], _core.WriteHandle[V]):
    """The single writer of a store; of the reading half it has `get`, `[]`, `in`, `len` and iteration over keys.  `Store`
    is the whole mapping.

    >>> import logkv, tempfile
    >>> path = tempfile.mkdtemp()
    >>> with logkv.Writer(path) as writer:
    ...     version = writer.put("btc", "4411.99")
    ...     writer.delete("eth")
    False
    >>> with logkv.Reader(path) as reader:
    ...     reader["btc"]
    b'4411.99'
    """

    @overload
    def __init__(self: Writer[bytes], path: Path, *, mode: int = ..., codec: Literal["bytes"] | None = None,
                 **options: Unpack[_Options]) -> None: ...
    @overload
    def __init__(self: Writer[str], path: Path, *, mode: int = ..., codec: Literal["str"],
                 **options: Unpack[_Options]) -> None: ...
    @overload
    def __init__(self: Writer[Any], path: Path, *, mode: int = ..., codec: str | Codec | None,
                 **options: Unpack[_Options]) -> None: ...
    @overload
    def __init__(self, path: Path, *, mode: int = ..., codec: SupportsCodec[V],
                 **options: Unpack[_Options]) -> None: ...

    def __init__(self, path: Path, *, mode: int = 0o666, sync: Sync = "os", segment_size: int = 256 << 20,
                 timeout: float = 0, codec: Any = None, compaction: Compaction = "auto",
                 compaction_rate: float | None = None, progress: Progress | None = None) -> None:
        """Opens the store at `path` for writing and creates it if it is missing; the arguments are `open`'s."""
        name = os.fsdecode(path)
        options = Options(sync, segment_size, codecs.resolve(codec).name, compaction, compaction_rate)
        self._hold(_acquire_writer(name, "c", mode, options, timeout, progress), name, codec)

    def __reduce__(self) -> Any:
        raise TypeError(f"{self!r} is the store's one writer and is not pickled; pickle a Reader")


class Store(_WritingHandle[V], _Reading[V], _core.WriteHandle[V], MutableMapping[bytes, V]):
    """A persistent mapping of bytes to bytes, or to what its codec makes of them: reader and writer in one.

    Pickled, it opens the store for reading where it is unpickled.
    """

    @overload
    def __init__(self: Store[bytes], path: Path, flag: str = ..., mode: int = ..., *,
                 codec: Literal["bytes"] | None = None, **options: Unpack[_Options]) -> None: ...
    @overload
    def __init__(self: Store[str], path: Path, flag: str = ..., mode: int = ..., *, codec: Literal["str"],
                 **options: Unpack[_Options]) -> None: ...
    @overload
    def __init__(self: Store[Any], path: Path, flag: str = ..., mode: int = ..., *, codec: str | Codec | None,
                 **options: Unpack[_Options]) -> None: ...
    @overload
    def __init__(self, path: Path, flag: str = ..., mode: int = ..., *, codec: SupportsCodec[V],
                 **options: Unpack[_Options]) -> None: ...

    def __init__(self, path: Path, flag: str = "c", mode: int = 0o666, *, sync: Sync = "os",
                 segment_size: int = 256 << 20, timeout: float = 0, codec: Any = None, compaction: Compaction = "auto",
                 compaction_rate: float | None = None, progress: Progress | None = None) -> None:
        """Opens the store at `path`; see `logkv.open`."""
        name = os.fsdecode(path)
        if flag not in ("r", "w", "c", "n"):
            raise ValueError(f'flag must be "r", "w", "c" or "n", not {flag!r}')
        options = Options(sync, segment_size, codecs.resolve(codec).name, compaction, compaction_rate)
        engine = _acquire_reader(name, progress) if flag == "r" else \
            _acquire_writer(name, flag, mode, options, timeout, progress)
        self._hold(engine, name, codec)

    def update(self, other: Any = (), /, **more: Any) -> None:
        """Stores all pairs of a mapping, or of an iterable of pairs, and of the keywords; each by itself."""
        MutableMapping.update(self, other, **more)

    def __ior__(self, other: Any) -> Self:      # type: ignore[override, misc]
        self.update(other)
        return self

    def popitem(self) -> tuple[bytes, V]:
        """Removes some pair and returns it; KeyError if there is none.  Atomic between threads; O(1) on average."""
        while True:
            fresh = self._popping is None
            keys = self._popping = self._popping or self._iterate(0, False)
            for key in keys:
                popped = self._pop(key)
                if popped:
                    return key, popped[0]
            self._popping = None
            if fresh:
                raise KeyError("popitem(): the store is empty")

    def pop(self, key: Key, *default: Any) -> Any:
        """Removes a key and returns its value, or the default; KeyError without one.  Atomic between threads."""
        if len(default) > 1:
            raise TypeError(f"pop expected at most 2 arguments, got {1 + len(default)}")
        popped = self._pop(key)
        if popped:
            return popped[0]
        if default:
            return default[0]
        raise KeyError(key)

    def setdefault(self, key: Key, default: Any = _MISSING) -> V:
        """The value of `key`; if there is none, `default` is stored and returned as it was stored.  Without a default
        that is b"", with a codec None."""
        value: Any = self.get(key, _MISSING)
        if value is _MISSING:
            if default is _MISSING:
                default = None if self._decodes else b""
            self.put(key, default)
            value = self[key]
        return value    # type: ignore[no-any-return]

    def clear(self) -> None:
        """Removes everything, quickly and atomically: the log begins anew, the old files go."""
        engine = self._open_engine()
        if not isinstance(engine, Writing) or not engine.log.writable:
            raise ReadOnlyError(f"{self._path} is open for reading only")
        engine.clear(engine.codec)

    def reorganize(self) -> None:
        """`compact()`, by the name that it has in `dbm`."""
        self.compact()

    def __reversed__(self) -> Iterator[bytes]:
        raise TypeError("a LogKV store keeps no order of insertion")


@overload
def open(path: Path, flag: str = ..., mode: int = ..., *, codec: Literal["bytes"] | None = None,
         **options: Unpack[_Options]) -> Store[bytes]: ...
@overload
def open(path: Path, flag: str = ..., mode: int = ..., *, codec: Literal["str"],
         **options: Unpack[_Options]) -> Store[str]: ...
@overload
def open(path: Path, flag: str = ..., mode: int = ..., *, codec: str | Codec | None,
         **options: Unpack[_Options]) -> Store[Any]: ...
@overload
def open(path: Path, flag: str = ..., mode: int = ..., *, codec: SupportsCodec[V],
         **options: Unpack[_Options]) -> Store[V]: ...


def open(path: Path, flag: str = "c", mode: int = 0o666, *, sync: Sync = "os", segment_size: int = 256 << 20,
         timeout: float = 0, codec: Any = None, compaction: Compaction = "auto", compaction_rate: float | None = None,
         progress: Progress | None = None) -> Store[Any]:
    """Opens a store and returns a Store: a mapping of bytes to bytes, or to what the codec makes of them.

    path: its directory.
    flag: "r" an existing store, for reading only; "w" an existing one; "c" created if missing; "n" a new, empty one
        (an existing store is emptied; anything else is refused).
    mode: rights of new files, less the umask.
    sync: what an acknowledged write survives beside the death of the process, which it always does.  "os": nothing
        more.  Seconds: loss of power, except for at most the last so many seconds.  "always": loss of power; every
        write waits for the device.
    segment_size: bytes of a file of the log, from 64 KiB to 1 GiB.
    timeout: seconds to wait while another process writes; who waits first is served first.
    codec: what the values are, if not bytes: "str", "json", "pickle" (never for a store of somebody you do not trust:
        unpickling runs what the store says), or an object with `encode(value) -> bytes | str` and
        `decode(bytes) -> value`.  Its name is kept in the store, which is not opened with another one.
    compaction: "auto": dead records are dropped in the background, so that the store takes at most some 2.5 times its live
        data and 32 MiB.  "manual": only by `compact()`.
    compaction_rate: bytes a second that this may write in the background; None: no limit.
    progress: called as progress(done, total), in bytes of the log, while the index is rebuilt: after a power cut, or in
        a copy of an open store.

    Raises NotFoundError, FormatError (something else is there, or a newer format), LockedError (another writer),
    CorruptionError, Error (an OSError: rights, a full disk), ValueError (among others: the store has another codec) and
    TypeError for the arguments.

    O(1) after a clean close and after the death of a writer.  After a power cut the index is rebuilt: some 100 ns a record.

    >>> import tempfile
    >>> db = open(tempfile.mkdtemp())
    >>> db["btc"] = "4411.99"
    >>> db["btc"]
    b'4411.99'
    >>> db.close()
    """
    return Store(path, flag, mode, sync=sync, segment_size=segment_size, timeout=timeout, codec=codec,
                 compaction=compaction, compaction_rate=compaction_rate, progress=progress)


__all__ = ["Reader", "Store", "Writer", "open"]
