"""`logkv demo`, run as a user runs it: through a pipe, and on terminals of several kinds."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest

import logkv
from logkv.cli import demo, main, show

ROOT = Path(__file__).resolve().parent.parent
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LIMIT = 60          # seconds


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "logkv", "demo", *arguments]


def environment(scratch: Path, **more: str) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    paths = [more.pop("first", ""), str(ROOT), *sys.path]
    return known | {"TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                    "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"} | more


def run(scratch: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), env=environment(scratch), cwd=scratch, text=True, timeout=LIMIT,
                          capture_output=True, check=False)


@contextmanager
def started(scratch: Path, *arguments: str, output: int = subprocess.PIPE, **more: str
            ) -> Iterator[subprocess.Popen[str]]:
    """The demo in a session of its own, where Ctrl-C does what it does in a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)      # a child would inherit that it is ignored
    try:
        process = subprocess.Popen(command(*arguments), env=environment(scratch, **more), cwd=scratch, text=True,
                                   stdin=subprocess.DEVNULL if output == subprocess.PIPE else output, stdout=output,
                                   stderr=subprocess.PIPE, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


class Terminal:
    """A demo on a pseudo-terminal, and what it has drawn."""

    def __init__(self, process: subprocess.Popen[str], master: int) -> None:
        self.process = process
        self.drawn = ""
        self._master = master
        self._raw = b""
        self._deadline = time.monotonic() + LIMIT

    def wait_for(self, pattern: str) -> re.Match[str]:
        while not (found := re.search(pattern, CODES.sub("", self.drawn))):
            assert self._read(), f"ended without {pattern!r}:\n{self.drawn}\n{self.errors()}"
        return found

    def wait(self) -> int:
        while self._read():
            pass
        return self.process.wait(LIMIT)

    def lines(self) -> list[str]:
        return [line.rstrip() for line in re.split(r"[\r\n]+", CODES.sub("", self.drawn))]

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def _read(self) -> bool:
        assert time.monotonic() < self._deadline, self.drawn
        try:
            self._raw += (chunk := os.read(self._master, 65_536))
        except OSError:         # EIO: nobody has the other side open any more
            return False
        self.drawn = self._raw.decode(errors="ignore")
        return bool(chunk)


@contextmanager
def on_terminal(scratch: Path, *arguments: str, columns: int = 100, **more: str) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    try:
        termios.tcsetwinsize(slave, (40, columns))
        with started(scratch, *arguments, output=slave, **more) as process:
            os.close(slave)
            yield Terminal(process, master)
    finally:
        os.close(master)


def assert_nothing_is_left(scratch: Path, session: int) -> None:
    assert list(scratch.iterdir()) == []
    deadline = time.monotonic() + LIMIT
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(session, 0)
            time.sleep(0.02)


# -- without a terminal ---------------------------------------------------------------------------------


def test_json(tmp_path: Path) -> None:
    done = run(tmp_path, "--seconds", "1", "--seed", "7", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    report = json.loads(done.stdout)
    assert set(report) == {"seed", "killed_after_ms", "acknowledged", "found", "reopened_ms", "reads",
                           "reads_while_dead", "btc", "keys", "log_bytes", "index_bytes", "segments", "logkv",
                           "baseline", "store"}
    assert (report["seed"], report["store"]) == (7, None)
    assert report["found"] == report["acknowledged"] > 0
    assert 2000 < float(report["btc"]) < 8000
    trades = (report["acknowledged"] + 1) // 2
    assert report["keys"] - len(demo.MARKETS) - trades in (0, 1)       # one put may have been under way
    assert report["log_bytes"] > 0 < report["index_bytes"]
    assert report["segments"] > 0 < report["reopened_ms"]
    assert 500 <= report["killed_after_ms"]
    assert 0 < report["reads_while_dead"] < report["reads"]
    for name in ("logkv", "baseline"):
        assert report[name]["puts_per_second"] > 0 < report[name]["gets_per_second"]
    assert list(tmp_path.iterdir()) == []


def test_text_and_directory(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = run(scratch, "--seconds", "2.1", "--seed", "1", "--dir", str(tmp_path / "kept"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    for text in ("  1 s  reader 1: ", "  reader 2: ", "SIGKILL", "Opened again in", "puts acknowledged  ",
                 "found again ", "     all\n", "reopened in", 'get("btc")', "\n  log ", "\n  index ", "LogKV",
                 "     while no writer lived\n", "pure Python", "--seed 1\n", f"The store: {tmp_path / 'kept'}\n"):
        assert text in done.stdout
    assert "200,000 short records (20,000 in pure Python), nothing else running:" in " ".join(done.stdout.split())
    with logkv.Reader(tmp_path / "kept") as reader:
        assert reader["btc"].decode() in done.stdout
    assert list(scratch.iterdir()) == []
    again = run(scratch, "--dir", str(tmp_path / "kept"))
    assert again.returncode == 2
    assert again.stderr.startswith("logkv: --dir ") and again.stderr.count("\n") == 1


def test_the_log_is_what_was_written(tmp_path: Path) -> None:
    """And not the files, which are allocated ahead."""
    done = run(tmp_path, "--seconds", "0.5", "--json", "--dir", "kept")
    with logkv.Reader(tmp_path / "kept") as reader:
        stats = reader.stats()
    written = json.loads(done.stdout)["log_bytes"]
    assert 0 <= stats["live_bytes"] + stats["dead_bytes"] - written < 1000       # closing leaves a mark


def test_a_missing_put_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def lose(store: logkv.Store, seed: int, acknowledged: int, *rest: object) -> int:
        trade, _ = next(demo.stream(seed))
        assert store.delete(trade)
        return find(store, seed, acknowledged)

    find = demo.find
    monkeypatch.setattr(demo, "find", lose)
    assert demo.run(0.2, seed=1) == 1
    assert "     1 ARE MISSING\n" in capsys.readouterr().out


def test_what_is_missing_is_not_found(tmp_path: Path) -> None:
    puts = list(islice(demo.stream(3), 1000))
    assert puts == list(islice(demo.stream(3), 1000)) != list(islice(demo.stream(4), 1000))
    with logkv.open(tmp_path / "store") as store:
        for key, value in puts:
            store.put(key, value)
        assert demo.find(store, 3, 999) == 999          # the last one was under way
        assert demo.find(store, 3, 1000) == 1000
        trade, price = puts[500][0], puts[999][0]
        assert store.delete(trade)
        assert demo.find(store, 3, 1000) == 999
        store.put(trade, "0")
        assert demo.find(store, 3, 1000) == 999
        store.put(trade, puts[500][1])
        store.put(price, "0")
        assert demo.find(store, 3, 1000) == 1000 - sum(key == price for key, _ in puts)


def test_nobody_reads_the_output(tmp_path: Path) -> None:
    """As with `logkv demo | head -1`."""
    with started(tmp_path, "--seconds", "60") as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(LIMIT) not in (0, 1)
        assert "Traceback" not in process.stderr.read()
    assert_nothing_is_left(tmp_path, process.pid)


# -- on a terminal --------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns, colours", [(100, True), (60, False)])
def test_live(tmp_path: Path, columns: int, colours: bool) -> None:
    more = {} if colours else {"NO_COLOR": "1"}
    with on_terminal(tmp_path, "--seconds", "1", "--seed", "5", columns=columns, **more) as terminal:
        terminal.wait_for(r"reader 1 .*reader 2 ")
        terminal.wait_for(r"btc +\d+\.\d\d [▲▼·].*btc +\d+\.\d\d [▲▼·]")        # side by side
        terminal.wait_for(r"doge +\d\.\d{5} [▲▼·].*doge +\d\.\d{5} [▲▼·]")
        terminal.wait_for(r"[1-9][\d,]* reads/s.* [1-9][\d,]* reads/s")
        writer = terminal.wait_for(r"writer · pid (\d+)")[1]
        terminal.wait_for(r"[1-9][\d,]* puts/s .* [1-9][\d,]* acknowledged")
        terminal.wait_for(rf"SIGKILL for {writer} after \d+\.\d\d s")
        terminal.wait_for("the readers read on")
        terminal.wait_for(r"opened again in \d+\.\d\d ms")
        acknowledged = terminal.wait_for(r"([\d,]+) of \1 acknowledged puts found")[1]
        assert terminal.wait() == 0
        assert terminal.errors() == ""
    report = "\n".join(terminal.lines()).rpartition("─ report ─")[2]
    for pattern in (rf"found again +{acknowledged} +all", r"reopened in +\d", "puts a second", r"LogKV +[\d,]+",
                    r"pure Python +[\d,]+", r"\d x", "--seed 5"):
        assert re.search(pattern, report), pattern
    assert max(map(len, terminal.lines())) <= columns
    assert bool(re.search(r"\x1b\[[0-9;]*38;5;", terminal.drawn)) == colours
    assert terminal.drawn.rindex("\x1b[?25h") > terminal.drawn.rindex("\x1b[?25l")     # there is a cursor again
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("why", ["no rich", "dumb", "too narrow", "not UTF-8"])
def test_plain_on_a_terminal(tmp_path: Path, why: str) -> None:
    scratch, blocked = tmp_path / "scratch", tmp_path / "blocked"
    scratch.mkdir()
    (blocked / "rich").mkdir(parents=True)
    (blocked / "rich" / "__init__.py").write_text("raise ImportError('no rich')\n")
    more = {"no rich": {"first": str(blocked)}, "dumb": {"TERM": "dumb"}, "too narrow": {},
            "not UTF-8": {"PYTHONIOENCODING": "latin-1"}}[why]
    columns = show.NARROWEST - (why == "too narrow")
    with on_terminal(scratch, "--seconds", "0.2", columns=columns, **more) as terminal:
        assert terminal.wait() == 0
        assert terminal.errors() == ""
    assert "\x1b" not in terminal.drawn
    assert max(map(len, terminal.lines())) <= 60
    terminal.wait_for(r"reader 1: \d.*  reader 2: \d.* puts")
    terminal.wait_for(r"found again +[\d,]+ +all")
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("moment, seconds, kind", [
    ("read the latest prices", "60", "dumb"), ("  1 s", "60", "dumb"), ("starting", "60", "xterm"),
    (r"\d,\d{3} acknowledged", "60", "xterm"), ("the readers read on", "1", "xterm"), ("✔ recover", "1", "xterm"),
])
def test_interrupt(tmp_path: Path, moment: str, seconds: str, kind: str) -> None:
    """Ctrl-C goes to the whole group, as from a terminal; nothing is left of it, on disk or running."""
    with on_terminal(tmp_path, "--seconds", seconds, TERM=kind) as terminal:
        terminal.wait_for(moment)
        assert list(tmp_path.iterdir())
        os.killpg(terminal.process.pid, signal.SIGINT)
        assert terminal.wait() == 130
        assert terminal.errors() == "logkv: interrupted\n"
    assert kind == "dumb" or terminal.drawn.rindex("\x1b[?25h") > terminal.drawn.rindex("\x1b[?25l")
    assert_nothing_is_left(tmp_path, terminal.process.pid)


@pytest.mark.parametrize("who", ["writer", "reader"])
def test_a_process_that_dies_by_itself_is_one_line(tmp_path: Path, who: str) -> None:
    with on_terminal(tmp_path, "--seconds", "60") as terminal:
        terminal.wait_for(r"\d,\d{3} acknowledged")
        os.kill(int(terminal.wait_for(rf"{who} \d* ?· pid (\d+)")[1]), signal.SIGKILL)
        assert terminal.wait() == 2
        assert terminal.errors() == f"logkv: the {who} ended by itself\n"
    assert_nothing_is_left(tmp_path, terminal.process.pid)


# -- the command ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [
    ["--seconds", "0"], ["--seconds", "soon"], ["--seed", "x"], ["--seconds", "nan"], ["more"],
], ids=" ".join)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo", *arguments])
    assert ended.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("logkv: ") and error.count("\n") == 1


def test_errors_are_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, "--dir", str(tmp_path / "missing" / "store"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("logkv: ") and done.stderr.count("\n") == 1


def test_help(tmp_path: Path) -> None:
    assert "--seconds" in run(tmp_path, "--help").stdout
