"""`logkv import` of a CSV file beside a bare loop of puts over the same rows, parsed before.

Every import and every loop runs in a forked process of its own: the time that an interpreter takes to start is in
neither. The import is all that the command does, from its arguments to the closed store, so it waits for the device at
its end. The loop is measured alone, and with opening and closing the store as the command must. They take turns within
a round; what counts are the medians of the rounds. First, what the import stores is compared with what the loop does.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from statistics import median

import logkv
from benchmarks.report import number, table
from benchmarks.terminal import positive, progress
from benchmarks.workloads import Samples, in_child, timed
from logkv.cli import main as command

COLUMNS = ["market", "number", "time", "price", "amount"]
KEY = ["market", "number"]
FORMS = {"one column as the value": "price", "all columns as JSON": None}
BOUND = 0.25  # of the loop's speed
Made = list[tuple[str, str]]


def write_trades(file: Path, rows: int, seed: int) -> None:
    """A CSV file of made-up trades."""
    chance = random.Random(seed)
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(COLUMNS)
        for at in range(rows):
            price, amount = chance.uniform(1, 9999), chance.expovariate(1)
            market = chance.choice(["btc-usd", "eth-usd", "ltc-eur", "xrp-eur"])
            writer.writerow([market, at, f"{1_500_000_000 + at / 7:.3f}", f"{price:.2f}", f"{amount:.6f}"])


def parsed(file: Path, value: str | None) -> Made:
    """The keys and values that an import makes of it."""
    with file.open(newline="") as lines:
        return [
            ("/".join(row[name] for name in KEY),
             row[value] if value else json.dumps(row, separators=(",", ":"), ensure_ascii=False))
            for row in csv.DictReader(lines)
        ]


def put_loop(file: Path, value: str | None, path: Path) -> int:
    """The ns of the loop alone."""
    pairs = parsed(file, value)
    with logkv.open(path) as db:
        return timed(partial(_put_all, db, pairs))


def put_loop_opened_and_closed(file: Path, value: str | None, path: Path) -> int:
    """The ns of opening a store, the loop, and closing."""
    pairs = parsed(file, value)

    def work() -> None:
        with logkv.open(path) as db:
            _put_all(db, pairs)

    return timed(work)


def import_command(file: Path, value: str | None, path: Path) -> int:
    """The ns of `logkv import`, run as a user runs it, but not in a terminal."""
    columns = [*(text for name in KEY for text in ("--key", name)), *(["--value", value] if value else [])]
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        began = time.perf_counter_ns()
        status = command(["import", str(path), str(file), *columns])
        took = time.perf_counter_ns() - began
    if status:
        raise RuntimeError(f"status {status} of logkv import: {said.getvalue()}")
    return took


def _put_all(db: logkv.Store[bytes], pairs: Made) -> None:
    put = db.put
    for key, value in pairs:
        put(key, value)


WAYS: dict[str, Callable[[Path, str | None, Path], int]] = {
    "put loop": put_loop,
    "put loop, opened and closed": put_loop_opened_and_closed,
    "import": import_command,
}


def compare(file: Path, value: str | None, path: Path) -> int:
    """Make sure that the import stores what the loop does."""
    import_command(file, value, path)
    with logkv.Reader(path, codec="bytes") as db:
        expected = {key.encode(): text.encode() for key, text in parsed(file, value)}
        if dict(db) != expected:
            raise RuntimeError("the import stored something else than the loop does")
    return 0


def measure(rows: int, rounds: int, seed: int, directory: Path) -> Samples:
    """For each form and way the ns per row of every round."""
    file, path = directory / "trades.csv", directory / "store"
    write_trades(file, rows, seed)
    ways = list(WAYS)
    found: Samples = {form: {way: [] for way in ways} for form in FORMS}
    with progress(rows * len(FORMS) * (1 + rounds * len(WAYS))) as tell:
        for form, value in FORMS.items():
            tell(f"{form}: compared", rows)
            in_child(partial(compare, file, value, path))
            shutil.rmtree(path)
        for turn in range(rounds):
            for form, value in FORMS.items():
                for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:  # nobody is always first
                    tell(f"round {turn + 1} of {rounds}: {form}, {way}", rows)
                    os.sync()  # what the last one left to be written
                    found[form][way].append(in_child(partial(WAYS[way], file, value, path)) / rows)
                    shutil.rmtree(path)
    return found


def report(found: Samples, rows: int) -> str:
    """The medians, and the import's speed as a part of the loop's: the median of the ratios within a round."""
    lines = []
    for form, times in found.items():
        alone, whole = (
            median(loop / taken for loop, taken in zip(times[way], times["import"], strict=True))
            for way in ("put loop", "put loop, opened and closed")
        )
        lines.append([form, *(number(median(taken)) for taken in times.values()), f"{alone:.2f}", f"{whole:.2f}",
                      f"≥ {BOUND}", "met" if alone >= BOUND else "**missed**"])
    head = [f"{rows:,} rows, ns each", *WAYS, "of the loop's speed", "of the loop's, opened and closed", "bound", ""]
    return table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imports", description=__doc__)
    parser.add_argument("--rows", type=positive, default=1_000_000, help="(default: 1,000,000)")
    parser.add_argument("--rounds", type=positive, default=3, help="(default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--dir", type=Path, metavar="DIR",
                        help="where the stores are made (default: a temporary directory)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="logkv-benchmarks-", dir=arguments.dir) as directory:
        found = measure(arguments.rows, arguments.rounds, arguments.seed, Path(directory))
    print(report(found, arguments.rows))


if __name__ == "__main__":
    main()
