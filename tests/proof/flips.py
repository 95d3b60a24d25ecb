"""Damages a small, synced, closed store, bit by bit: every read of it is right or raises, none is silently wrong.

Beside single bits: files cut short, and ranges overwritten with garbage.  One thing can be lost in silence, because
nothing is left to tell it from a write that never happened: the newest records of the last segment, if index and
control page are gone and the damage took every sync mark behind it too.  Then what is left must be exactly what came
before the damage.

    python -m tests.proof.flips --flips 5000 [--seconds S] [--seed N] [--keep DIR]
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import logkv
from tests.proof.common import NOISE, SEGMENT, arguments, ended, fork_heard, verdict

PATIENCE = 20               # seconds that one damage may take
DAMAGES = ("bit", "bit", "bit", "bit", "bit", "bit", "cut short", "garbage")
WAYS = ("as it is", "as it is", "in place", "without index", "without index and control")
RECORD = struct.Struct("<IIQHBB")
PUT, DELETE, SYNC_MARK, FOOTER = 1, 2, 5, 8


@dataclass(frozen=True, slots=True)
class Original:
    """The store before it is damaged: its files, and what it held after each put and delete."""

    files: dict[str, bytes]
    states: list[dict[bytes, bytes]]
    keys: list[bytes]

    @property
    def active(self) -> str:
        return max(name for name in self.files if name.endswith(".seg"))


@dataclass(frozen=True, slots=True)
class Damage:
    name: str               # of the file
    kind: str
    start: int              # bytes from there on differ
    stop: int
    bit: int                # that is flipped at `start`, or the seed of the garbage
    way: str
    flag: str

    def apply(self, data: bytes) -> bytes:
        if self.kind == "cut short":
            return data[:self.start]
        if self.kind == "bit":
            return data[:self.start] + bytes((data[self.start] ^ 1 << self.bit,)) + data[self.stop:]
        return data[:self.start] + random.Random(self.bit).randbytes(self.stop - self.start) + data[self.stop:]


def build(path: str) -> Original:
    """Sealed segments with their footers, one that is not; overwrites, deletes, long values, syncs on the way."""
    rng = random.Random(3)
    keys = [b"", *(b"key %d" % i for i in range(150))]
    states: list[dict[bytes, bytes]] = [{}]
    store = logkv.open(path, "n", segment_size=SEGMENT)
    for step in range(900):
        key = rng.choice(keys)
        state = dict(states[-1])
        if rng.random() < 0.85:
            size = rng.choice((0, 10, 100, 300, 300, 300, 5000 if step % 4 == 0 else 50))
            at = rng.randrange(len(NOISE) - size)
            state[key] = store[key] = NOISE[at:at + size]
        elif key in state:
            del state[key], store[key]
        else:
            continue
        states.append(state)
        if step % 90 == 0:
            store.sync()
    store.close()
    return Original({file.name: file.read_bytes() for file in Path(path).iterdir()}, states,
                    [*keys, *(b"never put %d" % i for i in range(20))])


def draw(original: Original, rng: random.Random) -> Damage:
    """A damage at random: each file as likely as any other, so are its bytes, but for those that are zero."""
    name = rng.choice(list(original.files))
    kind = rng.choice(DAMAGES)
    data = original.files[name]
    size, start = len(data), rng.randrange(len(data))
    for _ in range(50 if rng.random() < 0.7 else 0):
        if data[start]:
            break
        start = rng.randrange(size)
    stop = {"bit": start + 1, "cut short": size, "garbage": min(size, start + rng.choice((1, 8, 100, 5000)))}[kind]
    return Damage(name, kind, start, stop, rng.randrange(8), rng.choice(WAYS), rng.choice("rw"))


# -- what may come of it ----------------------------------------------------------------------------------------


def records(segment: bytes) -> Iterator[tuple[int, int, int]]:
    """(kind, first byte, behind the last) of each record of an undamaged segment."""
    offset = 64
    while offset + RECORD.size <= len(segment):
        _, value, _, key, kind, flags = RECORD.unpack_from(segment, offset)
        if kind in (0, FOOTER):
            return
        stop = offset + (RECORD.size + (4 if flags & 2 else 0) + key + value + 7) // 8 * 8
        yield kind, offset, stop
        offset = stop


def states_allowed(original: Original, damage: Damage) -> list[dict[bytes, bytes]]:
    """The whole content; or what came before the damage, if all that could report it is gone."""
    whole = original.states[-1:]
    if damage.way != "without index and control" or damage.name != original.active:
        return whole
    before = 0
    for name in sorted(name for name in original.files if name.endswith(".seg")):
        for kind, start, stop in records(original.files[name]):
            if name == original.active and stop > damage.start:
                if kind == SYNC_MARK and start >= damage.stop:
                    return whole
            else:
                before += kind in (PUT, DELETE)
    return [*whole, original.states[before]]


class Silent(Exception):
    """Something wrong was read and nothing raised."""


def judge(path: str, flag: str, keys: list[bytes], allowed: list[dict[bytes, bytes]]) -> tuple[str, str]:
    """("harmless" | "reported" | "cut", why); raises Silent."""
    reports: list[str] = []
    wrong: list[list[str]] = [[] for _ in allowed]
    unharmed = (logkv.NotFoundError, logkv.LockedError, logkv.ClosedError, logkv.ReadOnlyError)

    def note(problem: logkv.Error) -> None:
        if isinstance(problem, unharmed):
            raise Silent(f"{type(problem).__name__} for a damaged store: {problem}")
        reports.append(f"{type(problem).__name__}: {problem}")

    def compare(what: str, found: object, expected: list[object]) -> None:
        for problems, right in zip(wrong, expected, strict=True):
            if found != right:
                problems.append(f"{what} is {str(found)[:60]}, expected {str(right)[:60]}")

    try:
        store = logkv.open(path, flag, segment_size=SEGMENT)
    except logkv.Error as problem:
        note(problem)
        return "reported", reports[0]
    try:
        for key in keys:
            try:
                compare(f"get({key!r})", store.get(key), [state.get(key) for state in allowed])
                compare(f"{key!r} in store", key in store, [key in state for state in allowed])
            except logkv.Error as problem:
                note(problem)
        try:
            compare("len()", len(store), [len(state) for state in allowed])
        except logkv.Error as problem:
            note(problem)
        seen: set[bytes] = set()
        try:
            for key, value in store.items():
                compare(f"{key!r} in the iteration", value, [state.get(key) for state in allowed])
                compare(f"{key!r} seen again", key in seen, [False] * len(allowed))
                seen.add(key)
            compare("the iteration's number of keys", len(seen), [len(state) for state in allowed])
        except logkv.Error as problem:
            note(problem)
    finally:
        try:
            store.close()
        except logkv.Error as problem:
            note(problem)
    if all(wrong):
        raise Silent("; ".join(wrong[0][:3]) + (f"; reported beside: {reports[0]}" if reports else ""))
    if wrong[0]:
        return "cut", wrong[0][0]
    return ("reported", reports[0]) if reports else ("harmless", "")


# -- trying it --------------------------------------------------------------------------------------------------


class Bench:
    """Where the damaged stores are put: one that stays at its inodes and is mended after each reader, and copies."""

    def __init__(self, directory: str) -> None:
        self.place, self.copy = os.path.join(directory, "place"), os.path.join(directory, "copy")
        self.original = build(self.place)

    def put(self, damage: Damage) -> str:
        """The damaged store's path."""
        if damage.way == "in place":
            Path(self.place, damage.name).write_bytes(damage.apply(self.original.files[damage.name]))
            return self.place
        shutil.rmtree(self.copy, ignore_errors=True)
        os.mkdir(self.copy)
        gone = {"without index": ["index"], "without index and control": ["index", "control"]}.get(damage.way, [])
        for name, data in self.original.files.items():
            if name not in gone:
                Path(self.copy, name).write_bytes(damage.apply(data) if name == damage.name else data)
        return self.copy

    def mend(self, damage: Damage) -> None:
        """Undoes the damage; a writer has changed too much, so the store is made anew."""
        if damage.way == "in place" and damage.flag == "r":
            Path(self.place, damage.name).write_bytes(self.original.files[damage.name])
        elif damage.way == "in place":
            self.rebuild()

    def rebuild(self) -> None:
        shutil.rmtree(self.place)
        self.original = build(self.place)

    def attempt(self, damage: Damage, keep: str | None = None) -> tuple[str, str]:
        """What came of it: "harmless", "reported", "cut" or "silent", and why.

        What a writer opened and closed is judged once more, so that damage does not become truth on the way.
        """
        original, path = self.original, self.put(damage)
        if keep is not None:
            shutil.copytree(path, keep, dirs_exist_ok=True)
        allowed = states_allowed(original, damage)
        try:
            outcome = judge(path, damage.flag, original.keys, allowed)
            if damage.flag == "w":
                again = judge(path, "r", original.keys, allowed if outcome[0] == "cut" else original.states[-1:])
                if outcome[0] == "harmless":
                    outcome = again
        except Silent as problem:
            return "silent", str(problem)
        except Exception as problem:
            return "silent", f"{type(problem).__name__}, which is no logkv.Error: {problem}"
        finally:
            self.mend(damage)
        return outcome


@dataclass(frozen=True, slots=True)
class Result:
    damage: Damage
    outcome: str
    why: str

    @property
    def file(self) -> str:
        return self.damage.name if not self.damage.name.endswith(".seg") else "segment"


def work(directory: str, seed: int, first: int, count: int, until: float, say: int, keep: str | None) -> None:
    """Tries damages and says of each what it is before it begins, and what came of it after."""
    bench = Bench(directory)
    descriptors = len(os.listdir("/proc/self/fd"))
    for number in range(first, count):
        if time.monotonic() > until:
            break
        damage = draw(bench.original, random.Random(f"{seed} {number}"))
        signal.alarm(PATIENCE)
        os.write(say, json.dumps({"number": number, **asdict(damage)}).encode() + b"\n")
        outcome, why = bench.attempt(damage)
        if outcome == "silent" and keep is not None and damage.way != "in place":
            bench.attempt(damage, os.path.join(keep, str(number)))
        if len(os.listdir("/proc/self/fd")) != descriptors:
            outcome, why = "silent", f"{len(os.listdir('/proc/self/fd')) - descriptors} descriptors were left open"
            descriptors = len(os.listdir("/proc/self/fd"))
        os.write(say, json.dumps({"outcome": outcome, "why": why}).encode() + b"\n")


def run(directory: str, flips: int, seconds: float = float("inf"), seed: int = 1,
        keep: str | None = None) -> list[Result]:
    """So many damages, or what can be had in so many seconds.  A child tries them, so that it may crash."""
    until = time.monotonic() + seconds
    results: list[Result] = []
    number = 0
    while number < flips and time.monotonic() < until and sum(r.outcome == "silent" for r in results) < 500:
        place = tempfile.mkdtemp(dir=directory)
        pid, heard = fork_heard(lambda say: work(place, seed, number, flips, until, say, keep))
        damage = None
        with open(heard, "rb") as lines:
            for line in lines:
                said = json.loads(line)
                if "number" in said:
                    number = said.pop("number") + 1
                    damage = Damage(**said)
                elif damage is not None:
                    results.append(Result(damage, said["outcome"], said["why"]))
                    damage = None
        status = ended(pid)
        if damage is not None:
            how = "it hung" if status == -signal.SIGALRM else f"the process ended with {status}"
            results.append(Result(damage, "silent", how))
        elif status:
            raise RuntimeError(f"the child ended with {status} between two damages")
        shutil.rmtree(place)
        if not status:
            break
    return results


def table(results: list[Result]) -> Iterator[str]:
    outcomes = ("harmless", "reported", "cut", "silent")
    yield "| file | damage | tried | " + " | ".join(outcomes) + " |"
    yield "|---|---|---:|" + "---:|" * len(outcomes)
    counts = Counter((r.file, r.damage.kind, r.outcome) for r in results)
    rows = sorted({(file, kind) for file, kind, _ in counts})
    for file, kind in rows:
        row = [counts[file, kind, outcome] for outcome in outcomes]
        yield f"| {file} | {kind} | {sum(row):,} | " + " | ".join(f"{n:,}" for n in row) + " |"
    total = Counter(r.outcome for r in results)
    yield f"| all | | {len(results):,} | " + " | ".join(f"{total[outcome]:,}" for outcome in outcomes) + " |"


def violations(results: list[Result]) -> list[str]:
    return [f"{result.damage}: {result.why}" for result in results if result.outcome == "silent"]


def main() -> int:
    parser = arguments("damage, and whether it is noticed")
    parser.add_argument("--flips", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--keep", help="where stores go whose damage was not noticed")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=wanted.dir) as directory:
        results = run(directory, wanted.flips, wanted.seconds, wanted.seed, wanted.keep)
    print("\n".join(table(results)))
    return verdict(violations(results))


if __name__ == "__main__":
    sys.exit(main())
