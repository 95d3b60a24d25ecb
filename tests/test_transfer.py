"""`logkv import` and `export`: what goes in comes out, bad lines are found, acknowledged rows stay."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import logkv
from logkv.cli import main, transfer
from tests.proof import imports
from tests.proof.common import scratch
from tests.test_cli import LIMIT, fails, run, started

KILLS = int(os.environ.get("LOGKV_KILLS", "3"))
CSV, JSON = ["--key", "k", "--value", "v"], ["--format", "jsonl", "--key", "k"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
FIELD = TEXT | st.sampled_from(["", "plain", 'a "quote"', "a,b", "a\nb", "a\r\nb", "\\", "\x00", "\t", "ü", "\u2028"])
BYTES = st.binary(max_size=12) | TEXT.map(str.encode)


def content(path: str | Path) -> dict[bytes, bytes]:
    with logkv.Reader(path, codec="bytes") as reader:
        return dict(reader.items())


def as_object(header: Sequence[str], row: Sequence[str]) -> bytes:
    """What is stored of a row without --value."""
    return json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False, separators=(",", ":")).encode()


def done(path: str, *arguments: str | Path, given: bytes = b"") -> str:
    """Imports without an error; what was said."""
    ended = run("import", path, *arguments, given=given)
    assert (ended.returncode, ended.stderr) == (0, b"")
    return ended.stdout.decode()


# -- CSV ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.lists(FIELD, min_size=2, max_size=4, unique=True), data=st.data(), block=st.integers(1, 200),
       line_end=st.sampled_from(["\n", "\r\n"]), quote_all=st.booleans(), prefix=TEXT, separator=TEXT,
       delimiter=st.sampled_from(",;\t|¦\\ a"))
def test_csv(header: list[str], data: st.DataObject, block: int, line_end: str, quote_all: bool, prefix: str,
             separator: str, delimiter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in the fields is stored, wherever the blocks end that are read."""
    def field(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if quote_all or set(text) & {'"', "\r", "\n", delimiter} else text

    monkeypatch.setattr(transfer, "BLOCK", block)
    row = st.lists(FIELD, min_size=len(header), max_size=len(header))
    rows = data.draw(st.lists(row | st.lists(st.sampled_from("abc"), min_size=len(header), max_size=len(header))))
    value = data.draw(st.sampled_from([None, *header]))
    keys = data.draw(st.lists(st.sampled_from(header), min_size=1, max_size=2, unique=True))
    expected = {}
    for row in rows:
        fields = dict(zip(header, row, strict=True))
        if not any(fields[name] for name in keys):
            continue                # a bad line
        key = prefix + separator.join(fields[name] for name in keys)
        expected[key.encode()] = as_object(header, row) if value is None else fields[value].encode()
    with tempfile.TemporaryDirectory() as directory:
        file, path = Path(directory, "rows.csv"), os.path.join(directory, "store")
        lines = [delimiter.join(map(field, row)) + line_end for row in [header, *rows]]
        file.write_text("".join(lines), encoding="utf-8", newline="")
        options = [f"--key={name}" for name in keys] + [f"--prefix={prefix}", f"--separator={separator}", "--skip-bad",
                                                         f"--delimiter={delimiter}"]
        assert main(["import", path, str(file), *options, *([] if value is None else [f"--value={value}"])]) == 0
        assert content(path) == expected


@pytest.mark.parametrize("notes", [["plain", "naïve"], ["plain", "tab\tNUL\x00"],
                                   ["plain", 'a "quote"', "two\nlines", "\\"]])
@pytest.mark.parametrize("value", [None, "price"])
def test_many_rows(notes: list[str], value: str | None, path: str, tmp_path: Path) -> None:
    header, expected, text = ("time", "price", "note"), {}, io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    for number in range(20_000):
        row = (f"t{number}", f"{number / 7:.3f}", notes[number * number % len(notes)])
        writer.writerow(row)
        expected[row[0].encode()] = as_object(header, row) if value is None else row[1].encode()
    file = tmp_path / "rows.csv"
    file.write_text(text.getvalue(), encoding="utf-8", newline="")
    assert done(path, file, "--key", "time", *([] if value is None else ["--value", value])) == "20,000 rows stored\n"
    assert content(path) == expected


@pytest.mark.parametrize("text, expected", [
    (b"\xef\xbb\xbfk,v\na,1\n", {b"a": b"1"}),
    (b"k,v\r\na,1\r\nb,2\r\n", {b"a": b"1", b"b": b"2"}),
    (b"k,v\na,1\nb,2", {b"a": b"1", b"b": b"2"}),
    (b"k,v\na,1\n\nb,2\n\n\n", {b"a": b"1", b"b": b"2"}),
    (b'k,v\n"a\nb","1,""2"""\nc,3\n', {b"a\nb": b'1,"2"', b"c": b"3"}),
    (b'"k\n",v,"k"\n1,2,3\n', {b"3": b"2"}),
    (b"k,v\na,\x00\n", {b"a": b"\x00"}),
    (b"k,v\na,\n", {b"a": b""}),
    (b"k,v\na,1\na,2\n", {b"a": b"2"}),
    (b"k,v\n", {}),
    (b"k,v", {}),
    (b"k,v\na," + 300_000 * b"x" + b"\n", {b"a": 300_000 * b"x"}),
], ids=lambda what: repr(what)[:40])
def test_forms_of_csv(text: bytes, expected: dict[bytes, bytes], path: str) -> None:
    done(path, "-", "--format", "csv", "--key", "k", "--value", "v", given=text)
    assert content(path) == expected


def test_part_of_a_key_may_be_empty(path: str) -> None:
    done(path, "-", *CSV, "--key", "v", given=b"k,v\na,\n,b\n")
    assert content(path) == {b"a/": b"", b"/b": b"b"}


@pytest.mark.parametrize("delimiter", ["\t", r"\t", ";", "ü"])
def test_delimiters(delimiter: str, path: str) -> None:
    text = "k,w|v|x,y\na,1|2|3,4\n".replace("|", "\t" if delimiter == r"\t" else delimiter).encode()
    done(path, "-", "--key", "v", "--delimiter", delimiter, given=text)
    assert content(path) == {b"2": b'{"k,w":"a,1","v":"2","x,y":"3,4"}'}


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "\\", "ü"])
def test_every_delimiter_is_quick(delimiter: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks without quotes do not go through `csv`."""
    def split(source: transfer.Csv, block: bytes) -> list[list[str]] | None:
        columns = before(source, block)
        quick.append(columns is not None)
        return columns

    before, quick = transfer.Csv._split, list[bool]()
    monkeypatch.setattr(transfer.Csv, "_split", split)
    monkeypatch.setattr(transfer, "BLOCK", 64)
    file = tmp_path / "rows.csv"
    file.write_text("".join(f"{key}{delimiter}{value}\n" for key, value in [("k", "v"), *zip(range(100), range(100))]))
    assert main(["import", path, str(file), *CSV, "--delimiter", delimiter]) == 0
    assert len(quick) > 5 and all(quick)
    assert content(path) == {str(number).encode(): str(number).encode() for number in range(100)}


@pytest.mark.parametrize("delimiter", ["", "::", '"', "\n", "\r"])
def test_what_is_no_delimiter(delimiter: str, path: str) -> None:
    assert "one character" in fails("import", path, "-", *CSV, "--delimiter", delimiter, given=b"k,v\n")


def test_one_column(path: str) -> None:
    done(path, "-", "--key", "k", given=b"k\na\n\nb\n")
    assert content(path) == {b"a": b'{"k":"a"}', b"b": b'{"k":"b"}'}


# -- JSON Lines -----------------------------------------------------------------------------------------


def test_json_lines(path: str) -> None:
    """Strings as they stand, numbers to the last digit."""
    lines = ['{"id": 1.10, "s": "\\u00fc\\n", "x": [1e400, null, true, {"a": 123456789012345678901234567890.10}]}', "",
             '  {"id": "two", "s": "", "x": false}  ', '{"id": [1, 2], "s": "y", "x": {}}']
    given = "\n".join(lines).encode()
    assert done(path, "-", "--key", "id", "--key", "s", "--separator", "|", "--prefix", "p:", given=given) \
        == "3 rows stored\n"
    assert content(path) == {
        "p:1.10|ü\n".encode():
            '{"id":1.10,"s":"ü\\n","x":[1e400,null,true,{"a":123456789012345678901234567890.10}]}'.encode(),
        b"p:two|": b'{"id":"two","s":"","x":false}', b"p:[1,2]|y": b'{"id":[1,2],"s":"y","x":{}}'}
    done(path + "2", "-", "--key", "s", "--value", "x", given=given)
    assert content(path + "2") == {"ü\n".encode(): b'[1e400,null,true,{"a":123456789012345678901234567890.10}]',
                                   b"": b"false", b"y": b"{}"}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.dictionaries(BYTES, BYTES),
       block=st.integers(1, 300), chunk=st.integers(1, 5))
def test_out_and_in_again(pairs: dict[bytes, bytes], block: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BLOCK", block)
    monkeypatch.setattr(transfer, "CHUNK", chunk)
    with tempfile.TemporaryDirectory() as directory:
        path, file, copy = (os.path.join(directory, name) for name in ("store", "all.jsonl", "copy"))
        with logkv.open(path) as db:
            db.update(pairs)
        assert main(["export", path, file]) == 0
        assert main(["import", copy, file]) == 0
        assert content(copy) == pairs
        for line in Path(file).read_text(encoding="utf-8").split("\n")[:-1]:
            assert {name.removesuffix("_b64") for name in json.loads(line)} == {"key", "value"}
        assert sorted(os.listdir(directory)) == ["all.jsonl", "copy", "store"]


def test_export_says_text_where_it_is_text(path: str) -> None:
    with logkv.open(path) as db:
        db.update({"ü": b"\xff", b"\xfe": "€\n"})
    lines = run("export", path).stdout.decode().splitlines()
    assert sorted(lines) == ['{"key": "ü", "value_b64": "/w=="}', '{"key_b64": "/g==", "value": "€\\n"}']


def test_export_replaces_a_file_when_it_is_whole(path: str, tmp_path: Path) -> None:
    file = tmp_path / "all.jsonl"
    file.write_text("old")
    with logkv.open(path, segment_size=1 << 16) as db:
        for number in range(2_000):
            db[str(number)] = f"value {number} " + 50 * "-"
    segment = sorted(Path(path).glob("*.seg"))[-1]
    whole = segment.read_bytes()
    at = whole.index(50 * b"-")
    segment.write_bytes(whole[:at] + b"+" + whole[at + 1:])
    assert segment.name in fails("export", path, file)
    assert file.read_text() == "old" and len(os.listdir(tmp_path)) == 2
    segment.write_bytes(whole)
    link = tmp_path / "link"
    link.symlink_to(file)
    assert run("export", path, link).stdout.decode() == f"2,000 records written to {link}\n"
    assert link.is_symlink() and len(file.read_text().splitlines()) == 2_000 and len(os.listdir(tmp_path)) == 3


def test_export_names_the_file_that_was_asked_for(path: str, tmp_path: Path) -> None:
    logkv.open(path).close()
    file = tmp_path / "nowhere" / "all.jsonl"
    assert fails("export", path, file) == f"No such file or directory: {file}"


def test_export_of_a_store_that_is_written(path: str) -> None:
    with logkv.open(path) as db:
        db["btc"] = "4411.99"
        assert run("export", path).stdout == b'{"key": "btc", "value": "4411.99"}\n'


# -- what is wrong with a file --------------------------------------------------------------------------


@pytest.mark.parametrize("options, text, line, said, stored", [
    (CSV, b"k,v\na,1\nb\n", 3, "expected 2 columns, found 1", 1),
    (CSV, b"k,v\na,1,2\n", 2, "expected 2 columns, found 3", 0),
    (CSV, b"k,v\na,1\nb,1\r,2\n", 3, "found a carriage return", 1),
    (CSV, b"k,v\na,1\n\xff,2\nc,3\n", 3, "expected UTF-8, found byte 0xff", 1),
    (CSV, b'k,v\n"a\nb\nc",1\n\nd,\xc3(\n', 6, "expected UTF-8, found byte 0xc3", 1),
    (["--key", "k"], b'k,v\n"a",\xed\xa0\x80\n', 2, "expected UTF-8, found byte 0xed", 0),
    (CSV, b'k,v\na,1\n"b,2\nc,3\n', 3, "expected a closing quote, found the end of the file", 1),
    (CSV, b'k,v\na,"1"2\n', 2, "not CSV", 0),
    (CSV, b"k,v\na,1\n,2\nb,3\n", 3, "expected a key, found an empty field", 1),
    (CSV, b'k,v\n"a",1\n"",2\n', 3, "expected a key, found an empty field", 1),
    ([*CSV, "--prefix", "p"], b"k,v\n,2\n", 2, "expected a key, found an empty field", 0),
    (CSV, b"k,v\n" + 9_000 * b"key,value\n" + b",value\n", 9_002, "expected a key, found an empty field", 9_000),
    ([*CSV, "--key", "v"], b"k,v\na,\na,\n,\n", 4, "expected a key, found an empty field", 2),
    ([*CSV, "--delimiter", ";"], b"k;v\na;1\nb,2\n", 3, "expected 2 columns, found 1", 1),
    (CSV, b"k,v\n" + 70_000 * b"k" + b",1\n", 2, "a key has at most 65,535 bytes", 0),
    (CSV, b"k,v\n" + 9_000 * b"key,value\n" + b"k\n", 9_002, "expected 2 columns, found 1", 9_000),
    (CSV, b"k,v\n" + 9_000 * b"key,value\n" + b"one\nthree,3,3\n", 9_002, "expected 2 columns, found 1", 9_000),
    (CSV, b"k,v\n" + 5_000 * b'key,"two\nlines"\n' + b"k\n", 10_002, "expected 2 columns, found 1", 5_000),
    (CSV, b"k,v\n" + 9_000 * b"key,value\n" + b"\xff,1\n" + 9_000 * b"key,value\n", 9_002, "byte 0xff", 9_000),
    (JSON, b'{"k": 1}\n\n{"k": 1\n', 3, "expected one JSON object on each line, found something else at column", 1),
    (JSON, b'{"k": 1}\n[1]\n', 2, "expected one JSON object on each line, found [1]", 1),
    (JSON, b'{\n  "k": 1\n}\n', 1, "expected one JSON object on each line", 0),
    ([], b'[{"key": "a", "value": "1"}]\n', 1, "expected one JSON object on each line, found [{", 0),
    (JSON, b'{"k": null}\n', 1, "expected a value for 'k', found null", 0),
    (JSON, b'{"v": 1}\n', 1, "expected a value for 'k', found none", 0),
    (JSON, b'{"k": 1}\n{"k": NaN}\n', 2, "found NaN", 1),
    (JSON, b'{"k": "\\ud800"}\n', 1, "expected UTF-8, found half a character", 0),
    (JSON, b'{"k": "\xff"}\n', 1, "expected UTF-8, found byte 0xff", 0),
    (JSON, b'{"k": ' + 200_000 * b"[" + b"\n", 1, "nested too deeply", 0),
    ([], b'{"key": "a", "value": "1"}\n{"key": "a", "value": 1}\n', 2, 'expected {"key": TEXT, "value": TEXT}', 1),
    ([], b'{"key": "a", "value": "1", "more": 2}\n', 1, 'expected {"key": TEXT', 0),
    ([], b'{"key": "a", "key_b64": "YQ=="}\n', 1, 'expected {"key": TEXT', 0),
    ([], b'{"key": "a", "value_b64": "?"}\n', 1, "base64", 0),
], ids=lambda what: repr(what)[:40])
def test_bad_lines(options: list[str], text: bytes, line: int, said: str, stored: int, path: str,
                   tmp_path: Path) -> None:
    file = tmp_path / ("rows.jsonl" if not options or "jsonl" in options else "rows.csv")
    file.write_bytes(text)
    message = fails("import", path, file, *options)
    assert message.startswith(f"{file}:{line}: ") and said in message
    rows = "1 row" if stored == 1 else f"{stored:,} rows"
    assert message.endswith(f" ({rows} stored before)")
    with logkv.Reader(path) as reader:
        assert len(reader) == min(stored, 1)

    ended = run("import", path, file, *options, "--skip-bad", "--json")
    first, *_ = ended.stderr.decode().splitlines()
    assert ended.returncode == 0 and first == "logkv: " + message.rpartition(" (")[0]
    summary = json.loads(ended.stdout.splitlines()[-1])
    assert summary["bad"] >= 1 and summary["stored"] >= stored


LIMITED = [sys.executable, "-c", "import resource, sys; from logkv.cli import main; "
           "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); sys.exit(main())"]


def test_an_error_says_how_many_rows_were_stored(path: str, tmp_path: Path) -> None:
    """Files that cannot grow; the same as a full disk."""
    file = tmp_path / "rows.csv"
    file.write_text("k,v\n" + "".join(f"key {number},{100 * 'x'}\n" for number in range(20_000)))
    ended = run("import", path, file, *CSV, "--json", command=LIMITED)
    last = json.loads(ended.stdout.splitlines()[-1])
    stored = len(content(path))
    assert ended.returncode == 2 and 1_000 < stored < 20_000
    assert (last["stored"], last["bad"]) == (stored, 0) and "File too large" in last["error"]
    assert ended.stderr.decode() == f"logkv: {last['error']} ({stored:,} rows stored before)\n"

    with logkv.open(path):
        ended = run("import", path, file, *CSV, "--json")
    assert json.loads(ended.stdout)["stored"] == 0 and b"pid" in ended.stderr
    assert ended.stderr.endswith(b" (0 rows stored before)\n")


def test_skip_bad_shows_the_first_few(path: str) -> None:
    rows = [f"{number}," if number % 3 else f"{number}" for number in range(30)]
    ended = run("import", path, "-", *CSV, "--skip-bad", given="\n".join(["k,v", *rows]).encode())
    assert ended.returncode == 0
    assert ended.stdout == b"20 rows stored, 10 bad lines skipped\n"
    lines = ended.stderr.decode().splitlines()
    assert lines == [*(f"logkv: <stdin>:{line}: expected 2 columns, found 1" for line in (2, 5, 8, 11, 14)),
                     "logkv: 5 more bad lines"]
    assert len(content(path)) == 20


@pytest.mark.parametrize("options, text, said", [
    (["--key", "x"], b"k,v\na,1\n", "<stdin>:1: there is no column 'x', only 'k', 'v'"),
    (["--key", "k", "--value", "x"], b"k,v\na,1\n", "there is no column 'x'"),
    (["--key", "k"], b"k,v,v\na,1,2\n", "the header names column 'v' more than once"),
    (["--key", "k"], b"\nk,v\n", "<stdin>:1: expected a header, found nothing"),
    (["--key", "k", "--format", "csv"], b"", "<stdin>:1: expected a header, found nothing"),
    (["--key", "k"], b'"k,v\n', "<stdin>:1: expected a closing quote"),
    ([], b"k,v\na,1\n", "CSV needs --key"),
    (["--value", "v"], b"{}\n", "need --key"),
    (["--prefix", "v"], b"{}\n", "need --key"),
    (["--delimiter", ";"], b"{}\n", "--delimiter is for CSV"),
])
def test_nothing_is_made_if_the_header_is_wrong(options: list[str], text: bytes, said: str, path: str) -> None:
    assert said in fails("import", path, "-", *options, given=text)
    assert not os.path.exists(path)


def test_a_missing_file(path: str, tmp_path: Path) -> None:
    assert str(tmp_path / "none.csv") in fails("import", path, tmp_path / "none.csv", "--key", "k")
    assert str(tmp_path) in fails("import", path, tmp_path, "--key", "k")
    assert not os.path.exists(path)


@pytest.mark.parametrize("name, options", [("a.CSV", []), ("a.txt", []), ("a.jsonl", ["--format", "csv"])])
def test_the_format_is_found(name: str, options: list[str], path: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('k,"{v"\na,1\n')
    done(path, tmp_path / name, "--key", "k", *options)
    assert content(path) == {b"a": b'{"k":"a","{v":"1"}'}
    (tmp_path / "b.txt").write_text(' \n{"k": "b"}\n')
    done(path, tmp_path / "b.txt", "--key", "k")
    assert content(path)[b"b"] == b'{"k":"b"}'


def test_a_codec(path: str) -> None:
    text = b'k,v\na,"{""x"": 1}"\nb,nonsense\nc,2\n'
    assert "<stdin>:3: expected JSON" in fails("import", path, "-", *CSV, "--codec", "json", given=text)
    ended = run("import", path, "-", *CSV, "--skip-bad", given=text)
    assert ended.stdout == b"2 rows stored, 1 bad line skipped\n"
    with logkv.open(path, codec="json") as db:
        assert dict(db.items()) == {b"a": {"x": 1}, b"c": 2}
    assert "'json'" in fails("import", path, "-", *CSV, "--codec", "str", given=text)


# -- acknowledged rows ----------------------------------------------------------------------------------


def test_acknowledgements(path: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("k,v\n" + "".join(f"key {number},{number}\n" for number in range(50_000)))
    ended = run("import", path, file, "--key", "k", "--json")
    *acks, summary = map(json.loads, ended.stdout.splitlines())
    counts = [ack["acked"] for ack in acks]
    assert len(counts) > 5 and counts == sorted(set(counts)) and counts[-1] == 50_000
    assert summary == {"stored": 50_000, "bad": 0}


def test_rows_are_acknowledged_when_they_have_come(path: str) -> None:
    """Also if the pipe stays open, and in the middle of a row."""
    with started("import", path, "-", *CSV, "--json", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        for text, stored in ((b"k,v\na,1\nb,2\nc,", 2), (b"3\n", 3), (b'd,4\ne,"two\nl', 4), (b'ines"\n', 5)):
            process.stdin.write(text)
            process.stdin.flush()
            assert process.stdout.readline() == b'{"acked": %d}\n' % stored
            assert len(content(path)) == stored
        process.stdin.close()
        assert process.stdout.readline() == b'{"stored": 5, "bad": 0}\n'
        assert process.wait(LIMIT) == 0
    assert content(path)[b"e"] == b"two\nlines"


def test_killed_imports() -> None:
    with tempfile.TemporaryDirectory(dir=scratch()) as directory:
        report = imports.run(directory, KILLS)
    assert not report.violations, "\n".join(report.violations[:20])
    assert report.kills == KILLS and report.acknowledged


def test_a_lost_row_is_seen(tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = imports.write_file(tmp_path / "rows.csv", 100, 1, rng)
    before = dict(imports.write_file(tmp_path / "rows.csv", 100, 0, rng))
    store: dict[bytes, bytes] = before | dict(rows[:50])
    assert imports.wrong(store, rows, 50, before) == []
    assert imports.wrong(store | dict(rows[50:60]), rows, 50, before) == []
    for key, _ in (rows[0], rows[49]):
        lost: Mapping[bytes, bytes] = {other: value for other, value in store.items() if other != key}
        assert len(imports.wrong(lost, rows, 50, before)) == 1
    assert len(imports.wrong(store | {rows[70][0]: b"torn"}, rows, 50, before)) == 1
    untouched = next(key for key in before if key not in dict(rows))
    assert len(imports.wrong(store | {untouched: b"other"}, rows, 50, before)) == 1
