"""Engine and baseline, one format: each reads what the other wrote, and the same records are the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

import logkv
from benchmarks import baseline
from benchmarks.baseline import BaselineStore, crc32c, read_log, read_manifest, siphash13
from logkv import _core
from logkv.errors import CorruptionError, FormatError
from logkv.manifest import Manifest

SMALL = 64 << 10
SIZES = (0, 1, 7, 8, 9, 100, 3000, 4095, 4096, 4097, 9000)

Model = dict[bytes, bytes]
Mapping = MutableMapping[bytes, bytes]
Opener = Callable[[Path], AbstractContextManager[Mapping]]


def engine(path: Path, flag: str = "c") -> AbstractContextManager[Mapping]:
    return logkv.open(path, flag, segment_size=SMALL)


@contextmanager
def twin(path: Path, flag: str = "c") -> Iterator[Mapping]:
    with BaselineStore(path, flag, segment_size=SMALL, footers=True) as store:
        yield store


def work(store: Mapping, model: Model, rng: random.Random, steps: int, giant: int = 0) -> None:
    """Puts, overwrites, deletes and sync marks, with keys and values around all limits."""
    for step in range(steps):
        key = rng.choice((b"", b"\0", b"k" * 65535, *(b"key %d" % n for n in range(80))))
        if rng.random() < 0.2:
            assert (store.pop(key, None) is None) == (model.pop(key, None) is None)
        else:
            store[key] = model[key] = rng.randbytes(giant if giant and step == steps // 2 else rng.choice(SIZES))
        if rng.random() < 0.05:
            store.sync()  # type: ignore[attr-defined]


def contents(path: Path) -> tuple[Model, Model]:
    """What the engine and what the baseline read."""
    with logkv.open(path, "r") as ours, BaselineStore(path, "r", footers=True) as theirs:
        return dict(ours.items()), dict(theirs.items())


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def segments(path: Path) -> list[baseline.Segment]:
    """The segments as the baseline finds them, their records counted."""
    with ExitStack() as files:
        log = baseline.open_log(path, read_manifest(path), os.O_RDONLY, files)
        baseline.replay(log, lambda *_: None)
        files.pop_all()
    return log


# ---- whole stores


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("write", [engine, twin])
def test_each_reads_what_the_other_wrote(tmp_path: Path, write: Opener, seed: int) -> None:
    rng, model, path = random.Random(seed), Model(), tmp_path / "s"
    with write(path) as store:
        work(store, model, rng, 150, giant=200_000)
        if seed % 2:
            store.clear()
            model.clear()
            work(store, model, rng, 100)
        assert dict(store.items()) == model
    assert contents(path) == (model, model)
    listed = read_manifest(path)["segments"]
    assert [entry["sealed"] for entry in listed][:2] == [True, True]
    assert max(entry["capacity"] for entry in listed) > SMALL or seed % 2
    with engine(path, "w") as store:
        assert dict(store.items()) == model


class Plain(dict[bytes, bytes]):
    def sync(self) -> None:
        """Nothing to do."""


def killed(path: Path, write: Opener, steps: int) -> Model:
    """A child works on a store and kills itself; returns what it had stored."""
    if (pid := os.fork()) == 0:
        try:
            with write(path) as store:
                work(store, {}, random.Random(steps), steps)
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    model = Model()
    work(Plain(), model, random.Random(steps), steps)
    return model


@pytest.mark.parametrize("steps", range(20, 200, 30))
@pytest.mark.parametrize("write", [engine, twin])
def test_what_a_kill_leaves_is_read_by_the_other(tmp_path: Path, write: Opener, steps: int) -> None:
    path = tmp_path / "s"
    model = killed(path, write, steps)
    assert contents(path) == (model, model)
    for taker, other in ((engine, twin), (twin, engine)):
        copy, more = Path(shutil.copytree(path, tmp_path / f"taken by {taker.__name__}")), model.copy()
        with taker(copy) as taken:
            assert dict(taken.items()) == model
            work(taken, more, random.Random(1), 30)
        with other(copy) as taken:
            assert dict(taken.items()) == more
        assert read_manifest(copy)["cuts"] == []


@pytest.mark.parametrize("first", [engine, twin])
def test_writers_in_turn(tmp_path: Path, first: Opener) -> None:
    rng, model, path = random.Random(7), Model(), tmp_path / "s"
    turns = [engine, twin] if first is engine else [twin, engine]
    for turn in range(12):
        with turns[turn % 2](path) as store:
            assert dict(store.items()) == model
            if turns[turn % 2] is engine:
                assert isinstance(store, logkv.Store)
                assert turn == 0 or store.stats()["recovery"]["index"] == "rebuilt"
            if turn == 7:
                store.clear()
                model.clear()
            work(store, model, rng, 40)
        assert (path / "index").exists() == (turns[turn % 2] is engine)
        assert contents(path) == (model, model)
    versions = [version for version, *_ in read_log(path)]
    assert versions == sorted(versions)


def test_an_index_from_before_is_not_believed_after_a_kill(tmp_path: Path) -> None:
    """Nor where the program that wrote the log was killed, in the same boot, with the engine's control page there."""
    path = tmp_path / "s"
    with engine(path) as store:
        store[b"a"] = b"1"
    store = BaselineStore(path, segment_size=SMALL)
    store[b"a"], store[b"b"] = b"2", b"3"
    store._files.close()
    assert contents(path) == ({b"a": b"2", b"b": b"3"},) * 2
    with engine(path) as store:
        assert dict(store.items()) == {b"a": b"2", b"b": b"3"}


@pytest.mark.parametrize("write", [engine, twin])
def test_a_torn_tail_is_cut_alike(tmp_path: Path, write: Opener) -> None:
    path = tmp_path / "s"
    with write(path) as store:
        store[b"a"] = b"1"
        store.sync()  # type: ignore[attr-defined]
        store[b"b"] = b"2" * 50
        copy = Path(shutil.copytree(path, tmp_path / "copy"))
    record = read_log(copy)[-1]
    assert record[1:] == (baseline.PUT, b"b", b"2" * 50)
    file = copy / "0000000001.seg"
    data = bytearray(file.read_bytes())
    data[data.index(b"2" * 50) + 20] ^= 1
    file.write_bytes(data)
    assert contents(copy) == ({b"a": b"1"},) * 2
    for taker in (engine, twin):
        again = Path(shutil.copytree(copy, tmp_path / f"taken by {taker.__name__}"))
        with taker(again) as store:
            store[b"c"] = b"3"
        assert contents(again) == ({b"a": b"1", b"c": b"3"},) * 2


@pytest.mark.parametrize("taker", [engine, twin])
def test_a_rotation_right_after_a_cut(tmp_path: Path, taker: Opener) -> None:
    """The first record of the successor bears the last version given out: the one kept, or what the cut raised it to."""
    path = tmp_path / "s"
    with twin(path) as store:
        store[b"a"] = b"1"
        store[b"torn"] = b"2" * 50
        store[b"lost"] = b"3"
        copy = Path(shutil.copytree(path, tmp_path / "copy"))
    file = copy / "0000000001.seg"
    file.write_bytes(file.read_bytes().replace(b"2" * 50, b"2" * 49 + b"9"))
    with taker(copy) as store:
        store[b"giant"] = bytes(100_000)
    assert contents(copy) == ({b"a": b"1", b"giant": bytes(100_000)},) * 2
    ((kept, following),) = read_manifest(copy)["cuts"]
    kept_record, continues, giant, *_ = read_log(copy)
    assert kept == kept_record[0] and following <= giant[0]
    assert kept <= continues[0] == struct.unpack("<3Q", continues[3])[2] < giant[0]


@pytest.mark.parametrize("synced", [False, True])
def test_the_end_of_a_segment_with_a_successor_is_lost(
    tmp_path: Path, synced: bool, begin_successor: Callable[[Path, bool], int]
) -> None:
    path = tmp_path / "s"
    lost = begin_successor(path, synced)
    assert contents(path) == ({b"kept": bytes(30_000), b"lost": bytes(30_000), b"next": b"1"},) * 2
    with open(path / "0000000001.seg", "r+b") as file:
        file.seek(lost)
        file.write(bytes(8))
    for taker in (engine, twin):
        again = Path(shutil.copytree(path, tmp_path / f"taken by {taker.__name__}"))
        if synced:  # refused
            before = snapshot(again)
            with pytest.raises((CorruptionError, baseline.BaselineError), match="damaged"), taker(again):
                pass
            log = [name for name in before if name.endswith(".seg") or name == "MANIFEST"]
            assert all(snapshot(again)[name] == before[name] for name in log)
        else:
            assert contents(again) == ({b"kept": bytes(30_000)},) * 2
            with taker(again) as taken:
                assert set(taken) == {b"kept"}
                taken[b"more"] = b"2"
            assert contents(again) == ({b"kept": bytes(30_000), b"more": b"2"},) * 2
            assert len(read_manifest(again)["cuts"]) == 1


def test_an_end_in_the_manifest_ends_an_unsealed_segment(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store = BaselineStore(path)
    store[b"a"] = b"1"
    end, version = store._log[0].end, store._version
    store[b"not copied"] = b"2"
    store._log[0].end, store._log[0].last_version = end, version
    store._add_segment(store._log[0])
    store[b"b"] = b"3"
    store._log[0].entry["end"] = end
    store._write_manifest()
    store._files.close()
    for taker in (twin, engine):
        again = Path(shutil.copytree(path, tmp_path / f"taken by {taker.__name__}"))
        assert contents(again) == ({b"a": b"1", b"b": b"3"},) * 2
        for key in (b"c", b"d"):
            with taker(again) as taken:
                taken[key] = b"4"
        assert contents(again) == ({b"a": b"1", b"b": b"3", b"c": b"4", b"d": b"4"},) * 2
        assert read_manifest(again)["cuts"] == []


def test_damage_below_a_sync_mark_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with twin(path) as store:
        store[b"a"], store[b"b"] = b"1" * 11, b"2" * 19
    file = path / "0000000001.seg"
    intact = file.read_bytes()
    for offset in range(64, 64 + 32 + 40, 3):
        file.write_bytes(intact[:offset] + bytes([intact[offset] ^ 1]) + intact[offset + 1 :])
        log = {name: data for name, data in snapshot(path).items() if name.endswith(".seg") or name == "MANIFEST"}
        for taker in (engine, twin):
            with pytest.raises((CorruptionError, baseline.BaselineError), match="damaged"), taker(path):
                pass
            assert log.items() <= snapshot(path).items()


def crafted(path: Path, craft: Callable[[BaselineStore], object]) -> None:
    """A store of one key, what `craft` does to it, and a kill."""
    store = BaselineStore(path, segment_size=SMALL)
    store[b"a"] = b"1"
    craft(store)
    store._files.close()


def lower_version(store: BaselineStore) -> None:
    store._write(baseline.PUT, b"b", b"2", store._version - 1)


def equal_version(store: BaselineStore) -> None:
    store._write(baseline.PUT, b"b", b"2", store._version)


def unlisted_footer(store: BaselineStore) -> None:
    store._log[-1].seal(store._manifest)


def torn_value(store: BaselineStore) -> None:
    """The checksum of header and key is right, that of a long value is not."""
    offset = store._log[-1].end
    store[b"b"] = bytes(5000)
    os.pwrite(store._log[-1].fd, b"\1", offset + 3000)


def needless_flag(store: BaselineStore) -> None:
    """Under a right checksum, but a value so short has none of its own."""
    append(store.path, baseline.PUT, baseline.FLAG_OWN_CRC, bytes(4))


@pytest.mark.parametrize("craft", [lower_version, equal_version, unlisted_footer, torn_value, needless_flag])
def test_what_ends_the_log(tmp_path: Path, craft: Callable[[BaselineStore], object]) -> None:
    crafted(tmp_path / "s", craft)
    for taker in (engine, twin):
        path = Path(shutil.copytree(tmp_path / "s", tmp_path / f"taken by {taker.__name__}"))
        assert contents(path) == ({b"a": b"1"},) * 2
        with taker(path) as store:
            assert dict(store) == {b"a": b"1"}
            store[b"c"] = b"3"
        assert contents(path) == ({b"a": b"1", b"c": b"3"},) * 2


def test_padding_is_not_checked(tmp_path: Path) -> None:
    path = tmp_path / "s"

    def craft(store: BaselineStore) -> None:
        os.pwrite(store._log[-1].fd, b"\xff", store._log[-1].end - 1)
        store[b"b"] = b"2"

    crafted(path, craft)
    assert contents(path) == ({b"a": b"1", b"b": b"2"},) * 2


def test_features(tmp_path: Path) -> None:
    """Compatible ones are passed over, read-compatible ones by readers."""
    path = tmp_path / "s"
    with engine(path) as store:
        store[b"a"] = b"1"
    for features, taken in (([0, 8, 0], False), ([8, 0, 0], True)):
        (path / "MANIFEST").write_bytes(baseline.encode_manifest(read_manifest(path) | {"features": features}))
        assert contents(path) == ({b"a": b"1"},) * 2
        before = snapshot(path)
        for taker in (engine, twin):
            if taken:
                with taker(path) as store:
                    assert dict(store) == {b"a": b"1"}
            else:
                with pytest.raises((FormatError, baseline.BaselineError), match="features"), taker(path):
                    pass
                assert snapshot(path) == before


# ---- byte for byte


def test_records(tmp_path: Path) -> None:
    rng = random.Random(3)
    entry = dict.fromkeys(baseline.SEGMENT_FIELDS, 0)
    (tmp_path / "0000000000.seg").touch()
    segment = baseline.Segment(tmp_path, entry, os.O_RDONLY)
    keys = (b"", b"k", b"seven 7", b"eight 88", bytes(65535))
    for kind in (*range(baseline.PUT, baseline.BATCH), baseline.FOOTER):
        for key in keys:
            for size in (*SIZES, 100_000):
                value = rng.randbytes(size)
                version, segment.salt, segment.end = rng.getrandbits(64), rng.getrandbits(32), rng.getrandbits(36) & ~7
                ours = _core.encode_record(kind, version, key, value, segment.salt, segment.end)
                assert ours == segment.encode(version, kind, key, value)
                assert len(ours) == baseline.record_size(len(key), size)
    segment.close()


def test_headers_and_hashes(tmp_path: Path) -> None:
    rng = random.Random(4)
    with engine(tmp_path / "s"):
        manifest = read_manifest(tmp_path / "s")
        (segment,) = segments(tmp_path / "s")
        identity, seed = int(manifest["identity"], 16), bytes.fromhex(manifest["seed"])
        header = _core.encode_segment_header(1, identity, seed, segment.salt)
        assert header == segment.header(manifest) == segment.map[:64]
        segment.close()
    for length in (0, 1, 7, 8, 9, 15, 16, 63, 64, 255, 256, 1000):
        data = rng.randbytes(length)
        assert _core.key_hash(seed, data) == siphash13(seed, data)
        assert _core.checksum(data) == _core.checksum(data, software=True) == crc32c(data)
        assert _core.checksum(data, 5) == crc32c(data, 5)


@pytest.mark.parametrize("write", [engine, twin])
def test_footers(tmp_path: Path, write: Opener) -> None:
    """A sealed segment's footer is what the baseline and what the engine make of its records."""
    path, sealed = tmp_path / "s", 0
    with write(path) as store:
        work(store, {}, random.Random(5), 200)
    manifest = Manifest.decode((path / "MANIFEST").read_bytes(), "MANIFEST", writable=True)
    log = _core.Log(None, manifest.identity, manifest.seed, False)
    for segment, listed in zip(segments(path), manifest.segments, strict=True):
        if listed.sealed:
            sealed += 1
            log.map_segment(segment.fd, segment.number, listed.chunk, listed.capacity, segment.size, segment.salt)
            record, *_ = _core.build_footer(log, listed.chunk, segment.end)
            assert record == segment.footer(read_manifest(path))
            assert record == segment.map[segment.end : segment.end + len(record)]
        segment.close()
    log.close()
    assert sealed > 2


def test_manifest(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with engine(path) as store:
        work(store, {}, random.Random(6), 100)
    for _ in range(2):
        data = (path / "MANIFEST").read_bytes()
        ours, theirs = Manifest.decode(data, "MANIFEST", writable=True), read_manifest(path)
        (tmp_path / "MANIFEST").write_bytes(ours.encode())
        assert read_manifest(tmp_path) == theirs
        assert Manifest.decode(baseline.encode_manifest(theirs), "MANIFEST", writable=True) == ours
        for segment in ours.segments:
            totals = (segment.end, segment.records, segment.first_version, segment.last_version)
            assert segment.sealed or totals == (None, 0, 0, 0)
        with twin(path):
            pass


def test_sizes(tmp_path: Path) -> None:
    """The numbers of docs/format.md."""
    assert (_core.FORMAT, baseline.FORMAT) == (0, 0)
    assert (_core.PAGE, baseline.PAGE) == (4096, 4096)
    assert (_core.SEGMENT_HEADER, baseline.HEADER.size) == (64, 64)
    assert (_core.SEGMENT_MIN, _core.SEGMENT_MAX) == (64 << 10, 1 << 30)
    assert (_core.CHUNK, _core.CHUNKS, _core.CHUNK_UNITS) == (16 << 20, 524_288, 21)
    assert _core.CHUNK * _core.CHUNKS == 8 << 40 == 8 << _core.CHUNK_UNITS + 19
    assert (_core.CONTINUES_SIZE, _core.MARK_SIZE, baseline.RECORD.size) == (48, 40, 20)
    assert (_core.FOOTER, _core.CLEAR) == (baseline.FOOTER, baseline.CLEAR) == (8, 4)
    assert (baseline.FOOTER_VALUE.size, baseline.FOOTER_ENTRY.size) == (32, 16)
    for write in (engine, twin):
        path = tmp_path / write.__name__
        with write(path) as store:
            store[b"a"] = b"1"
            assert (path / "0000000001.seg").stat().st_size == 32 << 10
            assert (path / "LOCK").read_text() == f"{os.getpid()}\n"
            store[b"b"] = bytes(32 << 10)
            assert (path / "0000000001.seg").stat().st_size == 64 << 10
    control = (tmp_path / "engine" / "control").read_bytes()
    assert len(control) == 4096 and control[:12] == b"LogKVctl" + bytes(4)
    clean, generation = struct.unpack_from("<Q", control, 24)[0], read_manifest(tmp_path / "engine")["generation"]
    assert clean == generation
    assert struct.unpack_from("<I", control, 12)[0] == crc32c(control[:12] + control[16:32] + control[136:])
    index = (tmp_path / "engine" / "index").read_bytes()
    identity = int(read_manifest(tmp_path / "engine")["identity"], 16)
    assert index[:12] == b"LogKVidx" + bytes(4)
    assert struct.unpack_from("<Q", index, 16)[0] == struct.unpack_from("<Q", control, 16)[0] == identity
    assert struct.unpack_from("<Q", index, 48)[0] * 4096 == len(index)


# ---- what a newer version wrote


def reseal_header(data: bytearray) -> None:
    data[60:64] = crc32c(bytes(data[:60])).to_bytes(4, "little")


def newer_manifest(path: Path) -> None:
    file = path / "MANIFEST"
    file.write_bytes(file.read_bytes().replace(b"LogKV MANIFEST 0", b"LogKV MANIFEST 1", 1))


def newer_features(path: Path) -> None:
    manifest = read_manifest(path) | {"features": [0, 0, 1]}
    (path / "MANIFEST").write_bytes(baseline.encode_manifest(manifest))


def newer_hash(path: Path) -> None:
    (path / "MANIFEST").write_bytes(baseline.encode_manifest(read_manifest(path) | {"hash": "newer"}))


def newer_options(path: Path) -> None:
    (path / "MANIFEST").write_bytes(baseline.encode_manifest(read_manifest(path) | {"options": {"shape": "newer"}}))


def newer_segment(path: Path) -> None:
    data = bytearray((path / "0000000001.seg").read_bytes())
    data[8] = 1
    reseal_header(data)
    (path / "0000000001.seg").write_bytes(data)


def newer_segment_features(path: Path) -> None:
    data = bytearray((path / "0000000001.seg").read_bytes())
    data[20] = 2
    reseal_header(data)
    (path / "0000000001.seg").write_bytes(data)


def append(path: Path, kind: int, flags: int, fields: bytes) -> None:
    """A record that only a newer version knows, where the log ends."""
    *_, segment = segments(path)
    head = baseline.RECORD.pack(0, 5, read_log(path)[-1][0] + 1, 3, kind, flags)[4:] + fields + b"keyvalue"
    head = head[: -5 if flags & baseline.FLAG_OWN_CRC else None]
    begin = segment.salt ^ segment.end >> 3
    with open(segment.path, "r+b") as file:
        file.seek(segment.end)
        file.write(crc32c(head, begin).to_bytes(4, "little") + head)
    segment.close()


def newer_kind(path: Path) -> None:
    append(path, baseline.DICTIONARY, 0, b"")


def newest_kind(path: Path) -> None:
    append(path, 9, 0, b"")


def newer_expiry(path: Path) -> None:
    append(path, baseline.PUT, baseline.FLAG_EXPIRY, bytes(range(8)))


def newer_codec(path: Path) -> None:
    append(path, baseline.PUT, baseline.FLAG_CODEC, bytes(range(4)))


MANIFESTS = [newer_manifest, newer_features, newer_hash, newer_options]
SEGMENTS = [newer_segment, newer_segment_features]
RECORDS = [newer_kind, newest_kind, newer_expiry, newer_codec]


@pytest.mark.parametrize("flag", "rwcn")
@pytest.mark.parametrize("change", MANIFESTS + SEGMENTS + RECORDS, ids=lambda change: change.__name__)
def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path, change: Callable[[Path], None], flag: str) -> None:
    path = tmp_path / "s"
    with engine(path) as store:
        store[b"a"] = b"1"
    (path / "index").unlink()  # so that the log is read
    change(path)
    if change in MANIFESTS:
        (path / "LOCK").write_text("1\n")  # of another process: that stays too
    before = snapshot(path)
    with pytest.raises(baseline.BaselineError, match="format|must know|hash and options|header: expected|not known"):
        BaselineStore(path, flag)
    assert snapshot(path) == before
    with pytest.raises(FormatError):
        logkv.open(path, flag).close()
    after = snapshot(path)
    if change in RECORDS:  # an index was begun to find out; the log stays as it was
        for name in ("control", "index.tmp"):
            before.pop(name, None), after.pop(name, None)
    assert after == before
