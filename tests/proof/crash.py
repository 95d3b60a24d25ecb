"""Power cuts: every state that one could leave, recovered and compared with the history.

A workload runs once against the real engine while a `Recorder` notes, in order, what reaches the files: each system
call that changes or syncs something, and each page that a store through a mapping changed (those are no calls, so all
files are read back at every call and at both ends of every operation).  `Disk` replays these events: what was synced
is durable, all else is pending.  A `State` is the durable part and any pending changes: pages in any order, as of any
moment, cut at any sector; sizes without data; names in part.  `Explorer` writes states into a directory, opens them
with the real engine and demands that

* what is recovered is what some prefix of the history left, not shorter than what was acknowledged as durable, not
  longer than what was begun (P1, P3, P4, P9);
* what is appended then is there when the store is opened again, and nothing else (P5, P10);
* a power cut during that recovery loses nothing more: its own states are explored in the same way (P13), and what
  it set aside is whole under `lost+found` in the end.

    python -m tests.proof.crash --states 100000
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from benchmarks.baseline import BaselineStore
from logkv import files, store
from tests.proof.common import difference, scratch, verdict
from tests.proof.disk import Disk, State
from tests.proof.events import Begun, Durable, Event, Named, Synced, SyncedNames
from tests.proof.recorder import Recorder
from tests.proof.session import History, Session, determined, open_store
from tests.proof.workloads import WORKLOADS, record

DEPTH = 2                       # power cuts during the recovery from one, during the recovery from that
NESTED_LIMIT = 24               # states of one recovery


@dataclass(slots=True)
class Report:
    """What was checked, and what was wrong."""

    workload: str = ""
    distinct: int = 0                   # states that were recovered
    from_recovery: int = 0              # of these, states of a power cut during a recovery
    recoveries_enumerated: int = 0
    set_aside: int = 0                  # of these recoveries, those that set aside what they cut off
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        for name in ("distinct", "from_recovery", "recoveries_enumerated", "set_aside", "seconds", "violations"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a state's recovery came to: which states of the history it is; a problem, whichever they are."""

    indices: list[int]
    content: dict[bytes, bytes] | None = None       # only if it is none of them
    problem: str = ""


class Explorer:
    """Draws states of one recorded run, and of the recoveries from them, and judges each."""

    def __init__(self, root: Path, dice: random.Random, report: Report, *, label: str, keep: Path | None,
                 nested: float, deadline: float) -> None:
        self.root = root
        self.dice = dice
        self.report = report
        self.label = label
        self.keep = keep
        self.nested = nested            # the share of recoveries that are explored themselves
        self.deadline = deadline
        self._seen: set[int] = set()

    def explore(self, recorder: Recorder, history: History, limit: int, *, created: bool, depth: int = 0,
                aside: Mapping[str, bytes] = MappingProxyType({})) -> None:
        """Checks up to `limit` distinct states, drawn at all boundaries alike; `aside`: what is set aside at last."""
        known: dict[tuple[int, bool], Outcome] = {}
        share = limit / (2 * sum(weight(event) for event in recorder.events))
        fruitless = 0
        while fruitless < 3:
            before = len(known)
            disk, low, high, exists = Disk(), 0, 0, created
            for at, event in enumerate(recorder.events):
                disk.apply(event)
                if isinstance(event, Begun):
                    high = event.index
                elif isinstance(event, Durable):
                    low, exists = event.index, True
                if at < recorder.start:
                    continue
                draws = weight(event) * share
                for _ in range(int(draws) + (self.dice.random() < draws % 1)):
                    state = disk.draw(self.dice)
                    key = state.key
                    if (key, exists) not in known:
                        if len(known) >= limit or time.monotonic() > self.deadline:
                            return
                        if key not in self._seen:
                            self._seen.add(key)
                            self.report.distinct += 1
                            self.report.from_recovery += depth > 0
                        known[key, exists] = self.recover(state, history, exists, depth, aside)
                    where = f"event {at} of {len(recorder.events)}, depth {depth}"
                    self._judge(state, known[key, exists], history, low, high, where)
            fruitless = 0 if len(known) > before else fruitless + 1

    def _judge(self, state: State, outcome: Outcome, history: History, low: int, high: int, where: str) -> None:
        problem = outcome.problem
        if not problem and outcome.content is not None:
            against = [f"against {at}: {difference(outcome.content, history.state(at))}" for at in (low, high)]
            problem = "it is no state of the history; " + "; ".join(against)
        elif not problem and not any(low <= index <= high for index in outcome.indices):
            problem = f"it is state {outcome.indices}"
        if problem:
            violations = self.report.violations
            violations.append(f"{self.label}, {where}: [{state.how}] expected a state from {low} to {high}: {problem}")
            if self.keep is not None:
                state.write(str(self.keep / f"{self.label.replace(' ', '-')}-{len(violations)}"))

    def recover(self, state: State, history: History, exists: bool, depth: int, aside: Mapping[str, bytes]) -> Outcome:
        """Opens a state, appends to it, opens it again; perhaps explores that as well."""
        path = self.root / str(depth)
        path.mkdir(exist_ok=True)
        try:
            state.write(str(path))
            flag = "w" if exists else "c"
            sync = self.dice.choice(("os", "always", 3600.0))
            if self.dice.random() >= self.nested or depth == DEPTH:
                return self._recover(Session(path, sync, self.dice), flag, history, state, aside)
            with Recorder(path) as recorder:
                session = Session(path, sync, self.dice, recorder)
                outcome = self._recover(session, flag, history, state, aside)
            if not outcome.problem:
                found = set_aside(path)
                self.report.recoveries_enumerated += 1
                self.report.set_aside += len(found) > len(aside)
                self.explore(recorder, session.history, NESTED_LIMIT, created=exists, depth=depth + 1, aside=found)
            return outcome
        finally:
            empty(str(path))

    def _recover(self, session: Session, flag: str, history: History, state: State,
                 aside: Mapping[str, bytes]) -> Outcome:
        step = "open"
        try:
            first = flag == "w" and session.recorder is None and self.dice.random() < 0.06
            seen = self._read(session, self.dice.choice((store.Reader, BaselineStore))) if first else None
            session.open(flag)
            step = "read"
            session.begin()
            found = session.history.base
            indices = history.find(found)
            if problem := not_aside(set_aside(session.path), aside, state):
                return Outcome(indices, problem=problem)
            if seen is not None and seen != found:
                return Outcome(indices, problem=f"a reader had seen something else: {difference(seen, found)}")
            step = "append"
            self._append(session)
            if session.recorder is None and self.dice.random() < 0.6:
                session.kill()
            else:
                session.close()
            step = "open again"
            expected = session.history.now
            if session.recorder is None:
                if self.dice.random() < 0.5:        # or the index is believed
                    os.unlink(session.path / files.CONTROL)
                again = self._read(session, self.dice.choice(12 * (store.Reader, store.Store) + (BaselineStore,)))
                if again != expected:
                    return Outcome(indices, problem=f"opened again: {difference(again, expected)}")
            return Outcome(indices, None if indices else found)
        except Exception as problem:
            return Outcome([], problem=f"cannot {step}: {problem!r}")
        finally:
            session.abandon()

    def _read(self, session: Session, by: type) -> dict[bytes, bytes]:
        """What a reader, the next writer, or a program that has only docs/format.md sees."""
        if by is BaselineStore:
            with BaselineStore(session.path, "r") as baseline:
                return dict(baseline)
        with open_store(session.path, "r" if by is store.Reader else "w", session.options) as db:
            return dict(db)

    def _append(self, db: Session) -> None:
        """Writes a little; or records that end where some ended that were cut off; or up to a segment's last bytes."""
        before = list(db.history.base.items())
        how = self.dice.choice(("little", "alike", "alike", "full")) if before else "little"
        if how == "full":
            db.put(b"appended", max(0, db.room - 48))
        for _ in range(self.dice.choice((0, 1, 1, 2, 2, 3, 5))):
            if how == "alike":
                key, value = self.dice.choice(before)
                db.put(key, len(value))
            else:
                db.put(b"appended %d" % self.dice.randrange(3), self.dice.choice((10, 100, 400, 6000, 20_000)))
        if before and self.dice.random() < 0.2:
            db.delete(self.dice.choice(before)[0])
        if self.dice.random() < 0.3:
            db.sync()
        if self.dice.random() < 0.1:
            self.dice.choice((db.compact, db.rotate, db.merge))()


def weight(event: Event) -> int:
    """How closely the moment after it is looked at: around names and syncs more can go wrong than between two puts."""
    return 6 if isinstance(event, Named) else 3 if isinstance(event, (Synced, SyncedNames)) else 1


def set_aside(path: Path) -> dict[str, bytes]:
    """What recoveries cut off and kept."""
    return {file.name: file.read_bytes() for file in (path / files.LOST_FOUND).glob("*") if file.suffix != ".tmp"}


def not_aside(found: Mapping[str, bytes], before: Mapping[str, bytes], state: State) -> str:
    """What is wrong with what is set aside: all that was before is still there, the rest is the state's own."""
    for label, data in before.items():
        if found.get(label) != data:
            return f"{label}, once set aside, is {'not whole' if label in found else 'gone'}"
    for label in found.keys() - before.keys():
        number, _, span, *_ = label.split(".")
        start, stop = map(int, span.split("-"))
        if found[label] != b"".join(state.images[f"{number}.seg"][1])[start:stop]:
            return f"{label} is not what was cut off"
    return ""


def empty(path: str) -> None:
    """Removes what is in a directory."""
    with os.scandir(path) as found:
        for entry in found:
            if entry.is_dir():
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)


def enumerate_crashes(name: str, *, seed: int = 0, limit: int = 1000, nested: float = 0.01, keep: Path | None = None,
                      seconds: float = 3600) -> Report:
    """Records a workload and checks up to `limit` distinct states that a power cut could leave of it.

    `nested`: the share of recoveries of which the power cuts are explored too.  `keep`: where states that break the
    contract are written to.
    """
    began = time.monotonic()
    report = Report(name)
    dice = random.Random(f"{name} {seed}")
    with determined(dice), tempfile.TemporaryDirectory(dir=scratch()) as directory:
        root = Path(directory)
        path = root / "recorded"
        path.mkdir()
        recorder, history = record(name, path, dice)
        explorer = Explorer(root, dice, report, label=f"{name} {seed}", keep=keep, nested=nested,
                            deadline=began + seconds)
        explorer.explore(recorder, history, limit, created=False)
    report.seconds = time.monotonic() - began
    return report


def run(states: int, seconds: float, seed: int = 0, *, names: Sequence[str] = tuple(WORKLOADS), nested: float = 0.01,
        keep: Path | None = None) -> list[Report]:
    """Checks so many states, or what can be had in so many seconds, seed after seed; a report for each workload."""
    totals = [Report(name) for name in names]
    until = time.monotonic() + seconds
    limit = min(1000, -(-states // len(names)))
    while sum(total.distinct for total in totals) < states and time.monotonic() < until:
        for at, total in enumerate(totals):
            share = (until - time.monotonic()) / (len(totals) - at)
            report = enumerate_crashes(total.workload, seed=seed, limit=limit, nested=nested, keep=keep, seconds=share)
            total.add(report)
        seed += 1
    return totals


def main(arguments: list[str] | None = None) -> int:
    """The command line: all workloads, seed after seed."""
    parser = argparse.ArgumentParser(prog="python -m tests.proof.crash", description="Power cuts, by enumeration.")
    parser.add_argument("--states", type=int, default=20_000, help="distinct states to check")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--workload", choices=sorted(WORKLOADS), help="only this one")
    parser.add_argument("--nested", type=float, default=0.01, help="share of recoveries that are explored too")
    parser.add_argument("--keep", type=Path, help="write states that break the contract here")
    options = parser.parse_args(arguments)
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    names = [options.workload] if options.workload else list(WORKLOADS)
    reports = run(options.states, options.seconds, options.seed, names=names, nested=options.nested, keep=options.keep)
    whole = Report("all")
    print(f"{'workload':<16}{'states':>10}{'of recoveries':>16}{'violations':>12}{'states/s':>10}")
    for report in [*reports, whole]:
        print(f"{report.workload:<16}{report.distinct:>10,}{report.from_recovery:>16,}{len(report.violations):>12,}"
              f"{report.distinct / max(report.seconds, 1e-9):>10,.0f}")
        if report is not whole:
            whole.add(report)
    print(f"{whole.recoveries_enumerated:,} recoveries were explored themselves; {whole.set_aside:,} of them had set "
          "something aside")
    return verdict(whole.violations)


if __name__ == "__main__":
    sys.exit(main())
