"""The handles: `Reader`, `Writer`, `Store`, and `open`."""

from __future__ import annotations

import atexit
import os
import threading
import warnings
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, MutableMapping, ValuesView
from types import TracebackType
from typing import Any, Literal, Self

from logkv import _core, files
from logkv.engine import Engine
from logkv.errors import ClosedError, LockedError, ReadOnlyError
from logkv.opening import Options
from logkv.writer import Writing, writers

Path = str | os.PathLike[str]
Key = bytes | str
Value = bytes | str | bytearray | memoryview
Sync = float | Literal["os", "always"]

_engines: dict[tuple[int, int, bool], Engine] = {}      # by device, inode, writable
_busy: dict[tuple[int, int, bool], threading.Event] = {}       # those that are being opened or closed
_engines_lock = threading.RLock()


def _text(path: Path) -> str:
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"a path must be str or os.PathLike[str], not {type(path).__name__}")
    return name


def _shared(directory: files.Directory, writable: bool, make: Callable[[], Engine]) -> tuple[Engine, bool]:
    """The process's engine for a store, and whether it is new.  One that another thread is just opening or closing is
    waited for."""
    key = (*directory.identity(), writable)
    while True:
        with _engines_lock:
            engine, busy = _engines.get(key), _busy.get(key)
            if engine is not None:
                directory.close()
                engine.users += 1
                return engine, False
            if busy is None:
                ready = _busy[key] = threading.Event()
                break
        busy.wait()
    try:
        engine = make()
        engine.users = 1
        with _engines_lock:
            _engines[key] = engine
        return engine, True
    finally:
        with _engines_lock:
            del _busy[key]
        ready.set()


def _acquire_reader(path: str) -> Engine:
    directory = files.Directory(path)
    return _shared(directory, False, lambda: Engine(directory))[0]


def _acquire_writer(path: str, flag: str, mode: int, options: Options, timeout: float) -> Writing:
    if not isinstance(mode, int):
        raise TypeError(f"mode must be an int, not {type(mode).__name__}")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds, not {type(timeout).__name__}")
    if not timeout >= 0:
        raise ValueError(f"timeout must be at least 0 seconds, not {timeout}")
    directory = files.Directory(path, create=flag in "cn", mode=mode)
    engine, new = _shared(directory, True,
                          lambda: Writing(directory, options, create=flag in "cn", timeout=timeout))
    assert isinstance(engine, Writing)
    try:
        if not new and flag == "n":
            raise LockedError(f"{path} is open for writing in this process: it cannot be replaced", pid=os.getpid())
        if engine.options != options:
            raise ValueError(f"{path} is open in this process with {engine.options}; it cannot be opened with "
                             f"{options} beside that")
        if flag == "n" and not engine.created:
            engine.clear()
    except BaseException:
        _release(engine)
        raise
    return engine


def _release(engine: Engine) -> None:
    with _engines_lock:
        engine.users -= 1
        if engine.users:
            return
        keys = [key for key, value in _engines.items() if value is engine]
        ended = threading.Event()
        for key in keys:
            del _engines[key]
            _busy[key] = ended
    try:
        engine.close()
    finally:
        with _engines_lock:
            for key in keys:
                del _busy[key]
        ended.set()


def _after_fork_in_child() -> None:
    global _engines_lock
    _engines_lock = threading.RLock()
    _busy.clear()
    for key, engine in list(_engines.items()):
        if engine.writable:
            del _engines[key]
    for writer in writers():
        writer.after_fork()


def _close_all() -> None:
    """At the interpreter's end, while threads can still be waited for."""
    for engine in list(_engines.values()):
        engine.close()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_after_fork_in_child)


class _Handle(_core.ReadHandle):
    """What every handle has: a path, an engine, an end."""

    _engine: Engine | None = None
    _path: str = ""

    def _hold(self, engine: Engine, path: str) -> None:
        self._engine = engine
        self._path = path
        self._attach(engine.log)

    @property
    def path(self) -> str:
        """The store's directory, as it was given."""
        return self._path

    def _open_engine(self) -> Engine:
        if self._engine is None or self.closed: 
            raise ClosedError(f"the store {self._path} is closed")
        return self._engine

    def close(self) -> None:
        """Closes this handle; again is fine.  The last one that writes makes everything durable and lets the writer's
        lock go.  Raises Error if that fails; the handle is closed then too."""
        engine, self._engine = self._engine, None
        if engine is not None:
            self._detach()      
            _release(engine)

    def __enter__(self) -> Self:
        self._open_engine()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        engine = self._engine
        if engine is not None:
            if engine.writable and engine.log.writable:
                warnings.warn(f"{self!r} was not closed", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        engine = self._engine
        state = "closed" if engine is None or self.closed else \
            f"{len(self)} keys" if isinstance(self, Mapping) else "open"  
        return f"<logkv.{type(self).__name__} {self._path!r}, {state}>"

    def stats(self) -> dict[str, Any]:
        """Numbers about the store: keys, bytes alive and dead, index, segments, how it was opened."""
        return self._open_engine().stats()


class _Keys(KeysView[bytes]):
    """Live; iterates in no particular order."""

    _mapping: Any

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._mapping)


class _Values(ValuesView[bytes]):
    _mapping: Any

    def __iter__(self) -> Iterator[bytes]:
        iterator: Iterator[bytes] = self._mapping._iterate(1)
        return iterator

    def __contains__(self, value: object) -> bool:
        wanted = _as_bytes(value)
        return any(value == wanted for value in self)


class _Items(ItemsView[bytes, bytes]):
    _mapping: Any

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        iterator: Iterator[tuple[bytes, bytes]] = self._mapping._iterate(2)
        return iterator

    def __contains__(self, item: object) -> bool:
        if not isinstance(item, tuple) or len(item) != 2:
            return False
        return bool(self._mapping.get(item[0], _MISSING) == _as_bytes(item[1]))


_MISSING = object()


def _as_bytes(value: object) -> object:
    return value.encode() if isinstance(value, str) else value


class _Reading(_Handle):
    """The reading half of the mapping, beside what `_core.ReadHandle` does."""

    def keys(self) -> KeysView[bytes]:
        """A live, set-like view of the keys."""
        return _Keys(self)

    def values(self) -> ValuesView[bytes]:
        """A live view of the values."""
        return _Values(self)

    def items(self) -> ItemsView[bytes, bytes]:
        """A live, set-like view of the pairs."""
        return _Items(self)

    def refresh(self) -> None:
        """Looks at the store anew.  Needed only where no writer could be seen before: a reader follows a live writer
        without it."""
        self._open_engine().refresh()


class Reader(_Reading, Mapping[bytes, bytes]):
    """A read-only mapping of a store that follows its writer live, in this process or another.

    Any number of readers may be open; they take no lock and never wait.
    """

    def __init__(self, path: Path) -> None:
        """Opens the store at `path`.

        Raises NotFoundError, FormatError, CorruptionError, Error.  O(1) beside a live or closed writer; after a power
        cut it builds an index of its own in memory, at some 100 ns a record.
        """
        name = _text(path)
        self._hold(_acquire_reader(name), name)


class _WritingHandle(_Handle):
    def sync(self) -> None:
        """Returns when everything that was written is on the device.  Raises Error if that fails, and then every
        later write does too: the system may have dropped what it could not write."""
        engine = self._open_engine()
        if not isinstance(engine, Writing):
            raise ReadOnlyError(f"{self._path} is open for reading only")
        engine.sync()


class Writer(_WritingHandle, _core.WriteHandle):
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

    def __init__(self, path: Path, *, mode: int = 0o666, sync: Sync = "os", segment_size: int = 256 << 20,
                 timeout: float = 0) -> None:
        """Opens the store at `path` for writing and creates it if it is missing; the arguments are `open`'s."""
        name = _text(path)
        self._hold(_acquire_writer(name, "c", mode, Options(sync, segment_size), timeout), name)


class Store(_WritingHandle, _Reading, _core.WriteHandle, MutableMapping[bytes, bytes]):
    """A persistent mapping of bytes to bytes: reader and writer in one.  The arguments are those of `logkv.open`."""

    _popping: Iterator[bytes] | None = None

    def __init__(self, path: Path, flag: str = "c", mode: int = 0o666, *, sync: Sync = "os",
                 segment_size: int = 256 << 20, timeout: float = 0) -> None:
        """Opens the store at `path`; see `logkv.open`."""
        name = _text(path)
        if flag not in ("r", "w", "c", "n"):
            raise ValueError(f'flag must be "r", "w", "c" or "n", not {flag!r}')
        options = Options(sync, segment_size)
        self._hold(_acquire_reader(name) if flag == "r" else _acquire_writer(name, flag, mode, options, timeout), name)

    def update(self, other: Any = (), /, **more: Any) -> None:
        """Stores all pairs of a mapping, or of an iterable of pairs, and of the keywords; each by itself."""
        MutableMapping.update(self, other, **more)

    def popitem(self) -> tuple[bytes, bytes]:
        """Removes some pair and returns it; KeyError if there is none.  Atomic between threads; O(1) on average."""
        while True:
            fresh = self._popping is None
            keys = self._popping = self._popping or self._iterate(0)
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

    def setdefault(self, key: Key, default: Value = b"") -> bytes:
        """The value of `key`; if there is none, `default` is stored and returned as it was stored."""
        value: bytes | None = self.get(key)
        if value is None:
            self.put(key, default)
            value = self[key]
        return value

    def clear(self) -> None:
        """Removes everything, quickly and atomically: the log begins anew, the old files go."""
        engine = self._open_engine()
        if not isinstance(engine, Writing) or not engine.log.writable:
            raise ReadOnlyError(f"{self._path} is open for reading only")
        engine.clear()

    def __reversed__(self) -> Iterator[bytes]:
        raise TypeError("a LogKV store keeps no order of insertion")


def open(path: Path, flag: str = "c", mode: int = 0o666, *, sync: Sync = "os", segment_size: int = 256 << 20,
         timeout: float = 0) -> Store:
    """Opens a store and returns a mapping of bytes to bytes.

    path: its directory.
    flag: "r" an existing store, for reading only; "w" an existing one; "c" created if missing; "n" a new, empty one
        (an existing store is emptied; anything else is refused).
    mode: rights of new files, less the umask.
    sync: what an acknowledged write survives beside the death of the process, which it always does.  "os": nothing
        more.  Seconds: loss of power, except for at most the last so many seconds.  "always": loss of power; every
        write waits for the device.
    segment_size: bytes of a file of the log, from 64 KiB to 1 GiB.
    timeout: seconds to wait while another process writes.

    Raises NotFoundError, FormatError (something else is there, or a newer format), LockedError (another writer),
    CorruptionError, Error (an OSError: rights, a full disk), ValueError and TypeError for the arguments.

    O(1) after a clean close and after the death of a writer.  After a power cut the index is rebuilt: some 100 ns a record.

    >>> import tempfile
    >>> db = open(tempfile.mkdtemp())
    >>> db["btc"] = "4411.99"
    >>> db["btc"]
    b'4411.99'
    >>> db.close()
    """
    return Store(path, flag, mode, sync=sync, segment_size=segment_size, timeout=timeout)


__all__ = ["Reader", "Store", "Writer", "open"]
