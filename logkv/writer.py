"""What changes a store: creating, recovering, rotating, sealing, syncing, closing.

The order of the steps is what survives a crash; docs/how-it-works.md says why each stands where it does.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
import time
import weakref
from dataclasses import dataclass
from typing import Any

from logkv import _core, files, manifest, recovery
from logkv.engine import Engine, no_store
from logkv.errors import ClosedError, Error, NotFoundError, ReadOnlyError
from logkv.manifest import Instance, Manifest, Segment
from logkv.worker import Worker

FIRST_STEP = 32 << 10           # bytes that a new segment's file has
LARGEST_STEP = 16 << 20         # by which it grows at the most
START = _core.SEGMENT_HEADER
_alive: weakref.WeakSet[Writing] = weakref.WeakSet()    # also those that are just being opened or closed
PARTIAL = 4096                  # bytes behind a trusted end that are looked at, beside what was reserved


@dataclass(frozen=True, slots=True)
class Options:
    """How a store is written; the same for all handles of a process."""

    sync: float | str = "os"                # "os", "always", or seconds
    segment_size: int = 256 << 20
    background: bool = True                 # sealing and flushing on a thread of their own

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


class Writing(Engine):
    """A store, open for writing, shared by all handles of the process that write it.

    Locks are taken in the order `_seal_lock`, `_sync_lock`, `_lock`; a put's fast path takes none of them.  They may
    be taken twice, for a signal's handler or a finalizer may close the store in the middle of anything.
    """

    def __init__(self, directory: files.Directory, options: Options, *, create: bool, timeout: float) -> None:
        self.options = options
        self._create_missing = create
        self._timeout = timeout
        self._turn = threading.Condition()      # who syncs next
        self._leader: int | None = None         # the thread that syncs for all who wait
        self._sync_lock = threading.RLock()     # one fdatasync of the log at a time
        self._seal_lock = threading.RLock()     # `_lock`, of Engine, holds the MANIFEST, the active segment, rotation
        self._lock_fd = self._index_fd = -1
        self._fds: dict[int, int] = {}          # of segments that are not sealed, open since before their first store
        self._synced_version: int | None = None  # all up to here is on the device; None: not known
        self._worker = Worker(self)
        self.problem: BaseException | None = None   # the last failure on the background thread
        self._closing = False
        self.created = False                    # there was no store before
        _alive.add(self)
        super().__init__(directory, writable=True)

    # -- opening ----------------------------------------------------------------------------------------

    def _open(self) -> None:
        began = time.perf_counter()
        with files.full_disk_is_an_error(self.directory.path, "open the store"):
            self._look()                # what is refused is not touched, not even by a lock
            self._lock_fd = files.lock(self.directory, self._timeout)
            found = self._look()
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
        self._request_sealing()

    def _look(self) -> tuple[Manifest, Instance] | None:
        """The MANIFEST, or None where a store may be created; raises for anything else."""
        found = manifest.read(self.directory, writable=True)
        if found is not None:
            recovery.check_headers(self.directory, found[0])
        else:
            problem = no_store(self.directory)
            if not (self._create_missing and isinstance(problem, NotFoundError)):
                raise problem
        return found

    def _create(self) -> None:
        """A new store in an empty directory, or in one where that was begun before: the MANIFEST comes last."""
        self.created = True
        for name in self.directory.names():
            if name not in (files.LOCK, files.CONTROL, files.LOST_FOUND):
                self.directory.unlink(name)
        new = Manifest.new()
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
        fd = self.directory.open(segment.name, writable=True, create=True, exclusive=True)
        self._fds[segment.number] = fd
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
            os.close(fd)

    def _open_control(self) -> None:
        self._allocate_control()
        if not self._map_control():
            raise Error("the control page vanished while the store was opened")
        if not self.log.trust:
            self.log.begin_control()

    def _recover(self, instance: Instance) -> None:
        self._epoch = self.manifest.epoch
        self.promised = recovery.promised(self.log, instance)
        trust = recovery.trust(self.directory, self.log, self._control_fd, instance)
        self.log.note_epoch(self.manifest.epoch)
        failed = self.log.trust["sync_failed"] and self.log.trust["boot"] == files.boot_id()
        tail = self._take_trusted(trust, instance) if trust.index else None
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
            files.allocate(self._index_fd, os.fstat(self._index_fd).st_size, whole=True)
            number, _, _ = self.log.restore_state()
            segment = self.manifest.segment_numbered(number)
            if segment is None or segment.sealed:
                problem = f"it ends in segment {number}, which is not the active one"
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
        number, end, version = self.log.restore_state()
        self.recovered = {"index": "clean" if trust.clean else "trusted", "cut_bytes": 0}
        return recovery.walk(self, segment, end, version, trusted=True)

    def _rebuild(self, why: str) -> recovery.Tail:
        """A new index from the log, in a file of its own until it is whole.

        Where the log is damaged this raises before the control page has changed: what that promised stays known.
        """
        expected = recovery.expected_keys(self)
        self.directory.unlink(files.INDEX_NEXT)
        with self._building():
            self._keep_index(self.directory.open(files.INDEX_NEXT, writable=True, create=True, exclusive=True))
            files.allocate(self._index_fd, _core.index_pages(expected) * _core.PAGE)
            _core.create_index(self.log, self._index_fd, expected, self.manifest.epoch, secrets.randbits(63) + 1)
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
                                          files.read_at(fd, stop - start, start))
            for offset in range(start, stop, 1 << 20):
                files.write_at(fd, bytes(min(1 << 20, stop - offset)), offset)
            files.sync_data(fd)
            self.recovered["cut_bytes"] += stop - start
        return lost

    def _begin(self, tail: recovery.Tail, lost: int) -> None:
        """The log's end is known and clean behind: writes a MANIFEST of this writer's own and lets puts begin."""
        current = self.manifest.copy()
        version = max(tail.version, lost, current.last_version)
        if lost:
            version = max(version, manifest.now())
            current.cuts.append([tail.version, version + 1])
        current.last_version = version
        fd = self._fd_of(tail.segment)
        size = os.fstat(fd).st_size
        files.allocate(fd, size, whole=True)
        self._set_active(tail.segment, size, tail.end)
        if version != tail.version or self.recovered["index"] == "rebuilt":
            self.log.settle_state(tail.segment.number, tail.end, version)
        # Where only the generation is new, its loss to a power cut loses nothing.
        self._write_manifest(current, durable=lost > 0 or self.recovered["index"] == "rebuilt")
        if self.recovered["index"] == "rebuilt":
            self._vouch_index(_core.index_nonce(self.log))
            self.directory.sync()
            self.log.note_durable(next(s.number for s in current.segments if not s.sealed), START)
            self.log.note_sync_failure(0)
        elif self.recovered["index"] == "clean":
            self._synced_version = tail.version

    def _set_active(self, segment: Segment, size: int, end: int) -> None:
        self.map_segment(segment, size)
        _core.set_active(self.log, self._fd_of(segment), segment.number, segment.chunk, segment.capacity,
                         min(size, segment.capacity), end)

    @property
    def _active(self) -> Segment:
        """The segment that is appended to."""
        segment = self.manifest.segment_numbered(self.log.position[0])
        assert segment is not None
        return segment

    def _fd_of(self, segment: Segment) -> int:
        if segment.number not in self._fds:
            self._fds[segment.number] = self.directory.open(segment.name, writable=True)
        return self._fds[segment.number]

    def _close_fd(self, segment: Segment) -> None:
        fd = self._fds.pop(segment.number, -1)
        if fd >= 0:
            os.close(fd)

    def _drop(self, segment: Segment) -> None:
        """Removes a segment that no MANIFEST names any more."""
        self._close_fd(segment)
        self.directory.unlink(segment.name)

    def _keep_index(self, fd: int) -> None:
        if self._index_fd >= 0:
            os.close(self._index_fd)
        self._index_fd = fd

    # -- MANIFEST and trust -----------------------------------------------------------------------------

    def _write_manifest(self, new: Manifest, *, durable: bool = True) -> None:
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
        self.log.stop_writes(f"{type(problem).__name__} while {what} ({problem}): reading goes on, writing needs the store "
                             "to be closed and opened again")

    def _vouch_manifest(self, instance: Instance) -> None:
        for coming in (True, False):
            self.log.note_manifest(coming, instance.generation, instance.inode, instance.ctime)

    def _vouch_index(self, nonce: int) -> None:
        control = os.fstat(self._control_fd)
        self.log.trust_index(files.boot_id(), control.st_dev, control.st_ino, os.fstat(self._index_fd).st_ino, nonce)

    # -- room in the log --------------------------------------------------------------------------------

    def _make_room(self, need: int) -> None:
        """The next record does not fit into what is allocated: more of the segment, or the next one."""
        while True:
            with self._lock, files.full_disk_is_an_error(self.directory.path, "make room for a record"):
                self._check_open()
                number, end = self.log.position
                if end + need <= self.log.allocated:
                    return
                full = self._full_segments()
                if end + need <= self.log.capacity:
                    self._grow_file(end + need)
                    if end > self.log.capacity // 2 and not full and self._successor() is None:
                        self._request(self._prepare)
                    return
                if not full:
                    self._rotate(need)
                    break
            self._seal_oldest()         # at most one full segment is unsealed: this put waits
        self._request_sealing()

    def _grow_file(self, needed: int) -> None:
        fd = self._fds[self._active.number]
        have = os.fstat(fd).st_size
        try:
            files.allocate(fd, file_step(have, self._active.capacity, needed))
        except OSError as problem:
            if problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            files.allocate(fd, -(-needed // _core.PAGE) * _core.PAGE)   # less may still fit
        size = os.fstat(fd).st_size
        self.map_segment(self._active, size)
        _core.set_allocated(self.log, self._active.chunk, min(size, self._active.capacity))

    def _successor(self) -> Segment | None:
        """The segment that was prepared to follow the active one."""
        last = self.manifest.segments[-1]
        return last if last.number != self.log.position[0] else None

    def _full_segments(self) -> list[Segment]:
        """Full segments that are not sealed yet."""
        full = []
        active, _ = self.log.position
        for segment in self.manifest.segments:
            if segment.number == active:
                break
            if not segment.sealed:
                full.append(segment)
        return full

    def _prepare(self, need: int = 0) -> None:
        """Makes the successor: its file on the device, then its name in the MANIFEST, before its first record."""
        with self._lock:
            self._check_open()
            capacity = max(self.options.segment_size, START + _core.CONTINUES_SIZE + need)
            old = self._successor()
            if old is not None and old.capacity >= capacity:
                return
            new = self.manifest.copy()
            if old is not None:
                new.segments.pop()
            segment = new.add_segment(capacity)
            self._create_segment(new, segment)
            self._write_manifest(new)
            if old is not None:
                self._drop(old)

    def _rotate(self, need: int) -> None:
        """Goes on in the successor.  Called with the lock held and nothing left to seal."""
        self._prepare(need)
        segment = self._successor()
        assert segment is not None
        fd = self._fd_of(segment)
        files.allocate(fd, file_step(os.fstat(fd).st_size, segment.capacity, START + _core.CONTINUES_SIZE + need))
        size = os.fstat(fd).st_size
        files.allocate(fd, size, whole=True)
        self.map_segment(segment, size)
        _core.switch_segment(self.log, fd, segment.number, segment.chunk, segment.capacity, min(size, segment.capacity))

    # -- sealing ----------------------------------------------------------------------------------------

    def _request_sealing(self) -> None:
        if self._full_segments():
            self._request(self._seal_oldest)

    def _seal_oldest(self) -> None:
        """Seals the oldest full segment: records synced, footer written, synced, then `sealed` in the MANIFEST."""
        with self._seal_lock, files.full_disk_is_an_error(self.directory.path, "seal a full segment"):
            self._check_open()
            full = self._full_segments()
            if not full:
                return
            segment = full[0]
            with self._lock:
                following = self.manifest.segments[self.manifest.segments.index(segment) + 1]
                fd, following_fd = self._fd_of(segment), self._fd_of(following)
                self.map_segment(segment)
                self.map_segment(following)
            end = segment.end
            if end is None:
                link = _core.read_link(self.log, following.chunk)
                assert link is not None and link[0] == segment.number
                end = link[1]
            with self._sync_lock:
                self._sync_fd(fd)
                self._sync_fd(following_fd)     # a segment behind a sealed one begins with its link, whatever happens
            value = _core.build_footer(self.log, segment.chunk, end)
            first, last, records = (int.from_bytes(value[at:at + 8], "little") for at in (0, 8, 16))
            record = _core.encode_record(_core.FOOTER, last, b"", value, segment.salt, end)
            files.allocate(fd, end + len(record))
            files.write_at(fd, record, end)
            with self._sync_lock, self._lock:
                self._sync_fd(fd)
                self._check_open()
                new = self.manifest.copy()
                sealed = new.segment_numbered(segment.number)
                assert sealed is not None
                sealed.sealed, sealed.end, sealed.records = True, end, records
                sealed.first_version, sealed.last_version = first, last
                self._write_manifest(new)
                self._close_fd(segment)
                if self.log.trust["durable"] < (following.number, START):
                    self.log.note_durable(following.number, START)

    # -- the device -------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Everything acknowledged is on the device when this returns."""
        self._sync_to(self.log.state["version"])

    def _sync_to(self, version: int) -> None:
        """Shares the sync of another thread, if that began after this version; all who wait for it go on together."""
        me = threading.get_ident()
        with self._turn:
            while self._leader not in (None, me) and (self._synced_version or 0) < version:
                self._turn.wait()
            if (self._synced_version or 0) >= version:
                return
            self._leader = me
        try:
            self._sync_now()
        finally:
            with self._turn:
                self._leader = None
                self._turn.notify_all()

    def _sync_now(self) -> None:
        with self._sync_lock:
            if self.log.closed:
                raise ClosedError("the store is closed")
            if not self.writable:
                raise ReadOnlyError("the store is open for reading only")
            if self.log.poisoned:
                raise Error(self.log.poisoned)
            with self._lock:
                number, end = self.log.position
                covered = self.log.state["version"]
                fds = [self._fd_of(segment) for segment in [*self._full_segments(), self._active]]
            for fd in fds:
                self._sync_fd(fd)
            with self._lock:
                self.log.note_durable(number, end)
                self.log.synced(covered)
                self._synced_version = _core.append_mark(self.log, number, end, covered)
            if self._synced_version == covered:
                self._flush_later()         # writes came in meanwhile

    def _sync_fd(self, fd: int) -> None:
        try:
            files.sync_data(fd)
        except OSError as problem:
            self._poison(problem)
            raise Error(problem.errno, self.log.poisoned) from problem

    def _poison(self, problem: OSError) -> None:
        """A sync that failed cannot be repeated: the system may have dropped the pages and call them clean."""
        number, end = self.log.trust["durable"]
        self.log.stop_writes(
            f"a sync failed ({problem.strerror}): what was written after offset {end} of segment {number} may not be "
            "on the device; reading goes on, writing needs the store to be closed and opened again")
        self.log.note_sync_failure(problem.errno or 5)

    def _flush_later(self) -> None:
        """The flush begins at half of the seconds that a write may stay unsynced."""
        if self.options.background and not isinstance(self.options.sync, str):
            self._worker.call_later(self.options.sync / 2, self.sync)

    def _rescue(self, tail: recovery.Tail) -> recovery.Tail:
        """After a failed sync in this boot, the cache above the last durable place may call pages clean that the device
        never got: writes it all again, to a new segment, before anything else."""
        number, durable = self.log.trust["durable"]
        segments = self.manifest.segments
        segment = self.manifest.segment_numbered(number)
        if segment is None or segment.sealed:
            segment = next(s for s in segments if not s.sealed)
            durable = START
        self.map_segment(segment)
        _, durable, version, _ = _core.survey(self.log, segment.chunk, START, durable, 0)
        version = max([version, *(s.last_version for s in segments)])
        new = self.manifest.copy()
        at = segments.index(segment)
        del new.segments[at + 1:]
        new.segments[at].end = durable
        parts = []
        for source in segments[at:segments.index(tail.segment) + 1]:
            start = durable if source is segment else START
            stop = tail.end if source is tail.segment else source.end if source.end is not None else 1 << 62
            parts.append((source.chunk, start, stop))
        size = START + _core.CONTINUES_SIZE + sum(min(stop, self.log.mapped(chunk)) - start for chunk, start, stop in parts)
        copy = new.add_segment(max(self.options.segment_size, size + _core.MARK_SIZE))
        records = _core.encode_link(segment.number, durable, version, copy.salt)
        for chunk, start, stop in parts:
            records += _core.copy_records(self.log, chunk, start, stop, copy.salt, START + len(records))
        self._create_segment(new, copy, records)
        self._write_manifest(new)
        for old in segments[at + 1:]:
            self._drop(old)
        self.log.note_sync_failure(0)
        return self._rebuild("a sync had failed")

    # -- emptying ---------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Empties the store at once: one synced MANIFEST names a new segment alone, then an empty index follows."""
        with self._seal_lock, self._sync_lock, self._lock, \
                files.full_disk_is_an_error(self.directory.path, "empty the store"):
            self._check_open()
            self.log.pause(True)            # puts take no lock: they wait here
            try:
                self._begin_anew()
            finally:
                self.log.pause(False)

    def _begin_anew(self) -> None:
        """What can fail comes before the MANIFEST; where something fails behind it, writing ends."""
        version = max(self.log.state["version"] + 1, manifest.now())
        new = self.manifest.copy()
        new.segments.clear()
        new.epoch += 1
        segment = new.add_segment(self.options.segment_size)
        number, end = self.log.position
        records = _core.encode_link(number, end, version - 1, segment.salt)
        records += _core.encode_record(_core.CLEAR, version, b"", b"", segment.salt, START + len(records))
        self._create_segment(new, segment, records)
        size = os.fstat(self._fds[segment.number]).st_size
        self.map_segment(segment, size)
        self.directory.unlink(files.INDEX_NEXT)
        index_fd = self.directory.open(files.INDEX_NEXT, writable=True, create=True, exclusive=True)
        try:
            files.allocate(index_fd, _core.index_pages(0) * _core.PAGE)
            self.log.note_epoch(new.epoch)      # readers look at the MANIFEST until the new index is named
            old = self.manifest.segments
            self._write_manifest(new)
        except BaseException:
            os.close(index_fd)
            self.log.note_epoch(self.manifest.epoch)
            raise
        try:
            self.directory.rename(files.INDEX_NEXT, files.INDEX)
            self._keep_index(index_fd)
            with self._building():
                _core.create_index(self.log, index_fd, 0, new.epoch, secrets.randbits(63) + 1)
                _core.set_active(self.log, self._fds[segment.number], segment.number, segment.chunk, segment.capacity,
                                 min(size, segment.capacity), START + len(records))
                self.log.settle_state(segment.number, START + len(records), version, len(records))
            self.log.pause(True)
            self._epoch = new.epoch
            self._vouch_index(_core.index_nonce(self.log))
            self.log.note_durable(segment.number, START + len(records))
            self._synced_version = version
            self.log.forget_segments(segment.chunk)
            for gone in old:
                self._drop(gone)
            self.directory.sync()
        except BaseException as problem:
            self._stop_writes(problem, "the store was emptied")
            raise

    # -- the index's file -------------------------------------------------------------------------------

    def _index_pages(self, pages: int) -> None:
        with self._lock, files.full_disk_is_an_error(self.directory.path, "make room in the index"):
            self._check_open()
            files.allocate(self._index_fd, pages * _core.PAGE)
            _core.extend_index(self.log, self._index_fd, pages)

    def _index_damaged(self, why: str) -> None:
        """A shard fails its checksum: the log has it all.  If it cannot be built from that, writing ends."""
        with self._lock:
            active, end, version = self._active, self.log.position[1], self.log.state["version"]
            try:
                self._rebuild(why)
                self.log.settle_state(active.number, end, version)
                self._vouch_index(_core.index_nonce(self.log))
            except BaseException as problem:
                self._stop_writes(problem, f"a damaged index was built anew ({why})")
                raise

    # -- background and end -----------------------------------------------------------------------------

    def _request(self, task: Any) -> None:
        if self.options.background:
            self._worker.call(task)
        else:
            task()

    def failed_in_background(self, problem: BaseException) -> None:
        """What the worker's thread could not do is tried again by the put that needs it, and raises there."""
        self.problem = problem
        if not self._closing and not self.log.poisoned:
            self._flush_later()

    def _check_open(self) -> None:
        """Under the lock that what follows needs: close() takes them all before it lets anything go.  After a failed
        sync nothing may be called durable any more."""
        if self.log.poisoned:
            raise Error(self.log.poisoned)
        if self._closing or self.log.closed:
            raise ClosedError("the store is closed")

    def close(self) -> None:
        """Syncs, gives the index its checksums, sets the clean mark, lets the lock go.  Everything is let go also
        when that fails, and then the failure is raised."""
        try:
            self.log.stop_writes()
            self._closing = True
            self._worker.stop()
            if not self.log.poisoned and self.log.writable:
                with files.full_disk_is_an_error(self.directory.path, "close the store"):
                    self.sync()
                    with self._seal_lock, self._sync_lock, self._lock:
                        self._finish()
        finally:
            with self._seal_lock, self._sync_lock, self._lock:
                self.release()

    def _finish(self) -> None:
        """The log is on the device; so are then the mark of that sync, the index, and at last the clean mark."""
        self._sync_fd(self._fd_of(self._active))
        _core.seal_index(self.log)
        files.sync_data(self._index_fd)
        self.directory.sync()
        self.log.mark_clean(self.manifest.generation)
        files.sync_data(self._control_fd)

    def _release(self) -> None:
        super()._release()
        for fd in [*self._fds.values(), self._index_fd, self._lock_fd]:
            if fd >= 0:
                os.close(fd)
        self._fds.clear()
        self._index_fd = self._lock_fd = -1

    def after_fork(self) -> None:
        """The child reads on, as any reader; the lock stays the parent's alone."""
        for fd in [*self._fds.values(), self._index_fd, self._lock_fd]:
            if fd >= 0:
                os.close(fd)
        self._lock = threading.RLock()
        self.writable = False
        if hasattr(self, "log"):
            self.log.become_reader()
            self.log.heed((self.log.signs[0], self._epoch, 0))
        self.__class__ = Engine         # type: ignore[assignment]

    def stats(self) -> dict[str, Any]:
        facts = super().stats()
        facts["active"] = self._active.number
        facts["problem"] = None if self.problem is None else str(self.problem)
        facts["poisoned"] = self.log.poisoned
        return facts


def file_step(size: int, capacity: int, needed: int) -> int:
    """How long a segment's file becomes: twice as long, within bounds, and as long as is needed."""
    step = max(FIRST_STEP, min(2 * size, size + LARGEST_STEP), needed)
    page = _core.PAGE
    return max(size, min(-(-step // page) * page, -(-capacity // page) * page))


def writers() -> list[Writing]:
    """All that this process has."""
    return list(_alive)
