"""What it costs and gains that several processes read one store: their own memory, and reads on two cores.

How it is measured:

- Keys of 8 to 16 random bytes, values of 8; the store was filled and closed by another process.
- Memory: eight fresh interpreters open the store and get 10,000 random keys each. While all of them live, what each
  has to itself (private clean and private dirty pages) is compared with interpreters that only imported logkv: with
  the one of three that has least.
- Scaling: two processes read the store, and two others read a dict of their own with the same items. Each gets random
  keys for a while: one of a kind alone, then both of the kind at the same time, by turns. Scaling is what both got
  together, divided by twice what the one got alone. What counts is the median of LogKV's scaling divided by that of
  the dicts in the same round. Where the dicts themselves scale by less than 0.8 the machine had no two cores to give,
  and nothing is said of LogKV's scaling.
- With `--threads` it is two threads that share one `Reader`, on a Python without the GIL, beside two threads that
  read a dict of their own. Each thread makes the objects that it reads with, for those of another thread cost more.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import logkv
from benchmarks.__main__ import machine
from benchmarks.growth import busy, made_pairs
from benchmarks.report import Target, number, table
from benchmarks.terminal import positive, progress
from benchmarks.workloads import in_child, store_pairs

READERS = 8
IDLE = 3  # interpreters that only import logkv
READS = 10_000
LOOKED_UP = 1_000_000  # keys, at most, that a reader gets again and again
BATCH = 1_000
TWO_CORES = 0.8  # scaling of the dicts below which the machine had no two cores to give
KINDS = ["LogKV", "dict"]

READER = """
import sys, logkv
if len(sys.argv) > 1:
    db = logkv.Reader(sys.argv[1])
    for _ in range(int(sys.argv[2])):
        key = bytes.fromhex(sys.stdin.readline())
        assert db[key] == key[:8]
print("ready", flush=True)
sys.stdin.read()
"""


def fill(path: Path, keys: int, seed: int) -> int:
    """Fill a store and close it."""
    with logkv.open(path) as db:
        for pairs in made_pairs(keys, seed):
            store_pairs(db, pairs)
    return keys


def sample(keys: int, seed: int, count: int) -> list[bytes]:
    """So many of the store's keys, in a random order, none twice; or all if there are fewer."""
    chance = random.Random(seed)
    chosen = sorted(chance.sample(range(keys), min(count, keys)), reverse=True)
    found, before = [], 0
    for pairs in made_pairs(keys, seed):
        while chosen and chosen[-1] < before + len(pairs):
            found.append(pairs[chosen.pop() - before][0])
        before += len(pairs)
    chance.shuffle(found)
    return found


# ---- memory


@dataclass(frozen=True, slots=True)
class Private:
    """Bytes that only one process has: pages of its own, and pages of files that no other process has mapped."""

    dirty: int
    clean: int

    @classmethod
    def of(cls, pid: int) -> Private:
        """Those of a process."""
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        found = {name: int(size.split()[0]) << 10 for name, size in (line.split(":") for line in lines)}
        return cls(found["Private_Dirty"], found["Private_Clean"])

    @property
    def bytes(self) -> int:
        """All in all."""
        return self.dirty + self.clean


@contextmanager
def interpreter(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A fresh interpreter that runs READER."""
    command = [sys.executable, "-c", READER, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


@dataclass(frozen=True, slots=True)
class Memory:
    """What interpreters have to themselves that only imported logkv, and what readers have."""

    idle: list[Private]
    readers: list[Private]

    @property
    def beyond(self) -> list[int]:
        """Bytes of each reader that an interpreter has not, even the smallest."""
        least = min(private.bytes for private in self.idle)
        return [max(0, reader.bytes - least) for reader in self.readers]


def memory(path: Path, keys: list[bytes], seed: int) -> Memory:
    """Of processes that live at the same time."""
    chance = random.Random(seed)
    reads = min(READS, len(keys))
    with ExitStack() as living:
        idle = [living.enter_context(interpreter()) for _ in range(IDLE)]
        readers = [living.enter_context(interpreter(str(path), str(reads))) for _ in range(READERS)]
        for process in readers:
            assert process.stdin
            process.stdin.writelines(f"{key.hex()}\n" for key in chance.sample(keys, reads))
            process.stdin.flush()
        for process in [*idle, *readers]:
            if not process.stdout or process.stdout.readline() != "ready\n":
                raise RuntimeError("a reader failed")
        return Memory(*([Private.of(process.pid) for process in processes] for processes in (idle, readers)))


# ---- reads on two cores


def read(db: Mapping[bytes, bytes], batches: Iterator[list[bytes]], begin: float, seconds: float) -> float:
    """Gets a second, from a moment on."""
    get = db.get
    while time.perf_counter() < begin:
        pass
    count = 0
    while True:
        for key in (batch := next(batches)):
            get(key)
        count += len(batch)
        now = time.perf_counter()
        if now >= begin + seconds:
            return count / (now - begin)


def serve(pipe: Connection, source: logkv.Reader[bytes], own_dict: bool, keys: list[bytes], seed: int) -> None:
    """A process or a thread that reads when it is told to: (moment, seconds) -> gets a second."""
    db = dict(source.items()) if own_dict else source
    mine = [bytes(bytearray(key)) for key in keys]
    random.Random(seed).shuffle(mine)
    batches = cycle([mine[at : at + BATCH] for at in range(0, len(mine), BATCH)])
    pipe.send(None)
    while (told := pipe.recv()) is not None:
        pipe.send(read(db, batches, *told))


def start_process(task: Callable[..., None], pipe: Connection, *arguments: object) -> Callable[[], object]:
    """Run a task in a fresh process; returns what waits for its end."""
    process = multiprocessing.get_context("spawn").Process(target=task, args=(pipe, *arguments))
    process.start()
    pipe.close()
    return process.join


def start_thread(task: Callable[..., None], pipe: Connection, *arguments: object) -> Callable[[], object]:
    """Run a task in a thread."""
    thread = threading.Thread(target=task, args=(pipe, *arguments))
    thread.start()
    return thread.join


@contextmanager
def readers(path: Path, keys: list[bytes], threads: bool) -> Iterator[dict[str, list[Connection]]]:
    """Two of each kind, ready to read."""
    start = start_thread if threads else start_process
    pipes: dict[str, list[Connection]] = {kind: [] for kind in KINDS}
    with logkv.Reader(path) as source, ExitStack() as living:
        for kind in KINDS:
            for seed in range(2):
                ours, theirs = multiprocessing.Pipe()
                living.callback(start(serve, theirs, source, kind == "dict", keys, seed))
                living.enter_context(closing(ours))
                living.callback(ours.send, None)
                pipes[kind].append(ours)
        for pipe in [*pipes["LogKV"], *pipes["dict"]]:
            pipe.recv()
        yield pipes


def rate(pipes: list[Connection], seconds: float) -> float:
    """Gets a second of all that read at the same time."""
    begin = time.perf_counter() + 0.02  # the clock is the same in all processes
    for pipe in pipes:
        pipe.send((begin, seconds))
    found: list[float] = [pipe.recv() for pipe in pipes]
    return sum(found)


Rates = dict[str, list[tuple[float, float]]]  # of a kind, for each round: gets a second of one alone, and of both


def scaling(path: Path, keys: list[bytes], threads: bool, rounds: int, seconds: float) -> Rates:
    """How much two of a kind read, beside one."""
    found: Rates = {kind: [] for kind in KINDS}
    with readers(path, keys, threads) as pipes:
        for turn in range(rounds):
            for kind in KINDS if turn % 2 else reversed(KINDS):
                alone = rate(pipes[kind][turn // 2 % 2 :][:1], seconds)
                found[kind].append((alone, rate(pipes[kind], seconds)))
    return found


# ---- a run


@dataclass(frozen=True, slots=True)
class Sharing:
    """Everything that was measured, where and how."""

    machine: str
    logkv: str
    load_average: tuple[float, float]   # processes that ran or wanted to, on average, before and after
    keys: int
    seed: int
    threads: bool
    memory: Memory
    rates: Rates


def measure(keys: int, seed: int, threads: bool, rounds: int, seconds: float, directory: Path) -> Sharing:
    """Everything, in a directory that is the caller's to remove."""
    path = directory / "store"
    load = os.getloadavg()[0]
    with progress(3 * keys) as tell:
        tell("filling the store", keys)
        in_child(partial(fill, path, keys, seed))
        tell("memory of readers", keys)
        looked_up = sample(keys, seed, LOOKED_UP)
        private = memory(path, looked_up, seed)
        tell("reads on two cores", keys)
        rates = scaling(path, looked_up, threads, rounds, seconds)
    loads = load, os.getloadavg()[0]
    return Sharing(machine(), logkv.__version__, loads, keys, seed, threads, private, rates)


def scales(rates: Rates, kind: str) -> list[float]:
    """For each round what both did, as a part of twice what one did."""
    return [both / (2 * alone) for alone, both in rates[kind]]


def targets(sharing: Sharing) -> list[Target]:
    """What is asked of LogKV, beside what was found."""
    own = sharing.memory.beyond
    found = [Target(f"memory of their own of {len(own)} readers together, MB", sum(own) / 1e6, 20)]
    if had_two_cores(sharing):
        compared = [one / other for one, other in zip(*(scales(sharing.rates, kind) for kind in KINDS), strict=True)]
        what = "threads sharing a reader" if sharing.threads else "reader processes"
        found.append(Target(f"scaling of two {what}, of that of two dicts", median(compared), 0.95, True))
    return found


def had_two_cores(sharing: Sharing) -> bool:
    """Whether two dicts were read so much faster than one that anything can be said of LogKV."""
    return median(scales(sharing.rates, "dict")) >= TWO_CORES


def memory_table(found: Memory) -> str:
    """What each process has to itself."""
    idle = [("only imported logkv", private, "") for private in found.idle]
    readers = [
        (f"reader {at}", private, f"{beyond >> 10:,}")
        for at, (private, beyond) in enumerate(zip(found.readers, found.beyond, strict=True), 1)
    ]
    rows = [[what, f"{one.dirty >> 10:,}", f"{one.clean >> 10:,}", beyond] for what, one, beyond in [*idle, *readers]]
    return table(["KiB", "private, dirty", "private, clean", "beyond the least"], rows)


def scaling_table(rates: Rates) -> str:
    """Medians of what one and two read, and of the scaling."""
    rows = [
        [kind, *(number(median(found) / 1000) for found in zip(*rates[kind], strict=True)),
         f"{median(scales(rates, kind)):.2f}"]
        for kind in rates
    ]
    return table(["thousand gets a second", "one", "two together", "scaling"], rows)


def page(sharing: Sharing) -> str:
    """The whole page."""
    parts = [
        "# Sharing",
        f"One run of `python -m benchmarks.sharing --keys {sharing.keys}{' --threads' if sharing.threads else ''}`, "
        f"seed: {sharing.seed}. Times depend on the machine and on what else it does.",
        f"Machine: {sharing.machine}. LogKV {sharing.logkv}. {busy(sharing.load_average)}",
        table(["target", "found", "bound", ""], [target.row() for target in targets(sharing)]),
        memory_table(sharing.memory),
        scaling_table(sharing.rates),
        *([] if had_two_cores(sharing) else
          ["**The machine was too busy to measure scaling**: not even the dicts scaled."]),
        "## Method",
        "- " + (__doc__ or "").partition("\n- ")[2].strip(),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharing", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=positive, default=20_000_000, help="(default: 20,000,000)")
    parser.add_argument("--rounds", type=positive, default=8, help="of reading (default: 8)")
    parser.add_argument("--seconds", type=float, default=1, help="of reading in each turn of a round (default: 1)")
    parser.add_argument("--threads", action="store_true", help="two threads, in place of two processes (needs Python "
                        "without the GIL)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--dir", type=Path, metavar="DIR",
                        help="where the store is made (default: a temporary directory)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page here too")
    arguments = parser.parse_args()
    if arguments.threads and getattr(sys, "_is_gil_enabled", lambda: True)():
        parser.error("--threads needs Python without the GIL")
    with tempfile.TemporaryDirectory(prefix="logkv-sharing-", dir=arguments.dir) as directory:
        sharing = measure(arguments.keys, arguments.seed, arguments.threads, arguments.rounds, arguments.seconds,
                          Path(directory))
    print(page(sharing), end="")
    saved = json.dumps(asdict(sharing), indent=1) + "\n"
    for file, text in ((arguments.json, saved), (arguments.markdown, page(sharing))):
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)


if __name__ == "__main__":
    main()
