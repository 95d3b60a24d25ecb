"""Bugs that the search for power cuts must see, planted one after the other.

Each is looked for until it is seen; a bug that a change of the harness hides is a hole in the harness.

    python -m tests.proof.planted
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import logkv
from logkv import _core, files, manifest, recovery
from logkv.compaction import Compactor
from logkv.manifest import Segment
from logkv.opening import Opening
from logkv.writer import Writing
from tests.proof.common import SEGMENT, difference, scratch, verdict
from tests.proof.crash import enumerate_crashes
from tests.proof.session import engine_of, rotate

PATIENCE = 60.0             # seconds in which a bug must be seen; mostly it takes less than one
Plant = Callable[[Any, str, Any], object]       # puts something in the place of an attribute


def no_directory_sync(plant: Plant) -> None:
    plant(files.Directory, "sync", lambda directory: None)


def no_sync_before_a_rename(plant: Plant) -> None:
    plant(manifest, "files", SimpleNamespace(**{**vars(files), "sync_data": lambda fd: None}))


def no_directory_sync_after_a_rename(plant: Plant) -> None:
    adopt = manifest.adopt_next
    plant(manifest, "adopt_next", lambda directory, durable=True: adopt(directory, durable=False))


def an_acknowledged_sync_that_was_none(plant: Plant) -> None:
    plant(Writing, "_sync_fd", lambda engine, fd: None)


def a_tail_that_is_not_cut(plant: Plant) -> None:
    plant(Writing, "_cut", lambda engine, tail: 0)


def a_successor_that_is_not_cut(plant: Plant) -> None:
    """The log ends in a segment whose successor begins further on, and that stays as it is."""
    cut = Writing._cut
    plant(Writing, "_cut", lambda engine, tail: cut(engine, replace(tail, abandoned=[])))


def a_sync_that_covers_what_came_meanwhile(plant: Plant) -> None:
    sync = Writing._sync_to

    def sync_to(engine: Writing, version: int) -> None:
        sync(engine, version)
        engine._synced_version = engine.log.state["version"]

    plant(Writing, "_sync_to", sync_to)


def sealed_before_the_records_are_synced(plant: Plant) -> None:
    seal = Writing.seal_oldest

    def seal_unsynced(engine: Writing) -> None:
        with mock.patch.object(Writing, "_sync_fd", lambda engine, fd: None):
            seal(engine)

    plant(Writing, "seal_oldest", seal_unsynced)


def an_unfinished_segment_that_counts(plant: Plant) -> None:
    """Recovery goes on in the successor although the scan did not reach the end that it names."""
    walk = recovery.walk

    def walk_on(engine: Any, segment: Any, start: int, version: int, **options: Any) -> Any:
        tail = walk(engine, segment, start, version, **options)
        segments = engine.manifest.segments
        at = segments.index(tail.segment)
        if at + 1 < len(segments) and _core.read_link(engine.log, segments[at + 1].chunk) is not None:
            return walk(engine, segments[at + 1], recovery.START, version, **options)
        return tail

    plant(recovery, "walk", walk_on)


def set_aside_without_a_sync(plant: Plant) -> None:
    save_aside = files.Directory.save_aside

    def save_unsynced(directory: files.Directory, label: str, data: bytes) -> None:
        with mock.patch.object(files, "sync_data", lambda fd: None):
            save_aside(directory, label, data)

    plant(files.Directory, "save_aside", save_unsynced)


def set_aside_under_a_name_that_is_not_synced(plant: Plant) -> None:
    save_aside = files.Directory.save_aside

    def save_unsynced(directory: files.Directory, label: str, data: bytes) -> None:
        with mock.patch.object(files.os, "fsync", lambda fd: None):       # type: ignore[attr-defined]
            save_aside(directory, label, data)

    plant(files.Directory, "save_aside", save_unsynced)


def a_tombstone_dropped_early(plant: Plant) -> None:
    """As if no segment before a merge's inputs had its key."""
    begin = Compactor._begin
    plant(Compactor, "_begin", lambda compactor, inputs, older, output: begin(compactor, inputs, [], output))


def inputs_unlinked_before_the_log_is_synced(plant: Plant) -> None:
    """What made a record dead is lost, and so is the record."""
    merge = Compactor._merge_now

    def merge_unsynced(compactor: Compactor, *arguments: Any) -> None:
        with mock.patch.object(Writing, "sync", lambda engine: None):
            merge(compactor, *arguments)

    plant(Compactor, "_merge_now", merge_unsynced)


def inputs_unlinked_before_the_output_is_synced(plant: Plant) -> None:
    copy = Compactor._copy

    def copy_unsynced(compactor: Compactor, *arguments: Any) -> None:
        with mock.patch.object(files, "sync_data", lambda fd: None):
            copy(compactor, *arguments)

    plant(Compactor, "_copy", copy_unsynced)


def inputs_unlinked_before_the_output_is_named(plant: Plant) -> None:
    adopt = Compactor._adopt

    def unlink_and_adopt(compactor: Compactor, run: Any, *arguments: Any) -> None:
        for segment in run:
            compactor._engine.directory.unlink(segment.name)
        adopt(compactor, run, *arguments)

    plant(Compactor, "_adopt", unlink_and_adopt)


def a_failed_sync_that_is_not_made_good(plant: Plant) -> None:
    """The next writer trusts the cache, of which the device may never get a part."""
    plant(Opening, "_rescue", lambda engine, tail: tail)


def a_footer_trusted_without_its_checksum(plant: Plant) -> None:
    """Each is given the checksum that it should have before it is read."""
    rebuild = recovery.rebuild

    def rebuild_trusting(engine: Any, why: str) -> Any:
        for segment in engine.manifest.segments:
            if segment.sealed:
                path = Path(engine.path_of(segment.name))
                data = bytearray(path.read_bytes())
                stop = segment.end + 20 + int.from_bytes(data[segment.end + 4:segment.end + 8], "little")
                checksum = _core.checksum(data[segment.end + 4:stop], segment.salt ^ segment.end >> 3)
                data[segment.end:segment.end + 4] = checksum.to_bytes(4, "little")
                path.write_bytes(data)
        return rebuild(engine, why)

    plant(recovery, "rebuild", rebuild_trusting)


def power_cuts(workload: str, *, limit: int = 200, nested: float = 0.0) -> Iterator[str]:
    """The violations of one run after another."""
    seed = 0
    while True:
        yield from enumerate_crashes(workload, seed=seed, limit=limit, nested=nested).violations
        yield ""                # nothing was seen: time to ask whether to go on
        seed += 1


def flipped_footers() -> Iterator[str]:
    """Wrong reads of a store of which one bit of a footer has changed, and of which the index is gone."""
    with tempfile.TemporaryDirectory(dir=scratch()) as directory:
        path = Path(directory, "store.db")
        with logkv.open(path, segment_size=SEGMENT) as db:
            for number in range(40):
                db[f"key {number % 20}"] = f"{number}"
            rotate(db)
            sealed: Segment = engine_of(db).manifest.segments[0]
            expected = dict(db)
        os.unlink(path / files.CONTROL)
        name = path / sealed.name
        whole = name.read_bytes()
        assert sealed.end is not None
        for at in range(8 * sealed.end, 8 * len(whole.rstrip(b"\0"))):
            data = bytearray(whole)
            data[at // 8] ^= 1 << at % 8
            name.write_bytes(data)
            try:
                with logkv.Reader(path) as reader:
                    found = dict(reader.items())
            except logkv.CorruptionError:
                found = expected
            yield f"bit {at} of {name.name} was flipped: {difference(found, expected)}" if found != expected else ""


class Bug(NamedTuple):
    """One that is planted, where it is looked for, and with which words it shows."""

    plant: Callable[[Plant], None]
    look: Callable[[], Iterator[str]]
    words: str

    @property
    def name(self) -> str:
        return self.plant.__name__


def _cut(plant: Callable[[Plant], None], workload: str, words: str, **how: Any) -> Bug:
    return Bug(plant, lambda: power_cuts(workload, **how), words)


PLANTED: Sequence[Bug] = (
    _cut(no_directory_sync, "puts", "there is no store"),
    _cut(no_sync_before_a_rename, "puts", "MANIFEST"),
    _cut(no_directory_sync_after_a_rename, "rotation", "it is"),
    _cut(an_acknowledged_sync_that_was_none, "synced_writes", "it is state"),
    _cut(a_tail_that_is_not_cut, "equal_sizes", "opened again: 0 missing"),
    _cut(a_successor_that_is_not_cut, "flushed", "again"),
    _cut(a_sync_that_covers_what_came_meanwhile, "deletes", "it is state"),
    _cut(sealed_before_the_records_are_synced, "rotation", "the log is damaged"),
    _cut(an_unfinished_segment_that_counts, "rotation", "no state of the history"),
    _cut(set_aside_without_a_sync, "overwrites", "once set aside, is not whole", nested=0.1),
    _cut(set_aside_under_a_name_that_is_not_synced, "overwrites", "once set aside, is gone", nested=0.1),
    _cut(a_tombstone_dropped_early, "merging", "no state of the history"),
    _cut(inputs_unlinked_before_the_log_is_synced, "compacting", "no state of the history"),
    _cut(inputs_unlinked_before_the_output_is_synced, "compacting", "the log is damaged"),
    _cut(inputs_unlinked_before_the_output_is_named, "compacting", "is missing"),
    _cut(a_failed_sync_that_is_not_made_good, "failing_syncs", "the log is damaged"),
    Bug(a_footer_trusted_without_its_checksum, flipped_footers, "missing"),
)


def is_seen(bug: Bug) -> str:
    """The violation that shows the bug; "" if none has after a while."""
    until = time.monotonic() + PATIENCE
    with ExitStack() as stack:
        bug.plant(lambda *place: stack.enter_context(mock.patch.object(*place)))
        for violation in bug.look():
            if bug.words in violation:
                return violation
            if time.monotonic() > until:
                break
    return ""


def run() -> tuple[int, int, list[str]]:
    """How many bugs were seen, how many are planted, and what was not seen."""
    unseen = [f"the planted bug {bug.name} was not seen" for bug in PLANTED if not is_seen(bug)]
    return len(PLANTED) - len(unseen), len(PLANTED), unseen


def main() -> int:
    unseen = []
    for bug in PLANTED:
        began = time.monotonic()
        violation = is_seen(bug)
        print(f"{bug.name:<46}{time.monotonic() - began:5.1f} s  {violation[:120]}", flush=True)
        unseen += [] if violation else [bug.name]
    return verdict(unseen)


if __name__ == "__main__":
    sys.exit(main())
