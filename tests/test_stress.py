"""One writer and four readers, all at once, for a few seconds."""

from __future__ import annotations

import os
import tempfile
import time

import pytest

from tests.proof import stress
from tests.proof.common import Violation, scratch


def test_stress() -> None:
    with tempfile.TemporaryDirectory(dir=scratch()) as directory:
        figures = stress.run(os.path.join(directory, "stress.db"), 4)
    assert not figures.violations, "\n".join(figures.violations)
    assert figures.writes and figures.reads and figures.rotations
    assert figures.writers_killed and figures.readers_killed
    assert figures.passes >= stress.READERS and figures.index_last > figures.index_first


def test_stress_of_threads() -> None:
    with tempfile.TemporaryDirectory(dir=scratch()) as directory:
        figures = stress.run_threads(os.path.join(directory, "stress.db"), 2, 2)
    assert not figures.violations, "\n".join(figures.violations)
    assert figures.writes and figures.reads and figures.rotations
    assert figures.passes >= 2 and figures.index_last > figures.index_first


def test_a_write_that_was_lost_by_a_kill_is_seen() -> None:
    """By the next writer."""
    with tempfile.TemporaryDirectory(dir=scratch()) as directory:
        path, board = os.path.join(directory, "stress.db"), stress.Board()
        assert stress.write(path, board, time.monotonic() + 0.1, 1) == []
        board[stress.Board.KEPT] += 1
        assert "is missing" in stress.write(path, board, time.monotonic() + 0.1, 1)[0]


def test_a_torn_value_is_seen() -> None:
    value = stress.seal(b"key", 7, b"filler")
    assert stress.counter_in(b"key", value) == 7
    for torn in (value[:-1], value + b"\0", value.replace(b"7", b"8"), bytes(len(value)), b""):
        with pytest.raises(Violation):
            stress.counter_in(b"key", torn)
    with pytest.raises(Violation):
        stress.counter_in(b"kez", value)
