"""`logkv import` and `export`: CSV and JSON Lines into a store, and a store as JSON Lines."""

from __future__ import annotations

import argparse
import base64
import csv
import gc
import io
import json
import os
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import chain, islice, repeat
from json.encoder import encode_basestring as quote
from typing import Any, BinaryIO, NamedTuple

import logkv
from logkv.cli import Commands
from logkv.cli.records import as_json
from logkv.cli.stores import add_timeout, opened_to_read, opened_to_write
from logkv.cli.terminal import Update, counted, emit, explain, noted, progress

BLOCK = 64 << 10        # bytes that are read at once; what they hold is stored and acknowledged together
CHUNK = 1_000           # pairs that are written at once
SHOWN = 5               # bad lines that --skip-bad shows
FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
BOM = b"\xef\xbb\xbf"
SPECIAL = bytes(range(32)).replace(b"\n", b"") + b'"\\'       # what CSV or JSON must quote

Text = bytes | str
Pair = tuple[Text, Text]
Columns = tuple[Iterable[Text], Iterable[Text]]         # keys and their values
Put = Callable[[Text, Text], int]


class Choice(NamedTuple):
    """What of a row is stored."""

    keys: Sequence[str]         # columns
    value: str | None           # column; None: all of them
    separator: str
    prefix: str
    delimiter: str              # of CSV


# -- what comes in --------------------------------------------------------------------------------------


class Input:
    """A file or a pipe, in blocks of whole lines, as soon as they are there."""

    def __init__(self, file: io.FileIO, name: str) -> None:
        self._file = file
        self._parts: list[bytes] = []       # of a line that has begun
        self.name = name
        self.done = 0                       # bytes that were read
        status = os.fstat(file.fileno())
        self.size = status.st_size if stat.S_ISREG(status.st_mode) else None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        while block := self._file.read(BLOCK):
            self.done += len(block)
            end = block.rfind(b"\n") + 1
            if end:
                whole = b"".join([*self._parts, block[:end]])
                self._parts = [block[end:]]
                return whole
            self._parts.append(block)
        rest = b"".join(self._parts)
        self._parts = []
        if not rest:
            raise StopIteration
        return rest + b"\n"


@contextmanager
def _opened(path: str) -> Iterator[Input]:
    if path == "-":
        yield Input(io.FileIO(sys.stdin.fileno(), closefd=False), "<stdin>")
    else:
        with io.FileIO(path) as file:
            yield Input(file, path)


def _text(block: bytes) -> str:
    """What is not UTF-8 becomes surrogates, which no store takes: only the lines that have them are bad."""
    return block.decode("utf-8", "surrogateescape")


class BadLine(ValueError):
    """A line that cannot be stored, and why."""


def _why(problem: Exception) -> str:
    if isinstance(problem, UnicodeEncodeError):
        code = ord(problem.object[problem.start])
        found = f"byte 0x{code - 0xdc00:02x}" if 0xdc80 <= code <= 0xdcff else f"half a character, \\u{code:04x}"
        return f"expected UTF-8, found {found}"
    if isinstance(problem, json.JSONDecodeError):
        return f"expected JSON, {_no_json(problem)}"
    return "expected JSON, found it nested too deeply" if isinstance(problem, RecursionError) else explain(problem)


def _no_json(problem: json.JSONDecodeError) -> str:
    return f"found something else at column {problem.colno} ({problem.msg})"


class Loader:
    """Puts rows, counts them, and says so."""

    def __init__(self, name: str, skip_bad: bool) -> None:
        self._put: Put
        self._say: Callable[[int], None]
        self._name = name
        self._skip_bad = skip_bad
        self._said = 0
        self.stored = 0
        self.bad = 0
        self.shown: list[str] = []      # the first bad lines

    def begin(self, put: Put, say: Callable[[int], None]) -> None:
        """say: is told now and then how many rows are stored."""
        self._put, self._say = put, say

    def put_all(self, columns: Callable[[], Columns]) -> int:
        """Puts rows until one is bad, which is for `put_one` to find; how many were put."""
        versions: list[int] = []
        try:
            versions.extend(map(self._put, *columns()))        # an exception leaves what came before it
        except (ValueError, RecursionError):
            pass
        finally:
            self.stored += len(versions)
        return len(versions)

    def put_one(self, line: int, pair: Callable[[Any], Pair], row: object) -> None:
        """Puts a row, or rejects it."""
        try:
            self._put(*pair(row))
            self.stored += 1
        except (ValueError, RecursionError) as problem:
            self.reject(line, problem)

    def reject(self, line: int, problem: Exception) -> None:
        """Counts a bad line, or raises BadLine."""
        message = f"{self._name}:{line}: {_why(problem)}"
        if not self._skip_bad:
            raise BadLine(message) from None
        self.bad += 1
        if len(self.shown) < SHOWN:
            self.shown.append(message)

    def acknowledge(self) -> None:
        """What was put is said."""
        if self.stored > self._said:
            self._said = self.stored
            self._say(self.stored)


# -- CSV ------------------------------------------------------------------------------------------------


class CsvShape:
    """How the fields of CSV rows become keys and values.  They are handled in columns: then no line of Python runs for
    each row."""

    def __init__(self, header: Sequence[str], choice: Choice) -> None:
        keys, value = choice.keys, choice.value
        for name in [*keys, value] if value is not None else [*keys, *header]:
            if name not in header:
                raise ValueError(f"there is no column {name!r}, only {', '.join(map(repr, header))}")
            if header.count(name) > 1:
                raise ValueError(f"the header names column {name!r} more than once")
        self.width = len(header)
        self._keys = [header.index(name) for name in keys]
        self._value = None if value is None else header.index(value)
        self._separator = choice.separator
        self._prefix = choice.prefix
        self._before = [("," if column else "{") + quote(name) + ":" for column, name in enumerate(header)]

    def columns(self, fields: Sequence[Sequence[str]], plain: bool) -> Columns:
        """The keys and values of rows whose columns are given; `plain`: JSON has nothing to escape in them."""
        chosen = [fields[column] for column in self._keys]
        if not any(map(all, chosen)) and not all(map(any, zip(*chosen))):       # the first is quick and mostly enough
            raise BadLine("expected a key, found an empty field")
        keys: Iterable[str] = chosen[0] if len(chosen) == 1 else map(self._separator.join, zip(*chosen))
        if self._prefix:
            keys = map(self._prefix.__add__, keys)
        return keys, fields[self._value] if self._value is not None else self._objects(fields, plain)

    def _objects(self, fields: Sequence[Iterable[str]], plain: bool) -> Iterable[str]:
        mark = '"' if plain else ""
        pieces: list[Iterable[str]] = []
        for before, texts in zip(self._before, fields, strict=True):
            pieces += repeat(f"{mark if pieces else ''}{before}{mark}"), texts if plain else map(quote, texts)
        return map("".join, zip(*pieces, repeat(mark + "}")))

    def of_rows(self, rows: Sequence[Sequence[str]]) -> Columns:
        """The keys and values of rows.  Raises ValueError if they do not have as many fields as the header."""
        fields = list(zip(*rows, strict=True))
        if len(fields) != self.width:
            raise BadLine(f"expected {self.width} columns, found {len(fields)}")
        return self.columns(fields, False)

    def pair(self, row: Sequence[str]) -> Pair:
        """The key and the value of one row.  Raises BadLine."""
        [key], [value] = self.of_rows([row])
        return key, value


def _csv_problem(message: str) -> str:
    """What `csv` found, in our words."""
    if message.startswith("unexpected end"):
        return "expected a closing quote, found the end of the file"
    if message.startswith("new-line"):
        return "expected a quoted field, found a carriage return in one that is not"
    return f"not CSV: {message}"


class Csv:
    """A CSV file.  Blocks in which nothing is quoted are split at delimiters and line ends; `csv` reads the others."""

    def __init__(self, blocks: Iterator[bytes], name: str, choice: Choice) -> None:
        """Reads the header.  Raises ValueError if it is bad."""
        csv.field_size_limit(sys.maxsize)
        self._blocks = blocks
        self._delimiter = choice.delimiter
        self._special = SPECIAL.replace(choice.delimiter.encode("utf-8", "surrogateescape"), b"")
        self._lines: deque[str] = deque()               # that were read and not parsed
        self._rows: list[tuple[int, list[str]]] = []    # that were parsed and not put, and the lines where they begin
        reader = self._reader(None)
        try:
            header = next(reader, None)
            if not header:
                raise BadLine("expected a header, found nothing")
            self._shape = CsvShape(header, choice)
        except csv.Error as problem:
            raise ValueError(f"{name}:1: {_csv_problem(str(problem))}") from None
        except ValueError as problem:
            raise ValueError(f"{name}:1: {problem}") from None
        self._line = 1 + reader.line_num        # the next one's number

    def load(self, loader: Loader) -> None:
        """Puts all rows."""
        self._parse(loader)
        loader.acknowledge()
        for block in self._blocks:
            self._load_block(block, loader)
            loader.acknowledge()

    def _load_block(self, block: bytes, loader: Loader) -> None:
        rest = _text(block)
        fields = self._split(block)
        if fields is not None:
            done = loader.put_all(lambda: self._shape.columns(fields, True))
            self._line += done
            rest = rest.split("\n", done)[done]
        self._lines.extend(io.StringIO(rest, newline="\n"))
        self._parse(loader)

    def _split(self, block: bytes) -> list[list[str]] | None:
        """The columns of a block, if nothing in it is quoted and all lines have as many fields as the header."""
        width = self._shape.width
        block = block.replace(b"\r\n", b"\n")
        if width == 1 or len(block.translate(None, self._special)) != len(block):
            return None
        fields = _text(block).replace("\n", "\n" + self._delimiter).split(self._delimiter)
        fields.pop()
        columns = [fields[column::width] for column in range(width)]
        last = "".join(columns[-1]).split("\n")         # every line end is in the last column: then all have one
        last.pop()
        if len(last) * width != len(fields) or len(last) != block.count(b"\n"):
            return None
        columns[-1] = last
        return columns

    def _parse(self, loader: Loader) -> None:
        """Puts the rows of the lines that were read; if the last row goes on behind them, more is read."""
        reader = self._reader(loader)
        while self._lines:
            line = self._line + reader.line_num
            try:
                if row := next(reader):
                    self._rows.append((line, row))
            except csv.Error as problem:
                self._put_rows(loader)
                loader.reject(line, BadLine(_csv_problem(str(problem))))
        self._put_rows(loader)
        self._line += reader.line_num

    def _reader(self, loader: Loader | None) -> Any:
        return csv.reader(self._more_lines(loader), strict=True, delimiter=self._delimiter)

    def _more_lines(self, loader: Loader | None) -> Iterator[str]:
        """Lines for `csv`.  It asks for one when all rows before are whole: these are put before more is awaited."""
        while True:
            while self._lines:
                yield self._lines.popleft()
            if loader is not None:
                self._put_rows(loader)
                loader.acknowledge()
            block = next(self._blocks, None)
            if block is None:
                return
            self._lines.extend(io.StringIO(_text(block), newline="\n"))

    def _put_rows(self, loader: Loader) -> None:
        rows, self._rows = self._rows, []
        done = loader.put_all(lambda: self._shape.of_rows([row for _, row in rows]))
        for line, row in rows[done:]:
            loader.put_one(line, self._shape.pair, row)


# -- JSON Lines -----------------------------------------------------------------------------------------


class JsonLines:
    """An object on each line."""

    def __init__(self, blocks: Iterator[bytes], pair: Callable[[str], Pair]) -> None:
        self._blocks = blocks
        self._pair = pair

    def load(self, loader: Loader) -> None:
        """Puts all rows."""
        number = 0
        for block in self._blocks:
            for number, line in enumerate(_text(block).split("\n")[:-1], number + 1):
                if line and not line.isspace():
                    loader.put_one(number, self._pair, line)
            loader.acknowledge()


def _object(decode: Callable[[str], Any], line: str) -> dict[str, Any]:
    """What a line says.  Raises BadLine if that is no object."""
    try:
        thing = decode(line)
    except json.JSONDecodeError as problem:
        raise BadLine(f"expected one JSON object on each line, {_no_json(problem)}") from None
    if not isinstance(thing, dict):
        raise BadLine(f"expected one JSON object on each line, found {shortened(line)}")
    return thing


def exported(line: str) -> Pair:
    """The pair of a line that `export` wrote.  Raises ValueError."""
    thing = _object(json.loads, line)
    if len(thing) == 2:
        key, value = _exported(thing, "key"), _exported(thing, "value")
        if key is not None and value is not None:
            return key, value
    raise BadLine('expected {"key": TEXT, "value": TEXT}, as `logkv export` writes it (for others there is --key), '
                  f"found {shortened(line)}")


def _exported(thing: dict[str, Any], name: str) -> Text | None:
    text = thing.get(name)
    if isinstance(text, str):
        return text
    coded = thing.get(f"{name}_b64")
    if not isinstance(coded, str):
        return None
    return base64.b64decode(coded, validate=True)


class JsonShape:
    """How objects become keys and values.  Numbers stay as they stand, to the last digit."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._decode = json.JSONDecoder(parse_int=_Number, parse_float=_Number, parse_constant=_refuse).decode

    def pair(self, line: str) -> Pair:
        """The key and the value of one object.  Raises ValueError."""
        choice, thing = self._choice, _object(self._decode, line)
        key = choice.prefix + choice.separator.join([_field(thing, name) for name in choice.keys])
        return key, compact(thing) if choice.value is None else _field(thing, choice.value)


class _Number(str):
    """A number's text."""


def _refuse(constant: str) -> None:
    raise BadLine(f"expected JSON, found {constant}")


def _field(thing: dict[str, Any], name: str) -> str:
    content = thing.get(name)
    if content is None:
        raise BadLine(f"expected a value for {name!r}, found {'null' if name in thing else 'none'}")
    return content if isinstance(content, str) else compact(content)


def compact(thing: Any) -> str:
    """JSON without blanks."""
    if isinstance(thing, _Number):
        return thing
    if isinstance(thing, str):
        return quote(thing)
    if isinstance(thing, dict):
        return "{" + ",".join([f"{quote(name)}:{compact(content)}" for name, content in thing.items()]) + "}"
    if isinstance(thing, list):
        return "[" + ",".join(map(compact, thing)) + "]"
    return "null" if thing is None else "true" if thing else "false"


def shortened(text: str) -> str:
    """The beginning of a line, to show it."""
    return text if len(text) <= 60 else text[:60] + "..."


# -- import ---------------------------------------------------------------------------------------------


def _source(first: bytes, lines: Input, arguments: argparse.Namespace) -> Csv | JsonLines:
    choice = Choice(arguments.key, arguments.value, arguments.separator, arguments.prefix, arguments.delimiter or ",")
    blocks = chain([first] if first else [], lines)
    if _format(first, arguments) == "csv":
        if not choice.keys:
            raise ValueError("CSV needs --key COLUMN: the column that has the keys")
        return Csv(blocks, lines.name, choice)
    if arguments.delimiter:
        raise ValueError(f"--delimiter is for CSV, and {lines.name} is JSON Lines (--format says what a file is)")
    if choice.keys:
        return JsonLines(blocks, JsonShape(choice).pair)
    if choice.value is not None or choice.prefix:
        raise ValueError("--value and --prefix need --key")
    return JsonLines(blocks, exported)


def _format(first: bytes, arguments: argparse.Namespace) -> str:
    """As it is asked for, as the file's name ends, or as the first byte looks."""
    named: str | None = arguments.format or FORMATS.get(os.path.splitext(arguments.file)[1].lower())
    return named or ("csv" if first and not first.lstrip().startswith(b"{") else "jsonl")


@contextmanager
def _without_gc() -> Iterator[None]:
    """Rows make no cycles; looking for them in every thousand took half of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _import(arguments: argparse.Namespace) -> int:
    with _opened(arguments.file) as lines:
        source = _source(next(lines, b"").removeprefix(BOM), lines, arguments)
        loader = Loader(lines.name, arguments.skip_bad)
        with (noted(lambda: f"{counted(loader.stored, 'row')} stored before"), _ended_early(loader, arguments.json),
              opened_to_write(arguments.store, "c", arguments.timeout, new_codec=arguments.codec) as store):
            _load(source, lines, store, loader, arguments)
    for message in loader.shown:
        print(f"logkv: {message}", file=sys.stderr)
    if loader.bad > len(loader.shown):
        print("logkv:", counted(loader.bad - len(loader.shown), "more bad line"), file=sys.stderr)
    if arguments.json:
        emit({"stored": loader.stored, "bad": loader.bad})
    else:
        skipped = f", {counted(loader.bad, 'bad line')} skipped" if loader.bad else ""
        print(f"{counted(loader.stored, 'row')} stored{skipped}")
    return 0


@contextmanager
def _ended_early(loader: Loader, as_json: bool) -> Iterator[None]:
    """An error has its line among those that programs watch."""
    try:
        yield
    except BaseException as problem:
        if as_json:
            with suppress(OSError):         # nobody reads it; the problem is told all the same
                emit({"stored": loader.stored, "bad": loader.bad, "error": explain(problem)})
        raise


def _load(source: Csv | JsonLines, lines: Input, store: logkv.Store[Any], loader: Loader,
          arguments: argparse.Namespace) -> None:
    def say(stored: int) -> None:
        update(stored if lines.size is None else lines.done)
        if arguments.json:
            emit({"acked": stored})

    loader.begin(store.put, say)
    unit = "records" if lines.size is None else "bytes"
    with progress("import", lines.size, unit=unit, show=_show(arguments.json)) as update, _without_gc():
        source.load(loader)
        loader.acknowledge()


def _show(is_written: bool) -> bool | None:
    """No bar where lines are written to the same terminal."""
    return False if is_written and sys.stdout.isatty() else None


# -- export ---------------------------------------------------------------------------------------------


def _lines(pairs: Sequence[tuple[bytes, bytes]]) -> str:
    try:
        return "".join([f'{{"key": {quote(key.decode())}, "value": {quote(value.decode())}}}\n'
                        for key, value in pairs])
    except UnicodeDecodeError:
        return "".join([json.dumps(as_json("key", key) | as_json("value", value), ensure_ascii=False) + "\n"
                        for key, value in pairs])


def _write(reader: logkv.Reader[bytes], file: BinaryIO, update: Update) -> int:
    pairs, done = iter(reader.items()), 0
    while some := list(islice(pairs, CHUNK)):
        file.write(_lines(some).encode())
        done += len(some)
        update(done)
    return done


@contextmanager
def _replaced(path: str) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole; what had the name before is there until then."""
    name, path = path, os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):       # a device, a pipe
        with open(path, "wb") as file:
            yield file
        return
    part = f"{path}.{os.getpid()}.part"
    try:
        file = open(part, "xb")
    except OSError as problem:
        raise OSError(problem.errno, problem.strerror, name) from None
    with file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise


def _export(arguments: argparse.Namespace) -> int:
    to_stdout = arguments.file == "-"
    with (opened_to_read(arguments.store) as reader,
          nullcontext(sys.stdout.buffer) if to_stdout else _replaced(arguments.file) as file,
          progress("export", len(reader), show=_show(to_stdout)) as update):
        done = _write(reader, file, update)
    if not to_stdout:
        print(counted(done, "record"), "written to", arguments.file)
    return 0


# -- the commands ---------------------------------------------------------------------------------------


def _delimiter(text: str) -> str:
    delimiter = "\t" if text == r"\t" else text
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise argparse.ArgumentTypeError(f"one character is wanted, and no quote or line end, not {text!r}")
    return delimiter


def register(commands: Commands) -> None:
    add = commands.add("import", _import, "store the rows of a CSV or JSON Lines file",
                       "Stores the rows of a CSV file with a header, or the objects of a file of JSON Lines. Without "
                       "--key the file must be one that `logkv export` wrote, and all is stored as it was, byte for "
                       "byte. The store is created if it is missing.",
                       "logkv import prices.db prices.csv --key symbol --key time --value close")
    add.add_argument("store", metavar="STORE", help="the store's directory")
    add.add_argument("file", metavar="FILE", help="the file; - is standard input")
    add.add_argument("--format", choices=("csv", "jsonl"),
                     help="what the file is (default: as its name ends, in .csv, .jsonl, .ndjson or .json, else as it "
                     "begins)")
    add.add_argument("--delimiter", type=_delimiter, metavar="CHAR",
                     help=r"what is between the fields of CSV (default: a comma); \t is a tab")
    add.add_argument("--key", action="append", default=[], metavar="COLUMN",
                     help="the column that has the key; given again, the columns are joined")
    add.add_argument("--separator", default="/", metavar="TEXT",
                     help="what is put between key columns (default: /)")
    add.add_argument("--prefix", default="", metavar="TEXT", help="what is put before every key")
    add.add_argument("--value", metavar="COLUMN",
                     help="the column that has the value (default: all columns, as a JSON object)")
    add.add_argument("--codec", choices=("str", "json"),
                     help="the codec of a store that is created (default: none, values are bytes)")
    add.add_argument("--skip-bad", action="store_true", help="leave out what cannot be stored, and count it")
    add.add_argument("--json", action="store_true",
                     help='print {"acked": N} when N rows are stored, again and again, and a summary at the end')
    add_timeout(add)
    add = commands.add("export", _export, "write a store as JSON Lines",
                       'Writes an object {"key": ..., "value": ...} for each record, in no particular order; what is '
                       "not UTF-8 is in key_b64 or value_b64, as base64. `logkv import` reads it back. The store may "
                       "be in use.", "logkv export prices.db prices.jsonl")
    add.add_argument("store", metavar="STORE", help="the store's directory")
    add.add_argument("file", metavar="FILE", nargs="?", default="-",
                     help="the file; one that is there is replaced at the end (default: standard output)")
