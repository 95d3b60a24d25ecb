"""The places of records that are gone are given out again, by the next opening for writing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import logkv
from benchmarks.baseline import BaselineStore, encode_manifest, read_manifest
from logkv import manifest

SEGMENT = 65_536
LAST = 524_288                  # chunks in all
VALUE = bytes(6_000)


@pytest.fixture
def path(quick_dir: Path) -> str:
    return str(quick_dir / "prices.db")


@pytest.fixture
def few_locations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store is at its end after 16 segments."""
    monkeypatch.setattr(manifest, "CHUNKS", 16)


def at_the_end(path: str, model: dict[bytes, bytes]) -> None:
    """A closed store with these pairs in several segments, which own the last locations that there are."""
    with logkv.open(path, segment_size=SEGMENT, compaction="manual") as db:
        db.update(model)
    found = read_manifest(path)
    assert len(found["segments"]) > 3
    for segment in found["segments"]:
        segment["chunk"] += LAST - found["next_chunk"]
    found["next_chunk"] = LAST
    found["generation"] += 1
    Path(path, "MANIFEST").write_bytes(encode_manifest(found))


def pairs(count: int = 60) -> dict[bytes, bytes]:
    return {b"key %d" % n: b"%d " % n + VALUE for n in range(count)}


def test_free_locations_are_given_out_anew(path: str) -> None:
    model = pairs()
    at_the_end(path, model)
    with logkv.Reader(path) as before:
        assert dict(before) == model
    for _ in range(2):
        with logkv.open(path, segment_size=SEGMENT) as db:
            assert dict(db) == model
            db[b"more"] = model[b"more"] = b"1"
            assert db.verify().ok
    said = read_manifest(path)
    assert said["moves"] == said["epoch"] == 1 and said["next_chunk"] < 20
    with BaselineStore(path, "r") as other:
        assert dict(other) == model


def test_an_attached_reader_follows(path: str) -> None:
    model = pairs()
    at_the_end(path, model)
    with logkv.Reader(path) as reader:
        assert dict(reader) == model
        with logkv.open(path, segment_size=SEGMENT) as db:
            assert dict(reader) == model
            db[b"more"] = model[b"more"] = b"1"
            db[b"key 7"] = model[b"key 7"] = b"2"
            assert dict(reader) == model and [reader[key] for key in (b"more", b"key 7")] == [b"1", b"2"]
        assert dict(reader) == model


@pytest.mark.parametrize("view", ["keys", "values", "items"])
def test_an_iterator_that_was_open_says_so(path: str, view: str) -> None:
    """It cannot know which keys of a shard it has given already."""
    model = pairs()
    at_the_end(path, model)
    with logkv.Reader(path) as reader:
        begun: Iterator[object] = iter(getattr(reader, view)())
        next(begun)
        with logkv.open(path, segment_size=SEGMENT):
            reader.get(b"key 1")
            for _ in range(2):
                with pytest.raises(logkv.Error, match="anew, while this iterator was open"):
                    next(begun)
            assert len(list(getattr(reader, view)())) == len(model)


def test_an_iterator_that_has_gone_on_is_no_older_one(path: str) -> None:
    """It was between two shards when locations were given out anew, and in one when the store was emptied."""
    model = pairs()
    at_the_end(path, model)
    with logkv.Reader(path) as reader:
        begun = iter(reader)
        with logkv.open(path, segment_size=SEGMENT) as db:
            assert next(begun) in model
            db.clear()
            assert list(begun) == []


def test_an_iterator_goes_on_where_the_store_was_emptied(path: str) -> None:
    with logkv.open(path) as db, logkv.Reader(path) as reader:
        db.update(pairs(3))
        begun = iter(reader)
        next(begun)
        db.clear()
        assert list(begun) == []


def test_a_store_without_locations_says_so_and_opens_again(path: str, few_locations: None) -> None:
    model = {}
    with logkv.open(path, segment_size=SEGMENT, compaction="manual") as db:
        with pytest.raises(logkv.Error, match="all 0 TiB of locations have been given out.*the store is full"):
            for n in range(1000):
                db[b"key"] = value = b"%d " % n + VALUE
                model[b"key"] = value
        assert dict(db) == model
        with pytest.raises(logkv.Error, match="locations have been given out"):
            db.compact()
        assert dict(db) == model
    with logkv.open(path, segment_size=SEGMENT, compaction="manual") as db:
        assert dict(db) == model and db.verify().ok


def test_what_goes_on_for_ever_does_with_an_opening_now_and_then(path: str, few_locations: None) -> None:
    moves = 0
    for n in range(40):
        with logkv.open(path, segment_size=SEGMENT, compaction="manual") as db:
            assert db.get(b"key") == (b"%d " % (n - 1) + VALUE if n else None)
            for _ in range(11):
                db[b"key"] = b"%d " % n + VALUE
            db.compact()
            assert dict(db) == {b"key": b"%d " % n + VALUE} and db.verify().ok
        moves = read_manifest(path)["moves"]
    assert moves >= 3


def test_a_damaged_store_keeps_the_locations_that_its_index_has(path: str) -> None:
    model = pairs()
    with logkv.open(path, segment_size=SEGMENT, compaction="manual") as db:
        db.update(model)
    with logkv.open(path, segment_size=SEGMENT, compaction="manual") as db:
        missing = Path(path, sorted(name for name in os.listdir(path) if name.endswith(".seg"))[1])
    content = missing.read_bytes()
    missing.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest.Manifest, "is_crowded", True)
        with logkv.open(path, segment_size=SEGMENT, compaction="manual") as db:
            lost = 0
            for key in model:
                try:
                    assert db[key] == model[key]
                except logkv.CorruptionError:
                    lost += 1
            assert 0 < lost < len(model)
        missing.write_bytes(content)
        with logkv.open(path, segment_size=SEGMENT, compaction="manual") as db:
            assert dict(db) == model
