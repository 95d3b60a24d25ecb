"""All harnesses, one after the other: power cuts, kills, flipped bits, one writer with four readers.

    python -m tests.proof --seconds 60 [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

from tests.proof import crash, flips, kill, stress
from tests.proof.common import scratch, verdict


class Result(NamedTuple):
    """What a check counted, and what was wrong."""

    counted: dict[str, int]
    violations: list[str]


def check_crash(directory: str, seconds: float) -> Result:
    whole = crash.Report("all")
    for report in crash.run(sys.maxsize, seconds):
        whole.add(report)
    return Result({"distinct power-cut states": whole.distinct, "of them from recoveries": whole.from_recovery},
                  whole.violations)


def check_kill(directory: str, seconds: float) -> Result:
    tally = kill.run(directory, sys.maxsize, seconds)
    return Result({"kill -9 cycles": tally.killed}, tally.violations)


def check_flips(directory: str, seconds: float) -> Result:
    result = flips.run(directory, sys.maxsize, seconds)
    return Result({"flipped bits": result.flips, "other damages": result.others}, result.violations)


def check_stress(directory: str, seconds: float) -> Result:
    figures = stress.run(os.path.join(directory, "stress.db"), seconds)
    return Result({"writes": figures.writes, "reads": figures.reads}, figures.violations)


CHECKS: dict[str, Callable[[str, float], Result]] = {
    "crash": check_crash, "kill": check_kill, "flips": check_flips, "stress": check_stress,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proof", description="Everything that could go wrong, tried.")
    parser.add_argument("--seconds", type=float, default=60, help="for each check")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    options = parser.parse_args()
    results: dict[str, Result] = {}
    if not options.json:
        print(f"{'check':<8}{'counted':<74}{'violations':>10}", flush=True)
    for name, check in CHECKS.items():
        with tempfile.TemporaryDirectory(dir=scratch()) as directory:
            counted, violations = results[name] = check(directory, options.seconds)
        if not options.json:
            what = ", ".join(f"{number:,} {thing}" for thing, number in counted.items())
            print(f"{name:<8}{what:<74}{len(violations):>10,}", flush=True)
    if options.json:
        print(json.dumps({name: result._asdict() for name, result in results.items()}, indent=2))
    return verdict([f"{name}: {violation}" for name, result in results.items() for violation in result.violations])


if __name__ == "__main__":
    sys.exit(main())
