"""Power cuts: a small search of every workload, and the bugs that the search must see."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.proof.crash import enumerate_crashes, run
from tests.proof.disk import Disk
from tests.proof.events import SyncedNames
from tests.proof.planted import PLANTED, Bug, flipped_footers, is_seen
from tests.proof.session import determined
from tests.proof.workloads import WORKLOADS, record


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_power_cut_leaves_a_prefix_of_the_history(name: str) -> None:
    [report] = run(400, 60, names=[name], nested=0.02, limit=250)
    assert report.violations == []
    assert report.distinct >= 400
    assert report.recoveries_enumerated and report.from_recovery and report.killed and report.believed


def test_states_of_compaction() -> None:
    [report] = run(400, 60, names=["merging"], limit=250)
    assert report.from_compaction > 100 and report.violations == []


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


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
def test_a_planted_bug_is_seen(bug: Bug) -> None:
    assert is_seen(bug)


def test_no_bug_is_seen_where_none_is_planted() -> None:
    assert not any(flipped_footers())


@pytest.mark.parametrize("workload, seed", [
    ("failing_syncs", 64),      # what made the oldest segment dead stood in one of several behind it, and was not synced
])
def test_what_once_showed_a_bug(workload: str, seed: int) -> None:
    assert enumerate_crashes(workload, seed=seed, limit=300).violations == []
