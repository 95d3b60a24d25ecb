"""What one process has open of one store: the files behind a `_core.Log`, and what the log asks of them.

`Engine` reads; `logkv.opening.Opening` opens for writing, and `logkv.writer.Writing` adds what changes an open store.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from logkv import _core, files, manifest, recovery
from logkv.errors import ClosedError, CorruptionError, Error, FormatError, NotFoundError
from logkv.manifest import Instance, Manifest, Segment

Progress = Callable[[int, int], None]

ATTEMPTS = 50       # to see MANIFEST and control page of one moment while a writer changes both


class Engine:
    """A store, open for reading, shared by all handles of the process that read it.

    Follows a live writer in any process.  Without an index to trust it builds one of its own in memory.
    """

    def __init__(self, directory: files.Directory, *, writable: bool = False, progress: Progress | None = None) -> None:
        """Takes the directory over; it is closed with the engine, also when this raises.

        progress: called while this builds an index, with the bytes of the log that were read and those there are.
        """
        self.directory = directory
        self.writable = writable
        self.users = 0
        self.key: tuple[int, int, bool]     # under which the process finds it
        self.lock = threading.RLock()  # the index while it is being built, and letting go; a writer adds to this
        self._failure: BaseException | None = None      # why there is no index at all
        self._orphaned = False          # nobody builds the index any more
        self.log: _core.Log
        self.recovered: dict[str, Any] = {}
        self._control_fd = -1
        self.promised = (0, 0)          # (file number, offset) that the log must reach
        self._epoch = self._moves = 0   # of the index that is in use
        self.codec: str | None          # of the values, while it is open
        self._opening = True
        self.progress = progress or (lambda done, total: None)
        try:
            self._open()
            self._opening = False
            self.progress = lambda done, total: None
        except BaseException:
            self._release()             # nobody else knows it, and there may be no memory to take the lock
            raise

    # -- opening and closing ----------------------------------------------------------------------------

    def _open(self) -> None:
        with files.full_disk_is_an_error(self.directory.path, "open the store"):
            self.manifest, _ = self._read_manifest()
            self.codec = self.manifest.codec
            self.log = _core.Log(self, self.manifest.identity, self.manifest.seed, False)
            self._map_control()
            self._take_index()

    def _read_manifest(self) -> tuple[Manifest, Instance]:
        known = getattr(self, "manifest", None)
        found = manifest.read(self.directory, writable=self.writable, known=known)
        if found is None:
            problem = no_store(self.directory)
            found = manifest.read(self.directory, writable=self.writable)   # a store may just have been created
            if found is None:
                raise problem
        return found

    def _map_control(self) -> bool:
        """Maps the control page, if there is one to be read."""
        try:
            fd = self.directory.open(files.CONTROL, writable=self.writable)
        except FileNotFoundError:
            return False
        except OSError as problem:
            raise Error(problem.errno, f"cannot open the control page: {problem.strerror}",
                        self.path_of(files.CONTROL)) from None
        self._control_fd = fd
        if os.fstat(fd).st_size < _core.PAGE:
            self._control_fd = -1
            files.close(fd)
            return False
        self.log.map_control(fd)
        return True

    def _take_index(self) -> None:
        """The store's index if it can be trusted, else one of our own."""
        for _ in range(ATTEMPTS):
            signs = self.log.signs
            self.manifest, instance = self._read_manifest()
            trust = self.trust_in_index(instance)
            why = trust.why
            if trust.index:
                problem = self._attach_index(trust.clean, signs[0])
                if problem is None:
                    self._now_in(self.manifest.epoch, signs)
                    return
                why = problem
            if self.log.signs == signs and self._read_manifest()[1] == instance and not files.has_writer(self.directory):
                break
        self._build_own_index(why)

    def trust_in_index(self, instance: Instance) -> recovery.Trust:
        """Whether the store's index is to be believed beside this MANIFEST."""
        return recovery.trust(self.directory, self.log, self._control_fd, instance)

    def _now_in(self, epoch: int, signs: tuple[int, int, int, int]) -> None:
        """The index is taken: it belongs to this epoch, and is good until the control page shows other signs."""
        if epoch != self._epoch:
            self.log.forget_segments(moved=self.manifest.moves != self._moves)
            self._epoch, self._moves = epoch, self.manifest.moves
            if self._opening:
                self.codec = self.manifest.codec
            elif self.manifest.codec != self.codec:     # handles that decode would read what is something else
                self.log.close()
                raise ClosedError(f"{self.directory.path} was emptied and now has codec {self.manifest.codec!r}, not "
                                  f"{self.codec!r}: open it again")
        self.log.heed((signs[0], epoch if signs[1] else 0, *signs[2:]))
        self._let_go()

    def _let_go(self) -> None:
        """Of the segments that the MANIFEST does not name any more."""
        named = {segment.chunk for segment in self.manifest.segments}
        gone = [chunk for chunk in self.log.segments() if chunk not in named]
        if gone:
            self.log.drop_segments(gone)

    def _attach_index(self, clean: bool, nonce: int) -> str | None:
        try:
            fd = self.directory.open(files.INDEX, writable=self.writable)
        except OSError as problem:
            if problem.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise Error(problem.errno, f"cannot open the index: {problem.strerror}", self.path_of(files.INDEX)) from None
            return f"the index cannot be opened: {problem.strerror}"
        try:
            return _core.attach_index(self.log, fd, os.fstat(fd).st_size, self.manifest.epoch, nonce, clean)
        finally:
            self._keep_index(fd)

    def _keep_index(self, fd: int) -> None:
        files.close(fd)

    def _build_own_index(self, why: str) -> None:
        """An index in this process's memory, of the log as it is now.  A store that is written meanwhile, or was not
        to be trusted, is looked at again as soon as the control page changes."""
        with self._building():
            for attempt in range(ATTEMPTS):
                signs = self.log.signs
                self.manifest, instance = self._read_manifest()
                self.promised = recovery.promised(self.log, instance)
                self._now_in(self.manifest.epoch, signs)
                try:
                    _core.create_index(self.log, None, recovery.expected_keys(self), self.manifest.epoch, signs[0],
                                       [segment.chunk for segment in self.manifest.segments])
                    recovery.rebuild(self, why)
                    return
                except (CorruptionError, FileNotFoundError):
                    if not self._overtaken() or attempt == ATTEMPTS - 1:
                        raise

    @contextmanager
    def _building(self) -> Iterator[None]:
        """While the index is not whole, other threads wait; if it cannot be built, they are told why."""
        with self.lock:
            self.log.build(True)
            try:
                yield
            except BaseException as problem:
                self._failure = problem
                raise
            else:
                self._failure = None
                self.log.build(False)

    def _await_turn(self) -> None:
        """Returns when nobody builds the index or changes what is appended to."""
        if self.lock._is_owned() and self._failure is None and not self._orphaned:      # type: ignore[attr-defined]
            raise Error(f"{self.directory.path} is being changed by this very thread: a signal's handler or a finalizer that "
                        "comes in the middle cannot wait for that")
        with self.lock:
            if self._orphaned or self._failure is not None:     # by a thread that a fork has left behind, or that failed
                self._orphaned = False
                try:
                    self._take_index()
                except (Error, MemoryError) as problem:
                    self._failure = problem
                    raise Error(f"the store has no index: {problem}") from problem
                self._failure = None
                self.log.build(False)

    def _overtaken(self) -> bool:
        """Whether a writer has changed the list of segments since we read it."""
        return not self.writable and self._read_manifest()[0].generation != self.manifest.generation

    def after_fork(self) -> None:
        """In the child, where only the thread lives that forked."""
        self.lock = threading.RLock()
        if hasattr(self, "log"):
            self._orphaned = self.log.building
            self.log.become_reader()

    def release(self) -> None:
        """Lets everything go, whatever state it is in."""
        with self.lock:
            self._release()

    def _release(self) -> None:
        log = getattr(self, "log", None)
        if log is not None:
            log.close()
        fd, self._control_fd = self._control_fd, -1
        if fd >= 0:
            files.close(fd)
        self.directory.close()

    def __del__(self) -> None:
        """What could not be let go before, for lack of memory: there may be none now either."""
        try:
            self._release()
        except AttributeError:          # it was hardly begun
            pass

    def close(self) -> None:
        self.release()

    # -- what the log asks for --------------------------------------------------------------------------

    def map_segment(self, segment: Segment, size: int | None = None) -> None:
        """Makes a segment readable, as far as its file goes."""
        try:
            fd = self.directory.open(segment.name, writable=self.writable)
        except FileNotFoundError:
            raise CorruptionError("a file that the MANIFEST names is missing", path=self.path_of(segment.name),
                                  segment=segment.number, expected="a segment", found="nothing", fatal=True) from None
        except OSError as problem:
            raise Error(problem.errno, f"cannot open a segment: {problem.strerror}",
                        self.path_of(segment.name)) from None
        try:
            self.log.map_segment(fd, segment.number, segment.chunk, segment.capacity,
                                 os.fstat(fd).st_size if size is None else size, segment.salt)
        finally:
            files.close(fd)

    def path_of(self, name: str) -> str:
        return os.path.join(self.directory.path, name)

    def _place_of(self, location: int) -> tuple[str | None, int | None, int]:
        """Path and number of the segment that a location lies in, and the offset there."""
        segment = self.manifest.segment_at(location >> _core.CHUNK_UNITS)
        if segment is None:
            return None, None, location << 3
        offset = (location - (segment.chunk << _core.CHUNK_UNITS)) << 3
        return self.path_of(segment.name), segment.number, offset

    # Several threads may ask at a time: each says what it knew, and the first answer may serve them all.

    def _map_location(self, location: int, known: int) -> bool:
        """Maps the segment of a location, of which `known` bytes were, or more of it; False if there is no more."""
        chunk = location >> _core.CHUNK_UNITS
        with self.lock:
            segment = self.manifest.segment_at(chunk)
            try:
                if segment is not None:
                    self.map_segment(segment)
                    return self.log.mapped(chunk) > known
            except CorruptionError:
                if not self._overtaken():
                    raise
            if not self._overtaken():
                return False
            self.manifest, _ = self._read_manifest()
            if self.manifest.epoch != self._epoch:      # all locations are others now
                self._take_index()
            return True

    def _index_changed(self) -> None:
        """The control page says something new: another index, another epoch, or, where ours is our own, a write."""
        with self.lock:
            signs = self.log.signs
            found, _ = self._read_manifest()
            if found.epoch != self._epoch:
                self._take_index()
            elif signs[0] == 0 and self.log.state["version"] >= signs[2]:
                # a writer rebuilds the index; until it writes, ours is as good
                self.log.heed((0, self._epoch if signs[1] else 0, *signs[2:]))
            elif signs[0] != self.log.nonce or self.log.index_is_private:
                self._take_index()
            else:                       # segments have gone, or the store is about to be cleared and is not yet
                self.manifest = found
                self._let_go()
                self.log.heed_merges(signs[3])

    def _index_grew(self, known: int) -> bool:
        """Maps pages of the index that were added to the `known` ones; False if there are none."""
        with self.lock:
            if _core.index_bytes(self.log) > known * _core.PAGE:
                return True
            try:
                fd = self.directory.open(files.INDEX)
            except FileNotFoundError:
                return False
            try:
                pages = os.fstat(fd).st_size // _core.PAGE
                if pages > known and self.log.signs[0] == self.log.nonce \
                        and os.fstat(fd).st_ino == self.log.trust.get("index_inode"):
                    _core.extend_index(self.log, fd, pages)
                    return True
            finally:
                files.close(fd)
            if self.log.signs[0] == self.log.nonce:
                return False
            self._index_changed()
            return True

    def _index_pages(self, pages: int) -> None:
        """More room for an index in memory."""
        _core.extend_index(self.log, None, pages)

    def _index_damaged(self, why: str) -> None:
        """The index cannot be believed after all: one of our own takes its place."""
        with self.lock:
            self._build_own_index(why)

    def refresh(self) -> None:
        """Looks at the store anew."""
        with self.lock, files.full_disk_is_an_error(self.directory.path, "look at the store anew"):
            self._check_not_closed()
            if not self.writable:
                if self._control_fd < 0:
                    self._map_control()
                if self.log.index_is_private:
                    self._take_index()
                else:
                    self._index_changed()

    def shares(self) -> list[tuple[Segment, int, int, int]]:
        """Of each segment that counts: (segment, aligned bytes of its records, records alive, aligned bytes of these)."""
        segments = [segment for segment in self.manifest.segments if not segment.replaced_by]
        live = _core.live_shares(self.log, self.manifest.places())
        for s in self.manifest.segments:
            if s.replaced_by:           # its records are on their way there
                other = next(o for o in segments if o.number == s.replaced_by)
                live[other.chunk] = (live[other.chunk][0] + live[s.chunk][0], live[other.chunk][1] + live[s.chunk][1])
        state = self.log.state
        shares = []
        for at, segment in enumerate(segments):
            end = segment.end
            if end is None and segment.number == state["number"]:
                end = state["end"]
            elif end is None and at + 1 < len(segments):
                self.map_segment(segments[at + 1])
                link = _core.read_link(self.log, segments[at + 1].chunk)
                end = link[1] if link is not None and link[0] == segment.number else None
            shares.append((segment, (end or _core.SEGMENT_HEADER) - _core.SEGMENT_HEADER, *live[segment.chunk]))
        return shares

    def stats(self) -> dict[str, Any]:
        """What is known of the store now."""
        with self.lock, files.full_disk_is_an_error(self.directory.path, "read the store's state"):     # which nobody closes
            self._check_not_closed()
            return self._facts()

    def _check_not_closed(self) -> None:
        """Under the lock: what is open stays open."""
        if self.log.closed:
            raise ClosedError("the store is closed")

    def _facts(self) -> dict[str, Any]:
        if not self.writable:
            self.manifest, _ = self._read_manifest()
        state = self.log.state
        index = _core.index_facts(self.log)
        segments = []
        for s, size, records, live in self.shares():
            length, allocated = self.directory.size(s.name)
            segments.append({"number": s.number, "sealed": s.sealed, "bytes": length, "allocated": allocated,
                             "capacity": s.capacity, "records": s.records if s.sealed else None,
                             "live_records": records, "live_bytes": live, "dead_bytes": size - live})
        return {
            "path": self.directory.path,
            "keys": state["keys"],
            "live_bytes": sum(s["live_bytes"] for s in segments),
            "dead_bytes": sum(s["dead_bytes"] for s in segments),
            "log_bytes": sum(s["bytes"] for s in segments),
            "index_bytes": index["bytes"],
            "index": index,
            "segments": segments,
            "last_version": state["version"],
            "generation": self.manifest.generation,
            "epoch": self.manifest.epoch,
            "codec": self.manifest.codec,
            "cuts": [list(cut) for cut in self.manifest.cuts],
            "cut_bytes": self.manifest.cut_bytes,
            "recovery": dict(self.recovered),
            "writable": self.writable,
        }


def no_store(directory: files.Directory) -> Error:
    """Why a directory without a MANIFEST is not opened."""
    foreign = [name for name in directory.names() if not files.is_store_name(name)]
    if foreign:
        return FormatError(f"{directory.path} is not a LogKV store: it holds {sorted(foreign)[0]!r} and no MANIFEST")
    if files.BACKUP_BEGUN in directory.names():
        return FormatError(f"{directory.path} holds a backup that was not finished: back up to it again, or remove it")
    if recovery.has_records(directory):
        return CorruptionError("the MANIFEST is missing, but there are segments", expected="a MANIFEST", found="none",
                               path=os.path.join(directory.path, files.MANIFEST), fatal=True)
    if directory.removed():
        return NotFoundError(errno.ENOENT, "the store's directory was removed while it was open; what is there now must be "
                             "opened again", directory.path)
    return NotFoundError(errno.ENOENT, "there is no store in this directory", directory.path)
