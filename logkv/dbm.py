"""What programs that use `dbm` import instead of it: `from logkv import dbm`.

>>> from logkv import dbm
>>> import tempfile
>>> path = tempfile.mkdtemp()
>>> with dbm.open(path, "c") as db:
...     db["btc"] = "4411.99"
...     db.keys()
[b'btc']
>>> dbm.whichdb(path)
'logkv.dbm'
"""

from __future__ import annotations

import dbm
import io
import os

from logkv import files, manifest
from logkv.errors import FormatError, error
from logkv.store import Path, Store, Sync

__all__ = ["Database", "error", "open", "whichdb"]


class Database(Store[bytes]):
    """A `logkv.Store` whose `keys()` is a list, as programs that were written for `dbm` expect it."""

    def keys(self) -> list[bytes]:      # type: ignore[override]
        """All keys, in no particular order."""
        return list(self)


def open(file: Path, flag: str = "r", mode: int = 0o666, *, sync: Sync = "os", timeout: float = 0) -> Database:
    """Opens a store as `logkv.open` does, but for `flag`, which is "r" unless given, as in `dbm`.

    Raises FormatError (an `error`) for a database of the standard library's, with every flag: it is neither read nor
    replaced, also where it lies beside `file` under names with endings.
    """
    refuse_foreign(file)
    return Database(file, flag, mode, sync=sync, timeout=timeout)


def whichdb(filename: Path) -> str | None:
    """The module to open `filename` with: "logkv.dbm" for a store, whole or damaged.

    For anything else what the standard library's `dbm.whichdb` says: another module, "" if it is not known, None if
    there is nothing that can be read.
    """
    try:
        with io.open(os.path.join(os.fsdecode(filename), files.MANIFEST), "rb") as file:
            if file.read(len(manifest.MAGIC)) == manifest.MAGIC.encode():
                return __name__
    except OSError:
        pass
    return dbm.whichdb(filename)


def refuse_foreign(file: Path) -> None:
    """Raises FormatError where another module's database is: a new store beside it would look as if all were lost."""
    kind = whichdb(file)
    if kind not in (None, __name__):
        path = os.fsdecode(file)
        raise FormatError(f"{path} is a database of {kind}, not a LogKV store: `logkv migrate` copies it into one"
                          if kind else f"{path} is a file; a LogKV store is a directory")
