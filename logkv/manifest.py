"""The MANIFEST: what a store is and which segments make up its log.  docs/format.md describes its fields."""

from __future__ import annotations

import json
import os
import secrets
import time
from dataclasses import dataclass, field, replace
from typing import Any

from logkv import files
from logkv._core import CHUNK, CHUNKS, FORMAT, SEGMENT_HEADER, checksum
from logkv.errors import CorruptionError, Error, FormatError

MAGIC = "LogKV MANIFEST"
HASH = "siphash-1-3"
LONGEST = 1 << 28           # bytes of a MANIFEST: more than as many segments take as there are chunks


@dataclass(slots=True)
class Segment:
    """One file of the log."""

    number: int
    chunk: int
    capacity: int
    salt: int
    sealed: bool = False
    end: int | None = None              # of its records; None: where the scan ends
    records: int = 0
    first_version: int = 0
    last_version: int = 0
    tombstones: int = 0                 # bytes of those that its footer lists
    merged: bool = False                # by compaction: in the order of keys
    replaced_by: int = 0                # the segment that has all that is alive of this one; this one is about to go

    @property
    def name(self) -> str:
        return files.segment_name(self.number)

    @property
    def chunks(self) -> int:
        """How many chunks of the location space it owns."""
        return -(-self.capacity // CHUNK)


@dataclass(slots=True)
class Manifest:
    """A store's identity and the order of its segments.  Changed in memory, then written as a whole."""

    identity: int
    seed: bytes
    generation: int = 0
    epoch: int = 0
    next_number: int = 1
    next_chunk: int = 0
    last_version: int = 0
    cuts: list[list[int]] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    codec: str | None = None            # what the values are encoded with; None: they are bytes
    cut_bytes: int = 0                  # of torn tails, over the store's life
    moves: int = 0                      # how often locations were given out anew, or segments replaced by a repair
    text: bytes = field(default=b"", compare=False, repr=False)     # the file that this was read from
    backup: bool = False                # a backup made this, and nobody has changed the store since

    @classmethod
    def new(cls, codec: str | None) -> Manifest:
        """A store with an identity and a seed of its own, and no segment yet."""
        return cls(identity=secrets.randbits(64), seed=secrets.token_bytes(16), codec=codec)

    def new_segment(self, capacity: int) -> Segment:
        """A segment, numbered and placed, that is not in the list yet."""
        segment = Segment(self.next_number, self.next_chunk, capacity, secrets.randbits(32))
        if segment.chunk + segment.chunks > CHUNKS:
            raise Error(f"all {CHUNK * CHUNKS >> 40} TiB of locations have been given out: " + (
                "close the store everywhere in this process; the next opening for writing gives out those anew that are "
                "free again" if self.is_crowded else "the store is full"))
        self.next_number += 1
        self.next_chunk += segment.chunks
        return segment

    def add_segment(self, capacity: int) -> Segment:
        """A successor, at the end of the list."""
        self.segments.append(self.new_segment(capacity))
        return self.segments[-1]

    @property
    def is_crowded(self) -> bool:
        """Whether more than half of the locations were given out, and most of these are nobody's any more."""
        return self.next_chunk > CHUNKS // 2 > 2 * sum(segment.chunks for segment in self.segments)

    def moved(self) -> Manifest:
        """The same segments, in a new epoch, with locations from the beginning on in the order of those that they had."""
        new = self.copy()
        new.epoch += 1
        new.moves += 1
        new.next_chunk = 0
        for segment in sorted(new.segments, key=lambda segment: segment.chunk):
            segment.chunk = new.next_chunk
            new.next_chunk += segment.chunks
        return new

    def places(self) -> list[tuple[int, int, int]]:
        """(number, first chunk, chunks) of each segment."""
        return [(segment.number, segment.chunk, segment.chunks) for segment in self.segments]

    def segment_at(self, chunk: int) -> Segment | None:
        """The segment that owns a chunk."""
        for segment in reversed(self.segments):
            if segment.chunk <= chunk < segment.chunk + segment.chunks:
                return segment
        return None

    def segment_numbered(self, number: int) -> Segment | None:
        for segment in reversed(self.segments):
            if segment.number == number:
                return segment
        return None

    def copy(self) -> Manifest:
        """One to be changed."""
        return replace(self, text=b"", backup=False, cuts=[list(cut) for cut in self.cuts],
                       segments=[replace(s) for s in self.segments])

    def encode(self) -> bytes:
        """The file's bytes."""
        body = json.dumps({
            "identity": f"{self.identity:016x}", "seed": self.seed.hex(), "hash": HASH, "features": [0, 0, 0],
            "options": {} if self.codec is None else {"codec": self.codec},
            "generation": self.generation, "epoch": self.epoch, "moves": self.moves,
            "next_number": self.next_number, "next_chunk": self.next_chunk, "last_version": self.last_version,
            "cuts": self.cuts, "cut_bytes": self.cut_bytes,
            **({"backup": True} if self.backup else {}),
            "segments": [{name: getattr(s, name) for name in Segment.__slots__} for s in self.segments],
        }).encode()
        return b"%s %d %08x %d\n" % (MAGIC.encode(), FORMAT, checksum(body), len(body)) + body

    @classmethod
    def decode(cls, data: bytes, path: str, *, writable: bool) -> Manifest:
        """The MANIFEST in these bytes.

        Raises FormatError (not one, or of a newer format), CorruptionError (its checksum fails).
        """
        head, newline, body = data.partition(b"\n")
        words = head.split(b" ")
        if not newline or b" ".join(words[:2]).decode("latin-1") != MAGIC or len(words) != 5:
            if data.startswith(MAGIC.encode()[:1]) or not data.strip(b"\0"):
                raise _first_line_damaged(data, path)
            raise FormatError(f"{path} is not a MANIFEST of LogKV: it begins with {head[:30]!r}")
        if not words[2].isdigit() or len(words[2]) > 9:
            raise CorruptionError("the format's number is damaged", path=path, offset=len(MAGIC) + 1,
                                  expected=str(FORMAT), found=repr(words[2]), fatal=True)
        if int(words[2]) != FORMAT:
            raise FormatError(f"{path} has format {int(words[2])}; this version of LogKV knows format {FORMAT}: "
                              "a newer version wrote it, or its first line is damaged")
        if words[3] != b"%08x" % checksum(body) or words[4] != b"%d" % len(body):
            raise CorruptionError("the MANIFEST fails its checksum", path=path, offset=0,
                                  expected=f"{words[3].decode('latin-1')}, {words[4].decode('latin-1')} bytes",
                                  found=f"{checksum(body):08x}, {len(body)} bytes", fatal=True)
        try:
            found = cls._of(json.loads(body), path, writable)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as problem:
            raise CorruptionError("the MANIFEST makes no sense, though its checksum is right", path=path,
                                  expected="what docs/format.md says", found=str(problem) or repr(problem),
                                  fatal=True) from problem
        found.text = data
        return found

    @classmethod
    def _of(cls, fields: dict[str, Any], path: str, writable: bool) -> Manifest:
        features = fields["features"]
        if features[2] or features[1] and writable:
            raise FormatError(f"{path} asks for features {features} that this version of LogKV does not have")
        if set(fields["options"]) - {"codec"}:
            raise FormatError(f"{path} asks for options {fields['options']} that this version of LogKV does not have")
        if fields["hash"] != HASH:
            raise FormatError(f"{path} asks for the hash {fields['hash']!r}; this version of LogKV has {HASH!r}")
        found = cls(
            identity=int(fields["identity"], 16), seed=bytes.fromhex(fields["seed"]),
            generation=fields["generation"], epoch=fields["epoch"], moves=fields["moves"], next_number=fields["next_number"],
            next_chunk=fields["next_chunk"], last_version=fields["last_version"], cuts=fields["cuts"],
            cut_bytes=fields["cut_bytes"], codec=fields["options"].get("codec"),
            backup=fields.get("backup", False),
            segments=[Segment(**{name: s[name] for name in Segment.__slots__ if name in s})
                      for s in fields["segments"]],
        )
        found._check()
        return found

    def _check(self) -> None:
        """Raises ValueError if a number is not where it must be: what follows relies on them."""
        _expect(type(self.identity) is int and 0 <= self.identity < 1 << 64, f"the identity is {self.identity}")
        counts = [self.generation, self.epoch, self.moves, self.next_number, self.next_chunk, self.last_version,
                  self.cut_bytes, *(version for kept, first in self.cuts for version in (kept, first))]
        for s in self.segments:
            numbers = [s.number, s.chunk, s.capacity, s.records, s.first_version, s.last_version, s.end or 0, s.tombstones,
                       s.replaced_by]
            _expect({*map(type, numbers)} == {int}, f"segment {s.number} has something in place of a number")
            counts += numbers
            _expect(type(s.salt) is int and 0 <= s.salt < 1 << 32, f"segment {s.number} has salt {s.salt!r}")
            _expect(type(s.sealed) is bool and (s.end is not None or not s.sealed), f"segment {s.number} is sealed without end")
            _expect(s.capacity >= SEGMENT_HEADER and s.chunk + s.chunks <= CHUNKS,
                    f"segment {s.number} has {s.chunks} chunks from {s.chunk} on")
            _expect(type(s.merged) is bool and (s.sealed or not s.merged and not s.replaced_by),
                    f"segment {s.number} was merged and is not sealed")
            _expect(s.end is None or SEGMENT_HEADER <= s.end <= s.chunks * CHUNK, f"segment {s.number} ends at {s.end}")
            _expect(s.records <= s.chunks * CHUNK, f"segment {s.number} has {s.records} records")
        placed = sorted(self.segments, key=lambda s: s.chunk)
        _expect(all(a.chunk + a.chunks <= b.chunk for a, b in zip(placed, placed[1:])), "two segments share a chunk")
        _expect({*map(type, counts)} == {int} and min(counts) >= 0 and max(counts) < 1 << 63, "a number is out of range")
        _expect(all(s.number < self.next_number and s.chunk + s.chunks <= self.next_chunk for s in self.segments),
                "the next segment's number or place is taken")
        _expect(len({s.number for s in self.segments}) == len(self.segments), "two segments have one number")
        _expect(bool(self.segments) and not self.segments[-1].sealed, "no segment is there to be appended to")
        _expect(type(self.backup) is bool, f"backup is {self.backup!r}")
        _expect(self.codec is None or isinstance(self.codec, str), f"the codec is {self.codec!r}")
        _expect(len(self.seed) == 16, f"the seed has {len(self.seed)} bytes")


def _first_line_damaged(data: bytes, path: str) -> CorruptionError:
    return CorruptionError("the first line is damaged", path=path, offset=0,
                           expected=f"{MAGIC} <format> <checksum> <length>", found=repr(data[:60].partition(b"\n")[0]),
                           fatal=True)


def _expect(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise ValueError(otherwise)


@dataclass(frozen=True, slots=True)
class Instance:
    """One MANIFEST file, as the control page vouches for it."""

    generation: int
    inode: int
    ctime: int


def read(directory: files.Directory, *, writable: bool = False,
         known: Manifest | None = None) -> tuple[Manifest, Instance] | None:
    """The MANIFEST of a directory and which file it came from, or None if there is none.

    known: what was read before; this itself is returned if the file still says the same.
    """
    path = os.path.join(directory.path, files.MANIFEST)
    try:
        fd = directory.open(files.MANIFEST)
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise Error(problem.errno, f"cannot read the MANIFEST: {problem.strerror}", path) from None
    try:
        status = os.fstat(fd)
        if status.st_size > LONGEST:
            raise CorruptionError("the MANIFEST is too long", path=path, offset=0, expected=f"at most {LONGEST} bytes",
                                  found=f"{status.st_size}", fatal=True)
        data = files.read_at(fd, status.st_size, 0)
    finally:
        files.close(fd)
    if not data.startswith(MAGIC.encode()) and any(files.segment_number(name) is not None for name in directory.names()):
        raise _first_line_damaged(data, path)       # of a store, and not some other program's file of that name
    same = known if data and known is not None and known.text == data else None
    manifest = same or Manifest.decode(data, path, writable=writable)
    return manifest, Instance(manifest.generation, status.st_ino, status.st_ctime_ns)


def write_next(directory: files.Directory, manifest: Manifest) -> int:
    """Writes and syncs the coming MANIFEST beside the one in force; returns its inode."""
    directory.unlink(files.MANIFEST_NEXT)
    fd = directory.open(files.MANIFEST_NEXT, writable=True, create=True, exclusive=True)
    try:
        files.write_at(fd, manifest.encode(), 0)
        files.sync_data(fd)
        return os.fstat(fd).st_ino
    finally:
        files.close(fd)


def adopt_next(directory: files.Directory, *, durable: bool = True) -> int:
    """Renames the coming MANIFEST over the one in force; returns the ctime that the rename gave it."""
    directory.rename(files.MANIFEST_NEXT, files.MANIFEST)
    if durable:
        directory.sync()
    return directory.stat(files.MANIFEST).st_ctime_ns


def now() -> int:
    """Nanoseconds since 1970."""
    return time.time_ns()
