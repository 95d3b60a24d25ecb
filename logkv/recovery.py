"""Opening after whatever happened: is the index to be believed, where does the log end, what must be cut.

The scan (in `_core`) reports; what is decided on it is decided here.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from logkv import _core, files, manifest
from logkv.errors import CorruptionError, FormatError
from logkv.manifest import Instance, Segment

if TYPE_CHECKING:
    from logkv.engine import Engine

RENAME_NS = 1_000_000_000       # a noted rename that a kill interrupted is believed if it came so soon after its note
START = _core.SEGMENT_HEADER
SMALLEST = 24                   # bytes of a record


@dataclass(frozen=True, slots=True)
class Trust:
    """Whether the index is to be believed, and whether it was closed cleanly."""

    index: bool
    clean: bool = False
    why: str = ""


def trust(directory: files.Directory, log: _core.Log, control_fd: int, instance: Instance) -> Trust:
    """Compares what the control page says with what is there.

    Clean: index and log agree on the device, under any boot.  Else the page cache holds what a dead or a living writer
    stored, if this is the same boot and these are the very files, not copies of them.
    """
    said = log.trust
    if not said:
        return Trust(False, why="no control page to read")
    if not said["nonce"]:
        return Trust(False, why="no index was finished")
    if not said["intact"]:
        return Trust(False, why="the control page fails its checksum")
    if said["clean"] and said["clean"] == instance.generation:
        return Trust(True, clean=True)
    try:
        index = directory.stat(files.INDEX)
    except OSError:
        return Trust(False, why="no index")
    control = os.fstat(control_fd)
    boot = files.boot_id()
    if not any(boot) or said["boot"] != boot:
        return Trust(False, why="the system was started anew")
    if (said["device"], said["inode"]) != (control.st_dev, control.st_ino) or said["index_inode"] != index.st_ino \
            or control.st_nlink != 1 or index.st_nlink != 1:
        return Trust(False, why="the files were copied")
    for generation, inode, ctime, noted in said["manifests"]:
        if (generation, inode) == (instance.generation, instance.inode) and (
                ctime == instance.ctime or ctime == 0 and abs(instance.ctime - noted) < RENAME_NS):
            return Trust(True)
    return Trust(False, why="the MANIFEST is not the one that the index belongs to")


@dataclass(slots=True)
class Tail:
    """Where the log ends, and what stands behind that."""

    segment: Segment
    end: int
    version: int
    abandoned: list[Segment] | None = None    # segments that begin beyond the end


def walk(engine: Engine, segment: Segment, start: int, version: int, *, trusted: bool = False) -> Tail:
    """Replays the log from a place on, through all segments that follow, to its end.

    Raises CorruptionError if a record is damaged that a sync is known to have covered: behind an end that is
    `trusted`, because the index with it is, there is nothing to be known.
    """
    log = engine.log
    segments = engine.manifest.segments
    at = segments.index(segment)
    engine.map_segment(segment)
    while True:
        following = segments[at + 1] if at + 1 < len(segments) else None
        link = None
        if following is not None:
            engine.map_segment(following)
            link = _core.read_link(log, following.chunk)
            if link is not None and link[0] != segment.number:
                link = None
        stop = segment.end if segment.end is not None else link[1] if link is not None else 1 << 62
        reason, end, version, _ = _core.replay(log, segment.number, segment.chunk, start, stop, version)
        if reason == _core.UNREADABLE:
            raise CorruptionError("the log cannot be read", path=engine.path_of(segment.name),
                                  segment=segment.number, offset=end, expected="a record", found=reason)
        if reason == "unknown":
            raise FormatError(f"{engine.path_of(segment.name)} has a record at {end} of a kind or with a flag that only "
                              "newer versions of LogKV know")
        if end == stop and following is not None and link is not None:
            segment, at, start = following, at + 1, START
            continue
        rest = segments[at + 1:]
        for behind in rest[1:]:
            engine.map_segment(behind)
        if segment.end is not None and end != stop or (segment.number, end) < engine.promised:
            raise _damage(engine, segment, end, reason)
        for behind in [] if trusted else [segment, *rest]:
            mark = _core.find_mark(log, behind.chunk, end if behind is segment else START, version)
            if mark is not None and mark > (segment.number, end):
                if link is None and behind is following:
                    raise _damage(engine, following, START, "it does not go on with the segment before it")
                raise _damage(engine, segment, end, reason)
        return Tail(segment, end, version, abandoned=rest)


def _damage(engine: Engine, segment: Segment, offset: int, reason: str) -> CorruptionError:
    return CorruptionError("the log is damaged where it was on the device already, and no index tells what else stood there",
                           path=engine.path_of(segment.name), segment=segment.number, offset=offset,
                           expected="a record", found=f"none ({reason})", fatal=True)


def rebuild(engine: Engine, why: str) -> Tail:
    """Fills a new, empty index from the log: sealed segments from their footers, the rest by a verified scan."""
    began = time.perf_counter()
    log = engine.log
    version = 0
    first_open = None
    scanned = 0
    size = engine.directory.size
    sizes = {segment.number: size(segment.name)[0] for segment in engine.manifest.segments}
    done, total = 0, sum(sizes.values())
    for segment in engine.manifest.segments:
        engine.progress(done, total)
        if not segment.sealed:
            first_open = segment
            break
        version = max(version, segment.last_version)
        done += sizes[segment.number]
        if segment.replaced_by:
            continue
        engine.map_segment(segment)
        assert segment.end is not None
        if _core.replay_footer(log, segment.number, segment.chunk, segment.end) is None:
            reason, end, _, _ = _core.replay(log, segment.number, segment.chunk, START, segment.end, 0, segment.merged)
            scanned += 1
            if end != segment.end:
                raise _damage(engine, segment, end, reason)
    assert first_open is not None, "a MANIFEST ends with a segment that is not sealed"
    tail = walk(engine, first_open, START, version)
    engine.progress(total, total)
    engine.recovered = {"index": "rebuilt", "why": why, "seconds": time.perf_counter() - began,
                        "footers_unreadable": scanned, "cut_bytes": 0}
    return tail


def promised(log: _core.Log, instance: Instance) -> tuple[int, int]:
    """(file number, offset) that a control page of a cleanly closed store says is on the device; else (0, 0)."""
    said = log.trust
    if said and said["intact"] and said["clean"] == instance.generation:
        number, end = said["durable"]
        return number, end
    return 0, 0


def check_headers(directory: files.Directory, current: manifest.Manifest) -> None:
    """Raises FormatError, before anything is touched, if a newer version of LogKV went on with the log."""
    for segment in current.segments:
        if not segment.sealed:
            try:
                fd = directory.open(segment.name)
            except OSError:
                continue
            try:
                _core.check_segment_header(files.read_at(fd, START, 0), segment.number, current.identity)
            finally:
                files.close(fd)


def expected_keys(engine: Engine) -> int:
    """A guess at the number of entries, to size a new index: what the footers list, 128 bytes each for the rest."""
    total = 0
    for segment in engine.manifest.segments:
        if segment.replaced_by:
            continue
        size = min(engine.directory.size(segment.name))     # a file may be long and have nothing in it
        if segment.sealed:
            total += min(segment.records, size // SMALLEST)
        else:
            total += max(0, size - (1 << 20)) // 160
    return total


def has_records(directory: files.Directory) -> bool:
    """Whether a directory without a MANIFEST holds segments with anything in them."""
    for name in directory.names():
        if files.segment_number(name) is not None and directory.has_data(name, START):
            return True
    return False


def leftovers(directory: files.Directory, current: manifest.Manifest) -> list[str]:
    """Files that an interrupted change left: what the MANIFEST does not name, and is certainly ours."""
    found = []
    named = {segment.name for segment in current.segments}
    for name in directory.names():
        if name in (files.MANIFEST_NEXT, files.INDEX_NEXT, files.BACKUP_BEGUN):
            found.append(name)
        elif files.segment_number(name) is not None and name not in named:
            fd = directory.open(name)
            try:
                header = files.read_at(fd, START, 0)
            finally:
                files.close(fd)
            if not any(header) or _core.segment_identity(header) == current.identity:
                found.append(name)
    return found
