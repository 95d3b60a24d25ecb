"""A process puts while children are forked at random moments and use the handles that they inherit: they read, every write
is refused, and nothing of the parent's is lost.

The n-th put gives key n; one in ten overwrites an older key.  So a child knows what must be there: what was acknowledged
before its fork, and, as its handles are live, later what the parent says in memory that both share.

    python -m tests.proof.forks --puts 100000 --children 50 [--seed N] [--dir DIR]
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import logkv
from tests.proof.common import SEGMENT, Child, SharedNumbers, Violation, arguments, difference, scratch, verdict
from tests.proof.stress import counter_in, seal

THREADS = 2                 # of the parent, which put
ROUNDS = 4                  # of a child's reads
GETS = 200                  # in each


class Board(SharedNumbers):
    """How many puts each of the parent's threads has acknowledged."""


@dataclass
class Figures:
    puts: int = 0
    children: int = 0
    reads: int = 0
    passes: int = 0             # over the whole store
    refused: int = 0            # writes of children
    violations: list[str] = field(default_factory=list)


def key_of(thread: int, number: int) -> bytes:
    return b"%d/%d" % (thread, number)


def use(handles: list[logkv.Store | logkv.Reader], board: Board, seed: int) -> Figures:
    """What a child does with the handles it inherited."""
    rng, figures = random.Random(seed), Figures()
    for _ in range(ROUNDS):
        for handle in handles:
            for _ in range(GETS):
                thread = rng.randrange(THREADS)
                if done := board[thread]:
                    number = rng.choice((done - 1, rng.randrange(done)))
                    key = key_of(thread, number)
                    value = handle.get(key)
                    if value is None:
                        raise Violation(f"{key!r} is missing in a child; it was acknowledged")
                    counter_in(key, value)
                figures.reads += 1
            if isinstance(handle, logkv.Store):
                refuse(handle, rng)
                figures.refused += len(WRITES)
        least = sum(board[thread] for thread in range(THREADS))
        seen = 0
        for key, value in handles[rng.randrange(len(handles))].items():
            counter_in(key, value)
            seen += 1
        if seen < least:
            raise Violation(f"a child saw {seen} of {least} keys in an iteration")
        figures.passes += 1
    for handle in handles:
        if rng.random() < 0.5:
            handle.close()
    return figures


WRITES: list[Callable[[logkv.Store, bytes], object]] = [
    lambda store, key: store.put(b"child", b"was here"),
    lambda store, key: store.put(key, b"was here"),
    lambda store, key: store.delete(key),
    lambda store, key: store.pop(key, None),
    lambda store, key: store.clear(),
    lambda store, key: store.sync(),
]


def refuse(store: logkv.Store, rng: random.Random) -> None:
    for write in WRITES:
        try:
            write(store, key_of(rng.randrange(THREADS), 0))
        except logkv.ReadOnlyError:
            continue
        raise Violation("a child has written")


def run(puts: int, children: int, seed: int = 1, directory: str | None = None) -> Figures:
    """The parent, with threads that put and one that forks; and whether everything is there in the end."""
    with tempfile.TemporaryDirectory(dir=directory or scratch()) as name:
        return _run(os.path.join(name, "forks.db"), puts, children, seed)


def _run(path: str, puts: int, children: int, seed: int) -> Figures:
    board, figures = Board(), Figures()
    due = sorted(random.Random(seed).randrange(puts * 8 // 10) for _ in range(children))  # of keys, fewer than puts
    expected: list[dict[bytes, bytes]] = [{} for _ in range(THREADS)]

    def put(thread: int, store: logkv.Store) -> None:
        rng, mine = random.Random(seed * THREADS + thread), expected[thread]
        count = done = 0
        try:
            while count < puts // THREADS:
                old = done and rng.random() < 0.1
                key = key_of(thread, rng.randrange(done) if old else done)
                store[key] = mine[key] = seal(key, count, b"x" * rng.randrange(100))
                done += not old
                count += 1
                board[thread] = done
        except BaseException as problem:
            figures.violations.append(f"the parent: {type(problem).__name__}: {problem}")
        figures.puts += count

    with logkv.open(path, segment_size=SEGMENT) as store, logkv.Reader(path) as reader:
        threads = [threading.Thread(target=put, args=(number, store)) for number in range(THREADS)]
        running: list[Child] = []
        for thread in threads:
            thread.start()
        for number, moment in enumerate(due):
            while any(thread.is_alive() for thread in threads) and board[0] + board[1] < moment:
                threads[0].join(0.0001)
            running.append(Child(f"child {number}", lambda: vars(use([store, reader], board, seed + number))))
            if len(running) >= 8:
                hear(running.pop(0), figures)
        for thread in threads:
            thread.join()
        for child in running:
            hear(child, figures)
        compare(store, expected, "the parent's store", figures)
        compare(reader, expected, "the parent's reader", figures)
    with logkv.open(path) as store:
        compare(store, expected, "the store opened again", figures)
        report = store.verify()
        figures.violations += map(str, report.problems)
    return figures


def hear(child: Child, figures: Figures) -> None:
    try:
        told = child.result()
    except Violation as problem:
        figures.violations.append(str(problem))
        return
    figures.children += 1
    for counted in ("reads", "passes", "refused"):
        setattr(figures, counted, getattr(figures, counted) + told[counted])


def compare(found: logkv.Store | logkv.Reader, expected: list[dict[bytes, bytes]], what: str, figures: Figures) -> None:
    whole = {key: value for mine in expected for key, value in mine.items()}
    content = dict(found)
    if content != whole or len(found) != len(whole):
        figures.violations.append(f"{what} is not what was put: {difference(content, whole)}")


def main() -> int:
    parser = arguments("puts while children are forked")
    parser.add_argument("--puts", type=int, default=100_000)
    parser.add_argument("--children", type=int, default=50)
    wanted = parser.parse_args()
    figures = run(wanted.puts, wanted.children, wanted.seed, wanted.dir)
    print("| puts | children | their reads | their whole passes | their writes, refused | violations |")
    print("|---:|---:|---:|---:|---:|---:|")
    print(f"| {figures.puts:,} | {figures.children} | {figures.reads:,} | {figures.passes:,} | {figures.refused:,} "
          f"| {len(figures.violations)} |")
    return verdict(figures.violations)


if __name__ == "__main__":
    sys.exit(main())
