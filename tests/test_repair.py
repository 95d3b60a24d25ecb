"""Repair keeps what is intact, says what is lost, and lets nothing stale come back."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import logkv
from benchmarks.baseline import DELETE, MAX_COVERED, PUT
from logkv import files, manifest
from logkv.opening import Options
from tests.proof import repairs
from tests.proof.common import NOISE, SEGMENT
from tests.proof.repairs import Change, Sample, Written, content, cut, cut_power, damage, flip, judge, tree, zeros
from tests.proof.session import engine_of, merge, open_store, rotate


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample(tmp_path_factory.mktemp("plain") / "store")


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample(tmp_path_factory.mktemp("little") / "store", steps=600)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return Sample(tmp_path_factory.mktemp("merged") / "store", merges=2)


def repaired(path: Path, original: Sample) -> logkv.RepairReport:
    """Repairs a damaged copy, and holds what comes of it against what is intact there."""
    damaged = tree(path)
    report = logkv.repair(path)
    assert judge(path, original, report, damaged) == []
    if report.changed:
        assert str(path) in str(report) and report.ok == ("nothing was lost" in str(report))
        for loss in report.lost:
            assert str(loss) in str(report)
            assert all((path / name).exists() for name in loss.saved)
    before = tree(path)
    again = logkv.repair(path)
    assert again.ok and not again.changed and tree(path) == before
    with logkv.open(path) as db:
        db["key 1"] = "written after the repair"
        assert db["key 1"] == b"written after the repair"
    assert logkv.verify(path).ok
    return report


def missing(data: bytes) -> None:
    return None


def last_of(sample: Sample, file: str, kind: int = PUT, own: bool = False) -> Written:
    """A record that is its key's newest, in this file."""
    return next(record for record in sample.newest.values() if record.file == file and record.kind == kind
                and (len(record.value) > MAX_COVERED) == own)


# -- each kind of damage ------------------------------------------------------------------------------------------


def test_a_whole_store_is_not_changed(sample: Sample, quick_dir: Path) -> None:
    path = sample.copy(quick_dir / "copy")
    before = tree(path)
    report = logkv.repair(path)
    assert report.ok and not report.changed and "nothing was changed" in str(report)
    assert report.keys == len(sample.content()) and report.records > 0
    assert tree(path) == before


@pytest.mark.parametrize("place", ["value", "key", "header of a record", "long value", "sector"])
@pytest.mark.parametrize("where", ["sealed", "active"])
@pytest.mark.parametrize("index", [True, False])
def test_damaged_records(sample: Sample, quick_dir: Path, place: str, where: str, index: bool) -> None:
    file = sample.sealed[-1] if where == "sealed" else sample.active
    record = last_of(sample, file, own=place == "long value")
    at = {"value": record.stop - 1, "key": record.stop - len(record.value) - 1, "header of a record": record.start + 4,
          "long value": record.stop - 100, "sector": record.start}[place]
    change = zeros(at // 512 * 512, at // 512 * 512 + 512) if place == "sector" else flip(at)
    path = sample.copy(quick_dir / "copy", **{file[:-4]: change}, **({} if index else {"index": missing}))
    report = repaired(path, sample)
    assert not report.ok and report.rewritten == [file]
    loss = report.lost[0]
    assert loss.file == file and loss.start <= at < loss.end and loss.why
    assert (path / loss.saved[0]).read_bytes() == change(sample.files[file])[loss.start:loss.end]
    assert str(loss) in (path / "lost+found" / "repair.txt").read_text()
    if where == "active" and place != "long value":
        assert loss.others is None and "may show older values" in str(loss)
    elif place in ("value", "long value"):
        assert loss.keys == [record.key] and loss.others == 0 and repr(record.key) in str(loss)


def test_a_lost_key_whose_older_value_is_intact_is_absent_and_that_value_can_be_had(sample: Sample, quick_dir: Path) -> None:
    history = {key: [r for r in sample.log if r.key == key] for key in sample.newest}
    before, record = next(each[-2:] for each in history.values() if len(each) > 1 and each[-1].file == sample.sealed[-1]
                          and each[-2].file != each[-1].file and each[-2].kind == each[-1].kind == PUT)
    path = sample.copy(quick_dir / "copy", **{record.file[:-4]: flip(record.stop - len(record.value) - 1)})     # its key
    report = repaired(path, sample)
    assert report.lost[0].keys == [record.key] and report.lost[0].older == 1
    saved = next(name for name in report.lost[0].saved if name.endswith(".older"))
    (quick_dir / "older").mkdir()
    shutil.copy(path / saved, quick_dir / "older" / record.file)     # it is a segment
    logkv.repair(quick_dir / "older")
    assert content(quick_dir / "older") == {record.key: before.value}


def test_a_lost_delete_stays_deleted(sample: Sample, quick_dir: Path) -> None:
    record = next(r for r in sample.newest.values() if r.kind == DELETE and r.file in sample.sealed)
    path = sample.copy(quick_dir / "copy", **{record.file[:-4]: flip(record.stop - 1)})
    report = repaired(path, sample)
    assert report.ok and "nothing that counts was lost" in " ".join(report.notes)
    assert record.key not in content(path)


def test_what_was_overwritten_later_is_no_loss(sample: Sample, quick_dir: Path) -> None:
    old = next(r for r in sample.log if r.file == sample.sealed[0] and sample.newest[r.key].file != r.file)
    path = sample.copy(quick_dir / "copy", **{old.file[:-4]: flip(old.stop - 1)})
    assert repaired(path, sample).ok


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("place", ["header", "footer"])
def test_header_and_footer_are_made_anew(sample: Sample, quick_dir: Path, place: str, index: bool) -> None:
    for number, file in enumerate([sample.sealed[1], *([sample.active] if place == "header" else [])]):
        at = 20 if place == "header" else len(sample.files[file].rstrip(b"\0")) - 30
        path = sample.copy(quick_dir / str(number), **{file[:-4]: flip(at)}, **({} if index else {"index": missing}))
        report = repaired(path, sample)
        assert report.ok and report.rewritten == [file]
        assert content(path) == sample.content() | {b"key 1": b"written after the repair"}


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("where", ["sealed", "active"])
@pytest.mark.parametrize("how", ["missing", "empty", "cut short", "another file", "another segment"])
def test_a_segment_that_is_not_there(sample: Sample, quick_dir: Path, how: str, where: str, index: bool) -> None:
    file = sample.sealed[1] if where == "sealed" else sample.active
    change: dict[str, Change] = {"missing": missing, "empty": lambda data: b"", "cut short": cut(9_000),
                                 "another file": lambda data: NOISE[:70_000],
                                 "another segment": lambda data: sample.files[sample.sealed[0]]}
    path = sample.copy(quick_dir / "copy", **{file[:-4]: change[how]}, **({} if index else {"index": missing}))
    report = repaired(path, sample)
    assert not report.ok and {loss.file for loss in report.lost} == {file} and report.lost[0].others is None


@pytest.mark.parametrize("name", ["index", "control"])
def test_index_and_control_page(sample: Sample, quick_dir: Path, name: str) -> None:
    path = sample.copy(quick_dir / "copy", control=flip(1024) if name == "control" else bytes)
    if name == "index":                 # in a copy of a store that was closed the index is believed
        data = bytearray((path / name).read_bytes())
        for at in range(8192, len(data), 8):
            data[at] ^= 1
        (path / name).write_bytes(data)
    report = repaired(path, sample)
    assert report.ok and report.changed and name in " ".join(report.notes) and not report.rewritten


def test_a_lock_file_with_garbage(sample: Sample, quick_dir: Path) -> None:
    path = sample.copy(quick_dir / "copy", LOCK=lambda data: NOISE[:5000], **{sample.sealed[0][:-4]: flip(70)})
    repaired(path, sample)


@pytest.mark.parametrize("how", ["missing", "empty", "flipped", "first byte", "garbage", "cut"])
@pytest.mark.parametrize("which", ["sample", "merged"])
def test_the_manifest_is_made_of_the_segments(request: pytest.FixtureRequest, quick_dir: Path, which: str, how: str) -> None:
    store: Sample = request.getfixturevalue(which)
    change: dict[str, Change] = {"missing": missing, "empty": lambda data: b"", "flipped": flip(300), "first byte": flip(0),
                                 "garbage": lambda data: NOISE[:2000], "cut": cut(400)}
    path = store.copy(quick_dir / "copy", MANIFEST=change[how])
    with pytest.raises(logkv.CorruptionError, match="logkv repair"):
        logkv.open(path)
    report = repaired(path, store)
    assert report.ok and not report.rewritten
    assert content(path) == store.content() | {b"key 1": b"written after the repair"}
    if how not in ("missing", "empty"):
        assert any((path / "lost+found").glob("MANIFEST.*"))
    assert any("encoded with" in note for note in report.notes) == (how not in ("flipped", "first byte", "cut"))


def test_the_codec_is_read_in_a_damaged_manifest(quick_dir: Path) -> None:
    with logkv.open(quick_dir / "store", codec="json") as db:
        db["a"] = [1, 2]
    file = quick_dir / "store" / "MANIFEST"
    file.write_bytes(flip(len(file.read_bytes()) - 9)(file.read_bytes()))
    assert logkv.repair(quick_dir / "store").ok
    with logkv.open(quick_dir / "store", codec="json") as db:
        assert db["a"] == [1, 2]


def test_a_segment_whose_header_is_damaged_beside_the_manifest(sample: Sample, quick_dir: Path) -> None:
    file = sample.sealed[1]
    path = sample.copy(quick_dir / "copy", MANIFEST=flip(300), **{file[:-4]: flip(20)})
    assert repaired(path, sample).ok            # its salt can still be read there
    path = sample.copy(quick_dir / "other", MANIFEST=missing, **{file[:-4]: flip(20)})
    report = repaired(path, sample)
    assert {loss.file for loss in report.lost} == {file} and (path / "lost+found" / file).exists()


def test_a_segment_that_is_missing_beside_the_manifest(sample: Sample, quick_dir: Path) -> None:
    for number, change in enumerate((missing, flip(300))):
        path = sample.copy(quick_dir / str(number), MANIFEST=change, **{sample.sealed[1][:-4]: missing})
        assert {loss.file for loss in repaired(path, sample).lost} == {sample.sealed[1]}


@pytest.mark.parametrize("size", [0, 16, 64])
@pytest.mark.parametrize("alone", [True, False])
def test_a_segment_of_a_header_alone_and_a_damaged_manifest(sample: Sample, quick_dir: Path, size: int, alone: bool) -> None:
    """What the MANIFEST still tells of it does not make it one without records."""
    path = quick_dir / "copy"
    if alone:
        with logkv.open(path) as db:
            db["key"] = "value"
    else:
        sample.copy(path)
    file = path / ("0000000001.seg" if alone else sample.sealed[1])
    data = (path / "MANIFEST").read_bytes()
    (path / "MANIFEST").write_bytes(flip(data.index(b'"generation": ') + 14)(data))
    os.truncate(file, size)
    report = logkv.repair(path)
    assert file.name in {loss.file for loss in report.lost} and logkv.verify(path).ok
    if not alone:
        assert set(content(path).items()) <= {(record.key, record.value) for record in sample.log}


def test_an_older_manifest(quick_dir: Path) -> None:
    store, path = Sample(quick_dir / "store", steps=300), quick_dir / "store"
    old = (path / "MANIFEST").read_bytes()
    with open_store(path, "w", Options(segment_size=SEGMENT, compaction="manual", background=False)) as db:
        for number in range(300):
            db[f"later {number}"] = NOISE[:1000]
        expected = dict(db)
    (path / "MANIFEST").write_bytes(old)
    report = logkv.verify(path)
    assert not report.ok and "MANIFEST" in {problem.file for problem in report.problems}
    assert logkv.repair(path).ok and content(path) == expected and len(expected) > len(store.content())
    assert logkv.verify(path).ok


def test_a_manifest_that_lies(sample: Sample, quick_dir: Path) -> None:
    path = sample.copy(quick_dir / "copy")
    directory = files.Directory(str(path))
    found = manifest.read(directory)
    assert found is not None
    first, second, third, *_ = found[0].segments
    first.salt ^= 1
    second.records, second.last_version = 7, 8
    assert third.end is not None
    third.end += 8
    (path / "MANIFEST").write_bytes(found[0].encode())
    directory.close()
    report = repaired(path, sample)
    assert report.ok and content(path) == sample.content() | {b"key 1": b"written after the repair"}


def test_the_manifest_of_another_store(sample: Sample, quick_dir: Path) -> None:
    logkv.open(quick_dir / "other", codec="json").close()
    path = sample.copy(quick_dir / "copy", MANIFEST=lambda data: (quick_dir / "other" / "MANIFEST").read_bytes())
    report = repaired(path, sample)
    assert report.ok and any("another store" in note for note in report.notes)


# -- files that are longer than what is in them ---------------------------------------------------------------------

LONG = 1 << 40
ROOM = 32 << 20                 # bytes that a store may come to take meanwhile
LIMITED = """if True:
    import resource, sys
    import logkv
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))     # or all of a long file could be allocated
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))                   # or all of it read
    path, other, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
"""
USED = """
    assert logkv.verify(path).ok
    with logkv.Reader(path) as reader:
        assert len(dict(reader)) == count and reader.stats()["keys"] == count
        reader.backup(other)
    assert logkv.verify(other).ok
    with logkv.open(path, compaction="manual") as db:
        for number in range(200):
            db["new"] = bytes(1000)         # goes on in the next segment
        db.sync()
        db.compact()
    with logkv.open(path) as db:
        assert len(db) == count + 1
    assert not logkv.repair(path).changed
"""
REPAIRED = """
    assert not logkv.verify(path).ok
    report = logkv.repair(path)
    assert report.ok and report.changed and report.keys == count, report
"""


def taken(path: Path) -> int:
    """Bytes that the files below a directory take on the device."""
    total = 0
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):
            total += file.lstat().st_blocks * 512
    return total


def within_room(path: Path, code: str, keys: int) -> None:
    """Runs code with a store, in a process that is ended when the files there and beside it take too much room."""
    with subprocess.Popen([sys.executable, "-c", LIMITED + code, path, path.parent / "other", str(keys)],
                          stderr=subprocess.PIPE, text=True) as process:
        while True:
            try:
                _, said = process.communicate(timeout=0.05)
                break
            except subprocess.TimeoutExpired:
                if taken(path.parent) > ROOM:
                    process.kill()
    assert process.returncode == 0, said
    assert taken(path.parent) < ROOM, "a hole was filled"


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("end", [b"", b"far away"])
@pytest.mark.parametrize("which", ["sealed", "active", "last", "all", "index", "control", "LOCK"])
def test_long_files_take_no_room(sample: Sample, quick_dir: Path, which: str, end: bytes, index: bool) -> None:
    """As an error of the file system may leave them: with a wrong size, and perhaps a block at the end."""
    if which in ("index", "control") and not index:
        return
    segments = [name for name in sorted(sample.files) if name.endswith(".seg")]
    chosen = {"sealed": sample.sealed[:1], "active": [sample.active], "last": segments[-1:],
              "all": segments}.get(which, [which])
    for garbage in (False, True):
        place = quick_dir / str(garbage)
        place.mkdir()
        path = sample.copy(place / "store", **({} if index else {"index": missing, "control": missing}),
                           **({"MANIFEST": lambda data: NOISE[:300]} if garbage else {}))
        for name in chosen:
            os.truncate(path / name, LONG - len(end))
            with open(path / name, "ab") as file:
                file.write(end)
        repair = garbage or which == "index"
        within_room(path, REPAIRED + USED if repair else USED, len(sample.content()))


def test_a_lone_long_segment_and_no_manifest(quick_dir: Path) -> None:
    path = quick_dir / "store"
    with logkv.open(path) as db:
        db.update({f"key {number}": "value" for number in range(100)})
    os.truncate(path / "0000000001.seg", LONG)
    (path / "MANIFEST").write_bytes(NOISE[:300])
    within_room(path, REPAIRED + USED, 100)


@pytest.mark.parametrize("what", ["header", "record", "footer", "other", "MANIFEST"])
def test_what_is_set_aside_of_a_long_file_takes_no_room(sample: Sample, quick_dir: Path, what: str) -> None:
    first, second = sample.sealed[:2]
    data = sample.files[first]
    change = {"header": flip(20), "record": flip(300), "footer": flip(len(data.rstrip(b"\0")) - 30),
              "other": lambda data: sample.files[second], "MANIFEST": bytes}[what]
    path = sample.copy(quick_dir / "store", **{first[:-4]: change})
    os.truncate(path / (what if what == "MANIFEST" else first), LONG)
    within_room(path, """
    logkv.repair(path)
    assert logkv.verify(path).ok
""", 0)
    aside = [file for file in (path / "lost+found").iterdir() if file.suffix == ".damaged"]
    assert len(aside) == 1 and aside[0].stat().st_size < 2 * len(data)
    after = change(sample.files["MANIFEST" if what == "MANIFEST" else first])
    assert after is not None and aside[0].read_bytes().rstrip(b"\0") in after


def test_a_record_that_ends_in_a_hole(quick_dir: Path) -> None:
    """As a copy leaves it that makes holes of zeros: they are the value's."""
    path = quick_dir / "store"
    with logkv.open(path, segment_size=64 << 20) as db:
        db["a"], db["long"] = "1", bytes(40 << 20)
    (path / "MANIFEST").unlink()
    file = path / "0000000001.seg"
    head = file.read_bytes()[:4096]
    with open(file, "wb") as out:
        out.write(head)
        out.truncate(64 << 20)
    assert logkv.repair(path).ok
    assert content(path) == {b"a": b"1", b"long": bytes(40 << 20)}


# -- merges -------------------------------------------------------------------------------------------------------


@pytest.fixture
def merging(quick_dir: Path) -> tuple[Path, dict[str, bytes], dict[bytes, bytes]]:
    """A store in which `deleted` was deleted and a merge has removed put and delete; the files that were merged; what it
    holds."""
    path = quick_dir / "store"
    db = open_store(path, "c", Options(segment_size=SEGMENT, compaction="manual", background=False))
    db["before"] = "1"
    rotate(db)
    db.update({"deleted": "back again", "kept": "1", "filler": NOISE[:5000]})
    rotate(db)
    del db["deleted"]
    db["more"] = NOISE[:5000]
    rotate(db)
    db["last"] = "1"
    before = {file.name: file.read_bytes() for file in path.glob("*.seg")}
    merge(db, 1, 2)
    expected = dict(db)
    db.close()
    gone = {name: data for name, data in before.items() if not (path / name).exists()}
    assert len(gone) == 2 and b"deleted" not in expected
    return path, gone, expected


@pytest.mark.parametrize("left", ["all", "first", "second", "none"])
@pytest.mark.parametrize("lost", [True, False])
def test_leftovers_of_a_merge_bring_nothing_back(merging: tuple[Path, dict[str, bytes], dict[bytes, bytes]], left: str,
                                                 lost: bool) -> None:
    path, gone, expected = merging
    for at, (name, data) in enumerate(sorted(gone.items())):
        if left == "all" or left == ("first", "second")[at]:
            (path / name).write_bytes(data)
    if lost:
        (path / "MANIFEST").unlink()
    else:
        first = sorted(path.glob("*.seg"))[0]
        first.write_bytes(flip(20)(first.read_bytes()))
    report = logkv.repair(path)
    assert report.ok and content(path) == expected and logkv.verify(path).ok


def test_a_merge_that_is_not_whole_is_made_good_by_what_was_merged(
        merging: tuple[Path, dict[str, bytes], dict[bytes, bytes]]) -> None:
    path, gone, expected = merging
    output = max(path.glob("*.seg"))
    for name, data in gone.items():
        (path / name).write_bytes(data)
    output.write_bytes(flip(100)(output.read_bytes()))
    (path / "MANIFEST").unlink()
    assert logkv.repair(path).ok
    assert content(path) == expected


@pytest.mark.parametrize("which", ["output", "inputs", "both"])
def test_damage_while_a_merge_is_under_way(quick_dir: Path, which: str) -> None:
    """The MANIFEST names both sides."""
    path = quick_dir / "store"
    db = open_store(path, "c", Options(segment_size=SEGMENT, compaction="manual", background=False))
    for number in range(4):
        db.update({f"{number}/{key}": NOISE[:2000] for key in range(10)})
        del db[f"{number}/0"]
        rotate(db)
    db["last"] = "1"
    expected = dict(db)
    engine = engine_of(db)
    copied = quick_dir / "copied"
    engine.compactor._drop = lambda run: shutil.copytree(path, copied)      # type: ignore[method-assign, assignment]
    merge(db, 1, 2)
    db.close()
    *inputs, output = [segment.name for segment in engine.manifest.segments
                       if segment.replaced_by or segment.number in {s.replaced_by for s in engine.manifest.segments}]
    assert len(inputs) == 2
    for name in {"output": [output], "inputs": inputs, "both": [inputs[0], output]}[which]:
        file = copied / name
        file.write_bytes(flip(file.read_bytes().index(NOISE[:2000]))(file.read_bytes()))
    (copied / "index").unlink()
    report = logkv.repair(copied)
    lost = {key for loss in report.lost for key in loss.keys}
    assert len(lost) == (which == "both") and logkv.verify(copied).ok
    assert content(copied) == {key: value for key, value in expected.items() if key not in lost}
    assert (copied / "lost+found" / inputs[1]).exists() == (which == "both")


def test_a_prepared_segment_whose_header_is_damaged(quick_dir: Path) -> None:
    path = quick_dir / "store"
    with open_store(path, "c", Options(segment_size=SEGMENT, compaction="manual", background=False)) as db:
        db["a"] = "1"
        engine_of(db)._prepare()
    last = max(path.glob("*.seg"))
    last.write_bytes(flip(20)(last.read_bytes()))
    report = logkv.repair(path)
    assert report.changed and report.ok and content(path) == {b"a": b"1"}


# -- who else is there --------------------------------------------------------------------------------------------


def test_a_store_that_is_being_written_is_refused(sample: Sample, quick_dir: Path) -> None:
    path = sample.copy(quick_dir / "copy")
    with logkv.open(path):
        with pytest.raises(logkv.LockedError, match="in this process"):
            logkv.repair(path)
        code = "import logkv, sys\ntry: logkv.repair(sys.argv[1])\nexcept logkv.LockedError as p: sys.exit(p.pid % 200)"
        assert subprocess.run([sys.executable, "-c", code, path]).returncode == os.getpid() % 200
    assert not logkv.repair(path).changed


def test_what_is_no_store_is_refused(quick_dir: Path) -> None:
    with pytest.raises(logkv.NotFoundError):
        logkv.repair(quick_dir / "none")
    (quick_dir / "notes.txt").write_text("mine")
    with pytest.raises(logkv.FormatError):
        logkv.repair(quick_dir)
    assert [file.name for file in quick_dir.iterdir()] == ["notes.txt"]


def test_readers_follow(sample: Sample, quick_dir: Path) -> None:
    """One that has read everything, one that has read nothing yet: both see what is intact, and what comes after."""
    record = last_of(sample, sample.sealed[1])
    path = sample.copy(quick_dir / "copy", **{record.file[:-4]: flip(record.stop - 1)})
    expected = {key: value for key, value in sample.content().items() if key != record.key}
    with logkv.Reader(path) as seasoned:
        for key, value in expected.items():
            assert seasoned[key] == value
        code = """if True:
            import logkv, sys
            with logkv.Reader(sys.argv[1]) as reader:
                print(flush=True)
                for line in sys.stdin:
                    print(repr(dict(reader) if line == "all\\n" else reader.get(line[:-1])), flush=True)
        """
        with subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True, bufsize=1) as other:
            assert other.stdin is not None and other.stdout is not None
            other.stdout.readline()

            def ask(what: str) -> Any:
                other.stdin.write(what + "\n")      # type: ignore[union-attr]
                return eval(other.stdout.readline())    # type: ignore[union-attr]

            assert logkv.repair(path).lost[0].keys == [record.key]
            assert ask("all") == expected
            assert dict(seasoned) == expected and record.key not in seasoned
            with logkv.open(path) as db:
                db["new"] = "1"
                assert ask("new") == b"1" and seasoned["new"] == b"1"
            other.stdin.close()
        assert other.returncode == 0


def test_a_file_that_a_backup_shares_is_not_touched(sample: Sample, quick_dir: Path) -> None:
    record = last_of(sample, sample.sealed[1])
    path = sample.copy(quick_dir / "copy", **{record.file[:-4]: flip(record.stop - 1)})
    backup = quick_dir / "backup"
    backup.mkdir()
    for name in sample.sealed:
        os.link(path / name, backup / name)
    before = tree(backup)
    repaired(path, sample)
    assert tree(backup) == before


# -- damage at random, and repairs that are interrupted --------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("which", ["sample", "merged"])
def test_damage_at_random(request: pytest.FixtureRequest, quick_dir: Path, which: str, seed: int) -> None:
    store: Sample = request.getfixturevalue(which)
    repaired(store.copy(quick_dir / "copy", **damage(store, random.Random(seed))), store)


class _Killed:
    """`os`, as `logkv.files` sees it: the process ends at one of the calls that change something, or the call fails."""

    CHANGING = ("open", "mkdir", "rename", "unlink", "fsync", "fdatasync", "pwrite", "posix_fallocate", "ftruncate")

    def __init__(self, at: int, fails: bool) -> None:
        self.left = at
        self.fails = fails              # once, in place of the end

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.CHANGING:
            return real

        def call(*arguments: Any, **more: Any) -> Any:
            self.left -= 1
            if self.left == -1:
                if self.fails:
                    raise OSError(errno.EIO, "injected")
                os._exit(7)
            return real(*arguments, **more)

        return call


def broken(sample: Sample, path: Path, with_manifest: bool) -> Path:
    """A store with damage in a sealed segment, in the active one, and perhaps without its MANIFEST."""
    sealed = last_of(sample, sample.sealed[1])
    active = last_of(sample, sample.active, own=True)
    return sample.copy(path, **{sealed.file[:-4]: flip(sealed.stop - 1), active.file[:-4]: flip(active.stop - 1)},
                       **({} if with_manifest else {"MANIFEST": missing}))


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_interrupted_at_every_call_and_run_again(little: Sample, quick_dir: Path, in_child: Callable[..., int],
                                                 with_manifest: bool, fails: bool) -> None:
    whole = broken(little, quick_dir / "whole", with_manifest)
    lost = {key for loss in logkv.repair(whole).lost for key in loss.keys}
    expected, aside = content(whole), set(tree(whole / "lost+found")) - {"repair.txt"}
    assert len(lost) == 2
    template = broken(little, quick_dir / "template", with_manifest)
    at = status = 0
    while status != 0 or at == 0:
        path = quick_dir / "copy"
        shutil.copytree(template, path)

        def work() -> None:
            files.os = _Killed(at, fails)   # type: ignore[assignment, attr-defined]
            try:
                logkv.repair(path)
            except logkv.Error:
                assert fails
            if files.os.left < 0:           # type: ignore[attr-defined]
                os._exit(7)

        status = in_child(work)
        assert status in (0, 7)
        report = logkv.repair(path)
        assert {key for loss in report.lost for key in loss.keys} in ([lost] if report.lost else [set()])
        assert content(path) == expected and logkv.verify(path).ok
        found = tree(path / "lost+found")
        assert aside <= set(found) and b"key" in found["repair.txt"]
        shutil.rmtree(path)
        at += 1
    assert at > 50


@pytest.mark.parametrize("with_manifest", [True, False])
def test_power_cuts(little: Sample, quick_dir: Path, with_manifest: bool) -> None:
    path = broken(little, quick_dir / "recorded", with_manifest)
    states, violations = cut_power(path, quick_dir / "left", random.Random(3), 60)
    assert states >= 30 and violations == []


def test_the_proof_runs() -> None:
    result = repairs.run(60, cases=12, seed=2)
    assert result.damages == 12 and result.cuts > 10 and result.violations == []


# -- the command line ---------------------------------------------------------------------------------------------


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "logkv", *map(str, words)], capture_output=True, text=True)


def test_the_command(sample: Sample, quick_dir: Path) -> None:
    record = last_of(sample, sample.sealed[1])
    changes = {record.file[:-4]: flip(record.stop - 1)}
    path = sample.copy(quick_dir / "copy", **changes)
    done = run("verify", path)
    assert done.returncode == 1 and "logkv repair" in done.stdout and "backup" in done.stdout
    done = run("repair", path)
    assert (done.returncode, done.stderr) == (1, "")
    assert record.file in done.stdout and repr(record.key) in done.stdout and "is whole again" in done.stdout
    done = run("repair", path)
    assert (done.returncode, done.stdout) == (0, f"{path} is whole: nothing was changed\n")

    report = json.loads(run("repair", sample.copy(quick_dir / "other", **changes), "--json").stdout)
    assert report["ok"] is False and report["keys"] == len(sample.content()) - 1
    assert [(loss["file"], loss["keys"]) for loss in report["lost"]] == [(record.file, [{"key": record.key.decode()}])]
    done = run("repair", sample.copy(quick_dir / "third", index=lambda data: data[:4096] + bytes(len(data) - 4096)))
    assert done.returncode == 0 and "nothing was lost" in done.stdout
    done = run("repair", quick_dir / "none")
    assert done.returncode == 2 and "no store" in done.stderr
