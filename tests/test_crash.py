"""Power cuts: a small search of every workload, and the bugs that the search must see."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from logkv import _core, files, manifest, recovery
from logkv.compaction import Compactor
from logkv.writer import Writing
from tests.proof.crash import enumerate_crashes
from tests.proof.disk import Disk
from tests.proof.events import SyncedNames
from tests.proof.session import determined
from tests.proof.workloads import WORKLOADS, record


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_power_cut_leaves_a_prefix_of_the_history(name: str) -> None:
    report = enumerate_crashes(name, limit=500, nested=0.02)
    assert report.violations == []
    assert report.distinct >= 400
    assert report.recoveries_enumerated and report.from_recovery


@pytest.mark.parametrize("name", ["mixed", "clearing"])
def test_what_was_recorded_is_what_is_there(name: str, tmp_path: Path) -> None:
    """With everything pending applied, the model is the directory: nothing reached a file past the recorder."""
    dice = random.Random(1)
    with determined(dice):
        recorder, _ = record(name, tmp_path, dice)
    disk = Disk()
    for event in recorder.events:
        disk.apply(event)
    disk.apply(SyncedNames(""))
    for file in disk.files.values():
        file.sync()
    images = {name: disk.files[file].image([]) for name, file in disk.names.items()}
    found = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {name: b"".join(pages)[:size] for name, (size, pages) in images.items()} == found


def test_a_run_can_be_repeated() -> None:
    assert enumerate_crashes("mixed", limit=50).distinct == enumerate_crashes("mixed", limit=50).distinct


# -- bugs that the search must see ----------------------------------------------------------------------------------

def no_directory_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(files.Directory, "sync", lambda directory: None)


def no_sync_before_a_rename(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(manifest, "files", SimpleNamespace(**{**vars(files), "sync_data": lambda fd: None}))


def no_directory_sync_after_a_rename(patch: pytest.MonkeyPatch) -> None:
    adopt = manifest.adopt_next
    patch.setattr(manifest, "adopt_next", lambda directory, durable=True: adopt(directory, durable=False))


def an_acknowledged_sync_that_was_none(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Writing, "_sync_fd", lambda engine, fd: None)


def a_tail_that_is_not_cut(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Writing, "_cut", lambda engine, tail: 0)


def a_successor_that_is_not_cut(patch: pytest.MonkeyPatch) -> None:
    """The log ends in a segment whose successor begins further on, and that stays as it is."""
    cut = Writing._cut
    patch.setattr(Writing, "_cut", lambda engine, tail: cut(engine, replace(tail, abandoned=[])))


def a_sync_that_covers_what_came_meanwhile(patch: pytest.MonkeyPatch) -> None:
    sync = Writing._sync_to

    def sync_to(engine: Writing, version: int) -> None:
        sync(engine, version)
        engine._synced_version = engine.log.state["version"]

    patch.setattr(Writing, "_sync_to", sync_to)


def sealed_before_the_records_are_synced(patch: pytest.MonkeyPatch) -> None:
    seal = Writing.seal_oldest

    def seal_unsynced(engine: Writing) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Writing, "_sync_fd", lambda engine, fd: None)
            seal(engine)

    patch.setattr(Writing, "seal_oldest", seal_unsynced)


def an_unfinished_segment_that_counts(patch: pytest.MonkeyPatch) -> None:
    """Recovery goes on in the successor although the scan did not reach the end that it names."""
    walk = recovery.walk

    def walk_on(engine: Any, segment: Any, start: int, version: int, **options: Any) -> Any:
        tail = walk(engine, segment, start, version, **options)
        segments = engine.manifest.segments
        at = segments.index(tail.segment)
        if at + 1 < len(segments) and _core.read_link(engine.log, segments[at + 1].chunk) is not None:
            return walk(engine, segments[at + 1], recovery.START, version, **options)
        return tail

    patch.setattr(recovery, "walk", walk_on)


def set_aside_without_a_sync(patch: pytest.MonkeyPatch) -> None:
    save_aside = files.Directory.save_aside

    def save_unsynced(directory: files.Directory, label: str, data: bytes) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(files, "sync_data", lambda fd: None)
            save_aside(directory, label, data)

    patch.setattr(files.Directory, "save_aside", save_unsynced)


def set_aside_under_a_name_that_is_not_synced(patch: pytest.MonkeyPatch) -> None:
    save_aside = files.Directory.save_aside

    def save_unsynced(directory: files.Directory, label: str, data: bytes) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(files.os, "fsync", lambda fd: None)       # type: ignore[attr-defined]
            save_aside(directory, label, data)

    patch.setattr(files.Directory, "save_aside", save_unsynced)


def a_tombstone_dropped_early(patch: pytest.MonkeyPatch) -> None:
    """As if no segment before a merge's inputs had its key."""
    begin = Compactor._begin
    patch.setattr(Compactor, "_begin", lambda compactor, inputs, older, output: begin(compactor, inputs, [], output))


def inputs_unlinked_before_the_log_is_synced(patch: pytest.MonkeyPatch) -> None:
    """What made a record dead is lost, and so is the record."""
    merge = Compactor._merge_now

    def merge_unsynced(compactor: Compactor, *arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Writing, "sync", lambda engine: None)
            merge(compactor, *arguments)

    patch.setattr(Compactor, "_merge_now", merge_unsynced)


def inputs_unlinked_before_the_output_is_synced(patch: pytest.MonkeyPatch) -> None:
    copy = Compactor._copy

    def copy_unsynced(compactor: Compactor, *arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(files, "sync_data", lambda fd: None)
            copy(compactor, *arguments)

    patch.setattr(Compactor, "_copy", copy_unsynced)


def inputs_unlinked_before_the_output_is_named(patch: pytest.MonkeyPatch) -> None:
    adopt = Compactor._adopt

    def unlink_and_adopt(compactor: Compactor, run: Any, *arguments: Any) -> None:
        for segment in run:
            compactor._engine.directory.unlink(segment.name)
        adopt(compactor, run, *arguments)

    patch.setattr(Compactor, "_adopt", unlink_and_adopt)


PLANTED: dict[Callable[[pytest.MonkeyPatch], None], tuple[str, str]] = {     # and where it shows, with which words
    no_directory_sync: ("puts", "there is no store"),
    no_sync_before_a_rename: ("puts", "MANIFEST"),
    no_directory_sync_after_a_rename: ("rotation", "it is"),
    an_acknowledged_sync_that_was_none: ("synced_writes", "it is state"),
    a_tail_that_is_not_cut: ("equal_sizes", "opened again: 0 missing"),
    a_successor_that_is_not_cut: ("flushed", "again"),
    a_sync_that_covers_what_came_meanwhile: ("deletes", "it is state"),
    sealed_before_the_records_are_synced: ("rotation", "the log is damaged"),
    an_unfinished_segment_that_counts: ("rotation", "no state of the history"),
    set_aside_without_a_sync: ("overwrites", "once set aside, is not whole"),
    set_aside_under_a_name_that_is_not_synced: ("overwrites", "once set aside, is gone"),
    a_tombstone_dropped_early: ("merging", "no state of the history"),
    inputs_unlinked_before_the_log_is_synced: ("compacting", "no state of the history"),
    inputs_unlinked_before_the_output_is_synced: ("compacting", "the log is damaged"),
    inputs_unlinked_before_the_output_is_named: ("compacting", "is missing"),
}


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_seen(bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)
    name, words = PLANTED[bug]
    limit, nested = (150, 0.1) if "aside" in words else (800, 0.01)
    violations: list[str] = []
    for seed in range(8):
        violations += enumerate_crashes(name, seed=seed, limit=limit, nested=nested).violations
        if any(words in violation for violation in violations):
            return
    pytest.fail(f"{len(violations)} violations, none with {words!r}: {violations[:3]}")
