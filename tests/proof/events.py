"""What happened to a store's files and to the store, in order: the words of recorder, disk and session."""

from __future__ import annotations

import os
from dataclasses import dataclass

PAGE = 4096
DIRECTORY = -1                  # in place of a file's number or size: it is a directory


@dataclass(frozen=True, slots=True)
class Changed:
    """A file's content is another, by a call or through a mapping."""

    file: int
    size: int
    pages: dict[int, bytes]


@dataclass(frozen=True, slots=True)
class Named:
    """A name went, came, or changed, within one directory: unlink has no `new`, create has no `old`."""

    file: int
    old: str | None
    new: str | None

    @property
    def directory(self) -> str:
        return os.path.dirname(self.new or self.old or "")


@dataclass(frozen=True, slots=True)
class Synced:
    """A file's content is on the device."""

    file: int


@dataclass(frozen=True, slots=True)
class SyncFailed:
    """A sync of this file failed: the system may have dropped what it could not write, and calls it clean."""

    file: int


@dataclass(frozen=True, slots=True)
class SyncedNames:
    """The names in a directory are on the device: in the store's own (""), or in one below."""

    directory: str


@dataclass(frozen=True, slots=True)
class Begun:
    """The operation with this index began: its effect may be there from here on."""

    index: int


@dataclass(frozen=True, slots=True)
class Returned:
    """Everything up to this operation was acknowledged: it survives the death of the process."""

    index: int


@dataclass(frozen=True, slots=True)
class Durable:
    """Everything up to this operation was acknowledged as durable; 0: the store was."""

    index: int


@dataclass(frozen=True, slots=True)
class Compacting:
    """A merge or the sealing of a segment begins, or has ended."""

    now: bool


Event = Changed | Named | Synced | SyncFailed | SyncedNames | Begun | Returned | Durable | Compacting
