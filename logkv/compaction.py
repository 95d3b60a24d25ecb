"""Compaction: what is dead goes; what is alive of neighbouring sealed segments moves, sorted by key, into a new one.

The order of the steps is what survives a crash; docs/how-it-works.md says why each stands where it does.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from logkv import _core, files
from logkv.errors import ClosedError, CorruptionError, Error
from logkv.manifest import Manifest, Segment
from logkv.opening import LARGEST_STEP, START, Options

if TYPE_CHECKING:
    from logkv.writer import Writing

Progress = Callable[[int, int], None]

SLACK, DEAD_SHARE = 6 << 20, 0.65       # bytes that may always be dead, and of the live ones, before something is done
WAIT_SLACK, WAIT_SHARE = 12 << 20, 0.9  # the same before puts wait for it
EARLY = 8 << 20, 0.25           # bytes, and of the store's live ones, at which a segment may be sealed before it is full
STEPS = 2 << 20, 1 / 32         # the same for how much the file of such a segment grows
WORTH = 0.125, 1 / 16           # of a segment, and of what may be dead: less is not gained by writing it again
FEW = 8                         # small neighbours that are merged into one, and how much smaller than a segment small is
SWING = 4096                    # slots that are changed while puts wait
PAUSE = 50e-6                   # seconds in which they go on
OVERHEAD = _core.CONTINUES_SIZE + 8 * _core.MARK_SIZE   # bytes that are in every segment, dead or not
RETRY = (1.0, 60.0)             # seconds after which what failed is tried again: first, at most


@dataclass(frozen=True, slots=True)
class Share:
    """What of a segment's bytes is alive.  All are aligned bytes of records."""

    segment: Segment
    size: int
    live: int
    fixed: int                  # of tombstones that an earlier merge needed, and that would stay
    sound: bool                 # not known to be damaged

    @property
    def gain(self) -> int:
        """What writing the segment again would give back."""
        return max(0, self.size - self.live - self.fixed) if self.segment.sealed and self.sound else 0

    @property
    def has_dead(self) -> bool:
        """More than a few bytes, for which no segment is written again."""
        return self.gain > self.size // 256 + OVERHEAD


def shares(engine: Writing, damaged: Container[int] = ()) -> list[Share]:
    """Of each segment, in the log's order.  damaged: the numbers of those that cannot be merged."""
    found: list[Share] = []
    newest = 0                  # number of a segment: one before that was written later may have freed tombstones
    for segment, size, _, live in engine.shares():
        stay = segment.merged and bool(found) and newest < segment.number
        found.append(Share(segment, size, live, segment.tombstones if stay else 0, segment.number not in damaged))
        newest = max(newest, segment.number)
    return found


@dataclass(frozen=True, slots=True)
class Need:
    """How much of a store is dead, and what should be done about it."""

    live: int
    dead: int
    options: Options

    @classmethod
    def of(cls, found: Sequence[Share], options: Options) -> Need:
        live = sum(share.live for share in found)
        return cls(live, sum(share.size for share in found) - live, options)

    def _limit(self, slack: int, share: float) -> float:
        """Where segments are small, a few of them are slack enough."""
        return min(slack, slack * 4 * self.options.segment_size // SLACK) + share * self.live

    @property
    def allowed(self) -> float:
        return self._limit(SLACK, DEAD_SHARE)

    @property
    def due(self) -> bool:
        """Whether so much is dead that something should be done."""
        return self.dead > self.allowed

    @property
    def pressing(self) -> bool:
        """Whether so much is dead that no put should add to it."""
        return self.dead > self._limit(WAIT_SLACK, WAIT_SHARE)

    @property
    def early(self) -> int:
        """Bytes at which a segment is sealed although it is not full."""
        return min(self.options.segment_size, max(EARLY[0], int(EARLY[1] * self.live)))

    @property
    def largest_step(self) -> int:
        """Bytes by which a segment's file grows at the most."""
        return min(LARGEST_STEP, max(STEPS[0], int(STEPS[1] * self.live)))


def choose(found: Sequence[Share], need: Need) -> list[Segment]:
    """The neighbours that are merged next, or none: what gives most space back for least copying, if that is due; else many
    small ones."""
    sealed = [share for share in found if share.segment.sealed]     # come before all that are not
    if need.due:
        worth = [at for at, share in enumerate(sealed)
                 if share.gain > max(WORTH[0] * share.size, WORTH[1] * need.allowed)]
        if worth:
            best = max(worth, key=lambda at: (sealed[at].gain / (sealed[at].size + sealed[at].live), -at))
            return _with_neighbours(sealed, best, need.options)
    return _small_ones(sealed, need.options)


def _with_neighbours(sealed: Sequence[Share], at: int, options: Options) -> list[Segment]:
    """A segment with those beside it that are worth it too, as far as the output is one segment."""
    first, last = at, at
    total = sealed[at].size - sealed[at].gain
    for step in (-1, 1):
        while 0 <= (following := (first if step < 0 else last) + step) < len(sealed):
            share = sealed[following]
            total += share.size - share.gain
            if share.gain <= 2 * WORTH[0] * share.size or total > options.segment_size:
                total -= share.size - share.gain
                break
            first, last = min(first, following), max(last, following)
    return [share.segment for share in sealed[first:last + 1]]


def is_small(share: Share, options: Options) -> bool:
    return share.sound and share.segment.sealed and share.size <= options.segment_size // FEW


def _small_ones(sealed: Sequence[Share], options: Options) -> list[Segment]:
    """FEW or more neighbours of which none is large, or much larger than all others."""
    run: list[Share] = []
    for share in [*sealed, None]:
        if share is not None and is_small(share, options):
            run.append(share)
            continue
        while len(run) >= FEW:
            largest = max(range(len(run)), key=lambda at: run[at].size)
            if 2 * run[largest].size <= sum(one.size for one in run):
                return [one.segment for one in run[:4 * FEW]]
            run = max(run[:largest], run[largest + 1:], key=len)
        run = []
    return []


class _Overtaken(Exception):
    """The segments that were to be merged are gone: the store was emptied."""


class Compactor:
    """Compacts one writing engine's store.  One merge at a time, whoever asks for it."""

    def __init__(self, engine: Writing) -> None:
        self._engine = engine
        self.lock = threading.RLock()       # one merge; taken before the engine's locks
        self.problem: BaseException | None = None   # why the last one in the background failed
        self.merges = self.copied = self.dropped = 0
        self._damaged: set[int] = set()     # segments that cannot be merged
        self._delay = RETRY[0]

    def facts(self) -> dict[str, Any]:
        """What was done since the store was opened, in aligned bytes of records."""
        return {"merges": self.merges, "copied_bytes": self.copied, "dropped_bytes": self.dropped,
                "problem": None if self.problem is None else str(self.problem)}

    # -- when -------------------------------------------------------------------------------------------

    @property
    def automatic(self) -> bool:
        return self._engine.options.compaction == "auto"

    def step(self) -> bool:
        """Merges what is to be merged next; False if there is nothing."""
        engine = self._engine
        with engine.holding(self.lock):
            if self._finish_interrupted():
                return True
            with engine.holding(engine.lock):
                engine.check_open()
                found = shares(engine, self._damaged)
                run = choose(found, Need.of(found, engine.options))
            if run:
                self._merge(run)
            return bool(run)

    def in_background(self) -> float | None:
        """Does what there is to do.  Returns after how many seconds a failure is to be tried again."""
        try:
            if self.automatic:
                while self.step():
                    pass
            else:
                with self._engine.holding(self.lock):
                    self._finish_interrupted()
            self._damaged &= {segment.number for segment in self._engine.manifest.segments}
            self._delay = RETRY[0]
            if not self._damaged:           # which stays a problem
                self.problem = None
            return None
        except ClosedError:
            return None
        except (OSError, MemoryError, CorruptionError) as problem:
            if self._engine.log.poisoned:
                return None
            self._failed(problem)
        delay, self._delay = self._delay, min(2 * self._delay, RETRY[1])
        return delay

    def _failed(self, problem: BaseException) -> None:
        if self.problem is None or str(self.problem) != str(problem):
            warnings.warn(f"compaction of {self._engine.directory.path} failed and is tried again: {problem}",
                          RuntimeWarning, stacklevel=2)
        self.problem = problem
        if isinstance(problem, CorruptionError) and problem.segment is not None:
            self._damaged.add(problem.segment)

    def make_space(self) -> Need | None:
        """Before a put takes more of the disk: where too much is dead it does the work, or waits for who does it.  None where
        compaction is not automatic."""
        engine = self._engine
        while self.automatic:
            with engine.lock:
                if engine.log.closed:
                    break
                found = shares(engine, self._damaged)
                need = Need.of(found, engine.options)
                seals = engine.full_segments()
                if not need.pressing or not seals and not choose(found, need):
                    return need
            try:
                if seals:               # where the dead are, it may be
                    engine.seal_oldest()
                else:
                    self.step()
            except ClosedError:
                break
            except (OSError, MemoryError, CorruptionError) as problem:  # the put may still find room
                self._failed(problem)
                return need
        return None

    def is_dead(self, segment: Segment) -> bool:
        """Whether nothing of it is alive, and it may go."""
        return self.automatic and self._live(segment) == 0

    def has_dead(self, active: Segment) -> bool:
        """Whether the segment that is appended to has more dead bytes than those that every segment has."""
        return self._engine.log.position[1] - START - self._live(active) > OVERHEAD

    def _live(self, segment: Segment) -> int:
        return _core.live_shares(self._engine.log, self._engine.manifest.places())[segment.chunk][1]

    def everything(self, progress: Progress) -> None:
        """Merges all that has anything dead, from the oldest on, until nothing is left to gain."""
        engine = self._engine
        done, total = 0, 0
        behind = 0                  # the segments before this number's are done
        with self.lock:
            self._damaged.clear()
            engine.seal_all()
            self._finish_interrupted()
            while True:
                with engine.lock:
                    found = shares(engine)
                    if not total:
                        total = sum(share.size for share in found if share.segment.sealed)
                    run = self._next_of_all(found, behind)
                if not run:
                    break
                size = sum(share.size for share in found if share.segment in run)
                self._merge(run, lambda part: progress(done + int(part * size), total))
                done += size
                behind = run[-1].last_version
            engine.shrink_index()
            self.problem = None
            progress(total, total)

    def _next_of_all(self, found: Sequence[Share], behind: int) -> list[Segment]:
        """The next neighbours that have something dead, and what is small beside them; a few dead bytes are no reason to
        write a large segment again."""
        options = self._engine.options
        run: list[Share] = []
        for share in [*found, None]:
            if share is not None and not run and share.segment.last_version <= behind:
                continue
            worth = share is not None and share.has_dead
            fits = share is not None and sum(one.size - one.gain for one in [*run, share]) <= options.segment_size
            if share is not None and (worth or is_small(share, options)) and (fits or not run):
                run.append(share)
                continue
            if len(run) > 1 or any(one.has_dead for one in run):
                break
            run = [share] if share is not None and (worth or is_small(share, options)) else []
        return [share.segment for share in run]

    # -- how --------------------------------------------------------------------------------------------

    def _merge(self, run: Sequence[Segment], progress: Callable[[float], None] = lambda part: None) -> None:
        """One merge, from mapping its inputs to unlinking them; nothing where these are gone."""
        with suppress(_Overtaken), files.full_disk_is_an_error(self._engine.directory.path, "compact the store"):
            self._merge_now(run, progress)

    def _merge_now(self, run: Sequence[Segment], progress: Callable[[float], None]) -> None:
        engine = self._engine
        with engine.holding(engine.lock):
            engine.check_open()
            at = self._place_of(engine.manifest, run)
            inputs, older = engine.manifest.segments[at:at + len(run)], engine.manifest.segments[:at]
            found = {share.segment.number: share for share in shares(engine)}
            room = START + sum(found[s.number].live + s.tombstones for s in inputs)
            output = engine.manifest.new_segment(room)
            merging = self._begin(inputs, older, output)
        output.sealed = output.merged = True
        output.first_version = min([s.first_version for s in inputs if s.records], default=0)
        output.last_version = max(s.last_version for s in inputs)
        fd = -1
        try:
            fd = self._create(output)
            self._copy(merging, output, fd, progress)
            # What is dead is dead because of records that must outlive it.
            engine.sync()
            if merging.records:
                self._adopt(run, output)
        except BaseException:
            self._abandon(output)
            raise
        finally:
            if fd >= 0:
                files.close(fd)
        if merging.records:
            for first in range(0, merging.records, SWING):
                merging.swing(output.chunk, first, SWING)
                self._breathe()
        else:
            engine.directory.unlink(output.name)
        self._drop(run)
        self.merges += 1
        kept = (output.end or START) - START
        self.copied += kept
        self.dropped += sum(found[s.number].size for s in inputs) - kept

    def _place_of(self, manifest: Manifest, run: Sequence[Segment]) -> int:
        numbers = [segment.number for segment in manifest.segments]
        try:
            at = numbers.index(run[0].number)
        except ValueError:
            raise _Overtaken from None
        if numbers[at:at + len(run)] != [segment.number for segment in run]:
            raise _Overtaken
        return at

    def _begin(self, inputs: Sequence[Segment], older: Sequence[Segment], output: Segment) -> _core.Merge:
        if not any(segment.tombstones for segment in inputs):
            older = []
        for segment in [*inputs, *older]:
            self._engine.map_segment(segment)
        return _core.Merge(self._engine.log, [(s.chunk, s.end or 0) for s in inputs], [(s.chunk, s.end or 0) for s in older],
                           output.salt)

    def _create(self, output: Segment) -> int:
        engine = self._engine
        engine.directory.unlink(output.name)
        fd = engine.directory.open(output.name, writable=True, create=True, exclusive=True)
        try:
            files.write_at(fd, _core.encode_segment_header(output.number, engine.manifest.identity, engine.manifest.seed,
                                                           output.salt), 0)
        except BaseException:
            files.close(fd)
            raise
        return fd

    def _copy(self, merging: _core.Merge, output: Segment, fd: int, progress: Callable[[float], None]) -> None:
        """The output's records and footer, on the device."""
        engine = self._engine
        end = START
        began = time.monotonic()
        while records := merging.step():
            files.write_at(fd, records, end)
            end += len(records)
            progress(merging.done / max(1, merging.total))
            engine.check_open()
            self._keep_rate(end - START, began)
        output.end, output.tombstones = end, merging.tombstones
        if not merging.records:
            return
        if end > output.chunks * _core.CHUNK:
            raise Error(f"more is alive in segments than was counted: {end} bytes, {output.capacity} were expected")
        output.capacity, output.records = end, merging.records
        footer = merging.footer(output.first_version, output.last_version)
        files.write_at(fd, footer, end)
        files.sync_data(fd)
        engine.directory.sync()
        engine.log.map_segment(fd, output.number, output.chunk, output.capacity, end + len(footer), output.salt)

    def _adopt(self, run: Sequence[Segment], output: Segment) -> None:
        """The MANIFEST with the output, and its inputs as replaced: from here on a rebuild reads the output alone."""
        engine = self._engine
        with engine.holding(engine.lock):
            engine.check_open()
            at = self._place_of(engine.manifest, run)
            _core.add_row(engine.log, output.chunk)
            new = engine.manifest.copy()
            for segment in new.segments[at:at + len(run)]:
                segment.replaced_by = output.number
            new.segments.insert(at + len(run), output)
            engine.write_manifest(new)

    def _abandon(self, output: Segment) -> None:
        """An output that no MANIFEST names."""
        engine = self._engine
        with engine.lock:
            if engine.log.closed or engine.log.poisoned or engine.manifest.segment_numbered(output.number) is not None:
                return
            engine.log.drop_segments([output.chunk])
            _core.drop_row(engine.log, output.chunk)
            engine.directory.unlink(output.name)

    def _drop(self, run: Sequence[Segment]) -> None:
        """Nothing points to these segments any more: the MANIFEST without them, then their files go."""
        engine = self._engine
        with engine.holding(engine.lock):
            engine.check_open()
            self._place_of(engine.manifest, run)
            engine.forget(run)

    def _finish_interrupted(self) -> bool:
        """Goes on where a kill or a failure has interrupted a merge whose output is in the MANIFEST."""
        engine = self._engine
        with engine.holding(engine.lock):
            replaced = [segment for segment in engine.manifest.segments if segment.replaced_by]
            if not replaced:
                return False
            number = replaced[0].replaced_by
            run = [segment for segment in replaced if segment.replaced_by == number]
            output = engine.manifest.segment_numbered(number)
            assert output is not None and output.end is not None
            for segment in [*run, output]:
                engine.map_segment(segment)
            for segment in run:
                engine.log.mark_replaced(segment.chunk)
        first, records = 0, 1
        while first < records:
            records = _core.swing_replaced(engine.log, output.chunk, output.end, first, SWING // 4)
            first += SWING // 4
            self._breathe()
        with suppress(_Overtaken):
            self._drop(run)
        return True

    def _breathe(self) -> None:
        """Lets the threads go on that wait to put."""
        self._engine.check_open()
        if self._engine.in_background():
            time.sleep(PAUSE)

    def _keep_rate(self, copied: int, began: float) -> None:
        rate = self._engine.options.compaction_rate
        if rate is not None and self._engine.in_background():
            while (left := copied / rate - (time.monotonic() - began)) > 0:
                time.sleep(min(left, 0.05))
                self._engine.check_open()
