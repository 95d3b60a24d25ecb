"""What is done to a store while it is recorded: each workload leads to other moments at which power may fail."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tests.proof.recorder import Recorder
from tests.proof.session import History, Session

Workload = Callable[[Session, random.Random], None]
WORKLOADS: dict[str, tuple[Workload, float | str]] = {}       # by name, with what `sync=` they are opened


def workload(sync: float | str = "os") -> Callable[[Workload], Workload]:
    """The function's name is the workload's."""
    def enter(function: Workload) -> Workload:
        WORKLOADS[function.__name__] = function, sync
        return function

    return enter


@workload()
def puts(db: Session, dice: random.Random) -> None:
    """New keys, a sync now and then."""
    for n in range(60):
        db.put(b"key %d" % n, dice.randint(1, 300))
        if dice.random() < 0.1:
            db.sync()
    db.close()


@workload()
def overwrites(db: Session, dice: random.Random) -> None:
    """A few keys again and again."""
    for _ in range(80):
        db.put(b"key %d" % dice.randrange(8), dice.randint(1, 600))
        if dice.random() < 0.1:
            db.sync()
    db.close()


@workload()
def equal_sizes(db: Session, dice: random.Random) -> None:
    """A record could stand exactly where another stood."""
    db.set_clock_back()
    size = dice.choice((90, 480, 1200))
    for _ in range(80):
        db.put(b"key %d" % dice.randrange(8), size)
        if dice.random() < 0.05:
            db.sync()
    db.close()


@workload()
def deletes(db: Session, dice: random.Random) -> None:
    """Keys come and go."""
    for _ in range(100):
        key = b"key %d" % dice.randrange(12)
        if dice.random() < 0.5:
            db.delete(key)
        else:
            db.put(key, dice.randint(1, 400))
        if dice.random() < 0.1:
            db.sync()
    db.close()


@workload()
def rotation(db: Session, dice: random.Random) -> None:
    """Segments become full and are sealed."""
    for n in range(250):
        db.put(b"key %d" % dice.randrange(100), dice.randint(700, 1500))
        if dice.random() < 0.05:
            db.delete(b"key %d" % dice.randrange(100))
        if dice.random() < 0.03:
            db.sync()
    db.close()


@workload()
def big_values(db: Session, dice: random.Random) -> None:
    """Values of several pages, with a checksum of their own, some larger than a segment."""
    for _ in range(24):
        size = dice.choice((4000, 4096, 4097, 8192, 12_000, 30_000, 70_000, 150_000))
        db.put(b"key %d" % dice.randrange(6), size + dice.randrange(3))
        if dice.random() < 0.3:
            db.put(b"small", 20)
        if dice.random() < 0.2:
            db.sync()
    db.close()


@workload()
def sync_marks(db: Session, dice: random.Random) -> None:
    """A mark after nearly every put, over page and segment boundaries."""
    for _ in range(80):
        db.put(b"key %d" % dice.randrange(20), dice.choice((50, 500, 2500)))
        if dice.random() < 0.8:
            db.sync()
    db.close()


@workload()
def reopening(db: Session, dice: random.Random) -> None:
    """Closed and opened again, also without a change between."""
    for _ in range(6):
        for _ in range(dice.randrange(10)):
            db.put(b"key %d" % dice.randrange(10), dice.randint(1, 4000))
            if dice.random() < 0.2:
                db.sync()
        db.close()
        db.open()
    db.close()


@workload()
def clearing(db: Session, dice: random.Random) -> None:
    """Emptied, also when there is nothing, and when segments wait to be sealed."""
    for _ in range(5):
        for _ in range(dice.choice((0, 3, 12, 60))):
            db.put(b"key %d" % dice.randrange(30), dice.randint(1, 2500))
        if dice.random() < 0.5:
            db.sync()
        db.clear()
    db.put(b"last", 30)
    db.close()


@workload()
def index_growth(db: Session, dice: random.Random) -> None:
    """More keys than the first shard holds; some go again."""
    for n in range(600):
        db.put(b"%d" % n, 1)
        if dice.random() < 0.02:
            db.delete(b"%d" % dice.randrange(n + 1))
        if dice.random() < 0.005:
            db.sync()
    db.close()


@workload()
def compacting(db: Session, dice: random.Random) -> None:
    """A few keys come, change and go, and everything is compacted now and then."""
    for _ in range(100):
        key = b"key %d" % dice.randrange(12)
        what = dice.random()
        if what < 0.35:
            db.delete(key)
        elif what < 0.85:
            db.put(key, dice.randint(1, 600))
        elif what < 0.93:
            db.sync()
        else:
            db.compact()
    db.close()


@workload()
def merging(db: Session, dice: random.Random) -> None:
    """Many small segments with puts and deletes of the same keys, of which some neighbours are merged."""
    for _ in range(120):
        key = b"key %d" % dice.randrange(8)
        what = dice.random()
        if what < 0.35:
            db.delete(key)
        elif what < 0.65:
            db.put(key, dice.randint(1, 300))
        elif what < 0.80:
            db.rotate()
        elif what < 0.95:
            db.merge()
        elif what < 0.97:
            db.sync()
        elif what < 0.98:
            db.clear()
        else:
            db.close()
            db.open()
    db.close()


@workload()
def moving(db: Session, dice: random.Random) -> None:
    """Locations are given out anew, and the index is built anew, as merges leave free ones."""
    for _ in range(90):
        key = b"key %d" % dice.randrange(10)
        what = dice.random()
        if what < 0.2:
            db.delete(key)
        elif what < 0.55:
            db.put(key, dice.randint(1, 600))
        elif what < 0.7:
            db.rotate()
        elif what < 0.8:
            db.merge()
        elif what < 0.85:
            db.sync()
        elif what < 0.92:
            db.shrink_index()
        else:
            db.move()
    db.close()


@workload()
def failing_syncs(db: Session, dice: random.Random) -> None:
    """A sync fails now and then: the writer ends, and the next one writes again what the device may not have."""
    for _ in range(70):
        key = b"key %d" % dice.randrange(10)
        db.put(key, dice.choice((20, 300, 3000, 9000)))
        what = dice.random()
        if what < 0.1:
            db.fail_sync()
        elif what < 0.2:
            db.sync()
        elif what < 0.3:
            db.delete(key)
    db.close()


@workload()
def overflowing(db: Session, dice: random.Random) -> None:
    """So much is overwritten and deleted that compaction begins by itself; or that whole segments are dead."""
    keys = dice.choice((1, 12, 12))
    for _ in range(110):
        key = b"key %d" % dice.randrange(keys)
        if dice.random() < 0.1:
            db.delete(key)
        else:
            db.put(key, dice.randint(3000, 12_000))
        if dice.random() < 0.03:
            db.sync()
    db.close()


@workload()
def mixed(db: Session, dice: random.Random) -> None:
    """Everything."""
    for _ in range(150):
        key = b"key %d" % dice.randrange(40)
        what = dice.random()
        if what < 0.75:
            db.put(key, dice.choice((10, 100, 1000, 3000, 9000)))
        elif what < 0.90:
            db.delete(key)
        elif what < 0.97:
            db.sync()
        elif what < 0.98:
            db.clear()
        else:
            db.close()
            db.open()
    db.close()


@workload(sync="always")
def synced_writes(db: Session, dice: random.Random) -> None:
    """Every write is acknowledged as durable."""
    for _ in range(60):
        key = b"key %d" % dice.randrange(15)
        if dice.random() < 0.2:
            db.delete(key)
        else:
            db.put(key, dice.choice((20, 200, 2000, 6000)))
    db.close()


@workload(sync=3600.0)
def flushed(db: Session, dice: random.Random) -> None:
    """Synced in the background."""
    for _ in range(120):
        db.put(b"key %d" % dice.randrange(30), dice.choice((20, 200, 2000, 6000)))
    db.close()


def record(name: str, path: Path, dice: random.Random) -> tuple[Recorder, History]:
    """Runs a workload in an empty directory."""
    run, sync = WORKLOADS[name]
    with Recorder(path) as recorder:
        session = Session(path, sync, dice, recorder)
        try:
            session.open()
            session.begin()
            if dice.random() < 0.5:
                session.set_clock_back()
            run(session, dice)
        finally:
            session.abandon()
    return recorder, session.history
