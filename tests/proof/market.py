"""The main job: one process writes market data, two follow it live, and the writer is killed in the middle.

Rows of CSV files (`open_time,open,high,low,close,volume`; the symbol is the file's name before `_`) are stored as they
stand under keys like `BTCUSDT/2023-03-01 00:00:00+00:00`, minute by minute as a feed delivers them.  Every row that was
acknowledged is there for both readers at once, after the kill, and in the end.

    python -m tests.proof.market FILE... [--seed N] [--dir DIR]
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path

import logkv
from tests.proof.common import Child, SharedNumbers, Violation, arguments, ended, fork_heard, verdict

SEGMENT = 1 << 20
READERS = 2
HEADER = "open_time,open,high,low,close,volume"

Row = tuple[bytes, bytes]       # key, value


def read_rows(files: Sequence[Path]) -> list[Row]:
    """The rows of all files, in the order in which a feed delivers them."""
    columns: list[list[Row]] = []
    for file in files:
        header, *lines = file.read_text().splitlines()
        if header != HEADER:
            raise ValueError(f"{file} begins with {header!r}, not with {HEADER!r}")
        symbol = file.stem.partition("_")[0]
        columns.append([(f"{symbol}/{line.partition(',')[0]}".encode(), line.encode()) for line in lines])
    return [row for row in chain.from_iterable(zip_longest(*columns)) if row is not None]


@dataclass
class Report:
    rows: int = 0
    killed_at: int = 0          # rows that were acknowledged then
    found: int = 0              # rows that were there afterwards
    seconds: float = 0.0        # of writing
    followed: int = 0           # gets of the readers
    violations: list[str] = field(default_factory=list)


def write(path: str, rows: Sequence[Row], first: int, acknowledge: int) -> None:
    """Puts the rows from `first` on, and one byte into the pipe for each."""
    with logkv.Writer(path, segment_size=SEGMENT) as writer:
        for key, value in rows[first:]:
            writer.put(key, value)
            os.write(acknowledge, b"+")


def wrong(store: logkv.Store | logkv.Reader, rows: Sequence[Row]) -> list[str]:
    """What is wrong with these rows, which must all be there."""
    return [f"{key.decode()} is {found!r}, expected {value!r}" for key, value in rows
            if (found := store.get(key)) != value]


class Count(SharedNumbers):
    """How many rows were acknowledged."""

    @property
    def rows(self) -> int:
        return self[0]

    @rows.setter
    def rows(self, number: int) -> None:
        self[0] = number


def follow(path: str, rows: Sequence[Row], acknowledged: Count, seed: int) -> Report:
    """Gets every row once it was acknowledged, and old ones beside; the same handle through all that happens."""
    report, rng = Report(), random.Random(seed)
    while not acknowledged.rows:
        time.sleep(0.0005)
    with logkv.Reader(path) as reader:
        done = 0
        while done < len(rows) and len(report.violations) < 10:
            now = acknowledged.rows
            wanted = [*rows[done:now], *(rows[rng.randrange(now)] for _ in range(100))]
            report.violations += wrong(reader, wanted)[:10]
            report.followed += len(wanted)
            done = now
    return report


def deliver(path: str, rows: Sequence[Row], first: int, acknowledged: Count, kill_at: int | None) -> int:
    """Runs a writer and counts what it acknowledges; returns how it ended."""
    pid, heard = fork_heard(lambda say: write(path, rows, first, say))
    done = first
    while answer := os.read(heard, 4096):
        done += len(answer)
        acknowledged.rows = done
        if kill_at is not None and done >= kill_at:
            os.kill(pid, signal.SIGKILL)
            kill_at = None
    os.close(heard)
    return ended(pid)


def run(path: str, files: Sequence[Path], seed: int = 1) -> Report:
    rows = read_rows(files)
    report, rng, acknowledged = Report(rows=len(rows)), random.Random(seed), Count()
    followers = [Child(f"reader {number + 1}", lambda: vars(follow(path, rows, acknowledged, seed + number)))
                 for number in range(READERS)]

    began = time.perf_counter()
    status = deliver(path, rows, 0, acknowledged, rng.randrange(len(rows) * 2 // 5, len(rows) * 3 // 5))
    report.seconds += time.perf_counter() - began
    report.killed_at = acknowledged.rows
    if status != -signal.SIGKILL:
        report.violations.append(f"the first writer was to be killed and ended with {status}")
    with logkv.open(path, "r") as store:
        report.found = len(store)
        report.violations += wrong(store, rows[:report.killed_at])
        if not report.killed_at <= report.found <= report.killed_at + 1:
            report.violations.append(f"{report.killed_at} rows were acknowledged, {report.found} are there")

    began = time.perf_counter()
    status = deliver(path, rows, report.killed_at, acknowledged, None)
    report.seconds += time.perf_counter() - began
    if status:
        report.violations.append(f"the second writer ended with {status}")
        acknowledged.rows = len(rows)       # lets the readers end

    for follower in followers:
        try:
            said = Report(**follower.result())
        except Violation as problem:
            report.violations.append(str(problem))
        else:
            report.followed += said.followed
            report.violations += [f"{follower.name}: {violation}" for violation in said.violations]
    with logkv.open(path, "w", segment_size=SEGMENT) as store:
        report.violations += wrong(store, rows)
        if dict(store.items()) != dict(rows) or len(store) != len(dict(rows)):
            report.violations.append(f"{len(store)} rows are there in the end, {len(dict(rows))} in the files")
    return report


def main() -> int:
    parser = arguments("market data, written, followed, killed, finished")
    parser.add_argument("files", nargs="+", type=Path)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=wanted.dir) as directory:
        report = run(os.path.join(directory, "prices.db"), wanted.files, wanted.seed)
    print(f"rows                              {report.rows:>10,}")
    print(f"acknowledged when killed          {report.killed_at:>10,}")
    print(f"found after the kill              {report.found:>10,}")
    print(f"rows a second, each acknowledged  {report.rows / report.seconds:>10,.0f}")
    print(f"gets of the {READERS} readers meanwhile   {report.followed:>10,}")
    print(f"violations                        {len(report.violations):>10,}")
    return verdict(report.violations)


if __name__ == "__main__":
    sys.exit(main())
