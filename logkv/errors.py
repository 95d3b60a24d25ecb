"""What can go wrong, by name.  A missing key is a KeyError, a wrong type a TypeError, as with any mapping."""

from __future__ import annotations

__all__ = [
    "ClosedError", "CorruptionError", "Error", "FormatError", "LockedError", "NotFoundError", "ReadOnlyError", "error",
]


HELP = "logkv verify lists all that is damaged, logkv repair keeps all that is not"


class Error(OSError):
    """The root of LogKV's errors; an OSError, as the errors of `dbm` are."""


class ClosedError(Error):
    """The store, or this handle on it, was closed; or the store was emptied and has another codec now."""


class ReadOnlyError(Error):
    """A write through something that was opened for reading, or in the child of a fork."""


class LockedError(Error):
    """Another process writes to the store.

    `pid`: that process, or None if it is not known.
    """

    def __init__(self, *arguments: object, pid: int | None = None) -> None:
        super().__init__(*arguments)
        self.pid = pid


class CorruptionError(Error):
    """Something that was on the device is damaged.

    `reason`: what is wrong; `path`: the file; `segment`: its number; `offset`: in bytes; `expected` and `found`: as text.
    """

    def __init__(self, message: str, *, path: str | None = None, segment: int | None = None, offset: int | None = None,
                 expected: str | None = None, found: str | None = None, fatal: bool = False) -> None:
        """fatal: the store does not open because of it; the text says what helps."""
        where = path if path is not None else f"segment {segment}" if segment is not None else None
        parts = [message]
        if where is not None:
            parts.append(f"in {where}" + (f" at offset {offset}" if offset is not None else ""))
        if expected is not None:
            parts.append(f"expected {expected}, found {found}")
        text = ": ".join([" ".join(parts[:2]), *parts[2:]]) if where is not None else ": ".join(parts)
        super().__init__(f"{text} ({HELP})" if fatal else text)
        self.reason = message
        self.path = path
        self.segment = segment
        self.offset = offset
        self.expected = expected
        self.found = found


class FormatError(Error):
    """Not a store, or one of a newer format."""


class NotFoundError(Error, FileNotFoundError):
    """There is no store at that path."""


error = Error
