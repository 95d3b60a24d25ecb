"""Damages small synced stores, bit by bit: every read of them is right or raises, none is silently wrong.

Two stores: one that was closed, and one that was synced and then killed while a full segment waited to be sealed. Each
bit of each of their files is flipped, once: first those of headers, records and footers and of the MANIFEST, then what
is not zero in the index and the control page, then their zeros, last the zeros behind the log's end. (Index and
control page of the killed store stay as they are: nothing vouches for them but that the system still runs.) With each
flip the store is opened for reading and for writing, each in one of four ways: as it is, in another boot, without the
index, without index and control page; all keys are read. (With a zero of index, control page, or behind the log's end,
one of the two in turn.) Where a reader saw the damage `verify` must see it too, and an exception names the file, and
the offset in a segment. What a writer has closed, or was killed over, is read once more for every fourth flip, so that
damage does not become truth on the way.

Between the flips: files cut short, ranges overwritten with garbage, sectors of zeros, at random.

One thing can be lost in silence, because nothing is left to tell it from a write that never happened: the newest
records of an unsealed segment, if nothing tells where the log ends (no control page of a closed store, and no index to
believe) and the damage took every sync mark behind it too. Then what is left must be exactly what came before the
damage.

    python -m tests.proof.flips --flips 5000 [--seconds S] [--seed N] [--share 0/2] [--keep DIR]
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
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import logkv
from logkv import files
from tests.proof.common import NOISE, SharedNumbers, arguments, ended, fork_heard, verdict
from tests.proof.disk import BOOT, FOREIGN_BOOT, SECTOR
from tests.proof.session import Session, determined, engine_of, merge, rotate

PATIENCE = 20               # seconds that one damage may take
OTHERS = 32                 # flips after which something else is damaged
REPORT = 200                # damages after which a child says what it found
GONE = {"as it is": (), "another boot": (), "without index": (files.INDEX,),
        "without index and control": (files.INDEX, files.CONTROL)}
WAYS = tuple(GONE)
GROUPS = ("log and MANIFEST", "index and control", "their zeros", "zeros behind the log")
Handle = logkv.Store[bytes] | logkv.Reader[bytes]
RECORD = struct.Struct("<IIQHBB")
PUT, DELETE, SYNC_MARK, FOOTER = 1, 2, 5, 8
PRIME = 1_000_003           # the flips of a group come in steps of so many bits


@dataclass(frozen=True, slots=True)
class Original:
    """A store before it is damaged: its files, and what it held after each put and delete."""

    closed: bool
    files: dict[str, bytes]
    states: list[dict[bytes, bytes]]
    keys: list[bytes]
    unsealed: list[str]         # segments

    def bits(self, group: str) -> Iterator[tuple[str, range | list[int]]]:
        """The files with those of their bytes that belong to a group."""
        for name, data in sorted(self.files.items()):
            if name in (files.INDEX, files.CONTROL):
                if self.closed and group in GROUPS[1:3]:
                    yield name, [at for at, byte in enumerate(data) if bool(byte) == (group == GROUPS[1])]
            elif group in (GROUPS[0], GROUPS[3]):
                end = min(len(data), -(-len(data.rstrip(b"\0")) // 8) * 8)
                yield name, range(end) if group == GROUPS[0] else range(end, len(data))


@dataclass(frozen=True, slots=True)
class Damage:
    name: str               # of the file
    kind: str
    start: int              # bytes from there on differ
    stop: int
    bit: int                # that is flipped at `start`, or the seed of the garbage
    read: str | None        # the way in which it is opened for reading, if it is
    write: str | None       # and then for writing
    kill: bool              # the writer, else it closes the store
    again: bool             # what the writer leaves is read

    def bytes_for(self, data: bytes) -> bytes:
        """What stands in the damaged range."""
        if self.kind == "bit":
            return bytes((data[self.start] ^ 1 << self.bit,))
        if self.kind == "zeros":
            return bytes(self.stop - self.start)
        return random.Random(self.bit).randbytes(self.stop - self.start)


def build(path: str, closed: bool, seed: int = 3) -> Original:
    """Overwrites, deletes, syncs on the way.  In the closed store a merged segment with a long value, a sealed one, and
    one that is not; in the other a sealed one and two that are not."""
    dice = random.Random(seed)
    keys = [b"", *(b"key %d" % i for i in range(20))]
    states: list[dict[bytes, bytes]] = [{}]

    def change(steps: int) -> None:
        for step in range(steps):
            state = dict(states[-1])
            if step % 4 < 3:
                size = dice.choice((0, 10, 30, 60))
                at = dice.randrange(len(NOISE) - size)
                key = dice.choice(keys)
                state[key] = store[key] = NOISE[at:at + size]
            else:
                key = dice.choice(sorted(state))
                del state[key], store[key]
            states.append(state)

    session = Session(Path(path), "os", dice)
    session.open("n")
    store = session.store
    if closed:
        change(20)
        rotate(store)
        change(10)
        states.append({**states[-1], b"long": NOISE[:4100]})
        store[b"long"] = NOISE[:4100]
        rotate(store)
        merge(store, 0, 1)
    change(20)
    store.sync()
    rotate(store)
    for turn in range(1 if closed else 2):
        if turn:
            engine_of(store)._rotate(0)
        change(12)
        store.sync()
        change(6)
    store.sync()
    unsealed = [segment.name for segment in engine_of(store).manifest.segments if not segment.sealed]
    if closed:
        session.close()
    else:
        session.kill()
    return Original(closed, {file.name: file.read_bytes() for file in Path(path).iterdir()}, states,
                    [*keys, b"long", *(b"never put %d" % i for i in range(5))], unsealed)


class Targets:
    """All bits of all stores, in their order; the same numbers stand for the same bits in every process."""

    def __init__(self, originals: list[Original]) -> None:
        self.groups = [[(at, name, places) for at, original in enumerate(originals)
                        for name, places in original.bits(group)] for group in GROUPS]
        self.sizes = [8 * sum(len(places) for _, _, places in group) for group in self.groups]

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, number: int) -> tuple[int, str, int, int]:
        """(store, file, byte, bit)"""
        group = self.group_of(number)
        number -= sum(self.sizes[:group])
        byte, bit = divmod(number * PRIME % self.sizes[group], 8)
        for store, name, places in self.groups[group]:
            if byte < len(places):
                return store, name, places[byte], bit
            byte -= len(places)
        raise IndexError(number)

    def group_of(self, number: int) -> int:
        for group, size in enumerate(self.sizes):
            if number < size:
                return group
            number -= size
        raise IndexError(number)


def draw(original: Original, rng: random.Random) -> Damage:
    """What is no single bit: each file as likely as any other, so are its bytes, but for those that are zero."""
    names = [name for name in original.files if original.closed or name not in (files.INDEX, files.CONTROL)]
    name = rng.choice(names)
    kind = rng.choice(("cut short", "garbage", "zeros"))
    data = original.files[name]
    start = rng.randrange(len(data.rstrip(b"\0")) if rng.random() < 0.9 else len(data))
    if kind == "zeros":
        start = start // SECTOR * SECTOR
        stop = start + SECTOR * rng.choice((1, 1, 8))
    else:
        stop = len(data) if kind == "cut short" else start + rng.choice((1, 8, 100, 5000))
    return Damage(name, kind, start, min(stop, len(data)), rng.getrandbits(30), rng.choice(WAYS), rng.choice(WAYS),
                  rng.random() < 0.5, True)


# -- what may come of it ----------------------------------------------------------------------------------------


def records(segment: bytes) -> Iterator[tuple[int, int, int]]:
    """(kind, first byte, behind the last that its checksum covers) of each record of an undamaged segment."""
    offset = 64
    while offset + RECORD.size <= len(segment):
        _, value, _, key, kind, flags = RECORD.unpack_from(segment, offset)
        if kind in (0, FOOTER):
            return
        stop = offset + RECORD.size + (4 if flags & 2 else 0) + key + value
        yield kind, offset, stop
        offset = stop + -stop % 8


def states_allowed(original: Original, damage: Damage, way: str) -> list[dict[bytes, bytes]]:
    """The whole content; or what came before the damage, if all that could report it is gone."""
    whole = original.states[-1:]
    told = way != "without index and control" if original.closed else way == "as it is"
    if told or damage.name not in original.unsealed:
        return whole
    lost = 0
    for name in original.unsealed[original.unsealed.index(damage.name):]:
        for kind, start, stop in records(original.files[name]):
            padding = -stop % 8 if damage.kind == "cut short" else 0       # which is part of a file
            if name == damage.name and stop + padding <= damage.start:
                continue
            if kind == SYNC_MARK and (name != damage.name or start >= damage.stop):
                return whole
            lost += kind in (PUT, DELETE)
    return [*whole, original.states[len(original.states) - 1 - lost]]


class Silent(Exception):
    """Something wrong was read and nothing raised."""


def judge(open_store: Callable[[], Handle], close: Callable[[], None] | None, keys: list[bytes],
          allowed: list[dict[bytes, bytes]], name: str) -> tuple[str, str]:
    """("harmless" | "reported" | "cut", why); raises Silent.  name: the damaged file."""
    reports: list[str] = []

    def note(problem: logkv.Error) -> None:
        if isinstance(problem, (logkv.NotFoundError, logkv.LockedError, logkv.ClosedError, logkv.ReadOnlyError)):
            raise Silent(f"{type(problem).__name__} for a damaged store: {problem}")
        if isinstance(problem, logkv.CorruptionError):
            if problem.path is None or os.path.basename(problem.path) != name:
                raise Silent(f"the exception names {problem.path}, not {name}: {problem}")
            if problem.offset is None and problem.expected != "a segment" and name.endswith(".seg"):
                raise Silent(f"the exception names no offset: {problem}")
        reports.append(f"{type(problem).__name__}: {problem}")

    try:
        store = open_store()
    except logkv.Error as problem:
        note(problem)
        return "reported", reports[0]
    try:
        get, has = store.get, store.__contains__
        got = {}
        for key in keys:
            try:
                got[key] = get(key), has(key)
            except logkv.Error as problem:
                note(problem)
        try:
            count = len(store)
        except logkv.Error as problem:
            note(problem)
        pairs: list[tuple[bytes, bytes]] | None = None
        try:
            pairs = list(store.items())
        except logkv.Error as problem:
            note(problem)
    finally:
        try:
            (close or store.close)()
        except logkv.Error as problem:
            note(problem)
    wrong = []
    for state in allowed:
        problems = []
        for key, (value, there) in got.items():
            if value != state.get(key) or there != (key in state):
                problems.append(f"get({key!r}) is {str((value, there))[:60]}, expected {str(state.get(key))[:60]}")
        if count != len(state):
            problems.append(f"len() is {count}, expected {len(state)}")
        if pairs is not None and (len(pairs) != len(state) or dict(pairs) != state):
            problems.append(f"the iteration has {len(pairs)} pairs, and not those of the {len(state)} keys")
        wrong.append(problems)
    if all(wrong):
        raise Silent("; ".join(wrong[0][:3]) + (f"; reported beside: {reports[0]}" if reports else ""))
    if wrong[0]:
        return "cut", wrong[0][0]
    return ("reported", reports[0]) if reports else ("harmless", "")


# -- trying it --------------------------------------------------------------------------------------------------


class Bench:
    """A store that is damaged and mended in its place."""

    def __init__(self, path: str, closed: bool, seed: int) -> None:
        self.path = path
        self.original = build(path, closed, seed)
        self.session = Session(Path(path), "os", random.Random(0))
        self.aside = f"{path}.aside"
        os.mkdir(self.aside)
        self.gone: list[str] = []           # what was moved there
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self._aside_fd = os.open(self.aside, os.O_RDONLY | os.O_DIRECTORY)

    def _control(self, way: str) -> bytes:
        """The control page as it vouches for the files that are there."""
        page = bytearray(self.original.files[files.CONTROL])
        control, index, manifest = (os.stat(name, dir_fd=self._fd)
                                    for name in (files.CONTROL, files.INDEX, files.MANIFEST))
        struct.pack_into("<3Q", page, 48, control.st_dev, control.st_ino, index.st_ino)
        for at in 72, 104:
            struct.pack_into("<2Q", page, at + 8, manifest.st_ino, manifest.st_ctime_ns)
        if way == "another boot":
            page[BOOT] = FOREIGN_BOOT
        return bytes(page)

    def enter(self, damage: Damage, way: str) -> None:
        """Lets the damaged store be found in this way."""
        self._bring_back()
        page = self._control(way)
        self._write(files.CONTROL, page, 0)
        if damage.name == files.CONTROL:
            self._hurt(damage, page)
        for name in GONE[way]:
            os.rename(name, name, src_dir_fd=self._fd, dst_dir_fd=self._aside_fd)
            self.gone.append(name)

    def _hurt(self, damage: Damage, data: bytes) -> None:
        if damage.kind == "cut short":
            self._write(damage.name, b"", damage.start, damage.start)
        else:
            self._write(damage.name, damage.bytes_for(data), damage.start)

    def _write(self, name: str, data: bytes, at: int, length: int | None = None) -> None:
        """Into a file, which becomes so long."""
        fd = os.open(name, os.O_WRONLY | os.O_CREAT, dir_fd=self._fd)
        os.pwrite(fd, data, at)
        if length is not None:
            os.ftruncate(fd, length)
        os.close(fd)

    def unread(self, damage: Damage) -> None:
        """Undoes the damage after readers, who have changed nothing."""
        self._bring_back()
        self._write(damage.name, self.original.files[damage.name][damage.start:damage.stop], damage.start)

    def _bring_back(self) -> None:
        while self.gone:
            name = self.gone.pop()
            os.replace(name, name, src_dir_fd=self._aside_fd, dst_dir_fd=self._fd)

    def mend(self) -> None:
        """Makes every file what it was, after a writer."""
        self._bring_back()
        for name in os.listdir(self.path):
            if name not in self.original.files:
                (shutil.rmtree if name == files.LOST_FOUND else os.unlink)(f"{self.path}/{name}")
        for name, data in self.original.files.items():
            if self._read(name, len(data) + 1) != data:
                self._write(name, data, 0, len(data))

    def _read(self, name: str, most: int) -> bytes | None:
        try:
            fd = os.open(name, os.O_RDONLY, dir_fd=self._fd)
        except FileNotFoundError:
            return None
        data = os.pread(fd, most, 0)
        os.close(fd)
        return data

    def attempt(self, damage: Damage, keep: str | None = None) -> tuple[str, str]:
        """What came of it: "harmless", "reported", "cut" or "silent", and why."""
        outcomes = []
        self._hurt(damage, self.original.files[damage.name])    # before a control page vouches for the MANIFEST
        try:
            for way, tried in (damage.read, self._read_all), (damage.write, self._write_to):
                if way is None:
                    continue
                if tried == self._read_all or way != damage.read:
                    self.enter(damage, way)
                    if keep is not None:
                        shutil.copytree(self.path, f"{keep}-{way.replace(' ', '-')}")
                outcomes.append(tried(damage, states_allowed(self.original, damage, way)))
        except Silent as problem:
            return "silent", str(problem)
        except Exception as problem:
            return "silent", f"{type(problem).__name__}, which is no logkv.Error: {problem}"
        finally:
            if damage.write is None:
                self.unread(damage)
            else:
                self.mend()
        return max(outcomes, key=lambda outcome: ("harmless", "reported", "cut").index(outcome[0]))

    def _judge_reader(self, damage: Damage, allowed: list[dict[bytes, bytes]]) -> tuple[str, str]:
        return judge(lambda: logkv.open(self.path, "r"), None, self.original.keys, allowed, damage.name)

    def _read_all(self, damage: Damage, allowed: list[dict[bytes, bytes]]) -> tuple[str, str]:
        outcome = self._judge_reader(damage, allowed)
        if outcome[0] == "reported":
            with suppress(logkv.FormatError):
                if logkv.verify(self.path).ok:
                    raise Silent(f"verify does not see what a reader sees: {outcome[1]}")
        return outcome

    def _write_to(self, damage: Damage, allowed: list[dict[bytes, bytes]]) -> tuple[str, str]:
        session = self.session

        def open_store() -> logkv.Store[bytes]:
            session.open("w")
            return session.store

        try:
            outcome = judge(open_store, session.kill if damage.kill else session.close, self.original.keys, allowed,
                            damage.name)
            if damage.again:
                again = self._judge_reader(damage, allowed if outcome[0] == "cut" else allowed[:1])
                return again if outcome[0] == "harmless" else outcome
            return outcome
        finally:
            session.abandon()


@dataclass
class Result:
    """What was tried, and what came of it."""

    flips: int = 0                                          # distinct bits
    others: int = 0
    bits: list[int] = field(default_factory=list)           # that there are, in each group
    flipped: Counter[str] = field(default_factory=Counter)  # by group
    outcomes: Counter[str] = field(default_factory=Counter)  # by file, kind and outcome, "/" between
    violations: list[str] = field(default_factory=list)

    def add(self, other: Result) -> None:
        """Of another share of the same stores."""
        self.flips += other.flips
        self.others += other.others
        self.bits = self.bits or other.bits
        self.flipped += other.flipped
        self.outcomes += other.outcomes
        self.violations += other.violations

    @property
    def complete(self) -> str:
        """How much of all is done."""
        return ", ".join(f"{self.flipped[group]:,} of {size:,} bits of {group}"
                         for group, size in zip(GROUPS, self.bits, strict=True))


class Attempts:
    """A child's share of the damages."""

    def __init__(self, directory: str, seed: int, keep: str | None) -> None:
        self.seed, self.keep = seed, keep
        self.benches = [Bench(os.path.join(directory, name), name == "closed", seed) for name in ("closed", "killed")]
        self.targets = Targets([bench.original for bench in self.benches])
        self.result = Result(bits=self.targets.sizes)

    def damage(self, number: int) -> tuple[Bench, Damage]:
        """The flip with this number."""
        store, name, start, bit = self.targets[number]
        dice = hash((number, self.seed)) % 1024
        read, write, kill, again, either = dice % 4, dice // 4 % 4, dice // 16 % 2, dice // 32 % 4, dice // 128 % 2
        ways = [way for way in WAYS if name not in GONE[way]]
        zero = self.targets.group_of(number) > 1
        return self.benches[store], Damage(name, "bit", start, start + 1, bit,
                                           None if zero and either else ways[read % len(ways)],
                                           None if zero and not either else ways[write % len(ways)],
                                           kill == 1, again == 1)

    def other(self, number: int) -> tuple[Bench, Damage]:
        """What comes with the flip of this number."""
        dice = random.Random(f"{self.seed} {number}")
        bench = dice.choice(self.benches)
        return bench, draw(bench.original, dice)

    def try_out(self, bench: Bench, damage: Damage, label: str) -> None:
        signal.alarm(PATIENCE)
        outcome, why = bench.attempt(damage)
        if outcome == "silent":
            self.result.violations.append(f"{damage}: {why}")
            bench.mend()
            if self.keep is not None:
                bench.attempt(damage, os.path.join(self.keep, label))
        file = damage.name if not damage.name.endswith(".seg") else "segment"
        self.result.outcomes[f"{file}/{damage.kind}/{outcome}"] += 1

    def flip(self, number: int) -> None:
        self.try_out(*self.damage(number), f"flip-{number}")
        self.result.flips += 1
        self.result.flipped[GROUPS[self.targets.group_of(number)]] += 1
        if number % OTHERS == 0:
            self.try_out(*self.other(number), f"other-{number}")
            self.result.others += 1


def work(directory: str, seed: int, numbers: range, until: float, now: SharedNumbers, say: int,
         keep: str | None) -> None:
    """Tries the flips with these numbers; says now and then what came of them, and always which is under way."""
    with determined(random.Random(seed)):
        attempts = Attempts(directory, seed, keep)
        descriptors = len(os.listdir("/proc/self/fd"))
        for number in numbers:
            late = time.monotonic() > until or number >= len(attempts.targets)
            if late or attempts.result.flips >= REPORT:
                left = len(os.listdir("/proc/self/fd")) - descriptors
                if left:
                    attempts.result.violations.append(f"{left} descriptors were left open before flip {number}")
                    descriptors += left
                os.write(say, json.dumps(vars(attempts.result)).encode() + b"\n")
                attempts.result = Result(bits=attempts.targets.sizes)
            if late:
                return
            now[0] = number
            attempts.flip(number)
        os.write(say, json.dumps(vars(attempts.result)).encode() + b"\n")


def run(directory: str, flips: int, seconds: float = float("inf"), seed: int = 1, share: tuple[int, int] = (0, 1),
        keep: str | None = None) -> Result:
    """So many flips, or what can be had in so many seconds.  A child tries them, so that it may crash.

    share: (i, n) tries every n-th bit from the i-th on.  Another seed has other stores, and other ways of opening.
    """
    until = time.monotonic() + seconds
    whole, now = Result(), SharedNumbers()
    number, step = share
    last = number + flips * step
    while number < last and time.monotonic() < until and len(whole.violations) < 500:
        place = tempfile.mkdtemp(dir=directory)
        now[0] = number
        numbers = range(number, last, step)
        pid, heard = fork_heard(lambda say: work(place, seed, numbers, until, now, say, keep))
        with open(heard, "rb") as lines:
            for line in lines:
                said = json.loads(line)
                whole.add(Result(said["flips"], said["others"], said["bits"], Counter(said["flipped"]),
                                 Counter(said["outcomes"]), said["violations"]))
        status = ended(pid)
        shutil.rmtree(place)
        if not status:
            break
        how = "it hung" if status == -signal.SIGALRM else f"the process ended with {status}"
        whole.violations.append(f"flip {now[0]} of seed {seed}, or what came with it: {how}")
        number = now[0] + step
    return whole


def table(result: Result) -> Iterator[str]:
    outcomes = ("harmless", "reported", "cut", "silent")
    yield "| file | damage | tried | " + " | ".join(outcomes) + " |"
    yield "|---|---|---:|" + "---:|" * len(outcomes)
    counts = {tuple(name.split("/")): count for name, count in result.outcomes.items()}
    for file, kind in sorted({(file, kind) for file, kind, _ in counts}):
        row = [counts.get((file, kind, outcome), 0) for outcome in outcomes]
        yield f"| {file} | {kind} | {sum(row):,} | " + " | ".join(f"{n:,}" for n in row) + " |"
    yield f"{result.flips:,} distinct bits: {result.complete}; {result.others:,} other damages"


def main() -> int:
    parser = arguments("damage, and whether it is noticed")
    parser.add_argument("--flips", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--share", default="0/1", help="i/n: every n-th bit, from the i-th on")
    parser.add_argument("--keep", help="where stores go whose damage was not noticed")
    wanted = parser.parse_args()
    first, _, step = wanted.share.partition("/")
    with tempfile.TemporaryDirectory(dir=wanted.dir) as directory:
        result = run(directory, wanted.flips, wanted.seconds, wanted.seed, (int(first), int(step)), wanted.keep)
    print("\n".join(table(result)))
    return verdict(result.violations)


if __name__ == "__main__":
    sys.exit(main())
