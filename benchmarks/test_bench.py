"""The workloads under pytest-benchmark, to compare one version with another:

    pytest benchmarks --benchmark-enable --benchmark-only --benchmark-autosave
    pytest benchmarks --benchmark-enable --benchmark-only --benchmark-compare --benchmark-compare-fail=median:20%

LOGKV_BENCH_KEYS is the number of keys (20,000); the baseline gets a tenth of it. Ratios between engines at sizes
that matter come from `python -m benchmarks`.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.workloads import ENGINES, OPENINGS, WORKLOADS, Bench, Engine

KEYS = int(os.environ.get("LOGKV_BENCH_KEYS", "20000"))
CASES = [
    pytest.param(workload, engine, id=f"{workload}-{engine.name}")
    for workload in WORKLOADS + OPENINGS
    for engine in ENGINES
    if engine.stored or workload not in OPENINGS
]


@pytest.fixture
def uncollected() -> Iterator[None]:
    """The garbage collector is off while a workload runs."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(("workload", "engine"), CASES)
@pytest.mark.usefixtures("uncollected")
def test_workload(benchmark: BenchmarkFixture, tmp_path: Path, workload: str, engine: Engine) -> None:
    bench = Bench(engine, tmp_path, KEYS)
    benchmark.group = workload
    benchmark.extra_info["keys"] = bench.keys

    def setup() -> tuple[tuple[Callable[[], object]], dict[str, object]]:
        return (bench.prepare(workload),), {}

    benchmark.pedantic(lambda call: call(), setup=setup, rounds=5)  # type: ignore[no-untyped-call]
    assert len(bench.db) in (bench.keys, bench.keys + 1) or workload == "delete"  # one more: what the kill left
    bench.remove()
