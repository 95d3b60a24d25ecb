"""What the fuzzer feeds: valid inputs made by the engine, how they are changed, and what is done with them.

A target makes the same input of the same seed and number every time, as bytes that can be kept.  What comes of it may be
an answer or one of LogKV's errors; all else is a finding, and so is an error that says that space for nonsense was asked for.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import io
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import logkv
import logkv.cli
from logkv import _core, files, manifest
from logkv.manifest import Manifest
from tests.proof.common import SEGMENT

KEYS = [b"", b"a", b"key 1", b"key 2", b"key 3", b"long", b"\xff" * 300, b"never put"]
AWKWARD = [0, 1, -1, 7, 63, 64, 65, 4096, 65535, 65536, 1 << 24, 1 << 30, (1 << 31) - 1, 1 << 32, 1 << 40, (1 << 43) - 64, 1 << 62,
           (1 << 63) - 1, (1 << 64) - 1, 1 << 64]
START = _core.SEGMENT_HEADER
HEAD = struct.Struct("<IIQQ")           # fuzz_head
MERGED, FOOTER, CLEAN, WRITE = 1, 2, 32, 64
LONGEST_SEGMENT, LONGEST_INDEX = 16 << 10, 32 << 10


class Finding(Exception):
    """Something that must not happen whatever the bytes are."""


# -- stores that are right ----------------------------------------------------------------------------------------


def fill(store: logkv.Store[bytes], rng: random.Random, rounds: int) -> None:
    for number in range(rounds):
        store[rng.choice(KEYS[:-1])] = rng.randbytes(rng.choice((0, 3, 20, 100, 300)))
        if number % 5 == 4:
            store.delete(rng.choice(KEYS))
        if number % 7 == 6:
            store.sync()


def snapshot(path: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(path).iterdir() if file.is_file()}


def stores(directory: str) -> Iterator[dict[str, bytes]]:
    """The files of some small stores, closed or in the middle of their lives."""
    path = os.path.join(directory, "seed.db")
    for number in range(6):
        rng = random.Random(number)
        shutil.rmtree(path, ignore_errors=True)
        with logkv.open(path, segment_size=SEGMENT, compaction="manual", codec="bytes") as store:
            fill(store, rng, (0, 3, 8, 20, 30, 40)[number])
            if number == 2:
                store["long"] = rng.randbytes(4500)
            if number == 3:
                store.compact()                     # a merged segment, and its successor
                yield snapshot(path)
                fill(store, rng, 3)
            if number == 4:
                store.clear()
                fill(store, rng, 5)
            if number == 5:
                store["one"] = bytes(60_000)        # the next record stands in a successor
                fill(store, rng, 6)
            store.sync()
            yield snapshot(path)                    # as after a kill
        yield snapshot(path)


def segments_of(store: dict[str, bytes]) -> Iterator[tuple[bytes, int, int]]:
    """(bytes with something in them, where the records end if it is sealed, else 0, MERGED if it is) of each segment."""
    for segment in Manifest.decode(store["MANIFEST"], "MANIFEST", writable=False).segments:
        data = store[segment.name].rstrip(b"\0")
        yield data + bytes(-len(data) % 8 + 64), segment.end or 0 if segment.sealed else 0, MERGED * segment.merged


def scan_inputs(directory: str) -> Iterator[bytes]:
    """Of the target `scan`."""
    for store in stores(directory):
        found = list(segments_of(store))
        for data, end, merged in found:
            if len(data) <= LONGEST_SEGMENT:
                yield HEAD.pack(len(data), 0, 0, merged) + data
                if end:
                    yield HEAD.pack(len(data), end, 0, merged | FOOTER) + data
        if len(found) == 1 and "index" in store and len(store["index"]) <= LONGEST_INDEX and len(found[0][0]) < LONGEST_SEGMENT:
            for what in (0, CLEAN, WRITE):
                yield HEAD.pack(len(found[0][0]), 0, 0, what) + found[0][0] + store["index"]


# -- changes ------------------------------------------------------------------------------------------------------


def awkward(rng: random.Random) -> int:
    return rng.choice(AWKWARD) if rng.random() < 0.8 else rng.getrandbits(rng.randrange(1, 65))


def change_bytes(data: bytes, rng: random.Random, most: int = 1 << 17) -> bytes:
    """Without a look at what they mean."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, size = rng.randrange(len(out) + 1), rng.choice((1, 4, 8, 64, 4096))
        match rng.randrange(6):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at:at + size] = rng.randbytes(min(size, len(out) - at))
            case 2:
                del out[at:at + size]
            case 3:
                out[at:at] = out[:size] * rng.choice((1, 2, 50))
            case 4:
                del out[at:]
            case _:
                at = at // 8 * 8
                out[at:at + 8] = (awkward(rng) & (1 << 64) - 1).to_bytes(8, "little")[:max(0, len(out) - at)]
    return bytes(out[:most])


def thing(rng: random.Random) -> object:
    """Something that JSON can say, mostly a number."""
    return awkward(rng) if rng.random() < 0.7 else rng.choice(
        [None, True, False, 0.5, 1e300, "", "x", "00" * 16, "json", [], [1, 2], {}, {"codec": 1}, [[1, 2]], 10 ** 30])


def change_json(value: Any, rng: random.Random) -> Any:
    """A copy with another thing somewhere."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        name = rng.choice(list(value))
        if rng.random() < 0.05:
            return {key: item for key, item in value.items() if key != name}
        return {**value, name: change_json(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                return value[:at] + value[at + 1:]
            case 1:
                return value[:at] + [value[at]] + value[at:]
            case _:
                return [*value[:at], change_json(value[at], rng), *value[at + 1:]]
    if type(value) is int and rng.random() < 0.3:
        return value + rng.choice((-8, -1, 1, 8))
    return thing(rng)


def manifest_bytes(body: bytes) -> bytes:
    """With a right first line."""
    return b"LogKV MANIFEST 0 %08x %d\n" % (_core.checksum(body), len(body)) + body


def change_manifest(data: bytes, rng: random.Random) -> bytes:
    head, _, body = data.partition(b"\n")
    match rng.randrange(8):
        case 0:
            return change_bytes(data, rng)
        case 1:
            words = head.split(b" ")
            words[rng.randrange(len(words))] = rng.choice([b"", b"9" * 5000, b"\xb2", b"-1", b"%d" % abs(awkward(rng))])
            return b" ".join(words) + b"\n" + body
        case 2:
            return manifest_bytes(rng.choice([b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"1e999999", b"null", b'"\\ud800"',
                                              b"\xff\xfe", b"", change_bytes(body, rng)]))
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):        # it was changed before
        return change_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        fields = change_json(fields, rng)
    return manifest_bytes(json.dumps(fields).encode())


def change_control(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2))):
        struct.pack_into("<Q", out, 8 * rng.choice((2, 3, 8, 9, 24, 25, 26, 32, 33, 34, 35, 36)), awkward(rng) & (1 << 64) - 1)
    if rng.random() < 0.8:
        crc = _core.checksum(out[:12])
        crc = _core.checksum(out[136:], _core.checksum(out[16:32], crc))
        struct.pack_into("<I", out, 12, crc)
    return bytes(out)


def change_parts(store: dict[str, bytes], name: str, rng: random.Random) -> None:
    """A segment, or the index, with checksums made anew more often than not."""
    change: Callable[[bytes, int], bytes] | None = getattr(_core, "change_input", None)     # the fuzzer's core has it
    data = store[name]
    if change is None or name == files.INDEX and len(data) > LONGEST_INDEX:
        store[name] = change_bytes(data, rng)
        return
    segment, index = (b"", data) if name == files.INDEX else (data[:LONGEST_SEGMENT].rstrip(b"\0"), b"")
    segment += bytes(-len(segment) % 8)
    out = change(HEAD.pack(len(segment), 0, 0, 0) + segment + index, rng.getrandbits(64))
    size = HEAD.unpack_from(out)[0]
    changed = out[HEAD.size + size:] if index else out[HEAD.size:HEAD.size + size]
    store[name] = changed + bytes(max(0, len(data) - len(changed))) if rng.random() < 0.9 else changed


# -- targets ------------------------------------------------------------------------------------------------------


def check(problem: BaseException) -> None:
    """Raises Finding for what no bytes may lead to."""
    if not isinstance(problem, logkv.Error):
        raise Finding(f"{type(problem).__name__}: {problem}") from problem
    if problem.errno in (errno.ENOMEM, errno.EFBIG, errno.ENOSPC):
        raise Finding(f"too much was asked for: {problem}") from problem


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file is written beyond so many bytes: that is an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Target:
    """Makes inputs, and runs them; in a directory of its own."""

    def __init__(self, directory: str, seed: int) -> None:
        self.directory = directory
        self.seed = seed

    def make(self, number: int) -> bytes:
        raise NotImplementedError

    def run(self, data: bytes) -> None:
        """Raises what is a finding."""
        raise NotImplementedError

    def dice(self, number: int) -> random.Random:
        return random.Random(f"{self.seed} {number}")


class Scan(Target):
    """The parser, scan and index, below the engine: `fuzz_scan.pxi`, in batches."""

    def __init__(self, directory: str, seed: int) -> None:
        super().__init__(directory, seed)
        core: Any = _core
        if not hasattr(core, "Fuzz"):
            raise RuntimeError("the target `scan` needs the core that is built for the fuzzer")
        self.core = core.Fuzz(KEYS)
        self.seeds = [data for data in scan_inputs(directory) if core.add_seed(data)]

    def make(self, number: int) -> bytes:
        data: bytes = self.core.make(self.seed, number)
        return data

    def run(self, data: bytes) -> None:
        self.core.run_input(data)

    def run_batch(self, first: int, count: int, progress: memoryview) -> None:
        self.core.run(self.seed, first, count, progress)


class Manifests(Target):
    """Decoding of a MANIFEST; what is accepted can be written and read again."""

    def __init__(self, directory: str, seed: int) -> None:
        super().__init__(directory, seed)
        self.stores = list(stores(directory))

    def make(self, number: int) -> bytes:
        dice = self.dice(number)
        return change_manifest(dice.choice(self.stores)[files.MANIFEST], dice)

    def run(self, data: bytes) -> None:
        try:
            found = Manifest.decode(data, "MANIFEST", writable=True)
        except Exception as problem:
            check(problem)
            return
        if Manifest.decode(found.encode(), "MANIFEST", writable=True) != found:
            raise Finding("a MANIFEST is not what was written")


class Open(Target):
    """Any of a store's files, any bytes: opened, read, iterated, written to, verified."""

    SPARSE: ClassVar[int] = 1 << 36         # bytes that a file is lengthened to which has no blocks for them
    MOST_BYTES: ClassVar[int] = 1 << 28     # that a file may be written to

    def __init__(self, directory: str, seed: int) -> None:
        super().__init__(directory, seed)
        self.path = os.path.join(directory, "fuzz.db")
        self.stores = list(stores(directory))

    def make(self, number: int) -> bytes:
        dice = self.dice(number)
        store = dict(dice.choice(self.stores))
        options = {"flag": dice.choice("rw"), "vouch": dice.random() < 0.5, "sparse": ""}
        for _ in range(dice.choice((1, 1, 1, 2, 3))):
            name = dice.choice(list(store))
            kind = dice.randrange(20)
            if kind == 0:
                options["sparse"] = name
            elif kind == 1 and name != files.MANIFEST and len(store) > 2:
                del store[name]
            elif kind == 2:
                store[name] = dice.choice(list(store.values()))
            elif kind <= 5 or not store[name]:
                store[name] = change_bytes(store[name], dice)
            elif name == files.MANIFEST:
                store[name] = change_manifest(store[name], dice)
            elif name == files.CONTROL and len(store[name]) == _core.PAGE:
                store[name] = change_control(store[name], dice)
            else:
                change_parts(store, name, dice)
        packed = {name: base64.b64encode(data).decode() for name, data in store.items()}
        return json.dumps({**options, "files": packed}).encode()

    def run(self, data: bytes) -> None:
        fields = json.loads(data)
        shutil.rmtree(self.path, ignore_errors=True)
        os.mkdir(self.path)
        for name, text in fields["files"].items():
            Path(self.path, name).write_bytes(base64.b64decode(text))
        if fields["sparse"] in fields["files"]:
            os.truncate(os.path.join(self.path, fields["sparse"]), self.SPARSE)
        if fields["vouch"]:
            self.vouch()
        with file_limit(self.MOST_BYTES):
            self.use(fields["flag"])

    def vouch(self) -> None:
        """Makes the control page believe that these are the files it knows, as after a kill."""
        control = Path(self.path, files.CONTROL)
        if not control.exists() or control.stat().st_size != _core.PAGE:
            return
        out = bytearray(control.read_bytes())
        status = os.stat(control)
        struct.pack_into("<16sQQ", out, 32, files.boot_id(), status.st_dev, status.st_ino)
        with contextlib.suppress(OSError):
            struct.pack_into("<Q", out, 64, os.stat(os.path.join(self.path, files.INDEX)).st_ino)
        with contextlib.suppress(OSError, logkv.Error):
            found = manifest.read(files.Directory(self.path))
            if found is not None:
                instance = found[1]
                struct.pack_into("<QQQQ", out, 72, instance.generation, instance.inode, instance.ctime, instance.ctime)
        with open(control, "r+b") as file:
            file.write(out)

    def use(self, flag: str) -> None:
        self.attempt(lambda: self.open_and_use(flag))
        self.attempt(lambda: logkv.verify(self.path))
        self.attempt(lambda: self.open_and_use("r"))

    @staticmethod
    def attempt(call: Callable[[], object]) -> object:
        """What a call returns; None if it raised one of LogKV's errors."""
        try:
            return call()
        except Finding:
            raise
        except Exception as problem:
            check(problem)
            return None

    def open_and_use(self, flag: str) -> None:
        with logkv.open(self.path, flag, segment_size=SEGMENT, compaction="manual", codec="bytes") as store:
            for key in KEYS:
                self.attempt(lambda key=key: store.get(key))                        # type: ignore[misc]
                self.attempt(lambda key=key: key in store)                          # type: ignore[misc]
            self.attempt(lambda: len(store))
            self.attempt(lambda: list(islice(store.items(), 10_000)))
            self.attempt(store.stats)
            if flag == "w":
                for number in range(70):
                    self.attempt(lambda: store.put(b"%d" % number, b"v"))           # noqa: B023
                self.attempt(lambda: store.delete(KEYS[1]))
                self.attempt(store.sync)
                self.attempt(store.compact)


class Repair(Open):
    """As `Open`, but repaired first, twice; what is there then is read."""

    def use(self, flag: str) -> None:
        repair: Callable[[str], object] = logkv.repair       # type: ignore[attr-defined]
        self.attempt(lambda: repair(self.path))
        self.attempt(lambda: repair(self.path))
        self.attempt(lambda: logkv.verify(self.path))
        self.attempt(lambda: self.open_and_use(flag))


class Import(Target):
    """`logkv import` of any bytes."""

    LINES: ClassVar[list[bytes]] = [
        b"time,close,volume\n09:00,4411.99,1\n09:01,4412.50,2\n", b'a,b,c\r\n1,"x, ""y""\nz",3\r\n,,\r\n', b"time\n1\n2\n",
        b'{"key": "a", "value": "b"}\n{"key_b64": "AA==", "value_b64": "//8="}\n', b'{"time": 1, "close": [1, {"a": null}]}\n' * 3,
        b'\xef\xbb\xbf{"time": "x", "close": "\\ud800", "a": 1e999}\n', b"a;b\n1;2\n3\n", b'[' * 2000 + b"\n", b"\0\n\xff\xfe\n",
        b'{"time": ' + b"9" * 5000 + b"}\n", b'{"time": ' + b"[" * 30_000 + b"\n",
    ]
    PIECES: ClassVar[list[bytes]] = [b",", b"\n", b"\r", b"\r\n", b'"', b'""', b"{", b"}", b"[", b":", b"\\u", b"\\ud8", b"null",
                                     b"NaN", b"-", b"1e9999", b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x1a", b'"key": "a"']
    OPTIONS: ClassVar[list[list[str]]] = [
        [], ["--key", "time"], ["--key", "a"], ["--key", "time", "--value", "close"], ["--key", "time", "--key", "close"],
        ["--format", "csv", "--key", "a"], ["--format", "jsonl", "--key", "time", "--prefix", "p/"], ["--format", "jsonl"],
        ["--key", "a", "--delimiter", ";", "--format", "csv"], ["--key", "time", "--codec", "json"],
        ["--key", "time", "--codec", "str", "--value", "close"],
    ]

    def make(self, number: int) -> bytes:
        dice = self.dice(number)
        data = b"".join(dice.choices(self.LINES, k=dice.choice((1, 1, 2))))
        for _ in range(dice.choice((1, 2, 4))):
            at = dice.randrange(len(data) + 1)
            data = data[:at] + dice.choice(self.PIECES) * dice.choice((1, 1, 1, 2, 3000)) + data[at:]
        data = change_bytes(data, dice) if dice.random() < 0.7 else data
        options = dice.choice(self.OPTIONS) + dice.choice([[], ["--skip-bad"], ["--skip-bad", "--json"]])
        return json.dumps(options).encode() + b"\n" + data

    def run(self, data: bytes) -> None:
        options, _, rows = data.partition(b"\n")
        path, file = os.path.join(self.directory, "fuzz.db"), os.path.join(self.directory, "rows")
        shutil.rmtree(path, ignore_errors=True)
        Path(file).write_bytes(rows)
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                status = logkv.cli.main(["import", path, file, *json.loads(options)])
            except SystemExit as ending:
                raise Finding(f"it ended with {ending}: {said.getvalue()[-300:]}") from None
            except Exception as problem:
                raise Finding(f"{type(problem).__name__}: {problem}") from problem
        if status not in (0, 2):
            raise Finding(f"its status is {status}: {said.getvalue()[-300:]}")
        if os.path.exists(path) and not logkv.verify(path).ok:
            raise Finding("the store is damaged")


TARGETS: dict[str, type[Target]] = {
    "scan": Scan, "manifest": Manifests, "open": Open, "repair": Repair, "import": Import,
}
