"""What a killed writer acknowledged is there, whoever opens the store next, and attached readers never see less."""

from __future__ import annotations

import tempfile

import pytest

from tests.proof import kill


@pytest.mark.parametrize("options", [{}, {"compacting": True}, {"compacting": True, "without_index": True}], ids=str)
def test_kills(options: dict[str, bool]) -> None:
    with tempfile.TemporaryDirectory(dir=kill.scratch()) as directory:
        tally = kill.run(directory, 60, seconds=12, **options)
    assert not tally.violations, "\n".join(tally.violations)
    assert tally.killed and tally.acknowledged


def test_a_lost_operation_is_seen() -> None:
    script = kill.Script(1)
    model = kill.Model(script)
    model.advance(100)
    found = dict(model)
    model.take(found)
    found.pop(next(iter(found)))
    with pytest.raises(kill.Violation, match="1 missing"):
        model.take(found)
