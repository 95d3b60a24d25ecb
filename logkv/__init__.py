"""LogKV: a persistent dict that keeps everything in a log.

>>> import logkv, tempfile
>>> with logkv.open(tempfile.mkdtemp()) as db:
...     db["btc"] = "4411.99"
...     db["btc"]
b'4411.99'
"""

from logkv.errors import (
    ClosedError,
    CorruptionError,
    Error,
    FormatError,
    LockedError,
    NotFoundError,
    ReadOnlyError,
    error,
)
from logkv.store import Reader, Store, Writer, open
from logkv.verification import verify

__version__ = "0.1.0"

__all__ = [
    "ClosedError", "CorruptionError", "Error", "FormatError", "LockedError", "NotFoundError", "ReadOnlyError",
    "Reader", "Store", "Writer", "error", "open", "verify",
]
