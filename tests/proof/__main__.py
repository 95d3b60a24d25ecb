"""All checks within a budget, two at a time: what was tried, how much of it, and what was wrong.

    python -m tests.proof --minutes 10 [--only CHECK] [--json]

Each check gets its share of the budget, in parts that are processes of their own; what these counted is added up.  The
status is 1 if a promise was broken or a planted bug was not seen.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from logkv.cli.terminal import Update, counted, emit, progress, table
from tests.proof import backups, crash, failures, flips, fuzz, kill, planted, repairs, soak
from tests.proof.common import scratch, verdict

LANES = 2               # parts at a time: the cores that the figures are meant for
GRACE = 120             # seconds that a part may take beyond its own, to build something or to end what it does
ENOUGH = sys.maxsize    # cases: the time ends a part


class Part(NamedTuple):
    """What one process does of a check: part `number` of `count`."""

    check: str
    seconds: float
    number: int
    count: int
    seed: int


class Result(NamedTuple):
    """What was counted, under the names of ROWS, and what was wrong."""

    counts: dict[str, int]
    violations: list[str]


# -- the checks -------------------------------------------------------------------------------------------------


def power_cuts(part: Part, directory: str) -> Result:
    whole = crash.Report()
    for report in crash.run(ENOUGH, part.seconds, part.seed * part.count + part.number, step=part.count):
        whole.add(report)
    return Result({"states": whole.distinct, "states in work": whole.from_recovery + whole.from_compaction,
                   "deaths": whole.killed}, whole.violations)


def kills(part: Part, directory: str) -> Result:
    tally = kill.run(directory, ENOUGH, part.seconds, part.seed * part.count + part.number + 1)
    return Result({"kills": tally.killed}, tally.violations)


def failing(what: str) -> Callable[[Part, str], Result]:
    def run(part: Part, directory: str) -> Result:
        tally = failures.run(part.seconds, part.seed + 1, share=(part.number, part.count), what=what)
        return Result({what: sum(tally.counted.values()), f"{what} incomplete": not tally.complete}, tally.violations)
    return run


def flipped_bits(part: Part, directory: str) -> Result:
    result = flips.run(directory, ENOUGH, part.seconds, part.seed + 1, (part.number, part.count))
    return Result({"flips": result.flips, "damages": result.others}, result.violations)


def fuzzing(part: Part, directory: str) -> Result:
    """First `scan`, for most of the time."""
    result = Result({"executions": 0, "other executions": 0, "without sanitizers": 0}, [])
    others = [name for name in fuzz.NAMES if name != "scan"]
    for target, share in [("scan", 0.9), *((name, 0.1 / len(others)) for name in others)]:
        done = fuzz.run(directory, part.seconds * share, part.seed + 1, target)
        result.counts["executions" if target == "scan" else "other executions"] += done.executions
        result.counts["without sanitizers"] += 0 if done.sanitized else done.executions
        result.violations.extend(done.findings)
    return result


def steps(part: Part, directory: str) -> Result:
    result = soak.run(ENOUGH, part.seconds, part.seed * part.count + part.number + 1)
    return Result({"steps": result.steps, "crashes": result.counted["kills"] + result.counted["power cuts"]}, result.violations)


def repaired(part: Part, directory: str) -> Result:
    result = repairs.run(part.seconds, seed=part.seed * part.count + part.number + 1)
    return Result({"repairs": result.damages, "repair states": result.cuts}, result.violations)


def backed_up(part: Part, directory: str) -> Result:
    report = backups.run(part.seconds, random.Random(f"{part.seed} {part.number}").getrandbits(48))
    return Result({"backup states": report.distinct}, report.violations)


def planted_bugs(part: Part, directory: str) -> Result:
    """All of them, however long that takes."""
    seen, there, unseen = planted.run()
    return Result({"seen": seen, "planted": there}, unseen)


class Check(NamedTuple):
    """A harness, in how many parts it runs, and its share of the budget: core seconds of 10 minutes on two cores."""

    run: Callable[[Part, str], Result]
    parts: int
    share: float


CHECKS = {
    "crash": Check(power_cuts, 2, 515), "kill": Check(kills, 2, 153), "calls": Check(failing("calls"), 2, 119),
    "allocations": Check(failing("allocations"), 2, 136), "flips": Check(flipped_bits, 2, 150), "fuzz": Check(fuzzing, 1, 82),
    "machine": Check(steps, 2, 30), "repair": Check(repaired, 1, 4), "backup": Check(backed_up, 1, 4),
    "planted": Check(planted_bugs, 1, 7),
}

# The lines of the table: name of a count, what it is, what ten minutes on two cores are to give, whose violations it shows.
ROWS = (
    ("states", "distinct power-cut states recovered and compared", "500,000", "crash"),
    ("states in work", "- of these, from crashes during recovery and compaction", "50,000", ""),
    ("deaths", "- beside them: states that the death of the process left", "", ""),
    ("kills", "kill -9 cycles compared with the oracle, readers attached", "10,000", "kill"),
    ("calls", "injected failures of system calls", "20,000", "calls"),
    ("allocations", "injected failures of allocations", "every k", "allocations"),
    ("flips", "flipped bits", "200,000", "flips"),
    ("damages", "- other damage: cut short, overwritten, zeroed", "", ""),
    ("executions", "fuzz executions of parser and scan", "5,000,000", "fuzz"),
    ("other executions", "- of MANIFEST, open, repair, import", "", ""),
    ("steps", "state-machine steps", "50,000", "machine"),
    ("crashes", "- of these, kills and power cuts", "", ""),
    ("repairs", "damaged stores repaired", "", "repair"),
    ("repair states", "- distinct states of a power cut during a repair", "", ""),
    ("backup states", "distinct states of a power cut during a backup", "", "backup"),
    ("seen", "planted bugs seen", "all", "planted"),
)


# -- running them -----------------------------------------------------------------------------------------------


def parts_of(minutes: float, names: Sequence[str], seed: int) -> list[Part]:
    """The longest first, so that the lanes end at about the same time."""
    unit = minutes * 60 * LANES / sum(CHECKS[name].share for name in names)
    parts = [Part(name, CHECKS[name].share * unit / CHECKS[name].parts, number, CHECKS[name].parts, seed)
             for name in names for number in range(CHECKS[name].parts)]
    return sorted(parts, key=lambda part: -part.seconds)


class Running:
    """A part in a process of its own, which says its result as JSON."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self._began = time.monotonic()
        self._output = tempfile.TemporaryFile()
        self._process = subprocess.Popen([sys.executable, "-m", "tests.proof", "--part", json.dumps(part)],
                                         stdout=self._output)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def result(self) -> Result | None:
        """None as long as it runs."""
        if self._process.poll() is None:
            if self.seconds < self.part.seconds + GRACE:
                return None
            self.end()
            return Result({}, [f"it did not end within {self.seconds:.0f} s"])
        self._output.seek(0)
        text = self._output.read().decode()
        self.end()
        return Result({}, [f"it ended with {self._process.returncode}: {text}"]) if self._process.returncode else \
            Result(*json.loads(text))

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._output.close()


def run_all(parts: Sequence[Part], update: Update) -> Iterator[tuple[Part, Result, float]]:
    """All parts, LANES at a time: each with its result and the seconds it took, as soon as it has ended."""
    waiting, running, done = list(parts), list[Running](), 0.0
    try:
        while waiting or running:
            while waiting and len(running) < LANES:
                running.append(Running(waiting.pop(0)))
            time.sleep(0.1)
            for one in list(running):
                if (result := one.result()) is not None:
                    running.remove(one)
                    done += one.part.seconds
                    yield one.part, result, one.seconds
            update(int(done + sum(min(one.seconds, one.part.seconds) for one in running)))
    finally:
        for one in running:
            one.end()


def found(name: str, counts: Counter[str]) -> str:
    """A count as it stands in the table."""
    text = f"{counts[name]:,}"
    if name == "seen":
        text += f" of {counts['planted']:,}"
    if name in ("calls", "allocations"):
        text += ", not all" if counts[f"{name} incomplete"] else ", every one"
    if name == "executions" and counts["without sanitizers"]:
        text += " (without sanitizers: none are installed)"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proof", description="Everything that could go wrong, tried.")
    parser.add_argument("--minutes", type=float, default=10, help="for all of it, on two cores (%(default)s)")
    parser.add_argument("--only", choices=CHECKS, action="append", help="a check to run; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="others try other cases")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    parser.add_argument("--part", type=json.loads, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.part:
        part = Part(*wanted.part)
        with tempfile.TemporaryDirectory(dir=scratch()) as directory:
            emit(CHECKS[part.check].run(part, directory))
        return 0
    names = wanted.only or list(CHECKS)
    parts = parts_of(wanted.minutes, names, wanted.seed)
    counts, violations, seconds = Counter[str](), {name: list[str]() for name in names}, Counter[str]()
    with progress("proof", int(sum(part.seconds for part in parts)), unit="core seconds") as update:
        for part, result, took in run_all(parts, update):
            counts.update(result.counts)
            violations[part.check] += result.violations
            seconds[part.check] += took
    if wanted.json:
        emit({"counts": counts, "seconds": seconds, "violations": violations})
    else:
        rows = [(what, found(name, counts), wish, f"{seconds[check]:.0f}" if check else "",
                 f"{len(violations[check]):,}" if check else "")
                for name, what, wish, check in ROWS if name in counts and (not check or check in names)]
        table(["what", "how many", "in 10 minutes at least", "core seconds", "violations"], rows,
              title=f"LogKV, {counted(round(wanted.minutes), 'minute')} on {LANES} cores")
    return verdict([f"{name}: {violation}" for name in names for violation in violations[name]])


if __name__ == "__main__":
    sys.exit(main())
