"""A store under test and its history: all on one thread, and told to a recorder step by step."""

from __future__ import annotations

import functools
import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import baseline
from logkv import _core, manifest, opening, store, writer
from logkv.errors import Error
from logkv.manifest import Manifest
from logkv.opening import Options
from tests.proof.common import NOISE, SEGMENT
from tests.proof.events import Begun, Compacting, Durable, Returned
from tests.proof.recorder import Recorder


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


class Later:
    """In place of `logkv.worker.Worker`: what waits is done between two operations, when the session says so."""

    def __init__(self, engine: writer.Writing) -> None:
        self._waiting: dict[str, Callable[[], None]] = {}

    def call(self, method: Callable[[], None]) -> None:
        self._waiting.setdefault(method.__name__, method)

    def call_later(self, delay: float, method: Callable[[], None]) -> None:
        self.call(method)

    def runs_here(self) -> bool:
        return False

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


def engine_of(db: store.Store) -> writer.Writing:
    """Of a store that is open for writing."""
    engine = db._engine
    assert isinstance(engine, writer.Writing)
    return engine


def rotate(db: store.Store) -> None:
    """Goes on in a new segment; what came before is sealed when this returns."""
    engine = engine_of(db)
    while engine.full_segments():
        engine.seal_oldest()
    engine._rotate(0)
    engine.seal_oldest()


def sealed_segments(db: store.Store) -> int:
    """How many there are."""
    return sum(segment.sealed for segment in engine_of(db).manifest.segments)


def merge(db: store.Store, first: int, last: int) -> None:
    """Merges the sealed segments from the `first` to the `last`, counted from 0."""
    engine = engine_of(db)
    with engine.compactor.lock:
        engine.compactor._merge([segment for segment in engine.manifest.segments if segment.sealed][first:last + 1])


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
        return engine_of(self.store)

    def open(self, flag: str = "c", crowded: bool = False) -> None:
        """crowded: as if few locations were left; they are given out anew."""
        with patch.object(manifest.Manifest, "is_crowded", True) if crowded else nullcontext():
            self._store = open_store(self.path, flag, self.options)
        if self.recorder is not None:
            engine = self._engine
            for owner, name in ((engine, "seal_oldest"), (engine.compactor, "_merge"),
                                (engine.compactor, "_finish_interrupted")):
                setattr(owner, name, self._noted(getattr(owner, name)))

    def _noted(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """A step of compaction, and when it begins and ends."""
        @functools.wraps(step)
        def noted(*arguments: Any) -> Any:
            self._note(Compacting(True))
            try:
                return step(*arguments)
            finally:
                self._note(Compacting(False))

        return noted

    @property
    def recovered(self) -> dict[str, Any]:
        """What the opening found, as in `stats()["recovery"]`."""
        return self._engine.recovered

    def _note(self, event: Begun | Returned | Durable | Compacting) -> None:
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
        size = max(0, size - len(mark))
        at = self.dice.randrange(len(NOISE) - size)
        value = mark + NOISE[at:at + size]
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
        self._note(Durable(len(self.history)) if self.options.sync == "always" else Returned(len(self.history)))

    def sync(self) -> None:
        for _ in range(self.dice.choice((1, 1, 2))):
            covered = len(self.history)
            with self._others():
                self.store.sync()
            self._note(Durable(covered))
        self._work()

    def fail_sync(self) -> None:
        """A sync of the log fails, the writer closes or dies, and the next one opens the store in the same boot."""
        assert self.recorder is not None
        self.recorder.failing = True
        with suppress(Error):
            self.store.sync()
        self.recorder.failing = False
        if self.dice.random() < 0.5:
            self.kill()
        else:
            with suppress(Error):
                self.store.close()
        self.open("w")

    def close(self) -> None:
        self.store.close()
        self._note(Durable(len(self.history)))

    def compact(self) -> None:
        with self._others():
            self.store.compact()
        self._work()

    def rotate(self) -> None:
        with self._others():
            rotate(self.store)
        self._work()

    def merge(self) -> None:
        """Merges some neighbours."""
        if sealed := sealed_segments(self.store):
            first = self.dice.randrange(sealed)
            with self._others():
                merge(self.store, first, self.dice.randint(first, sealed))
        self._work()

    def move(self) -> None:
        """Closed or killed; the next opening gives the locations out anew."""
        if self.dice.random() < 0.5:
            self.kill()
        else:
            self.close()
        self.open("w", crowded=True)

    def shrink_index(self) -> None:
        """As if it were much larger than needed."""
        with patch.object(writer, "LARGE_INDEX", 0):
            self._engine.shrink_index()
        self._work()

    def _work(self) -> None:
        for worker in (self._engine._worker, self._engine._merger):
            if self.dice.random() < self.diligence:
                with self._others():
                    worker.work()               # type: ignore[attr-defined]

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


class _Seeded:
    """`secrets`, as the engine uses it."""

    def __init__(self, dice: random.Random) -> None:
        self.randbits = dice.getrandbits
        self.token_bytes = dice.randbytes


@contextmanager
def determined(dice: random.Random) -> Iterator[None]:
    """All on one thread, and identities, salts and seeds from these dice: a run can be repeated.  What fails in the
    background raises.  Files are small at first, so that they grow often.  The pure-Python program has the core's
    checksum, which is compared with its own elsewhere.  The same bytes are decoded as a MANIFEST once: the engine changes
    none that it has read."""
    decode = functools.lru_cache(64)(Manifest.decode)
    places: list[tuple[Any, str, Any]] = [(manifest, "secrets", _Seeded(dice)), (writer, "secrets", _Seeded(dice)),
                                          (writer, "Worker", Later), (baseline, "crc32c", _core.checksum),
                                          (opening, "FIRST_STEP", _core.PAGE), (Manifest, "decode", decode)]
    before = [vars(module)[name] for module, name, _ in places]
    for module, name, value in places:
        setattr(module, name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            yield
    finally:
        for (module, name, _), value in zip(places, before):
            setattr(module, name, value)
