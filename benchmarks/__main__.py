"""LogKV beside the built-in dict and a pure-Python store of the same format: one interleaved run.

Prints the tables, with the targets that are met and missed; writes them, every sample and the charts where asked.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import logkv
from benchmarks import output, report, workloads
from benchmarks.results import Measured, Run
from benchmarks.terminal import positive, progress
from benchmarks.workloads import OPENINGS, SHAPES, WORKLOADS, Shape, Tell, engine_named, engines_of

SIZES = [1_000, 10_000, 100_000]  # of stores that are opened, beside one of all keys
OPENS = [("logkv", False, 15), ("logkv", True, 15), ("baseline", False, 5)]  # after a kill? how many times?
# What is measured apart from the rounds: opening in fresh processes, bytes on the device.
APART = ["opening", "space"]
NAMES = WORKLOADS + OPENINGS + APART


def machine() -> str:
    """The machine in one line."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return f"{cpu}, {cores} cores, {memory:.0f} GiB of memory, {system}"


def openings(shape: Shape, keys: int, directory: Path, tell: Tell) -> list[workloads.Opened]:
    """Opening of LogKV's stores after a clean close and after a kill, and of the baseline's."""
    sizes = [size for size in SIZES if size < keys] + [keys]
    found = []
    for name, killed, times in OPENS:
        tell(f"{shape.name}: opening, {name}, after a {'kill' if killed else 'clean close'}", keys)
        found += workloads.opening(engine_named(name), shape, sizes, directory, killed, times)
    return found


def measure(
    shapes: Sequence[Shape], keys: int, names: Sequence[str], rounds: int, seed: int, directory: Path
) -> Run:
    """Everything that is named."""
    keys_of = {shape: shape.keys_of(keys) for shape in shapes}
    timed = [name for name in names if name not in APART]
    steps = rounds * sum(len(engines_of(name)) for name in timed) + ("space" in names)
    steps += len(OPENS) * ("opening" in names)
    opened: dict[Shape, list[workloads.Opened]] = {}
    found = []
    with progress(sum(keys_of.values()) * steps) as tell:
        if "opening" in names:  # first, while this process is small: the children are forks of it
            opened = {shape: openings(shape, count, directory, tell) for shape, count in keys_of.items()}
        for shape, count in keys_of.items():
            index_bytes = None
            if "space" in names:
                tell(f"{shape.name}: size of the index", count)
                index_bytes = workloads.index_bytes(shape, count, directory)
            samples = workloads.measure(shape, count, timed, directory, rounds, seed, tell)
            found.append(Measured(shape.name, count, samples, opened.get(shape, []), index_bytes))
    one_key = workloads.one_key(directory) if "space" in names else None
    return Run(machine(), logkv.__version__, rounds, seed, one_key, found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    shares = ", ".join(f"{shape.name} gets {shape.share:g} of them" for shape in SHAPES.values() if shape.share != 1)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="bytes of a key + bytes of a value; "
                        "may be repeated (default: all)")
    parser.add_argument("--workload", action="append", choices=NAMES, metavar="NAME",
                        help=f"may be repeated (default: all): {', '.join(NAMES)}")
    parser.add_argument("--keys", type=positive, default=1_000_000,
                        help=f"(default: 1,000,000; {shares}, and the baseline a tenth)")
    parser.add_argument("--rounds", type=positive, default=3, help="(default: 3)")
    parser.add_argument("--seed", type=int, default=0,
                        help="of the first round's data; the next round has the next one (default: 0)")
    parser.add_argument("--dir", type=Path, metavar="DIR",
                        help="where the stores are made (default: a temporary directory)")
    output.add_options(parser)
    return parser


def main() -> None:
    parser = _parser()
    arguments = output.parse(parser)

    def measured() -> Run:
        shapes = [shape for name, shape in SHAPES.items() if name in (arguments.shape or SHAPES)]
        names = [name for name in NAMES if name in (arguments.workload or NAMES)]
        with tempfile.TemporaryDirectory(prefix="logkv-benchmarks-", dir=arguments.dir) as directory:
            return measure(shapes, arguments.keys, names, arguments.rounds, arguments.seed, Path(directory))

    def draw(directory: Path) -> bool:
        from benchmarks import charts

        return charts.draw(run, directory)

    run = output.results(parser, arguments, Run.load, measured)
    if not output.publish(arguments, partial(report.page, run), run.save, draw) and arguments.chart:
        print("No charts: they show `opening` and workloads of the dict.", file=sys.stderr)


if __name__ == "__main__":
    main()
