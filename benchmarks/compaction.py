"""Space that comes back: disk use under overwrites and deletes, bytes that are copied for it, and what that costs puts.

How it is measured:

- Keys of 16 random bytes, values of 100. `hot`: one key, overwritten again and again. `uniform`, `zipf`: many keys,
  overwritten in a random order, each as often as any other, or by a Zipf distribution with exponent 0.99. `queue`: a
  new key is put, then the one that was put 1,000 keys before is deleted. `deletes`: a fifth as many keys are put, then
  all are deleted, then `compact()` runs.
- Each run is a fresh process with a fresh store and plain loops over the mapping; which keys come is known before. Runs
  with `compaction="auto"` and with "manual" take turns. The first put of each key of `hot`, `uniform` and `zipf`, and
  of the first 1,000 of `queue`, is not timed. The garbage collector is off.
- Disk use: the allocated blocks of the store's directory and of everything in it, looked at by another process every
  3 ms, from before the store is made until it is closed. The ceiling is 2.5 times the live data plus 32 MiB; live
  data: the aligned bytes of live records, or less while they change.
- Write amplification: the aligned bytes of records that were written and of those that merges copied, divided by the
  former.
- Throughput: operations a second of "auto", divided by those of "manual" in the same round; the median.
- Latency: `uniform` once more, each put timed by itself, and after each fourth one a get of a random key; nobody looks
  at the disk meanwhile. The ratio is the median of those within a round.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Literal

import logkv
from benchmarks import output
from benchmarks.__main__ import machine
from benchmarks.growth import busy, percentiles
from benchmarks.report import Target, table
from benchmarks.terminal import positive, progress
from benchmarks.workloads import Tell, disk_bytes

Mapping = MutableMapping[bytes, bytes]
Mode = Literal["auto", "manual"]

MODES: list[Mode] = ["auto", "manual"]
WORKLOADS = ["hot", "uniform", "zipf", "queue", "deletes"]
KEY, VALUE = 16, 100
EXPONENT = 0.99
WAITING = 1_000     # keys of `queue` that are there at any moment
DELETES = 5         # `deletes` puts the operations divided by this
WINDOWS = 250       # parts of a run, after each of which it says how far it is
INTERVAL = 0.003    # s between two looks at the disk
GETS = 4            # puts for each get that is timed
PERCENTILES = [50, 99, 99.9, 99.99]
MIB = 1 << 20


def record_bytes(value: int) -> int:
    """Aligned bytes of a record: docs/format.md."""
    return (20 + KEY + value + 7) // 8 * 8


PUT, DELETE = record_bytes(VALUE), record_bytes(0)


def ceiling(live: int) -> float:
    """What a store may take of the disk."""
    return 2.5 * live + 32 * MIB


# ---- workloads


def put_each(db: Mapping, keys: Sequence[bytes], value: bytes) -> None:
    for key in keys:
        db[key] = value


def put_chosen(db: Mapping, keys: Sequence[bytes], order: Sequence[int], value: bytes) -> None:
    for at in order:
        db[keys[at]] = value


def delete_each(db: Mapping, keys: Sequence[bytes]) -> None:
    for key in keys:
        del db[key]


def put_and_delete(db: Mapping, new: Sequence[bytes], old: Sequence[bytes], value: bytes) -> None:
    for one, other in zip(new, old, strict=True):
        db[one] = value
        del db[other]


def time_each(db: Mapping, keys: Sequence[bytes], order: Sequence[int], value: bytes, puts: array[int],
              gets: array[int]) -> None:
    """As `put_chosen`; notes the ns of each put, and of a get of another key after some of them."""
    now = time.perf_counter_ns
    others = order[::-1]
    for first in range(0, len(order), GETS):
        for at in order[first : first + GETS]:
            began = now()
            db[keys[at]] = value
            puts.append(now() - began)
        key = keys[others[first]]
        began = now()
        db[key]
        gets.append(now() - began)


@dataclass(frozen=True, slots=True)
class Part:
    """Some operations in a row, and what is known of them before."""

    task: Callable[[], object]
    operations: int         # that are timed
    written: int            # bytes
    live: int               # bytes, at least, while it runs


def drawn(workload: str, keys: int, operations: int, seed: int) -> array[int]:
    """Which keys are overwritten, where that is what a workload does."""
    if workload in ("queue", "deletes"):
        return array("I")
    if workload == "hot":
        return array("I", bytes(4 * operations))
    weights = [1 / rank**EXPONENT if workload == "zipf" else 1 for rank in range(1, keys + 1)]
    chosen = random.Random(seed).choices(range(keys), cum_weights=list(accumulate(weights)), k=operations)
    return array("I", chosen)


def windows(count: int) -> Iterator[slice]:
    """The parts of a run."""
    parts = min(WINDOWS, count)
    return (slice(count * at // parts, count * (at + 1) // parts) for at in range(parts))


def made_keys(count: int, seed: int) -> list[bytes]:
    """Random keys."""
    data = random.Random(seed).randbytes(KEY * count)
    return [data[at : at + KEY] for at in range(0, len(data), KEY)]


def fill(db: Mapping, keys: Sequence[bytes], value: bytes, *, timed: bool) -> Iterator[Part]:
    """The first put of each key."""
    for part in windows(len(keys)):
        yield Part(partial(put_each, db, keys[part], value), timed * (part.stop - part.start),
                   PUT * (part.stop - part.start), PUT * part.start)


def parts_of(workload: str, db: Mapping, keys: int, order: array[int], operations: int, seed: int) -> Iterator[Part]:
    """A workload; the keys are made before the first part."""
    value = random.Random(seed).randbytes(VALUE)
    if workload == "queue":
        made = made_keys(WAITING + operations, seed)
        yield from fill(db, made[:WAITING], value, timed=False)
        for part in windows(operations):
            count = part.stop - part.start
            new = made[WAITING + part.start : WAITING + part.stop]
            yield Part(partial(put_and_delete, db, new, made[part], value), 2 * count, (PUT + DELETE) * count,
                       PUT * WAITING)
    elif workload == "deletes":
        made = made_keys(operations // DELETES, seed)
        yield from fill(db, made, value, timed=True)
        for part in windows(len(made)):
            count = part.stop - part.start
            yield Part(partial(delete_each, db, made[part]), count, DELETE * count, PUT * (len(made) - part.stop))
    else:
        made = made_keys(1 if workload == "hot" else keys, seed)
        yield from fill(db, made, value, timed=False)
        for part in windows(operations):
            chosen = order[part]
            yield Part(partial(put_chosen, db, made, chosen, value), len(chosen), PUT * len(chosen), PUT * len(made))


# ---- a run in a process of its own, and who looks at the disk meanwhile


def in_process(task: Callable[..., Any], *arguments: object, look: Callable[[], object] | None = None) -> Any:
    """What a task returns in a fresh process; `look` is called here every few ms until then."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(theirs, task, *arguments))
    process.start()
    theirs.close()
    while look and not ours.poll(INTERVAL):
        look()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError("a run has failed") from None
    finally:
        ours.close()
        process.join()


def _send_result(pipe: Connection, task: Callable[..., Any], *arguments: object) -> None:
    gc.disable()
    pipe.send(task(*arguments))


@dataclass(slots=True)
class Moment:
    """The most that was seen on the disk while a run was at one of its parts."""

    operations: int     # that were done before
    live: int           # bytes, at least
    disk: int

    @property
    def share(self) -> float:
        """Of the ceiling."""
        return self.disk / ceiling(self.live)


class Watch:
    """How far a run is, in memory shared with it, and what of the disk it was seen to take."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shared = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self.moments: list[Moment] = []

    def say(self, operations: int, live: int) -> None:
        """In the run: it begins a part."""
        self._shared[1] = min(self._shared[1], live)    # until both are changed, too little rather than too much
        self._shared[0] = operations
        self._shared[1] = live

    def look(self) -> None:
        """Beside the run."""
        operations, live = self._shared[:2]
        disk = disk_bytes(self._path)
        live = min(live, self._shared[1])
        if not self.moments or self.moments[-1].operations != operations:
            self.moments.append(Moment(operations, live, disk))
        last = self.moments[-1]
        last.live, last.disk = min(last.live, live), max(last.disk, disk)


@dataclass(frozen=True, slots=True)
class Done:
    """What a run says of itself."""

    operations: int
    seconds: float
    written: int                # bytes of records
    copied: int                 # bytes of records, by merges
    merges: int
    problem: str | None         # of compaction
    left: int | None = None     # bytes on the disk after `compact()`


def perform(workload: str, mode: Mode, path: Path, keys: int, order: array[int], operations: int, seed: int,
            watch: Watch) -> Done:
    """Run a workload on a new store."""
    took = written = done = 0
    left = None
    with logkv.open(path, compaction=mode) as db:
        for part in parts_of(workload, db, keys, order, operations, seed):
            watch.say(done, part.live)
            began = time.perf_counter_ns()
            part.task()
            took += (time.perf_counter_ns() - began) * (part.operations > 0)
            done += part.operations
            written += part.written
        found = db.stats()["compaction"]
        if workload == "deletes":
            db.compact()
            left = disk_bytes(path)
    return Done(done, took / 1e9, written, found["copied_bytes"], found["merges"], found["problem"], left)


def time_puts_and_gets(mode: Mode, path: Path, keys: int, order: array[int], seed: int) -> dict[str, list[int]]:
    """PERCENTILES of the ns of puts and gets of `uniform`."""
    made, value = made_keys(keys, seed), random.Random(seed).randbytes(VALUE)
    puts, gets = array("Q"), array("Q")
    with logkv.open(path, compaction=mode) as db:
        put_each(db, made, value)
        time_each(db, made, order, value, puts, gets)
    return {"put": percentiles(Counter(puts), PERCENTILES), "get": percentiles(Counter(gets), PERCENTILES)}


# ---- everything


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a workload."""

    workload: str
    mode: Mode
    done: Done
    moments: list[Moment]

    @property
    def share(self) -> float:
        """The highest of the ceiling."""
        return max(moment.share for moment in self.moments)

    @property
    def amplification(self) -> float:
        """Of writes."""
        return (self.done.written + self.done.copied) / self.done.written

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.done.operations / self.done.seconds


@dataclass(frozen=True, slots=True)
class Compaction:
    """Everything that was measured, where and how."""

    machine: str
    logkv: str
    load_average: tuple[float, float]       # processes that ran or wanted to, on average, before and after
    operations: int
    keys: int
    rounds: int
    seed: int
    runs: list[Run]                                     # by rounds, in each "auto" beside "manual"
    latencies: list[dict[Mode, dict[str, list[int]]]]   # of each round: ns of a "put" and a "get", as in PERCENTILES

    def of(self, workload: str, mode: Mode = "auto") -> list[Run]:
        """The runs of a workload, one a round."""
        return [run for run in self.runs if (run.workload, run.mode) == (workload, mode)]

    @property
    def workloads(self) -> list[str]:
        """That were measured."""
        return [workload for workload in WORKLOADS if self.of(workload)]

    def throughput(self, workload: str) -> float:
        """Of "auto", as a part of that of "manual"."""
        pairs = zip(self.of(workload), self.of(workload, "manual"), strict=True)
        return median(auto.rate / manual.rate for auto, manual in pairs)

    @classmethod
    def load(cls, file: Path) -> Compaction:
        """What `--json` wrote; ValueError if it is something else."""
        try:
            found = json.loads(file.read_text())
            runs = [Run(run["workload"], run["mode"], Done(**run["done"]),
                        [Moment(**moment) for moment in run["moments"]]) for run in found["runs"]]
            return cls(**found | {"runs": runs})
        except (TypeError, KeyError) as problem:
            raise ValueError(f"{file} holds no results of this benchmark: {problem}") from None


def measure(workloads: Sequence[str], latency: bool, operations: int, keys: int, rounds: int, seed: int,
            directory: Path) -> Compaction:
    """Everything, in a directory that is the caller's to remove."""
    load = os.getloadavg()[0]
    runs: list[Run] = []
    latencies: list[dict[Mode, dict[str, list[int]]]] = []
    with progress(rounds * len(MODES) * (len(workloads) + latency)) as tell:
        for turn in range(rounds):
            modes = MODES if turn % 2 == 0 else MODES[::-1]
            for workload in workloads:
                order = drawn(workload, keys, operations, seed + turn)
                for mode in modes:
                    tell(f"round {turn + 1} of {rounds}: {workload}, {mode}", 1)
                    path = new_store(directory)
                    watch = Watch(path)
                    done = in_process(perform, workload, mode, path, keys, order, operations, seed + turn, watch,
                                      look=watch.look)
                    runs.append(Run(workload, mode, done, watch.moments))
            if latency:
                order = drawn("uniform", keys, operations, seed + turn)
                latencies.append(measure_latency(modes, keys, order, seed + turn, directory, tell))
    loads = load, os.getloadavg()[0]
    return Compaction(machine(), logkv.__version__, loads, operations, keys, rounds, seed, runs, latencies)


def measure_latency(modes: Sequence[Mode], keys: int, order: array[int], seed: int, directory: Path,
                    tell: Tell) -> dict[Mode, dict[str, list[int]]]:
    """One round of it."""
    found: dict[Mode, dict[str, list[int]]] = {}
    for mode in modes:
        tell(f"latency, {mode}", 1)
        found[mode] = in_process(time_puts_and_gets, mode, new_store(directory), keys, order, seed)
    return found


def new_store(directory: Path) -> Path:
    """An empty directory in place of the last one; nothing is left to be written back."""
    path = directory / "store"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    os.sync()
    return path


# ---- the page


def targets(found: Compaction) -> list[Target]:
    """What is asked of LogKV, beside what was found."""
    asked = [Target(f"{name}: disk use, of the ceiling, at its highest", max(run.share for run in found.of(name)), 1)
             for name in found.workloads if name != "deletes"]
    asked += [Target(f"{name}: write amplification", max(run.amplification for run in found.of(name)), 2.2)
              for name in ("uniform", "zipf") if name in found.workloads]
    asked += [Target(f"{name}: throughput, of that without compaction", found.throughput(name), 0.6, True)
              for name in found.workloads if name != "deletes"]
    asked += [Target("deletes: MiB on disk after compact()", max(run.done.left or 0 for run in found.runs) / MIB, 1)
              for name in found.workloads if name == "deletes"]
    asked += [Target(f"99.9% of the time of a {name}, of that without compaction",
                     median(both["auto"][name][2] / both["manual"][name][2] for both in found.latencies), 5)
              for name in ("put", "get") if found.latencies]
    return asked


def runs_table(found: Compaction) -> str:
    """Each workload: the highest of all rounds, and medians."""
    head = ["compaction=\"auto\"", "disk, MiB", "of the ceiling", "amplification", "merges", "thousand operations/s",
            "without compaction", "ratio"]
    rows = []
    for name in found.workloads:
        runs = found.of(name)
        worst = max((moment for run in runs for moment in run.moments), key=lambda moment: moment.disk)
        rows.append([
            name, f"{worst.disk / MIB:,.1f}", f"{max(run.share for run in runs):.2f}",
            f"{max(run.amplification for run in runs):.2f}", f"{median(run.done.merges for run in runs):,.0f}",
            *(f"{median(run.rate for run in found.of(name, mode)) / 1000:,.0f}" for mode in MODES),
            f"{found.throughput(name):.2f}",
        ])
    return table(head, rows) if rows else ""


def latency_table(found: Compaction) -> str:
    """Medians of the rounds."""
    rows = [[f"{name}, {mode}",
             *(f"{median(times) / 1000:,.2f}" for times in zip(*(both[mode][name] for both in found.latencies)))]
            for name in ("put", "get") for mode in MODES if found.latencies]
    return table(["µs", *(f"{percent:g}%" for percent in PERCENTILES)], rows) if rows else ""


def problems(found: Compaction) -> str:
    """What compaction complained of."""
    said = {f"- {run.workload}, {run.mode}: {run.done.problem}" for run in found.runs if run.done.problem}
    return "**Compaction failed:**\n\n" + "\n".join(sorted(said)) if said else ""


def page(found: Compaction, charts: str | None = None) -> str:
    """The whole page; `charts`: the directory of the figure, as seen from the page."""
    parts = [
        "# Compaction",
        f"One run of `python -m benchmarks.compaction --operations {found.operations} --keys {found.keys}`, rounds: "
        f"{found.rounds}, seed: {found.seed}. Times depend on the machine and on what else it does.",
        f"Machine: {found.machine}. LogKV {found.logkv}. {busy(found.load_average)}",
        f"![Disk use, live data and ceiling of each workload]({charts}/compaction.svg)" if charts else "",
        table(["target", "found", "bound", ""], [target.row() for target in targets(found)]),
        runs_table(found),
        latency_table(found),
        problems(found),
        "## Method",
        "- " + (__doc__ or "").partition("\n- ")[2].strip(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compaction", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=positive, default=5_000_000,
                        help="puts of a run; `deletes` has a fifth (default: 5,000,000)")
    parser.add_argument("--keys", type=positive, default=100_000, help="of `uniform` and `zipf` (default: 100,000)")
    parser.add_argument("--workload", action="append", choices=[*WORKLOADS, "latency"],
                        help="measure only this one; may be given several times (default: all)")
    parser.add_argument("--rounds", type=positive, default=3, help="(default: 3)")
    parser.add_argument("--seed", type=int, default=0,
                        help="of the first round, one more for each next one (default: 0)")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), metavar="DIR",
                        help="where the stores are made, on a file system that shall be measured (default: /var/tmp)")
    output.add_options(parser)
    arguments = output.parse(parser)

    def measured() -> Compaction:
        asked = arguments.workload or [*WORKLOADS, "latency"]
        with tempfile.TemporaryDirectory(prefix="logkv-compaction-", dir=arguments.directory) as directory:
            return measure([name for name in WORKLOADS if name in asked], "latency" in asked, arguments.operations,
                           arguments.keys, arguments.rounds, arguments.seed, Path(directory))

    def draw(directory: Path) -> bool:
        from benchmarks import charts

        if found.runs:
            charts.draw_compaction(found, directory)
        return bool(found.runs)

    found = output.results(parser, arguments, Compaction.load, measured)
    output.publish(arguments, partial(page, found), lambda file: file.write_text(json.dumps(asdict(found)) + "\n"), draw)


if __name__ == "__main__":
    main()
