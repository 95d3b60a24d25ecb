"""`logkv migrate`: copies what other stores for Python hold."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import logkv
from logkv.cli import Commands
from logkv.cli.sources import KINDS, Bad, Source, open_source
from logkv.cli.stores import add_timeout, opened_to_write
from logkv.cli.terminal import counted, emit, noted, progress

STEP = 1000         # records between two words to the progress bar
SHOWN = 5           # bad records that --skip-bad shows


@dataclass(slots=True)
class _Migration:
    """A copy on its way, and what has come of it."""

    source: Source
    store: logkv.Store[Any]
    fresh: bool                                     # the store was empty: no key can be there already
    copied: int = 0
    bad: set[int] = field(default_factory=set)      # the numbers of the records that were left out
    held: int = 0                                   # records in the store, once the copying has ended

    def _records(self, title: str) -> Iterator[tuple[int, tuple[bytes, bytes] | Bad]]:
        """The source's records, numbered, with progress shown."""
        with progress(title, self.source.length) as update:
            seen = 0
            for seen, record in enumerate(self.source.records(self.store.codec), 1):
                if seen % STEP == 0:
                    update(seen)
                yield seen, record
            update(seen)

    def copy(self, skip_bad: bool) -> None:
        """Raises ValueError for the first bad record, unless they are to be skipped."""
        try:
            for number, record in self._records("copying"):
                bad = record if isinstance(record, Bad) else self._put(*record)
                if bad is None:
                    self.copied += 1
                elif skip_bad:
                    self.bad.add(number)
                    if len(self.bad) <= SHOWN:
                        print(f"logkv: skipped: {bad}", file=sys.stderr)
                else:
                    raise ValueError(f"{self.source.path}: {bad} (--skip-bad passes over what cannot be copied)")
        finally:
            self.held = len(self.store)

    def far(self) -> str:
        """How far it came."""
        return (f"{counted(self.copied, 'record')} copied before; {self.store.path} now holds "
                f"{counted(self.held, 'record')}")

    def _put(self, key: bytes, value: bytes) -> Bad | None:
        if self.fresh and key in self.store:
            return Bad(key, "a record before it has the same key")
        try:
            self.store.put(key, value)
        except ValueError as problem:       # too long
            return Bad(key, str(problem))
        return None

    def differing(self) -> int:
        """Reads the source once more: how many of the copied records are not in the store, byte for byte."""
        equal = sum(not isinstance(record, Bad) and bool(self.store.get(record[0]) == record[1])
                    for number, record in self._records("comparing") if number not in self.bad)
        return self.copied - equal


def _run(arguments: argparse.Namespace) -> int:
    migration: _Migration | None = None
    with (open_source(arguments.source, arguments.kind, arguments.table, arguments.columns, arguments.pickle) as source,
          noted(lambda: migration.far() if migration else ""),
          opened_to_write(arguments.store, "c", arguments.timeout, new_codec=arguments.codec or source.codec,
                          check=False) as store):
        if store and not arguments.merge:
            raise ValueError(f"{arguments.store} is not empty ({counted(len(store), 'record')}): remove "
                             f"{arguments.store}, or use --merge, which adds to what is there")
        migration = _Migration(source, store, fresh=not store)
        migration.copy(arguments.skip_bad)
        store.sync()
        result = {"source": arguments.source, "kind": source.kind, "store": arguments.store, "codec": store.codec,
                  "copied": migration.copied, "skipped": len(migration.bad), "expired": source.expired,
                  "pickled": source.pickles, "differing": migration.differing() if arguments.check else None}
    if arguments.json:
        emit(result)
    else:
        _tell(result, arguments.pickle)
    return 1 if result["differing"] else 0


def _tell(result: dict[str, Any], unpickled: bool) -> None:
    differing = result["differing"]
    compared = ("not compared" if differing is None else
                f"compared: {differing:,} DIFFER from the source" if differing else "compared: all equal")
    copied = counted(result["copied"], "record")
    print(f"{copied} copied from {result['source']} ({result['kind']}) to {result['store']}; {compared}")
    if result["skipped"]:
        print(f"{result['skipped']:,} skipped")
    if result["expired"]:
        print(f"{result['expired']:,} left out: expired")
    if result["pickled"]:
        if result["codec"] == "pickle":
            what = f'to read them: logkv.open({result["store"]!r}, codec="pickle")'
        elif unpickled:
            what = "unpickled"
        else:
            what = ("copied as they are: logkv.shelve reads them, and a new store with --codec pickle gives the "
                    "objects back")
        are = "value is a pickle" if result["pickled"] == 1 else "values are pickles"
        print(f"{result['pickled']:,} {are} in the source; {what}")


def _columns(text: str) -> tuple[str, str]:
    key, comma, value = text.partition(",")
    if not (key and value) or "," in value:
        raise argparse.ArgumentTypeError(f"the names of two columns are wanted, as in id,name, not {text!r}")
    return key, value


def register(commands: Commands) -> None:
    parser = commands.add(
        "migrate", _run, "copy a dbm, shelve, SQLite, diskcache, LMDB or LevelDB store",
        "Copies all records of another store into a LogKV store and compares them byte for byte. The source's kind "
        "is found out; the source is only read. Text becomes UTF-8, numbers their decimal text, bytes stay. Nothing is "
        "unpickled unless --pickle is given: pickles are copied as they are, and a new store with --codec pickle gives "
        "the objects back. The status is 1 if the comparison finds a difference.",
        "logkv migrate cache.shelf cache.db --codec pickle")
    parser.add_argument("source", metavar="SOURCE", help="a file or directory; of a dbm also the name it is opened by")
    parser.add_argument("store", metavar="STORE", help="the store's directory, new or empty")
    parser.add_argument("--from", dest="kind", choices=list(KINDS), metavar="KIND",
                        help=f"what the source is, if it is not to be found out: {', '.join(KINDS)}")
    parser.add_argument("--table", metavar="NAME", help="the table, where a file of SQLite's has several; "
                        "the named database of an LMDB")
    parser.add_argument("--columns", type=_columns, metavar="KEY,VALUE", help="the columns of an SQLite table that "
                        "have the keys and the values (default: key,value)")
    parser.add_argument("--codec", choices=["str", "json", "pickle"], help="the codec of the new store; values are "
                        "checked against it (default: none, but a LogKV store's own)")
    parser.add_argument("--pickle", action="store_true", help="unpickle: str becomes UTF-8, bytes stay, all else "
                        "becomes compact JSON; with --codec json or str, values are what that codec makes of them. "
                        "DANGER: a pickle can run any program as it is unpickled. Only for sources that you trust")
    parser.add_argument("--merge", action="store_true", help="add to a store that is not empty; records with the same "
                        "key are replaced")
    parser.add_argument("--skip-bad", action="store_true", help="pass over records that cannot be copied, and count "
                        "them")
    parser.add_argument("--no-check", dest="check", action="store_false", help="do not compare after copying")
    add_timeout(parser)
    parser.add_argument("--json", action="store_true", help="print the result as a JSON object")
