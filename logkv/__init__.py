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

try:
    from logkv.backup import Backup
    from logkv.repair import Loss, RepairReport, repair
    from logkv.store import Reader, Store, Writer, open
    from logkv.verification import Problem, Report, verify
except ModuleNotFoundError as problem:
    if problem.name == "logkv._core":
        problem.msg = (f"{__path__[0]} is LogKV's source, which is not built: run Python in another directory, or build it "
                       "here with `pip install -e .`")
    raise

__version__ = "0.1.0"

__all__ = [
    "ClosedError", "CorruptionError", "Error", "FormatError", "LockedError", "NotFoundError", "ReadOnlyError",
    "Backup", "Loss", "Problem", "Reader", "RepairReport", "Report", "Store", "Writer", "error", "open", "repair", "verify",
]
