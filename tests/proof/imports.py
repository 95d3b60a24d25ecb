"""`logkv import`, killed at random moments: every row that it had acknowledged is there, with its exact value.

Each file has for the most part the keys of the one before it, and other values.  So a row that was acknowledged has the
new value, and one that was not has the new one, the one that it had, or none.

    python -m tests.proof.imports [--kills N] [--rows N] [--seed N] [--dir DIR]
"""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import logkv
from tests.proof.common import arguments, verdict

ROOT = Path(__file__).resolve().parent.parent.parent
HEADER = ("symbol", "time", "price", "note")
NOTES = ("", "plain", "with, comma", 'with "quotes"', "on two\nlines", "naïve ✓")

Row = tuple[bytes, bytes]       # key, value


@dataclass
class Report:
    kills: int = 0
    midstream: int = 0          # of them with some rows acknowledged, not all
    acknowledged: int = 0       # rows, by imports that were killed
    violations: list[str] = field(default_factory=list)


def write_file(file: Path, rows: int, number: int, rng: random.Random) -> list[Row]:
    """A file of so many rows; returns what is to be stored.  In every other one nothing has to be quoted."""
    notes = NOTES if number % 2 else NOTES[:2]
    expected = []
    with file.open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text)
        writer.writerow(HEADER)
        for minute in rng.sample(range(rows * 4 // 3), rows):
            row = (f"btc{minute % 3}", str(minute), f"{number}.{rng.randrange(10**6):06}", rng.choice(notes))
            writer.writerow(row)
            value = json.dumps(dict(zip(HEADER, row, strict=True)), ensure_ascii=False, separators=(",", ":"))
            expected.append((f"{row[0]}/{row[1]}".encode(), value.encode()))
    return expected


def start(path: str, file: Path) -> subprocess.Popen[str]:
    """An import that acknowledges what it has stored."""
    command = [sys.executable, "-m", "logkv", "import", path, str(file), "--key", "symbol", "--key", "time", "--json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def acknowledged(said: str) -> int:
    """How many rows, by the last whole line."""
    lines = [line for line in said.splitlines(keepends=True) if line.endswith("\n")]
    return max((json.loads(line).get("acked", 0) for line in lines), default=0)


def killed_import(path: str, file: Path, first_wait: bool, moment: float) -> tuple[int, bool]:
    """Starts an import and kills it `moment` seconds later, or after its first word; rows acknowledged, whether it was
    still at work."""
    with start(path, file) as process:
        assert process.stdout is not None
        said = process.stdout.readline() if first_wait else ""
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
        said += process.stdout.read()
    return acknowledged(said), process.returncode < 0


def wrong(store: Mapping[bytes, bytes], rows: Sequence[Row], acked: int, before: Mapping[bytes, bytes]) -> list[str]:
    """What is wrong with a store after an import of these rows; `before`: what was there before it."""
    problems = [f"{key!r} was acknowledged as {value!r} and is {found!r}"
                for key, value in rows[:acked] if (found := store.get(key)) != value]
    problems += [f"{key!r} is {found!r}: neither {value!r} nor what it was, {before.get(key)!r}"
                 for key, value in rows[acked:] if (found := store.get(key)) not in (value, before.get(key))]
    untouched = before.keys() - dict(rows).keys()
    problems += [f"{key!r} was {before[key]!r} and is {found!r}"
                 for key in untouched if (found := store.get(key)) != before[key]]
    return problems


def run(directory: str, kills: int, rows: int = 60_000, seed: int = 1) -> Report:
    path, file = os.path.join(directory, "prices.db"), Path(directory, "prices.csv")
    report, rng = Report(), random.Random(seed)
    write_file(file, rows, 0, rng)
    began = time.perf_counter()
    with start(os.path.join(directory, "warm-up.db"), file) as process:
        assert process.stdout is not None
        process.stdout.readline()
        first = time.perf_counter() - began
        process.stdout.read()
    whole = time.perf_counter() - began
    before: dict[bytes, bytes] = {}
    number = 0
    while report.kills < kills and not report.violations:
        number += 1
        expected = write_file(file, rows, number, rng)
        first_wait = bool(report.kills % 3)
        acked, killed = killed_import(path, file, first_wait, rng.uniform(0, whole - first if first_wait else whole))
        if killed:
            report.kills += 1
            report.midstream += 0 < acked < rows
            report.acknowledged += acked
        if os.path.exists(path):        # else it was killed before it had begun
            with logkv.open(path) as store:
                problems = wrong(store, expected, acked, before)
                report.violations += [f"import {number}: {problem}" for problem in problems]
                before = dict(store.items())
    return report


def main() -> int:
    parser = arguments("imports that are killed at random moments")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=60_000, help="of each file")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=wanted.dir) as directory:
        report = run(directory, wanted.kills, wanted.rows, wanted.seed)
    print(f"imports killed           {report.kills:>10,}")
    print(f"of them in mid-stream    {report.midstream:>10,}")
    print(f"rows acknowledged        {report.acknowledged:>10,}")
    print(f"violations               {len(report.violations):>10,}")
    return verdict(report.violations)


if __name__ == "__main__":
    sys.exit(main())
