"""The benchmarks run and write what they should; how fast anything is, is not looked at."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.results import Measured, Run
from benchmarks.workloads import ENGINES, OPENINGS, SHAPES, WORKLOADS, Bench, Shape, engine_named

ROOT = Path(__file__).parent.parent
SMALL = ["--keys", "300", "--rounds", "2", "--shape", "8+20", "--shape", "16+100"]
charts_drawn = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")


def run(*arguments: str | Path, module: str = "benchmarks") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what a small run wrote: run.json, page.md, and in stores/ whatever it left there."""
    found = tmp_path_factory.mktemp("benchmarks")
    (found / "stores").mkdir()
    ended = run(*SMALL, "--dir", found / "stores", "--json", found / "run.json", "--markdown", found / "page.md")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == (found / "page.md").read_text()
    return found


def test_json_has_the_samples_of_every_workload_and_engine(written: Path) -> None:
    shapes = {shape["shape"]: shape for shape in json.loads((written / "run.json").read_text())["shapes"]}
    assert set(shapes) == {"16+100", "8+20"}
    for shape in shapes.values():
        assert set(shape["samples"]) == {*WORKLOADS, *OPENINGS}
        for workload, samples in shape["samples"].items():
            assert set(samples) == {engine.name for engine in ENGINES if engine.stored or workload not in OPENINGS}
            assert all(len(found) == 2 and min(found) > 0 for found in samples.values())
        opened = {(opened["engine"], opened["killed"], opened["keys"]) for opened in shape["openings"]}
        assert opened == {("logkv", False, 300), ("logkv", True, 300), ("baseline", False, 30)}


def test_the_page_has_a_row_of_every_workload_and_the_targets(written: Path) -> None:
    page = (written / "page.md").read_text()
    rows = re.findall(r"^\| (.*?) +\|", page, re.M)
    for workload in WORKLOADS:
        assert rows.count(workload) == 3            # the ratios, and the times of two shapes
    for target in ("random get, of dict", "recovery, times as fast as the baseline", "index, bytes a key at 300 keys"):
        assert target in rows
    assert "### 8+20\n\n300 keys of 8 bytes, values of 20 bytes." in page


def test_no_store_is_left(written: Path) -> None:
    assert list((written / "stores").iterdir()) == []


@charts_drawn
def test_charts_are_drawn_from_what_was_saved(written: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    ended = run("--from", written / "run.json", "--chart", tmp_path / "drawn", "--markdown", page)
    assert (ended.returncode, ended.stderr) == (0, "")
    for name in ("overview", "shapes"):
        assert (tmp_path / "drawn" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
        assert ElementTree.parse(tmp_path / "drawn" / f"{name}.svg").getroot().tag.endswith("}svg")
        assert f"](drawn/{name}.svg)" in page.read_text()


def test_only_what_is_named_is_measured(tmp_path: Path) -> None:
    ended = run(*SMALL, "--workload", "get", "--json", tmp_path / "run.json")
    assert ended.returncode == 0
    for shape in json.loads((tmp_path / "run.json").read_text())["shapes"]:
        assert (list(shape["samples"]), shape["openings"], shape["index_bytes"]) == (["get"], [], None)


@pytest.mark.parametrize("arguments", [
    ["--shape", "1+2"], ["--workload", "gets"], ["--keys", "0"], ["--rounds", "-1"], ["--from", "missing.json"],
    ["--from", "pyproject.toml"], ["--from", "tests/conftest.py"],
], ids=" ".join)
def test_wrong_usage(arguments: list[str]) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2 and ended.stdout == ""
    assert "error: " in ended.stderr and "Traceback" not in ended.stderr


def test_ratios_are_taken_within_a_round() -> None:
    gets = {"logkv": [1.0, 30.0, 3.0], "dict": [2.0, 40.0, 1.0]}
    whole_calls = {"logkv": [1.0], "baseline": [2.0]}
    measured = Measured("16+100", 10, {"get": gets, "reopen": whole_calls}, [], None)
    assert measured.ratio("get", "logkv", "dict") == 0.75
    assert measured.ratio("get", "baseline", "logkv") is measured.ratio("reopen", "baseline", "logkv") is None
    assert measured.median("get", "logkv") == 3.0


def test_a_saved_run_is_what_it_was(written: Path, tmp_path: Path) -> None:
    loaded = Run.load(written / "run.json")
    loaded.save(tmp_path / "again.json")
    assert Run.load(tmp_path / "again.json") == loaded


@pytest.mark.parametrize("shape", [*SHAPES.values(), Shape(2, 3)], ids=lambda shape: shape.name)
@pytest.mark.parametrize("engine", ["dict", "logkv"])
def test_no_key_is_drawn_twice(tmp_path: Path, shape: Shape, engine: str) -> None:
    """Of two bytes many are drawn twice."""
    bench = Bench(engine_named(engine), shape, tmp_path, keys=5_000)
    bench.prepare("fill")()
    assert len(bench.db) == 5_000
    assert {(len(key), len(value)) for key, value in bench.db.items()} == {(shape.key, shape.value)}
    _, missing = bench.prepare("miss").args
    assert len(set(missing)) == 5_000 and not any(key in bench.db for key in missing)
    bench.remove()


def test_imports_are_compared_with_put_loops(tmp_path: Path) -> None:
    ended = run("--rows", "300", "--rounds", "1", "--dir", tmp_path, module="benchmarks.imports")
    assert (ended.returncode, ended.stderr) == (0, "")
    for form in ("one column as the value", "all columns as JSON"):
        assert re.search(rf"^\| {form} +(\| +[\d,.]+ ){{5}}\| +≥ 0.25 \|", ended.stdout, re.M)
    assert list(tmp_path.iterdir()) == []
