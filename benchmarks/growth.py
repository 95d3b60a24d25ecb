"""A store that grows to millions of keys: how long each put takes, the index's size, opening and rebuilding afterwards.

How it is measured:

- Keys of 8 to 16 random bytes, values of 8. One process fills the store, an object whose `__setitem__` does nothing
  (the bare loop), and a dict, in turns of a two-hundredth of the keys. All three go through the same loop, which
  reads the clock before and after each put. So what the clock and the system take shows in the bare loop.
- After each turn the index's bytes are divided by the keys that are in. The average is that of these quotients.
- The process is killed when it is done. Then the store is opened in fresh processes, in turns with a store of 1,000
  keys; each of them puts a key and kills itself.
- Before the rebuilds the store is open until all full segments are sealed, and closed.
- For a rebuild the file `index` is removed, and for a full verified scan a bit of each footer is wrong besides. Each
  is one opening in a fresh process, in turns with a fresh process that fills a dict with the same keys, and one in
  which the pure-Python baseline opens a store of a hundredth of the keys. The segment that is not full has no footer:
  it is always scanned.
- What counts of openings and rebuilds is the median, for a ratio that of the ratios within a turn. The garbage
  collector is off in every loop.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median

import logkv
from benchmarks import output
from benchmarks.__main__ import machine
from benchmarks.baseline import BaselineStore, read_manifest
from benchmarks.report import Target, number, ratios, table
from benchmarks.terminal import positive, progress
from benchmarks.workloads import Pair, Tell, engine_named, in_child, open_and_put, store_pairs, timed

WINDOWS = 200
PERCENTILES = [50, 90, 99, 99.9, 99.99, 99.999, 100]
SHOWN = [50, 99.9, 100]  # of each window
SMALL = 1_000  # keys of the store that the other one is compared with
BASELINE_SHARE = 0.01  # of the keys
OPENINGS = 15
PATIENCE = 300  # s, for full segments to be sealed
MOST_MOVED = 150_000


def made_pairs(keys: int, seed: int) -> Iterator[list[Pair]]:
    """Random keys, a window of them at a time, each with its first 8 bytes as the value; the same ones for a seed.

    Of 20,000,000 two are equal once in some millions of seeds.
    """
    chance = random.Random(seed)
    for window in windows(keys):
        data, sizes = chance.randbytes(16 * window), chance.randbytes(window)
        made = (data[at : at + 8 + size % 9] for at, size in zip(range(0, len(data), 16), sizes, strict=True))
        yield [(key, key[:8]) for key in made]


def windows(keys: int) -> list[int]:
    """How many keys there are in each part of the fill."""
    count = min(WINDOWS, keys)
    return [keys * (at + 1) // count - keys * at // count for at in range(count)]


# ---- the fill


class Nothing(dict[bytes, bytes]):
    """A mapping that keeps nothing: what is left of a loop without a store."""

    def __setitem__(self, key: bytes, value: bytes) -> None:
        pass


def put_each(db: MutableMapping[bytes, bytes], pairs: Sequence[Pair], took: array[int]) -> None:
    """Put every pair, and note the ns of each put."""
    now = time.perf_counter_ns
    at = 0
    for key, value in pairs:
        began = now()
        db[key] = value
        took[at] = now() - began
        at += 1


def percentiles(counted: Mapping[int, int], wanted: Sequence[float]) -> list[int]:
    """The least times that so many percent of the puts did not exceed; `wanted` rises."""
    total = sum(counted.values())
    found: list[int] = []
    seen = 0
    for took, count in sorted(counted.items()):
        seen += count
        while len(found) < len(wanted) and 100 * seen >= wanted[len(found)] * total:
            found.append(took)
    return found


@dataclass(frozen=True, slots=True)
class Fill:
    """What a fill was like. Times in ns, by what was filled."""

    keys: int
    percentiles: dict[str, list[int]]       # as in PERCENTILES
    windows: dict[str, list[list[int]]]     # as in SHOWN, for each window
    filled: list[int]                       # keys after each window
    index: list[float]                      # bytes of the index a key, after each window
    most_moved: int                         # slots that one put moved


def fill(path: Path, keys: int, seed: int, tell: Tell) -> Fill:
    """Fill a store, nothing and a dict in turns; the store stays open."""
    db = logkv.open(path)
    _left_open.append(db)
    mappings: dict[str, MutableMapping[bytes, bytes]] = {"LogKV": db, "bare loop": Nothing(), "dict": {}}
    counted: dict[str, Counter[int]] = {name: Counter() for name in mappings}
    found = Fill(keys, {}, {name: [] for name in mappings}, [], [], 0)
    names = list(mappings)
    gc.disable()
    for pairs in made_pairs(keys, seed):
        tell(f"filling: {len(db):,} of {keys:,} keys", len(pairs))
        took = array("Q", bytes(8 * len(pairs)))
        for name in names:
            put_each(mappings[name], pairs, took)
            window = Counter(took)
            counted[name].update(window)
            found.windows[name].append(percentiles(window, SHOWN))
        names.append(names.pop(0))  # nobody is always first
        found.filled.append(len(db))
        found.index.append(db.stats()["index_bytes"] / len(db))
    return Fill(
        keys, {name: percentiles(times, PERCENTILES) for name, times in counted.items()}, found.windows, found.filled,
        found.index, db.stats()["index"]["most_moved"],
    )


_left_open: list[object] = []  # in a child that is about to be killed


def _fill_into(file: Path, path: Path, keys: int, seed: int, tell: Tell) -> int:
    return file.write_text(json.dumps(asdict(fill(path, keys, seed, tell))))


def fill_and_kill(path: Path, keys: int, seed: int, tell: Tell) -> Fill:
    """Fill a store in a process of its own, which is killed then."""
    file = path.with_suffix(".json")
    in_child(partial(_fill_into, file, path, keys, seed, tell), kill=True)
    return Fill(**json.loads(file.read_text()))


# ---- opening and rebuilding


def openings(paths: Sequence[Path], tell: Tell) -> list[list[int]]:
    """The ns of opening each store after a kill, in turns."""
    found: list[list[int]] = [[] for _ in paths]
    tell("opening after a kill", 0)
    os.sync()
    for _ in range(OPENINGS):
        for path, took in zip(paths, found, strict=True):
            took.append(in_child(partial(open_and_put, engine_named("logkv"), path), kill=True))
    return found


@contextmanager
def footers_damaged(path: Path) -> Iterator[int]:
    """One bit of every footer is wrong meanwhile; yields how many there are."""
    sealed = [segment for segment in read_manifest(path)["segments"] if segment["sealed"]]

    def flip() -> None:
        for segment in sealed:
            with (path / f"{segment['number']:010d}.seg").open("r+b") as file:
                file.seek(segment["end"])
                checksum = file.read(1)[0]
                file.seek(segment["end"])
                file.write(bytes([checksum ^ 1]))

    flip()
    try:
        yield len(sealed)
    finally:
        flip()


def seal(path: Path) -> int:
    """Open a store until all of its full segments have footers, and close it; the number of those."""
    with logkv.open(path) as db:
        until = time.monotonic() + PATIENCE
        while True:
            found = db.stats()
            full = [segment["sealed"] for segment in found["segments"] if segment["number"] < found["active"]]
            if all(full):
                return len(full)
            if found["problem"] or time.monotonic() > until:
                raise RuntimeError(f"full segments are not sealed: {found['problem']}")
            time.sleep(0.02)


def rebuild(path: Path, keys: int, unreadable: int) -> int:
    """The ns of opening a store whose index is gone; makes sure that it was rebuilt as it should."""
    began = time.perf_counter_ns()
    db = logkv.open(path)
    took = time.perf_counter_ns() - began
    with db:
        recovery = db.stats()["recovery"]
        if recovery.get("footers_unreadable") != unreadable or len(db) < keys:
            raise RuntimeError(f"{keys:,} keys and {unreadable} unreadable footers expected, found {recovery}")
    return took


def fill_dict(keys: int, seed: int) -> int:
    """The ns of filling a dict; making the keys is not counted."""
    filled: dict[bytes, bytes] = {}
    return sum(timed(partial(store_pairs, filled, pairs)) for pairs in made_pairs(keys, seed))


def fill_small(path: Path, keys: int, seed: int) -> int:
    """A store with so many keys, closed."""
    with logkv.open(path) as db:
        for pairs in made_pairs(keys, seed):
            store_pairs(db, pairs)
    return keys


def open_baseline(path: Path) -> int:
    """The ns that the baseline takes to read a store."""
    began = time.perf_counter_ns()
    with closing(BaselineStore(path, "r")):
        return time.perf_counter_ns() - began


def rebuilds(path: Path, keys: int, rounds: int, seed: int, tell: Tell) -> dict[str, list[float]]:
    """The ns a key of each way, in turns."""
    found: dict[str, list[float]] = {way: [] for way in ("dict", "footers", "scan", "baseline")}
    few = max(1, round(keys * BASELINE_SHARE))
    small = path.with_name("baseline")
    in_child(partial(fill_small, small, few, seed))
    in_child(partial(seal, path))
    for turn in range(rounds):
        tell(f"round {turn + 1} of {rounds}: filling a dict, rebuilding the index", keys)
        found["dict"].append(in_child(partial(fill_dict, keys, seed)) / keys)
        os.sync()
        (path / "index").unlink()
        found["footers"].append(in_child(partial(rebuild, path, keys, 0)) / keys)
        with footers_damaged(path) as unreadable:
            os.sync()
            (path / "index").unlink()
            found["scan"].append(in_child(partial(rebuild, path, keys, unreadable)) / keys)
        found["baseline"].append(in_child(partial(open_baseline, small)) / few)
    return found


# ---- a run


@dataclass(frozen=True, slots=True)
class Growth:
    """Everything that was measured, where and how."""

    machine: str
    logkv: str
    load_average: tuple[float, float]               # processes that ran or wanted to, on average, before and after
    rounds: int
    seed: int
    fill: Fill
    openings: list[list[int]]               # ns, of a store of SMALL keys and of the filled one
    rebuilds: dict[str, list[float]]        # ns a key
    segments: list[tuple[int, bool]] = field(default_factory=list)      # bytes of each, and whether it has a footer

    @classmethod
    def load(cls, file: Path) -> Growth:
        """What `--json` wrote; ValueError if it is something else."""
        try:
            found = json.loads(file.read_text())
            return cls(**found | {"fill": Fill(**found["fill"])})
        except (TypeError, KeyError) as problem:
            raise ValueError(f"{file} holds no results of this benchmark: {problem}") from None


def measure(keys: int, rounds: int, seed: int, directory: Path) -> Growth:
    """Everything, in a directory that is the caller's to remove."""
    path, small = directory / "grown", directory / "small"
    load = os.getloadavg()[0]
    with progress(keys * (1 + rounds)) as tell:
        filled = fill_and_kill(path, keys, seed, tell)
        tell("filling", keys)
        fill_and_kill(small, SMALL, seed, lambda what, keys: None)
        opened = openings([small, path], tell)
        rebuilt = rebuilds(path, keys, rounds, seed, tell)
    with logkv.Reader(path) as db:
        segments = [(segment["bytes"], segment["sealed"]) for segment in db.stats()["segments"]]
    loads = load, os.getloadavg()[0]
    return Growth(machine(), logkv.__version__, loads, rounds, seed, filled, opened, rebuilt, segments)


def busy(load: Sequence[float]) -> str:
    """How busy the machine was, for the page."""
    return f"Load average of the machine before the run {load[0]:.1f}, after it {load[1]:.1f}."


# ---- the page


def targets(growth: Growth) -> list[Target]:
    """What is asked of LogKV, beside what was found."""

    def ratio(one: str, other: str) -> float:
        return median(one / other for one, other in zip(growth.rebuilds[one], growth.rebuilds[other], strict=True))

    small, grown = growth.openings
    return [
        Target("the most slots that a put moved", growth.fill.most_moved, MOST_MOVED),
        Target("index, bytes a key, average over the fill", mean(growth.fill.index), 13),
        Target("index, bytes a key, at its best", min(growth.fill.index), 10.5),
        Target(f"opening {growth.fill.keys:,} keys after a kill, of {SMALL:,}", median(ratios(grown, small)), 2.5),
        Target("rebuilding the index from footers, of filling a dict", ratio("footers", "dict"), 0.2),
        Target("rebuilding it from a full verified scan, of filling a dict", ratio("scan", "dict"), 0.3),
        Target("from footers, times as fast as the baseline", ratio("baseline", "footers"), 25, True),
        Target("from a full verified scan, times as fast as the baseline", ratio("baseline", "scan"), 25, True),
    ]


def latency_table(filled: Fill) -> str:
    """Percentiles of the time of a put."""
    head = ["a put, µs", *("most" if percent == 100 else f"{percent:g}%" for percent in PERCENTILES)]
    rows = [[name, *(f"{took / 1000:,.2f}" for took in times)] for name, times in filled.percentiles.items()]
    return table(head, rows)


def times_table(growth: Growth) -> str:
    """Medians of openings and rebuilds."""
    small, grown = growth.openings
    rows = [
        [f"opening {SMALL:,} keys after a kill, µs", number(median(small) / 1000)],
        [f"opening {growth.fill.keys:,} keys after a kill, µs", number(median(grown) / 1000)],
        *([f"{what}, ns a key", number(median(growth.rebuilds[way]))] for way, what in (
            ("dict", "filling a dict"), ("footers", "rebuilding from footers"), ("scan", "from a full verified scan"),
            ("baseline", "the baseline's opening"))),
    ]
    return table(["afterwards", "median"], rows)


def page(growth: Growth, charts: str | None = None) -> str:
    """The whole page; `charts`: the directory of the figure, as seen from the page."""
    sealed = [size for size, sealed in growth.segments if sealed]
    parts = [
        "# Growth",
        f"One run of `python -m benchmarks.growth --keys {growth.fill.keys}`, rounds of rebuilding: {growth.rounds}, "
        f"seed: {growth.seed}. Times depend on the machine and on what else it does.",
        f"Machine: {growth.machine}. LogKV {growth.logkv}. {busy(growth.load_average)}",
        *([f"![Time of a put, and bytes of the index a key, over the fill]({charts}/growth.svg)"] if charts else []),
        table(["target", "found", "bound", ""], [target.row() for target in targets(growth)]),
        "## Times",
        latency_table(growth.fill),
        times_table(growth),
        f"The log: {len(growth.segments)} segments, {sum(size for size, _ in growth.segments) / 2**20:,.0f} MiB; "
        f"{len(sealed)} of them with a footer, {sum(sealed) / 2**20:,.0f} MiB.",
        "## Method",
        "- " + (__doc__ or "").partition("\n- ")[2].strip(),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=positive, default=20_000_000, help="(default: 20,000,000)")
    parser.add_argument("--rounds", type=positive, default=3, help="of rebuilding (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--dir", type=Path, metavar="DIR",
                        help="where the stores are made (default: a temporary directory)")
    output.add_options(parser)
    arguments = output.parse(parser)

    def measured() -> Growth:
        with tempfile.TemporaryDirectory(prefix="logkv-growth-", dir=arguments.dir) as directory:
            return measure(arguments.keys, arguments.rounds, arguments.seed, Path(directory))

    def draw(directory: Path) -> bool:
        from benchmarks import charts

        charts.draw_growth(growth, directory)
        return True

    growth = output.results(parser, arguments, Growth.load, measured)
    output.publish(arguments, partial(page, growth),
                   lambda file: file.write_text(json.dumps(asdict(growth), indent=1) + "\n"), draw)


if __name__ == "__main__":
    main()
