"""Opening a store for writing: creating it, or finding out what is true and cutting off what is not.

The order of the steps is what survives a crash; docs/how-it-works.md says why each stands where it does.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

from logkv import _core, files, manifest, recovery
from logkv.engine import Engine, Progress, no_store
from logkv.errors import Error, NotFoundError
from logkv.manifest import Instance, Manifest, Segment

FIRST_STEP = 32 << 10           # bytes that a new segment's file has
LARGEST_STEP = 16 << 20         # by which it grows at the most
START = _core.SEGMENT_HEADER
UNFINISHED = "reading goes on, writing needs the store to be closed and opened again"
PATIENCE = 1.0                  # seconds for the lock, to say more of a failure
PARTIAL = 4096                  # bytes behind a trusted end that are looked at, beside what was reserved


@dataclass(frozen=True, slots=True)
class Options:
    """How a store is written; the same for all handles of a process."""

    sync: float | str = "os"                # "os", "always", or seconds
    segment_size: int = 256 << 20
    codec: str | None = field(default=None, compare=False)      # of a new store; an existing one has its own
    compaction: str = "auto"                # "auto" or "manual"
    compaction_rate: float | None = None    # bytes a second that compaction writes in the background; None: no limit
    background: bool = True                 # sealing, flushing and compaction on threads of their own

    def __str__(self) -> str:
        rate = "" if self.compaction_rate is None else f", compaction_rate={self.compaction_rate:,}"
        return f"sync={self.sync!r}, segment_size={self.segment_size:,}, compaction={self.compaction!r}{rate}"

    def __post_init__(self) -> None:
        if isinstance(self.sync, str):
            if self.sync not in ("os", "always"):
                raise ValueError(f'sync must be "os", "always" or a number of seconds, not {self.sync!r}')
        elif isinstance(self.sync, bool) or not isinstance(self.sync, (int, float)):
            raise TypeError(f'sync must be "os", "always" or a number of seconds, not {type(self.sync).__name__}')
        elif not 0 < self.sync <= 86_400:
            raise ValueError(f"sync must be more than 0 and at most 86,400 seconds, not {self.sync}")
        if not isinstance(self.segment_size, int) or isinstance(self.segment_size, bool):
            raise TypeError(f"segment_size must be an int, not {type(self.segment_size).__name__}")
        if not _core.SEGMENT_MIN <= self.segment_size <= _core.SEGMENT_MAX:
            raise ValueError(f"segment_size must be from {_core.SEGMENT_MIN:,} (64 KiB) to {_core.SEGMENT_MAX:,} "
                             f"(1 GiB) bytes, not {self.segment_size:,}")
        if self.compaction not in ("auto", "manual"):
            raise ValueError(f'compaction must be "auto" or "manual", not {self.compaction!r}')
        rate = self.compaction_rate
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float))):
            raise TypeError(f"compaction_rate must be a number of bytes a second, not {type(rate).__name__}")
        if rate is not None and not rate > 0:
            raise ValueError(f"compaction_rate must be more than 0 bytes a second, not {rate}")


class Opening(Engine):
    """A store with its writer's lock, from there to where puts may begin; and what its MANIFEST and index vouch for."""

    def __init__(self, directory: files.Directory, options: Options, *, create: bool, timeout: float,
                 check: Callable[[Manifest], None] | None = None, progress: Progress | None = None) -> None:
        """check: raises if a store is not to be opened; it is not touched then.  progress: as of `Engine`."""
        self.options = options
        self._check = check
        self._create_missing = create
        self._timeout = timeout
        self._lock: _core.Descriptor | None = None
        self._index_fd = -1
        self._fds: dict[int, _core.Descriptor] = {}          # of segments that are not sealed, open since before their first store
        self._synced_version: int | None = None  # all up to here is on the device; None: not known
        self.created = False                    # there was no store before
        super().__init__(directory, writable=True, progress=progress)

    def _open(self) -> None:
        began = time.perf_counter()
        with files.full_disk_is_an_error(self.directory.path, "open the store"):
            found = self._look()        # what is refused is not touched, not even by a lock
            self._lock = files.lock(self.directory, self._timeout)
            found = self._look(None if found is None else found[0])
            if found is None:
                self._create()
                found = self._look()
                assert found is not None
            self.manifest, instance = found
            self.log = _core.Log(self, self.manifest.identity, self.manifest.seed, True)
            self._open_control()
            for name in recovery.leftovers(self.directory, self.manifest):
                self.directory.unlink(name)
            self._recover(instance)
        sync = self.options.sync
        self.log.set_sync(sync == "always", int(sync * 1e9) if not isinstance(sync, str) else 0)
        self.recovered.setdefault("seconds", time.perf_counter() - began)

    def _look(self, known: Manifest | None = None) -> tuple[Manifest, Instance] | None:
        """The MANIFEST, or None where a store may be created; raises for anything else.  known: what was looked at before."""
        found = manifest.read(self.directory, writable=True, known=known)
        if found is None:
            problem = no_store(self.directory)
            found = manifest.read(self.directory, writable=True)    # a store may just have been created
        if found is not None:
            if found[0] is not known:
                if self._check is not None:
                    self._check(found[0])
                recovery.check_headers(self.directory, found[0])
        elif not (self._create_missing and isinstance(problem, NotFoundError)):
            raise problem
        return found

    def _create(self) -> None:
        """A new store in an empty directory, or in one where that was begun before: the MANIFEST comes last."""
        self.created = True
        for name in self.directory.names():
            if name not in (files.LOCK, files.CONTROL, files.LOST_FOUND):
                self.directory.unlink(name)
        new = Manifest.new(self.options.codec)
        new.generation = 1
        segment = new.add_segment(self.options.segment_size)
        self._create_segment(new, segment)
        self._allocate_control()        # a reader that finds the MANIFEST follows from there
        manifest.write_next(self.directory, new)
        manifest.adopt_next(self.directory)

    def _create_segment(self, current: Manifest, segment: Segment, records: bytes = b"") -> None:
        """A segment's file, on the device with its header, before any MANIFEST names it."""
        self._close_fd(segment)
        self.directory.unlink(segment.name)
        fd = self._open_fd(segment, new=True)
        files.allocate(fd, file_step(0, segment.capacity, START + len(records)))
        header = _core.encode_segment_header(segment.number, current.identity, current.seed, segment.salt)
        files.write_at(fd, header + records, 0)
        files.sync_data(fd)
        self.directory.sync()

    def _allocate_control(self) -> None:
        fd = self.directory.open(files.CONTROL, writable=True, create=True)
        try:
            files.allocate(fd, _core.PAGE)
        finally:
            files.close(fd)

    def _open_control(self) -> None:
        self._allocate_control()
        if not self._map_control():
            raise Error("the control page vanished while the store was opened")
        if files.copies_on_write(self._control_fd):
            self.log.watch_space(self._control_fd, files.LITTLE)
        if not self.log.trust:
            self.log.begin_control()

    def _recover(self, instance: Instance) -> None:
        self._epoch = self.manifest.epoch
        self.codec = self.manifest.codec
        self.promised = recovery.promised(self.log, instance)
        trust = self.trust_in_index(instance)
        self.log.note_epoch(self.manifest.epoch)
        failed = self.log.trust["sync_failed"] and self.log.trust["boot"] == files.boot_id()
        tail = self._move_segments() if self.manifest.is_crowded else None
        if tail is None and trust.index:
            tail = self._take_trusted(trust, instance)
        if tail is None:
            tail = self._rebuild(trust.why or self.recovered.get("why", ""))
        if failed:
            tail = self._rescue(tail)
        lost = self._cut(tail)
        self._begin(tail, lost)

    def _take_trusted(self, trust: recovery.Trust, instance: Instance) -> recovery.Tail | None:
        """Goes on with the index that is there, and replays what it may lack; None if it is not right after all."""
        nonce = self.log.signs[0]
        problem = self._attach_index(trust.clean, nonce)
        if problem is None:
            files.allocate(self._index_fd, os.fstat(self._index_fd).st_size, start=0)
            number, end, version = self.log.restore_state()
            segment = self.manifest.segment_numbered(number)
            if segment is None or segment.sealed:
                problem = f"it ends in segment {number}, which is not the active one"
            elif end % 8 or not START <= end <= segment.chunks * _core.CHUNK:
                problem = f"it ends at {end}, where no record can end"
            elif version >= 1 << 63:
                problem = f"it has version {version}"
        if problem is not None:
            self.recovered = {"why": problem}
            return None
        assert segment is not None
        self._vouch_manifest(instance)
        self._vouch_index(nonce)
        if trust.clean:
            self.log.mark_dirty()
            files.sync_data(self._control_fd)
        self.map_segment(segment)
        _core.adopt_last(self.log, segment.chunk)
        _core.restore_rows(self.log, self.manifest.places())
        number, end, version = self.log.restore_state()
        self.recovered = {"index": "clean" if trust.clean else "trusted", "cut_bytes": 0}
        return recovery.walk(self, segment, end, version, trusted=True)

    def _move_segments(self) -> recovery.Tail | None:
        """The locations that nobody has any more are given out anew: an index of other locations, then, by `_begin`, a
        MANIFEST of another epoch with them.  None where damage, or a full disk, keeps that index from being built."""
        found = self.manifest
        self.manifest = found.moved()
        self._epoch = self.manifest.epoch
        try:
            return self._rebuild("locations are given out anew")
        except OSError:
            self.log.forget_segments()          # under the locations that they would have had
            self.log.build(False)
            self._failure = None
            self.manifest, self._epoch = found, found.epoch
            return None

    def _rebuild(self, why: str, expected: int | None = None) -> recovery.Tail:
        """A new index from the log, in a file of its own until it is whole.  expected: keys, if that is known.

        Where the log is damaged this raises before the control page has changed: what that promised stays known.
        """
        if expected is None:
            expected = recovery.expected_keys(self)
        self.directory.unlink(files.INDEX_NEXT)
        with self._building():
            self._keep_index(self.directory.open(files.INDEX_NEXT, writable=True, create=True, exclusive=True))
            chunks = [segment.chunk for segment in self.manifest.segments]
            files.allocate(self._index_fd, _core.index_pages(expected, len(chunks)) * _core.PAGE)
            _core.create_index(self.log, self._index_fd, expected, self.manifest.epoch, secrets.randbits(63) + 1, chunks)
            tail = recovery.rebuild(self, why)
        self.log.distrust_index()
        self.log.mark_dirty()
        files.sync_data(self._control_fd)
        self.directory.rename(files.INDEX_NEXT, files.INDEX)
        return tail

    def _cut(self, tail: recovery.Tail) -> int:
        """Zeroes what stands behind the log's end, what came later first; returns the highest version that went.

        Whole records among it are set aside.  Never by truncation: readers have the file mapped.
        """
        lost = 0
        rebuilt = self.recovered["index"] == "rebuilt"
        for segment in [*reversed(tail.abandoned or []), tail.segment]:
            start = tail.end if segment is tail.segment else START
            reach = 1 << 62 if rebuilt else max(self.log.reserved_end, start + PARTIAL)
            rest = _core.first_nonzero(self.log, segment.chunk, start, reach)
            if rest is None:
                continue
            fd = self._fd_of(segment)
            stop = rest[1]
            whole = _core.find_record(self.log, segment.chunk, start, tail.version)
            if whole is not None:
                lost = max(lost, whole)
                self.directory.save_aside(f"{segment.name}.{start}-{stop}.{tail.version}",
                                          partial(files.parts_of, fd, start, stop))
            for offset in range(start, stop, 1 << 20):
                files.write_at(fd, bytes(min(1 << 20, stop - offset)), offset)
            files.sync_data(fd)
            self.recovered["cut_bytes"] += stop - start
        return lost

    def _begin(self, tail: recovery.Tail, lost: int) -> None:
        """The log's end is known and clean behind: writes a MANIFEST of this writer's own and lets puts begin."""
        current = self.manifest.copy()
        rebuilt = self.recovered["index"] == "rebuilt"
        current.cut_bytes += self.recovered["cut_bytes"]
        version = max(tail.version, lost, current.last_version)
        if lost:
            version = max(version, manifest.now())
            current.cuts.append([tail.version, version + 1])
        current.last_version = version
        fd = self._fd_of(tail.segment)
        size = min(os.fstat(fd).st_size, file_step(tail.end, tail.segment.capacity, tail.end))
        files.allocate(fd, size, start=0)
        self.map_segment(tail.segment, size)
        self._set_active(tail.segment, size, tail.end)
        if version != tail.version or rebuilt:
            self.log.settle_state(tail.segment.number, tail.end, version)
        gone = [s for s in current.segments if s.replaced_by and rebuilt]
        gone += current.segments[self.manifest.segments.index(tail.segment) + 2:]   # one is prepared, at most
        current.segments = [s for s in current.segments if s not in gone]
        self.log.note_epoch(current.epoch)
        # Where only the generation is new, its loss to a power cut loses nothing.
        self.write_manifest(current, durable=lost > 0 or bool(gone) or rebuilt)
        self.log.drop_segments([segment.chunk for segment in gone])
        for segment in gone:
            _core.drop_row(self.log, segment.chunk)
            self._drop(segment)
        if rebuilt:
            self._vouch_index(_core.index_nonce(self.log))
            self.directory.sync()
            self.log.note_durable(next(s.number for s in current.segments if not s.sealed), START)
            self.log.note_sync_failure(0)
        elif self.recovered["index"] == "clean":
            self._synced_version = tail.version

    def _set_active(self, segment: Segment, size: int, end: int) -> None:
        """Appends go to this segment, which is mapped as far as its `size`, from `end` on."""
        _core.set_active(self.log, self._fd_of(segment), segment.number, segment.chunk, segment.capacity,
                         min(size, segment.capacity), end)

    @property
    def _active(self) -> Segment:
        """The segment that is appended to."""
        segment = self.manifest.segment_numbered(self.log.position[0])
        assert segment is not None
        return segment

    def _fd_of(self, segment: Segment) -> int:
        kept = self._fds.get(segment.number)
        return self._open_fd(segment) if kept is None else kept.fd

    def _open_fd(self, segment: Segment, new: bool = False) -> int:
        kept = _core.Descriptor()       # from here on the file is not left open, whatever fails
        kept.fd = self.directory.open(segment.name, writable=True, create=new, exclusive=new)
        self._fds[segment.number] = kept
        return kept.fd

    def _close_fd(self, segment: Segment) -> None:
        self._fds.pop(segment.number, None)

    def _drop(self, segment: Segment) -> None:
        """Removes a segment that no MANIFEST names any more."""
        self._close_fd(segment)
        self.directory.unlink(segment.name)

    def _close_fds(self) -> None:
        """What only a writer has open, its lock last.  Allocates nothing, nor does what calls it."""
        self._keep_index(-1)
        self._fds.clear()
        if self._lock is not None:
            files.unlock(self._lock)

    def _release(self) -> None:
        Engine._release(self)
        self._close_fds()

    def _keep_index(self, fd: int) -> None:
        """In place of the old one, which is closed; first it is forgotten, for a fork may come between."""
        old, self._index_fd = self._index_fd, fd
        if old >= 0:
            files.close(old)

    # -- MANIFEST and trust -----------------------------------------------------------------------------

    def write_manifest(self, new: Manifest, *, durable: bool = True) -> None:
        """Replaces the MANIFEST.  The control page is told before the rename, so a kill around it costs no trust."""
        new.generation = self.manifest.generation + 1
        new.last_version = max(new.last_version, self.log.state["version"])
        inode = manifest.write_next(self.directory, new)
        self.log.note_manifest(True, new.generation, inode, 0)
        try:
            ctime = manifest.adopt_next(self.directory, durable=durable)
            self._vouch_manifest(Instance(new.generation, inode, ctime))
            self.manifest = new
        except OSError as problem:      # which of the two is in force after a power cut is not known any more
            self._poison(problem)
            raise Error(problem.errno, self.log.poisoned) from problem
        except BaseException as problem:    # Ctrl-C: which of the two is in force is not known here
            self._stop_writes(problem, "the list of segments was changed")
            raise

    def _stop_writes(self, problem: BaseException, what: str) -> None:
        """Something structural was not finished: only the next opening can tell what is true."""
        said = UNFINISHED
        try:
            said = f"{type(problem).__name__} while {what} ({problem}): " + said
        finally:
            self.log.stop_writes(said)

    def _vouch_manifest(self, instance: Instance) -> None:
        for coming in (True, False):
            self.log.note_manifest(coming, instance.generation, instance.inode, instance.ctime)

    def _vouch_index(self, nonce: int) -> None:
        control = os.fstat(self._control_fd)
        self.log.trust_index(files.boot_id(), control.st_dev, control.st_ino, os.fstat(self._index_fd).st_ino, nonce)

    # -- a failed sync ----------------------------------------------------------------------------------

    def _poison(self, problem: OSError) -> None:
        """A sync that failed cannot be repeated: the system may have dropped the pages and call them clean."""
        said = UNFINISHED               # where there is no memory to say more
        try:
            self.log.note_sync_failure(problem.errno or errno.EIO)
            said = (f"a sync failed ({problem.strerror}): {self._what_is_durable()}, and no later sync could tell. Reading "
                    "goes on. Writing needs the store to be closed and opened again; until the system goes down that writes "
                    "anew what may be missing")
        finally:
            self.log.stop_writes(said)

    def _what_is_durable(self) -> str:
        """What of the writes is on the device, and how much is not known to be."""
        number, end = self.log.trust["durable"]
        if self.lock.acquire(timeout=PATIENCE):     # where threads wait for each other, less is said
            try:
                self.log.pause(True)                # what is counted stays
                segment, end, version = self._durable()
                writes, size = self._count_after(segment, end)
                until = datetime.fromtimestamp(version // 10**9, UTC).replace(tzinfo=None).isoformat(" ")
                known = f"everything written until {until}.{version % 10**9:09d} UTC (version {version})"
                return (f"{known if version else 'nothing'} is known to be on the device; "
                        f"{writes:,} {'write' if writes == 1 else 'writes'} of {size:,} bytes after that "
                        f"(behind offset {end} of segment {segment.number}) may not be")
            except (OSError, ValueError, MemoryError):
                pass                    # the failure that led here is the one to tell
            finally:
                self.lock.release()
        return f"what was written after offset {end} of segment {number} may not be on the device"

    def _durable(self) -> tuple[Segment, int, int]:
        """The last place in the log that a sync is known to have covered, and the last version before it."""
        number, end = self.log.trust["durable"]
        segment = self.manifest.segment_numbered(number)
        if segment is None or segment.sealed:
            segment = next(s for s in self.manifest.segments if not s.sealed)
            end = START
        self.map_segment(segment)
        _, end, version, _ = _core.survey(self.log, segment.chunk, START, end, 0)
        return segment, end, max([version, *(s.last_version for s in self.manifest.segments)])

    def _count_after(self, segment: Segment, end: int) -> tuple[int, int]:
        """Puts and deletes behind a place in the log, and their bytes."""
        writes = size = 0
        state = self.log.state
        segments = self.manifest.segments
        for following in segments[segments.index(segment):]:
            self.map_segment(following)
            last = following.number == state["number"]
            count, bytes_ = _core.count_writes(self.log, following.chunk, end if following is segment else START,
                                               state["end"] if last else 1 << 62)
            writes, size = writes + count, size + bytes_
            if last:
                break
        return writes, size

    def _rescue(self, tail: recovery.Tail) -> recovery.Tail:
        """After a failed sync in this boot, the cache above the last durable place may call pages clean that the device
        never got: writes it all again, to a new segment, before anything else."""
        segment, durable, version = self._durable()
        segments = self.manifest.segments
        new = self.manifest.copy()
        at = segments.index(segment)
        del new.segments[at + 1:]
        new.segments[at].end = durable
        parts = []
        for source in segments[at:segments.index(tail.segment) + 1]:
            self.map_segment(source)
            start = durable if source is segment else START
            stop = tail.end if source is tail.segment else source.end if source.end is not None else 1 << 62
            parts.append((source.chunk, start, stop))
        mapped = self.log.mapped
        size = START + _core.CONTINUES_SIZE + sum(min(stop, mapped(chunk)) - start for chunk, start, stop in parts)
        copy = new.add_segment(max(self.options.segment_size, size + _core.MARK_SIZE))
        records = _core.encode_link(segment.number, durable, version, copy.salt)
        for chunk, start, stop in parts:
            records += _core.copy_records(self.log, chunk, start, stop, copy.salt, START + len(records))
        self._create_segment(new, copy, records)
        self.log.distrust_index()       # it points beyond the end that this MANIFEST gives to the old segment
        self.write_manifest(new)
        for old in segments[at + 1:]:
            self._drop(old)
        self.log.note_sync_failure(0)
        return self._rebuild("a sync had failed")


def file_step(size: int, capacity: int, needed: int, largest: int = LARGEST_STEP) -> int:
    """How long a segment's file becomes: twice as long, or by the largest step, and as long as is needed."""
    step = max(FIRST_STEP, min(2 * size, size + largest), needed)
    page = _core.PAGE
    return max(size, min(-(-step // page) * page, -(-capacity // page) * page))
