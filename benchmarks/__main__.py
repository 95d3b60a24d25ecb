"""`python -m benchmarks`: one interleaved run, as a table with the targets that it meets and misses."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import workloads
from benchmarks.workloads import ENGINES, OPENINGS, WORKLOADS

OPENS = 15
SMALL_STORE = 1_000


@dataclass(frozen=True, slots=True)
class Target:
    """A number that LogKV is to reach, and the one that was found."""

    what: str
    found: float
    bound: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether it was reached."""
        return self.found >= self.bound if self.at_least else self.found <= self.bound

    def row(self) -> list[str]:
        """Its line in the table."""
        sign = "≥" if self.at_least else "≤"
        return [self.what, f"{self.found:,.2f}", f"{sign} {self.bound:,g}", "met" if self.met else "**missed**"]


def machine() -> str:
    """The machine in one line."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0))
    return f"{cpu}, {cores} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}"


def method(keys: int, rounds: int) -> str:
    """How it was measured: the list of the workloads' docstring."""
    text = (workloads.__doc__ or "").partition("\n- n random")[2]
    return f"- {keys:,} random{text}".replace("medians of the rounds", f"medians of {rounds} rounds")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, padded to be read as it is."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: list[str]) -> str:
        padded = [cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(zip(cells, widths))]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (width - 1) + ":") if at else "-" * width for at, width in enumerate(widths)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def run(keys: int, rounds: int, directory: Path) -> dict[str, Any]:
    """Everything that is measured."""

    def say(what: str) -> None:
        if sys.stderr.isatty():
            print(what, end="\033[K\r", file=sys.stderr, flush=True)

    (engine,) = (engine for engine in ENGINES if engine.name == "logkv")
    opened = {}
    for state in ("clean", "killed"):  # first, while this process is small: the children are forks of it
        say(f"opening {keys:,} and {SMALL_STORE:,} keys, {state}")
        opened[state] = workloads.opening(engine, directory, [SMALL_STORE, keys], state == "killed", OPENS)
    return {
        "machine": machine(),
        "keys": keys,
        "rounds": rounds,
        "opened": opened,
        "one_key": workloads.one_key(directory),
        "index_bytes": workloads.index_bytes(directory, keys),
        "samples": workloads.measure(directory, keys, rounds, say),
    }


def ratio(ones: list[float], others: list[float]) -> float:
    """The median of the ratios within a round: a busy round then stands against itself."""
    return median(one / other for one, other in zip(ones, others, strict=True))


def targets(results: dict[str, Any]) -> list[Target]:
    """What is asked of LogKV, beside what was found."""

    def of(workload: str, one: str, other: str) -> float:
        samples = results["samples"][workload]
        return ratio(samples[one], samples[other])

    def growth(state: str) -> float:
        return ratio(results["opened"][state][results["keys"]], results["opened"][state][SMALL_STORE])

    keys = f"{results['keys']:,}"
    return [
        Target("random get, of dict", of("get", "logkv", "dict"), 0.7),
        Target("fill, of dict", of("fill", "logkv", "dict"), 1.2),
        Target("miss, of dict", of("miss", "logkv", "dict"), 1),
        Target("items, of dict", of("items", "logkv", "dict"), 2.5),
        Target("random get, times as fast as the baseline", of("get", "baseline", "logkv"), 5, at_least=True),
        Target("recovery, times as fast as the baseline", of("recover", "baseline", "logkv"), 15, at_least=True),
        Target(f"index, bytes a key at {keys} keys", results["index_bytes"], 12),
        Target("a store of one short key, KiB on disk", results["one_key"] / 1024, 100),
        Target(f"opening {keys} keys after a clean close, of {SMALL_STORE:,}", growth("clean"), 2.5),
        Target(f"opening {keys} keys after a kill, of {SMALL_STORE:,}", growth("killed"), 2.5),
    ]


def report(results: dict[str, Any]) -> str:
    """The run in Markdown; `results` also receives the medians and the targets."""
    medians = {
        workload: {engine: median(found) for engine, found in samples.items() if found}
        for workload, samples in results["samples"].items()
    }
    names = [engine.name for engine in ENGINES]
    rows = []
    for workload in WORKLOADS + OPENINGS:
        found, samples = medians[workload], results["samples"][workload]
        whole = workload in ("reopen", "killed")  # µs of the call
        cells = [number(found[name] / (1000 if whole else 1)) if name in found else "–" for name in names]
        ratios = [
            f"{ratio(samples[one], samples[other]):.2f}" if one in found and other in found and not whole else "–"
            for one, other in (("logkv", "dict"), ("baseline", "logkv"))
        ]
        rows.append([f"{workload}, µs a call" if whole else workload, *cells, *ratios])
    asked = targets(results)
    results |= {"medians": medians, "targets": [asdict(target) | {"met": target.met} for target in asked]}
    opened = [
        [f"{state}, {size:,} keys", *(number(of(times) / 1000) for of in (median, min, max))]
        for state, sizes in results["opened"].items()
        for size, times in sizes.items()
    ]
    parts = [
        f"Machine: {results['machine']}",
        table([f"ns an operation, {results['keys']:,} keys", *names, "logkv/dict", "baseline/logkv"], rows),
        method(results["keys"], results["rounds"]),
        table([f"opening in a fresh process, {OPENS} times, µs", "median", "least", "most"], opened),
        table(["target", "found", "bound", ""], [target.row() for target in asked]),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here too")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where the stores are made (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="logkv-benchmarks-", dir=arguments.dir) as directory:
        results = run(arguments.keys, arguments.rounds, Path(directory))
    text = report(results)
    print(text, end="")
    if arguments.markdown:
        arguments.markdown.write_text(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
