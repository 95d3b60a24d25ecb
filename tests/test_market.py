"""Market data: written by one process, followed by two, through the death of the writer."""

from __future__ import annotations

import random
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from tests.proof import market


def make_file(file: Path, minutes: int, seed: int) -> Path:
    """One-minute candles of a random walk."""
    rng, price = random.Random(seed), 23_000.0
    minute = datetime(2023, 3, 1, tzinfo=timezone.utc)
    lines = [market.HEADER]
    for _ in range(minutes):
        walk = [price]
        for _ in range(5):
            walk.append(round(walk[-1] + rng.gauss(0, 8), 2))
        lines.append(f"{minute.isoformat(' ')},{walk[0]},{max(walk)},{min(walk)},{walk[-1]},{rng.expovariate(1):.6f}")
        price, minute = walk[-1], minute + timedelta(minutes=1)
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_market_data(tmp_path: Path, seed: int) -> None:
    names = ("BTCUSDT_1m.csv", "BTCUSD_1m.csv", "BTCUSDC_1m.csv")
    files = [make_file(tmp_path / name, 5_000 + 100 * i, seed + i) for i, name in enumerate(names)]
    report = market.run(str(tmp_path / "prices.db"), files, seed)
    assert not report.violations, "\n".join(report.violations[:20])
    assert report.rows == 15_300
    assert report.followed >= market.READERS * report.rows


def test_rows_are_keyed_by_symbol_and_time(tmp_path: Path) -> None:
    rows = market.read_rows([make_file(tmp_path / "BTCUSDT_1m.csv", 2, 1), make_file(tmp_path / "BTCUSD_1m.csv", 1, 2)])
    assert [key for key, _ in rows] == [b"BTCUSDT/2023-03-01 00:00:00+00:00", b"BTCUSD/2023-03-01 00:00:00+00:00",
                                        b"BTCUSDT/2023-03-01 00:01:00+00:00"]
    assert all(value.startswith(key.partition(b"/")[2] + b",") for key, value in rows)
