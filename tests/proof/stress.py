"""One writer process and four readers on one store, for a while, as fast as they can.

Which keys there are follows from a number: `kept` keys are put one after the other and never deleted, `hot` ones are
overwritten again and again, `brief` ones come and go.  After each write the writer publishes, in memory that all share,
how many kept keys there are and the counter of the hot key; what a reader gets afterwards may not be older.

    python -m tests.proof.stress --seconds 30 [--seed N] [--dir DIR]
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass, field

import logkv
from tests.proof.common import NOISE, Child, SharedNumbers, Violation, arguments, explained, verdict

READERS = 4
SEGMENTS = (64 << 10, 256 << 10, 1 << 20, 4 << 20)      # sizes that the writer takes in turn
STRETCH = 1.0               # seconds with each
HOT, BRIEF = 64, 1000
KEPT_MOST = 600_000         # then they are overwritten from the first one on
READS_A_ROUND = 500


def key_of(kind: str, number: int) -> bytes:
    return f"{kind} {number}".encode()


def seal(key: bytes, counter: int, filler: bytes) -> bytes:
    """A value with its write's number and a checksum of its own."""
    head = b"%d " % counter
    return b"%08x " % zlib.crc32(key + head + filler) + head + filler


def counter_in(key: bytes, value: bytes) -> int:
    """The number of the write; raises Violation if the value is not one that was put for this key."""
    checksum, _, rest = value.partition(b" ")
    if len(checksum) != 8 or checksum != b"%08x" % zlib.crc32(key + rest):
        raise Violation(f"{key!r} has a value that fails its own checksum: {value[:60]!r}")
    return int(rest.partition(b" ")[0])


class Board(SharedNumbers):
    """What the writer says to the readers: kept keys, then each hot key's last write."""

    STOP, KEPT, FIRST_HOT = 0, 1, 2


@dataclass
class Figures:
    writes: int = 0
    reads: int = 0
    passes: int = 0             # over the whole store
    keys: int = 0
    rotations: int = 0
    index_first: int = 0        # bytes
    index_last: int = 0
    shards: int = 0
    violations: list[str] = field(default_factory=list)


def write(path: str, board: Board, seconds: float, seed: int) -> Figures:
    """The writer, in stretches with segments of different sizes."""
    rng, figures = random.Random(seed), Figures()
    until = time.monotonic() + seconds
    counter = kept = stretch = 0
    while time.monotonic() < until:
        with logkv.open(path, "c", segment_size=SEGMENTS[stretch % len(SEGMENTS)]) as store:
            figures.index_first = figures.index_first or store.stats()["index_bytes"]
            end = min(until, time.monotonic() + STRETCH)
            while time.monotonic() < end:
                for _ in range(200):
                    counter += 1
                    dice = rng.random()
                    at = rng.randrange(len(NOISE) - 6000)
                    filler = NOISE[at:at + (6000 if dice * 1000 % 1 < 0.001 else int(dice * 997) % 120)]
                    if dice < 0.55:
                        key = key_of("kept", kept % KEPT_MOST)
                        store[key] = seal(key, counter, filler)
                        kept += 1
                        board[Board.KEPT] = min(kept, KEPT_MOST)
                    elif dice < 0.85:
                        hot = rng.randrange(HOT)
                        key = key_of("hot", hot)
                        store[key] = seal(key, counter, filler)
                        board[Board.FIRST_HOT + hot] = counter
                    else:
                        key = key_of("brief", rng.randrange(BRIEF))
                        if dice < 0.93:
                            store[key] = seal(key, counter, filler)
                        else:
                            store.delete(key)
            facts = store.stats()
            figures.index_last, figures.shards = facts["index_bytes"], facts["index"]["shards"]
            figures.rotations, figures.keys = facts["active"] - 1, facts["keys"]
        stretch += 1
    figures.writes = counter
    return figures


class Reading:
    """One reader's checks and what it saw last of each key."""

    def __init__(self, path: str, board: Board, seed: int) -> None:
        self.path, self.board, self.rng = path, board, random.Random(seed)
        self.newest: dict[bytes, int] = {}
        self.figures = Figures()

    def run(self) -> Figures:
        reader = self._open()
        try:
            while not self.board[Board.STOP]:
                with explained(reader):
                    self._round(reader)
                if self.rng.random() < 0.01:
                    reader.close()
                    reader = self._open()
            with explained(reader):
                self._all(reader)
                self._end(reader)
        except (Violation, logkv.Error) as problem:
            self.figures.violations.append(str(problem))
        finally:
            reader.close()
        return self.figures

    def _open(self) -> logkv.Reader:
        while True:
            kept = self.board[Board.KEPT]
            try:
                return logkv.Reader(self.path)
            except logkv.NotFoundError:
                if kept:
                    raise
                time.sleep(0.001)

    def _round(self, reader: logkv.Reader) -> None:
        for _ in range(READS_A_ROUND):
            self._one(reader)
        self.figures.reads += READS_A_ROUND
        if self.rng.random() < 0.002:
            self._all(reader)

    def _one(self, reader: logkv.Reader) -> None:
        dice = self.rng.random()
        if dice < 0.5:
            if kept := self.board[Board.KEPT]:
                number = kept - 1 if dice < 0.1 else self.rng.randrange(kept)
                self._get(reader, key_of("kept", number), 1)
        elif dice < 0.9:
            hot = self.rng.randrange(HOT)
            self._get(reader, key_of("hot", hot), self.board[Board.FIRST_HOT + hot])
        else:
            self._get(reader, key_of("brief", self.rng.randrange(2 * BRIEF)), 0)

    def _get(self, reader: logkv.Reader, key: bytes, least: int) -> None:
        """A get, of a key that must be there with a write of that number or a later one; 0: it need not be there."""
        value = reader.get(key)
        if value is not None:
            self._check(key, value, least)
        elif least:
            raise Violation(f"{key!r} is missing; write {least} was acknowledged")

    def _check(self, key: bytes, value: bytes, least: int) -> None:
        counter = counter_in(key, value)
        if counter < max(least, self.newest.get(key, 0)):
            raise Violation(f"{key!r} went back to write {counter}; {least} was acknowledged, "
                            f"{self.newest.get(key)} seen before")
        if len(self.newest) < 50_000 or key in self.newest:
            self.newest[key] = counter

    def _all(self, reader: logkv.Reader) -> None:
        """Every kept key that was there before is seen exactly once."""
        kept = self.board[Board.KEPT]
        seen = bytearray(KEPT_MOST)
        for key, value in reader.items():
            self._check(key, value, 0)
            kind, _, number = key.partition(b" ")
            if kind == b"kept":
                if seen[int(number)]:
                    raise Violation(f"{key!r} was seen twice in one iteration")
                seen[int(number)] = 1
        missing = kept - sum(seen[:kept])
        if missing:
            raise Violation(f"{missing} of {kept} keys were not seen in an iteration, the first: {seen.find(0)}")
        self.figures.passes += 1

    def _end(self, reader: logkv.Reader) -> None:
        """The writer has closed: the last acknowledged writes are what is there."""
        for hot in range(HOT):
            key = key_of("hot", hot)
            if (last := self.board[Board.FIRST_HOT + hot]) and counter_in(key, reader[key]) != last:
                raise Violation(f"{key!r} is not at write {last} at the end")
        for number in range(0, self.board[Board.KEPT], 7):
            self._get(reader, key_of("kept", number), 1)


def run(path: str, seconds: float, seed: int = 1) -> Figures:
    """All processes together; the figures of all, violations too."""
    board = Board()

    def write_all() -> dict[str, object]:
        try:
            return vars(write(path, board, seconds, seed))
        finally:
            board[Board.STOP] = 1

    children = [Child("the writer", write_all)]
    children += [Child(f"reader {number}", lambda: vars(Reading(path, board, seed + number).run()))
                 for number in range(1, READERS + 1)]
    total = Figures()
    for child in children:
        try:
            figures = Figures(**child.result())
        except Violation as problem:
            total.violations.append(str(problem))
            continue
        total.violations += [f"{child.name}: {violation}" for violation in figures.violations]
        for counted in ("writes", "reads", "passes", "keys", "rotations", "index_first", "index_last", "shards"):
            setattr(total, counted, getattr(total, counted) + getattr(figures, counted))
    return total


def main() -> int:
    parser = arguments("one writer, four readers")
    parser.add_argument("--seconds", type=float, default=30)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=wanted.dir) as directory:
        figures = run(os.path.join(directory, "stress.db"), wanted.seconds, wanted.seed)
    print("| seconds | writes | reads | whole passes | keys | rotations | index grew | shards | violations |")
    print("|---:|---:|---:|---:|---:|---:|---|---:|---:|")
    print(f"| {wanted.seconds:g} | {figures.writes:,} | {figures.reads:,} | {figures.passes:,} | {figures.keys:,} "
          f"| {figures.rotations:,} | {figures.index_first >> 10:,} to {figures.index_last >> 10:,} KiB "
          f"| {figures.shards} | {len(figures.violations)} |")
    return verdict(figures.violations)


if __name__ == "__main__":
    sys.exit(main())
