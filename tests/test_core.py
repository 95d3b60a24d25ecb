"""The parts below the handles: checksums, the hash, records, key order."""

from __future__ import annotations

import random
import subprocess
import sys

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
