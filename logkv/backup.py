"""A consistent copy of a store that may be in use, in a directory that is a store then.

What is sealed never changes: it is linked, or copied, under its own name.  The rest is copied as far as the log goes,
under numbers of the backup's own, and sealed.  So nothing that an older backup in the same directory needs is touched
before a MANIFEST names the new one.  docs/how-it-works.md has the order of the steps.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace

from logkv import _core, files, manifest, recovery
from logkv.engine import ATTEMPTS, Engine, Progress, no_store
from logkv.errors import CorruptionError, Error, FormatError
from logkv.manifest import Manifest, Segment
from logkv.opening import file_step

START = _core.SEGMENT_HEADER
STEP = 4 << 20                  # bytes between two calls of `progress`
OWN = 1 << 32                   # how far the backup's own numbers are beyond those that the store may come to give out


@dataclass(frozen=True, slots=True)
class Backup:
    """What a backup holds, and what it took.

    `path`: its directory; `keys`: in it; `version`: of its last write; `linked`, `copied`, `kept`: how many segments
    share their file with the store, were copied, were there from an earlier backup; `linked_bytes`, `copied_bytes`,
    `kept_bytes`: of these files; `seconds`: how long it took.
    """

    path: str
    keys: int
    version: int
    linked: int
    copied: int
    kept: int
    linked_bytes: int
    copied_bytes: int
    kept_bytes: int
    seconds: float


def back_up(source: files.Directory, path: str, *, links: bool = True, progress: Progress | None = None) -> Backup:
    """Backs the store in a directory up to `path`; see `Store.backup`."""
    with files.full_disk_is_an_error(path, "back the store up"), closing(source.again()) as source:
        if _leads_into(path, source.identity()):
            raise ValueError(f"{path} is the store itself, or inside it: a backup goes elsewhere")
        found = manifest.read(source)
        if found is None:
            raise no_store(source)
        mode = stat.S_IMODE(source.stat(files.MANIFEST).st_mode)    # who may not read the store may not read this
        created = not os.path.lexists(path)
        try:
            with closing(files.Directory(path, create=True, mode=mode)) as target, \
                    files.full_disk_is_an_error(path, "write the backup"):
                return _Copying(source, target, found[0].identity, links, progress or (lambda done, total: None)).run()
        except BaseException:
            if created:
                with suppress(OSError):         # there is none, or it has become a backup
                    files.remove_directory(path)
            raise


def _leads_into(path: str, identity: tuple[int, int]) -> bool:
    """Whether a path is, or would be, a directory or in it."""
    at = os.path.realpath(path)
    while True:
        with suppress(FileNotFoundError):
            status = os.stat(at)
            if (status.st_dev, status.st_ino) == identity:
                return True
        if os.path.dirname(at) == at:
            return False
        at = os.path.dirname(at)


class _Copying:
    """One backup: of a store in one directory to another."""

    def __init__(self, source: files.Directory, target: files.Directory, identity: int, links: bool,
                 progress: Progress) -> None:
        self._open: list[int] = []              # descriptors
        self.source = source
        self.target = target
        self.identity = identity
        self.links = links
        self.progress = progress
        self.old: Manifest | None = None        # of the backup that is there
        self._next = 0                          # number of the next file of the backup's own
        self._fds: dict[int, int] = {}          # of segments that will be copied, by number
        self._linked: set[int] = set()
        self._kept: set[int] = set()
        self._sizes: dict[str, list[int]] = {"linked": [], "copied": [], "kept": []}
        self._done = self._total = 0            # bytes, counted when they are there and when they are checked
        self._checked: tuple[str, Segment]      # the file that is read back, and what it is

    def run(self) -> Backup:
        began = time.perf_counter()
        self.old = self._look()                 # what is refused is not touched, not even by a lock
        new_lock = files.LOCK not in self.target.names()
        try:
            state = self._run_locked()
        except BaseException:
            if new_lock and files.MANIFEST not in self.target.names():
                self.target.unlink(files.LOCK)
            raise
        linked, copied, kept = self._sizes.values()
        return Backup(self.target.path, state["keys"], state["version"], len(linked), len(copied), len(kept),
                      sum(linked), sum(copied), sum(kept), time.perf_counter() - began)

    def _run_locked(self) -> dict[str, int]:
        lock = files.lock(self.target, 0)
        try:
            self.old = self._look()
            try:
                return self._make()
            except BaseException:
                self._undo()
                raise
        finally:
            try:
                self._close_files()
            finally:
                files.unlock(lock)

    def _close_files(self) -> None:
        """Without an allocation."""
        at = len(self._open)
        while at:
            at -= 1
            fd = self._open[at]
            self._open[at] = -1
            if fd >= 0:
                files.close(fd)

    def __del__(self) -> None:
        """What could not be closed before, for lack of memory."""
        try:
            self._close_files()
        except AttributeError:                  # it was hardly begun
            pass

    # -- the directory ------------------------------------------------------------------------------------

    def _look(self) -> Manifest | None:
        """The MANIFEST of an older backup of this store; None where there is nothing but one that was not finished.
        Raises FormatError for anything else."""
        path = self.target.path
        found = manifest.read(self.target, writable=True)
        if found is None:
            strays = {*self.target.names()} - {files.LOCK, files.LOST_FOUND, files.BACKUP_BEGUN}
            if files.BACKUP_BEGUN in self.target.names():
                strays -= {*self._leftovers(None)}
            if strays:
                raise FormatError(f"{path} is not a backup of {self.source.path}: it holds {min(strays)!r} and no "
                                  "MANIFEST")
            return None
        if found[0].identity != self.identity:
            raise FormatError(f"{path} is not a backup of {self.source.path}, but another store")
        if not found[0].backup:
            raise FormatError(f"{path} is not a backup, or was opened for writing since it was made: what was written "
                              "there would be lost")
        return found[0]

    def _leftovers(self, current: Manifest | None) -> list[str]:
        """What the backup does not need, and is certainly of this store."""
        return recovery.leftovers(self.target, current or Manifest(self.identity, b""))

    def _clean(self, current: Manifest | None) -> None:
        """What an index or a control page may say is not of this backup; what an unfinished one left is in the way."""
        for name in (files.CONTROL, files.INDEX, *self._leftovers(current)):
            if name != files.BACKUP_BEGUN:
                self.target.unlink(name)

    def _undo(self) -> None:
        """The directory as it was, unless the new MANIFEST has its name already."""
        with suppress(OSError):
            found = manifest.read(self.target)
            if found is not None and (self.old is None or found[0].generation != self.old.generation):
                return
            self._clean(self.old)
            if self.old is None:
                self.target.sync()              # files without the mark that they are not finished would be a riddle
                self.target.unlink(files.BACKUP_BEGUN)

    # -- the steps ----------------------------------------------------------------------------------------

    def _make(self) -> dict[str, int]:
        self._clean(self.old)
        if self.old is None:
            files.close(self.target.open(files.BACKUP_BEGUN, writable=True, create=True))
            self.target.sync()                  # before the first segment has a name
        current, state = self._hold()
        if self.old is not None and self.old.last_version > state["version"]:
            raise FormatError(f"{self.target.path} holds later writes than {self.source.path}: they would be lost")
        self._next = max(current.next_number + OWN, 0 if self.old is None else self.old.next_number)
        self.log = _core.Log(self, self.identity, current.seed, False)
        try:
            new = self._copy_all(current, state)
        finally:
            self.log.close()
        self.target.sync()
        manifest.write_next(self.target, new)
        manifest.adopt_next(self.target)
        for name in self._leftovers(new):
            self.target.unlink(name)
        self.target.sync()
        return state

    def _hold(self) -> tuple[Manifest, dict[str, int]]:
        """A MANIFEST, and where the log that it names ends, of one moment.  Every file of it that is needed is linked
        then, or open: the writer may remove it."""
        for _ in range(ATTEMPTS):
            with closing(Engine(self.source.again())) as engine:
                current, instance = engine._read_manifest()
                missing = [segment for segment in current.segments
                           if not segment.replaced_by and not self._hold_file(segment, current)]
                state = engine.log.state
                if engine._read_manifest()[1] != instance or engine.log.signs[0] != engine.log.nonce \
                        or current.epoch != engine.manifest.epoch:
                    continue                    # a writer rotated, sealed, merged, cleared, or opened the store
                if missing:
                    raise self._damage("a file that the MANIFEST names is missing", self.source, missing[0], None,
                                       "a segment", "nothing")
                if not state["number"] or current.segment_numbered(state["number"]) is not None:
                    return current, state
        raise Error(errno.EAGAIN, "the store's files changed all the time", self.source.path)

    def _hold_file(self, segment: Segment, current: Manifest) -> bool:
        """False if it is gone."""
        number = segment.number
        if number in self._fds or number in self._linked or number in self._kept:
            return True
        try:
            if self._is_there(segment, current):
                self._kept.add(number)
                return True
            self._open.append(-1)               # no memory is needed to know it once it is open
            self._open[-1] = self.source.open(segment.name)
            self._fds[number] = self._open[-1]
        except FileNotFoundError:
            return False
        except OSError as problem:
            if problem.errno == errno.EMFILE:
                raise Error(errno.EMFILE, "a backup has each segment open that it copies: allow more open files "
                            "(ulimit -n)", self.source.path) from None
            raise
        if self.links and segment.sealed and self._is_free(segment) and self.target.link(self.source, segment.name):
            self._linked.add(number)
            del self._fds[number]
            files.close(self._open.pop())
        return True

    def _is_free(self, segment: Segment) -> bool:
        """Whether the backup that is there has no file of this name."""
        return self.old is None or self.old.segment_numbered(segment.number) is None

    def _is_there(self, segment: Segment, current: Manifest) -> bool:
        """Whether the backup that is there has this very segment; no link, where links are not wanted."""
        known = None if self.old is None else self.old.segment_numbered(segment.number)
        if known is None or not segment.sealed or replace(known, chunk=segment.chunk) != segment:
            return False
        try:
            fd = self.target.open(segment.name)
        except OSError:
            return False
        try:
            if not self.links and os.path.samestat(os.fstat(fd), self.source.stat(segment.name)):
                return False
            whole = os.fstat(fd).st_size > (segment.end or 0)
            return whole and files.read_at(fd, START, 0) == _header(segment, current)
        finally:
            files.close(fd)

    # -- the segments -------------------------------------------------------------------------------------

    def _copy_all(self, current: Manifest, state: dict[str, int]) -> Manifest:
        """All segments of the backup, on the device, and the MANIFEST that names them."""
        found = [segment for segment in current.segments if not segment.replaced_by]
        last = next((at for at, segment in enumerate(found) if segment.number == state["number"]), -1)
        log = [replace(segment, end=self._end_of(found, at, state)) for at, segment in enumerate(found[:last + 1])]
        self._total = 2 * sum((segment.end or 0) - START for segment in log if segment.number not in self._kept)
        self._step(0)
        new = current.copy()
        new.backup = True
        new.generation = 1 + max(current.generation, 0 if self.old is None else self.old.generation)
        new.last_version = max(current.last_version, state["version"])
        new.segments = [self._take(segment, current) for segment in log if segment.end != START]
        new.next_number = self._next
        active = new.add_segment(found[last].capacity)
        before = new.segments[-2] if len(new.segments) > 1 else None
        link = b""
        if before is not None:
            link = _core.encode_link(before.number, before.end or 0, state["version"], active.salt)
        with self._created(active, current) as fd:
            files.allocate(fd, file_step(0, active.capacity, START + len(link)))
            files.write_at(fd, link, START)
            files.sync_data(fd)
        return new

    def _end_of(self, segments: Sequence[Segment], at: int, state: dict[str, int]) -> int:
        """Where the log ends in a segment."""
        segment = segments[at]
        if segment.end is not None:
            return segment.end
        if segment.number == state["number"]:
            return state["end"]
        following = segments[at + 1]
        self._map(self._fds[following.number], following)
        link = _core.read_link(self.log, following.chunk)
        self.log.drop_segments([following.chunk])
        if link is None or link[0] != segment.number:
            raise self._damage("the first record does not name the segment before", self.source, following, START,
                               f"segment {segment.number}", "none" if link is None else str(link[0]))
        return link[1]

    def _take(self, segment: Segment, current: Manifest) -> Segment:
        """The segment as the backup has it: kept, linked or copied; checked, and on the device."""
        if segment.number in self._kept:
            self._sizes["kept"].append(self.target.size(segment.name)[0])
            return segment
        if segment.number not in self._linked:
            return self._copy(segment, current)
        fd = self.target.open(segment.name)
        try:
            self._step((segment.end or 0) - START)
            self._compare(fd, segment, current, self._read(fd, segment, self.source))
            files.sync_data(fd)
            self._sizes["linked"].append(os.fstat(fd).st_size)
        finally:
            files.close(fd)
        return segment

    def _copy(self, segment: Segment, current: Manifest) -> Segment:
        """A sealed file with the same records at the same offsets, under a number of its own if need be: no checksum of
        a record tells that."""
        source, end = self._fds[segment.number], segment.end or 0
        copy = replace(segment, sealed=True)
        if not (segment.sealed and self._is_free(segment)):
            copy.number, copy.capacity = self._next, end
            self._next += 1
        with self._created(copy, current) as fd:
            for at in range(START, end, STEP):
                files.write_at(fd, files.read_at(source, min(STEP, end - at), at), at)
                self._step(min(STEP, end - at))
            try:
                found = self._read(fd, copy, self.target)
            except CorruptionError:
                self._read(source, segment, self.source)        # it may be damaged there
                raise
            self._compare(source, segment, current, found)
            footer, records, first, last, tombstones = found
            if not segment.sealed:
                copy.records, copy.tombstones = records, tombstones
                copy.first_version, copy.last_version = first, last
            files.write_at(fd, footer, end)
            files.sync_data(fd)
            self._sizes["copied"].append(os.fstat(fd).st_size)
        return copy

    @contextmanager
    def _created(self, segment: Segment, current: Manifest) -> Iterator[int]:
        """A new file with a segment's header."""
        fd = self.target.open(segment.name, writable=True, create=True, exclusive=True)
        try:
            files.write_at(fd, _header(segment, current), 0)
            yield fd
        finally:
            files.close(fd)

    # -- reading back -------------------------------------------------------------------------------------

    def _read(self, fd: int, segment: Segment, where: files.Directory) -> tuple[bytes, int, int, int, int]:
        """Reads all records of a segment and makes the footer that it must have; see `_core.build_footer`.  Raises
        CorruptionError if a record is damaged."""
        self._checked = self._path(where, segment), segment
        self._map(fd, segment)
        try:
            at, end, version = START, segment.end or 0, 0
            stop = min(end, at + STEP)
            while at < end:
                reason, reached, version, _ = _core.survey(self.log, segment.chunk, at, stop, version, segment.merged)
                if reached == at and stop == end:
                    raise self._damage(f"records damaged ({reason})", where, segment, at, "a record", "none")
                stop = end if reached == at else min(end, reached + STEP)      # one may be longer than a step
                self._step(reached - at)
                at = reached
            merged = (segment.first_version, segment.last_version) if segment.merged else None
            return _core.build_footer(self.log, segment.chunk, end, merged)
        finally:
            self.log.drop_segments([segment.chunk])

    def _compare(self, fd: int, segment: Segment, current: Manifest,
                 found: tuple[bytes, int, int, int, int]) -> None:
        """What the store has beside the records must fit them."""
        footer, records, first, last, tombstones = found
        header, expected = files.read_at(fd, START, 0), _header(segment, current)
        if header != expected:
            raise self._damage("the header is damaged", self.source, segment, 0, expected.hex(), header.hex())
        if not segment.sealed:
            return
        there = files.read_at(fd, len(footer), segment.end or 0)
        if there != footer:
            raise self._damage("the footer does not list the segment's records", self.source, segment, segment.end or 0,
                               f"crc32c {_core.checksum(footer):08x}", f"{_core.checksum(there):08x}")
        if segment.merged and segment.first_version <= first and last <= segment.last_version:
            first, last = segment.first_version, segment.last_version           # of all that was merged
        said = segment.records, segment.first_version, segment.last_version, segment.tombstones
        if said != (records, first, last, tombstones):
            raise CorruptionError(f"what is said of {segment.name} is wrong",
                                  path=os.path.join(self.source.path, files.MANIFEST),
                                  expected=str((records, first, last, tombstones)), found=str(said))

    def _map(self, fd: int, segment: Segment) -> None:
        self.log.map_segment(fd, segment.number, segment.chunk, segment.capacity, os.fstat(fd).st_size, segment.salt)

    def _place_of(self, location: int) -> tuple[str, int, int]:
        """For the log: path and number of the segment that is read, and the offset there."""
        path, segment = self._checked
        return path, segment.number, (location - (segment.chunk << _core.CHUNK_UNITS)) << 3

    def _path(self, where: files.Directory, segment: Segment) -> str:
        return os.path.join(where.path, segment.name)

    def _damage(self, what: str, where: files.Directory, segment: Segment, offset: int | None, expected: str,
                found: str) -> CorruptionError:
        return CorruptionError(what, path=self._path(where, segment), segment=segment.number, offset=offset,
                               expected=expected, found=found)

    def _step(self, size: int) -> None:
        self._done = min(self._done + size, self._total)
        self.progress(self._done // 2, self._total // 2)


def _header(segment: Segment, current: Manifest) -> bytes:
    return _core.encode_segment_header(segment.number, current.identity, current.seed, segment.salt)
