"""The baseline alone: what it writes it reads again, whatever a crash leaves of it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import baseline
from benchmarks.baseline import (
    CLEAR,
    CONTINUES,
    DELETE,
    FOOTER_ENTRY,
    FOOTER_VALUE,
    PUT,
    SYNC_MARK,
    BaselineError,
    BaselineStore,
    crc32c,
    read_log,
    read_manifest,
    siphash13,
)

SMALL = 64 << 10


def segment_file(path: Path, number: int = 1) -> Path:
    return path / f"{number:010d}.seg"


def snapshot(path: Path) -> dict[str, tuple[bytes, int]]:
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()}


def overwrite(file: Path, offset: int, data: bytes) -> None:
    with open(file, "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def crash(store: BaselineStore, copy: Path) -> Path:
    """What another process would find if this one were killed now."""
    return Path(shutil.copytree(store.path, copy))


def fill(store: BaselineStore, model: dict[bytes, bytes], count: int, seed: int = 1) -> None:
    """Puts, overwrites and deletes with values around all limits, in the store and in the model."""
    rng = random.Random(seed)
    for _ in range(count):
        key = b"key %d" % rng.randrange(100)
        if rng.random() < 0.2:
            assert store.delete(key) == (model.pop(key, None) is not None)
        else:
            value = rng.randbytes(rng.choice((0, 1, 7, 8, 100, 3000, 4096, 4097, 9000)))
            store[key] = model[key] = value


# ---- checksum and hash


def test_crc32c() -> None:
    assert crc32c(b"") == 0
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    data = random.Random(1).randbytes(50)
    for cut in range(len(data)):
        assert crc32c(data[cut:], crc32c(data[:cut])) == crc32c(data)


@pytest.mark.skipif(sys.hash_info.algorithm != "siphash13", reason="hash() is not SipHash-1-3 here")
def test_siphash13() -> None:
    keys = [b"abcdefghijklmnopqrst"[:length] for length in range(1, 21)]
    program = f"print([hash(key) & (1 << 64) - 1 for key in {keys!r}])"
    environment = os.environ | {"PYTHONHASHSEED": "0"}  # then its key is 16 bytes of zeros
    output = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True).stdout
    assert json.loads(output) == [siphash13(bytes(16), key) for key in keys]


def test_siphash13_takes_the_seed_as_two_little_endian_halves() -> None:
    # published with Rust's SipHasher13: the seed is 00 01 .. 0f, the keys are 0 to 3 bytes of the same
    expected = (0xABAC0158050FC4DC, 0xC9F49BF37D57CA93, 0x82CB9B024DC7D44D, 0x8BF80AB8E7DDF7FB)
    assert tuple(siphash13(bytes(range(16)), bytes(range(length))) for length in range(4)) == expected


# ---- the mapping


def test_roundtrip(tmp_path: Path) -> None:
    values = {b"": b"", b"a": b"1", b"k" * 65535: b"v", b"big": os.urandom(200_000), b"edge": bytes(4096)}
    values[b"own"] = bytes(4097)
    with BaselineStore(tmp_path / "s") as store:
        versions = [store.put(key, value) for key, value in values.items()]
        assert versions == sorted(set(versions))
        assert dict(store.items()) == values
    for check in (True, False):
        with BaselineStore(tmp_path / "s", "r", check=check) as store:
            assert dict(store.items()) == values
            assert len(store) == len(values) and b"a" in store and b"z" not in store
            with pytest.raises(KeyError):
                store[b"z"]


def test_text_is_utf8(tmp_path: Path) -> None:
    with BaselineStore(tmp_path / "s") as store:
        store["clé"] = "é"
        assert store["clé"] == store["clé".encode()] == "é".encode()
        store[b"buffer"] = bytearray(b"x")  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            store[b"number"] = 5  # type: ignore[arg-type]
        with pytest.raises(ValueError):
            store.put(b"k" * 65536, b"")


def test_overwrite_delete_clear_reopen(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with BaselineStore(path) as store:
        store[b"a"], store[b"a"], store[b"b"] = b"1", b"22", b"3"
        assert store.delete(b"b") and not store.delete(b"b")
        with pytest.raises(KeyError):
            del store[b"b"]
        assert dict(store) == {b"a": b"22"}
    with BaselineStore(path, "w") as store:
        assert dict(store) == {b"a": b"22"}
        store.clear()
        store[b"c"] = b"4"
    with BaselineStore(path, "r") as store:
        assert dict(store) == {b"c": b"4"}
    kinds = [kind for _, kind, _, _ in read_log(path)]
    assert kinds == [CONTINUES, CLEAR, PUT, SYNC_MARK]
    manifest = read_manifest(path)
    assert manifest["epoch"] == 1 and [segment["number"] for segment in manifest["segments"]] == [2]
    assert not segment_file(path).exists()


def test_flags(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for flag in "rw":
        with pytest.raises(BaselineError, match="no store"):
            BaselineStore(path, flag)
        assert not path.exists()
    BaselineStore(path, "c").close()
    with BaselineStore(path, "c") as store:
        store[b"a"] = b"1"
        with pytest.raises(BaselineError, match=f"in process {os.getpid()}"):
            BaselineStore(path, "w")
    with BaselineStore(path, "r") as store:
        with pytest.raises(BaselineError, match="not open for writing"):
            store[b"a"] = b"2"
        with pytest.raises(BaselineError, match="not open for writing"):
            store.delete(b"none")
    identity = read_manifest(path)["identity"]
    with BaselineStore(path, "n") as store:
        assert len(store) == 0
    assert read_manifest(path)["identity"] == identity and read_manifest(path)["epoch"] == 1
    with pytest.raises(ValueError):
        BaselineStore(path, "x")


def test_new_store_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store = BaselineStore(path)
    assert {file.name for file in path.iterdir()} == {"LOCK", "MANIFEST", "0000000001.seg"}
    assert (path / "LOCK").read_text() == f"{os.getpid()}\n"
    assert segment_file(path).stat().st_size == 32 << 10
    assert read_manifest(path)["generation"] == 1
    store[b"a"] = bytes(40_000)
    assert segment_file(path).stat().st_size == 64 << 10
    store.close()
    store.close()
    BaselineStore(path).close()
    assert read_manifest(path)["generation"] == 2


def test_reading_changes_nothing(tmp_path: Path) -> None:
    model: dict[bytes, bytes] = {}
    with BaselineStore(tmp_path / "s", segment_size=SMALL) as store:
        fill(store, model, 100)
        copy = crash(store, tmp_path / "copy")
    before = snapshot(copy)
    with BaselineStore(copy, "r", footers=True) as store:
        assert dict(store) == model
    assert read_log(copy)
    assert snapshot(copy) == before


def test_creation_that_did_not_finish(tmp_path: Path) -> None:
    path = tmp_path / "s"
    BaselineStore(path).close()
    (path / "MANIFEST").unlink()
    with BaselineStore(path) as store:
        store[b"a"] = b"1"
    (path / "MANIFEST").unlink()
    with pytest.raises(BaselineError, match="expected a MANIFEST"):
        BaselineStore(path)


# ---- crashes and damage


def test_torn_tail_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store = BaselineStore(path)
    model: dict[bytes, bytes] = {}
    states: list[tuple[int, int, dict[bytes, bytes]]] = [(64, 64, {})]  # where bytes that count end, padding, contents
    for key, value in ((b"a", b"1"), (b"bb", b"22222"), (b"a", b""), (b"c", b"x" * 30), (b"bb", None), (b"a", b"9")):
        begin = states[-1][1]
        if value is None:
            del store[key], model[key]
        else:
            store[key] = model[key] = value
        states.append((begin + 20 + len(key) + len(value or b""), store._log[-1].end, dict(model)))
    store._files.close()  # no sync mark
    intact, manifest = segment_file(path).read_bytes(), (path / "MANIFEST").read_bytes()
    for cut in range(64, states[-1][1] + 8):
        for garbage in (b"", b"\xa5" * 40):
            torn = intact[:cut] + garbage + bytes(len(intact) - cut - len(garbage))
            segment_file(path).write_bytes(torn)
            (path / "MANIFEST").write_bytes(manifest)
            _, kept, state = max(state for state in states if torn[: state[0]] == intact[: state[0]])
            with BaselineStore(path, "r") as store:
                assert dict(store) == state
            with BaselineStore(path, "w") as store:
                assert dict(store) == state
                assert segment_file(path).read_bytes() == torn[:kept] + bytes(len(torn) - kept)
                version = store.put(b"new", b"record")
            cuts = read_manifest(path)["cuts"]
            assert len(cuts) == any(torn[kept:])
            assert all(last < first <= version for last, first in cuts)
            with BaselineStore(path, "r") as store:
                assert dict(store) == state | {b"new": b"record"}


def test_damage_below_a_sync_mark_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with BaselineStore(path) as store:
        store[b"a"], store[b"b"] = b"1" * 11, b"2" * 19  # no padding: every byte counts
        end = store._log[-1].end
        store.sync()
    intact = segment_file(path).read_bytes()
    for offset in range(64, end):
        overwrite(segment_file(path), offset, bytes([intact[offset] ^ 1]))
        before = snapshot(path)
        for flag in "rw":
            with pytest.raises(BaselineError, match=r"damaged at \d+: expected records"):
                BaselineStore(path, flag)
        del before["LOCK"]
        assert {name: state for name, state in snapshot(path).items() if name != "LOCK"} == before
        overwrite(segment_file(path), offset, intact[offset : offset + 1])
    overwrite(segment_file(path), end, b"\xff")  # the mark itself: nothing is lost with it
    with BaselineStore(path, "w") as store:
        assert len(store) == 2


def test_damage_after_opening_is_noticed_by_a_checked_get(tmp_path: Path) -> None:
    with BaselineStore(tmp_path / "s") as store:
        store[b"a"] = b"1" * 11
        overwrite(segment_file(store.path), store._log[0].end - 1, b"2")
        with pytest.raises(BaselineError, match="expected a valid record of b'a' at 64"):
            store[b"a"]
        overwrite(segment_file(store.path), store._log[0].end - 1, b"1")


def test_a_record_is_no_record_elsewhere(tmp_path: Path) -> None:
    """A value that is itself a piece of a segment is not taken for records behind a torn one."""
    path = tmp_path / "s"
    with BaselineStore(path) as store:
        store[b"a"] = b"1"
        store.sync()
        piece = segment_file(path).read_bytes()[64:200]
        store[b"piece"] = piece
        copy = crash(store, tmp_path / "copy")
        torn = store._index[b"piece"][1]
    overwrite(segment_file(copy), torn, bytes(4))
    with BaselineStore(copy, "w") as store:
        assert dict(store) == {b"a": b"1"}


def test_what_is_unknown_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with BaselineStore(path) as store:
        store._write(baseline.DICTIONARY, b"", b"")
    with pytest.raises(BaselineError, match="kind 7 with flags 0 at 64 is not known"):
        BaselineStore(path)
    text = (path / "MANIFEST").read_text()
    for changed in (text.replace("MANIFEST 0", "MANIFEST 1"), text.replace("epoch", "epoxy"), text + " ", ""):
        (path / "MANIFEST").write_text(changed)
        with pytest.raises(BaselineError, match="MANIFEST: (format|first line): expected"):
            read_manifest(path)


def test_unknown_manifest_fields_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "s"
    BaselineStore(path).close()
    manifest = json.loads((path / "MANIFEST").read_bytes().partition(b"\n")[2])
    body = json.dumps(manifest | {"news": 1}).encode()
    (path / "MANIFEST").write_bytes(b"LogKV MANIFEST 0 %08x %d\n%s" % (crc32c(body), len(body), body))
    BaselineStore(path).close()
    assert b"news" not in (path / "MANIFEST").read_bytes()


# ---- segments


def test_rotation(tmp_path: Path) -> None:
    path = tmp_path / "s"
    model: dict[bytes, bytes] = {}
    with BaselineStore(path, segment_size=SMALL) as store:
        fill(store, model, 300)
        assert dict(store) == model
        store[b"giant"] = model[b"giant"] = os.urandom(SMALL * 3)
        fill(store, model, 20, seed=2)
    for _ in range(2):
        with BaselineStore(path, "w", segment_size=SMALL, footers=True) as store:
            assert dict(store) == model
    manifest, log = read_manifest(path), read_log(path)
    segments = manifest["segments"]
    assert len(segments) > 5
    assert [segment["sealed"] for segment in segments] == [True] * (len(segments) - 1) + [False]
    assert [segment["number"] for segment in segments] == list(range(1, manifest["next_number"]))
    assert [segment["chunk"] for segment in segments] == list(range(manifest["next_chunk"]))
    assert max(segment["capacity"] for segment in segments) == 64 + 48 + 20 + 4 + 5 + SMALL * 3 + 3
    assert [version for version, *_ in log] == sorted(version for version, *_ in log)
    for (before, *_), (version, kind, _, _) in zip(log, log[1:], strict=False):
        assert version == before if kind == CONTINUES else version > before
    assert sum(kind == CONTINUES for _, kind, _, _ in log) == len(segments) - 1
    for segment in segments[:-1]:
        assert segment["end"] <= segment["capacity"]


def test_footers(tmp_path: Path) -> None:
    path = tmp_path / "s"
    model: dict[bytes, bytes] = {}
    with BaselineStore(path, segment_size=SMALL) as store:
        fill(store, model, 200)
    manifest, log = read_manifest(path), read_log(path)
    seed = bytes.fromhex(manifest["seed"])
    for segment in manifest["segments"][:-1]:
        mine, log = log[: segment["records"]], log[segment["records"] :]
        assert (mine[0][0], mine[-1][0]) == (segment["first_version"], segment["last_version"])
        value = segment_file(path, segment["number"]).read_bytes()[segment["end"] :]
        length = int.from_bytes(value[4:8], "little")
        value = value[20 + (4 if length > 4096 else 0) :][:length]
        newest = {key: kind for _, kind, key, _ in mine if kind in (PUT, DELETE)}
        assert FOOTER_VALUE.unpack_from(value)[2:] == (len(mine), len(newest))
        entries = list(FOOTER_ENTRY.iter_unpack(value[FOOTER_VALUE.size :]))
        assert [(hashed, word >> 30) for hashed, _, word in entries] == [
            (siphash13(seed, key), kind) for key, kind in sorted(newest.items())
        ]
    first = manifest["segments"][0]
    overwrite(segment_file(path), first["end"] + 30, b"\xff")
    BaselineStore(path, "r").close()
    with pytest.raises(BaselineError, match="footer at"):
        BaselineStore(path, "r", footers=True)


def test_damage_in_a_sealed_segment_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with BaselineStore(path, segment_size=SMALL) as store:
        fill(store, {}, 100)
    for offset in (0, 9, 40, 5000):
        file = segment_file(path)
        intact = file.read_bytes()
        overwrite(file, offset, bytes([intact[offset] ^ 1]))
        with pytest.raises(BaselineError, match="expected .* found"):
            BaselineStore(path)
        file.write_bytes(intact)
    segment_file(path).unlink()
    with pytest.raises(BaselineError, match="expected by the MANIFEST, not found"):
        BaselineStore(path)


class Killed(Exception):
    """In place of a kill."""


def test_a_kill_in_a_rotation_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop before each fsync, write and rename of a rotation: every record that was put is there afterwards."""
    finished = False
    for stop in range(100):
        path = tmp_path / str(stop)
        store = BaselineStore(path, segment_size=SMALL)
        model = {b"%d" % n: bytes(6000) for n in range(10)}
        store.update(model)
        left = stop

        def countdown(name: str) -> None:
            function = getattr(os, name)

            def call(*arguments: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return function(*arguments)

            patch.setattr(os, name, call)

        with monkeypatch.context() as patch:
            for name in ("fsync", "pwrite", "replace", "posix_fallocate"):
                countdown(name)
            try:
                store[b"new"] = bytes(6000)
                finished = True
            except Killed:
                with pytest.raises((Killed, BaselineError)):
                    store[b"more"] = b""
        assert store[b"0"] == bytes(6000)
        store._files.close()
        for flag in "rww":
            with BaselineStore(path, flag, segment_size=SMALL, footers=True) as again:
                assert model.items() <= dict(again).items()
                if flag == "w":
                    again[b"after"] = model[b"after"] = bytes(6000)
        assert all(segment["sealed"] for segment in read_manifest(path)["segments"][:-1])
        if finished:
            break
    assert finished and stop > 10


@pytest.mark.parametrize("synced", [False, True])
def test_the_end_of_a_segment_with_a_successor_is_lost(
    tmp_path: Path, synced: bool, begin_successor: Callable[[Path, bool], int]
) -> None:
    """What the successor holds does not count then, unless a sync mark in it shows that it did."""
    path = tmp_path / "s"
    lost = begin_successor(path, synced)
    with BaselineStore(path, "r") as store:
        assert set(store) == {b"kept", b"lost", b"next"}
    overwrite(segment_file(path), lost, bytes(8))
    if synced:
        with pytest.raises(BaselineError, match="damaged at .* in segment 2"):
            BaselineStore(path)
        return
    with BaselineStore(path, "w", segment_size=SMALL) as store:
        assert set(store) == {b"kept"}
        assert not segment_file(path, 2).exists()
        store[b"more"] = b"2"
    assert read_manifest(path)["next_number"] == 3 and len(read_manifest(path)["cuts"]) == 1


def test_a_prepared_segment_is_not_begun(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store = BaselineStore(path, segment_size=SMALL)
    store[b"a"] = b"1"
    active = store._log.pop()
    store._add_segment(None)
    store._log.insert(0, active)
    store._write_manifest()
    store._files.close()
    for flag in "rw":
        with BaselineStore(path, flag, segment_size=SMALL) as store:
            assert dict(store) == {b"a": b"1"}
    assert [segment["number"] for segment in read_manifest(path)["segments"]] == [1]
    assert read_manifest(path)["cuts"] == []


def test_a_footer_that_the_manifest_does_not_know_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with BaselineStore(path) as store:
        store[b"a"] = b"1"
        store._log[-1].seal(store._manifest)
        copy = crash(store, tmp_path / "copy")
    with BaselineStore(copy) as store:
        assert dict(store) == {b"a": b"1"}
        store[b"b"] = b"2"
    with BaselineStore(copy, "r") as store:
        assert dict(store) == {b"a": b"1", b"b": b"2"}


def test_an_end_in_the_manifest_ends_an_unsealed_segment(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store = BaselineStore(path)
    store[b"a"] = b"1"
    end = store._log[0].end
    store[b"copied"] = b"2"
    store._log[0].end, store._log[0].last_version = end, read_log(path)[0][0]
    store._add_segment(store._log[0])
    store[b"copied"] = b"2"
    store._log[0].entry["end"] = end
    store._write_manifest()
    store._files.close()
    for flag in "rww":
        with BaselineStore(path, flag, footers=True) as store:
            assert dict(store) == {b"a": b"1", b"copied": b"2"}
    assert [kind for _, kind, _, _ in read_log(path)] == [PUT, CONTINUES, PUT]
    assert read_manifest(path)["segments"][0]["sealed"] and read_manifest(path)["cuts"] == []


def test_an_index_is_removed_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "s"
    BaselineStore(path).close()
    (path / "index").write_bytes(b"of another program")
    BaselineStore(path, "r").close()
    assert (path / "index").exists()
    generation = read_manifest(path)["generation"]
    BaselineStore(path).close()
    assert not (path / "index").exists() and read_manifest(path)["generation"] == generation + 1


def test_what_is_cut_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store = BaselineStore(path)
    kept = store.put(b"a", b"1")
    end = store._log[0].end
    store[b"b"] = b"2" * 12  # no padding
    store[b"c"] = b"3" * 11
    stop = store._log[0].end
    store._files.close()
    overwrite(segment_file(path), end, bytes([segment_file(path).read_bytes()[end] ^ 1]))
    cut = segment_file(path).read_bytes()[end:stop]
    BaselineStore(path).close()
    (aside,) = (path / "lost+found").iterdir()
    assert aside.name == f"0000000001.seg.{end}-{stop}.{kept}" and aside.read_bytes() == cut
    assert not segment_file(path).read_bytes()[end:].strip(b"\0")
