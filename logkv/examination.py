"""What is intact of a damaged store's segments, and what is not.  Nothing is changed here."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from logkv import _core, files, recovery
from logkv.engine import Engine
from logkv.errors import Error
from logkv.inventory import START, UNKNOWN
from logkv.manifest import Instance, Manifest, Segment


class _NoIndex(Exception):
    """The store's index is not to be believed."""


class _Indexed(Engine):
    """The store as its index has it, where that can be trusted."""

    def _build_own_index(self, why: str) -> None:
        raise _NoIndex


@dataclass(slots=True)
class Damage:
    """A range of a segment's file."""

    start: int
    stop: int
    why: str
    known: bool                 # what was there, as far as it counts: by the hashes of its keys
    version: int = 0            # the last one before it


@dataclass(slots=True)
class State:
    """What was found of a segment."""

    segment: Segment
    place: int                  # in the log
    problem: str = ""           # with the file as a whole: nothing of it can be read
    size: int = 0
    end: int = START            # of its records
    footer: bool = False        # is whole
    records: int = 0
    first: int = 0              # versions
    last: int = 0
    damage: list[Damage] = field(default_factory=list)      # of records
    flaws: list[Damage] = field(default_factory=list)       # header or footer: what they hold is known without them
    totals: tuple[int, int, int, int] | None = None         # as the MANIFEST should give them

    @property
    def whole(self) -> bool:
        return not (self.problem or self.damage or self.flaws)

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """What of its records is intact."""
        starts = [START, *(damage.stop for damage in self.damage)]
        stops = [*(damage.start for damage in self.damage), self.end]
        return [(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop]


class Examination:
    """Of the segments that a MANIFEST names, while nobody writes.  What is read stays mapped in `log`."""

    def __init__(self, directory: files.Directory, current: Manifest) -> None:
        self.directory = directory
        self.current = current
        self.reach = (0, 0)         # (file number, offset) that the log is known to reach,
        self.version = 0            # and the version that it has there
        self.log = _core.Log(self, current.identity, current.seed, False)

    def close(self) -> None:
        self.log.close()

    def _place_of(self, location: int) -> tuple[None, None, int]:
        return None, None, location         # what the log asks where a page cannot be read

    def find_reach(self, instance: Instance) -> None:
        """How far the log is known to reach, by the control page of a store that was closed, or by its index."""
        map_control(self.directory, self.log)
        self.reach = recovery.promised(self.log, instance)
        try:
            engine = _Indexed(self.directory.again())
        except (_NoIndex, Error):
            return
        try:
            number, end, self.version = engine.log.restore_state()
            self.reach = max(self.reach, (number, end))
        finally:
            engine.close()

    def _map(self, state: State) -> bool:
        """Whether a segment can be read; it is mapped then."""
        segment = state.segment
        try:
            fd = self.directory.open(segment.name)
        except FileNotFoundError:
            state.problem = "the file is missing"
            return False
        try:
            state.size = os.fstat(fd).st_size
            header = files.read_at(fd, START, 0)
            said = _core.read_segment_header(header)
            if said is not None and said[:3] == (segment.number, self.current.identity, self.current.seed):
                segment.salt = said[3]
            elif said is not None:
                state.problem = "it is a segment of another store, or another one of this"
                return False
            else:
                state.flaws.append(Damage(0, min(START, state.size), "the header is damaged", True))
            if state.size <= START:
                state.problem = "the file is cut short"
                return False
            self.log.map_segment(fd, segment.number, segment.chunk, segment.capacity, state.size, segment.salt)
            return True
        finally:
            files.close(fd)

    def sealed(self, segment: Segment, place: int) -> State:
        """A sealed segment, as its footer tells of it if that is whole."""
        state = State(segment, place, first=segment.first_version, last=segment.last_version)
        assert segment.end is not None
        if not self._map(state):
            state.end = max(state.size, segment.end) if state.size else segment.end
            return state
        end = segment.end
        versions = _core.read_footer(self.log, segment.chunk, end)
        if versions is None:
            end = self._find_footer(segment)
            versions = _core.read_footer(self.log, segment.chunk, end)
        if versions is None:
            end = segment.end
        else:
            state.first, state.last = versions
        state.footer = versions is not None
        self._scan(state, end, 0)
        if state.damage or not state.footer:
            if not state.footer:
                state.flaws.append(Damage(end, max(end, state.size), "the footer is damaged", True))
            return state
        merged = versions if segment.merged else None
        footer, records, first, last, tombstones = _core.build_footer(self.log, segment.chunk, end, merged)
        fd = self.directory.open(segment.name)
        try:
            if files.read_at(fd, len(footer), end) != footer:
                state.flaws.append(Damage(end, state.size, "the footer does not list the records", True))
        finally:
            files.close(fd)
        state.totals = (records, *(merged or (first, last)), tombstones)
        return state

    def _find_footer(self, segment: Segment) -> int:
        """Where a whole one stands, or the last whole record ends."""
        at, end = START, START
        while True:
            reason, at, records, *_ = _core.describe(self.log, segment.chunk, at, UNKNOWN)
            end = at if records else end
            if reason == "footer":
                return at
            resume = _core.next_whole(self.log, segment.chunk, at if reason == _core.UNREADABLE else at + 8, UNKNOWN)
            if resume is None:
                return end
            at = resume

    def _scan(self, state: State, end: int, version: int) -> None:
        """Finds the damaged ranges of a segment's records, which reach to `end`."""
        segment, at, state.end = state.segment, START, end
        while at < end:
            reason, at, version, records = _core.survey(self.log, segment.chunk, at, end, version, segment.merged)
            state.records += records
            if at >= end:
                break
            resume = self._next(state, at, reason, end)
            self._note(state, at, end if resume is None else resume, reason, version)
            at = end if resume is None else resume

    def _next(self, state: State, at: int, reason: str, stop: int) -> int | None:
        """Where the next record may stand, behind a damaged one."""
        if reason == _core.BAD_VALUE:
            return _core.value_end(self.log, state.segment.chunk, at)
        return _core.next_whole(self.log, state.segment.chunk, at if reason == _core.UNREADABLE else at + 8, stop)

    def _confirm_unreadable(self, segment: Segment, start: int, stop: int) -> None:
        """What the device cannot read is lost; what it could not read a moment ago, and now can, is not."""
        fd = self.directory.open(segment.name)
        try:
            for at in range(start, stop, files.PART):
                files.read_at(fd, min(files.PART, stop - at), at)
        except OSError as problem:
            if problem.errno == errno.EIO:
                return
            raise
        finally:
            files.close(fd)
        raise Error(errno.EIO, f"the device could not read bytes {start} to {stop} of {segment.name} a moment ago, and now "
                    "it can: nothing was changed, repair it again", self.directory.path)

    def _note(self, state: State, start: int, stop: int, reason: str, version: int) -> None:
        if reason == _core.UNREADABLE:
            self._confirm_unreadable(state.segment, start, min(stop, state.size))
        known = state.footer or reason == _core.BAD_VALUE
        if state.damage and state.damage[-1].stop == start and state.damage[-1].known == known and state.footer:
            state.damage[-1].stop = stop
            return
        why = "records are damaged" if start < state.size else "the file is cut short"
        state.damage.append(Damage(start, stop, f"{why} ({reason})", known, version))

    def unsealed(self, segments: Sequence[Segment], place: int, version: int) -> list[State]:
        """Those up to the log's end, as `recovery.walk` goes through them, but on behind damage; what a power cut may have
        torn is no damage."""
        states: list[State] = []
        for at, segment in enumerate(segments):
            state = State(segment, place + at, first=version + 1, last=version)
            states.append(state)
            behind = segments[at + 1:]
            link = self._link_of(behind[0]) if behind else None
            if link is not None and link[0] != segment.number:
                link = None
            known = segment.end if segment.end is not None else link[1] if link is not None else None
            if not self._map(state):
                state.end = max(known or START, state.size, self._reach_in(segment))
            elif not self._scan_unsealed(state, known, behind):
                break
            version = state.last = max(state.last, link[2] if link is not None else 0)
            if not behind or link is None and not self._has_begun(behind[0]):
                break
        if states[-1].damage or states[-1].problem:
            states[-1].last = max(states[-1].last, self.version)
        return states

    def _reach_in(self, segment: Segment) -> int:
        return self.reach[1] if self.reach[0] == segment.number else START

    def _link_of(self, segment: Segment) -> tuple[int, int, int] | None:
        return _core.read_link(self.log, segment.chunk) if self._map(State(segment, 0)) else None

    def _has_begun(self, segment: Segment) -> bool:
        """Whether there is anything of a segment whose first record cannot be read."""
        return self._reach_in(segment) > START or self.log.mapped(segment.chunk) > START and \
            _core.next_whole(self.log, segment.chunk, START, UNKNOWN) is not None

    def _scan_unsealed(self, state: State, known: int | None, behind: Sequence[Segment]) -> bool:
        """Finds the damaged ranges up to the end that is `known`, or where nothing says that there was more.  False if the
        log ends there, whatever stands in the segments `behind`."""
        segment, at, version = state.segment, START, state.last
        stop = UNKNOWN if known is None else known
        while True:
            reason, at, version, records = _core.survey(self.log, segment.chunk, at, stop, version)
            state.records += records
            state.end, state.last = at, version
            if at >= stop:
                return True
            if not self._went_on(segment, at, version, behind):
                return False
            resume = self._next(state, at, reason, stop)
            if resume is None:
                rest = _core.first_nonzero(self.log, segment.chunk, at, stop)
                reach = max(self._reach_in(segment), at if rest is None else rest[1])
                state.end = reach if known is None else known
                if state.end > at:
                    self._note(state, at, state.end, reason, version)
                return True
            self._note(state, at, resume, reason, version)
            at = resume

    def _went_on(self, segment: Segment, offset: int, version: int, behind: Sequence[Segment]) -> bool:
        """Whether the log is known to have gone on at that place, on the device."""
        if segment.end is not None or (segment.number, offset) < self.reach:
            return True
        for other in [segment, *behind]:
            if self.log.mapped(other.chunk) > START:
                mark = _core.find_mark(self.log, other.chunk, offset if other is segment else START, version)
                if mark is not None and mark > (segment.number, offset):
                    return True
        return False

    def is_whole(self, segment: Segment) -> bool:
        """One that has no record yet."""
        state = State(segment, 0)
        return self._map(state) and state.whole


def map_control(directory: files.Directory, log: _core.Log) -> None:
    """The control page, if there is one to be read."""
    if directory.size(files.CONTROL)[0] >= _core.PAGE:
        fd = directory.open(files.CONTROL)
        try:
            log.map_control(fd)
        finally:
            files.close(fd)
