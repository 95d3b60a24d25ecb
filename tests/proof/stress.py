"""One writer process and four readers on one store, for a while, as fast as they can; all are killed at random moments.

Which keys there are follows from a number: `kept` keys are put one after the other and never deleted, `hot` ones are
overwritten again and again, `brief` ones come and go.  After each write the writer publishes, in memory that all share,
how many kept keys there are and the counter of the hot key; what a reader gets afterwards may not be older, and what the
next writer finds may not either.

    python -m tests.proof.stress --seconds 30 [--threads N] [--seed N] [--dir DIR]

With `--threads` the readers are threads that share one Reader, and nobody is killed: what a sanitizer can watch.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import logkv
from tests.proof.common import NOISE, Child, SharedNumbers, Violation, arguments, ended, explained, verdict

READERS = 4
SEGMENTS = (64 << 10, 256 << 10, 1 << 20, 4 << 20)      # sizes that the writer takes in turn
STRETCH = 1.0               # seconds with each
HOT, BRIEF = 64, 1000
KEPT_MOST = 600_000         # then they are overwritten from the first one on
READS_A_ROUND = 500
PAUSE = 0.05, 0.8           # seconds, between which a victim is chosen: one time in three it is the writer


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
    """What the writers say to the readers and to the next writer, and what is counted over all who were killed."""

    STOP, BEGUN, KEPT_WRITES, INDEX_FIRST = 0, 1, 2, 3      # writes begun; of them, of kept keys; bytes
    KEPT = 4                                                # how many there are
    FIRST_READS, FIRST_PASSES = 8, 8 + READERS              # of each reader
    FIRST_HOT = 64                                          # each hot key's last write


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
    writers_killed: int = 0
    readers_killed: int = 0
    violations: list[str] = field(default_factory=list)


def write(path: str, board: Board, until: float, seed: int) -> list[str]:
    """A writer, in stretches with segments of different sizes, until that time (or a kill); returns what was wrong."""
    rng = random.Random(seed)
    counter, kept = board[Board.BEGUN], board[Board.KEPT_WRITES]
    stretch, first = rng.randrange(len(SEGMENTS)), True
    while time.monotonic() < until:
        with logkv.open(path, "c", segment_size=SEGMENTS[stretch % len(SEGMENTS)]) as store:
            board[Board.INDEX_FIRST] = board[Board.INDEX_FIRST] or store.stats()["index_bytes"]
            if first:
                first = False
                try:
                    with explained(store):
                        Reading(path, board, 0, seed).take_over(store)
                except Violation as problem:
                    return [str(problem)]
            end = min(until, time.monotonic() + STRETCH)
            while time.monotonic() < end:
                for _ in range(200):
                    counter += 1
                    board[Board.BEGUN] = counter
                    dice = rng.random()
                    at = rng.randrange(len(NOISE) - 6000)
                    filler = NOISE[at:at + (6000 if dice * 1000 % 1 < 0.001 else int(dice * 997) % 120)]
                    if dice < 0.55:
                        key = key_of("kept", kept % KEPT_MOST)
                        store[key] = seal(key, counter, filler)
                        kept += 1
                        board[Board.KEPT_WRITES] = kept
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
        stretch += 1
    return []


class Reading:
    """One reader's checks and what it saw last of each key."""

    def __init__(self, path: str, board: Board, number: int, seed: int) -> None:
        self.path, self.board, self.number, self.rng = path, board, number, random.Random(seed)
        self.newest: dict[bytes, int] = {}

    def run(self) -> list[str]:
        """Reads until it is told to stop, and checks that all is there in the end; returns what was wrong."""
        try:
            self._read()
        except (Violation, logkv.Error) as problem:
            return [str(problem)]
        return []

    def take_over(self, store: logkv.Store) -> None:
        """What a writer finds when it opens: everything that was acknowledged before."""
        for hot in range(HOT):
            self._get(store, key_of("hot", hot), self.board[Board.FIRST_HOT + hot])
        kept = self.board[Board.KEPT]
        for number in {*range(max(0, kept - 200), kept), *(self.rng.randrange(kept) for _ in range(500 if kept else 0))}:
            self._get(store, key_of("kept", number), 1)

    def _read(self) -> None:
        reader = self._open()
        try:
            while not self.board[Board.STOP]:
                with explained(reader):
                    self._round(reader)
                if self.rng.random() < 0.01:
                    self._close(reader)
                    reader = self._open()
            with explained(reader):
                self._all(reader)
                self._end(reader)
        finally:
            self._close(reader)

    def _close(self, reader: logkv.Reader) -> None:
        reader.close()

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
        self.board[Board.FIRST_READS + self.number] += READS_A_ROUND
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

    def _get(self, reader: logkv.Reader | logkv.Store, key: bytes, least: int) -> None:
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
        self.board[Board.FIRST_PASSES + self.number] += 1

    def _end(self, reader: logkv.Reader) -> None:
        """The writer has closed: the last acknowledged writes are what is there."""
        for hot in range(HOT):
            key = key_of("hot", hot)
            if (last := self.board[Board.FIRST_HOT + hot]) and counter_in(key, reader[key]) != last:
                raise Violation(f"{key!r} is not at write {last} at the end")
        for number in range(0, self.board[Board.KEPT], 7):
            self._get(reader, key_of("kept", number), 1)


class Sharing(Reading):
    """A reader that shares its handle with other threads."""

    def __init__(self, shared: logkv.Reader, board: Board, number: int, seed: int) -> None:
        super().__init__(shared.path, board, number, seed)
        self.shared = shared

    def _open(self) -> logkv.Reader:
        return self.shared

    def _close(self, reader: logkv.Reader) -> None:
        pass


class Mortal(Child):
    """A child that returns what was wrong, as far as it comes."""

    def end(self, kill: bool) -> list[str]:
        """Waits for it, or kills it; what was wrong."""
        if kill:
            os.kill(self._pid, signal.SIGKILL)
        with open(self._heard) as pipe:
            text = pipe.read()
        status = ended(self._pid)
        wrong = json.loads(text) if status == 0 or kill and text else []
        if status not in ((0, -signal.SIGKILL) if kill else (0,)):
            wrong.append(f"it ended with status {status}")
        return [f"{self.name}: {problem}" for problem in wrong]


class Processes:
    """Who runs now, and who is killed when."""

    def __init__(self, path: str, seconds: float, seed: int) -> None:
        self.path, self.rng = path, random.Random(seed)
        self.until = time.monotonic() + seconds
        self.board, self.figures = Board(), Figures()

    def run(self) -> Figures:
        figures, writer = self.figures, self._writer()
        readers = [self._reader(number) for number in range(READERS)]
        while (left := self.until - time.monotonic()) > 0 and not figures.violations:
            time.sleep(min(left, self.rng.uniform(*PAUSE)))
            if self.rng.random() < 1 / 3:
                figures.violations += writer.end(kill=True)
                figures.writers_killed += 1
                writer = self._writer()
            else:
                number = self.rng.randrange(READERS)
                figures.violations += readers[number].end(kill=True)
                figures.readers_killed += 1
                readers[number] = self._reader(number)
        figures.violations += writer.end(kill=bool(figures.violations))
        self.board[Board.STOP] = 1
        for reader in readers:
            figures.violations += reader.end(kill=bool(figures.violations))
        count(figures, self.path, self.board)
        return figures

    def _writer(self) -> Mortal:
        seed = self.rng.randrange(1 << 32)
        return Mortal("the writer", lambda: write(self.path, self.board, self.until, seed))

    def _reader(self, number: int) -> Mortal:
        seed = self.rng.randrange(1 << 32)
        return Mortal(f"reader {number}", lambda: Reading(self.path, self.board, number, seed).run())


def count(figures: Figures, path: str, board: Board) -> None:
    """Adds what the board and the store say of all that was done."""
    figures.writes, figures.index_first = board[Board.BEGUN], board[Board.INDEX_FIRST]
    figures.reads = sum(board[Board.FIRST_READS + number] for number in range(READERS))
    figures.passes = sum(board[Board.FIRST_PASSES + number] for number in range(READERS))
    with logkv.open(path, "r") as store:
        facts = store.stats()
        figures.keys, figures.rotations = facts["keys"], facts["segments"][-1]["number"] - 1
        figures.index_last, figures.shards = facts["index_bytes"], facts["index"]["shards"]
        figures.violations += map(str, store.verify().problems)


def run(path: str, seconds: float, seed: int = 1) -> Figures:
    """All processes together; the figures of all, violations too."""
    return Processes(path, seconds, seed).run()


def run_threads(path: str, seconds: float, threads: int, seed: int = 1) -> Figures:
    """One process: a thread that writes, and so many that share a Reader."""
    board, figures = Board(), Figures()
    logkv.open(path, segment_size=SEGMENTS[0]).close()

    def noting(name: str, work: Callable[[], list[str]]) -> Callable[[], None]:
        def noted() -> None:
            try:
                figures.violations += [f"{name}: {violation}" for violation in work()]
            except BaseException as problem:
                figures.violations.append(f"{name}: {type(problem).__name__}: {problem}")
        return noted

    with logkv.Reader(path) as shared:
        readers = [threading.Thread(target=noting(f"thread {number}", Sharing(shared, board, number, seed + number).run))
                   for number in range(threads)]
        writer = threading.Thread(target=noting("the writer", lambda: write(path, board, time.monotonic() + seconds, seed)))
        for thread in [writer, *readers]:
            thread.start()
        writer.join()
        board[Board.STOP] = 1
        for thread in readers:
            thread.join()
    count(figures, path, board)
    return figures


def main() -> int:
    parser = arguments("one writer, four readers")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--threads", type=int, choices=range(1, READERS + 1), help="of one process, that share one Reader")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=wanted.dir) as directory:
        path = os.path.join(directory, "stress.db")
        figures = run_threads(path, wanted.seconds, wanted.threads, wanted.seed) if wanted.threads else \
            run(path, wanted.seconds, wanted.seed)
    print("| seconds | writes | reads | whole passes | keys | rotations | index grew | shards "
          "| writers killed | readers killed | violations |")
    print("|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|")
    print(f"| {wanted.seconds:g} | {figures.writes:,} | {figures.reads:,} | {figures.passes:,} | {figures.keys:,} "
          f"| {figures.rotations:,} | {figures.index_first >> 10:,} to {figures.index_last >> 10:,} KiB "
          f"| {figures.shards} | {figures.writers_killed} | {figures.readers_killed} | {len(figures.violations)} |")
    return verdict(figures.violations)


if __name__ == "__main__":
    sys.exit(main())
