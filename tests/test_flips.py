"""A store that was damaged on the device reads right or raises, file by file, bit by bit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.proof import flips
from tests.proof.kill import scratch


def test_flips() -> None:
    with tempfile.TemporaryDirectory(dir=scratch()) as directory:
        results = flips.run(directory, 500, seconds=15)
    silent = [f"{result.damage}: {result.why}" for result in results if result.outcome == "silent"]
    assert not silent, "\n".join([*flips.table(results), *silent])
    assert {result.outcome for result in results} >= {"harmless", "reported"}


def test_the_store_that_is_damaged_has_everything(tmp_path: Path) -> None:
    original = flips.build(str(tmp_path / "store"))
    names = sorted(name for name in original.files if name.endswith(".seg"))
    kinds = [kind for name in names for kind, _, _ in flips.records(original.files[name])]
    assert len(names) >= 4 and original.files["MANIFEST"].count(b'"sealed": true') >= 2
    assert flips.PUT in [kind for kind, _, _ in flips.records(original.files[original.active])]
    assert kinds.count(flips.PUT) + kinds.count(flips.DELETE) == len(original.states) - 1
    assert kinds.count(flips.DELETE) > 20 and kinds.count(flips.SYNC_MARK) > 5
    assert any(len(value) > 4096 for value in original.states[-1].values())


def test_a_wrong_read_is_seen(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    original = flips.build(path)
    assert flips.judge(path, "r", original.keys, original.states[-1:]) == ("harmless", "")
    with pytest.raises(flips.Silent):
        flips.judge(path, "r", original.keys, original.states[-2:-1])
