"""`logkv get`, `put`, `delete`: one record."""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import logkv
from logkv.cli import Commands
from logkv.cli.terminal import emit


def as_json(name: str, content: bytes) -> dict[str, str]:
    """Bytes as a member of a JSON object: text under `name`, what is not UTF-8 under `name_b64`."""
    try:
        return {name: content.decode()}
    except UnicodeDecodeError:
        return {f"{name}_b64": base64.b64encode(content).decode()}


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C in the block raises KeyboardInterrupt at its end; a second one does so at once."""
    came = False

    def note(number: int, frame: object) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    if (threading.current_thread() is not threading.main_thread()
            or signal.getsignal(signal.SIGINT) is not signal.default_int_handler):
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


@contextmanager
def opened_to_write(path: str, flag: str, timeout: float, *, new_codec: str | None = None,
                    check: bool = True) -> Iterator[logkv.Store[Any]]:
    """The store, taking and giving values as they are stored; with `check`, only those that its codec can decode.  It
    is closed at the end, and Ctrl-C waits for that.

    new_codec: of a store that this creates; one that is there must have it, if it is given.
    """
    from logkv.codecs import as_stored
    codec = new_codec
    try:
        with logkv.Reader(path, codec="bytes") as reader:
            if new_codec is None:
                codec = reader.codec
    except logkv.NotFoundError:
        pass            # `flag` decides
    store = logkv.open(path, flag, codec=as_stored(codec, check=check), timeout=timeout)
    try:
        yield store
    finally:
        with _interrupts_wait():
            store.close()


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """For commands that write."""
    parser.add_argument("--timeout", type=float, default=0.0, metavar="S",
                        help="seconds to wait while another process writes (default: 0)")


def _missing(arguments: argparse.Namespace) -> int:
    print(f"logkv: there is no key {arguments.key!r} in {arguments.store}", file=sys.stderr)
    return 1


def _get(arguments: argparse.Namespace) -> int:
    key = os.fsencode(arguments.key)
    with logkv.Reader(arguments.store, codec="bytes") as reader:
        value: bytes | None = reader.get(key)
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
