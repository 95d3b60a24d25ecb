"""The workloads under pytest-benchmark, to compare one version with another:

    pytest benchmarks --benchmark-enable --benchmark-only --benchmark-autosave
    pytest benchmarks --benchmark-enable --benchmark-only --benchmark-compare --benchmark-compare-fail=median:20%

`--keys 20000` is the number of keys, `--shapes 16+100 8+20 40+1000` are the shapes; as everywhere, large values and the
baseline get a part of the keys. `-k` chooses workloads and engines: `-k "get and logkv"`. Ratios between engines at
sizes that matter come from `python -m benchmarks`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.workloads import Bench, Engine, Shape


@pytest.fixture
def uncollected() -> Iterator[None]:
    """The garbage collector is off while a workload runs."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
def test_workload(
    benchmark: BenchmarkFixture, pytestconfig: pytest.Config, tmp_path: Path,
    shape: Shape, workload: str, engine: Engine,
) -> None:
    bench = Bench(engine, shape, tmp_path, shape.keys_of(pytestconfig.getoption("--keys")))
    benchmark.group = f"{shape.name} {workload}"
    benchmark.extra_info["keys"] = bench.keys

    def setup() -> tuple[tuple[Callable[[], object]], dict[str, object]]:
        return (bench.prepare(workload),), {}

    benchmark.pedantic(lambda call: call(), setup=setup, rounds=5)  # type: ignore[no-untyped-call]
    assert len(bench.db) in (bench.keys, bench.keys + 1) or workload == "delete"  # one more: what the kill left
    bench.remove()
