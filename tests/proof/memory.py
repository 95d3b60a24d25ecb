"""More keys than memory: random gets and puts under a memory limit of a quarter of log and index, or less.

A child fills a store and then works on it inside a cgroup whose limit counts the page cache too; every value bears a
checksum of itself and its key.  Needs root and a memory controller, version 1 or 2.

    python -m tests.proof.memory [--keys N] [--value BYTES] [--limit MIB] [--seconds S] [--seed N] [--dir DIR]
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import logkv
from tests.proof.common import Child, Violation, arguments, verdict

KEYS, VALUE, LIMIT, SECONDS = 500_000, 500, 64, 20
CGROUPS = Path("/sys/fs/cgroup")


class Limit:
    """A cgroup with a memory limit in bytes."""

    def __init__(self, limit: int) -> None:
        self.second = (CGROUPS / "cgroup.controllers").exists()
        self.path = (CGROUPS if self.second else CGROUPS / "memory") / f"logkv-proof-{os.getpid()}"
        if self.second:
            (CGROUPS / "cgroup.subtree_control").write_text("+memory")
        self.path.mkdir()
        self._write("memory.max" if self.second else "memory.limit_in_bytes", limit)
        if self.second and (self.path / "memory.swap.max").exists():
            self._write("memory.swap.max", 0)

    def _write(self, name: str, number: int) -> None:
        (self.path / name).write_text(str(number))

    def enter(self) -> None:
        """This process and what it maps counts from here on."""
        self._write("cgroup.procs", os.getpid())

    @property
    def events(self) -> dict[str, int]:
        """How often the limit was reached, and how many processes it has killed."""
        said = (self.path / ("memory.events" if self.second else "memory.oom_control")).read_text().split()
        counts = dict(zip(said[::2], map(int, said[1::2])))
        reached = counts["max"] if self.second else int((self.path / "memory.failcnt").read_text())
        return {"limit reached": reached, "killed": counts["oom_kill"]}

    def remove(self) -> None:
        self.path.rmdir()


@contextmanager
def limited(limit: int) -> Iterator[Limit]:
    group = Limit(limit)
    try:
        yield group
    finally:
        group.remove()


def missing() -> str | None:
    """Why it cannot be tried here, or None."""
    if os.geteuid():
        return "needs root"
    controllers = CGROUPS / "cgroup.controllers"
    if controllers.exists():
        return None if "memory" in controllers.read_text().split() else "there is no memory controller"
    return None if (CGROUPS / "memory" / "cgroup.procs").exists() else "there is no memory controller"


def key(number: int) -> bytes:
    return b"%016d" % number


def value(number: int, turn: int, size: int) -> bytes:
    """`turn` tells one write of a key from another."""
    body = b"%d/%d/" % (number, turn)
    body += bytes(max(0, size - len(body) - 4))
    return crc32(body, number).to_bytes(4, "little") + body


def is_right(number: int, turn: int, found: bytes | None, size: int) -> bool:
    return found is not None and int.from_bytes(found[:4], "little") == crc32(found[4:], number) \
        and found == value(number, turn, size)


def work(path: str, group: Limit, keys: int, size: int, seconds: float, seed: int) -> dict[str, int]:
    """Fills, then gets and puts at random, opens again and looks at a part of all; returns the figures."""
    group.enter()
    rng, turns = random.Random(seed), bytearray(keys)
    figures = dict.fromkeys(("bytes", "gets", "puts", "wrong"), 0)

    def get(db: logkv.Store[bytes], number: int) -> None:
        figures["gets"] += 1
        figures["wrong"] += not is_right(number, turns[number], db.get(key(number)), size)

    with logkv.open(path) as db:
        for number in range(keys):
            db[key(number)] = value(number, 0, size)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for _ in range(100):
                get(db, rng.randrange(keys))
            for _ in range(20):
                number = rng.randrange(keys)
                turns[number] = (turns[number] + 1) % 256
                db[key(number)] = value(number, turns[number], size)
                figures["puts"] += 1
        facts = db.stats()
        figures["bytes"] = facts["log_bytes"] + facts["index_bytes"]
    with logkv.open(path) as db:
        figures["wrong"] += len(db) != keys
        for number in [*(number for number in range(keys) if turns[number]), *rng.sample(range(keys), keys // 100)]:
            get(db, number)
    return figures


def run(directory: str, keys: int, size: int, limit: int, seconds: float, seed: int) -> tuple[dict[str, int], list[str]]:
    """The figures, and what is wrong."""
    with limited(limit) as group:
        child = Child("the store's process",
                      lambda: work(os.path.join(directory, "large.db"), group, keys, size, seconds, seed))
        try:
            figures: dict[str, int] = child.result()
        except (Violation, ValueError) as problem:      # what was killed has said nothing
            return group.events, [f"{problem}; {group.events}"]
        figures |= group.events
    problems = [f"{figures[name]} {name}" for name in ("wrong", "killed") if figures[name]]
    if figures["bytes"] < 4 * limit:
        problems.append("log and index are less than four times the limit: more keys are needed")
    if not figures["limit reached"]:
        problems.append("the limit was never reached")
    return figures, problems


def main() -> int:
    parser = arguments("a store that is larger than the memory it may use")
    parser.add_argument("--keys", type=int, default=KEYS)
    parser.add_argument("--value", type=int, default=VALUE, help="bytes")
    parser.add_argument("--limit", type=int, default=LIMIT, help="MiB")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of gets and puts")
    parser.set_defaults(dir=tempfile.gettempdir())      # on a disk: memory cannot be paged out to itself
    wanted = parser.parse_args()
    if why := missing():
        print(f"not tried: {why}")
        return 2
    with tempfile.TemporaryDirectory(dir=wanted.dir) as directory:
        figures, problems = run(directory, wanted.keys, wanted.value, wanted.limit << 20, wanted.seconds, wanted.seed)
    print(f"{'limit':<16}{wanted.limit << 20:>16,}")
    print(f"{'log and index':<16}{figures.pop('bytes', 0):>16,}")
    for name, number in figures.items():
        print(f"{name:<16}{number:>16,}")
    return verdict(problems)


if __name__ == "__main__":
    sys.exit(main())
