"""The command `logkv`, run as a user runs it."""

from __future__ import annotations

import base64
import gc
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import logkv
from logkv.cli import main, terminal

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("get", "put", "delete", "import", "export", "migrate", "stats", "verify", "repair", "compact", "backup",
            "demo")
LIMIT = 60          # seconds
LOGKV = [sys.executable, "-m", "logkv"]
# The same command where what the extra `cli` brings is missing.
BARE = [sys.executable, "-c", "import sys; sys.modules.update(rich=None, argcomplete=None); "
        "from logkv.cli import main; sys.exit(main())"]


def environment(**more: str) -> dict[str, str]:
    foreign = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "PYTHONUNBUFFERED")
    known = {name: value for name, value in os.environ.items() if name not in foreign}
    return known | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "TERM": "xterm-256color",
                    "LC_ALL": "C.UTF-8"} | more


def run(*arguments: str | bytes | Path, given: bytes = b"",
        command: list[str] = LOGKV) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*command, *arguments], env=environment(), input=given, capture_output=True, timeout=LIMIT,
                          check=False)


def fails(*arguments: str | bytes | Path, status: int = 2, given: bytes = b"") -> str:
    """What a command says that fails as it should: one line."""
    done = run(*arguments, given=given)
    said = done.stderr.decode()
    assert (done.returncode, said.count("\n"), said[:7]) == (status, 1, "logkv: "), said
    return said[7:-1]


@contextmanager
def started(*arguments: str | Path, **streams: int) -> Iterator[subprocess.Popen[bytes]]:
    """A command under way, for which Ctrl-C does what it does in a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)      # a child would inherit that it is ignored
    try:
        process = subprocess.Popen([*LOGKV, *arguments], env=environment(), stderr=subprocess.PIPE, **streams)
    finally:
        signal.signal(signal.SIGINT, before)
    late = threading.Timer(LIMIT, process.kill)         # else a test might read on for ever
    late.start()
    with process:
        try:
            yield process
        finally:
            late.cancel()
            process.kill()


def on_terminal(*arguments: str | Path, command: list[str] = LOGKV) -> str:
    """What a command writes to a terminal, on which it also has its errors."""
    master, slave = pty.openpty()
    with open(master, "rb", buffering=0) as screen:
        process = subprocess.Popen([*command, *arguments], env=environment(COLUMNS="100"), stdin=slave, stdout=slave,
                                   stderr=slave)
        os.close(slave)
        drawn = b""
        try:
            while chunk := screen.read(65_536):
                drawn += chunk
        except OSError:         # EIO: nobody has the other side open any more
            pass
        assert process.wait(LIMIT) == 0, drawn
    return drawn.decode()


@pytest.fixture
def filled(path: str) -> str:
    """A store of 10,000 keys in several segments, closed."""
    with logkv.open(path, segment_size=1 << 18) as db:
        for number in range(10_000):
            db.put(f"key/{number}", f"value {number} " + 50 * "-")
    return path


# -- get, put, delete -----------------------------------------------------------------------------------


def test_one_record(path: str) -> None:
    assert run("put", path, "btc", "4411.99").stdout == b""
    done = run("get", path, "btc")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"4411.99", b"")
    with logkv.Reader(path) as reader:
        before = reader.stats()["last_version"]
        version = json.loads(run("put", path, "btc", "4412.50", "--json").stdout)["version"]
        assert before < version <= reader.stats()["last_version"]
    assert json.loads(run("get", path, "btc", "--json").stdout) == {"key": "btc", "value": "4412.50"}
    done = run("delete", path, "btc")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    for command in ("get", "delete"):
        assert fails(command, path, "btc", status=1) == f"there is no key 'btc' in {path}"


def test_any_bytes(path: str) -> None:
    key, value = b"\xff\xfe key", bytes(range(256))
    assert run("put", path, key, "-", given=value).returncode == 0
    assert run("put", path, b"argument", b"\xff\xf0").returncode == 0
    assert run("put", path, "", "").returncode == 0
    assert run("get", path, key).stdout == value
    assert run("get", path, "argument").stdout == b"\xff\xf0"
    assert json.loads(run("get", path, key, "--json").stdout) == {
        "key_b64": base64.b64encode(key).decode(), "value_b64": base64.b64encode(value).decode()}
    with logkv.Reader(path) as reader:
        assert dict(reader) == {key: value, b"argument": b"\xff\xf0", b"": b""}
    assert run("delete", path, key).returncode == 0
    assert run("get", path, key).returncode == 1


def test_what_was_deleted_as_json(path: str) -> None:
    run("put", path, "btc", "4411.99")
    for status, found in ((0, b"true"), (1, b"false")):
        done = run("delete", path, "btc", "--json")
        assert (done.returncode, done.stdout, done.stderr) == (status, b'{"deleted": %s}\n' % found, b"")


def test_a_newline_only_on_a_terminal(path: str) -> None:
    run("put", path, "btc", "4411.99")
    assert on_terminal("get", path, "btc") == "4411.99\r\n"


def test_start_is_light(path: str) -> None:
    run("put", path, "btc", "4411.99")
    heavy = ["rich", "argcomplete", "csv", "multiprocessing", "logkv.cli.transfer", "logkv.cli.demo"]
    code = (f"import sys; from logkv.cli import main; status = main({['get', path, 'btc']}); "
            f"print([name for name in {heavy} if name in sys.modules])")
    assert run("-c", code, command=[sys.executable]).stdout == b"4411.99[]\n"


# -- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["get STORE k", "delete STORE k", "export STORE", "stats STORE", "verify STORE",
                                     "compact STORE", "backup STORE there"])
def test_no_store(command: str, tmp_path: Path) -> None:
    missing = tmp_path / "missing.db"
    assert fails(*command.replace("STORE", str(missing)).split()) == f"there is no store: {missing}"
    assert not missing.exists()
    (tmp_path / "notes.txt").touch()
    assert "is not a LogKV store" in fails(*command.replace("STORE", str(tmp_path)).split())


@pytest.mark.parametrize("arguments, said", [
    ("nonsense", "'nonsense'"), ("get", "STORE, KEY"), ("get s", "KEY"), ("get s k v", "v"), ("put s k", "VALUE"),
    ("put s k v --timeout soon", "soon"), ("put s k v --timeout -1", "-1"), ("import s", "FILE"),
    ("import s f --format xml", "xml"), ("import s f --codec pickle", "pickle"), ("stats", "STORE"),
    ("--nonsense", "--nonsense"),
])
def test_wrong_usage(arguments: str, said: str, tmp_path: Path) -> None:
    assert said in fails(*arguments.replace("s k", f"{tmp_path}/s k").split())
    assert list(tmp_path.iterdir()) == []


def test_without_a_command_there_is_help() -> None:
    done = run()
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == run("--help").stdout
    for name in COMMANDS:
        assert re.search(rf"^    {name} +\w", done.stderr.decode(), re.M), name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0
    assert f"example: logkv {name} " in " ".join(done.stdout.decode().split())


@pytest.mark.parametrize("asked", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_the_word_help(asked: list[str]) -> None:
    done = run("help", *asked)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.startswith(b"usage: ")
    assert done.stdout == run(*asked, "--help").stdout
    assert "'nonsense'" in fails("help", "nonsense")


@pytest.mark.parametrize("arguments", ["export", "export s f more", "export s --nonsense", "put s -x v"])
def test_wrong_usage_names_the_help_of_the_command(arguments: str) -> None:
    command = arguments.split()[0]
    assert f"(see logkv {command} --help" in fails(*arguments.split())
    assert "(see logkv --help)" in fails("--nonsense")


def test_a_key_that_begins_with_a_dash(path: str) -> None:
    assert "-- goes before a key that begins with a dash" in fails("put", path, "-x", "v")
    assert "dash" not in fails("put", path, "x")
    assert run("put", path, "--", "-x", "v").returncode == 0
    assert run("get", path, "--", "-x").stdout == b"v"


def test_version() -> None:
    assert run("--version").stdout.decode() == f"logkv {logkv.__version__}\n"


@pytest.mark.parametrize("command", [["put", "k", "v"], ["delete", "k"], ["import", "-"], ["compact"]])
def test_locked(command: list[str], path: str) -> None:
    with logkv.open(path):
        said = fails(command[0], path, *command[1:], "--timeout", "0.1", given=b'{"key": "k", "value": "v"}')
    assert f"pid {os.getpid()}" in said and "0.1 s" in said


def test_a_writer_that_waits(path: str) -> None:
    db = logkv.open(path)
    db["k"] = "old"
    with started("put", path, "k", "new", "--timeout", str(LIMIT)) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        db.close()
        assert process.wait(LIMIT) == 0
    assert run("get", path, "k").stdout == b"new"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("command", ["get STORE key/7", "export STORE", "export STORE /dev/full", "stats STORE"])
def test_a_full_disk(command: str, filled: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*LOGKV, *command.replace("STORE", filled).split()], env=environment(), stdout=full,
                              stderr=subprocess.PIPE, timeout=LIMIT, check=False)
    assert (done.returncode, done.stderr) == (2, b"logkv: No space left on device\n")


def test_a_reader_that_goes(filled: str) -> None:
    with started("export", filled, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b'{"key": ')
        process.stdout.close()
        assert process.wait(LIMIT) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""


@pytest.mark.parametrize("command", ["get STORE key/7", "export STORE", "stats STORE", "import STORE - --json"])
def test_nobody_reads(command: str, filled: str) -> None:
    end, output = os.pipe()
    os.close(end)
    with open(output, "wb") as pipe:
        done = subprocess.run([*LOGKV, *command.replace("STORE", filled).split()], env=environment(), stdout=pipe,
                              input=b'{"key": "k", "value": "v"}\n', stderr=subprocess.PIPE, timeout=LIMIT, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_interrupt(path: str) -> None:
    with started("import", path, "-", "--json", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(b'{"key": "a", "value": "1"}\n{"key": "b", "value": "2"}\n')
        process.stdin.flush()
        assert process.stdout.readline() == b'{"acked": 2}\n'
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) == 130
        assert process.stderr.read() == b"logkv: interrupted (2 rows stored before)\n"
    assert logkv.verify(path).ok
    with logkv.open(path) as db:
        assert dict(db) == {b"a": b"1", b"b": b"2"} and db.stats()["cut_bytes"] == 0


@pytest.mark.parametrize("command, said", [
    ("put STORE k v", ""), ("delete STORE old", ""), ("compact STORE", ""),
    ("import STORE ROWS", " (2 rows stored before)"),
    ("migrate OTHER STORE --merge", " (1 record copied before; STORE now holds 2 records)"),
])
def test_interrupts_wait_while_a_store_is_closed(command: str, said: str, path: str, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    rows, other = tmp_path / "rows.jsonl", tmp_path / "other"
    rows.write_text('{"key": "k", "value": "v"}\n{"key": "l", "value": "v"}\n')
    for name in (other, path):
        with logkv.open(name) as db:
            db["k" if name == other else "old"] = "v"
    close = logkv.Store.close
    interrupts = [1]                # at each closing

    def interrupted_close(store: logkv.Store) -> None:
        for _ in range(interrupts.pop() if interrupts else 0):
            signal.raise_signal(signal.SIGINT)
        close(store)

    monkeypatch.setattr(logkv.Store, "close", interrupted_close)
    words = command.replace("STORE", path).replace("ROWS", str(rows)).replace("OTHER", str(other)).split()
    assert main(words) == 130
    assert capsys.readouterr().err == f"logkv: interrupted{said.replace('STORE', path)}\n"
    assert json.loads(run("stats", path, "--json").stdout)["writer"] is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    interrupts.append(2)
    with pytest.warns(ResourceWarning, match="was not closed"):
        assert main(words) == 130
        gc.collect()


@pytest.mark.parametrize("problem, said", [
    (ValueError("two\nlines"), "two lines"), (KeyboardInterrupt(), "interrupted"),
    (OSError(28, "No space left on device", "/a/b"), "No space left on device: /a/b"),
    (OSError(28, "No space left on device", b"/a/b"), "No space left on device: /a/b"),
])
def test_explain(problem: BaseException, said: str) -> None:
    assert terminal.explain(problem) == said


# -- stores with a codec --------------------------------------------------------------------------------


def test_codec(path: str) -> None:
    with logkv.open(path, codec="json") as db:
        db["btc"] = {"close": 4411.99}
    assert run("get", path, "btc").stdout == b'{"close":4411.99}'
    assert run("put", path, "eth", '{"close": 303}').returncode == 0
    assert "not right for codec 'json'" in fails("put", path, "eth", '{"close": 303')
    assert "not right for codec 'json'" in fails("put", path, "eth", b"\xff")
    assert fails("put", path, 65_536 * "k", "1").startswith("a key has at most 65,535 bytes")
    assert run("delete", path, "btc").returncode == 0
    with logkv.open(path, codec="json") as db:
        assert dict(db.items()) == {b"eth": {"close": 303}}
    assert json.loads(run("stats", path, "--json").stdout)["codec"] == "json"
    assert run("verify", path).returncode == 0


def test_codec_that_cannot_be_checked(path: str) -> None:
    with logkv.open(path, codec="pickle") as db:
        db["btc"] = db["eth"] = ("4411.99",)
        stored = db.copy()
    assert "'pickle'" in fails("put", path, "btc", "4411.99")
    assert run("delete", path, "eth").returncode == 0
    with logkv.open(path, codec="pickle") as db:
        assert dict(db.items()) == {b"btc": stored[b"btc"]}


# -- stats and verify -----------------------------------------------------------------------------------


def test_stats(filled: str) -> None:
    facts = json.loads(run("stats", filled, "--json").stdout)
    with logkv.Reader(filled) as reader:
        expected = reader.stats()
    assert {name: facts[name] for name in ("keys", "live_bytes", "dead_bytes", "last_version", "cut_bytes")} == {
        name: expected[name] for name in ("keys", "live_bytes", "dead_bytes", "last_version", "cut_bytes")}
    assert facts["writer"] is None
    states = [segment["state"] for segment in facts["segments"]]
    assert len(states) > 3 and states.count("active") == 1
    parts = [facts[f"{name}_bytes"] for name in ("live", "dead", "framing", "free")]
    assert sum(parts) == sum(segment["bytes"] for segment in facts["segments"]) and min(parts) > 0
    text = run("stats", filled).stdout.decode()
    assert re.search(r"^keys +10,000$", text, re.M) and re.search(r"^writer +none$", text, re.M)
    drawn = re.findall(r"^(\d+) +(\w+) +([\d,]+)  (█*▒*░*)  ", text, re.M)
    assert drawn == [(str(s["number"]), s["state"], f"{s['bytes']:,}",
                      terminal.split_bar(s["live_bytes"] / s["bytes"], s["dead_bytes"] / s["bytes"]))
                     for s in facts["segments"]]
    with logkv.open(filled):
        assert json.loads(run("stats", filled, "--json").stdout)["writer"] == os.getpid()
        assert re.search(rf"^writer +pid {os.getpid()}$", run("stats", filled).stdout.decode(), re.M)


def test_stats_add_up(path: str) -> None:
    """What is alive is not all that the files take: space is allocated ahead."""
    with logkv.open(path) as db:
        for number in range(5_000):
            db[str(number)] = "x" * 300
        end = sum(db.stats()[name] for name in ("live_bytes", "dead_bytes"))
        facts = json.loads(run("stats", path, "--json").stdout)
        text = run("stats", path).stdout.decode()
    [segment] = facts["segments"]
    assert facts["framing_bytes"] + facts["free_bytes"] == segment["bytes"] - end > 100_000
    assert 0 < facts["framing_bytes"] < 1_000
    rows = {name: (size, bar, share) for name, size, bar, share
            in re.findall(r"^- (\w+) +([\d.]+ k?M?B) +(█*░*) +(\S+)$", text, re.M)}
    assert re.search(rf"^log +{terminal.size(segment['bytes'])}$", text, re.M)
    for name, part in (("alive", facts["live_bytes"]), ("free", facts["free_bytes"])):
        assert rows[name] == (terminal.size(part), terminal.bar(part / segment["bytes"]),
                              f"{part / segment['bytes']:.0%}")
    assert rows["dead"][1:] == ("░" * 24, "0%") and rows["framing"][1:] == ("█" + 23 * "░", "<1%")


@pytest.mark.parametrize("share, text, filled", [(0.0, "0%", 0), (1e-6, "<1%", 1), (0.5, "50%", 12), (0.99, "99%", 23),
                                                 (1 - 1e-6, ">99%", 23), (1.0, "100%", 24)])
def test_a_bar_and_its_share_agree(share: float, text: str, filled: int) -> None:
    assert terminal.percent(share) == text
    assert sum(map(terminal.bar(share).count, "█#")) == filled


@pytest.mark.parametrize("shares, drawn", [
    ((1.0, 0.0), "████████"), ((0.0, 1.0), "▒▒▒▒▒▒▒▒"), ((0.0, 0.0), "░░░░░░░░"), ((0.5, 0.25), "████▒▒░░"),
    ((1e-6, 1e-6), "█▒░░░░░░"), ((1 - 2e-6, 1e-6), "██████▒░"), ((0.5, 0.5), "████▒▒▒▒"), ((0.34, 0.33), "███▒▒▒░░"),
    ((0.6, 0.5), "████▒▒▒▒"),
])
def test_a_bar_of_two_shares(shares: tuple[float, float], drawn: str) -> None:
    """Each part that is there can be seen, also where the two were counted at different moments."""
    assert terminal.split_bar(*shares, width=8).translate(str.maketrans("#+.", "█▒░")) == drawn


@pytest.fixture
def half_dead(path: str) -> str:
    """A closed store of three segments or more, of which about half is dead."""
    with logkv.open(path, segment_size=1 << 18, compaction="manual") as db:
        for _ in range(2):
            db.update({f"key/{number}": 100 * "x" for number in range(3_000)})
    return path


def test_compact(half_dead: str) -> None:
    def on_disk() -> int:
        return sum(file.stat().st_blocks * 512 for file in Path(half_dead).iterdir())

    before = on_disk()
    facts = json.loads(run("stats", half_dead, "--json").stdout)
    assert facts["dead_bytes"] >= facts["live_bytes"] and facts["merges"] == 0
    done = run("compact", half_dead, "--json")
    assert (done.returncode, done.stderr) == (0, b"")
    said = json.loads(done.stdout)
    # A footer may be written at the opening, before the command looks.
    assert said["disk_bytes"] == on_disk() and said["freed_bytes"] >= before - on_disk() > 300_000
    facts = json.loads(run("stats", half_dead, "--json").stdout)
    assert facts["dead_bytes"] < 1_000 and facts["merges"] == 1
    assert [segment["state"] for segment in facts["segments"]] == ["merged", "active"]
    parts = [facts[f"{name}_bytes"] for name in ("live", "dead", "framing", "free")]
    assert sum(parts) == sum(segment["bytes"] for segment in facts["segments"]) and min(parts) > 0
    assert re.search(r"^\d+ +merged +[\d,]+  █+░+ ", run("stats", half_dead).stdout.decode(), re.M)
    again = run("compact", half_dead).stdout.decode()
    assert again == f"{half_dead} takes {terminal.size(on_disk())}: nothing came back\n"
    with logkv.open(half_dead, "r") as db:
        assert dict(db) == {f"key/{number}".encode(): 100 * b"x" for number in range(3_000)}
    assert logkv.verify(half_dead).ok


def test_compact_says_what_came_back(half_dead: str) -> None:
    assert re.fullmatch(rf"{half_dead} takes \d+ kB: \d+ kB came back\n", run("compact", half_dead).stdout.decode())


def test_compact_decodes_nothing(path: str) -> None:
    """So it takes any store, also one whose codec only its program has."""
    with logkv.open(path, codec="pickle") as db:
        db["k"] = [1]
        db["k"] = [2]
    assert run("compact", path).returncode == 0
    with logkv.open(path, codec="pickle") as db:
        assert db["k"] == [2]


def test_compact_of_a_damaged_store(half_dead: str) -> None:
    """It says which file, and leaves it."""
    segment = sorted(Path(half_dead).glob("*.seg"))[-2]
    with segment.open("r+b") as file:
        file.seek(file.read().rindex(b"xxxx"))
        file.write(b"y")
    assert segment.name in fails("compact", half_dead)
    assert segment.exists()


def test_stats_of_many_segments(path: str) -> None:
    with logkv.open(path, segment_size=1 << 16) as db:
        for number in range(30):
            db[str(number)] = bytes(60_000)
        expected = len(db.stats()["segments"])
    text = run("stats", path).stdout.decode()
    older = re.search(r"^(\d+) older +sealed", text, re.M)
    assert older and int(older[1]) == expected - 20 > 0
    assert len(re.findall(r"^\d+ +(?:sealed|full|active|next) ", text, re.M)) == 20


def test_stats_of_an_empty_store(path: str) -> None:
    logkv.open(path).close()
    text = run("stats", path).stdout.decode()
    assert re.search(r"^keys +0$", text, re.M) and re.search(r"^last write +never$", text, re.M)


def test_verify(filled: str) -> None:
    done = run("verify", filled)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().startswith(f"{filled} is whole: 10,000 keys, ")
    report = json.loads(run("verify", filled, "--json").stdout)
    assert report["ok"] is True and report["problems"] == [] and report["keys"] == 10_000

    segment = sorted(Path(filled).glob("*.seg"))[1]
    with segment.open("r+b") as file:
        file.seek(file.read().index(b" -----") + 10)
        file.write(b"+")
    done = run("verify", filled)
    assert (done.returncode, done.stderr) == (1, b"")
    problem, *_, verdict = done.stdout.decode().splitlines()
    assert segment.name in problem and "offset" in problem and "expected" in problem and "found" in problem
    assert f"{filled} is damaged: 1 problem in " in verdict
    done = run("verify", filled, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 1 and report["ok"] is False
    assert [found["file"] for found in report["problems"]] == [segment.name]


def test_backup(filled: str, tmp_path: Path) -> None:
    dest = tmp_path / "prices.backup"
    done = run("backup", filled, dest)
    assert (done.returncode, done.stderr) == (0, b"")
    title, head, *rows = done.stdout.decode().splitlines()
    assert title == f"{dest} holds 10,000 keys" and head.split() == ["segments", "bytes"]
    assert [row.split()[0] for row in rows] == ["linked", "copied", "kept"]
    made = json.loads(run("backup", filled, dest, "--json").stdout)
    assert made["kept"] == int(rows[0].split()[1]) > 1 and made["linked"] == 0 and made["keys"] == 10_000
    assert json.loads(run("backup", filled, dest, "--copy", "--json").stdout)["copied"] > 1
    assert run("get", dest, "key/7").stdout == run("get", filled, "key/7").stdout

    before = {file.name: file.read_bytes() for file in dest.iterdir() if file.name != "LOCK"}
    run("put", filled, "more", "1")
    segment = sorted(Path(filled).glob("*.seg"))[-1]
    with segment.open("r+b") as file:
        file.seek(file.read().index(b"more"))
        file.write(b"+")
    assert segment.name in fails("backup", filled, dest, status=1)
    assert {file.name: file.read_bytes() for file in dest.iterdir() if file.name != "LOCK"} == before
    assert "inside it" in fails("backup", filled, Path(filled, "below"))
    run("put", dest, "more", "1")
    assert "opened for writing" in fails("backup", filled, dest)


# -- what is seen ---------------------------------------------------------------------------------------


def test_terminal_with_rich(filled: str, tmp_path: Path) -> None:
    pytest.importorskip("rich")
    drawn = on_terminal("export", filled, tmp_path / "all.jsonl")
    assert "\x1b[" in drawn and "export" in drawn and "10,000 records" in drawn and "100%" in drawn
    assert "━" in drawn
    assert "\x1b[1" in on_terminal("stats", filled)
    assert "━" in on_terminal("verify", filled)
    assert "━" in on_terminal("compact", filled)
    assert "━" in on_terminal("backup", filled, tmp_path / "rich.backup")


def test_terminal_without_rich(filled: str, tmp_path: Path) -> None:
    drawn = on_terminal("export", filled, tmp_path / "all.jsonl", command=BARE)
    assert re.search(r"\rexport: 10,000 records, [\d,]+/s, 100%, 0 s left\x1b\[K\r\n10,000 records written", drawn)
    assert on_terminal("stats", filled, command=BARE) == run("stats", filled).stdout.decode().replace("\n", "\r\n")
    assert "\rverify: " in on_terminal("verify", filled, command=BARE)
    assert "\rcompact: " in on_terminal("compact", filled, command=BARE)
    assert "\rbackup: " in on_terminal("backup", filled, tmp_path / "plain.backup", command=BARE)


def test_everything_works_without_rich(tmp_path: Path) -> None:
    store, file = tmp_path / "store", tmp_path / "rows.csv"
    file.write_text("k,v\na,1\n")
    for arguments in (["put", store, "b", "2"], ["import", store, file, "--key", "k", "--value", "v"], ["stats", store],
                      ["verify", store], ["export", store, tmp_path / "out.jsonl"], ["delete", store, "b"],
                      ["compact", store], ["backup", store, tmp_path / "store.backup"]):
        done = run(*arguments, command=BARE)
        assert (done.returncode, done.stderr) == (0, b""), arguments
    assert run("get", store, "a", command=BARE).stdout == b"1"


def test_output_that_is_no_terminal_is_plain(filled: str) -> None:
    for command in ("stats", "verify"):
        done = run(command, filled)
        assert b"\x1b" not in done.stdout and done.stderr == b""


@pytest.mark.parametrize("line, expected", [
    ("logkv im", ["import"]), ("logkv import store file --sk", ["--skip-bad"]),
    ("logkv import store file --format ", ["csv", "jsonl"]), ("logkv get pri", ["prices.db/"]),
])
def test_completion(line: str, expected: list[str], tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    (tmp_path / "prices.db").mkdir()
    asked = environment(_ARGCOMPLETE="1", _ARGCOMPLETE_IFS="\n", _ARGCOMPLETE_STDOUT_FILENAME=str(tmp_path / "answer"),
                        _ARGCOMPLETE_SHELL="bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    subprocess.run(LOGKV, env=asked, cwd=tmp_path, check=True, timeout=LIMIT)
    answer = (tmp_path / "answer").read_text().split("\n")
    assert [word.rstrip() for word in answer] == expected


@pytest.mark.parametrize("number, text", [
    (0, "0 B"), (999, "999 B"), (1_000, "1 kB"), (4_650_000, "4.65 MB"), (999_600, "1 MB"), (3e9, "3 GB"),
    (8e12, "8 TB"), (8e15, "8,000 TB"),
])
def test_sizes(number: float, text: str) -> None:
    assert terminal.size(number) == text


def test_main_returns_a_status(path: str, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["put", path, "a", "1"]) == 0
    assert main(["get", path, "a"]) == 0
    assert main(["get", path, "b"]) == 1
    assert main(["get", path + "/missing", "b"]) == 2
    assert capsysbinary.readouterr().out == b"1"


def test_a_bar_while_the_index_is_built(path: str) -> None:
    """On a terminal, and only where it is built."""
    main(["put", path, "a", "1"])
    os.unlink(os.path.join(path, "index"))
    for expected in (True, False):
        parent, child = pty.openpty()
        process = subprocess.Popen([sys.executable, "-m", "logkv", "put", path, "b", "2"], stderr=child,
                                   env=environment(TERM="xterm"))
        os.close(child)
        said = b""
        with suppress(OSError):              # the end of a terminal
            while chunk := os.read(parent, 4096):
                said += chunk
        os.close(parent)
        assert process.wait() == 0 and (b"index" in said) == expected
