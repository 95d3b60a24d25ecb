"""LogKV's format in pure Python, with a dict for the index.

Written from docs/format.md alone: it proves that the page is complete, is an oracle for tests, and the
baseline for benchmarks. It reads and writes the log and ignores what only makes opening quick (`control`
and `index`): every open scans the whole log. Linux, one thread; a reader sees the store as it was when opened.
A writer removes `index` before it writes anything, and its MANIFEST is of the next generation: no index is believed
that does not know what was written here.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import re
import secrets
import struct
import sys
import time
from array import array
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple, Self

StrPath = str | os.PathLike[str]
Manifest = dict[str, Any]

# Segment header: magic, format, hash; 3 feature masks; number, identity; seed; salt; crc32c of all before.
HEADER = struct.Struct("<8sHH 3I QQ 16s I I")
assert HEADER.size == (8 + 2 + 2) + 3 * 4 + 2 * 8 + 16 + 4 + 4 == 64
MAGIC, FORMAT, SIPHASH_1_3 = b"LogKVseg", 0, 1
FEATURES, FEATURES_AT = struct.Struct("<3I"), 12

# Record: checksum, length of value, version, length of key, kind, flags; [u32 checksum of value]; key; value.
RECORD = struct.Struct("<IIQHBB")
assert RECORD.size == 4 + 4 + 8 + 2 + 1 + 1 == 20
END, PUT, DELETE, CONTINUES, CLEAR, SYNC_MARK, BATCH, DICTIONARY, FOOTER = range(9)
FLAG_EXPIRY, FLAG_OWN_CRC, FLAG_CODEC = 1, 2, 4
MAX_COVERED = 4096  # a longer value has a checksum of its own

U32 = struct.Struct("<I")
SYNC_MARK_VALUE = struct.Struct("<2Q")  # file number, offset
CONTINUES_VALUE = struct.Struct("<3Q")  # number, end, last version of the segment before
FOOTER_VALUE = struct.Struct("<4Q")  # first version, last version, records, entries
FOOTER_ENTRY = struct.Struct("<QII")  # hash, offset / 8, size / 8 | kind << 30
assert FOOTER_ENTRY.size == 8 + 4 + 4 == 16

MANIFEST_LINE = "LogKV MANIFEST 0 %08x %d\n"
FIELDS = ["identity", "seed", "hash", "features", "options", "generation", "epoch", "moves", "next_number", "next_chunk"]
FIELDS += ["last_version", "cuts", "cut_bytes", "segments"]
TOTALS = "sealed end records first_version last_version tombstones".split()
SEGMENT_FIELDS = ["number", "chunk", "capacity", "salt", *TOTALS, "merged", "replaced_by"]
CHUNK, STEP_MIN, STEP_MAX, PAGE = 16 << 20, 32 << 10, 16 << 20, 4096
FLOCK = struct.Struct("@hhqqi4x")  # type, whence, start, length, pid


class BaselineError(Exception):
    """The store is not there, in use, damaged, or in a format that is not known here."""


def _expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise BaselineError(f"{what}: expected {expected!r}, found {found!r}")


def _must_know(where: Path, features: Sequence[int], writing: bool) -> None:
    _, read_compatible, incompatible = features
    _expect(f"{where}: features that one must know", (incompatible, read_compatible * writing), (0, 0))


# What becomes of the CRC's register after one more byte of zeros, if it has 8 bits; after two or four, if 16.
_ONE = list(range(256))
for _ in range(8):
    _ONE = [value >> 1 ^ (0x82F63B78 if value & 1 else 0) for value in _ONE]
_TWO = array("I", range(1 << 16))
for _ in range(2):
    _TWO = array("I", [_ONE[value & 255] ^ value >> 8 for value in _TWO])
_FOUR = array("I", [_TWO[value & 0xFFFF] ^ value >> 16 for value in _TWO])
assert sys.byteorder == "little" and _TWO.itemsize == 4  # crc32c() takes words as the host has them


def crc32c(data: bytes, begin: int = 0) -> int:
    """CRC-32C of `data`, continued from `begin`."""
    crc = begin ^ 0xFFFFFFFF
    two, four = _TWO, _FOUR
    whole = len(data) & ~3
    for word in memoryview(data)[:whole].cast("I"):
        crc ^= word
        crc = four[crc & 0xFFFF] ^ two[crc >> 16]
    for byte in data[whole:]:
        crc = _ONE[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def siphash13(seed: bytes, key: bytes) -> int:
    """SipHash-1-3 of `key` under the 16 bytes of `seed`."""
    mask = (1 << 64) - 1
    k0, k1 = struct.unpack("<2Q", seed)
    a, b, c, d = k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573
    padded = key + bytes(7 - len(key) % 8) + bytes([len(key) & 255])
    words = struct.unpack(f"<{len(padded) // 8}Q", padded)
    for position, word in enumerate((*words, 0, 0, 0)):  # one round for each word, three at the end
        if position == len(words):
            c ^= 0xFF
        d ^= word
        a, c = a + b & mask, c + d & mask
        b, d = (b << 13 | b >> 51) & mask ^ a, (d << 16 | d >> 48) & mask ^ c
        a = (a << 32 | a >> 32) & mask
        a, c = a + d & mask, c + b & mask
        b, d = (b << 17 | b >> 47) & mask ^ c, (d << 21 | d >> 43) & mask ^ a
        c = (c << 32 | c >> 32) & mask
        a ^= word
    return int(a ^ b ^ c ^ d)


class Record(NamedTuple):
    """A record, and from where to where it lies in its file."""

    offset: int
    end: int
    version: int
    kind: int
    key: bytes
    value: bytes


def record_size(key: int, value: int) -> int:
    """How many bytes a record fills whose key and value have these lengths."""
    return RECORD.size + (U32.size if value > MAX_COVERED else 0) + key + value + 7 & ~7


CONTINUES_SIZE, MARK_SIZE = record_size(0, CONTINUES_VALUE.size), record_size(0, SYNC_MARK_VALUE.size)
assert (CONTINUES_SIZE, MARK_SIZE) == (48, 40)


class Segment:
    """A segment's file, and what the records that were found in it or written to it add up to."""

    def __init__(self, directory: Path, entry: Manifest, flags: int) -> None:
        self.entry, self.number, self.salt = entry, entry["number"], entry["salt"]
        self.end, self.records, self.first_version, self.last_version = HEADER.size, 0, 0, 0
        self.newest: dict[bytes, tuple[int, int]] = {}  # key -> what the footer's entry says behind the hash
        self.path = directory / f"{self.number:010d}.seg"
        try:
            self.fd = os.open(self.path, flags, 0o644)
        except FileNotFoundError:
            raise BaselineError(f"{self.path}: expected by the MANIFEST, not found") from None
        self._map()

    def _map(self) -> None:
        self.size = os.fstat(self.fd).st_size
        self.map = mmap.mmap(self.fd, 0, prot=mmap.PROT_READ) if self.size else mmap.mmap(-1, 1)

    def close(self) -> None:
        """Close the file and its map."""
        self.map.close()
        os.close(self.fd)

    def header(self, manifest: Manifest, features: tuple[int, ...] = (0, 0, 0)) -> bytes:
        """The header of this segment in the store of that MANIFEST."""
        identity, seed = int(manifest["identity"], 16), bytes.fromhex(manifest["seed"])
        fields = (MAGIC, FORMAT, SIPHASH_1_3, *features, self.number, identity, seed, self.salt)
        data = HEADER.pack(*fields, 0)[: -U32.size]
        return data + U32.pack(crc32c(data))

    def _versions(self) -> tuple[int, int]:
        """The first and the last version; of a merged segment, those of the segments that it was made of."""
        said = self.entry["first_version"], self.entry["last_version"]
        wider = self.entry["merged"] and said[0] <= self.first_version and self.last_version <= said[1]
        return said if wider else (self.first_version, self.last_version)

    def totals(self) -> Manifest:
        """What the MANIFEST says of the segment once it is sealed, besides what it always says."""
        versions = self._versions()
        deleted = sum(size & (1 << 30) - 1 for _, size in self.newest.values() if size >> 30 == DELETE)
        return dict(zip(TOTALS, (True, self.end, self.records, *versions, 8 * deleted), strict=True))

    def encode(self, version: int, kind: int, key: bytes, value: bytes) -> bytes:
        """The bytes of a record at the end of this segment."""
        begin = self.salt ^ self.end >> 3 & 0xFFFFFFFF
        own = len(value) > MAX_COVERED
        head = RECORD.pack(0, len(value), version, len(key), kind, FLAG_OWN_CRC if own else 0)[4:]
        covered = head + (U32.pack(crc32c(value, begin)) + key if own else key + value)
        data = U32.pack(crc32c(covered, begin)) + covered + (value if own else b"")
        return data + bytes(-len(data) % 8)

    def decode(self, offset: int, limit: int) -> Record | None:
        """The record at `offset` if a valid one lies there that ends within `limit`."""
        if offset + RECORD.size > limit:
            return None
        checksum, length, version, key_length, kind, flags = RECORD.unpack_from(self.map, offset)
        # behind it the optional fields: 8, 4 and 4 bytes
        key_at = offset + RECORD.size + 8 * (flags & FLAG_EXPIRY) + 2 * (flags & FLAG_OWN_CRC) + (flags & FLAG_CODEC)
        value_at = key_at + key_length
        stop = value_at + length
        begin = self.salt ^ offset >> 3 & 0xFFFFFFFF
        own = flags & FLAG_OWN_CRC
        if kind == END or stop > limit or bool(own) != (length > MAX_COVERED):
            return None
        if crc32c(self.map[offset + U32.size : value_at if own else stop], begin) != checksum:
            return None
        if kind in (BATCH, DICTIONARY) or kind > FOOTER or flags != own:
            raise BaselineError(f"{self.path}: kind {kind} with flags {flags} at {offset} is not known in this format")
        value = self.map[value_at:stop]
        if own and crc32c(value, begin) != U32.unpack_from(self.map, key_at - U32.size)[0]:
            return None
        return Record(offset, stop + 7 & ~7, version, kind, self.map[key_at:value_at], value)

    def next(self, version: int, before: Segment | None) -> Record | None:
        """The record where the segment ends so far, if it goes on with a log whose last version is `version`."""
        record = self.decode(self.end, min(self.entry["end"] or self.entry["capacity"], self.size))
        if record is None or record.kind == FOOTER:
            return None
        follows = before and not before.entry["sealed"] and not self.records
        if follows and (record.kind, record.value[:16]) != (CONTINUES, before.tail()[:16]):
            return None  # what it continues is not what was found
        rises = record.version > version - (record.kind == CONTINUES)
        return record if rises or self.entry["sealed"] else None

    def add(self, record: Record) -> None:
        """Count a record that lies where the segment ended so far."""
        self.first_version = min(self.first_version or record.version, record.version)
        self.last_version = max(self.last_version, record.version)
        self.records += 1
        self.end = record.end
        if record.kind in (PUT, DELETE):
            self.newest[record.key] = record.offset >> 3, record.end - record.offset >> 3 | record.kind << 30

    def tail(self) -> bytes:
        """What the next segment's first record says of this one."""
        return CONTINUES_VALUE.pack(self.number, self.end, self.last_version)

    def torn(self) -> int:
        """How many bytes behind the records there are up to the last that is not zero."""
        return len(self.map[self.end :].rstrip(b"\0"))

    def cut(self, kept: int) -> None:
        """Set aside what lies behind the records, and zero it; `kept` is the last version of the log."""
        if torn := self.torn():
            aside = self.path.parent / "lost+found" / f"{self.path.name}.{self.end}-{self.end + torn}.{kept}"
            aside.parent.mkdir(exist_ok=True)
            aside.write_bytes(self.map[self.end : self.end + torn])
            for path in (aside, aside.parent, self.path.parent):
                _sync(path)
            os.pwrite(self.fd, bytes(torn), self.end)
            os.fsync(self.fd)

    def write(self, data: bytes, offset: int) -> None:
        """Put `data` into the file, which grows in steps, each allocated before it is used."""
        size, stop = self.size, offset + len(data)
        limit = max(stop, self.entry["capacity"]) + PAGE - 1 & -PAGE
        while size < stop:
            size = min(size + min(max(size, STEP_MIN), STEP_MAX), limit)
        if size > self.size:
            os.posix_fallocate(self.fd, self.size, size - self.size)
            self._map()
        if os.pwrite(self.fd, data, offset) != len(data):
            raise OSError(f"{self.path}: a short write at {offset}")

    def footer(self, manifest: Manifest) -> bytes:
        """The footer that belongs behind the records."""
        seed = bytes.fromhex(manifest["seed"])
        first, last = self._versions()
        head = FOOTER_VALUE.pack(first, last, self.records, len(self.newest))
        entries = [FOOTER_ENTRY.pack(siphash13(seed, key), *where) for key, where in sorted(self.newest.items())]
        return self.encode(last, FOOTER, b"", head + b"".join(entries))

    def seal(self, manifest: Manifest) -> None:
        """Sync the records, and behind them a footer; it is believed once the MANIFEST says so."""
        os.fsync(self.fd)
        self.write(self.footer(manifest), self.end)
        os.fsync(self.fd)
        self.entry |= self.totals()
        self.newest.clear()


def open_log(path: Path, manifest: Manifest, flags: int, files: ExitStack) -> list[Segment]:
    """The segments that the MANIFEST lists, their headers checked, their records not yet read; `files` closes them."""
    entries = [entry for entry in manifest["segments"] if not entry["replaced_by"]]
    log = [files.enter_context(closing(Segment(path, entry, flags))) for entry in entries]
    for segment in log:
        found = segment.map[: HEADER.size].ljust(HEADER.size, b"\0")
        features = FEATURES.unpack_from(found, FEATURES_AT)
        _expect(f"{segment.path}: header", found.hex(), segment.header(manifest, features).hex())
        _must_know(segment.path, features, flags != os.O_RDONLY)
    return log


def replay(log: list[Segment], apply: Callable[[Segment, Record], object]) -> int:
    """Apply every record that counts, in order; return how many segments it needs to hold them."""
    version, reach = 0, 0
    for segment in log:
        before = log[reach - 1] if reach else None
        while record := segment.next(version, before):
            segment.add(record)
            apply(segment, record)
            version = max(version, record.version)
        if segment.entry["sealed"]:
            _expect(f"{segment.path}: totals", segment.totals(), {name: segment.entry[name] for name in TOTALS})
        elif before and not segment.records and segment.entry["end"] is None:
            break  # prepared, not begun
        reach += 1
    _expect(f"{log[reach - 1].path}: sealed without a successor", log[reach - 1].entry["sealed"], False)
    _refuse_lost_syncs(log, reach, version)
    return reach


# The length of the value; any version; no key, the kind, no flags. A lookahead, because matches may overlap.
_MARK = re.compile(rb"(?=\x10\0\0\0.{8}\0\0\x05\0)", re.DOTALL)


def _refuse_lost_syncs(log: list[Segment], reach: int, version: int) -> None:
    """Make sure that no sync had covered more than what was found."""
    stop = (reach - 1, log[reach - 1].end)
    position = {segment.number: index for index, segment in enumerate(log)}
    for segment in log[reach - 1 : reach + 1]:
        for match in _MARK.finditer(segment.map, segment.end) if segment.torn() else ():
            offset = match.start() - 4
            mark = segment.decode(offset, segment.size) if offset % 8 == 0 else None
            if mark and mark.version > version:
                number, end = SYNC_MARK_VALUE.unpack(mark.value)
                if (position.get(number, -1), end) > stop:
                    raise BaselineError(
                        f"{log[reach - 1].path}: damaged at {stop[1]}: expected records up to {end} in segment "
                        f"{number}, as the sync mark at {offset} in segment {segment.number} says, found none"
                    )


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of the MANIFEST."""
    body = json.dumps(manifest).encode()
    return (MANIFEST_LINE % (crc32c(body), len(body))).encode() + body


def read_manifest(path: StrPath, writing: bool = False) -> Manifest:
    """The MANIFEST of the store at `path`."""
    file = Path(path) / "MANIFEST"
    try:
        line, _, body = file.read_bytes().partition(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        raise BaselineError(f"{path}: there is no store") from None
    _expect(f"{file}: format", line.split(b" ")[:3], MANIFEST_LINE.encode().split(b" ")[:3])
    _expect(f"{file}: first line", line + b"\n", (MANIFEST_LINE % (crc32c(body), len(body))).encode())
    found = json.loads(body)
    manifest: Manifest = {name: found[name] for name in FIELDS}
    manifest["segments"] = [{name: entry[name] for name in SEGMENT_FIELDS} for entry in found["segments"]]
    asked = manifest["hash"], set(manifest["options"]) - {"codec"}  # values are handed out as they are stored
    _expect(f"{file}: hash and options", asked, ("siphash-1-3", set()))
    _must_know(file, manifest["features"], writing)
    return manifest


def read_log(path: StrPath) -> list[tuple[int, int, bytes, bytes]]:
    """Version, kind, key and value of every record of the log, as recovery sees it."""
    records: list[tuple[int, int, bytes, bytes]] = []
    with ExitStack() as files:
        log = open_log(Path(path), read_manifest(path), os.O_RDONLY, files)
        replay(log, lambda _, record: records.append(record[2:]))
    return records


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _bytes(data: bytes | str) -> bytes:
    return data if isinstance(data, bytes) else data.encode() if isinstance(data, str) else bytes(memoryview(data))


class BaselineStore(MutableMapping[bytes, bytes]):
    """A store with a dict for its index. Keys and values are bytes; str is taken as UTF-8.

    `flag` is as in dbm: r, w, c or n. `check`: verify the checksums of a record at every get. `footers`: compare
    footers with records.
    """

    def __init__(
        self, path: StrPath, flag: str = "c", segment_size: int = 256 << 20, check: bool = True, footers: bool = False
    ) -> None:
        if flag not in ("r", "w", "c", "n"):
            raise ValueError(f"flag must be 'r', 'w', 'c' or 'n', not {flag!r}")
        self.path = Path(path)
        self._segment_size, self._check, self._writable = segment_size, check, flag != "r"
        self._files = ExitStack()
        self._unmarked = False  # a record was written since the last sync mark
        self._version = 0
        self._log: list[Segment] = []
        self._index: dict[bytes, tuple[Segment, int, int]] = {}  # key -> segment, offset, length of value
        try:
            if flag in "cn":
                self.path.mkdir(exist_ok=True)
            if flag in "rw" or (self.path / "MANIFEST").exists():
                read_manifest(self.path, self._writable)  # where this fails, not even LOCK is touched
            if self._writable:
                self._take_lock()
            if flag in "cn" and not (self.path / "MANIFEST").exists():
                self._create()
            else:
                self._recover(footers)
                if flag == "n":
                    self.clear()
        except BaseException:
            self._files.close()
            raise

    def _take_lock(self) -> None:
        fd = os.open(self.path / "LOCK", os.O_RDWR | os.O_CREAT, 0o644)
        self._files.callback(os.close, fd)  # which unlocks it
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
        except (BlockingIOError, PermissionError):
            holder = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
            raise BaselineError(f"{self.path}: open for writing in process {holder}") from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)

    def _create(self) -> None:
        for file in self.path.glob("*.seg"):
            if file.read_bytes()[HEADER.size :].strip(b"\0"):
                raise BaselineError(f"{file}: expected a MANIFEST beside these records, found none")
            file.unlink()
        _sync(self.path.parent)
        self._manifest: Manifest = {"identity": secrets.token_hex(8), "seed": secrets.token_hex(16)}
        self._manifest |= {"hash": "siphash-1-3", "features": [0, 0, 0], "options": {}, "generation": 0, "epoch": 0, "moves": 0}
        self._manifest |= {"next_number": 1, "next_chunk": 0, "last_version": 0, "cuts": [], "cut_bytes": 0}
        self._add_segment(None)
        self._write_manifest()

    def _recover(self, footers: bool) -> None:
        self._manifest = read_manifest(self.path, self._writable)
        self._log = open_log(self.path, self._manifest, os.O_RDWR if self._writable else os.O_RDONLY, self._files)
        reach = replay(self._log, self._apply)
        for segment in self._log:
            if segment.entry["sealed"]:
                if footers:
                    footer = segment.footer(self._manifest)
                    found = segment.map[segment.end : segment.end + len(footer)]
                    _expect(f"{segment.path}: footer at {segment.end}", found.hex(), footer.hex())
                segment.newest.clear()
        if self._writable:
            self._mend(reach)

    def _mend(self, reach: int) -> None:
        """Cut the log where it ends, and say so in a MANIFEST before anything is appended."""
        manifest, kept = self._manifest, max(segment.last_version for segment in self._log)
        (self.path / "index").unlink(missing_ok=True)
        _sync(self.path)
        self._version = max([kept, *(first - 1 for _, first in manifest["cuts"])])
        if any(segment.torn() for segment in self._log[reach - 1 :]) or manifest["last_version"] > self._version:
            first = max(self._version + 1, manifest["last_version"] + 1, time.time_ns())
            manifest["cuts"].append([kept, first])
            self._version = first - 1
        unsealed = [segment for segment in self._log if not segment.entry["sealed"]]
        for segment in reversed(unsealed):
            segment.cut(kept)
        self._log, unreached = self._log[:reach], self._log[reach:]
        for segment in unsealed:
            if segment in self._log[:-1]:
                segment.seal(manifest)
        self._log[-1].entry["end"] = None
        numbers = [int(file.stem) for file in self.path.glob("*.seg") if file.stem.isdecimal()]
        manifest["next_number"] = max(manifest["next_number"], *(number + 1 for number in numbers))  # none twice
        self._write_manifest()
        for segment in unreached:
            segment.path.unlink()

    def close(self) -> None:
        """Sync what was written, and let others write. A second close does nothing."""
        try:
            if self._writable:
                self.sync()
        finally:
            self._writable = False
            self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_manifest(self) -> None:
        manifest = self._manifest
        manifest["generation"] += 1
        manifest["last_version"] = max(manifest["last_version"], self._version)
        manifest["segments"] = [segment.entry for segment in self._log]
        coming = self.path / "MANIFEST.tmp"
        coming.write_bytes(encode_manifest(manifest))
        _sync(coming)
        os.replace(coming, self.path / "MANIFEST")
        _sync(self.path)

    def _add_segment(self, before: Segment | None, size: int = 0, clear: bool = False) -> None:
        """Begin a segment that has room for a record of `size`; it is on the device, but not in the MANIFEST."""
        manifest = self._manifest
        capacity = max(self._segment_size, HEADER.size + CONTINUES_SIZE + size)
        entry = dict.fromkeys(SEGMENT_FIELDS, 0) | {"sealed": False, "merged": False, "end": None}
        entry["salt"] = secrets.randbits(32)
        entry |= {"number": manifest["next_number"], "chunk": manifest["next_chunk"], "capacity": capacity}
        manifest["next_number"] += 1
        manifest["next_chunk"] += -(-capacity // CHUNK)
        segment = Segment(self.path, entry, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self._files.enter_context(closing(segment))
        self._log.append(segment)
        segment.write(segment.header(manifest), 0)
        if before:
            self._write(CONTINUES, b"", before.tail(), before.last_version)
        if clear:
            self._write(CLEAR, b"", b"")
        os.fsync(segment.fd)
        _sync(self.path)

    def _rotate(self, size: int) -> None:
        """Go on in a new segment, then seal the full one."""
        full = self._log[-1]
        self._writable = False  # and so it stays if this fails: the next open finds out how far it came
        self._add_segment(full, size)
        self._write_manifest()
        full.seal(self._manifest)
        self._write_manifest()
        self._writable = True

    def _write(self, kind: int, key: bytes, value: bytes, version: int | None = None) -> Record:
        segment = self._log[-1]
        version = max(self._version + 1, time.time_ns()) if version is None else version
        data = segment.encode(version, kind, key, value)
        segment.write(data, segment.end)
        record = Record(segment.end, segment.end + len(data), version, kind, key, value)
        segment.add(record)
        self._version = max(self._version, version)
        return record

    def _append(self, kind: int, key: bytes, value: bytes) -> int:
        self._must_be_writable()
        size = record_size(len(key), len(value))
        if self._log[-1].end + size > self._log[-1].entry["capacity"]:
            self._rotate(size)
        record = self._write(kind, key, value)
        self._apply(self._log[-1], record)
        self._unmarked = True
        return record.version

    def _apply(self, segment: Segment, record: Record) -> None:
        """Let the index follow a record of the log."""
        if record.kind == PUT:
            self._index[record.key] = (segment, record.offset, len(record.value))
        elif record.kind == DELETE:
            self._index.pop(record.key, None)
        elif record.kind == CLEAR:
            self._index.clear()

    def _must_be_writable(self) -> None:
        if not self._writable:
            raise BaselineError(f"{self.path}: not open for writing")

    def put(self, key: bytes | str, value: bytes | str) -> int:
        """Set `key` to `value`; return the record's version. It is in the page cache, not yet synced."""
        key, value = _bytes(key), _bytes(value)
        if len(key) >= 1 << 16 or len(value) >= 1 << 32:
            raise ValueError("a key may have 65,535 bytes, a value 4,294,967,295")
        return self._append(PUT, key, value)

    __setitem__ = put  # type: ignore[assignment]

    def delete(self, key: bytes | str) -> bool:
        """Remove `key`; return whether it was there."""
        self._must_be_writable()
        key = _bytes(key)
        if key in self._index:
            self._append(DELETE, key, b"")
            return True
        return False

    def clear(self) -> None:
        """Remove all keys: a MANIFEST that names a new segment alone; then the old ones go."""
        self._must_be_writable()
        old, self._log = self._log, []
        self._writable = False  # as in a rotation
        self._add_segment(old[-1], clear=True)
        self._manifest["epoch"] += 1
        self._write_manifest()
        self._index.clear()
        for segment in old:
            segment.path.unlink()
        self._writable = True

    def sync(self) -> None:
        """Return when all that was written is on the device, and leave a mark of it in the log."""
        self._must_be_writable()
        segment = self._log[-1]
        self._writable = False  # and so it stays if this fails: another fsync would not tell what is lost
        os.fsync(segment.fd)
        self._writable = True
        if self._unmarked and segment.end + MARK_SIZE <= segment.entry["capacity"]:
            self._write(SYNC_MARK, b"", SYNC_MARK_VALUE.pack(segment.number, segment.end))
            self._unmarked = False

    # MutableMapping adds the rest; its items() and values() read each value once.

    def __getitem__(self, key: bytes | str) -> bytes:
        key = _bytes(key)
        segment, offset, length = self._index[key]
        if not self._check:
            start = offset + RECORD.size + (U32.size if length > MAX_COVERED else 0) + len(key)
            return segment.map[start : start + length]
        record = segment.decode(offset, segment.end)
        if record is None or record.key != key:
            raise BaselineError(f"{segment.path}: expected a valid record of {key!r} at {offset}, found {record}")
        return record.value

    def __delitem__(self, key: bytes | str) -> None:
        if not self.delete(key):
            raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes | str) and _bytes(key) in self._index

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)
