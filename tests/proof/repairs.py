"""Damages a store at random and repairs it: what is intact is there, what is lost is said, nothing stale comes back.

Then the power is cut, at any moment of a repair: run again, it comes to the same.

    python -m tests.proof.repairs --seconds 60 [--cases N] [--seed N]
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import logkv
from benchmarks.baseline import DELETE, FOOTER, HEADER, MAX_COVERED, PUT, RECORD, BaselineStore
from logkv.opening import Options
from tests.proof.common import NOISE, SEGMENT, arguments, scratch, verdict
from tests.proof.disk import Disk
from tests.proof.recorder import Recorder
from tests.proof.session import merge, open_store, sealed_segments

Change = Callable[[bytes], bytes | None]       # of a file's bytes; None: it is missing then


class Written(NamedTuple):
    """A put or delete in the log: its file, and the bytes there that its checksums cover."""

    key: bytes
    kind: int
    value: bytes
    file: str
    start: int
    stop: int


def written(path: Path) -> list[Written]:
    """All of a store, in the order of the log."""
    found = []
    with BaselineStore(path, "r") as store:
        for segment in store._log:
            offset = HEADER.size
            while (record := segment.decode(offset, min(segment.entry["end"] or SEGMENT * 2, segment.size))) is not None:
                if record.kind == FOOTER:
                    break
                if record.kind in (PUT, DELETE):
                    own = 4 if len(record.value) > MAX_COVERED else 0
                    stop = offset + RECORD.size + own + len(record.key) + len(record.value)
                    found.append(Written(record.key, record.kind, record.value, segment.path.name, offset, stop))
                offset = record.end
    return found


class Sample:
    """A store before it is damaged."""

    def __init__(self, path: Path, merges: int = 0, steps: int = 1500) -> None:
        rng = random.Random(5)
        self.path = path
        db = open_store(path, "c", Options(segment_size=SEGMENT, compaction="manual", background=False))
        keys: set[bytes] = set()
        for step in range(steps):
            key = b"key %d" % rng.randrange(200)
            if rng.random() < 0.8:
                at = rng.randrange(len(NOISE) // 2)
                db[key] = NOISE[at:at + rng.choice((0, 10, 100, 300, 300, 5000 if step % 4 == 0 else 50))]
                keys.add(key)
            elif key in keys:
                del db[key]
                keys.remove(key)
            if step % 90 == 0:
                db.sync()
            if step in (500, 1000)[:merges] and sealed_segments(db) > 2:
                merge(db, 1, 2)
        db.close()
        self.files = {file.name: file.read_bytes() for file in path.iterdir()}
        self.log = written(path)
        self.active = self.log[-1].file
        self.sealed = [name for name in dict.fromkeys(record.file for record in self.log) if name != self.active]

    @property
    def newest(self) -> dict[bytes, Written]:
        return {record.key: record for record in self.log}

    def content(self) -> dict[bytes, bytes]:
        return {key: record.value for key, record in self.newest.items() if record.kind == PUT}

    def copy(self, path: Path, **changes: Change) -> Path:
        """The store elsewhere, with changed files."""
        path.mkdir()
        for name, data in self.files.items():
            after = changes.get(name.removesuffix(".seg"), changes.get(name, bytes))(data)
            if after is not None:
                (path / name).write_bytes(after)
        return path


def content(path: Path) -> dict[bytes, bytes]:
    with logkv.Reader(path) as reader:
        return dict(reader)


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def flip(at: int) -> Change:
    """Changes a byte."""
    return lambda data: data[:at] + bytes((data[at] ^ 0x55,)) + data[at + 1:]


def zeros(start: int, stop: int) -> Change:
    return lambda data: data[:start] + bytes(stop - start) + data[stop:]


def cut(at: int) -> Change:
    return lambda data: data[:at]


def garbage(start: int, stop: int, seed: float, data: bytes) -> bytes:
    return data[:start] + random.Random(seed).randbytes(stop - start) + data[stop:]


def damage(sample: Sample, rng: random.Random) -> dict[str, Change]:
    """Of one to three files, where sync marks, index and control page still tell how far the log reached."""
    changes: dict[str, Change] = {}
    names = [*sample.sealed, sample.active, "MANIFEST"]
    for name in rng.sample(names, min(len(names), rng.choice((1, 1, 2, 3)))):
        used = len(sample.files[name].rstrip(b"\0"))
        at = rng.randrange(0 if name == "MANIFEST" or len(changes) == 0 else 64, used)
        stop = min(used, at + rng.choice((1, 8, 512, 5000, 50_000)))
        changes[name.removesuffix(".seg")] = rng.choice((
            flip(at), flip(at), zeros(at, stop), cut(at),
            partial(garbage, at, stop, rng.random())))
    return changes


def judge(path: Path, original: Sample, report: logkv.RepairReport, before: dict[str, bytes]) -> list[str]:
    """What is wrong with a copy that was repaired, by what was intact in its files `before`."""
    unreadable = {loss.file for loss in report.lost if "header" in loss.why}
    unknown = any(loss.others is None for loss in report.lost)
    others = sum(loss.others or 0 for loss in report.lost)
    named = {key for loss in report.lost for key in loss.keys}
    found = content(path)
    problems = []
    unnamed = 0
    for key, record in original.newest.items():
        now, then = (data.get(record.file, b"") for data in (before, original.files))
        intact = now[record.start:record.stop] == then[record.start:record.stop] and len(now) >= record.stop + 7 & ~7 \
            and record.file not in unreadable       # its padding has to be there
        have = found.pop(key, None)
        if record.kind == DELETE:
            if have is not None and (intact or not unknown):
                problems.append(f"{key!r} was deleted, and is back")
        elif intact:
            if have != record.value or key in named:
                problems.append(f"{key!r} is intact, and is not served or called lost")
        else:
            unnamed += key not in named
            if have is not None and not unknown:
                problems.append(f"{key!r} is lost, and has an older value")
    if found:
        problems.append(f"there are keys that never were: {list(found)[:3]}")
    if not unknown and unnamed != others:
        problems.append(f"{unnamed} lost keys are not named, and the report says {others}")
    if not (verified := logkv.verify(path)).ok:
        problems.append(f"verify: {verified.problems[0]}")
    return problems


@dataclass(slots=True)
class Result:
    """damages: stores that were damaged and repaired; cuts: distinct states that a power cut left of a repair."""

    damages: int = 0
    cuts: int = 0
    violations: list[str] = field(default_factory=list)


def cut_power(path: Path, place: Path, dice: random.Random, limit: int, until: float = float("inf")) -> tuple[int, list[str]]:
    """Repairs a damaged store, and again from up to `limit` distinct states that a power cut could leave of that: how many,
    and what is wrong with them."""
    with Recorder(path) as recorder:
        logkv.repair(path)
    expected, aside = content(path), [data for name, data in tree(path).items() if name.endswith((".damaged", ".older"))]
    seen: set[int] = set()
    problems = []
    for _ in range(20):
        disk = Disk()
        for at, event in enumerate(recorder.events):
            disk.apply(event)
            if at < recorder.start:
                continue
            state = disk.draw(dice)
            if state.key in seen:
                continue
            if len(seen) >= limit or time.monotonic() > until:
                return len(seen), problems
            seen.add(state.key)
            place.mkdir()
            try:
                state.write(str(place))
                logkv.repair(place)
                found = content(place)
                kept = list(tree(place).values())
                if found != expected or not logkv.verify(place).ok:
                    problems.append(f"event {at}, [{state.how}]: {len(found)} keys, expected {len(expected)}")
                if not all(data in kept for data in aside):
                    problems.append(f"event {at}, [{state.how}]: something that was set aside is gone")
            except logkv.Error as problem:
                problems.append(f"event {at}, [{state.how}]: {problem!r}")
            finally:
                shutil.rmtree(place)
    return len(seen), problems


def run(seconds: float, cases: int = 1 << 62, seed: int = 1) -> Result:
    """So many cases of damage, or what can be had in so many seconds; of each tenth, power cuts during its repair."""
    until = time.monotonic() + seconds
    result = Result()
    with tempfile.TemporaryDirectory(dir=scratch()) as directory:
        root = Path(directory)
        samples = [Sample(root / "plain"), Sample(root / "merged", merges=2), Sample(root / "small", steps=60)]
        while result.damages < cases and time.monotonic() < until:
            dice = random.Random(f"{seed} {result.damages}")
            sample = dice.choice(samples)
            path = sample.copy(root / "copy", **damage(sample, dice))
            label = f"seed {seed}, case {result.damages}"
            try:
                if result.damages % 10 == 9:
                    count, problems = cut_power(path, root / "left", dice, 50, until)
                    result.cuts += count
                else:
                    before = tree(path)
                    problems = judge(path, sample, logkv.repair(path), before)
            except logkv.CorruptionError as problem:    # one segment, and neither its header nor the MANIFEST is whole
                problems = [] if sample is samples[2] and "nothing can be read" in str(problem) else [repr(problem)]
            except logkv.Error as problem:
                problems = [repr(problem)]
            result.violations += [f"{label}: {problem}" for problem in problems]
            result.damages += 1
            shutil.rmtree(path)
    return result


def main() -> int:
    parser = arguments("damage, repair, and power cuts during repairs")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cases", type=int, default=1 << 62)
    wanted = parser.parse_args()
    result = run(wanted.seconds, wanted.cases, wanted.seed)
    print(f"{result.damages:,} damaged stores repaired, {result.cuts:,} power cuts during repairs, "
          f"{len(result.violations):,} violations")
    return verdict(result.violations)


if __name__ == "__main__":
    sys.exit(main())
