"""Power cuts while a backup is made: its directory holds the older backup, the new one, or none, and is not in the way.

A store goes through some steps; after each it is backed up into the same directory, which a `Recorder` watches.  In
every state that a power cut could leave of that directory (see `tests/proof/crash.py`)

* what opens, for a reader and for a writer, is the backup that was there or the one that was being made, and this one
  if it was acknowledged; nothing opens only where none was there before;
* the backup can be made again, and is whole then; power cuts during that are explored in the same way.

    python -m tests.proof.backups --seconds 60
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import logkv
from logkv.opening import Options
from tests.proof.common import NOISE, SEGMENT, arguments, difference, scratch, verdict
from tests.proof.crash import weight
from tests.proof.disk import Disk, State
from tests.proof.events import Named
from tests.proof.recorder import Recorder
from tests.proof.session import open_store

BACKUPS = 4                     # into one directory
STATES = 150                    # of one backup, at most
NESTED = 0.02                   # the share of states in which the next backup is explored too

OPTIONS = Options(segment_size=SEGMENT, compaction="manual", background=False)  # a thread would be recorded as well

Content = dict[bytes, bytes]


@dataclass(slots=True)
class Report:
    """What was checked, and what was wrong."""

    distinct: int = 0                   # states of the directory
    nested: int = 0                     # of these, of a backup that followed a power cut
    unfinished: int = 0                 # and without a backup that opens
    violations: list[str] = field(default_factory=list)


def change(db: logkv.Store[bytes], dice: random.Random) -> None:
    """So that the next backup is another one: puts and deletes over some segments; perhaps merges, or all anew."""
    if dice.random() < 0.15:
        db.clear()
    for _ in range(dice.choice((0, 1, 30, 150))):
        key = b"key %d" % dice.randrange(60)
        if dice.random() < 0.25:
            db.delete(key)
        else:
            start = dice.randrange(1 << 16)
            db.put(key, NOISE[start:start + dice.randrange(3000)])
    if dice.random() < 0.3:
        db.compact()


class Explorer:
    """Makes backups of one store and looks at what a power cut leaves of them."""

    def __init__(self, db: logkv.Store[bytes], root: Path, dice: random.Random, report: Report,
                 deadline: float) -> None:
        self.db = db
        self.root = root
        self.dice = dice
        self.report = report
        self.deadline = deadline

    def back_up(self, target: Path, before: Sequence[Content], limit: int, depth: int = 0) -> None:
        """One backup, and up to `limit` states of it.  before: what the directory may hold; empty: it is no backup."""
        links = self.dice.random() < 0.5
        with Recorder(target) as recorder:
            self.db.backup(target, links=links)
        now = dict(self.db)
        label = f"depth {depth}, links {links}"
        self._judge(target, [now], False, f"{label}, as it was made")
        disk, seen = Disk(), set()
        share = limit / sum(weight(event) for event in recorder.events[recorder.start:])
        for at, event in enumerate(recorder.events):
            disk.apply(event)
            if at < recorder.start:
                continue
            last = at == len(recorder.events) - 1
            draws = share * weight(event)
            for _ in range(int(draws) + (self.dice.random() < draws % 1) + last):
                if time.monotonic() > self.deadline:
                    return
                state = disk.draw(self.dice)
                if (state.key, last) in seen:
                    continue
                seen.add((state.key, last))
                allowed = [now] if last else [*before, now]
                where = f"{label}, event {at} {event!r:.60} [{state.how}]"
                self._check(state, allowed, not before and not last, where, depth)

    def _check(self, state: State, allowed: Sequence[Content], unfinished: bool, where: str, depth: int) -> None:
        path = self.root / f"state {depth}"
        path.mkdir()
        try:
            state.write(str(path))
            self.report.distinct += 1
            self.report.nested += depth > 0
            if not self._judge(path, allowed, unfinished, where):
                return
            if depth == 0 and self.dice.random() < NESTED:
                self.back_up(path, [] if unfinished else allowed, STATES // 10, depth + 1)
            else:
                self.db.backup(path, links=self.dice.random() < 0.5)
            self._judge(path, [dict(self.db)], False, f"{where}, backed up again")
            if self.dice.random() < 0.2:
                with logkv.open(path, "w", segment_size=SEGMENT) as db:
                    db["more"] = "1"
                    if dict(db) != dict(self.db) | {b"more": b"1"}:
                        self._say(where, f"written to: {difference(dict(db), dict(self.db))}")
        except logkv.Error as problem:
            self._say(where, repr(problem))
        finally:
            shutil.rmtree(path)         # not to be written over: it has links into the store

    def _judge(self, path: Path, allowed: Sequence[Content], unfinished: bool, where: str) -> bool:
        try:
            with logkv.Reader(path) as reader:
                found = dict(reader)
            if problems := logkv.verify(path).problems:
                raise logkv.Error(str(problems[0]))
        except logkv.Error as problem:
            if unfinished and isinstance(problem, (logkv.NotFoundError, logkv.FormatError)):
                self.report.unfinished += 1
                return True
            self._say(where, repr(problem))
            return False
        if found not in allowed:
            self._say(where, f"it is none of what it may be: {difference(found, allowed[-1])}")
        return found in allowed

    def _say(self, where: str, what: str) -> None:
        self.report.violations.append(f"{where}: {what}")


def run(seconds: float, seed: int = 0, states: int = sys.maxsize) -> Report:
    """Stores and their backups, until the time is up, so many states were checked, or something is wrong."""
    report = Report()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and report.distinct < states and not report.violations:
        dice = random.Random(f"backups {seed}")
        seed += 1
        with tempfile.TemporaryDirectory(dir=scratch()) as directory:
            root = Path(directory)
            (root / "backup").mkdir()
            with open_store(root / "store.db", "c", OPTIONS) as db:
                explorer = Explorer(db, root, dice, report, deadline)
                before: list[Content] = []
                for _ in range(BACKUPS):
                    change(db, dice)
                    explorer.back_up(root / "backup", before, min(STATES, states - report.distinct))
                    before = [dict(db)]
    return report


def main() -> int:
    parser = arguments("Power cuts while a backup is made.")
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    report = run(options.seconds, options.seed)
    print(f"{report.distinct:,} states, {report.nested:,} of them of a backup after a power cut, "
          f"{report.unfinished:,} without a backup yet: {len(report.violations):,} violations")
    return verdict(report.violations)


if __name__ == "__main__":
    sys.exit(main())
