"""Power cuts: every state that one could leave, recovered and compared with the history.

A workload runs once against the real engine while a `Recorder` notes, in order, what reaches the files: each system
call that changes or syncs something, and each page that a store through a mapping changed (those are no calls, so all
files are read back at every call and at both ends of every operation).  `Disk` replays these events: what was synced
is durable, all else is pending.  A `State` is the durable part and any pending changes: pages in any order, as of any
moment, cut at any sector; sizes without data; names in part; pages of a sync that failed, which no later one writes.
`Explorer` writes states into a directory, opens them with the real engine and demands that

* what is recovered is what some prefix of the history left, not shorter than what was acknowledged as durable, not
  longer than what was begun (P1, P3, P4, P9);
* what is appended then is there when the store is opened again, and nothing else (P5, P10): after every recovery that
  cut something off, after some of the others;
* a power cut during that recovery loses nothing more: its own states are explored in the same way (P13), and what
  it set aside is whole under `lost+found` in the end.

The death of the process between any two calls leaves a state too, in which all files are as they were, and the index is
believed: some of these are tried beside the power cuts, and counted for themselves.

Two states count as two if an opening could tell them apart: see `State.key`.  A state is counted as one of a recovery
if power failed before that had ended, as one of a compaction if it failed while a segment was merged or sealed.

    python -m tests.proof.crash --states 100000 --processes 2

A violation names the run that showed it: `--states 1` and what it begins with repeat that.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType

from benchmarks.baseline import BaselineStore
from logkv import files, store
from tests.proof.common import Child, difference, scratch, verdict
from tests.proof.disk import Disk, State
from tests.proof.events import Begun, Changed, Compacting, Durable, Event, Named, Returned, Synced, SyncedNames
from tests.proof.recorder import Recorder
from tests.proof.session import History, Session, determined, open_store
from tests.proof.workloads import WORKLOADS, record

LIMIT = 1500                    # states of one run of a workload
NEW = 0.25                      # of the states that are drawn; where it is less another run has more
KILLED = 0.02                   # deaths of the process that are tried, to a state of a power cut
WRITTEN_TO = 0.05, 0.2          # so many recoveries that cut nothing off (of whole files, of some in part) are appended to
                                # and opened again; those that cut something off are always
DEPTH = 2                       # power cuts during the recovery from one, during the recovery from that
NESTED, NESTED_LIMIT = 0.01, 24 # the share of recoveries that are explored, and up to how many states of one


@dataclass(slots=True)
class Report:
    """What was checked, and what was wrong."""

    workload: str = ""
    distinct: int = 0                   # states of a power cut that were recovered
    from_recovery: int = 0              # of these, of a power cut during a recovery
    from_compaction: int = 0            # of these, of one while a segment was merged or sealed
    killed: int = 0                     # beside them, states that the death of the process left
    believed: int = 0                   # of these, those of which the index was believed
    recoveries_enumerated: int = 0
    set_aside: int = 0                  # of these recoveries, those that set aside what they cut off
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        for name in Report.__slots__[1:]:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a state's recovery came to: which states of the history it is; a problem, whichever they are."""

    indices: list[int]
    content: dict[bytes, bytes] | None = None       # only if it is none of them
    problem: str = ""
    believed: bool = False                          # the index was


class Explorer:
    """Draws states of one recorded run, and of the recoveries from them, and judges each."""

    def __init__(self, root: Path, dice: random.Random, report: Report, *, label: str, keep: Path | None,
                 nested: float, deadline: float) -> None:
        self.dice = dice
        self.report = report
        self.label = label
        self.keep = keep
        self.nested = nested            # the share of recoveries that are explored themselves
        self.deadline = deadline
        self._seen: set[int] = set()
        self._places = [root / str(depth) for depth in range(DEPTH + 1)]    # where states are written to
        for place in self._places:
            place.mkdir()

    def explore(self, recorder: Recorder, history: History, limit: int, *, created: bool, depth: int = 0,
                aside: Mapping[str, bytes] = MappingProxyType({})) -> None:
        """Checks up to `limit` distinct states, drawn at all boundaries alike, while enough of what is drawn is new.

        aside: what is set aside at last.
        """
        known: dict[tuple[int, bool], Outcome] = {}
        before = 0
        events = [recorder.events[:recorder.start], recorder.events[recorder.start:]]
        share = limit / (2 * sum(map(weight, recorder.events)))
        kills = KILLED * limit / len(recorder.events)
        drawn = -1
        while len(known) > before + NEW * drawn:
            before, drawn = len(known), 0
            disk, exists, recovering, compacting = Disk(), created, depth > 0, False
            begun = returned = durable = 0
            for event in events[0]:
                disk.apply(event)
            for at, event in enumerate(events[1], recorder.start):
                disk.apply(event)
                if isinstance(event, Begun):
                    begun = event.index
                elif isinstance(event, Returned):
                    returned = event.index
                elif isinstance(event, Durable):
                    durable, exists, recovering = event.index, True, False
                elif isinstance(event, Compacting):
                    compacting = event.now
                where = f"event {at} of {len(recorder.events)}, depth {depth}"
                if not before and self.dice.random() < kills and is_moment(recorder.events, at):
                    state = disk.kept(recorder.inodes)
                    outcome = self.recover(state, history, exists, depth, aside)
                    self.report.killed += 1
                    self.report.believed += outcome.believed
                    self._judge(state, outcome, history, max(returned, durable), begun, where)
                draws = weight(event) * share
                for _ in range(int(draws) + (self.dice.random() < draws % 1)):
                    drawn += 1
                    state = disk.draw(self.dice)
                    key = state.key
                    if (key, exists) not in known:
                        if len(known) >= limit or time.monotonic() > self.deadline:
                            return
                        if key not in self._seen and state.has_store:
                            self._seen.add(key)
                            self.report.distinct += 1
                            self.report.from_recovery += recovering
                            self.report.from_compaction += compacting
                        known[key, exists] = self.recover(state, history, exists, depth, aside)
                    self._judge(state, known[key, exists], history, durable, begun, where)

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
                place = self.keep / f"{'-'.join(self.label.split()[1::2])}-{len(violations)}"
                place.mkdir(exist_ok=True)
                state.write(str(place))

    def recover(self, state: State, history: History, exists: bool, depth: int, aside: Mapping[str, bytes]) -> Outcome:
        """Opens a state, appends to it, opens it again; perhaps explores that as well."""
        path = self._places[depth]
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
            result = Outcome(indices, None if indices else found, believed=session.recovered["index"] != "rebuilt")
            share = 1 if session.recorder or session.recovered["cut_bytes"] else WRITTEN_TO[state.in_part]
            if self.dice.random() >= share:
                session.kill()
                return result
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
                readers = 12 * (store.Reader, store.Reader, store.Store) + (BaselineStore,)
                again = self._read(session, self.dice.choice(readers))
                if again != expected:
                    return Outcome(indices, problem=f"opened again: {difference(again, expected)}")
            return result
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
    if isinstance(event, (Returned, Compacting)):
        return 0                # nothing has changed
    return 6 if isinstance(event, Named) else 3 if isinstance(event, (Synced, SyncedNames)) else 1


def is_moment(events: Sequence[Event], at: int) -> bool:
    """Whether all files were so at one time, as after this event: what stores have changed is noted file by file."""
    return at + 1 == len(events) or not isinstance(events[at + 1], Changed)


def set_aside(path: Path) -> dict[str, bytes]:
    """What recoveries cut off and kept."""
    place = path / files.LOST_FOUND
    try:
        names = os.listdir(place)
    except FileNotFoundError:
        return {}
    return {name: (place / name).read_bytes() for name in names if not name.endswith(".tmp")}


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


def enumerate_crashes(name: str, *, seed: int = 0, limit: int = 1000, nested: float = NESTED, keep: Path | None = None,
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
        gc.freeze()             # nothing of that goes any more: it need not be looked at
        explorer = Explorer(root, dice, report, label=f"--workload {name} --seed {seed}", keep=keep, nested=nested,
                            deadline=began + seconds)
        explorer.explore(recorder, history, limit, created=False)
        gc.unfreeze()
    report.seconds = time.monotonic() - began
    return report


def run(states: int, seconds: float, seed: int = 0, *, step: int = 1, names: Sequence[str] = tuple(WORKLOADS),
        nested: float = NESTED, keep: Path | None = None, limit: int = LIMIT) -> list[Report]:
    """Checks so many states, or what can be had in so many seconds; a report for each workload.

    All workloads are run with `seed`, then with `seed + step`, and so on: of n processes the k-th takes seed k of step
    n, and what they count adds up, for no state with an identity in it can come of two runs.  limit: states of one run.
    """
    totals = [Report(name) for name in names]
    until = time.monotonic() + seconds
    while sum(total.distinct for total in totals) < states and time.monotonic() < until:
        for at, total in enumerate(totals):
            share = (until - time.monotonic()) / (len(totals) - at)
            report = enumerate_crashes(total.workload, seed=seed, limit=limit, nested=nested, keep=keep, seconds=share)
            total.add(report)
        seed += step
    return totals


def table(reports: Sequence[Report]) -> Iterator[str]:
    """A line for each workload, and one for all."""
    whole = Report("all")
    yield (f"{'workload':<16}{'states':>10}{'in recovery':>13}{'in compaction':>15}{'killed':>9}{'violations':>12}"
           f"{'states/s':>10}")
    for report in [*reports, whole]:
        yield (f"{report.workload:<16}{report.distinct:>10,}{report.from_recovery:>13,}{report.from_compaction:>15,}"
               f"{report.killed:>9,}{len(report.violations):>12,}{report.distinct / max(report.seconds, 1e-9):>10,.0f}")
        if report is not whole:
            whole.add(report)
    yield (f"{whole.recoveries_enumerated:,} recoveries were explored themselves; {whole.set_aside:,} of them had set "
           f"something aside; after {whole.believed:,} of the kills the index was believed")


def main(arguments: list[str] | None = None) -> int:
    """The command line: all workloads, seed after seed."""
    parser = argparse.ArgumentParser(prog="python -m tests.proof.crash", description="Power cuts, by enumeration.")
    parser.add_argument("--states", type=int, default=20_000, help="distinct states to check")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=1, help="how many share the work")
    parser.add_argument("--workload", choices=sorted(WORKLOADS), help="only this one")
    parser.add_argument("--nested", type=float, default=NESTED, help="share of recoveries that are explored too")
    parser.add_argument("--keep", type=Path, help="write states that break the contract here")
    options = parser.parse_args(arguments)
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    names = [options.workload] if options.workload else list(WORKLOADS)
    count = options.processes

    def part(number: int) -> list[dict[str, object]]:
        return [asdict(report) for report in run(-(-options.states // count), options.seconds, options.seed + number,
                                                 step=count, names=names, nested=options.nested, keep=options.keep)]

    reports = [Report(name) for name in names]
    for child in [Child(f"process {number}", partial(part, number)) for number in range(count)]:
        for report, found in zip(reports, child.result()):
            report.add(Report(**found))
    print("\n".join(table(reports)))
    return verdict([violation for report in reports for violation in report.violations])


if __name__ == "__main__":
    sys.exit(main())
