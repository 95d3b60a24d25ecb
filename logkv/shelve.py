"""What programs that use `shelve` import instead of it: `from logkv import shelve`.

A shelf keeps pickles, and reading a pickle can run any code: never open a shelf from somebody you do not trust.

>>> from logkv import shelve
>>> import tempfile
>>> with shelve.open(tempfile.mkdtemp()) as shelf:
...     shelf["btc"] = {"price": 4411.99}
...     shelf["btc"]
{'price': 4411.99}
"""

from __future__ import annotations

from shelve import Shelf
from typing import Any

from logkv.dbm import refuse_foreign
from logkv.store import Path, Store, Sync

__all__ = ["DbfilenameShelf", "Shelf", "open"]


class DbfilenameShelf(Shelf[Any]):
    """A shelf in the store at a path; see `open`."""

    cache: dict[str, Any]

    def __init__(self, filename: Path, flag: str = "c", protocol: int | None = None, writeback: bool = False, *,
                 sync: Sync = "os", timeout: float = 0) -> None:
        refuse_foreign(filename)
        self._store = Store(filename, flag, sync=sync, timeout=timeout)
        super().__init__(self._store, protocol, writeback)

    def clear(self) -> None:
        """Removes everything, quickly and atomically."""
        self.cache.clear()
        self._store.clear()

    def close(self) -> None:
        """Writes back, syncs, and lets the store go, also if one of these raises; again is fine."""
        try:
            super().close()
        finally:
            self._store.close()


def open(filename: Path, flag: str = "c", protocol: int | None = None, writeback: bool = False, *,
         sync: Sync = "os", timeout: float = 0) -> DbfilenameShelf:
    """Opens the shelf in the store at `filename`: a mapping of str to anything that can be pickled.

    flag, sync, timeout: those of `logkv.open`, which also says what is raised; and FormatError for another module's
        database at that path or beside it.
    protocol: of pickle; None: pickle's default.
    writeback: what was read is kept in memory, and written back at `sync()` and `close()`.

    Values are pickles in a plain store; the standard library's `shelve.Shelf(logkv.open(path))` reads and writes it.
    """
    return DbfilenameShelf(filename, flag, protocol, writeback, sync=sync, timeout=timeout)
