"""Any bytes in a store's files are read, or refused with one of LogKV's errors: what the fuzzer found, and a little of it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import logkv
from logkv.manifest import Manifest
from tests.proof import fuzz
from tests.proof.fuzz_targets import Open, manifest_bytes, snapshot

NOTE = 448                      # its offset in an index's first page; the state blocks are at 320 and 384


@pytest.mark.parametrize("target", ["manifest", "open", "import"])
def test_a_little(target: str, quick_dir: Path) -> None:
    """Without sanitizers, which take a minute to build: `make fuzz`, `make proof`."""
    result = fuzz.run(str(quick_dir), 60, executions=150, target=target, sanitized=False)
    assert result.findings == []
    assert result.executions == 150


@pytest.mark.parametrize("data", [
    manifest_bytes(b"[" * 100_000), manifest_bytes(b"9" * 5000), b"LogKV MANIFEST " + b"9" * 5000 + b" 00000000 0\n",
], ids=["nested", "endless number", "endless format"])
def test_manifests_that_no_writer_wrote(data: bytes) -> None:
    with pytest.raises(logkv.CorruptionError):
        Manifest.decode(data, "MANIFEST", writable=False)


@pytest.mark.parametrize("fields", [
    {"next_chunk": 0}, {"next_number": 1}, {"generation": (1 << 64) - 1}, {"epoch": 1 << 63},
], ids=str)
def test_numbers_that_leave_no_room_for_the_next(fields: dict[str, int], path: str) -> None:
    logkv.open(path).close()
    _, _, body = Path(path, "MANIFEST").read_bytes().partition(b"\n")
    Path(path, "MANIFEST").write_bytes(manifest_bytes(json.dumps(json.loads(body) | fields).encode()))
    with pytest.raises(logkv.CorruptionError):
        logkv.open(path)


@pytest.fixture
def killed(tmp_path: Path) -> Callable[[int, bytes], str]:
    """A store as a kill left it, whose index is believed, with other bytes at an offset of that."""

    def make(offset: int, data: bytes) -> str:
        target = Open(str(tmp_path), 1)
        path = str(tmp_path / "living.db")
        with logkv.open(path) as store:
            store.update({f"key {number}": "value" for number in range(20)})
            found = snapshot(path)
        index = bytearray(found["index"])
        index[offset:offset + len(data)] = data
        os.mkdir(target.path)
        for name, content in (found | {"index": bytes(index)}).items():
            Path(target.path, name).write_bytes(content)
        target.vouch()
        return target.path

    return make


def test_the_index_is_believed(killed: Callable[[int, bytes], str]) -> None:
    with logkv.open(killed(NOTE, bytes(8))) as store:
        assert store.stats()["recovery"]["index"] == "trusted" and len(store) == 20


def test_a_note_that_leads_out_of_the_store(killed: Callable[[int, bytes], str]) -> None:
    with logkv.open(killed(NOTE, struct.pack("<Q", 1 << 63))) as store:
        assert store["key 7"] == b"value"


def test_a_note_that_leads_to_no_segment(killed: Callable[[int, bytes], str]) -> None:
    with pytest.raises(logkv.CorruptionError):
        logkv.open(killed(NOTE, struct.pack("<Q", 7 << 21)))


@pytest.mark.parametrize("end", [(1 << 64) - 8, 1 << 62, 0, 101])
def test_a_log_that_ends_where_none_can(end: int, killed: Callable[[int, bytes], str]) -> None:
    path = killed(320 + 16, struct.pack("<Q", end))
    index = bytearray(Path(path, "index").read_bytes())
    struct.pack_into("<Q", index, 384 + 16, end)
    with open(os.path.join(path, "index"), "r+b") as file:
        file.write(index)
    with logkv.open(path) as store:
        assert store.stats()["recovery"]["index"] == "rebuilt" and len(store) == 20
        store["more"] = "value"
        assert store["more"] == b"value"


def test_a_version_that_has_no_next_one(killed: Callable[[int, bytes], str]) -> None:
    path = killed(320 + 24, struct.pack("<Q", (1 << 64) - 1))
    with open(os.path.join(path, "index"), "r+b") as file:
        file.seek(384 + 24)
        file.write(struct.pack("<Q", (1 << 64) - 1))
    with logkv.open(path) as store:
        assert store.stats()["recovery"]["index"] == "rebuilt"
        assert 0 < store.put("more", "value") < 1 << 63


def test_parts_of_an_index_that_share_pages(killed: Callable[[int, bytes], str]) -> None:
    with logkv.open(killed(64, struct.pack("<Q", 2 << 32 | 1))) as store:       # the rows where the directory is
        assert store.stats()["recovery"]["index"] == "rebuilt" and len(store) == 20


def test_a_directory_of_zeros(killed: Callable[[int, bytes], str]) -> None:
    """Each of its shards would be the page with the state, in which the next put would not stay."""
    with logkv.open(killed(2 << 12, bytes(8))) as store:
        assert store.stats()["recovery"]["index"] == "rebuilt" and len(store) == 20
        store["more"] = "value"
        assert store["more"] == b"value"


@pytest.mark.parametrize("name", ["MANIFEST", "index", "0000000001.seg"])
def test_a_long_file_with_nothing_in_it(name: str, path: str) -> None:
    with logkv.open(path) as store:
        store["key"] = "value"
    os.truncate(os.path.join(path, name), 1 << 36)
    before = os.statvfs(path).f_bavail
    try:
        with logkv.open(path) as store:
            assert store["key"] == b"value"
    except logkv.CorruptionError:
        assert name == "MANIFEST"
    assert before - os.statvfs(path).f_bavail < 1 << 20, "gigabytes were allocated"
