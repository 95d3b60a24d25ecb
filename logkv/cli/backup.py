"""`logkv backup`: a copy of a store that may be in use."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

import logkv
from logkv.cli import Commands
from logkv.cli.stores import opened_to_read
from logkv.cli.terminal import counted, emit, explain, progress, size, table


def _backup(arguments: argparse.Namespace) -> int:
    try:
        with opened_to_read(arguments.store) as reader, progress("backup", unit="bytes") as update:
            made = reader.backup(arguments.dest, links=not arguments.copy, progress=update)
    except logkv.CorruptionError as problem:
        print(f"logkv: {explain(problem)}", file=sys.stderr)
        return 1
    if arguments.json:
        emit(asdict(made))
        return 0
    print(f"{made.path} holds {counted(made.keys, 'key')}")
    table(["", "segments", "bytes"], [
        ("linked", made.linked, size(made.linked_bytes)),
        ("copied", made.copied, size(made.copied_bytes)),
        ("kept", made.kept, size(made.kept_bytes)),
    ])
    return 0


def register(commands: Commands) -> None:
    backup = commands.add("backup", _backup, "copy a store that may be in use",
                          "Copies a store, as it is at one moment, to another directory, which is a store then: to "
                          "restore it, open it, or a copy of it. Nobody who reads or writes is stopped. Files that "
                          "never change any more get a second name where the file system allows it. If DEST is an "
                          "earlier backup of the same store, only what is new is added, and it stays whole until all "
                          "is there. What was copied is read back and checked; the status is 1 if it is damaged.",
                          "logkv backup prices.db prices.backup")
    backup.add_argument("store", metavar="STORE", help="the store's directory")
    backup.add_argument("dest", metavar="DEST",
                        help="the backup's directory: missing, empty, or an earlier backup of STORE")
    backup.add_argument("--copy", action="store_true", help="copy all files: links share their bytes with the store")
    backup.add_argument("--json", action="store_true", help="print a JSON object")
