"""A store that was damaged on the device reads right or raises, file by file, bit by bit."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest

import logkv
from logkv import recovery
from tests.proof import flips
from tests.proof.common import scratch
from tests.proof.session import determined


def tried(count: int, share: tuple[int, int] = (0, 1)) -> flips.Result:
    with tempfile.TemporaryDirectory(dir=scratch()) as directory:
        return flips.run(directory, count, seconds=15, share=share)


def test_flips() -> None:
    result = tried(900, (5, 321))           # of all groups but the last
    assert not result.violations, "\n".join([*flips.table(result), *result.violations])
    assert {name.rpartition("/")[2] for name in result.outcomes} >= {"harmless", "reported"}
    assert sum(result.flipped.values()) == result.flips
    if result.flips == 900:
        assert set(result.flipped) >= set(flips.GROUPS[:3])


@pytest.mark.parametrize("closed", [True, False])
def test_the_stores_that_are_damaged_have_everything(tmp_path: Path, closed: bool) -> None:
    with determined(random.Random(1)):
        original = flips.build(str(tmp_path / "store"), closed)
    kinds = {name: [kind for kind, _, _ in flips.records(data)] for name, data in original.files.items()
             if name.endswith(".seg")}
    manifest = original.files["MANIFEST"]
    assert manifest.count(b'"sealed": true') == (2 if closed else 1)
    assert manifest.count(b'"merged": true') == closed
    assert len(original.unsealed) == (1 if closed else 2)
    for name in original.unsealed:
        assert {flips.PUT, flips.DELETE, flips.SYNC_MARK} <= set(kinds[name])
    assert any(len(value) > 4096 for value in original.states[-1].values()) == closed


def test_every_bit_is_there_once(tmp_path: Path) -> None:
    with determined(random.Random(1)):
        originals = [flips.build(str(tmp_path / str(closed)), closed) for closed in (True, False)]
    targets = flips.Targets(originals)
    first = sum(targets.sizes[:3])
    found = {targets[number] for number in range(first)}
    assert len(found) == first
    for name in "MANIFEST", "control", "index":
        assert {(0, name, at, bit) for at in range(len(originals[0].files[name])) for bit in range(8)} <= found
    assert len(targets) - first == targets.sizes[3] > 0


def test_a_wrong_read_is_seen(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    with determined(random.Random(1)):
        original = flips.build(path, True)

    def judge(allowed: list[dict[bytes, bytes]]) -> tuple[str, str]:
        return flips.judge(lambda: logkv.open(path, "r"), None, original.keys, allowed, "MANIFEST")

    assert judge(original.states[-1:]) == ("harmless", "")
    with pytest.raises(flips.Silent):
        judge(original.states[-2:-1])


def test_damage_below_a_sync_mark_that_is_cut_off_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery._core, "find_mark", lambda *arguments: None)
    assert any("without index" in violation for violation in tried(600, (0, 97)).violations)
