"""Named workloads, each the same for every engine, with the shape, the number of keys and the seed as parameters.

How they are measured, here and in `python -m benchmarks`:

- Random keys, none twice, with random values. The pairs are shuffled before the fill, so that their order has nothing
  to do with where their objects lie in memory.
- Keys that are looked up are other objects than those stored: equal bytes, made anew for every run in the order of
  the loop, as when they come from a request or a file. So no hash is there already and no comparison is one of
  addresses.
- Plain `for` loops over the mapping. LogKV and the baseline verify a record's checksum at every get.
- A dict keeps a reference to the value that it is given and returns it; a store copies its bytes, in and out.
- Every round has a fresh store in a fresh directory, and the engines take turns at each workload within a round. What
  counts are the medians of the rounds, and for a ratio the median of the ratios within a round, so that a round on a
  busy machine does not stand against one on an idle machine. The garbage collector is off while a workload runs.
- The baseline in pure Python is slow: it gets a tenth of the keys.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import logkv
from benchmarks.baseline import BaselineStore

Mapping = MutableMapping[bytes, bytes]
Pair = tuple[bytes, bytes]
Samples = dict[str, dict[str, list[float]]]  # of a workload and an engine, one of each round
Tell = Callable[[str, int], None]  # what begins now, and for how many keys


@dataclass(frozen=True, slots=True)
class Shape:
    """How many bytes a key and a value have. `share`: it gets so much of the keys."""

    key: int
    value: int
    share: float = 1

    @property
    def name(self) -> str:
        """As it is named on the command line."""
        return f"{self.key}+{self.value}"

    def keys_of(self, keys: int) -> int:
        """Its share of the keys that were asked for."""
        return max(1, round(keys * self.share))


SHAPES = {shape.name: shape for shape in (Shape(16, 100), Shape(8, 20), Shape(40, 1000, share=0.2))}


@dataclass(frozen=True, slots=True)
class Engine:
    """What is measured. `share`: it gets so much of the keys. Without `stored` there is nothing to open again."""

    name: str
    open: Callable[[Path], Mapping]
    share: float = 1
    stored: bool = True


ENGINES = [
    Engine("dict", lambda path: {}, stored=False),
    Engine("logkv", lambda path: logkv.open(path)),
    Engine("baseline", lambda path: BaselineStore(path), share=0.1),
    Engine("baseline, unchecked", lambda path: BaselineStore(path, check=False), share=0.1),
]


def engine_named(name: str) -> Engine:
    """An engine of the table."""
    return next(engine for engine in ENGINES if engine.name == name)


# ---- the loops


def store_pairs(db: Mapping, pairs: Iterable[Pair]) -> None:
    for key, value in pairs:
        db[key] = value


def get_keys(db: Mapping, keys: Iterable[bytes]) -> None:
    for key in keys:
        db[key]


def miss_keys(db: Mapping, keys: Iterable[bytes]) -> None:
    for key in keys:
        db.get(key)


def walk_items(db: Mapping) -> None:
    for _key, _value in db.items():
        pass


def delete_keys(db: Mapping, keys: Iterable[bytes]) -> None:
    for key in keys:
        del db[key]


# ---- workloads on a store

WORKLOADS = ["fill", "get", "miss", "items", "overwrite", "delete"]
# One call each: open a store that was filled, after a clean close, after a kill, and without its index. They come
# last, because `killed` forks: a dict's pages would be copied at the first store into each.
OPENINGS = ["reopen", "killed", "recover"]
WHOLE = ["reopen", "killed"]  # whose time is that of the call, not of each key


def engines_of(workload: str) -> list[Engine]:
    """Those that have it."""
    return [engine for engine in ENGINES if engine.stored or workload not in OPENINGS]


class Bench:
    """One engine's store, and the data for it. Not made for two workloads at a time."""

    def __init__(self, engine: Engine, shape: Shape, directory: Path, keys: int, seed: int = 1) -> None:
        self.engine, self.shape, self.keys = engine, shape, max(1, round(keys * engine.share))
        self.path = directory / engine.name.replace(", ", "-")
        self._random = random.Random(seed)
        self._db: Mapping | None = None
        self._known = self._absent = b""  # the keys that were stored, and as many that never are

    @property
    def db(self) -> Mapping:
        """The open store."""
        if self._db is None:
            self._db = self.engine.open(self.path)
        return self._db

    def close(self) -> None:
        """Close the store; its directory stays."""
        db, self._db = self._db, None
        if db is not None and hasattr(db, "close"):
            db.close()

    def remove(self) -> None:
        """Close the store and remove it."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def prepare(self, workload: str) -> Callable[[], object]:
        """Do what must come before a workload; return the call that is to be timed."""
        if workload == "fill":
            self.remove()
            self._draw_keys()
            pairs = list(zip(self._slices(self._known), self._values(), strict=True))
            self._random.shuffle(pairs)
            return partial(store_pairs, self.db, pairs)
        if len(self.db) < self.keys:
            self.prepare("fill")()
        if workload == "get":
            return partial(get_keys, self.db, self._fresh())
        if workload == "miss":
            return partial(miss_keys, self.db, self._slices(self._absent))
        if workload == "items":
            return partial(walk_items, self.db)
        if workload == "overwrite":
            return partial(store_pairs, self.db, list(zip(self._fresh(), self._values(), strict=True)))
        if workload == "delete":
            return partial(delete_keys, self.db, self._fresh())
        self.close()
        if workload == "killed":
            in_child(partial(open_and_put, self.engine, self.path), kill=True)
        elif workload == "recover":
            (self.path / "index").unlink(missing_ok=True)
        return lambda: self.db

    def _draw_keys(self) -> None:
        """Keys of which none is there twice, for short ones may well be drawn twice."""
        drawn: dict[bytes, None] = {}
        while (lacking := 2 * self.keys - len(drawn)) > 0:
            drawn.update(dict.fromkeys(self._slices(self._random.randbytes(self.shape.key * lacking))))
        keys = iter(drawn)
        self._known, self._absent = b"".join(islice(keys, self.keys)), b"".join(keys)

    def _fresh(self) -> list[bytes]:
        """The stored keys in a random order, as new objects."""
        size = self.shape.key
        order = list(range(0, len(self._known), size))
        self._random.shuffle(order)
        return [self._known[at : at + size] for at in order]

    def _values(self) -> list[bytes]:
        return _slices(self._random.randbytes(self.shape.value * self.keys), self.shape.value)

    def _slices(self, keys: bytes) -> list[bytes]:
        return _slices(keys, self.shape.key)


def _slices(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def timed(call: Callable[[], object]) -> int:
    """Nanoseconds that a call takes, with the garbage collector off."""
    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter_ns()
        call()
        return time.perf_counter_ns() - began
    finally:
        gc.enable()


def measure(
    shape: Shape, keys: int, names: Sequence[str], directory: Path, rounds: int, seed: int, tell: Tell
) -> Samples:
    """For each workload and engine the ns per key of each round; of `reopen` and `killed` the ns of the whole call."""
    found: Samples = {name: {engine.name: [] for engine in engines_of(name)} for name in names}
    for turn in range(rounds):
        place = directory / f"{shape.name}, round {turn}"
        place.mkdir()
        benches = [Bench(engine, shape, place, keys, seed + turn) for engine in ENGINES]
        for name in names:
            for bench in benches[turn % len(benches) :] + benches[: turn % len(benches)]:  # nobody is always first
                if bench.engine in engines_of(name):
                    tell(f"{shape.name}, round {turn + 1} of {rounds}: {name}, {bench.engine.name}", keys)
                    took = timed(bench.prepare(name))
                    per = 1 if name in WHOLE else bench.keys
                    found[name][bench.engine.name].append(took / per)
        for bench in benches:
            bench.remove()
        place.rmdir()
    return found


# ---- opening in processes of their own


def in_child(task: Callable[[], int], kill: bool = False) -> int:
    """Run a task in a forked child, which then ends by SIGKILL if it is to; return what the task returned."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, task().to_bytes(8, "little"))
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    if len(data) != 8 or kill != os.WIFSIGNALED(status):
        raise RuntimeError(f"the child failed: {status=}")
    return int.from_bytes(data, "little")


_left_open: list[Mapping] = []  # in a child that is about to be killed


def open_and_put(engine: Engine, path: Path) -> int:
    """The ns that opening takes; leaves the store open, with one more put in it."""
    began = time.perf_counter_ns()
    db = engine.open(path)
    took = time.perf_counter_ns() - began
    db[b"left by a kill"] = b"1"
    _left_open.append(db)
    return took


def open_and_close(engine: Engine, path: Path) -> int:
    """The ns that opening takes."""
    began = time.perf_counter_ns()
    db = engine.open(path)
    took = time.perf_counter_ns() - began
    db.close()  # type: ignore[attr-defined]
    return took


def _fill_only(engine: Engine, shape: Shape, directory: Path, keys: int, close: bool) -> int:
    bench = Bench(engine, shape, directory, keys)
    bench.prepare("fill")()
    if close:
        bench.close()
    else:
        _left_open.append(bench.db)
    return bench.keys


@dataclass(frozen=True, slots=True)
class Opened:
    """How many ns each opening of a store took, in fresh processes, one after the other."""

    engine: str
    killed: bool  # after a kill, or else a clean close
    keys: int
    times: list[int]


def opening(
    engine: Engine, shape: Shape, sizes: Sequence[int], directory: Path, killed: bool, times: int
) -> list[Opened]:
    """Open stores of several sizes in fresh processes, after a clean close or after a kill.

    A copy of a killed store would be distrusted, so every opening after a kill needs a kill of its own: each child
    opens the store, puts one key, and kills itself. The sizes take turns. What the fill left to be written back is
    written before.
    """
    found: dict[Path, Opened] = {}
    for size in sizes:
        path = directory / f"{size} keys"
        path.mkdir()
        keys = in_child(partial(_fill_only, engine, shape, path, size, not killed), kill=killed)
        found[path] = Opened(engine.name, killed, keys, [])
    os.sync()
    for _ in range(times):
        for path, opened in found.items():
            task = partial(open_and_put if killed else open_and_close, engine, path / engine.name)
            opened.times.append(in_child(task, kill=killed))
    for path in found:
        shutil.rmtree(path)
    return list(found.values())


# ---- sizes on disk


def disk_bytes(path: str | os.PathLike[str]) -> int:
    """What a store's directory takes on the device, all in all, whatever comes and goes there meanwhile."""
    found = os.stat(path).st_blocks * 512
    with os.scandir(path) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                found += disk_bytes(entry) if entry.is_dir() else entry.stat().st_blocks * 512
    return found


def one_key(directory: Path) -> int:
    """Bytes on the device of a store with one short key, closed."""
    path = directory / "one key"
    with closing(logkv.open(path)) as db:
        db[b"key"] = b"value"
    found = disk_bytes(path)
    shutil.rmtree(path)
    return found


def index_bytes(shape: Shape, keys: int, directory: Path) -> float:
    """Bytes of the index for each key."""
    bench = Bench(engine_named("logkv"), shape, directory, keys)
    bench.prepare("fill")()
    bench.close()
    found = (bench.path / "index").stat().st_size / bench.keys
    bench.remove()
    return found
