"""`logkv migrate`: everything arrives as it was, nothing is unpickled unasked, no source is changed."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import shelve
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import logkv
import logkv.shelve
from logkv.cli import main
from logkv.cli.sources import KINDS, Bad, open_source

PAIRS = {b"btc": b"4411.99", b"\xc3\xa9": "ü".encode(), b"raw\xff": bytes(range(256)), b"empty": b"", b"": b"no key",
         b"long": b"x" * 5000}
OBJECTS: dict[str, Any] = {"btc": {"price": 4411.99, "at": [1, 2]}, "é": "text", "raw": b"\xff", "none": None, "n": 7}
AS_TEXT = {"btc": b'{"price":4411.99,"at":[1,2]}', "é": b"text", "raw": b"\xff", "none": b"null", "n": b"7"}

Migrate = Callable[..., int]


@pytest.fixture
def there(tmp_path: Path) -> str:
    """Where the new store is."""
    return str(tmp_path / "there")


@pytest.fixture
def migrate(there: str) -> Migrate:
    return lambda source, *options: main(["migrate", str(source), there, *options])


def stored(path: str, codec: str | None = "bytes") -> dict[bytes, Any]:
    with logkv.Reader(path, codec=codec) as reader:
        return dict(reader.items())


def keyed(objects: dict[str, Any]) -> dict[bytes, Any]:
    return {key.encode(): value for key, value in objects.items()}


class Effect:
    """Its unpickling calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


# -- sources made by their own packages --------------------------------------------------------------------


def make_dbm(path: Path, module: str, pairs: dict[bytes, bytes] = PAIRS) -> Path:
    with importlib.import_module(module).open(str(path), "n") as db:
        for key, value in pairs.items():
            db[key] = value
    return path


def make_sqlitedict(path: Path) -> Path:
    sqlitedict = pytest.importorskip("sqlitedict")
    with sqlitedict.SqliteDict(str(path), autocommit=True) as db:
        db.update(OBJECTS)
    return path


def make_diskcache(path: Path) -> Path:
    diskcache = pytest.importorskip("diskcache")
    with diskcache.Cache(str(path), cull_limit=0) as cache:
        for key, value in OBJECTS.items():
            cache[key] = value
        for size in (100, 100_000):
            cache[size] = "é" * size
            cache[f"bytes {size}"] = b"\x80" * size
            cache[f"list {size}"] = list(range(size))
        cache.set("forever", 1, expire=1000)
        cache.set("gone", 1, expire=-1)
    return path


def make_lmdb(path: Path) -> Path:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), max_dbs=1) as environment, environment.begin(write=True) as transaction:
        for key, value in PAIRS.items():
            if key:
                transaction.put(key, value)
        transaction.put(b"as long as a name's", b"x" * 48)
    return path


def make_leveldb(path: Path) -> Path:
    plyvel = pytest.importorskip("plyvel")
    for change in (PAIRS, {b"btc": b"overwritten"}):        # in a table, and in the log
        with closing(plyvel.DB(str(path), create_if_missing=True)) as db:
            for key, value in change.items():
                db.put(key, value)
    return path


def make_logkv(path: Path) -> Path:
    with logkv.open(path) as db:
        db.update(PAIRS)
    return path


@pytest.mark.parametrize("module", ["dbm.dumb", "dbm.gnu", "dbm.ndbm", "dbm.sqlite3"])
def test_any_dbm_of_the_standard_library(module: str, tmp_path: Path, migrate: Migrate, there: str) -> None:
    pytest.importorskip(module)
    pairs = {key: value for key, value in PAIRS.items() if module != "dbm.ndbm" or len(value) < 1000}
    source = make_dbm(tmp_path / "prices", module, pairs)
    assert migrate(source) == 0
    assert stored(there) == pairs
    for file in tmp_path.glob("prices*"):       # a file of it is as good as its name
        if file.suffix in (".db", ".dat", ".dir", ".pag", ""):
            assert main(["migrate", str(file), str(tmp_path / "again"), "--merge"]) == 0
            assert stored(str(tmp_path / "again")) == pairs


def test_a_shelf_keeps_its_pickles_to_the_byte(tmp_path: Path, migrate: Migrate, there: str,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    pickles: dict[bytes, bytes] = {}
    shelf: shelve.Shelf[Any]
    with shelve.Shelf(pickles) as shelf:
        shelf.update(OBJECTS)
    make_dbm(tmp_path / "shelf", "dbm.dumb", pickles)
    assert migrate(tmp_path / "shelf", "--json") == 0
    assert json.loads(capsys.readouterr().out)["pickled"] == len(OBJECTS)
    assert stored(there) == pickles
    with logkv.shelve.open(there, "r") as copied:
        assert dict(copied) == OBJECTS


def test_a_shelf_becomes_a_store_with_codec_pickle(tmp_path: Path, migrate: Migrate, there: str) -> None:
    with shelve.open(str(tmp_path / "shelf")) as shelf:
        shelf.update(OBJECTS)
    assert migrate(tmp_path / "shelf", "--codec", "pickle") == 0
    assert stored(there, "pickle") == keyed(OBJECTS)


def test_a_shelf_of_any_protocol_if_it_is_called_one(tmp_path: Path, migrate: Migrate, there: str) -> None:
    shelf: shelve.Shelf[Any]
    with shelve.Shelf(importlib.import_module("dbm.dumb").open(str(tmp_path / "shelf")), protocol=0) as shelf:
        shelf.update(OBJECTS)
    assert migrate(tmp_path / "shelf", "--codec", "pickle") == 2
    assert migrate(tmp_path / "shelf", "--codec", "pickle", "--from", "shelve") == 0
    assert stored(there, "pickle") == keyed(OBJECTS)


def test_pickles_become_text_and_json_if_asked(tmp_path: Path, migrate: Migrate, there: str) -> None:
    with shelve.open(str(tmp_path / "shelf")) as shelf:
        shelf.update(OBJECTS)
    assert migrate(tmp_path / "shelf", "--pickle") == 0
    assert stored(there) == keyed(AS_TEXT)


def test_pickles_become_values_of_a_codec(tmp_path: Path, migrate: Migrate, there: str) -> None:
    objects = {key: value for key, value in OBJECTS.items() if key != "raw"}
    with shelve.open(str(tmp_path / "shelf")) as shelf:
        shelf.update(objects)
    assert migrate(tmp_path / "shelf", "--pickle", "--codec", "json") == 0
    assert stored(there, "json") == keyed(objects)


def test_sqlitedict(tmp_path: Path, migrate: Migrate, there: str) -> None:
    assert migrate(make_sqlitedict(tmp_path / "a.db"), "--codec", "pickle") == 0
    assert stored(there, "pickle") == keyed(OBJECTS)


def test_diskcache(tmp_path: Path, migrate: Migrate, there: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert migrate(make_diskcache(tmp_path / "cache"), "--codec", "pickle", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["kind"], result["expired"], result["differing"]) == ("diskcache", 1, 0)
    expected = keyed(OBJECTS) | {b"forever": 1}
    for size in (100, 100_000):
        expected |= {b"%d" % size: "é" * size, b"bytes %d" % size: b"\x80" * size,
                     b"list %d" % size: list(range(size))}
    assert stored(there, "pickle") == expected


def test_the_shards_of_a_fanout_cache(tmp_path: Path, migrate: Migrate, there: str) -> None:
    diskcache = pytest.importorskip("diskcache")
    with diskcache.FanoutCache(str(tmp_path / "cache"), shards=3) as cache:
        for number in range(50):
            cache[f"key {number}"] = f"value {number}"
    assert migrate(tmp_path / "cache") == 0
    assert stored(there) == {b"key %d" % number: b"value %d" % number for number in range(50)}


def test_lmdb(tmp_path: Path, migrate: Migrate, there: str) -> None:
    source = make_lmdb(tmp_path / "lmdb")
    expected = {key: value for key, value in PAIRS.items() if key} | {b"as long as a name's": b"x" * 48}
    assert migrate(source) == 0
    assert stored(there) == expected
    assert main(["migrate", str(source / "data.mdb"), str(tmp_path / "again")]) == 0
    assert stored(str(tmp_path / "again")) == expected


def test_a_named_database_of_an_lmdb(tmp_path: Path, migrate: Migrate, there: str,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    source = make_lmdb(tmp_path / "lmdb")
    lmdb = importlib.import_module("lmdb")
    with lmdb.open(str(source), max_dbs=1) as environment:
        environment.open_db(b"prices")
        with environment.begin(environment.open_db(b"prices"), write=True) as transaction:
            transaction.put(b"btc", b"1")
    assert migrate(source, "--table", "prices") == 0
    assert stored(there) == {b"btc": b"1"}
    assert main(["migrate", str(source), str(tmp_path / "again")]) == 2
    assert "'prices': this is a named database" in capsys.readouterr().err
    assert main(["migrate", str(source), str(tmp_path / "again"), "--table", "volumes"]) == 2
    assert "no database named 'volumes'" in capsys.readouterr().err


def test_leveldb(tmp_path: Path, migrate: Migrate, there: str) -> None:
    assert migrate(make_leveldb(tmp_path / "level")) == 0
    assert stored(there) == PAIRS | {b"btc": b"overwritten"}


def test_a_leveldb_that_is_in_use_is_refused(tmp_path: Path, migrate: Migrate,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    source = make_leveldb(tmp_path / "level")
    program = "import plyvel, sys; db = plyvel.DB(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program, str(source)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        assert migrate(source) == 2
        other.communicate()
    assert "open in another process" in capsys.readouterr().err


def test_damage_of_a_leveldb_is_reported(tmp_path: Path, migrate: Migrate, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_leveldb(tmp_path / "level")
    table, = source.glob("*.ldb")
    content = bytearray(table.read_bytes())
    content[content.index(b"4411.99")] ^= 1
    table.write_bytes(content)
    assert migrate(source) == 2
    error = capsys.readouterr().err
    assert str(source) in error and error.count("\n") == 1


def test_another_store_keeps_its_codec(tmp_path: Path, migrate: Migrate, there: str) -> None:
    with logkv.open(tmp_path / "json", codec="json") as db:
        db["btc"] = {"price": 1}
    assert migrate(tmp_path / "json") == 0
    assert stored(there, "json") == {b"btc": {"price": 1}}


# -- layouts made by hand ----------------------------------------------------------------------------------


def make_sqlite(path: Path, *statements: str | tuple[str, tuple[Any, ...]]) -> Path:
    with closing(sqlite3.connect(path)) as db:
        for statement in statements:
            db.execute(*((statement,) if isinstance(statement, str) else statement))
        db.commit()
    return path


CACHE = ("CREATE TABLE Cache (rowid INTEGER PRIMARY KEY, key BLOB, raw INTEGER, expire_time REAL, tag BLOB, "
         "mode INTEGER, filename TEXT, value BLOB)")


def row(key: Any, value: Any, *, raw: int = 1, mode: int = 1, name: str | bytes | None = None,
        expires: float | None = None) -> tuple[str, tuple[Any, ...]]:
    """A row of diskcache's."""
    return ("INSERT INTO Cache (key, raw, expire_time, mode, filename, value) VALUES (?, ?, ?, ?, ?, ?)",
            (key, raw, expires, mode, name, value))


def make_cache(path: Path, *rows: tuple[str, tuple[Any, ...]]) -> Path:
    path.mkdir()
    make_sqlite(path / "cache.db", CACHE, "PRAGMA journal_mode=wal", *rows)
    return path


def test_sqlitedict_by_hand(tmp_path: Path, migrate: Migrate, there: str, capsys: pytest.CaptureFixture[str]) -> None:
    pickles = {key: pickle.dumps(value) for key, value in OBJECTS.items()}
    source = make_sqlite(tmp_path / "a.db", 'CREATE TABLE "my ""table" (key TEXT PRIMARY KEY, value BLOB)',
                         *(('INSERT INTO "my ""table" VALUES (?, ?)', pair) for pair in pickles.items()))
    assert migrate(source, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["kind"], result["pickled"]) == ("sqlitedict", len(OBJECTS))
    assert stored(there) == keyed(pickles)


def test_diskcache_by_hand(tmp_path: Path, migrate: Migrate, there: str, capsys: pytest.CaptureFixture[str]) -> None:
    pickled_key = pickle.dumps(("a", 1))
    source = make_cache(tmp_path / "cache", row("text", "é"), row(b"bytes", b"\xff"), row(3, 7), row(2.5, 0.1),
                        row("binary", None, mode=2, name="00/a.val"), row("file", None, mode=3, name="00/b.val"),
                        row("pickle", pickle.dumps([1]), mode=4), row("list", None, mode=4, name="00/c.val"),
                        row(pickled_key, "tuple", raw=0), row("old", "1", expires=time.time() - 1),
                        row("new", "1", expires=time.time() + 1000))
    (source / "00").mkdir()
    (source / "00" / "a.val").write_bytes(b"\xfe")
    (source / "00" / "b.val").write_text("ü\r\n", newline="")
    (source / "00" / "c.val").write_bytes(pickle.dumps([2]))
    assert migrate(source, "--pickle", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["copied"], result["expired"], result["pickled"], result["skipped"]) == (10, 1, 2, 0)
    assert stored(there) == {b"text": "é".encode(), b"bytes": b"\xff", b"3": b"7", b"2.5": b"0.1", b"binary": b"\xfe",
                             b"file": "ü\r\n".encode(), b"pickle": b"[1]", b"list": b"[2]", b'["a",1]': b"tuple",
                             b"new": b"1"}


def test_a_pickled_key_needs_leave(tmp_path: Path, migrate: Migrate, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_cache(tmp_path / "cache", row(pickle.dumps((1,)), "x", raw=0))
    assert migrate(source) == 2
    error = capsys.readouterr().err
    assert "the key is a pickle" in error and "--pickle" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_a_cache_cannot_name_files_outside_itself(name: str, tmp_path: Path, migrate: Migrate, there: str,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    source = make_cache(tmp_path / "cache", row("a", None, mode=2, name=name))
    assert migrate(source) == 2
    assert "outside the cache" in capsys.readouterr().err
    assert stored(there) == {}


@pytest.mark.parametrize("bad", [row("a", None), row(None, "a"), row("a", "text", mode=4), row("text", "a", raw=0),
                                 row("a", 1, mode=3), row("a", "a", mode=9), row("a", None, mode=2, name="missing"),
                                 row("a", None, mode=2, name="nul\0"), row("a", None, mode=2, name=b"bytes")],
                         ids=["value NULL", "key NULL", "no pickle", "key no pickle", "no text", "mode unknown",
                              "file missing", "name with NUL", "name no text"])
@pytest.mark.parametrize("options", [[], ["--pickle"], ["--codec", "pickle"]], ids=["plain", "unpickled", "codec"])
def test_rows_that_diskcache_does_not_write(bad: Any, options: list[str], tmp_path: Path, migrate: Migrate, there: str,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    source = make_cache(tmp_path / "cache", bad, row("good", "1"))
    assert migrate(source, "--skip-bad", *options) == 0
    assert capsys.readouterr().err.count("\n") == 1
    assert list(stored(there)) == [b"good"]


def test_any_table_of_keys_and_values(tmp_path: Path, migrate: Migrate, there: str) -> None:
    source = make_sqlite(tmp_path / "a.db", "CREATE TABLE other (name)", "CREATE TABLE pairs (Key, Value)",
                         ("INSERT INTO pairs VALUES (?, ?), (?, ?), (?, ?), (?, CAST(X'FF' AS TEXT))",
                          ("text", "é", b"\xff", b"\x00", 12, 0.5, 2.5)))
    assert migrate(source) == 0
    assert stored(there) == {b"text": "é".encode(), b"\xff": b"\x00", b"12": b"0.5", b"2.5": b"\xff"}


def test_the_layout_of_dbm_sqlite3(tmp_path: Path, migrate: Migrate, there: str) -> None:
    source = make_sqlite(tmp_path / "a.db", "CREATE TABLE Dict (key BLOB UNIQUE NOT NULL, value BLOB NOT NULL)",
                         *(("INSERT INTO Dict VALUES (?, ?)", pair) for pair in PAIRS.items()))
    for options in ([], ["--from", "dbm", "--merge"]):
        assert migrate(source, *options) == 0
        assert stored(there) == PAIRS


def test_one_of_several_tables(tmp_path: Path, migrate: Migrate, there: str,
                               capsys: pytest.CaptureFixture[str]) -> None:
    source = make_sqlite(tmp_path / "a.db", "CREATE TABLE a (key, value)", "CREATE TABLE b (key, value)",
                         "CREATE TABLE c (key, value, more)", "INSERT INTO b VALUES ('x', 'y')",
                         "INSERT INTO c VALUES ('x', 'z', 1)")
    assert migrate(source) == 2
    assert "choose one with --table: a, b" in capsys.readouterr().err
    assert migrate(source, "--table", "d") == 2
    assert "no table 'd'" in capsys.readouterr().err
    assert migrate(source, "--table", "b") == 0
    assert stored(there) == {b"x": b"y"}
    assert migrate(source, "--table", "c", "--merge") == 0
    assert stored(there) == {b"x": b"z"}


def test_columns_with_other_names(tmp_path: Path, migrate: Migrate, there: str,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    source = make_sqlite(tmp_path / "a.db", 'CREATE TABLE prices (Symbol TEXT, "a ""price""" TEXT, at INTEGER)',
                         "CREATE TABLE log (id INTEGER PRIMARY KEY AUTOINCREMENT)",
                         "INSERT INTO prices VALUES ('btc', '4411.99', 7)")
    assert migrate(source, "--columns", "symbol,a \"price\"") == 0
    assert "1 record copied" in capsys.readouterr().out
    assert stored(there) == {b"btc": b"4411.99"}
    assert migrate(source, "--columns", "symbol,at", "--table", "prices", "--merge") == 0
    assert stored(there) == {b"btc": b"7"}
    tables = 'prices (symbol, a "price", at), log (id)'
    for options, said in (
            ([], f"no table of just the columns key and value, only: {tables} (--columns KEY,VALUE names the two"),
            (["--columns", "x,at"], f"no table with the columns x and at, only: {tables}"),
            (["--table", "none"], f"no table 'none', only: {tables}"),
            (["--table", "prices"], "table 'prices' has no columns key and value, only: symbol, a \"price\", at "
                                    "(--columns KEY,VALUE names the two to read)")):
        assert migrate(source, *options, "--merge") == 2
        assert said in capsys.readouterr().err
    assert migrate(make_dbm(tmp_path / "b", "dbm.dumb"), "--columns", "a,b", "--merge") == 2
    assert "no columns" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["a", "a,", ",b", "a,b,c"])
def test_columns_are_two(columns: str, migrate: Migrate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        migrate(tmp_path, "--columns", columns)
    assert "two columns" in capsys.readouterr().err


@pytest.mark.parametrize("columns, value, kind", [
    ("key TEXT PRIMARY KEY, value BLOB", pickle.dumps("x"), "sqlitedict"),
    ("key TEXT PRIMARY KEY, value BLOB", b"4411.99", "sqlite"), ("key TEXT PRIMARY KEY, value BLOB", "text", "sqlite"),
    ("key TEXT, value BLOB", pickle.dumps("x"), "sqlite"), ("key, value", pickle.dumps("x"), "sqlite"),
])
def test_a_plain_table_is_not_called_sqlitedict(columns: str, value: object, kind: str, tmp_path: Path,
                                                migrate: Migrate, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_sqlite(tmp_path / "a.db", f"CREATE TABLE t ({columns})", ("INSERT INTO t VALUES ('a', ?)", (value,)))
    assert migrate(source, "--json") == 0
    assert json.loads(capsys.readouterr().out)["kind"] == kind


def test_what_a_wal_holds_is_read(tmp_path: Path, migrate: Migrate, there: str) -> None:
    program = ("import os, sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute('PRAGMA journal_mode=wal');"
               "db.execute('CREATE TABLE t (key, value)'); db.execute('INSERT INTO t VALUES (1, 2)'); db.commit();"
               "os._exit(0)")
    source = tmp_path / "link.db"
    source.symlink_to("a.db")
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.db")], check=True)
    before = {name: (tmp_path / name).read_bytes() for name in ("a.db", "a.db-wal")}
    assert before["a.db-wal"]
    assert migrate(source) == 0
    assert stored(there) == {b"1": b"2"}
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


# -- what must not happen ----------------------------------------------------------------------------------


def make_hostile(path: Path, trace: Path) -> list[Path]:
    """A shelf, a sqlitedict and a cache whose keys and values write a file when they are unpickled."""
    data = pickle.dumps(Effect(os.mkdir, str(trace)))
    return [make_dbm(path / "shelf", "dbm.dumb", {b"a": data}),
            make_sqlite(path / "sqlitedict.db", "CREATE TABLE unnamed (key TEXT PRIMARY KEY, value BLOB)",
                        ("INSERT INTO unnamed VALUES ('a', ?)", (data,))),
            make_cache(path / "values", row("a", data, mode=4)),
            make_cache(path / "keys", row(data, "a", raw=0))]


def test_nothing_is_unpickled_unasked(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for number, source in enumerate(make_hostile(tmp_path, trace)):
        for codec in ([], ["--codec", "pickle"], ["--codec", "json"]):
            there = tmp_path / "-".join([f"there{number}", *codec])
            assert main(["migrate", str(source), str(there), "--skip-bad", *codec]) == 0
            assert not trace.exists()
        there = tmp_path / f"asked{number}"
        assert main(["migrate", str(source), str(there), "--skip-bad", "--no-check", "--pickle"]) == 0
        assert trace.exists()       # so the source does what it is to do
        trace.rmdir()


def files_of(path: Path) -> dict[str, tuple[bytes, int]]:
    """Contents and time of change of all files that begin with this name or lie in this directory."""
    files = [file for top in path.parent.glob(f"{path.name}*") for file in [top, *top.rglob("*")] if file.is_file()]
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


@pytest.mark.parametrize("make", [lambda path: make_dbm(path, "dbm.dumb"), make_sqlitedict, make_diskcache, make_lmdb,
                                  make_leveldb, make_logkv,
                                  lambda path: make_cache(path, row("a", "b"), row("c", pickle.dumps(1), mode=4))],
                         ids=["dbm.dumb", "sqlitedict", "diskcache", "lmdb", "leveldb", "logkv", "cache by hand"])
def test_a_source_is_not_changed(make: Callable[[Path], Path], tmp_path: Path, migrate: Migrate) -> None:
    source = make(tmp_path / "source")
    before = files_of(source)
    assert migrate(source) == 0
    after = files_of(source)
    for files in (before, after):
        files.pop(str(source / "lock.mdb"), None)       # where an LMDB's readers note themselves
    assert before and after == before


# -- bad records, errors, words ----------------------------------------------------------------------------


def make_bad(path: Path) -> Path:
    return make_sqlite(path, "CREATE TABLE t (key, value)",
                       ("INSERT INTO t VALUES ('a', '1'), ('nothing', NULL), (NULL, '2'), (?, '3'), ('1', 'one'), "
                        "(1, 'one'), ('z', '4')", ("k" * 65_536,)))


def test_a_bad_record_stops_it(tmp_path: Path, migrate: Migrate, there: str,
                               capsys: pytest.CaptureFixture[str]) -> None:
    assert migrate(make_bad(tmp_path / "a.db")) == 2
    error = capsys.readouterr().err
    assert "key 'nothing': NULL" in error and "--skip-bad" in error and error.count("\n") == 1
    assert error.endswith(f" (1 record copied before; {there} now holds 1 record)\n")
    assert stored(there) == {b"a": b"1"}


def test_bad_records_are_skipped_and_counted(tmp_path: Path, migrate: Migrate, there: str,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    assert migrate(make_bad(tmp_path / "a.db"), "--skip-bad", "--json") == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert (result["copied"], result["skipped"], result["differing"]) == (3, 4, 0)
    assert "65,535" in output.err or "65535" in output.err
    assert "key '1': a record before it has the same key" in output.err
    assert stored(there) == {b"a": b"1", b"1": b"one", b"z": b"4"}


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), "\udcff"])
def test_what_json_cannot_say_is_bad(value: object, tmp_path: Path, migrate: Migrate,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    source = make_cache(tmp_path / "cache", row("x", pickle.dumps(value), mode=4))
    assert migrate(source, "--pickle") == 2
    assert "key 'x': " in capsys.readouterr().err


@pytest.mark.parametrize("codec, good, bad", [("json", b"[1]", b"[1"), ("str", "é".encode(), b"\xff"),
                                              ("pickle", pickle.dumps(1), b"1")])
def test_values_are_checked_against_the_codec(codec: str, good: bytes, bad: bytes, tmp_path: Path, migrate: Migrate,
                                              there: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_dbm(tmp_path / "a", "dbm.dumb", {b"good": good, b"bad": bad})
    assert migrate(source, "--codec", codec, "--skip-bad") == 0
    assert "key 'bad': " in capsys.readouterr().err
    assert stored(there) == {b"good": good}
    with logkv.Reader(there, codec=codec) as reader:
        assert reader.codec == codec


def test_a_store_with_something_in_it_needs_leave(tmp_path: Path, migrate: Migrate, there: str,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    with logkv.open(there) as db:
        db.update({"btc": "old", "eth": "301.50"})
    source = make_dbm(tmp_path / "a", "dbm.dumb")
    assert migrate(source) == 2
    assert f"{there} is not empty (2 records): remove {there}, or use --merge" in capsys.readouterr().err
    assert stored(there) == {b"btc": b"old", b"eth": b"301.50"}
    assert migrate(source, "--merge") == 0
    assert stored(there) == PAIRS | {b"eth": b"301.50"}


def test_merging_keeps_the_codec_of_the_store(tmp_path: Path, migrate: Migrate, there: str) -> None:
    logkv.open(there, codec="json").close()
    assert migrate(make_dbm(tmp_path / "a", "dbm.dumb", {b"a": b"[1]"})) == 0
    assert stored(there, "json") == {b"a": [1]}


def test_a_difference_is_found(tmp_path: Path, migrate: Migrate, capsys: pytest.CaptureFixture[str]) -> None:
    """A value that is another one each time it is read."""
    source = make_dbm(tmp_path / "a", "dbm.dumb", {b"x": pickle.dumps(Effect(os.urandom, 16)), b"y": b"1"})
    assert migrate(source, "--pickle") == 1
    assert "1 DIFFER" in capsys.readouterr().out
    assert main(["migrate", str(source), str(tmp_path / "again"), "--pickle", "--no-check"]) == 0
    assert "not compared" in capsys.readouterr().out


def test_the_summary(tmp_path: Path, migrate: Migrate, there: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_cache(tmp_path / "cache", row("a", "b"), row("c", pickle.dumps(1), mode=4), row("d", "e", expires=1))
    assert migrate(source) == 0
    words = capsys.readouterr().out
    assert "2 records copied" in words and "(diskcache)" in words and "compared: all equal" in words
    assert "1 left out: expired" in words and "1 value is a pickle in the source" in words and "--codec pickle" in words


def test_interrupted(tmp_path: Path, migrate: Migrate, there: str, capsys: pytest.CaptureFixture[str]) -> None:
    interrupt = pickle.dumps(Effect(signal.raise_signal, signal.SIGINT))
    source = make_cache(tmp_path / "cache", row("a", "1"), row("b", interrupt, mode=4))
    assert migrate(source, "--pickle") == 130
    assert capsys.readouterr().err == f"logkv: interrupted (1 record copied before; {there} now holds 1 record)\n"
    assert stored(there) == {b"a": b"1"}


@pytest.mark.parametrize("module, kind", [("lmdb", "lmdb"), ("plyvel", "leveldb")])
def test_a_missing_package_is_named(module: str, kind: str, tmp_path: Path, migrate: Migrate, there: str,
                                    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert migrate(tmp_path, "--from", kind) == 2
    error = capsys.readouterr().err
    assert f"pip install {module}" in error and error.count("\n") == 1
    assert not os.path.exists(there)


def test_what_is_no_source(tmp_path: Path, migrate: Migrate, there: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.db").write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 20)
    (tmp_path / "dumb.dat").touch()
    (tmp_path / "dumb.dir").write_text("'key', (0, ")
    for name in ("text", "empty", "broken.db", "dumb", "missing"):
        assert migrate(tmp_path / name) == 2
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1
    for kind in KINDS:
        for name in ("text", "empty", "missing"):
            assert migrate(tmp_path / name, "--from", kind) == 2
            error = capsys.readouterr().err
            assert (str(tmp_path) in error or "pip install" in error) and error.count("\n") == 1
    assert not os.path.exists(there)


def test_tables_are_for_sources_that_have_some(tmp_path: Path, migrate: Migrate,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    assert migrate(make_dbm(tmp_path / "a", "dbm.dumb"), "--table", "x") == 2
    assert "no tables" in capsys.readouterr().err


def test_records_can_be_read_again(tmp_path: Path) -> None:
    with open_source(str(make_bad(tmp_path / "a.db"))) as source:
        first, second = list(source.records(None)), list(source.records(None))
    assert first == second and len(first) == source.length
    assert sum(isinstance(record, Bad) for record in first) == 2


# -- what the docs say -------------------------------------------------------------------------------------


def make_shelf(path: Path) -> Path:
    with shelve.open(str(path)) as shelf:
        shelf["ada"] = {"born": 1815}
    return path


def make_prices(path: Path) -> Path:
    return make_sqlite(path, "CREATE TABLE prices (key TEXT PRIMARY KEY, value TEXT)",
                       "INSERT INTO prices VALUES ('btc', '4411.99')")


PAGE = Path(__file__).parent.parent / "docs" / "coming-from.md"
SOURCES: dict[str, Callable[[Path], Path]] = {
    "prices": lambda path: make_dbm(path, "dbm.dumb"), "users": make_shelf, "prices.sqlite": make_prices,
    "prices.lmdb": make_lmdb, "prices.leveldb": make_leveldb,
    "cache": lambda path: make_cache(path, row("btc", pickle.dumps({"price": 4411.99}), mode=4), row("eth", "301.50"))}


@pytest.mark.parametrize("line", re.findall(r"^\$ logkv (.*)", PAGE.read_text(), re.M))
def test_the_commands_of_the_docs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = shlex.split(line)
    SOURCES[arguments[1]](tmp_path / arguments[1])
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    assert stored(arguments[2])
