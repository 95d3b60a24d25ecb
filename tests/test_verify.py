"""Verification reports what is damaged, and nothing else."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import logkv
from benchmarks import baseline
from logkv.engine import Engine

SEGMENT = 65_536


@pytest.fixture
def sealed(path: str) -> str:
    """A closed store of several segments, with overwrites and deletes."""
    with logkv.open(path, segment_size=SEGMENT) as db:
        for number in range(3000):
            db[f"key {number % 1500}"] = b"v" * (number % 150)
        for number in range(0, 1500, 7):
            del db[f"key {number}"]
        db["large"] = bytes(range(256)) * 100
    return path


def change(file: Path, offset: int, data: bytes = b"\xff\0\xff") -> None:
    with open(file, "r+b") as opened:
        opened.seek(offset)
        opened.write(data)


def segments(path: str) -> list[Path]:
    return sorted(Path(path).glob("*.seg"))


def test_a_whole_store_is_whole(sealed: str) -> None:
    steps: list[tuple[int, int]] = []
    report = logkv.verify(sealed, progress=lambda done, total: steps.append((done, total)))
    with logkv.Reader(sealed) as reader:
        stats = reader.stats()
        assert report.ok and not report.problems and not report.notes
        assert report.keys == len(reader) == stats["keys"]
        assert report.segments == len(stats["segments"]) > 3 and report.bytes == stats["log_bytes"]
        assert report.records >= 3000 + 215 + 1
    assert steps[0] == (0, report.bytes) and steps[-1] == (report.bytes, report.bytes) and steps == sorted(steps)


def test_an_open_store_a_killed_one_and_one_without_an_index(sealed: str) -> None:
    with logkv.open(sealed) as db, logkv.Reader(sealed) as reader:
        db["more"] = "1"
        assert db.verify().ok and reader.verify().ok and reader.verify().keys == len(db)
        assert not logkv.verify(sealed).notes
    os.unlink(os.path.join(sealed, "index"))
    report = logkv.verify(sealed)
    assert report.ok and report.keys > 1000 and "index is not in use" in report.notes[0]
    assert logkv.verify(sealed).notes == report.notes       # it changes nothing


@pytest.mark.parametrize("place", ["key", "value", "footer", "large value", "header", "cut", "missing", "index", "control",
                                   "MANIFEST"])
def test_damage_is_found_where_it_is(sealed: str, place: str) -> None:
    first, second = segments(sealed)[:2]
    with logkv.Reader(sealed) as reader:
        shown = {s["number"]: s for s in reader.stats()["segments"]}
        data = first.read_bytes()
    where, offset = first.name, None
    if place == "key":
        offset = data.index(b"key 10") - 20
        change(first, offset + 20)
    elif place == "value":
        offset = data.index(b"key 149") - 20
        change(first, offset + 30)
    elif place == "footer":
        change(first, first.stat().st_size - 40)
    elif place == "large value":
        last = segments(sealed)[-2 if not shown[len(shown)]["allocated"] else -1]
        where, at = last.name, last.read_bytes().index(b"large" + bytes(range(256)))
        change(last, at + 9000)
    elif place == "header":
        offset = 0
        change(first, 8)
    elif place == "cut":
        os.truncate(first, 30_000)
    elif place == "missing":
        os.unlink(second)
        where = second.name
    else:
        where = place
        for at in range(8192, os.path.getsize(Path(sealed, place)), 8) if place == "index" else [1024]:
            change(Path(sealed, place), at)
    report = logkv.verify(sealed)
    assert not report.ok
    problem = report.problems[0]
    assert problem.file == where and where in str(problem) and "\n" not in str(problem)
    if offset is not None:
        assert problem.offset == offset
    assert problem.expected != problem.found or problem.expected is None


def test_every_damaged_place_is_listed_and_what_is_between_is_counted(sealed: str) -> None:
    whole = logkv.verify(sealed).records
    first = segments(sealed)[0]
    data = first.read_bytes()
    offsets = [data.index(b"key %d" % number) - 20 for number in (20, 100, 101)]
    for offset in offsets:
        change(first, offset + 22)
    report = logkv.verify(sealed)
    places = [problem.offset for problem in report.problems if problem.file == first.name]
    assert places == [offsets[0], offsets[1]]       # the last two stand side by side
    assert report.records == whole - 3


def test_an_index_that_leads_to_an_older_record(sealed: str) -> None:
    with logkv.open(sealed, segment_size=SEGMENT) as db:
        assert db.verify().ok
        index = Path(sealed, "index")
        before = index.read_bytes()
        db["key 1"] = "something else"
        after = index.read_bytes()
        position = next(at for at in range(8192, len(before), 8) if before[at:at + 5] != after[at:at + 5]
                        and before[at + 5:at + 8] == after[at + 5:at + 8] != bytes(3))      # another location, the same tag
        change(index, position, before[position:position + 8])      # the entry leads to the older record again
        report = db.verify()
        assert {problem.file for problem in report.problems} == {"index"}
        assert any("newest" in str(problem) for problem in report.problems)
        db["key 1"] = "repaired by the next write"
        assert db.verify().ok


def test_while_a_writer_is_at_work(path: str) -> None:
    done = threading.Event()

    def write() -> None:
        with logkv.open(path, segment_size=SEGMENT) as db:
            turn = 0
            while not done.is_set():
                turn += 1
                for number in range(500):
                    db[f"{number}"] = b"x" * (turn % 300)
                if turn % 40 == 0:
                    db.clear()

    logkv.open(path, segment_size=SEGMENT).close()
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(30):
            report = logkv.verify(path)
            assert report.ok, [str(problem) for problem in report.problems]
    finally:
        done.set()
        writer.join()


def test_while_a_writer_stands_between_two_stores(path: str) -> None:
    """Its last put is in the log and in the index, and not in the counts yet: that is no damage."""
    with logkv.open(path) as db:
        db["a"] = "1"
        db["b"] = "2"
        index = Path(path, "index")
        seq = index.read_bytes()[256:264]
        change(index, 256, (int.from_bytes(seq, "little") - 1).to_bytes(8, "little"))
        report = logkv.verify(path)
        assert report.ok, report.problems
        assert "not compared" in report.notes[0]
        change(index, 256, seq)
        report = db.verify()
        assert report.ok and report.keys == 2 and not report.notes


def test_strays_are_noted(sealed: str) -> None:
    Path(sealed, "notes.txt").write_text("mine")
    Path(sealed, "0000009999.seg").write_bytes(b"")
    report = logkv.verify(sealed)
    assert report.ok and len(report.notes) == 2 and "notes.txt" in " ".join(report.notes)


def test_what_is_no_store_raises(tmp_path: Path) -> None:
    with pytest.raises(logkv.NotFoundError):
        logkv.verify(tmp_path / "none")
    Path(tmp_path, "file").write_text("x")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(logkv.FormatError):
            logkv.verify(path)


def test_beside_a_writer_the_log_is_indexed_a_few_times_at_most(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = []
    real = Engine._build_own_index
    monkeypatch.setattr(Engine, "_build_own_index", lambda self, why: (builds.append(why), real(self, why))[1])
    done = threading.Event()
    with logkv.open(path) as db:
        for number in range(20_000):
            db[f"{number}"] = b"x"

        def write() -> None:
            while not done.is_set():
                db["0"] = b"y"
                time.sleep(0.0002)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            assert logkv.verify(path).ok
        finally:
            done.set()
            writer.join()
    assert len(builds) <= 5


def test_beside_a_store_that_is_emptied_again_and_again(path: str) -> None:
    done = threading.Event()

    def write() -> None:
        with logkv.open(path) as db:
            while not done.is_set():
                for number in range(3000):
                    db[f"{number}"] = b"x" * 20
                db.clear()

    logkv.open(path).close()
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(60):
            report = logkv.verify(path)
            assert report.ok, [str(problem) for problem in report.problems]
    finally:
        done.set()
        writer.join()


def test_damage_is_found_while_a_writer_seals_segments(sealed: str) -> None:
    first = segments(sealed)[0]
    change(first, first.read_bytes().index(b"key 10"))
    done = threading.Event()

    def write() -> None:
        with logkv.open(sealed, segment_size=SEGMENT, compaction="manual") as db:
            turn = 0
            while not done.is_set():
                turn += 1
                db[f"new {turn % 100}"] = bytes(1000)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(10):
            assert first.name in {problem.file for problem in logkv.verify(sealed).problems}
    finally:
        done.set()
        writer.join()


def test_every_byte_of_the_directory_of_a_dirty_index(path: str, in_child: Callable[[Callable[[], None]], int]) -> None:
    """Whatever stands in it, everything ends, and nothing is read outside what is mapped."""
    def leave() -> None:
        db = logkv.open(path)
        for number in range(20_000):
            db[f"{number}"] = b"x"
        os._exit(0)

    assert in_child(leave) == 0
    index = Path(path, "index")
    page = int.from_bytes(index.read_bytes()[40:48], "little") >> 32
    before = index.read_bytes()[page * 4096:page * 4096 + 16]
    for at in range(16):
        for byte in (0, 1, 40, 255):
            change(index, page * 4096 + at, bytes([byte]))
            with logkv.Reader(path) as reader:
                assert reader.stats()["keys"] == 20_000
                assert reader.get("77") in (b"x", None)
            logkv.verify(path)
            change(index, page * 4096, before)
    assert logkv.verify(path).ok


def manifest_with(path: str, change_it: Callable[[dict[str, Any]], object]) -> None:
    manifest = baseline.read_manifest(Path(path))
    change_it(manifest)
    Path(path, "MANIFEST").write_bytes(baseline.encode_manifest(manifest))


@pytest.mark.parametrize("name, value", [
    *((name, value) for name in ("generation", "epoch", "moves", "next_number", "next_chunk", "last_version", "cut_bytes")
      for value in (-1, 1 << 64, "1", None, 1.5, True)),
    ("segments", []), ("segments", 7), ("cuts", [[1]]), ("cuts", 7), ("options", {"codec": [1]}), ("options", 7),
    ("seed", "00"), ("seed", "x"), ("identity", "xyz"), ("features", [0]),
])
def test_a_manifest_with_nonsense_under_a_right_checksum(sealed: str, name: str, value: object) -> None:
    manifest_with(sealed, lambda manifest: manifest.update({name: value}))
    refused(sealed)


@pytest.mark.parametrize("name", ["number", "chunk", "capacity", "salt", "sealed", "end", "records", "first_version"])
@pytest.mark.parametrize("value", [-1, 0, 1 << 63, (1 << 64) - 1, 1 << 64, 10**18, "1", None, []])
def test_a_segment_with_nonsense_under_a_right_checksum(sealed: str, name: str, value: object) -> None:
    manifest_with(sealed, lambda manifest: manifest["segments"][1].update({name: value}))
    if (name, value) in [("salt", 0), ("records", 0), *((name, value) for name in ("number", "first_version")
                                                        for value in (0, 1 << 63, (1 << 64) - 1, 10**18))]:
        assert not logkv.verify(sealed).ok
    else:
        refused(sealed)


def refused(path: str) -> None:
    report = logkv.verify(path)
    assert [problem.file for problem in report.problems] == ["MANIFEST"]
    for flag in "rwcn":
        with pytest.raises(logkv.CorruptionError, match="MANIFEST"):
            logkv.open(path, flag)


def test_many_problems_are_counted_and_not_all_listed(path: str) -> None:
    with logkv.open(path) as db:
        for number in range(4000):
            db[f"{number:04d}"] = b"x" * 16
    file = segments(path)[0]
    data = bytearray(file.read_bytes())
    for number in range(0, 4000, 2):
        data[data.index(b"%04d" % number + b"x" * 16) + 9] ^= 1
    file.write_bytes(data)
    report = logkv.verify(path)
    assert len(report.problems) == 1001 and report.problems[-1].message == "1,000 more problems are not listed"


def test_a_writer_that_died_before_its_last_record_was_in_the_index(
        path: str, in_child: Callable[[Callable[[], None]], int]) -> None:
    def die() -> None:
        db = logkv.open(path)
        for number in range(100):
            db[f"{number}"] = b"x"
        index = Path(path, "index")
        before = index.read_bytes()
        db["7"] = b"last"
        change(index, 0, before)
        os._exit(0)

    assert in_child(die) == 0
    report = logkv.verify(path)
    assert report.ok and "died" in report.notes[0]
    with logkv.open(path) as db:
        assert db["7"] == b"last" and db.verify().ok and not db.verify().notes


@pytest.mark.parametrize("index", [True, False])
def test_the_segment_that_is_appended_to_is_missing(sealed: str, index: bool) -> None:
    segments(sealed)[-1].unlink()
    segments(sealed)[-1].unlink()
    if not index:
        os.unlink(Path(sealed, "index"))
        with pytest.raises(logkv.CorruptionError, match="missing"):
            logkv.Reader(sealed)
    report = logkv.verify(sealed)
    assert not report.ok and "missing" in str(report)


def test_the_report_says_what_to_do_next(sealed: str) -> None:
    report = logkv.verify(sealed)
    assert report.advice == "" and str(report).startswith(f"{sealed} is whole: ")
    data = Path(sealed, "control").read_bytes()
    change(Path(sealed, "control"), 1024)
    report = logkv.verify(sealed)
    assert "nothing is lost" in report.advice and report.advice in str(report)
    Path(sealed, "control").write_bytes(data)
    change(segments(sealed)[0], 200)
    report = logkv.verify(sealed)
    assert "backup" in report.advice and "logkv repair" in report.advice and str(report.problems[0]) in str(report)


@pytest.mark.parametrize("how", ["missing", "damaged", "garbage"])
def test_without_a_manifest_the_segments_are_read(sealed: str, how: str) -> None:
    whole = logkv.verify(sealed)
    if how == "missing":
        os.unlink(Path(sealed, "MANIFEST"))
    elif how == "damaged":
        change(Path(sealed, "MANIFEST"), 200)
    else:
        Path(sealed, "MANIFEST").write_bytes(b"something else")
    first = segments(sealed)[0]
    change(first, first.read_bytes().index(b"key 20") + 1)
    report = logkv.verify(sealed)
    assert [problem.file for problem in report.problems] == ["MANIFEST"]
    assert report.records == whole.records - 1 and first.name in report.notes[0]


def test_a_segment_of_another_store(sealed: str, tmp_path: Path) -> None:
    logkv.open(tmp_path / "other").close()
    segments(sealed)[1].write_bytes(segments(str(tmp_path / "other"))[0].read_bytes())
    assert segments(sealed)[1].name in {problem.file for problem in logkv.verify(sealed).problems}
