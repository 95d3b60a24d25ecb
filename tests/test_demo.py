"""`logkv demo`, run as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

import logkv
from logkv import demo

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "logkv", *arguments]


def environment(scratch: Path) -> dict[str, str]:
    return os.environ | {"TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


def run(scratch: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), env=environment(scratch), cwd=scratch, text=True, timeout=60,
                          capture_output=True, check=False)


def test_json(tmp_path: Path) -> None:
    done = run(tmp_path, "demo", "--seconds", "1", "--seed", "7", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["found"] == report["acknowledged"] > 0
    assert 2000 < float(report["btc"]) < 8000
    trades = (report["acknowledged"] + 1) // 2
    assert report["keys"] - len(demo.MARKETS) - trades in (0, 1)       # one put may have been under way
    assert report["log_bytes"] > 0 < report["index_bytes"]
    assert 0 < report["reopened_ms"]
    assert 500 <= report["killed_after_ms"]
    for name in ("logkv", "baseline"):
        assert report[name]["puts_per_second"] > 0 < report[name]["gets_per_second"]
    assert list(tmp_path.iterdir()) == []


def test_text_and_directory(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = run(scratch, "demo", "--seconds", "2.1", "--seed", "1", "--dir", str(tmp_path / "kept"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    for text in ("  1 s  reader ", "puts acknowledged  ", "found again ", "     all\n", "reopened in", 'get("btc")',
                 "log on disk", "index on disk", "LogKV", "pure Python"):
        assert text in done.stdout
    with logkv.Reader(tmp_path / "kept") as reader:
        assert reader["btc"].decode() in done.stdout
    assert list(scratch.iterdir()) == []
    again = run(scratch, "demo", "--dir", str(tmp_path / "kept"))
    assert again.returncode == 2
    assert again.stderr.startswith("logkv: --dir ") and again.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [
    [], ["nonsense"], ["demo", "--seconds", "0"], ["demo", "--seconds", "soon"], ["demo", "--seed", "x"],
    ["demo", "--seconds", "nan"], ["demo", "more"],
], ids=" ".join)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from logkv.cli import main
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("logkv: ") and error.count("\n") == 1


def test_errors_are_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, "demo", "--dir", str(tmp_path / "missing" / "store"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("logkv: ") and done.stderr.count("\n") == 1


def test_version_and_help(tmp_path: Path) -> None:
    assert run(tmp_path, "--version").stdout == f"logkv {logkv.__version__}\n"
    assert "demo" in run(tmp_path, "--help").stdout
    assert "--seconds" in run(tmp_path, "demo", "--help").stdout


def test_interrupt(tmp_path: Path) -> None:
    """Ctrl-C goes to the whole group, as from a terminal; nothing is left of it, on disk or running."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)      # a child would inherit that it is ignored
    try:
        process = subprocess.Popen(command("demo", "--seconds", "60"), env=environment(tmp_path), cwd=tmp_path,
                                   text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout is not None and process.stderr is not None
        while "acknowledged" not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        assert list(tmp_path.iterdir())
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read() == ""
    assert list(tmp_path.iterdir()) == []
    deadline = time.monotonic() + 5
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.02)


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
