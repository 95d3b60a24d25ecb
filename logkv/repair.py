"""Makes a damaged store whole: what is intact is kept, what is not is set aside, and what was lost is said.

No file of the log is written in place: a damaged segment is replaced by a new one, in one MANIFEST, when that one and all
that was set aside are on the device.  So a repair can be killed anywhere and run again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial

from logkv import _core, files, inventory, manifest
from logkv.engine import Progress, no_store
from logkv.errors import CorruptionError, LockedError
from logkv.examination import Examination, State, map_control
from logkv.inventory import START, UNKNOWN
from logkv.manifest import Instance, Manifest, Segment
from logkv.opening import Options, file_step
from logkv.verification import Report, verify_directory
from logkv.writer import Writing, writers

LISTED = 1000                   # keys of one range
PIECES = 64                     # damaged ranges of a segment that get a file each; more are set aside as one
SALVAGED = 64 << 20             # bytes of a damaged MANIFEST that are looked at, and set aside
REPORT = "repair.txt"


@dataclass(slots=True)
class Loss:
    """A range of a file that held something which is lost; str() says it.

    `file`: its name in the store's directory; `start`, `end`: bytes; `why`: what was found there; `keys`: those that were
    lost and are known; `others`: how many more were lost; None: not known, and then keys that were written there may
    show older values, or be back although they were deleted there.  `versions`: between which two the lost ones lie (0: not
    known).  `older`: how many of the keys had an older value, which is not served.  `saved`: names of the files in the
    store's directory that have the bytes, and the older values.
    """

    file: str
    start: int
    end: int
    why: str
    keys: list[bytes] = field(default_factory=list)
    others: int | None = None
    versions: tuple[int, int] = (0, 0)
    older: int = 0
    saved: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.others is None:
            first, last = self.versions
            between = f" between versions {first} and {last}" if last else ""
            what = f"what was written there{between} is lost, and its keys are not known: they may show older values"
            if self.keys:
                what += "; known are " + _listed(self.keys)
        else:
            lost = len(self.keys) + self.others
            what = f"{lost:,} {'key' if lost == 1 else 'keys'} lost" + (f": {_listed(self.keys)}" if self.keys else "")
            if self.others:
                what += f"{' and' if self.keys else ':'} {self.others:,} that cannot be read or are not listed"
            if self.older:
                what += f"; {self.older:,} had an older value, which was saved and is not served"
        saved = f" (saved as {', '.join(self.saved)})" if self.saved else ""
        return f"{self.file}, bytes {self.start} to {self.end}: {self.why}: {what}{saved}"


def _listed(keys: Sequence[bytes], most: int = 20) -> str:
    return ", ".join(map(repr, keys[:most])) + (f" and {len(keys) - most:,} more" if len(keys) > most else "")


@dataclass(slots=True)
class RepairReport:
    """What a repair did; str() says it in plain English.

    `changed`: whether anything was to be repaired; `keys`, `records`: what the store holds now; `rewritten`: the segments'
    files that were replaced; `lost`: a list of Loss; `notes`: lines that deserve to be known and are no loss.
    """

    path: str
    changed: bool = False
    keys: int = 0
    records: int = 0
    rewritten: list[str] = field(default_factory=list)
    lost: list[Loss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was lost."""
        return not self.lost

    def __str__(self) -> str:
        if not self.changed:
            return f"{self.path} is whole: nothing was changed"
        verdict = "nothing was lost" if self.ok else "this was lost:"
        return "\n".join([f"{self.path} is whole again, with {self.keys:,} keys; {verdict}", *self._lines()])

    def _lines(self) -> list[str]:
        return [f"- {loss}" for loss in self.lost] + [f"note: {note}" for note in self.notes]


def repair(path: str | bytes | os.PathLike[str] | os.PathLike[bytes], *, progress: Progress | None = None) -> RepairReport:
    """Makes a damaged store whole, also one that does not open: keeps every intact record, sets damaged ranges aside in
    `lost+found`, and says what was lost.  A store that is whole is not changed.

    A key whose newest record is known to be lost is absent afterwards; an older value of it is set aside, too.  Readers may
    go on meanwhile.  May be killed and run again.

    progress: called with the bytes of the log that were read and those there are, several times over.

    Raises LockedError (a writer has it open), NotFoundError, FormatError (no store, or a newer one), CorruptionError (nothing
    can be read), Error (an OSError: rights, a full disk).  O(bytes of the log); some 35 bytes of memory a key.
    """
    directory = files.Directory(os.fsdecode(path))
    try:
        with files.full_disk_is_an_error(directory.path, "repair the store"):
            return _repair(directory, progress or (lambda done, total: None))
    finally:
        directory.close()


def _repair(directory: files.Directory, progress: Progress) -> RepairReport:
    _check_no_writer(directory)
    report = RepairReport(directory.path)
    found = verify_directory(directory.again(), progress)
    if not found.ok:
        report.changed = True
        with _locked(directory):
            _Repair(directory, report, progress).run(found)
        Writing(directory.again(), Options(compaction="manual", background=False), create=False, timeout=0,
                progress=progress).close()         # builds the index and the control page
        found = verify_directory(directory.again(), progress)
        if not found.ok:
            raise CorruptionError(f"the repair left something damaged: {found.problems[0]}", path=directory.path)
    report.keys, report.records = found.keys, found.records
    return report


def _check_no_writer(directory: files.Directory) -> None:
    for engine in writers():
        if engine.directory.fd >= 0 and engine.directory.identity() == directory.identity():
            raise LockedError(errno.EAGAIN, f"{directory.path} is open for writing in this process: close it before the repair",
                              pid=os.getpid())
    files.check_no_writer(directory)


@contextmanager
def _locked(directory: files.Directory) -> Iterator[None]:
    lock = files.lock(directory, 0)
    try:
        yield
    finally:
        files.unlock(lock)


class _Repair:
    """One repair, while the writer's lock is held."""

    def __init__(self, directory: files.Directory, report: RepairReport, progress: Progress) -> None:
        self.directory = directory
        self.report = report
        self.progress = progress
        self.made = False           # the MANIFEST is made of the segments
        self.created: list[str] = []        # files that no MANIFEST names yet
        self.gone: list[Segment] = []       # that the last MANIFEST does not name any more

    def run(self, found: Report) -> None:
        """found: what `verify` says."""
        self.report.notes += [f"{name} was damaged: it was made anew" for name in (files.INDEX, files.CONTROL)
                              if any(problem.file == name for problem in found.problems)]
        self._take_manifest()
        with closing(Examination(self.directory, self.current)) as self.examination:
            self.log = self.examination.log
            self._drop_one_side_of_merges()
            self.examination.find_reach(self.instance)
            sealed = [segment for segment in self.current.segments if segment.sealed]
            total = sum(self.directory.size(segment.name)[0] for segment in self.current.segments)
            done = 0
            states: list[State] = []
            for segment in sealed:
                self.progress(done, total)
                states.append(self.examination.sealed(segment, len(states)))
                done += states[-1].size
            unsealed = self.examination.unsealed([s for s in self.current.segments if not s.sealed], len(states),
                                                 max((state.last for state in states), default=0))
            self.progress(total, total)
            self._replace(states, unsealed)

    # -- the MANIFEST -----------------------------------------------------------------------------------

    def _take_manifest(self) -> None:
        """The MANIFEST, or one that is made of the segments and in force then."""
        damaged, why = b"", ""
        found: tuple[Manifest, Instance] | None = None
        try:
            found = manifest.read(self.directory, writable=True)
            if found is None:
                why = "was missing"
                problem = no_store(self.directory)
                if not isinstance(problem, CorruptionError):
                    raise problem
            else:
                contradiction = inventory.contradiction(self.directory, found[0])
                why = f"was not that of the log: {contradiction}" if contradiction else ""
        except CorruptionError:
            why = "was damaged"
            damaged = self.directory.read(files.MANIFEST, SALVAGED).rstrip(b"\0")
        if found is not None and not why:
            self.current, self.instance = found[0].copy(), found[1]
            return
        made = inventory.make_manifest(self.directory, found[0] if found else None, damaged)
        self.made = True
        self.report.notes += [f"the MANIFEST {why}; it was made anew from the segments", *made.notes]
        self.report.lost += [Loss(name, START, START, why, versions=versions) for name, why, versions in made.missing]
        if damaged or found:
            data = damaged or found[0].encode()         # type: ignore[index]
            self.report.notes.append("the old one is " + self.directory.save_aside(
                f"{files.MANIFEST}.0-{len(data)}.damaged", lambda: [data]))
        for name in made.aside:
            size, _ = self.directory.size(name)
            saved = self.directory.move_aside(name)
            if name in made.leftover:
                self.report.notes.append(f"{name} is no part of the log any more: it was merged or cleared, and is {saved} now")
            else:
                why = "its header is damaged or another store's, and no MANIFEST says how it is to be read"
                self.report.lost.append(Loss(name, 0, size, why if size > START else "the file is cut short", saved=[saved]))
        new = made.manifest
        self.instance = self._take_from_control(new)
        if not new.segments or new.segments[-1].sealed:
            last = new.segments[-1] if new.segments else None
            self._add_active(new, _core.SEGMENT_MIN, last.number if last else 0, (last.end or START) if last else START)
        self._write_manifest(new)

    def _take_from_control(self, new: Manifest) -> Instance:
        """Generation and epoch, as far as the control page remembers them; the MANIFEST that it belonged to."""
        log = _core.Log(None, new.identity, new.seed, False)
        try:
            map_control(self.directory, log)
            said, epoch = log.trust, log.signs[1]
        finally:
            log.close()
        if not said:
            return Instance(-1, 0, 0)
        new.epoch = max(new.epoch, epoch)
        if said["clean"] and said["intact"]:        # what it promises stays known until all is done
            new.generation = said["clean"] - 1
            return Instance(said["clean"], 0, 0)
        new.generation = max([new.generation, *(noted[0] for noted in said["manifests"])])
        return Instance(-1, 0, 0)

    def _write_manifest(self, new: Manifest) -> None:
        """Puts it in force.  No index belongs to it, so it is of another epoch: readers look for themselves, and iterators that
        are under way cannot go on."""
        new.generation += 1
        new.epoch += 1
        new.moves += 1
        manifest.write_next(self.directory, new)
        manifest.adopt_next(self.directory)
        self.current = new

    def _drop_one_side_of_merges(self) -> None:
        """Of segments that a merge is about to replace, and its output: the output; or the others, where they are whole and
        it is not."""
        current = self.current
        for output in list(current.segments):
            inputs = [segment for segment in current.segments if segment.replaced_by == output.number]
            if not inputs:
                continue
            if self.examination.sealed(output, 0).whole:
                self.gone += inputs
            elif all(self.examination.sealed(each, 0).whole for each in inputs):
                current.segments.remove(output)
                self.gone.append(output)
                self.report.notes.append(f"{output.name} was damaged: the segments that it was merged from are there")
                continue
            else:
                for name in {segment.name for segment in inputs} & set(self.directory.names()):
                    saved = self.directory.move_aside(name)
                    self.report.notes.append(f"{name} was merged into {output.name}, and is {saved} now")
            current.segments = [segment for segment in current.segments if segment not in inputs]
        for segment in current.segments:
            segment.replaced_by = 0

    # -- what becomes of it -----------------------------------------------------------------------------

    def _replace(self, sealed: Sequence[State], unsealed: Sequence[State]) -> None:
        """Writes what replaces the damaged segments, and puts that in force."""
        broken = any(not state.whole for state in unsealed)
        replaced = [state for state in sealed if not state.whole] + list(unsealed if broken else [])
        losses = self._compare([*sealed, *unsealed])
        new = self.current.copy()
        new.last_version = max([new.last_version, *(state.last for state in [*sealed, *unsealed])])
        for state in sealed:
            if state.whole:
                self._correct(new, state)
        try:
            for state in replaced:
                self._tell(state, losses)
                at = new.segments.index(state.segment)
                output = self._rescue(new, state, losses)
                new.segments[at:at + 1] = [] if output is None else [output]
                self.report.rewritten.append(state.segment.name)
            self.gone += [state.segment for state in replaced]
            ahead = [s for s in new.segments if not s.sealed and all(s.number != state.segment.number for state in unsealed)]
            if broken or not all(self.examination.is_whole(segment) for segment in ahead):
                for segment in ahead:           # prepared, or behind the end of a log that a power cut has torn
                    self._save_torn(segment, START)
                new.segments = [segment for segment in new.segments if segment not in ahead]
                self.gone += ahead
            if broken:
                self._add_active(new, max(s.capacity for s in self.current.segments if not s.sealed),
                                 unsealed[-1].segment.number, unsealed[-1].end)
            self._save_report()
            self.directory.sync()
        except BaseException:
            for name in self.created:
                self.directory.unlink(name)
            raise
        self._write_manifest(new)       # where this fails, it may be in force nevertheless
        for segment in self.gone:
            self.directory.unlink(segment.name)
        self.directory.sync()

    def _compare(self, states: Sequence[State]) -> _core.Losses:
        """What is known of the records that are lost, and what else there is of their keys."""
        losses = _core.Losses(self.log)
        for state in states:
            for damage in state.damage:
                if state.footer:
                    losses.note_listed(state.place, state.segment.chunk, state.end, damage.start, damage.stop)
                elif damage.known:
                    losses.note_value(state.place, state.segment.chunk, damage.start)
        losses.begin()
        if len(losses):
            for state in states:
                if state.footer and state.whole:
                    losses.look_listed(state.place, state.segment.chunk, state.end)
                elif not state.problem:
                    losses.look(state.place, state.segment.chunk, state.stretches)
        losses.end()
        return losses

    def _correct(self, new: Manifest, state: State) -> None:
        """What the MANIFEST says of a segment that is whole."""
        segment = new.segment_numbered(state.segment.number)
        assert segment is not None and state.totals is not None
        said = (segment.end, segment.records, segment.first_version, segment.last_version, segment.tombstones)
        segment.end = state.end
        segment.records, segment.first_version, segment.last_version, segment.tombstones = state.totals
        if said != (state.end, *state.totals) and not self.made:
            self.report.notes.append(f"what the MANIFEST said of {segment.name} was wrong")

    def _rescue(self, new: Manifest, state: State, losses: _core.Losses) -> Segment | None:
        """Writes the segment that takes the place of a damaged one; None if nothing of that is left."""
        rescue = _core.Rescue(self.log, losses, state.place, state.segment.chunk, self._stretches(state), state.last)
        if not len(rescue):
            return None
        output = new.new_segment(rescue.size)
        output.sealed = output.merged = True
        output.end, output.records = rescue.size, len(rescue)
        self.directory.unlink(output.name)
        self.created.append(output.name)
        fd = self.directory.open(output.name, writable=True, create=True, exclusive=True)
        try:
            end = 0
            for part in self._parts(rescue, output, state):
                files.write_at(fd, part, end)
                end += len(part)
            files.sync_data(fd)
        finally:
            files.close(fd)
        output.tombstones = rescue.tombstones
        output.first_version, output.last_version = self._versions(rescue, state)
        return output

    def _stretches(self, state: State) -> list[tuple[int, int]]:
        return [] if state.problem else state.stretches

    def _parts(self, rescue: _core.Rescue, segment: Segment, state: State) -> Iterator[bytes]:
        """A segment's file."""
        rescue.salt = segment.salt
        yield _core.encode_segment_header(segment.number, self.current.identity, self.current.seed, segment.salt)
        while part := rescue.step():
            yield part
        yield rescue.footer(*self._versions(rescue, state))

    def _versions(self, rescue: _core.Rescue, state: State) -> tuple[int, int]:
        return min(state.first or rescue.first_version, rescue.first_version), max(state.last, rescue.last_version)

    def _add_active(self, new: Manifest, capacity: int, number: int, end: int) -> None:
        """A segment to append to, behind one that ended there."""
        segment = new.add_segment(capacity)
        records = _core.encode_link(number, end, new.last_version, segment.salt) if number else b""
        self.directory.unlink(segment.name)
        self.created.append(segment.name)
        fd = self.directory.open(segment.name, writable=True, create=True, exclusive=True)
        try:
            files.allocate(fd, file_step(0, capacity, START + len(records)))
            header = _core.encode_segment_header(segment.number, new.identity, new.seed, segment.salt)
            files.write_at(fd, header + records, 0)
            files.sync_data(fd)
        finally:
            files.close(fd)
        self.directory.sync()

    # -- what is set aside and said ---------------------------------------------------------------------

    def _tell(self, state: State, losses: _core.Losses) -> None:
        """Sets the damaged ranges of a segment aside, and says what is lost with them."""
        name, segment = state.segment.name, state.segment
        if state.problem:
            saved = self._save(segment, 0, state.size, "damaged")
            start = 0 if state.size else START
            self.report.lost.append(Loss(name, start, max(state.end, start), state.problem, versions=(state.first, state.last),
                                         saved=[saved] if saved else []))
            return
        older = self._save_older(state, losses)
        ranges = [*state.damage, *state.flaws]
        if len(ranges) > PIECES:
            one = self._save(segment, min(each.start for each in ranges), max(each.stop for each in ranges), "damaged")
        for damage in ranges:
            aside = [one if len(ranges) > PIECES else self._save(segment, damage.start, damage.stop, "damaged")]
            loss = Loss(name, damage.start, damage.stop, damage.why, saved=[each for each in aside if each])
            loss.keys, loss.others, loss.older = losses.told(state.place, damage.start, damage.stop, LISTED)
            if damage.known and not loss.keys and not loss.others:
                self.report.notes.append(f"{name}, bytes {damage.start} to {damage.stop}: {damage.why}: nothing that counts "
                                         "was lost" + (f" (saved as {loss.saved[0]})" if loss.saved else ""))
                continue
            if not damage.known:
                loss.others, loss.versions = None, (max(state.first, damage.version), state.last)
            loss.saved += [older] if older and loss.older else []
            self.report.lost.append(loss)
        if not state.segment.sealed:
            self._save_torn(segment, state.end)

    def _save(self, segment: Segment, start: int, stop: int, what: str) -> str:
        """Sets a range of a segment's file aside; "" if there is nothing."""
        size, _ = self.directory.size(segment.name)
        if start >= size:
            return ""
        fd = self.directory.open(segment.name)
        try:
            if stop >= size and (stop := files.last_byte(fd, start, size)) == start:
                return ""
            return self.directory.save_aside(f"{segment.name}.{start}-{stop}.{what}", partial(files.parts_of, fd, start, stop))
        finally:
            files.close(fd)

    def _save_torn(self, segment: Segment, end: int) -> None:
        """What stands behind the log's end."""
        if self.log.mapped(segment.chunk) > end:
            rest = _core.first_nonzero(self.log, segment.chunk, end, UNKNOWN)
            if rest is not None:
                self._save(segment, end, rest[1], "torn")

    def _save_older(self, state: State, losses: _core.Losses) -> str:
        """Sets the older values of keys aside whose newest is lost, as a segment of its own; "" if there are none."""
        def rescue() -> _core.Rescue:
            return _core.Rescue(self.log, losses, state.place, state.segment.chunk, None, state.last)

        if not len(rescue()):
            return ""
        return self.directory.save_aside(f"{state.segment.name}.older", lambda: self._parts(rescue(), state.segment, state))

    def _save_report(self) -> None:
        if self.report.lost or self.report.rewritten:
            text = "\n".join([*self.report._lines(), ""]).encode()
            self.directory.save_aside(REPORT, lambda: [text])
