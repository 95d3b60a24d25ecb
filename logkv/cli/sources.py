"""What `logkv migrate` reads: a reader for each kind of source, and what tells the kind.  No source is changed."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logkv import codecs
from logkv.cli.stores import opened_to_read
from logkv.cli.terminal import explain

if TYPE_CHECKING:
    import sqlite3

SQLITE_MAGIC = b"SQLite format 3\0"
LMDB_MAGIC = 0xBEEFC0DE
LMDB_NAMED = 48             # bytes of the value that names a database within an LMDB
LMDB_MAX_NAMED = 1024       # named databases that can be told from records
LONGEST_SHOWN = 80          # characters of a key in a message
DBM_SUFFIXES = (".db", ".dat", ".dir", ".pag")


# -- what readers yield --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Native:
    """A Python object that the source keeps in a form of its own."""

    value: object


@dataclass(frozen=True, slots=True)
class Pickle:
    data: bytes


@dataclass(frozen=True, slots=True)
class Unreadable:
    reason: str


Field = bytes | Native | Pickle | Unreadable        # bytes: as they are stored, whatever they mean
Row = tuple[Field, Field]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a reader gives: `rows` can be called again and yields the same rows in the same order."""

    rows: Callable[[], Iterator[Row]]
    length: int | None = None       # of rows, if it is known
    expired: int = 0                # records that are left out
    codec: str | None = None        # that reads the values, if it is known


@dataclass(frozen=True, slots=True)
class Choice:
    """Which part of a source is read, where it has several."""

    table: str | None = None
    columns: tuple[str, str] | None = None      # of a table, those of the keys and the values; None: key and value


Open = Callable[[Path, Choice], AbstractContextManager[Contents]]


# -- what comes of it ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bad:
    """A record that cannot be copied."""

    key: Field
    reason: str

    def __str__(self) -> str:
        match self.key:
            case bytes(data):
                shown = _shown(data)
            case Pickle(data):
                shown = f"pickled {data!r}"
            case Native(value):
                shown = repr(value)
            case Unreadable():
                shown = "?"
        return f"key {shown if len(shown) <= LONGEST_SHOWN else shown[:LONGEST_SHOWN - 3] + '...'}: {self.reason}"


def _shown(data: bytes) -> str:
    try:
        return repr(data.decode())
    except UnicodeDecodeError:
        return repr(data)


def looks_pickled(value: bytes) -> bool:
    """Whether it begins and ends as the pickles of protocol 2 and newer do; nothing is unpickled."""
    return len(value) > 2 and value[0] == 0x80 and 2 <= value[1] <= 5 and value.endswith(b".")


def _unpickled(pickled: Pickle) -> object:
    import pickle
    try:
        return pickle.loads(pickled.data)
    except Exception as problem:        # a pickle can raise anything
        raise ValueError(f"it cannot be unpickled ({type(problem).__name__}: {problem})") from None


def _plain(value: object) -> bytes:
    """The bytes of an object in a store without codec: those of bytes and str, compact JSON of everything else."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


class Source:
    """A source that is open."""

    def __init__(self, path: Path, kind: str, contents: Contents, unpickle: bool) -> None:
        self.path = path
        self.kind = kind
        self.length = contents.length
        self.expired = contents.expired
        self.codec = contents.codec
        self.pickles = 0        # values that are pickles, of those that `records` has yielded
        self._rows = contents.rows
        self._unpickle = unpickle

    def records(self, codec: str | None) -> Iterator[tuple[bytes, bytes] | Bad]:
        """All records, keys and values as a store with this codec stores them.  Again: the same ones."""
        self.pickles = 0
        for key, value in self._rows():
            if isinstance(value, bytes) and looks_pickled(value):
                value = Pickle(value)
            try:
                record = self._key(key), self._value(value, codec)
            except (TypeError, ValueError, RecursionError) as problem:
                yield Bad(key, str(problem))
                continue
            self.pickles += isinstance(value, Pickle)
            yield record

    def _key(self, key: Field) -> bytes:
        if isinstance(key, Unreadable):
            raise ValueError(key.reason)
        if isinstance(key, Pickle):
            if not self._unpickle:
                raise ValueError("the key is a pickle (--pickle unpickles it, if you trust the source)")
            return _plain(_unpickled(key))
        return _plain(key.value) if isinstance(key, Native) else key

    def _value(self, value: Field, codec: str | None) -> bytes:
        if isinstance(value, Unreadable):
            raise ValueError(value.reason)
        if isinstance(value, Pickle):
            if codec == "pickle" or codec == self.codec and not self._unpickle:
                return value.data
            if not self._unpickle:
                raise ValueError(f"the value is a pickle, and {codec!r} is the store's codec "
                                 "(--pickle unpickles it, if you trust the source)")
            value = Native(_unpickled(value))
        if isinstance(value, Native):
            encode = codecs.resolve(codec).encode or _plain
            encoded = encode(value.value)
            return encoded.encode() if isinstance(encoded, str) else encoded
        if codec == "pickle":
            raise ValueError("the value is no pickle of protocol 2 or newer")
        if codec != self.codec:
            check = codecs.as_stored(codec).encode
            try:
                if check is not None:
                    check(value)
            except ValueError as problem:
                raise ValueError(f"the value is not right for codec {codec!r}: {problem}") from None
        return value


# -- readers -------------------------------------------------------------------------------------------


def _package(module: str, remedy: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(f"this needs the module {module}, which is missing: {remedy}") from None


@contextmanager
def _logkv(path: Path, _: Choice) -> Iterator[Contents]:
    with opened_to_read(path) as reader:
        yield Contents(lambda: iter(reader.items()), len(reader), codec=reader.codec)


def _whichdb(path: Path) -> tuple[str, Path] | None:
    """The module that reads a dbm, and the name to open it by."""
    import dbm
    for name in (path, path.with_suffix("")) if path.suffix in DBM_SUFFIXES else (path,):
        module = dbm.whichdb(os.fspath(name))
        if module:
            return module, name
    return None


@contextmanager
def _dbm(path: Path, choice: Choice) -> Iterator[Contents]:
    if _is_sqlite(path):
        with _sqlite(path, choice) as contents:
            yield contents
        return
    found = _whichdb(path)
    if found is None:
        raise ValueError(f"{path} is no dbm")
    module, name = found
    package = _package(module, "use a Python that has it")
    try:
        opened = package.open(os.fspath(name), "r")
    except (SyntaxError, TypeError) as problem:     # dbm.dumb keeps its index as Python text
        raise ValueError(f"{path} is damaged: {problem}") from problem
    with opened as db:
        def rows() -> Iterator[Row]:
            for key in _dbm_keys(db):
                yield key, db[key]

        yield Contents(rows, len(db))


def _dbm_keys(db: Any) -> Iterator[bytes]:
    if not hasattr(db, "firstkey"):
        yield from db.keys()
        return
    key = db.firstkey()
    while key is not None:
        yield key
        key = db.nextkey(key)


@contextmanager
def _shelve(path: Path, choice: Choice) -> Iterator[Contents]:
    with _dbm(path, choice) as contents:
        def rows() -> Iterator[Row]:
            for key, value in contents.rows():
                yield key, Pickle(value) if isinstance(value, bytes) else value

        yield Contents(rows, contents.length)


@dataclass(frozen=True, slots=True)
class _Database:
    """A connection that reads one state of a file of SQLite's."""

    path: Path
    connection: sqlite3.Connection

    def select(self, what: str, *values: object) -> Iterator[Any]:
        """The rows of SELECT `what`."""
        import sqlite3
        try:
            yield from self.connection.execute(f"SELECT {what}", values)
        except sqlite3.Error as problem:
            raise ValueError(f"{self.path}: {problem}") from problem

    def tables(self) -> dict[str, dict[str, str]]:
        """The columns of each table and view with their types, in lower case."""
        names = [name for name, in self.select("name FROM sqlite_master WHERE type IN ('table', 'view') "
                                               "AND name NOT GLOB 'sqlite_*'")]
        return {name: {column.lower(): kind.lower()
                       for column, kind in self.select("name, type FROM pragma_table_info(?)", name)}
                for name in names}

    def primary_key(self, table: str) -> list[str]:
        """The names of its columns."""
        return [name for name, in self.select("name FROM pragma_table_info(?) WHERE pk ORDER BY pk", table)]

    def pair_tables(self) -> dict[str, dict[str, str]]:
        """Those with a column "key", a column "value" and no other."""
        return {name: columns for name, columns in self.tables().items() if columns.keys() == {"key", "value"}}


@contextmanager
def _connected(path: Path) -> Iterator[_Database]:
    """Opens a file of SQLite's for reading.

    One in WAL mode without a WAL has no writer, and SQLite would leave a new WAL beside it: it is read as a file that
    does not change.  Where there is a WAL, SQLite notes its readers in the -shm file.
    """
    sqlite3 = _package("sqlite3", "use a Python that has it")
    real = path.resolve()           # beside which the WAL is
    in_wal_mode = _bytes_at(real, 18, 2) == b"\2\2"
    alone = in_wal_mode and not real.with_name(real.name + "-wal").exists()
    uri = real.as_uri() + ("?mode=ro&immutable=1" if alone else "?mode=ro")
    try:
        opened = sqlite3.connect(uri, uri=True, isolation_level=None)
    except sqlite3.Error as problem:
        raise ValueError(f"{path}: {problem}") from problem
    with closing(opened) as connection:
        connection.execute("BEGIN")         # reads nothing yet
        yield _Database(path, connection)


def _choose(db: _Database, choice: Choice) -> str:
    """The table to read."""
    tables = db.tables()
    key, value = choice.columns or ("key", "value")
    fitting = {name: columns for name, columns in tables.items() if columns.keys() >= {key.lower(), value.lower()}}
    table = choice.table
    if table is not None:
        if table not in tables:
            raise ValueError(f"{db.path} has no table {table!r}, only: {_named(tables)}")
        if table not in fitting:
            raise ValueError(f"{db.path}: table {table!r} has no columns {key} and {value}, only: "
                             f"{', '.join(tables[table])} (--columns KEY,VALUE names the two to read)")
        return table
    if choice.columns is None:          # more columns might be part of what a record means
        fitting = db.pair_tables()
    if not fitting:
        wanted = f"with the columns {key} and {value}" if choice.columns else "of just the columns key and value"
        raise ValueError(f"{db.path} has no table {wanted}, only: {_named(tables)} "
                         "(--columns KEY,VALUE names the two to read, --table NAME the table)")
    if len(fitting) > 1:
        raise ValueError(f"{db.path} has several tables, choose one with --table: {', '.join(fitting)}")
    return next(iter(fitting))


def _named(tables: Mapping[str, Iterable[str]]) -> str:
    return ", ".join(f"{name} ({', '.join(columns)})" for name, columns in tables.items()) or "none at all"


def _quoted(name: str) -> str:
    """A name in SQL."""
    return '"' + name.replace('"', '""') + '"'


NULL = Unreadable("NULL cannot be stored")


def _sqlite_field(value: object) -> Field:
    if isinstance(value, bytes):
        return value
    return NULL if value is None else repr(value).encode()


@contextmanager
def _sqlite(path: Path, choice: Choice) -> Iterator[Contents]:
    with _connected(path) as db:
        name = _quoted(_choose(db, choice))
        columns = ", ".join(map(_quoted, choice.columns or ("key", "value")))
        (length,), = db.select(f"count(*) FROM {name}")
        db.connection.text_factory = bytes

        def rows() -> Iterator[Row]:
            for key, value in db.select(f"{columns} FROM {name}"):
                yield _sqlite_field(key), _sqlite_field(value)

        yield Contents(rows, length)


@contextmanager
def _diskcache(path: Path, _: Choice) -> Iterator[Contents]:
    files = _diskcache_files(path)
    if not files:
        raise ValueError(f"{path} is no directory of diskcache")
    now = time.time()
    with ExitStack() as stack:
        shards = [stack.enter_context(_connected(file)) for file in files]
        length = expired = 0
        for db in shards:
            db.connection.text_factory = _text
            (live, gone), = db.select("count(*) FILTER (WHERE expire_time IS NULL OR expire_time > ?1), "
                                      "count(*) FILTER (WHERE expire_time <= ?1) FROM Cache", now)
            length, expired = length + live, expired + gone

        def rows() -> Iterator[Row]:
            for db in shards:
                for key, raw, mode, name, value in db.select(
                        "key, raw, mode, filename, value FROM Cache "
                        "WHERE expire_time IS NULL OR expire_time > ?", now):
                    yield _diskcache_key(key, raw), _diskcache_value(db.path.parent, mode, name, value)

        yield Contents(rows, length, expired)


def _text(data: bytes) -> str:
    """What is not UTF-8 becomes a str that cannot be encoded: a bad record."""
    return data.decode("utf-8", "surrogateescape")


def _diskcache_files(path: Path) -> list[Path]:
    """The database of a Cache, or those of a FanoutCache's shards."""
    if path.is_file():
        return [path]
    return list(path.glob("cache.db")) or sorted(path.glob("[0-9][0-9][0-9]/cache.db"))


def _diskcache_key(key: object, raw: object) -> Field:
    if raw:
        return NULL if key is None else Native(key)
    return Pickle(key) if isinstance(key, bytes) else Unreadable("the key is no pickle, though it is marked as one")


def _diskcache_value(directory: Path, mode: object, name: object, value: object) -> Field:
    if name is not None:
        if not isinstance(name, str) or os.path.isabs(name) or ".." in Path(name).parts:
            return Unreadable(f"its value is in the file {name!r}, outside the cache")
        try:
            value = (directory / name).read_bytes()
        except (OSError, ValueError) as problem:
            return Unreadable(f"its value's file {name!r} cannot be read: {explain(problem)}")
    match mode, value:
        case _, None:
            return NULL
        case 1 | 2, _:
            return Native(value)
        case 3, bytes():
            return Native(_text(value))
        case 4, bytes():
            return Pickle(value)
    return Unreadable(f"its value does not fit its mode, {mode!r}")


@contextmanager
def _lmdb(path: Path, choice: Choice) -> Iterator[Contents]:
    table = choice.table
    lmdb = _package("lmdb", "pip install lmdb")
    lock = path / "lock.mdb" if path.is_dir() else path.with_name(path.name + "-lock")
    try:
        # Readers note themselves in the lock file, without which a writer would reuse what they read.
        with lmdb.open(os.fspath(path), subdir=path.is_dir(), readonly=True, create=False,
                       lock=os.access(lock, os.W_OK), max_dbs=LMDB_MAX_NAMED) as environment:
            database = environment.open_db(None if table is None else table.encode(), create=False)
            with environment.begin(db=database) as transaction:

                def rows() -> Iterator[Row]:
                    for key, value in transaction.cursor():
                        yield key, (Unreadable("this is a named database: choose it with --table")
                                    if table is None and is_named(key, value) else value)

                def is_named(key: bytes, value: bytes) -> bool:
                    try:
                        return len(value) == LMDB_NAMED and bool(environment.open_db(key, transaction, create=False))
                    except lmdb.IncompatibleError:
                        return False

                yield Contents(rows, transaction.stat(database)["entries"])
    except lmdb.NotFoundError:
        raise ValueError(f"{path} has no database named {table!r}") from None
    except lmdb.Error as problem:
        raise ValueError(f"{path}: {problem}") from problem


@contextmanager
def _leveldb(path: Path, _: Choice) -> Iterator[Contents]:
    """LevelDB writes to what it opens, so a copy is opened: its tables, which never change, are links."""
    plyvel = _package("plyvel", "pip install plyvel")
    from tempfile import TemporaryDirectory
    if not _is_leveldb(path):
        raise ValueError(f"{path} is no LevelDB")
    with TemporaryDirectory(prefix="logkv-") as copy, _leveldb_locked(path):
        for file in path.absolute().iterdir():
            if file.suffix in (".ldb", ".sst"):
                os.symlink(file, os.path.join(copy, file.name))
            elif file.suffix == ".log" or file.name.startswith(("CURRENT", "MANIFEST-")):
                shutil.copyfile(file, os.path.join(copy, file.name))
        try:
            with closing(plyvel.DB(copy, paranoid_checks=True)) as db:
                yield Contents(lambda: db.iterator(verify_checksums=True))
        except plyvel.Error as problem:
            message = os.fsdecode(problem.args[0]).replace(copy, os.fspath(path))
            raise ValueError(f"{path}: {message}") from problem


@contextmanager
def _leveldb_locked(path: Path) -> Iterator[None]:
    """Keeps LevelDB's own writers away."""
    import fcntl
    if not (path / "LOCK").exists():        # a copy
        yield
        return
    with open(path / "LOCK", "rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{path} is open in another process") from None
        yield


# -- kinds ---------------------------------------------------------------------------------------------


def _is_sqlite(path: Path) -> bool:
    return _bytes_at(path, 0, len(SQLITE_MAGIC)) == SQLITE_MAGIC


def _is_lmdb(path: Path) -> bool:
    return (path / "data.mdb").is_file() or _bytes_at(path, 16, 4) == LMDB_MAGIC.to_bytes(4, sys.byteorder)


def _is_leveldb(path: Path) -> bool:
    return (path / "CURRENT").is_file()


def _bytes_at(path: Path, offset: int, count: int) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(count)


def _is_sqlitedict(path: Path) -> bool:
    """Whether a table has its layout, which others may have too, and begins with a pickle."""
    if not _is_sqlite(path):
        return False
    with _connected(path) as db:
        return any(isinstance(value, bytes) and looks_pickled(value)
                   for name, columns in db.pair_tables().items()
                   if columns == {"key": "text", "value": "blob"} and db.primary_key(name) == ["key"]
                   for value, in db.select(f"value FROM {_quoted(name)} LIMIT 1"))


def _is_diskcache(path: Path) -> bool:
    if path.is_dir():
        return bool(_diskcache_files(path))
    if not _is_sqlite(path):
        return False
    with _connected(path) as db:
        return db.tables().get("Cache", {}).keys() >= {"key", "raw", "mode", "filename", "value"}


@dataclass(frozen=True, slots=True)
class Kind:
    is_one: Callable[[Path], bool]
    open: Open
    has_tables: bool = False
    has_columns: bool = False


KINDS = {       # asked in this order
    "logkv": Kind(lambda path: (path / "MANIFEST").is_file(), _logkv),
    "leveldb": Kind(_is_leveldb, _leveldb),
    "lmdb": Kind(_is_lmdb, _lmdb, has_tables=True),
    "diskcache": Kind(_is_diskcache, _diskcache),
    "sqlitedict": Kind(_is_sqlitedict, _sqlite, has_tables=True, has_columns=True),
    "sqlite": Kind(_is_sqlite, _sqlite, has_tables=True, has_columns=True),
    "dbm": Kind(lambda path: _whichdb(path) is not None, _dbm),
    "shelve": Kind(lambda path: False, _shelve),        # by name only: nothing but its values tells it from a dbm
}


def _kind_of(path: Path) -> str:
    for name, kind in KINDS.items():
        if kind.is_one(path):
            return name
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    raise ValueError(f"{path} is nothing that can be migrated; {', '.join(KINDS)} are known")


@contextmanager
def open_source(path: str, kind: str | None = None, table: str | None = None,
                columns: tuple[str, str] | None = None, unpickle: bool = False) -> Iterator[Source]:
    """Opens what is at `path` for reading.

    kind: a name in KINDS; None finds it out.
    table: of those kinds that have several in one source.
    columns: of an SQLite table, that of the keys and that of the values, if they are not "key" and "value".
    unpickle: whether pickles are unpickled, which runs what they say.

    Raises ValueError for what is not of this kind or damaged, ImportError if a package is missing, OSError.
    """
    where = Path(path)
    name = kind or _kind_of(where)
    if table is not None and not KINDS[name].has_tables:
        raise ValueError(f"a source of the kind {name} has no tables to choose from")
    if columns is not None and not KINDS[name].has_columns:
        raise ValueError(f"a source of the kind {name} has no columns to choose from")
    with KINDS[name].open(where, Choice(table, columns)) as contents:
        yield Source(where, name, contents, unpickle)
