"""The store beside a plain dict, through all that may happen to it: a state machine, of which `make soak` does more."""

from __future__ import annotations

import pytest

from logkv.compaction import Compactor
from logkv.writer import Writing
from tests.proof import soak


def test_the_store_is_a_dict() -> None:
    result = soak.run(10_000, seconds=40)
    assert not result.violations, result.violations[0]
    assert result.counted["kills"] and result.counted["power cuts"] and result.counted["during a recovery"]


def seen() -> bool:
    """Whether the machine sees a bug that was planted."""
    return bool(soak.run(20_000, shrink=False).violations)


def test_a_tombstone_dropped_early_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Compactor._begin
    monkeypatch.setattr(Compactor, "_begin",
                        lambda compactor, inputs, older, output: begin(compactor, inputs, [], output))
    assert seen()


def test_a_sync_that_does_nothing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writing, "_sync_fd", lambda engine, fd: None)
    assert seen()
