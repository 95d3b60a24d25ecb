"""Reads all that a store holds and reports what is not as it should be; changes nothing."""

from __future__ import annotations

import errno
import os
from array import array
from dataclasses import dataclass, field

from logkv import _core, files, inventory, manifest
from logkv.engine import Engine, Progress, no_store
from logkv.errors import ClosedError, CorruptionError, Error, NotFoundError
from logkv.inventory import START, UNKNOWN
from logkv.manifest import Segment

ATTEMPTS = 5                    # where a writer changes the store meanwhile
LISTED = 1000                   # problems
DERIVED = (files.INDEX, files.CONTROL)  # what the log does not need


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it should be; str() says it in one line.

    `file`: its name in the store's directory; `offset`: in bytes; `expected` and `found`: as text.
    """

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
    """What a verification found.

    `problems`: a list of Problem; `notes`: lines that deserve to be known and are no damage; `segments`, `records`, `keys`,
    `bytes`: how much was checked.
    """

    path: str
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    segments: int = 0
    records: int = 0
    keys: int = 0
    bytes: int = 0
    more: int = 0                   # problems beyond those that are listed

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def __str__(self) -> str:
        """Every problem and note, what was checked, and what to do next."""
        checked = f"{self.keys:,} keys, {self.records:,} whole records in {self.segments:,} segments, {self.bytes:,} bytes"
        verdict = f"{self.path} is whole: {checked}" if self.ok else \
            f"{self.path} is damaged: {len(self.problems):,} problems; {checked}. {self.advice}"
        return "\n".join([*map(str, self.problems), *(f"note: {note}" for note in self.notes), verdict])

    @property
    def advice(self) -> str:
        """What to do about the problems; "" if there are none."""
        if self.ok:
            return ""
        if all(problem.file in DERIVED for problem in self.problems):
            return "The log is whole, so nothing is lost: logkv repair builds the rest anew from it."
        return ("What is not damaged can still be read, if the store opens. If there is a good backup, restore that; else copy "
                "the directory, then logkv repair keeps all that is whole, sets the rest aside, and says what is lost.")

    def _add(self, problem: CorruptionError) -> None:
        name = None if problem.path is None else os.path.basename(problem.path)
        if name is None and problem.segment is not None:
            name = files.segment_name(problem.segment)
        self._say(Problem(problem.reason, name, problem.offset, problem.expected, problem.found))

    def _say(self, problem: Problem) -> None:
        if len(self.problems) < LISTED:
            self.problems.append(problem)
        else:
            self.more += 1


class _Changed(Exception):
    """The store was emptied meanwhile, or a tail was cut off: what was found may be of what is gone."""


class _Fresh(Engine):
    """Builds an index of its own, whatever the store's may be worth, and keeps it, whatever is written."""

    def _take_index(self) -> None:
        if not self._opening:
            raise _Changed
        self._build_own_index("verification")

    def _index_changed(self) -> None:
        self.log.heed(self.log.signs)


def verify(path: str | bytes | os.PathLike[str] | os.PathLike[bytes], *, progress: Progress | None = None) -> Report:
    """Reads everything that a store holds: every record's checksum, each footer against its segment's records, the index
    against the log, the MANIFEST; also where the store does not open, and while a writer is at work.

    progress: called with the bytes of the log that were read and those there are.

    Damage is reported, never raised.  Raises NotFoundError, FormatError (no store, or a newer one), Error for what cannot be
    read.  O(bytes of the log); an index of its own takes some 35 bytes of memory a key.
    """
    return verify_directory(files.Directory(os.fsdecode(path)), progress)


def verify_directory(directory: files.Directory, progress: Progress | None = None) -> Report:
    """Verifies the store in a directory, which is closed then."""
    try:
        for attempt in range(ATTEMPTS):
            report = Report(directory.path)
            try:
                with files.full_disk_is_an_error(directory.path, "verify the store"):
                    _Verification(directory, report, progress or (lambda done, total: None)).run()
                break
            except (_Changed, Error) as problem:
                gone = isinstance(problem, Error) and problem.errno == errno.ENOENT and not isinstance(problem, NotFoundError)
                if not gone and not isinstance(problem, (_Changed, ClosedError)):   # closed: emptied for another codec
                    raise
                if attempt == ATTEMPTS - 1:
                    report.notes.append("the store was emptied again and again: what was found may be of what is gone")
    finally:
        directory.close()
    if report.more:
        report.problems.append(Problem(f"{report.more:,} more problems are not listed"))
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
            self._check_segments_alone()
            return
        self.current, self.instance = found
        engine = self._open(Engine)
        try:
            if engine is not None:
                self.current = engine.manifest
            self._check_log(engine)
            if engine is not None:
                self._check_index(engine)
        finally:
            if engine is not None:
                engine.close()
        self._note_strays()

    def _check_segments_alone(self) -> None:
        """Without a MANIFEST: what there is."""
        found = inventory.headers(self.directory)
        for identity in {segment.identity for segment in found}:
            inventory.read(self.directory, [segment for segment in found if segment.identity == identity])
        self.report.segments, self.report.records = len(found), sum(segment.records for segment in found)
        self.report.bytes = sum(segment.size for segment in found)
        self.report.notes += [f"{segment.name} has damaged records, too" for segment in found if not segment.intact]

    def _open(self, kind: type[Engine]) -> Engine | None:
        try:
            return kind(self.directory.again())
        except CorruptionError as problem:
            if kind is Engine:
                self.report._add(problem)
            return None

    def _check_unchanged(self) -> None:
        """Before something is called damaged."""
        now = manifest.read(self.directory)
        if now is None or (now[0].epoch, now[0].cut_bytes) != (self.current.epoch, self.current.cut_bytes):
            raise _Changed

    def _is_named(self, segment: Segment) -> bool:
        """Whether the MANIFEST still names it."""
        now = manifest.read(self.directory)
        return now is not None and now[0].segment_numbered(segment.number) is not None

    def _place_of(self, location: int) -> tuple[None, None, int]:
        return None, None, location         # what the mapping of our own asks where a page cannot be read

    # -- the log ----------------------------------------------------------------------------------------

    def _check_log(self, engine: Engine | None) -> None:
        self.log = _core.Log(self, self.current.identity, self.current.seed, False)
        try:
            active, end, self.scanned = (0, 0, 0) if engine is None else engine.log.restore_state()
            segments = self.current.segments
            sizes = list(map(self._map, segments))
            done, total = 0, sum(sizes)
            for at, (segment, size) in enumerate(zip(segments, sizes, strict=True)):
                self.progress(done, total)
                if size and (segment.sealed or not active or segment.number <= active):     # a successor has no record yet
                    stop = segment.end
                    if stop is None and segment.number == active:
                        stop = end
                    elif stop is None and at + 1 < len(sizes) and sizes[at + 1] > START:
                        link = _core.read_link(self.log, segments[at + 1].chunk)
                        stop = link[1] if link is not None and link[0] == segment.number else None
                    if size > START:
                        self._check_segment(segment, stop)
                    elif stop is not None and stop > START:
                        self._found("the file is cut short", segment, size, f"records up to offset {stop}", "nothing")
                done += size
                self.report.segments += 1
                self.report.bytes += size
            self.progress(done, total)
        finally:
            self.log.close()

    def _map(self, segment: Segment) -> int:
        """Bytes of a segment's file, which is mapped then; 0 if it cannot be."""
        try:
            fd = self.directory.open(segment.name)
        except FileNotFoundError:
            self._check_unchanged()
            if not self._is_named(segment):
                raise _Changed from None        # it was compacted
            self._found("a file that the MANIFEST names is missing", segment, None, "a segment", "nothing")
            return 0
        try:
            size = os.fstat(fd).st_size
            expected = _core.encode_segment_header(segment.number, self.current.identity, self.current.seed, segment.salt)
            header = files.read_at(fd, START, 0)
            if header != expected:
                self._found("the header is damaged", segment, 0, expected.hex(), header.hex())
            if size > START:
                self.log.map_segment(fd, segment.number, segment.chunk, segment.capacity, size, segment.salt)
            return size
        except CorruptionError:
            return 0                            # of another store: its header was not the expected one
        finally:
            files.close(fd)

    def _check_segment(self, segment: Segment, end: int | None) -> None:
        stop = UNKNOWN if end is None else end
        offset, version, whole = START, 0, True
        while True:
            reason, offset, version, records = _core.survey(self.log, segment.chunk, offset, stop, version, segment.merged)
            self.report.records += records
            if offset >= stop:
                break
            resume = _core.next_whole(self.log, segment.chunk, offset + 8, stop)
            if end is None and resume is None:
                break                           # the torn tail of a store without an index
            if whole:
                self._check_unchanged()
            whole = False
            self._found(f"records damaged ({reason})", segment, offset, "a record",
                        f"none before offset {resume if resume is not None else end}")
            if resume is None:
                break
            offset = resume
        if segment.sealed and whole:
            self._check_footer(segment, stop)

    def _check_footer(self, segment: Segment, end: int) -> None:
        merged = (segment.first_version, segment.last_version) if segment.merged else None
        try:
            footer, records, first, last, tombstones = _core.build_footer(self.log, segment.chunk, end, merged)
        except CorruptionError as problem:      # what could be read a moment ago
            self._found(problem.reason, segment, problem.offset, problem.expected or "", problem.found or "")
            return
        try:
            fd = self.directory.open(segment.name)
        except FileNotFoundError:
            if self._is_named(segment):
                raise
            return                              # it was compacted meanwhile
        try:
            found = files.read_at(fd, len(footer), end)
        finally:
            files.close(fd)
        if found != footer:
            self._found("the footer does not list the segment's records", segment, end,
                        f"crc32c {_core.checksum(footer):08x}", f"{_core.checksum(found):08x}")
        said = (segment.records, segment.first_version, segment.last_version, segment.tombstones)
        if segment.merged and segment.first_version <= first and last <= segment.last_version:
            first, last = segment.first_version, segment.last_version       # of all that was merged
        if said != (records, first, last, tombstones):
            self.report._say(Problem(f"what is said of {segment.name} is wrong", files.MANIFEST, None, "records, first and "
                                     f"last version, bytes of tombstones {(records, first, last, tombstones)}", str(said)))

    def _found(self, message: str, segment: Segment, offset: int | None, expected: str, found: str) -> None:
        self.report._say(Problem(message, segment.name, offset, expected, found))

    # -- the index --------------------------------------------------------------------------------------

    def _check_index(self, engine: Engine) -> None:
        """The store's index must lead to the same records as one that was just built from the log."""
        clears, nonce = engine.log.clears, engine.log.nonce
        self.report.keys = engine.log.state["keys"]
        if engine.log.index_is_private:
            self._say_why_not(engine)
            return
        for _ in range(ATTEMPTS):
            version = engine.log.state["version"]
            before = self._merged()
            fresh = self._open(_Fresh)
            if fresh is None:
                return                          # the log is damaged, and that was said
            try:
                if before is None and not files.has_writer(self.directory):
                    self.report.notes.append("a writer died while it merged segments: the next one finishes it")
                    return
                if engine.log.state["version"] != version:
                    continue
                if fresh.log.state["version"] != version and not files.has_writer(self.directory):
                    self.report.notes.append("a writer died before its last record was in the index: the next one finishes it")
                    return
                expected, _ = _core.survey_index(fresh.log, False)
                entries, lost = _core.survey_index(engine.log, True)
            except CorruptionError as problem:
                self._check_unchanged()
                self.report._add(problem)
                return
            finally:
                fresh.close()
            state = engine.log.state
            if engine.log.clears != clears:
                raise _Changed
            if engine.log.index_is_private or engine.log.nonce != nonce:
                self._say_why_not(engine)
                return
            if state["version"] == version and not (state["begun"] and files.has_writer(self.directory)) and \
                    before is not None and before == self._merged():
                if version != self.scanned:
                    self.report.notes.append("the store was written to meanwhile: its records are those of the beginning, "
                                             "its keys those of the end")
                self.report.keys = state["keys"]
                self._compare(engine, array("Q", entries), array("Q", expected), lost)
                return
        self.report.keys = engine.log.state["keys"]
        self.report.notes.append("the index was not compared with the log: the store was written to all the time; its keys "
                                 "were counted at the end, its records as of the beginning")

    def _merged(self) -> list[int] | None:
        """What segments there are; None while some are being merged."""
        now = manifest.read(self.directory)
        if now is None or any(segment.replaced_by for segment in now[0].segments):
            return None
        return [segment.number for segment in now[0].segments if segment.sealed]

    def _say_why_not(self, engine: Engine) -> None:
        """The index is not in use: damaged, or only of no use after a power cut or in a copy."""
        self._check_unchanged()
        why = engine.recovered.get("why", "not known")
        if not files.has_writer(self.directory):          # who lives may just be replacing it
            if engine.log.trust.get("intact") is False:
                self.report._say(Problem("the control page fails its checksum", files.CONTROL))
            elif files.INDEX in self.directory.names() and engine.trust_in_index(self.instance).index:
                self.report._say(Problem(f"the index is damaged: {why}", files.INDEX))
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
                self.report._say(Problem(f"the index {what} ({len(locations)} times; the first is at offset {offset} of "
                                         f"{path})", files.INDEX))
        if len(entries) != self.report.keys:
            self.report._say(Problem("the number of keys is wrong", files.INDEX, None, f"{len(entries)} keys",
                                     str(self.report.keys)))

    def _note_strays(self) -> None:
        current = manifest.read(self.directory)
        if current is not None and not files.has_writer(self.directory):
            why = inventory.contradiction(self.directory, current[0])
            if why is not None and manifest.read(self.directory) == current and not files.has_writer(self.directory):
                self.report._say(Problem(f"it is whole, but not that of the log: {why}", files.MANIFEST))
        named = {segment.name for segment in (self.current if current is None else current[0]).segments}
        for name in sorted(self.directory.names()):
            if not files.is_store_name(name):
                self.report.notes.append(f"{name} is not a file of LogKV's")
            elif files.segment_number(name) is not None and name not in named and not files.has_writer(self.directory):
                self.report.notes.append(f"{name} is not named by the MANIFEST: a change left it unfinished")
            elif name == files.LOST_FOUND:
                self.report.notes.append(f"{name} holds what recoveries set aside")
