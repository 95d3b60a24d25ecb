"""Options of the workloads under pytest-benchmark; see test_bench.py."""

from __future__ import annotations

import pytest

from benchmarks.workloads import OPENINGS, SHAPES, WORKLOADS, engines_of


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("LogKV's benchmarks")
    group.addoption("--keys", type=int, default=20_000, help="keys in a store (default: 20,000)")
    group.addoption("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES),
                    help="bytes of a key + bytes of a value (default: all)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.name == "test_workload":
        cases = [
            pytest.param(shape, workload, engine, id=f"{shape.name}-{workload}-{engine.name}")
            for shape in (SHAPES[name] for name in metafunc.config.getoption("--shapes"))
            for workload in WORKLOADS + OPENINGS
            for engine in engines_of(workload)
        ]
        metafunc.parametrize(("shape", "workload", "engine"), cases)
