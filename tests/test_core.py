"""The parts below the handles: checksums, the hash, records, key order."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import tempfile
import time

import pytest

from logkv import _core


def test_checksum() -> None:
    """CRC-32C's check value, by hardware and by table, whole and in parts, at every length and alignment."""
    assert _core.checksum(b"123456789") == _core.checksum(b"123456789", software=True) == 0xE3069283
    data = memoryview(random.Random(1).randbytes(600))
    for start in range(9):
        for length in range(80):
            part = data[start:start + length]
            assert _core.checksum(part) == _core.checksum(part, software=True)
            assert _core.checksum(data[start + length:], _core.checksum(part)) == _core.checksum(data[start:])


def test_hash_is_siphash_1_3() -> None:
    """CPython hashes bytes with SipHash-1-3 too, and with PYTHONHASHSEED=0 its key is all zeros."""
    keys = [bytes(range(n)) for n in range(1, 40)]
    code = f"print([hash(k) % 2**64 for k in {keys!r}])"
    if sys.hash_info.algorithm == "siphash13":
        printed = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": "0"}, capture_output=True,
                                 text=True, check=True).stdout
        assert [_core.key_hash(bytes(16), key) for key in keys] == eval(printed)
    assert _core.key_hash(bytes(16), b"a") != _core.key_hash(b"\1" + bytes(15), b"a")
    with pytest.raises(ValueError, match="16 bytes"):
        _core.key_hash(b"short", b"a")


@pytest.mark.parametrize("key, value", [(b"", b""), (b"k", b"v"), (b"key", b"x" * 4_096), (b"key", b"x" * 4_097)])
def test_a_record_is_bound_to_its_place(key: bytes, value: bytes) -> None:
    """The same record elsewhere, or under another salt, has another checksum."""
    here = _core.encode_record(1, 7, key, value, 1234, 64)
    assert len(here) % 8 == 0 and len(here) >= 20 + len(key) + len(value)
    assert here[:4] != _core.encode_record(1, 7, key, value, 1234, 72)[:4]
    assert here[:4] != _core.encode_record(1, 7, key, value, 1235, 64)[:4]


def test_index_pages() -> None:
    """A new index has room for what it was made for, and little more."""
    assert _core.index_pages(0, 1) == 4
    for keys in (100, 1_000, 10_000, 100_000, 1_000_000, 20_000_000):
        assert 8 * keys < _core.index_pages(keys, 1) * _core.PAGE <= max(40 * keys, 4 * _core.PAGE)


def mapped(data: bytes, salt: int) -> _core.Log:
    """A log with these bytes as its segment."""
    log = _core.Log(None, 1, bytes(16), False)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        log.map_segment(file.fileno(), 1, 0, len(data), len(data), salt)
    return log


def all_whole(log: _core.Log) -> list[int]:
    found, at = [], _core.SEGMENT_HEADER
    while (whole := _core.next_whole(log, 0, at, 1 << 62)) is not None:
        found.append(whole)
        at = whole + 8
    return found


@pytest.mark.parametrize("key, value", [(65_535, 4_096), (65_535, 5_000), (60_001, 0), (5_003, 77), (300, 4_096),
                                        (20, 1)])
def test_a_search_finds_each_whole_record_among_what_looks_like_some(key: int, value: int) -> None:
    """Behind so much that checksums are made of others, too; records of all lengths, and none that is damaged."""
    rng = random.Random(key + value)
    data = bytearray(_core.SEGMENT_HEADER)
    claim = struct.pack("<HBBI", key, 1, 2 if value > 4_096 else 0, value)      # at each multiple of 8
    planted = []
    for version in range(1, 60):
        data += claim * rng.choice((1, 100, 30_000))
        if version % 7 == 0:
            data += bytes(8 * rng.randrange(20_000))
        record = _core.encode_record(1, version, rng.randbytes(rng.choice((1, 30, 3_000, key))),
                                     rng.randbytes(rng.choice((0, 9, 4_096, 4_097, 30_000))), 5, len(data))
        if version % 3 == 0:
            record = record[:20] + bytes((record[20] ^ 1,)) + record[21:]
        else:
            planted.append(len(data))
        data += record
    highest = version - (version % 3 == 0)
    log = mapped(bytes(data), 5)
    assert all_whole(log) == planted
    assert _core.find_record(log, 0, _core.SEGMENT_HEADER, highest - 1) == highest
    assert _core.find_record(log, 0, _core.SEGMENT_HEADER, highest) is None
    log.close()


def test_a_search_costs_no_more_for_the_lengths_that_are_claimed() -> None:
    """At each of the places a record may begin that is 8,000 times as long as what stands between them."""
    data = struct.pack("<HBBI", 65_535, 1, 0, 4_096) * (1 << 18)
    log = mapped(bytes(_core.SEGMENT_HEADER) + data, 5)
    began = time.process_time()
    assert _core.find_record(log, 0, _core.SEGMENT_HEADER, 0) is None
    searched = time.process_time() - began
    began = time.process_time()
    for _ in range(100):
        _core.checksum(data)
    assert searched < 20 * (time.process_time() - began)
    log.close()
