"""The benchmarks run and write what they should; how fast anything is, is not looked at."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from collections import Counter
from decimal import Decimal
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import logkv
from benchmarks import compaction, growth, sharing
from benchmarks.results import Measured, Run
from benchmarks.workloads import ENGINES, OPENINGS, SHAPES, WORKLOADS, Bench, Shape, disk_bytes, engine_named

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


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what a small run of benchmarks.growth wrote: run.json, page.md, and in stores/ what it left."""
    found = tmp_path_factory.mktemp("growth")
    (found / "stores").mkdir()
    ended = run("--keys", "3000", "--rounds", "2", "--dir", found / "stores", "--json", found / "run.json",
                "--markdown", found / "page.md", module="benchmarks.growth")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == (found / "page.md").read_text()
    return found


def test_growth_is_measured_over_the_whole_fill(grown: Path) -> None:
    found = growth.Growth.load(grown / "run.json")
    assert found.fill.filled == list(range(15, 3001, 15))
    assert len(found.fill.index) == growth.WINDOWS and min(found.fill.index) > 8 and 0 < found.fill.most_moved <= 3000
    for name in ("LogKV", "bare loop", "dict"):
        times = found.fill.percentiles[name]
        assert len(times) == len(growth.PERCENTILES) and times == sorted(times) and times[0] > 0
        assert times[-1] == max(window[-1] for window in found.fill.windows[name])
    assert [len(times) for times in found.openings] == [growth.OPENINGS] * 2
    assert all(len(times) == 2 and min(times) > 0 for times in found.rebuilds.values())
    assert list((grown / "stores").iterdir()) == []


def test_growth_has_a_row_of_every_target(grown: Path) -> None:
    rows = re.findall(r"^\| (.*?) +\| +[\d,.]+ \| +[≤≥] [\d,.]+ \|", (grown / "page.md").read_text(), re.M)
    assert rows == [target.what for target in growth.targets(growth.Growth.load(grown / "run.json"))]
    assert len(rows) == 8


@charts_drawn
def test_growth_is_drawn_from_what_was_saved(grown: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    ended = run("--from", grown / "run.json", "--chart", tmp_path / "drawn", "--markdown", page,
                module="benchmarks.growth")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "drawn" / "growth.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert ElementTree.parse(tmp_path / "drawn" / "growth.svg").getroot().tag.endswith("}svg")
    assert "](drawn/growth.svg)" in page.read_text()


@pytest.mark.parametrize("count", [1, 99, 100_000])
def test_percentiles_are_those_of_the_sorted_times(count: int) -> None:
    times = sorted(at * at % 9973 for at in range(count))
    ranks = [math.ceil(count * Decimal(str(percent)) / 100) for percent in growth.PERCENTILES]
    assert growth.percentiles(Counter(times), growth.PERCENTILES) == [times[rank - 1] for rank in ranks]


def test_made_pairs_are_the_same_for_a_seed() -> None:
    made = [pair for pairs in growth.made_pairs(5001, seed=1) for pair in pairs]
    assert made == [pair for pairs in growth.made_pairs(5001, seed=1) for pair in pairs]
    assert len(dict(made)) == 5001 and {len(key) for key, _ in made} == set(range(8, 17))
    assert made != [pair for pairs in growth.made_pairs(5001, seed=2) for pair in pairs]
    assert sorted(sharing.sample(5001, 1, 5001)) == sorted(dict(made))
    assert set(sharing.sample(5001, 1, 70)) <= set(dict(made))


def test_an_index_is_rebuilt_from_footers_or_by_a_scan(tmp_path: Path) -> None:
    """Each way is the one that it is called, or the benchmark raises; damaged footers are whole again afterwards."""
    path = tmp_path / "store"
    with logkv.open(path, segment_size=64 << 10) as db:
        for pairs in growth.made_pairs(5000, seed=1):
            db.update(pairs)
    full = growth.seal(path)
    with logkv.Reader(path) as db:
        sealed = [f"{segment['number']:010d}.seg" for segment in db.stats()["segments"] if segment["sealed"]]
    before = {file.name: file.read_bytes() for file in path.glob("*.seg")}
    with growth.footers_damaged(path) as unreadable:
        assert unreadable == full == len(sealed) > 1
        (path / "index").unlink()
        assert growth.rebuild(path, 5000, unreadable) > 0
    (path / "index").unlink()
    assert growth.rebuild(path, 5000, 0) > 0
    (path / "index").unlink()
    with pytest.raises(RuntimeError, match="unreadable footers expected"):
        growth.rebuild(path, 5000, unreadable)
    with pytest.raises(RuntimeError, match="unreadable footers expected"):
        growth.rebuild(path, 5000, 0)           # it was rebuilt already
    assert all((path / name).read_bytes() == before[name] for name in sealed)


def test_sharing_measures_readers_and_both_kinds(tmp_path: Path) -> None:
    (tmp_path / "stores").mkdir()
    ended = run("--keys", "3000", "--rounds", "2", "--seconds", "0.05", "--dir", tmp_path / "stores", "--json",
                tmp_path / "run.json", "--markdown", tmp_path / "page.md", module="benchmarks.sharing")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == (tmp_path / "page.md").read_text()
    found = json.loads((tmp_path / "run.json").read_text())
    assert {kind: len(processes) for kind, processes in found["memory"].items()} == {"idle": 3, "readers": 8}
    assert all(private["dirty"] > 0 for processes in found["memory"].values() for private in processes)
    assert {kind: len(rates) for kind, rates in found["rates"].items()} == {"LogKV": 2, "dict": 2}
    assert all(min(rate) > 0 for rates in found["rates"].values() for rate in rates)
    assert list((tmp_path / "stores").iterdir()) == []


def test_private_memory_is_what_a_process_does_not_share(tmp_path: Path) -> None:
    """A reader that has no index to trust builds its own, and that is seen."""
    path = tmp_path / "store"
    sharing.fill(path, 400_000, seed=1)
    keys = sharing.sample(400_000, 1, 100)
    shared = sharing.memory(path, keys, seed=1).beyond
    size = (path / "index").stat().st_size
    (path / "index").unlink()
    own = sharing.memory(path, keys, seed=1).beyond
    assert max(shared) < size / 2 < size < min(own) + (1 << 20)


@pytest.mark.parametrize("together, said", [(1.9, 1), (1.0, 0)])
def test_nothing_is_said_of_scaling_where_dicts_do_not_scale(together: float, said: int) -> None:
    private = sharing.Private(1 << 20, 0)
    rates = {"LogKV": [(1.0, 0.97 * together)] * 3, "dict": [(1.0, together)] * 3}
    found = sharing.Sharing("", "", (0, 0), 1, 0, False, sharing.Memory([private], [private]), rates)
    assert [target.found for target in sharing.targets(found)][1:] == [pytest.approx(0.97)] * said
    assert ("too busy" in sharing.page(found)) == (not said)


@pytest.fixture(scope="module")
def compacted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what a small run of benchmarks.compaction wrote, and in stores/ what it left."""
    found = tmp_path_factory.mktemp("compaction")
    (found / "stores").mkdir()
    ended = run("--operations", "5000", "--keys", "300", "--rounds", "2", "--directory", found / "stores", "--json",
                found / "run.json", "--markdown", found / "page.md", module="benchmarks.compaction")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == (found / "page.md").read_text()
    return found


def test_compaction_is_measured_with_and_without(compacted: Path) -> None:
    found = compaction.Compaction.load(compacted / "run.json")
    assert [(run.workload, run.mode) for run in found.runs] == [
        (name, mode) for modes in (["auto", "manual"], ["manual", "auto"])
        for name in compaction.WORKLOADS for mode in modes]
    operations = {"hot": 5000, "uniform": 5000, "zipf": 5000, "queue": 10_000, "deletes": 2000}
    written = {"hot": 5001 * 136, "uniform": 5300 * 136, "zipf": 5300 * 136, "queue": 6000 * 136 + 5000 * 40,
               "deletes": 1000 * 176}
    for one in found.runs:
        assert (one.done.operations, one.done.written) == (operations[one.workload], written[one.workload])
        assert one.done.seconds > 0 and one.moments and one.share > 0 and one.done.problem is None
    for both in found.latencies:
        assert all(0 < times[0] <= times[-1] for mode in compaction.MODES for times in both[mode].values())
    assert len(found.latencies) == 2 and list((compacted / "stores").iterdir()) == []


def test_compaction_has_a_row_of_every_target(compacted: Path) -> None:
    rows = re.findall(r"^\| (.*?) +\| +[\d,.]+ \| +[≤≥] [\d,.]+ \|", (compacted / "page.md").read_text(), re.M)
    assert rows == [target.what for target in compaction.targets(compaction.Compaction.load(compacted / "run.json"))]
    assert len(rows) == 13


@charts_drawn
def test_compaction_is_drawn_from_what_was_saved(compacted: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    ended = run("--from", compacted / "run.json", "--chart", tmp_path / "drawn", "--markdown", page,
                module="benchmarks.compaction")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "drawn" / "compaction.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert ElementTree.parse(tmp_path / "drawn" / "compaction.svg").getroot().tag.endswith("}svg")
    assert "](drawn/compaction.svg)" in page.read_text()


@pytest.mark.parametrize("workload", compaction.WORKLOADS)
def test_live_data_is_never_said_to_be_more_than_there_is(workload: str, tmp_path: Path) -> None:
    """What is said while a part runs is the lesser of what there was before and of what there is then."""
    order = compaction.drawn(workload, 300, 5000, seed=1)
    with logkv.open(tmp_path / "store", compaction="manual") as db:
        for part in compaction.parts_of(workload, db, 300, order, 5000, seed=1):
            before = db.stats()
            part.task()
            after = db.stats()
            assert part.live == min(before["live_bytes"], after["live_bytes"])
            assert sum(after[name] - before[name] for name in ("live_bytes", "dead_bytes")) == part.written


def test_zipf_favours_few_keys_and_uniform_none() -> None:
    counts = {name: Counter(compaction.drawn(name, 1000, 100_000, seed=1)) for name in ("uniform", "zipf")}
    top = {name: sum(count for _, count in found.most_common(100)) for name, found in counts.items()}
    assert 9_000 < top["uniform"] < 15_000 and 60_000 < top["zipf"] < 75_000
    expected = 100_000 / sum(rank ** -compaction.EXPONENT for rank in range(1, 1001))
    assert abs(counts["zipf"][0] - expected) < 5 * math.sqrt(expected)
    assert set(compaction.drawn("hot", 1000, 100, seed=1)) == {0}


def test_disk_use_is_the_most_that_was_seen(tmp_path: Path) -> None:
    """Of files in any depth, by allocated blocks; the live data that belongs to it is the least that was said."""
    watch = compaction.Watch(tmp_path)
    watch.say(0, 1000)
    empty = disk_bytes(tmp_path)
    watch.look()
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/file").write_bytes(bytes(100_000))
    watch.look()
    most = disk_bytes(tmp_path)
    assert most >= empty + 100_000
    (tmp_path / "inner/file").unlink()
    watch.look()
    watch.say(5, 400)
    watch.look()
    assert watch.moments[0] == compaction.Moment(0, 1000, most)
    assert watch.moments[1] == compaction.Moment(5, 400, disk_bytes(tmp_path)) and len(watch.moments) == 2
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(10 << 20)
    assert disk_bytes(tmp_path) < 1 << 20


def test_a_run_that_fails_fails_the_benchmark(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="a run has failed"):
        compaction.in_process(divmod, 1, 0)
    assert "ZeroDivisionError" in capfd.readouterr().err
