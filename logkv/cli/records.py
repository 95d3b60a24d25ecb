"""`logkv get`, `put`, `delete`: one record."""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys

from logkv.cli import Commands
from logkv.cli.stores import add_timeout, opened_to_read, opened_to_write
from logkv.cli.terminal import emit


def as_json(name: str, content: bytes) -> dict[str, str]:
    """Bytes as a member of a JSON object: text under `name`, what is not UTF-8 under `name_b64`."""
    try:
        return {name: content.decode()}
    except UnicodeDecodeError:
        return {f"{name}_b64": base64.b64encode(content).decode()}


def _missing(arguments: argparse.Namespace) -> int:
    print(f"logkv: there is no key {arguments.key!r} in {arguments.store}", file=sys.stderr)
    return 1


def _get(arguments: argparse.Namespace) -> int:
    key = os.fsencode(arguments.key)
    with opened_to_read(arguments.store) as reader:
        value = reader.get(key)
    if value is None:
        return _missing(arguments)
    if arguments.json:
        emit(as_json("key", key) | as_json("value", value))
    else:
        sys.stdout.buffer.write(value)
        if sys.stdout.isatty():
            sys.stdout.buffer.write(b"\n")
    return 0


def _put(arguments: argparse.Namespace) -> int:
    value = sys.stdin.buffer.read() if arguments.value == "-" else os.fsencode(arguments.value)
    with opened_to_write(arguments.store, "c", arguments.timeout) as store:
        try:
            version = store.put(os.fsencode(arguments.key), value)
        except (UnicodeDecodeError, json.JSONDecodeError) as problem:
            raise ValueError(f"the value is not right for codec {store.codec!r}: {problem}") from None
    if arguments.json:
        emit({"version": version})
    return 0


def _delete(arguments: argparse.Namespace) -> int:
    with opened_to_write(arguments.store, "w", arguments.timeout, check=False) as store:
        found = store.delete(os.fsencode(arguments.key))
    if arguments.json:
        emit({"deleted": found})
        return 0 if found else 1
    return 0 if found else _missing(arguments)


def register(commands: Commands) -> None:
    get = commands.add("get", _get, "print a key's value",
                       "Prints the value of a key as it is stored, byte for byte; on a terminal a newline follows. "
                       "The status is 1 if the key is missing.", "logkv get prices.db btc")
    put = commands.add("put", _put, "store a value under a key",
                       "Stores a value under a key, in the place of what was there. The store is created if it is "
                       "missing. When the command ends, the value is on the device.", "logkv put prices.db btc 4411.99")
    delete = commands.add("delete", _delete, "remove a key",
                          "Removes a key and its value. The status is 1 if the key is missing.",
                          "logkv delete prices.db btc")
    for parser in (get, put, delete):
        parser.add_argument("store", metavar="STORE", help="the store's directory")
        parser.add_argument("key", metavar="KEY", help="the key")
    put.add_argument("value", metavar="VALUE", help="the value; - reads it from standard input")
    for parser in (put, delete):
        add_timeout(parser)
    get.add_argument("--json", action="store_true", help="print key and value as a JSON object")
    put.add_argument("--json", action="store_true", help='print the version that the record got: {"version": ...}')
    delete.add_argument("--json", action="store_true", help='print whether the key was there: {"deleted": ...}')
