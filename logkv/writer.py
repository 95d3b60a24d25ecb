"""What changes a store that is open: room for records, rotation, sealing, syncing, clearing, closing.

The order of the steps is what survives a crash; docs/how-it-works.md says why each stands where it does.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from logkv import _core, files, manifest
from logkv.compaction import Compactor
from logkv.engine import Engine, Progress
from logkv.errors import ClosedError, CorruptionError, Error, ReadOnlyError
from logkv.manifest import Manifest, Segment
from logkv.opening import FIRST_STEP, LARGEST_STEP, START, Opening, Options, file_step
from logkv.worker import Worker

LARGE_INDEX = 4     # how many times larger than needed an index is built anew
PATIENCE = 0.05     # seconds after which the worker, where it waits, looks whether the store is being closed

_alive: weakref.WeakSet[Writing] = weakref.WeakSet()    # also those that are just being opened or closed


class Writing(Opening):
    """A store, open for writing, shared by all handles of the process that write it.

    Locks are taken in the order `_seal_lock`, `_sync_lock`, `lock`; a put's fast path takes none of them.  They may
    be taken twice, for a signal's handler or a finalizer may close the store in the middle of anything; the worker,
    whose end it waits for then, gives up what it would have to wait for.
    """

    def __init__(self, directory: files.Directory, options: Options, *, create: bool, timeout: float,
                 check: Callable[[Manifest], None] | None = None, progress: Progress | None = None) -> None:
        self._turn_lock = threading.RLock()
        self._turn = threading.Condition(self._turn_lock)       # who syncs next
        self._leader: int | None = None         # the thread that syncs for all who wait
        self._sync_lock = threading.RLock()     # one fdatasync of the log at a time
        self._seal_lock = threading.RLock()     # `lock`, of Engine, holds the MANIFEST, the active segment, rotation
        self._worker = Worker(self)
        self._merger = Worker(self)
        self.compactor = Compactor(self)        # its lock comes before all of these
        self.problem: BaseException | None = None   # the last failure on the background thread
        self._closing = False
        self._full_at = options.segment_size    # bytes at which a segment is sealed; fewer where much is dead
        super().__init__(directory, options, create=create, timeout=timeout, check=check, progress=progress)

    def _open(self) -> None:
        _alive.add(self)
        super()._open()
        self._request_sealing()
        self._request_compaction()

    def holding(self, lock: threading.RLock) -> AbstractContextManager[Any]:
        """The lock, for a `with` statement.  On the worker's thread: ClosedError if the store is closed meanwhile."""
        return self._patiently(lock) if self.in_background() else lock     # which no signal's exception can leak

    def in_background(self) -> bool:
        """Whether the calling thread is one of the workers'."""
        return self._worker.runs_here() or self._merger.runs_here()

    @contextmanager
    def _patiently(self, lock: threading.RLock) -> Iterator[None]:
        while not lock.acquire(timeout=PATIENCE):
            self._give_way()
        try:
            yield
        finally:
            lock.release()

    def _give_way(self) -> None:
        if self._closing:
            raise ClosedError("the store is closed")

    # -- room in the log --------------------------------------------------------------------------------

    def _make_room(self, need: int) -> None:
        """The next record does not fit into what is allocated: more of the segment, or the next one."""
        store = self.compactor.make_space()
        if store is not None and store.due:
            self._request_compaction()
        while True:
            with self.lock, files.full_disk_is_an_error(self.directory.path, "make room for a record"):
                self.check_open()
                number, end = self.log.position
                if end + need <= self.log.allocated:
                    return
                full = self.full_segments()
                self._full_at = store.early if store is not None and store.due else self.options.segment_size
                full_at = min(self.log.capacity, self._full_at)
                if end + need <= full_at or end + need <= self.log.capacity and end < START + _core.PAGE:
                    self._grow_file(end + need, LARGEST_STEP if store is None else store.largest_step)
                    if end > full_at // 2 and not full and self._successor() is None:
                        self._request(self._prepare)
                    return
                if not full:
                    self._rotate(need)
                    break
            self.seal_oldest()         # at most one full segment is unsealed: this put waits
        self._request_sealing()

    def _grow_file(self, needed: int, largest: int) -> None:
        fd = self._fds[self._active.number].fd
        have = self.log.allocated       # the file may be longer, with holes
        size = file_step(have, self._active.capacity, needed, largest)
        try:
            files.allocate(fd, size, start=have)
        except OSError as problem:
            if problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            size = -(-needed // _core.PAGE) * _core.PAGE
            files.allocate(fd, size, start=have)        # less may still fit
        self.map_segment(self._active, size)
        _core.set_allocated(self.log, self._active.chunk, min(size, self._active.capacity))

    def _successor(self) -> Segment | None:
        """The segment that was prepared to follow the active one."""
        last = self.manifest.segments[-1]
        return last if last.number != self.log.position[0] else None

    def full_segments(self) -> list[Segment]:
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
        with self.holding(self.lock):
            self.check_open()
            chunks = -(-self._full_at // _core.CHUNK)       # no more of the location space than it will use
            capacity = max(min(self.options.segment_size, chunks * _core.CHUNK), START + _core.CONTINUES_SIZE + need)
            old = self._successor()
            if old is not None and old.capacity >= capacity or self.full_segments():    # rotated meanwhile
                return
            new = self.manifest.copy()
            if old is not None:
                new.segments.pop()
            segment = new.add_segment(capacity)
            self._create_segment(new, segment)
            self.write_manifest(new)
            if old is not None:
                self._drop(old)

    def _rotate(self, need: int) -> None:
        """Goes on in the successor.  Called with the lock held and nothing left to seal."""
        self._prepare(need)
        segment = self._successor()
        assert segment is not None
        fd = self._fd_of(segment)
        size = file_step(FIRST_STEP, segment.capacity, START + _core.CONTINUES_SIZE + need)
        files.allocate(fd, size, start=0)
        self.map_segment(segment, size)
        _core.switch_segment(self.log, fd, segment.number, segment.chunk, segment.capacity, min(size, segment.capacity))

    # -- sealing ----------------------------------------------------------------------------------------

    def _request_sealing(self) -> None:
        if self.full_segments():
            self._request(self.seal_oldest)

    def _request_compaction(self) -> None:
        if self.options.background:
            self._merger.call(self.compact_soon)
        else:
            self.compact_soon()

    def compact_soon(self) -> None:
        """On the merger's thread: what there is to compact."""
        delay = self.compactor.in_background()
        if delay is not None and self.options.background:
            self._merger.call_later(delay, self.compact_soon)

    def seal_all(self) -> None:
        """Every segment that has something dead, the one that is appended to too."""
        rotated = False
        while True:
            with self.lock, files.full_disk_is_an_error(self.directory.path, "seal the active segment"):
                self.check_open()
                if not self.full_segments():
                    if rotated or not self.compactor.has_dead(self._active):
                        return
                    self._rotate(0)
                    rotated = True
            self.seal_oldest()

    def forget(self, gone: Sequence[Segment]) -> None:
        """Nothing needs these segments: the MANIFEST without them, readers are told, then mappings and files go."""
        numbers = {segment.number for segment in gone}
        new = self.manifest.copy()
        new.segments = [segment for segment in new.segments if segment.number not in numbers]
        self.write_manifest(new)
        self.log.note_merge()
        self.log.drop_segments([segment.chunk for segment in gone])
        for segment in gone:
            _core.drop_row(self.log, segment.chunk)
            self._drop(segment)

    def seal_oldest(self) -> None:
        """Seals the oldest full segment: records synced, footer written, synced, then `sealed` in the MANIFEST."""
        with self.holding(self._seal_lock), files.full_disk_is_an_error(self.directory.path, "seal a full segment"):
            self.check_open()
            full = self.full_segments()
            if not full:
                return
            segment = full[0]
            with self.holding(self.lock):
                following = self.manifest.segments[self.manifest.segments.index(segment) + 1]
                fd, following_fd = self._fd_of(segment), self._fd_of(following)
                self.map_segment(segment)
                self.map_segment(following)
                end = segment.end
                if end is None:
                    link = _core.read_link(self.log, following.chunk)
                    if link is None or link[0] != segment.number:
                        raise CorruptionError("the first record is damaged", path=self.path_of(following.name),
                                              segment=following.number, offset=START,
                                              expected=f"what continues segment {segment.number}", found=str(link))
                    end = link[1]
                dead = segment is self.manifest.segments[0] and self.compactor.is_dead(segment)
                behind = [self._fd_of(each) for each in [*self.full_segments()[1:], self._active]]
            if dead:
                self._drop_dead(segment, behind)
                return
            with self.holding(self._sync_lock):
                self._sync_fd(fd)
                self._sync_fd(following_fd)     # a segment behind a sealed one begins with its link, whatever happens
            footer, records, first, last, tombstones = _core.build_footer(self.log, segment.chunk, end)
            files.allocate(fd, end + len(footer))
            files.write_at(fd, footer, end)
            with self.holding(self._sync_lock), self.holding(self.lock):
                self._sync_fd(fd)
                self.check_open()
                new = self.manifest.copy()
                sealed = new.segment_numbered(segment.number)
                assert sealed is not None
                sealed.sealed, sealed.end, sealed.records = True, end, records
                sealed.first_version, sealed.last_version, sealed.tombstones = first, last, tombstones
                self.write_manifest(new)
                files.free_space(fd, end + len(footer))
                self._close_fd(segment)
                if self.log.trust["durable"] < (following.number, START):
                    self.log.note_durable(following.number, START)
        self._request_compaction()

    def _drop_dead(self, segment: Segment, behind: Sequence[int]) -> None:
        """The oldest segment, of which nothing is alive, needs no footer: nothing older can come back without it.  What made
        it dead, in any of the segments behind it (after failed syncs there are several), must be on the device."""
        with self.holding(self._sync_lock):
            for fd in behind:
                self._sync_fd(fd)
        with self.holding(self._sync_lock), self.holding(self.lock):
            self.check_open()
            self.forget([segment])

    # -- the device -------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Everything acknowledged is on the device when this returns."""
        self._sync_to(self.log.state["version"])

    def _sync_to(self, version: int) -> None:
        """Shares the sync of another thread, if that began after this version; all who wait for it go on together."""
        me = threading.get_ident()
        with self._turn_lock:
            while self._leader not in (None, me) and (self._synced_version or 0) < version:
                if not self._turn.wait(PATIENCE) and self.in_background():
                    self._give_way()
            if (self._synced_version or 0) >= version:
                return
            self._leader = me
        try:
            self._sync_now()
        finally:
            with self._turn_lock:
                self._leader = None
                self._turn.notify_all()

    def _sync_now(self) -> None:
        with self.holding(self._sync_lock), files.full_disk_is_an_error(self.directory.path, "sync the store"):
            if self.log.closed:
                raise ClosedError("the store is closed")
            if not self.writable:
                raise ReadOnlyError("the store is open for reading only")
            if self.log.poisoned:
                raise Error(self.log.poisoned)
            with self.holding(self.lock):
                number, end = self.log.position
                covered = self.log.state["version"]
                fds = list(map(self._fd_of, [*self.full_segments(), self._active]))
            for fd in fds:
                self._sync_fd(fd)
            if self.directory.removed():
                raise Error(errno.ENOENT, "the store's directory was removed: nothing of it is kept", self.directory.path)
            with self.holding(self.lock):
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

    def _flush_later(self) -> None:
        """The flush begins at half of the seconds that a write may stay unsynced."""
        if self.options.background and not isinstance(self.options.sync, str):
            self._worker.call_later(self.options.sync / 2, self.sync)

    # -- emptying ---------------------------------------------------------------------------------------

    def clear(self, codec: str | None) -> None:
        """Empties the store at once: one synced MANIFEST names a new segment alone, then an empty index follows.

        What comes is encoded with `codec`.
        """
        with self._seal_lock, self._sync_lock, self.lock, \
                files.full_disk_is_an_error(self.directory.path, "empty the store"):
            self.check_open()
            self.log.pause(True)            # puts take no lock: they wait here
            try:
                self._begin_anew(codec)
            finally:
                self.log.pause(False)

    def _begin_anew(self, codec: str | None) -> None:
        """What can fail comes before the MANIFEST; where something fails behind it, writing ends."""
        version = max(self.log.state["version"] + 1, manifest.now())
        new = self.manifest.copy()
        new.segments.clear()
        new.epoch += 1
        new.codec = codec
        segment = new.add_segment(self.options.segment_size)
        number, end = self.log.position
        records = _core.encode_link(number, end, version - 1, segment.salt)
        records += _core.encode_record(_core.CLEAR, version, b"", b"", segment.salt, START + len(records))
        self._create_segment(new, segment, records)
        size = os.fstat(self._fds[segment.number].fd).st_size
        self.map_segment(segment, size)
        self.directory.unlink(files.INDEX_NEXT)
        index_fd = self.directory.open(files.INDEX_NEXT, writable=True, create=True, exclusive=True)
        try:
            files.allocate(index_fd, _core.index_pages(0, 1) * _core.PAGE)
            self.log.note_epoch(new.epoch)      # readers look at the MANIFEST until the new index is named
            old = self.manifest.segments
            self.write_manifest(new)
        except BaseException:
            files.close(index_fd)
            self.log.note_epoch(self.manifest.epoch)
            raise
        try:
            self._keep_index(index_fd)
            with self._building():
                _core.create_index(self.log, index_fd, 0, new.epoch, secrets.randbits(63) + 1, [segment.chunk])
                self._set_active(segment, size, START + len(records))
                self.log.settle_state(segment.number, START + len(records), version)
            self.log.pause(True)
            self._epoch = new.epoch
            self.codec = codec
            self.directory.rename(files.INDEX_NEXT, files.INDEX)
            self._vouch_index(_core.index_nonce(self.log))
            self.log.note_durable(segment.number, START + len(records))
            self._synced_version = version
            self.log.forget_segments(segment.chunk)
            for gone in old:
                self._drop(gone)
            self.directory.sync()
        except BaseException as problem:
            if self._epoch != new.epoch:        # whoever reads finds another index first
                self._failure = problem
                self.log.build(True)
            self._stop_writes(problem, "the store was emptied")
            raise

    # -- the index's file -------------------------------------------------------------------------------

    def _index_pages(self, pages: int) -> None:
        with self.lock, files.full_disk_is_an_error(self.directory.path, "make room in the index"):
            self.check_open()
            files.allocate(self._index_fd, pages * _core.PAGE)
            _core.extend_index(self.log, self._index_fd, pages)

    def _index_damaged(self, why: str) -> None:
        """A shard fails its checksum: the log has it all.  If it cannot be built from that, writing ends."""
        with self.lock:
            self._index_anew(why)

    def _index_anew(self, why: str, expected: int | None = None) -> None:
        active, end, version = self._active, self.log.position[1], self.log.state["version"]
        try:
            self._rebuild(why, expected)
            self.log.settle_state(active.number, end, version)
            self._vouch_index(_core.index_nonce(self.log))
        except BaseException as problem:
            self._stop_writes(problem, f"the index was built anew ({why})")
            raise

    def shrink_index(self) -> None:
        """An index that is much larger than its keys need is built anew, while writes wait."""
        with self._seal_lock, self._sync_lock, self.lock, \
                files.full_disk_is_an_error(self.directory.path, "build a smaller index"):
            self.check_open()
            keys = self.log.state["keys"]
            if _core.index_bytes(self.log) < LARGE_INDEX * _core.index_pages(keys, len(self.manifest.segments)) * _core.PAGE:
                return
            recovered = self.recovered
            self.log.pause(True)
            try:
                self._index_anew("it was larger than needed", keys)
            finally:
                self.log.pause(False)
                self.recovered = recovered

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

    def check_open(self) -> None:
        """Under the lock that what follows needs: close() takes them all before it lets anything go.  After a failed
        sync nothing may be called durable any more."""
        if self.log.poisoned:
            raise Error(self.log.poisoned)
        if self._closing or self.log.closed:
            raise ClosedError("the store is closed")

    def close(self) -> None:
        """Syncs, gives the index its checksums, sets the clean mark, lets the lock go.  Everything is let go also
        when that fails, or a sync has failed before, and then the failure is raised."""
        try:
            self.log.stop_writes()
            self._closing = True
            self._worker.stop()
            self._merger.stop()
            if self.log.poisoned:
                raise Error(self.log.poisoned)
            if self.log.writable:
                with files.full_disk_is_an_error(self.directory.path, "close the store"):
                    self.sync()
                    with self._seal_lock, self._sync_lock, self.lock:
                        self._finish()
        finally:
            self.release()

    def release(self) -> None:
        with self.compactor.lock, self._seal_lock, self._sync_lock:
            super().release()

    def _finish(self) -> None:
        """The log is on the device; so are then the mark of that sync, the index, and at last the clean mark."""
        self._sync_fd(self._fd_of(self._active))
        _core.seal_index(self.log)
        files.sync_data(self._index_fd)
        self.directory.sync()
        self.log.mark_clean(self.manifest.generation)
        files.sync_data(self._control_fd)

    def after_fork(self) -> None:
        """The child reads on, as any reader; the lock stays the parent's alone (`files.forget_locks` was called)."""
        self._close_fds()
        self.writable = False
        super().after_fork()
        if hasattr(self, "log"):
            self.log.heed((self.log.signs[0], self._epoch, 0, 0))
        self.__class__ = Engine         # type: ignore[assignment]

    def _facts(self) -> dict[str, Any]:
        facts = super()._facts()
        facts["active"] = self.log.position[0]
        facts["compaction"] = self.compactor.facts()
        facts["problem"] = None if self.problem is None else str(self.problem)
        facts["poisoned"] = self.log.poisoned
        return facts


def writers() -> list[Writing]:
    """All that this process has."""
    return list(_alive)
