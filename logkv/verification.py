"""Verification: reads all that a store holds, and reports what is not as it should be.  Changes nothing."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from logkv import _core, files, manifest
from logkv.engine import Engine, no_store
from logkv.errors import CorruptionError, Error
from logkv.manifest import Manifest, Segment

Progress = Callable[[int, int], None]

START = _core.SEGMENT_HEADER
UNKNOWN = 1 << 62               # the end of a segment that only a scan can find
ATTEMPTS = 5                    # where a writer changes the store meanwhile


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it should be.  `file`: its name in the store's directory; `offset`: in bytes."""

    message: str
    file: str | None = None
    offset: int | None = None
    expected: str | None = None
    found: str | None = None

    def __str__(self) -> str:
        where = "" if self.file is None else f"{self.file}: " if self.offset is None else f"{self.file}, offset {self.offset}: "
        what = "" if self.expected is None else f": expected {self.expected}, found {self.found}"
        return where + self.message + what


@dataclass(slots=True)
class Report:
    """What a verification found.  `notes` is what deserves to be known and is no damage."""

    path: str
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    segments: int = 0
    records: int = 0
    keys: int = 0
    bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def _add(self, problem: CorruptionError) -> None:
        name = None if problem.path is None else os.path.basename(problem.path)
        if name is None and problem.segment is not None:
            name = files.segment_name(problem.segment)
        self.problems.append(Problem(problem.reason, name, problem.offset, problem.expected, problem.found))


class _Changed(Exception):
    """A writer changed the list of segments meanwhile."""


class _Fresh(Engine):
    """Builds an index of its own, whatever the store's may be worth."""

    def _take_index(self) -> None:
        self._build_own_index("verification")


def verify(path: str | bytes | os.PathLike[str] | os.PathLike[bytes], *, progress: Progress | None = None) -> Report:
    """Reads everything that a store holds: every record's checksum, each footer against its segment's records, the index
    against the log, the MANIFEST; also where the store does not open, and while a writer is at work.

    progress: called with the bytes of the log that were read and those there are.

    Damage is reported, never raised.  Raises NotFoundError, FormatError (no store, or a newer one), Error for what cannot be
    read.  O(bytes of the log); an index of its own takes some 11 bytes of memory a key.
    """
    name = os.fsdecode(path)
    for attempt in range(ATTEMPTS):
        report = Report(name)
        directory = files.Directory(name)
        try:
            _Verification(directory, report, progress or (lambda done, total: None)).run()
            break
        except _Changed:
            if attempt == ATTEMPTS - 1:
                raise Error("the store is being emptied again and again: it cannot be verified meanwhile") from None
        finally:
            directory.close()
    return report


class _Verification:
    def __init__(self, directory: files.Directory, report: Report, progress: Progress) -> None:
        self.directory = directory
        self.report = report
        self.progress = progress
        self.log: _core.Log

    def run(self) -> None:
        try:
            found = manifest.read(self.directory)
            if found is None:
                raise no_store(self.directory)
        except CorruptionError as problem:
            self.report._add(problem)
            return
        self.instance = found[1]
        engine = self._open(Engine)
        try:
            current = found[0] if engine is None else engine.manifest
            self._check_log(current, engine)
            if engine is not None:
                self._check_index(engine)
        finally:
            if engine is not None:
                engine.close()
        self._note_strays(current)

    def _open(self, kind: type[Engine]) -> Engine | None:
        try:
            return kind(files.Directory(self.directory.path))
        except CorruptionError as problem:
            if kind is Engine:
                self.report._add(problem)
            return None

    # -- the log ----------------------------------------------------------------------------------------

    def _check_log(self, current: Manifest, engine: Engine | None) -> None:
        self.log = _core.Log(None, current.identity, current.seed, False)
        try:
            active, end, _ = (0, 0, 0) if engine is None else engine.log.restore_state()
            sizes = [self._map(current, segment) for segment in current.segments]
            done, total = 0, sum(sizes)
            for at, (segment, size) in enumerate(zip(current.segments, sizes, strict=True)):
                self.progress(done, total)
                if size:
                    stop = segment.end
                    if stop is None and segment.number == active:
                        stop = end
                    elif stop is None and at + 1 < len(sizes) and sizes[at + 1]:
                        link = _core.read_link(self.log, current.segments[at + 1].chunk)
                        stop = link[1] if link is not None and link[0] == segment.number else None
                    if not (active and stop is None and segment.number > active):   # a successor that has no record yet
                        self._check_segment(current, segment, stop)
                done += size
                self.report.segments += 1
                self.report.bytes += size
            self.progress(done, total)
        finally:
            self.log.close()

    def _map(self, current: Manifest, segment: Segment) -> int:
        """Bytes of a segment's file, which is mapped then; 0 if it cannot be."""
        try:
            fd = self.directory.open(segment.name)
        except FileNotFoundError:
            self._check_unchanged(current)
            self._found("a file that the MANIFEST names is missing", segment, None, "a segment", "nothing")
            return 0
        try:
            size = os.fstat(fd).st_size
            expected = _core.encode_segment_header(segment.number, current.identity, current.seed, segment.salt)
            header = files.read_at(fd, START, 0)
            if header != expected:
                self._found("the header is damaged", segment, 0, expected.hex(), header.hex())
            if size > START:
                self.log.map_segment(fd, segment.number, segment.chunk, segment.capacity, size, segment.salt)
            return size
        finally:
            os.close(fd)

    def _check_unchanged(self, current: Manifest) -> None:
        now = manifest.read(self.directory)
        if now is None or now[0].generation != current.generation:
            raise _Changed

    def _check_segment(self, current: Manifest, segment: Segment, end: int | None) -> None:
        stop = UNKNOWN if end is None else end
        offset, version, whole = START, 0, True
        while True:
            reason, offset, version, records = _core.survey(self.log, segment.chunk, offset, stop, version)
            self.report.records += records
            if offset >= stop:
                break
            resume = _core.next_whole(self.log, segment.chunk, offset + 8, stop)
            if end is None and resume is None:
                break                           # the torn tail of a store without an index
            if whole:
                self._check_unchanged(current)
            whole = False
            self._found(f"records damaged ({reason})", segment, offset, "a record",
                        f"none before offset {resume if resume is not None else end}")
            if resume is None:
                break
            offset = resume
        if segment.sealed and whole:
            self._check_footer(segment, stop)

    def _check_footer(self, segment: Segment, end: int) -> None:
        footer, records, first, last = _core.build_footer(self.log, segment.chunk, end)
        fd = self.directory.open(segment.name)
        try:
            found = files.read_at(fd, len(footer), end)
        finally:
            os.close(fd)
        if found != footer:
            self._found("the footer does not list the segment's records", segment, end,
                        f"crc32c {_core.checksum(footer):08x}", f"{_core.checksum(found):08x}")
        said = (segment.records, segment.first_version, segment.last_version)
        if said != (records, first, last):
            self.report.problems.append(Problem(f"what is said of {segment.name} is wrong", files.MANIFEST, None,
                                                f"records, first and last version {(records, first, last)}", str(said)))

    def _found(self, message: str, segment: Segment, offset: int | None, expected: str, found: str) -> None:
        self.report.problems.append(Problem(message, segment.name, offset, expected, found))

    # -- the index --------------------------------------------------------------------------------------

    def _check_index(self, engine: Engine) -> None:
        """The store's index must lead to the same records as one that was just built from the log."""
        if engine.log.index_is_private:
            self._check_why_not(engine)
            return
        for _ in range(ATTEMPTS):
            before = engine.log.state
            fresh = self._open(_Fresh)
            if fresh is None:
                return                          # the log is damaged, and that was said
            try:
                locations, lost = _core.survey_index(engine.log)
                expected, _ = _core.survey_index(fresh.log)
            except CorruptionError as problem:
                self.report._add(problem)
                return
            finally:
                fresh.close()
            after = engine.log.state
            if engine.log.index_is_private:
                self.report.keys = after["keys"]
                self.report.problems.append(Problem(f"the index is damaged: {engine.recovered.get('why', 'not known')}",
                                                    files.INDEX))
                return
            if after["version"] == before["version"]:
                self.report.keys = after["keys"]
                self._compare(engine, array("Q", locations), array("Q", expected), lost)
                return
        self.report.keys = after["keys"]
        self.report.notes.append("the index was not compared with the log: the store was written to all the time")

    def _check_why_not(self, engine: Engine) -> None:
        """The index is not in use: damaged, or only of no use after a power cut or in a copy."""
        self.report.keys = engine.log.state["keys"]
        why = engine.recovered.get("why", "not known")
        if engine.log.trust.get("intact") is False:
            self.report.problems.append(Problem("the control page fails its checksum", files.CONTROL))
        elif files.INDEX in self.directory.names() and engine.trust_in_index(self.instance).index:
            self.report.problems.append(Problem(f"the index is damaged: {why}", files.INDEX))
        self.report.notes.append(f"the index is not in use: {why}; the next writer builds it anew")

    def _compare(self, engine: Engine, entries: array[int], expected: array[int], lost: list[int]) -> None:
        wrong = [("leads to a record that a search does not find", lost)]
        if entries != expected:
            have, want = set(entries), set(expected)
            wrong += [("leads to a record that is not its key's newest", sorted(have - want)),
                      ("lacks the newest record of a key", sorted(want - have))]
        for what, locations in wrong:
            if locations:
                path, _, offset = engine._place_of(locations[0])
                self.report.problems.append(Problem(f"the index {what} ({len(locations)} times; the first is at offset "
                                                    f"{offset} of {path})", files.INDEX))
        if len(entries) != self.report.keys:
            self.report.problems.append(Problem("the number of keys is wrong", files.INDEX, None, f"{len(entries)} keys",
                                                str(self.report.keys)))

    def _note_strays(self, current: Manifest) -> None:
        named = {segment.name for segment in current.segments}
        for name in sorted(self.directory.names()):
            if not files.is_store_name(name):
                self.report.notes.append(f"{name} is not a file of LogKV's")
            elif files.segment_number(name) is not None and name not in named:
                self.report.notes.append(f"{name} is not named by the MANIFEST: a change left it unfinished")
            elif name == files.LOST_FOUND:
                self.report.notes.append(f"{name} holds what recoveries set aside")
