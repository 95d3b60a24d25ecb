"""What a killed writer acknowledged is there, whoever opens the store next, and attached readers never see less."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path

import pytest

from logkv import _core
from tests.proof import kill
from tests.proof.common import ended, fork, scratch


def test_kills() -> None:
    with tempfile.TemporaryDirectory(dir=scratch()) as directory:
        tally = kill.run(directory, 400, seconds=30)
    assert not tally.violations, "\n".join(tally.violations)
    assert tally.killed and tally.acknowledged and tally.looks
    assert tally.cycles < 400 or {"opening", "closing", "rotating", "sealing", "merging"} <= set(tally.during)


@pytest.mark.parametrize("phase, done", [("opening", 0), ("closing", 100), (None, 50)])
def test_a_writer_dies_where_it_is_aimed_at(tmp_path: Path, phase: str | None, done: int) -> None:
    script, stage = kill.Script(1), kill.Stage()
    stage.set(0)
    aim = kill.Aim(phase, 0 if phase else 50, 0.0)
    pid = fork(lambda: kill.write(str(tmp_path / "store"), script, 0, 100, "os", False, stage, aim))
    assert ended(pid) == -signal.SIGKILL
    assert stage.acknowledged == done and stage.now() == ([phase] if phase else [])


def test_a_merge_that_is_finished_without_its_slots_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "swing_replaced", lambda *arguments: 0)
    with tempfile.TemporaryDirectory(dir=scratch()) as directory:
        assert any(kill.run(directory, 400, seed=seed).violations for seed in range(5))


def test_a_lost_operation_is_seen() -> None:
    script = kill.Script(1)
    model = kill.Model(script)
    model.advance(100)
    found = dict(model)
    model.take(found, len(found))
    found.pop(next(iter(found)))
    with pytest.raises(kill.Violation, match="1 missing"):
        model.take(found, len(found))
