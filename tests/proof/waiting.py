"""Writers that wait: processes that open the same store with `timeout=`, write, close, and open it again.

Every key of every process is there in the end, and what counts is how long the unluckiest of them waited.

    python -m tests.proof.waiting [--processes 20] [--keys 500] [--turns 1] [--timeout 30] [--dir DIR]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial

import logkv
from tests.proof.common import Child, arguments, verdict


@dataclass
class Report:
    found: int = 0
    longest: float = 0.0        # seconds that one opening waited
    seconds: float = 0.0        # all in all
    violations: list[str] = field(default_factory=list)


def pair(process: int, number: int) -> tuple[bytes, bytes]:
    return b"%d/%d" % (process, number), b"%d" % (process * number)


def write(path: str, process: int, keys: int, turns: int, timeout: float) -> float:
    """Opens the store once for each turn and writes its share of the keys; the longest wait for an opening."""
    longest = 0.0
    for turn in range(turns):
        began = time.perf_counter()
        with logkv.open(path, timeout=timeout) as db:
            longest = max(longest, time.perf_counter() - began)
            for number in range(turn, keys, turns):
                key, value = pair(process, number)
                db[key] = value
    return longest


def run(path: str, processes: int, keys: int, turns: int, timeout: float) -> Report:
    report, began = Report(), time.perf_counter()
    writers = [Child(f"process {process}", partial(write, path, process, keys, turns, timeout))
               for process in range(processes)]
    for writer in writers:
        report.longest = max(report.longest, writer.result())
    report.seconds = time.perf_counter() - began
    expected = dict(pair(process, number) for process in range(processes) for number in range(keys))
    with logkv.Reader(path) as reader:
        report.found = len(reader)
        if reader != expected:
            report.violations.append(f"{len(expected)} keys were written, {report.found} are there or some are different")
    return report


def main() -> int:
    parser = arguments("processes that open, write and close a store in turn")
    parser.add_argument("--processes", type=int, default=20)
    parser.add_argument("--keys", type=int, default=500, help="of each process")
    parser.add_argument("--turns", type=int, default=1, help="openings of each process")
    parser.add_argument("--timeout", type=float, default=30.0)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=wanted.dir) as directory:
        report = run(os.path.join(directory, "prices.db"), wanted.processes, wanted.keys, wanted.turns, wanted.timeout)
    print(f"processes            {wanted.processes:>10,}")
    print(f"openings             {wanted.processes * wanted.turns:>10,}")
    print(f"keys found           {report.found:>10,}")
    print(f"seconds in all       {report.seconds:>10.2f}")
    print(f"longest wait, s      {report.longest:>10.2f}")
    print(f"violations           {len(report.violations):>10,}")
    return verdict(report.violations)


if __name__ == "__main__":
    sys.exit(main())
