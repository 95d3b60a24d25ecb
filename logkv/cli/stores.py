"""How the commands open stores: for values as they are stored, with a bar where an index must be built."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, Literal

import logkv
from logkv import files, manifest
from logkv.cli.terminal import late_progress
from logkv.codecs import as_stored


@contextmanager
def opened_to_read(path: str | os.PathLike[str]) -> Iterator[logkv.Reader[bytes]]:
    """A reader that gives values as they are stored."""
    with late_progress("index", unit="bytes") as update:
        reader = logkv.Reader(path, codec="bytes", progress=update)
    with reader:
        yield reader


def _codec_of(path: str) -> str | None:
    """The codec that a store's MANIFEST names; None also where there is no store."""
    try:
        directory = files.Directory(path)
    except logkv.NotFoundError:
        return None
    try:
        found = manifest.read(directory)
    finally:
        directory.close()
    return None if found is None else found[0].codec


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
def opened_to_write(path: str, flag: str, timeout: float, *, new_codec: str | None = None, check: bool = True,
                    compaction: Literal["auto", "manual"] = "auto") -> Iterator[logkv.Store[Any]]:
    """The store, taking and giving values as they are stored; with `check`, only those that its codec can decode.  It
    is closed at the end, and Ctrl-C waits for that.

    new_codec: of a store that this creates; one that is there must have it, if it is given.
    """
    codec = as_stored(_codec_of(path) if new_codec is None else new_codec, check=check)
    with late_progress("index", unit="bytes") as update:
        store = logkv.open(path, flag, codec=codec, timeout=timeout, compaction=compaction, progress=update)
    try:
        yield store
    finally:
        with _interrupts_wait():
            store.close()


def disk_use(path: str) -> int:
    """Bytes that a store's files take on the device."""
    with closing(files.Directory(path)) as directory:
        return sum(directory.size(name)[1] for name in directory.names())


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """For commands that write."""
    parser.add_argument("--timeout", type=float, default=0.0, metavar="S",
                        help="seconds to wait while another process writes (default: 0)")
