"""Which segments a directory holds, whatever its MANIFEST says, and the MANIFEST that they add up to."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from logkv import _core, files
from logkv.errors import CorruptionError
from logkv.manifest import Manifest, Segment

START = _core.SEGMENT_HEADER
UNKNOWN = 1 << 62               # the end of a segment that only a scan can find

# What a damaged MANIFEST still tells: identity and seed, each segment's number and
# salt, which its records confirm, and the codec.
SALT = re.compile(rb'"number": (\d{1,18}),\s*"chunk": \d+,\s*"capacity": \d+,\s*"salt": (\d{1,10}),')
SEED = re.compile(rb'"identity": "([0-9a-f]{16})",\s*"seed": "([0-9a-f]{32})"')
CODEC = re.compile(rb'"options": \{\s*(?:"codec": "([ !#-\[\]-~]+)"\s*)?\}')


@dataclass(slots=True)
class Found:
    """A segment's file whose header is whole, and what its records say."""

    number: int
    identity: int
    seed: bytes
    salt: int
    size: int                   # bytes of the file that may be its own
    end: int = START            # of its records
    reach: int = START          # what is behind its last whole record: a torn tail, damaged records, or a damaged footer
    footer: bool = False
    intact: bool = True         # no record is damaged
    records: int = 0
    first: int = 0              # versions; of a merged one those that its footer gives
    last: int = 0
    data: int = 0               # the highest version of a put or delete
    clear: int = 0              # of a *clear*
    link: tuple[int, int, int] | None = None

    @property
    def name(self) -> str:
        return files.segment_name(self.number)

    @property
    def merged(self) -> bool:
        """Or the store's first."""
        return self.footer and self.link is None and not self.clear

    def has(self, other: Found) -> bool:
        """Whether that one may have been merged into this one: its versions lie within.  The first version of a segment can
        be the last of the one before it."""
        return other.number < self.number and self.first <= other.first and other.last <= self.last \
            and (other.last > self.first or self.first == self.last)


def headers(directory: files.Directory, damaged: bytes = b"") -> list[Found]:
    """The segments whose headers are whole and fit the files' names; and those of which a `damaged` MANIFEST still tells the
    salt that stood there.  Raises FormatError for those of a newer version."""
    found, others = [], []
    for name in sorted(directory.names()):
        number = files.segment_number(name)
        if number is None:
            continue
        fd = directory.open(name)
        try:
            header = _core.read_segment_header(files.read_at(fd, START, 0))
            if header is not None and header[0] == number:
                found.append(Found(*header, _size_of(fd)))
            elif header is None:
                others.append((number, _size_of(fd)))
        finally:
            files.close(fd)
    salts = {int(number): int(salt) % (1 << 32) for number, salt in SALT.findall(damaged)}
    said = SEED.search(damaged)
    store = (found[0].identity, found[0].seed) if found else \
        (int(said[1], 16), bytes.fromhex(said[2].decode())) if said else None
    return found + [Found(number, *store, salts[number], size) for number, size in others if number in salts and store]


def _size_of(fd: int) -> int:
    """How much of a file may be its segment's own: a record that begins where there is data may end in a hole, which
    reads as zeros."""
    size = os.fstat(fd).st_size
    return min(size, _core.data_end(fd, size) + _core.RECORD_MAX)


def _size_of_named(directory: files.Directory, name: str) -> int:
    """The same; 0 if it is not there."""
    try:
        fd = directory.open(name)
    except FileNotFoundError:
        return 0
    try:
        return _size_of(fd)
    finally:
        files.close(fd)


def read(directory: files.Directory, found: Sequence[Found]) -> None:
    """Reads the records of segments of one store."""
    if not found:
        return
    log = _core.Log(None, found[0].identity, found[0].seed, False)
    try:
        chunk = 0
        for segment in found:
            if segment.size <= START:
                continue
            fd = directory.open(segment.name)
            try:
                log.map_segment(fd, segment.number, chunk, segment.size, segment.size, segment.salt)
            finally:
                files.close(fd)
            _read(log, chunk, segment)
            chunk += -(-segment.size // _core.CHUNK)
    finally:
        log.close()


def _read(log: _core.Log, chunk: int, segment: Found) -> None:
    at = START
    segment.link = _core.read_link(log, chunk)
    while True:
        reason, at, records, first, last, data, clear = _core.describe(log, chunk, at, UNKNOWN)
        segment.records += records
        if records:
            segment.end = at
            segment.first = min(segment.first or first, first)
        segment.last, segment.data = max(segment.last, last), max(segment.data, data)
        segment.clear = max(segment.clear, clear)
        if reason == "footer":
            segment.end, segment.footer = at, True
            break
        resume = _core.next_whole(log, chunk, at if reason == _core.UNREADABLE else at + 8, UNKNOWN)
        if resume is None:
            rest = _core.first_nonzero(log, chunk, at, UNKNOWN)
            segment.reach = rest[1] if rest is not None else segment.end
            return
        at, segment.intact = resume, False
    versions = _core.read_footer(log, chunk, at)
    if versions is None:
        segment.footer = False
    elif segment.merged or not segment.intact:
        segment.first, segment.last = versions


def contradiction(directory: files.Directory, manifest: Manifest) -> str | None:
    """Why the segments show that the MANIFEST, though it is whole, is not that of the log, or None."""
    found = headers(directory)
    ours = [segment for segment in found if segment.identity == manifest.identity]
    named = {segment.number for segment in manifest.segments}
    others = [segment for segment in found if segment.number in named]
    if others and not any(segment in ours for segment in others):
        return "it belongs to another store than the segments that it names"
    stray = [segment for segment in ours if segment.number not in named]
    if not stray or manifest.backup:        # where the next backup was begun, and not finished
        return None
    read(directory, stray)
    missing = [s for s in manifest.segments if s.sealed and not s.replaced_by and s.number not in {f.number for f in ours}]
    for segment in stray:
        if segment.merged and segment.intact and any(segment.first <= gone.first_version and gone.last_version <= segment.last
                                                     for gone in missing):
            return f"it names segments that were merged into {segment.name}, and not that one"
    last = [Found(s.number, manifest.identity, manifest.seed, s.salt, _size_of_named(directory, s.name))
            for s in manifest.segments if not s.sealed and s.number not in {f.number for f in found if f not in ours}]
    read(directory, last)
    known = max([manifest.last_version, *(s.last_version for s in manifest.segments), *(f.last for f in last)])
    for segment in stray:
        if segment.link is not None and segment.data > known:       # and not what an interrupted repair or merge left
            return f"it is older than the log: it does not name {segment.name}, which has newer records than all that it names"
    return None


@dataclass(slots=True)
class Made:
    """A MANIFEST that was made of the segments in a directory, and what that came to.

    `aside`: names of segments' files that are no part of the log; `leftover`: those of them that were merged or cleared;
    `missing`: (name, why, the versions between which its records lie) of segments that are not there; `notes`: lines.
    """

    manifest: Manifest
    aside: list[str] = field(default_factory=list)
    leftover: list[str] = field(default_factory=list)
    missing: list[tuple[str, str, tuple[int, int]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make_manifest(directory: files.Directory, old: Manifest | None, damaged: bytes) -> Made:
    """The MANIFEST that the segments in a directory add up to.

    old: one that is whole, and not that of the log.  damaged: the bytes of one that is not whole.
    Raises CorruptionError if no segment's header is whole.
    """
    found = headers(directory, damaged)
    if not found:
        raise CorruptionError("nothing can be read: no segment's header is whole, and neither is the MANIFEST, which says "
                              "the same", path=directory.path)
    counts = Counter(segment.identity for segment in found)
    identity = max(counts, key=lambda each: (old is not None and old.identity == each, counts[each]))
    if old is not None and old.identity != identity:
        old = None
    ours = [segment for segment in found if segment.identity == identity]
    read(directory, ours)
    kept = _resolve([segment for segment in ours if segment.reach > START or segment.records])
    made = Made(Manifest(identity, ours[0].seed))
    new = made.manifest
    if old is not None:
        new.generation, new.epoch, new.moves = old.generation, old.epoch, old.moves
        new.cuts, new.cut_bytes, new.codec = old.cuts, old.cut_bytes, old.codec
    else:
        _take_codec(made, damaged)
    for segment, following in zip(kept, [*kept[1:], None]):
        _add(new, segment, following)
    names = {name for name in directory.names() if files.segment_number(name) is not None}
    new.next_number = 1 + max(files.segment_number(name) or 0 for name in names)
    new.last_version = max([old.last_version if old else 0, *(segment.last for segment in ours)])
    ours = [segment for segment in ours if segment.size > START]        # the others are cut short: one without records has room
    empty = [segment for segment in ours if segment.reach <= START and not segment.records]
    made.aside = sorted(names - {segment.name for segment in [*kept, *empty]})
    made.leftover = [segment.name for segment in ours if segment.name in made.aside]
    _find_missing(made, kept, {files.segment_name(int(number)) for number, _ in SALT.findall(damaged)} - names)
    return made


def _take_codec(made: Made, damaged: bytes) -> None:
    """Asks a damaged MANIFEST what the values are encoded with."""
    said = CODEC.search(damaged)
    if said is None:
        made.notes.append("what the values are encoded with is not known any more: the store now says that they are bytes; "
                          "logkv export and logkv import --codec make one that says otherwise")
    elif said[1]:
        made.manifest.codec = said[1].decode()
        made.notes.append(f"that the values are encoded with {made.manifest.codec!r} was read in the damaged MANIFEST")


def _add(new: Manifest, segment: Found, following: Found | None) -> None:
    """As the next segment in the list."""
    end = max(segment.end, segment.reach)
    if following is not None and following.link is not None and following.link[0] == segment.number:
        end = max(segment.end, following.link[1])
    sealed = following is not None or segment.footer
    new.segments.append(Segment(segment.number, new.next_chunk, max(end, _core.SEGMENT_MIN), segment.salt))
    new.next_chunk += new.segments[-1].chunks
    if sealed:
        last = new.segments[-1]
        last.sealed, last.end, last.records = True, end, segment.records
        last.merged = segment.link is None and not segment.clear        # or the store's first: it makes no difference
        last.first_version, last.last_version = segment.first, segment.last


def _find_missing(made: Made, kept: Sequence[Found], named: Iterable[str]) -> None:
    """named: by the damaged MANIFEST, and not there."""
    made.missing = [(name, "the file is missing", (0, 0)) for name in sorted(named)]
    for before, segment in zip([None, *kept], kept):
        if segment.link is None or segment.clear:
            continue
        number, _, version = segment.link
        name = files.segment_name(number)
        if before is None:
            made.notes.append(f"{name} is not there, and came before all others: compaction removes the oldest ones")
        elif number != before.number and version > before.last and name not in named:
            made.missing.append((name, "the file is missing, unless compaction has removed it", (before.last, version)))


def _resolve(found: Iterable[Found]) -> list[Found]:
    """The segments that count, in the order of the log: none that was cleared, and of those that were merged and the output
    only one side.

    What was merged is preferred where all of it is there: the output lacks what was dead because of newer records, and if
    the power was cut before these were on the device, it must be there.  Else the output, which has all that counts: what is
    left of the others would bring back what was deleted.
    """
    cleared = max((segment.clear for segment in found), default=0)
    kept = sorted((segment for segment in found if segment.last >= cleared), key=lambda s: (s.first, s.last, s.number))
    for output in sorted(kept, key=lambda s: (s.last - s.first, s.number)):
        inside = [segment for segment in kept if output.merged and output.has(segment)]
        if not inside:
            continue
        gone = [output] if _is_all_of(inside, output) else inside
        kept = [segment for segment in kept if segment not in gone]
    return kept


def _is_all_of(inside: Sequence[Found], output: Found) -> bool:
    """Whether these are, whole, all the segments that were merged."""
    return all(segment.intact for segment in inside) and inside[0].first == output.first and inside[-1].last == output.last \
        and all(b.link is not None and b.link[0] == a.number for a, b in zip(inside, inside[1:]))
