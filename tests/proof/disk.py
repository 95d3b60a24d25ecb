"""What a power cut leaves of files and names: what was synced, and of the rest any part."""

from __future__ import annotations

import functools
import os
import random
import shutil
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from logkv import _core, files
from logkv.errors import Error
from logkv.manifest import Manifest
from tests.proof.events import DIRECTORY, PAGE, Changed, Event, Named, Synced, SyncedNames, SyncFailed

SECTOR = 512
ZEROS = bytes(PAGE)
SIZE = -1                       # in place of a page's number: the file's size
HEADER = _core.SEGMENT_HEADER
CLEAN, BOOT = slice(24, 32), slice(32, 48)      # of the control page: the mark of a clean close; the name of the boot
PLACE, NOTES = 48, (72, 104)    # device, inodes of control and index; the MANIFESTs in force and coming
FOREIGN_BOOT = b"yet another boot"
DERIVED = {files.LOCK, files.CONTROL, files.INDEX, files.INDEX_NEXT}     # files that the log does not need

Key = TypeVar("Key")
Change = TypeVar("Change")
Image = tuple[int, tuple[bytes, ...]]           # of a file: its size, its pages


def choose(pending: Sequence[tuple[Key, Change]], dice: random.Random) -> tuple[str, list[tuple[Key, Change]]]:
    """Some of the pending changes, in their order, and how they were chosen; a key is what reaches the device alone."""
    how = dice.choice(("prefix", "without", "only", "earlier", "mixed"))
    if how == "prefix":
        stop = dice.randint(0, len(pending))
        return f"the first {stop} of {len(pending)}", list(pending[:stop])
    if how == "mixed":
        stops = {key: dice.randint(0, len(pending)) for key in dict(pending)}
        return "a mix of moments", [change for at, change in enumerate(pending) if at < stops[change[0]]]
    one = dice.choice(list(dict(pending)))
    if how == "without":
        return f"all without {one}", [change for change in pending if change[0] != one]
    if how == "only":
        return f"only {one}", [change for change in pending if change[0] == one]
    stop = dice.randint(0, len(pending))
    return f"all, {one} of an earlier moment", [c for at, c in enumerate(pending) if c[0] != one or at < stop]


@dataclass(slots=True)
class File:
    """Durable bytes and what is pending since: pages and sizes in the order of time."""

    name: str
    size: int = 0
    last_size: int = 0
    pages: dict[int, bytes] = field(default_factory=dict)
    pending: list[tuple[int, Any]] = field(default_factory=list)
    dropped: int = 0            # so many pending pages, the first ones, no later sync will write: one has failed
    _whole: dict[bool, Image] = field(default_factory=dict)

    def change(self, event: Changed) -> None:
        if event.size != self.last_size:
            self.last_size = event.size
            self.pending.append((SIZE, event.size))
        self.pending += event.pages.items()
        self._whole.pop(True, None)

    def sync(self) -> None:
        dropped, written = self.pending[:self.dropped], dict(self.pending[self.dropped:])
        self.size = written.pop(SIZE, self.size)
        self.pages |= written
        self.pending = [change for change in dropped if change[0] not in written]
        self.dropped = len(self.pending)
        self._whole.clear()

    def sync_failed(self) -> None:
        sizes = [change for change in self.pending if change[0] == SIZE]
        self.pending = [change for change in self.pending if change[0] != SIZE] + sizes
        self.dropped = len(self.pending) - len(sizes)

    def whole(self, everything: bool) -> Image:
        """The file with all that is pending, or without any of it."""
        image = self._whole.get(everything)
        if image is None:
            image = self._whole[everything] = self.image(self.pending if everything else [])
        return image

    def image(self, chosen: list[tuple[int, Any]], size: int | None = None) -> Image:
        """The file with these changes."""
        latest = dict(chosen)
        chosen_size = latest.pop(SIZE, self.size)
        size = chosen_size if size is None else size
        pages = {**self.pages, **latest}
        return size, tuple([pages.get(at, ZEROS) for at in range(-(-size // PAGE))])

    def draw(self, dice: random.Random) -> tuple[str, Image]:
        """Some of the changes; perhaps the size without the data, or a page of which only some sectors were written."""
        how, chosen = choose(self.pending, dice)
        size, pages = self.image(chosen, dice.choice((None, self.last_size)))
        written = [at for at in dict(self.pending) if at != SIZE and at < len(pages)]
        if written and dice.random() < 0.4:
            at = dice.choice(written)
            versions = [self.pages.get(at, ZEROS)] + [change for page, change in self.pending if page == at]
            new, old = pages[at], dice.choice(versions)
            sector = dice.randrange(PAGE // SECTOR) * SECTOR
            torn = dice.choice((new[:sector] + old[sector:], old[:sector] + new[sector:],
                                new[:sector] + old[sector:sector + SECTOR] + new[sector + SECTOR:]))
            pages = pages[:at] + (torn,) + pages[at + 1:]
            how += f", page {at} torn at sector {sector // SECTOR}"
        return how, (size, pages)


@functools.lru_cache(maxsize=4096)
def counted(image: Image) -> frozenset[str] | None:
    """The files of the segments that make up the log of a MANIFEST with this content; None if it is none."""
    size, pages = image
    try:
        current = Manifest.decode(b"".join(pages)[:size], "", writable=True)
    except Error:
        return None
    return frozenset(segment.name for segment in current.segments if not segment.replaced_by)


@dataclass(frozen=True, slots=True)
class State:
    """One directory that a power cut could leave; or the death of the process, and then it is the same boot."""

    images: dict[str, Image]
    how: str
    in_part: bool = False       # of some file only some changes are there
    inodes: Mapping[int, str] = field(default_factory=dict)     # the same boot: the files that these once were

    @property
    def key(self) -> int:
        """Equal for states that differ in nothing that an opening looks at.

        Names count, and what is in the files; but not what is in LOCK, in a file `.tmp`, in a control page without the
        mark of a clean close and in the index beside it (the next boot believes neither), and, behind its header, in a
        segment that the MANIFEST does not name or that another one has replaced.
        """
        manifest = self.images.get(files.MANIFEST)
        segments = counted(manifest) if manifest is not None else None
        clean = self._is_clean()
        looked_at: list[object] = []
        for name, image in self.images.items():
            if name == files.LOCK or name.endswith(".tmp"):
                looked_at.append(name)
            elif name in (files.CONTROL, files.INDEX) and not clean:
                looked_at.append((name, image[0]))
            elif segments is not None and name.endswith(".seg") and name not in segments:
                looked_at.append((name, image[1] and image[1][0][:HEADER]))
            else:
                looked_at.append((name, image))
        return hash(frozenset(looked_at))

    def _is_clean(self) -> bool:
        size, pages = self.images.get(files.CONTROL, (0, ()))
        return size >= PAGE and any(pages[0][CLEAN])

    @property
    def has_store(self) -> bool:
        """Whether anything is there that only this store has: what has not is the same in every run."""
        return any(name == files.MANIFEST or name.endswith(".seg") and any(map(any, pages))
                   for name, (_, pages) in self.images.items())

    def write(self, path: str) -> None:
        """Makes a directory so, whatever is in it, as the next boot, or the next process, finds it."""
        self._remove_others(path)
        for name, (size, pages) in sorted(self.images.items()):     # a directory before what is in it
            if size == DIRECTORY:
                with suppress(FileExistsError):
                    os.mkdir(f"{path}/{name}")
                continue
            stop = len(pages)
            while stop and pages[stop - 1] == ZEROS:
                stop -= 1
            if name == files.CONTROL and stop and not self.inodes:
                pages = (pages[0][:BOOT.start] + FOREIGN_BOOT + pages[0][BOOT.stop:], *pages[1:])
            fd = os.open(f"{path}/{name}", os.O_WRONLY | os.O_CREAT)
            try:
                done = os.writev(fd, pages[:stop]) if stop else 0
                assert done == stop * PAGE
                os.ftruncate(fd, min(done, size))       # what is behind that from an earlier state goes
                if done < size:
                    os.ftruncate(fd, size)
            finally:
                os.close(fd)
        if self.inodes:
            self._name_inodes(path)

    def _remove_others(self, path: str) -> None:
        for name in os.listdir(path):
            if name not in self.images:
                if name == files.LOST_FOUND:
                    shutil.rmtree(f"{path}/{name}")
                else:
                    os.unlink(f"{path}/{name}")
            elif name == files.LOST_FOUND:
                for saved in os.listdir(f"{path}/{name}"):
                    if f"{name}/{saved}" not in self.images:
                        os.unlink(f"{path}/{name}/{saved}")

    def _name_inodes(self, path: str) -> None:
        """The control page names the files that it is about by device, inode and ctime: these are others here."""
        def inode_of(old: int) -> int:
            name = self.inodes.get(old)
            return os.stat(f"{path}/{name}").st_ino if name in self.images else 0

        size, pages = self.images.get(files.CONTROL, (0, ()))
        if size < PAGE or pages[0] == ZEROS:
            return
        device, control, index = struct.unpack_from("<3Q", pages[0], PLACE)
        parts = [struct.pack("<3Q", os.stat(path).st_dev, inode_of(control), inode_of(index))]
        for at in NOTES:
            generation, inode, ctime, _ = struct.unpack_from("<4Q", pages[0], at)
            found = inode_of(inode)
            if ctime and found:
                ctime = os.stat(f"{path}/{self.inodes[inode]}").st_ctime_ns
            parts.append(struct.pack("<4Q", generation, found, ctime, time.time_ns()))
        with open(f"{path}/{files.CONTROL}", "r+b", buffering=0) as file:
            file.seek(PLACE)
            file.write(b"".join(parts))


class Disk:
    """Replays events: what is durable and what is pending after each."""

    def __init__(self) -> None:
        self.files: dict[int, File] = {}
        self.names: dict[str, int] = {}
        self.pending: list[tuple[Named, Named]] = []    # keyed by itself: each reaches the device alone

    def apply(self, event: Event) -> None:
        if isinstance(event, Changed):
            self.files[event.file].change(event)
        elif isinstance(event, Named):
            if event.new is not None and event.file != DIRECTORY and event.file not in self.files:
                self.files[event.file] = File(event.new)
            self.pending.append((event, event))
        elif isinstance(event, Synced):
            self.files[event.file].sync()
        elif isinstance(event, SyncFailed):
            self.files[event.file].sync_failed()
        elif isinstance(event, SyncedNames):
            self.names = self._named([each for each in self.pending if each[0].directory == event.directory])
            self.pending = [each for each in self.pending if each[0].directory != event.directory]

    def _named(self, chosen: list[tuple[Named, Named]]) -> dict[str, int]:
        """The names with these changes.  A rename is whole: it brings the file along even if its creation is lost."""
        names = dict(self.names)
        for _, change in chosen:
            if change.old is not None and names.get(change.old) == change.file:
                del names[change.old]
            if change.new is not None:
                names[change.new] = change.file
        return names

    def draw(self, dice: random.Random) -> State:
        """Nothing of what is pending, or all, or one thing in part, or everything in part.

        What the log does not need is mostly there as a whole or not at all: it must not matter.
        """
        mood = dice.choice(("nothing", "everything", *4 * ("one",), *4 * ("each",)))
        rest = mood if mood in ("nothing", "everything") else dice.choice(("nothing", "everything"))
        changing: list[int | None] = [f for f, file in self.files.items() if file.pending and file.name not in DERIVED]
        if self.pending:
            changing.append(None)
        one = dice.choice(changing) if mood == "one" and changing else -1
        if mood == "one" and self.pending and dice.random() < 0.3:
            one = None
        how = [rest]
        if self.pending and (mood == "each" or one is None):
            what, chosen = choose(self.pending, dice)
            names = self._named(chosen)
            how.append(f"names: {what}")
        else:
            names = self._named(self.pending) if rest == "everything" else self.names
        images: dict[str, Image] = {}
        for name, number in names.items():
            if "/" in name and os.path.dirname(name) not in names:
                continue                        # its directory's own name is lost
            if number == DIRECTORY:
                images[name] = (DIRECTORY, ())
                continue
            file = self.files[number]
            in_part = mood == "each" and (file.name not in DERIVED or file.name != files.LOCK and dice.random() < 0.2)
            if file.pending and (number == one or in_part):
                what, images[name] = file.draw(dice)
                how.append(f"{name}: {what}")
            elif file.name in DERIVED and mood != "nothing" and file.name != files.LOCK:
                images[name] = file.whole(dice.random() < 0.5)
            else:
                images[name] = file.whole(rest == "everything")
        return State(images, "; ".join(how), len(how) > 1)

    def kept(self, inodes: Mapping[int, int]) -> State:
        """What the next process of the same boot finds: everything.  inodes: of the files, by number."""
        names = self._named(self.pending)
        images = {name: (DIRECTORY, ()) if number == DIRECTORY else self.files[number].whole(True)
                  for name, number in names.items()}
        called = {number: name for name, number in names.items()}
        once = {inode: called.get(number, "") for inode, number in inodes.items()}
        return State(images, "the process died", inodes=once)
