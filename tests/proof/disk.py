"""What a power cut leaves of files and names: what was synced, and of the rest any part."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from logkv import files
from tests.proof.events import DIRECTORY, PAGE, Changed, Event, Named, Synced, SyncedNames

SECTOR = 512
ZEROS = bytes(PAGE)
SIZE = -1                       # in place of a page's number: the file's size
BOOT = slice(32, 48)            # where the control page names the boot
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

    def change(self, event: Changed) -> None:
        if event.size != self.last_size:
            self.last_size = event.size
            self.pending.append((SIZE, event.size))
        self.pending += event.pages.items()

    def sync(self) -> None:
        self.pages.update(self.pending)
        self.size = self.pages.pop(SIZE, self.size)     # type: ignore[assignment]
        self.pending.clear()

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


@dataclass(frozen=True, slots=True)
class State:
    """One directory that a power cut could leave."""

    images: dict[str, Image]
    how: str

    @property
    def key(self) -> int:
        """Equal for equal content."""
        return hash(frozenset(self.images.items()))

    def write(self, path: str) -> None:
        """Fills a directory, as the next boot finds it."""
        for name, (size, pages) in sorted(self.images.items()):     # a directory before what is in it
            if size == DIRECTORY:
                os.mkdir(f"{path}/{name}")
                continue
            data = b"".join(pages)[:size].rstrip(b"\0")
            if name == files.CONTROL and any(data):
                data = data[:BOOT.start].ljust(BOOT.start, b"\0") + FOREIGN_BOOT + data[BOOT.stop:]
            fd = os.open(f"{path}/{name}", os.O_WRONLY | os.O_CREAT)
            os.write(fd, data)
            if len(data) < size:
                os.ftruncate(fd, size)
            os.close(fd)


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
        mood = dice.choice(("nothing", "everything", "one", "one", "one", "each", "each"))
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
            if (parent := os.path.dirname(name)) and parent not in names:
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
                images[name] = file.image(dice.choice((file.pending, [])))
            else:
                images[name] = file.image(file.pending if rest == "everything" else [])
        return State(images, "; ".join(how))
