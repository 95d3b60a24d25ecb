"""`logkv stats` and `verify`: what a store holds, and whether it is whole."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import logkv
from logkv import files
from logkv.cli import Commands
from logkv.cli.stores import opened_to_read
from logkv.cli.terminal import bar, counted, emit, percent, progress, size, split_bar, split_bar_head, table

SEGMENTS = 20       # that are drawn, the newest
PARTS = {"alive": "live", "dead": "dead", "framing": "framing", "free": "free"}       # of the log, and their fields


def _writer(path: str) -> str | None:
    """The pid of the process that has the store open for writing."""
    directory = files.Directory(path)
    try:
        fd = directory.open(files.LOCK)
        try:
            return files.read_at(fd, 32, 0).decode().strip() or "unknown" if files.is_locked(fd) else None
        finally:
            os.close(fd)
    except FileNotFoundError:
        return None
    finally:
        directory.close()


def _facts(path: str) -> dict[str, Any]:
    """`stats()`, each segment's state, what of the log holds no records, how often segments went, and who writes."""
    with opened_to_read(path) as reader:
        engine = reader._open_engine()
        active, end, _ = engine.log.restore_state()
        facts = reader.stats()
        merged = {segment.number for segment in engine.manifest.segments if segment.merged}
        merges = engine.log.signs[3]
    free = 0
    for segment in facts["segments"]:
        number = segment["number"]
        segment["state"] = ("merged" if number in merged else "sealed" if segment["sealed"]
                            else "full" if number < active else "active" if number == active else "next")
        if segment["state"] in ("active", "next"):
            free += segment["bytes"] - (end if number == active else 0)
    framing = facts["log_bytes"] - facts["live_bytes"] - facts["dead_bytes"] - free
    writer = _writer(path)
    return facts | {"free_bytes": max(free, 0), "framing_bytes": max(framing, 0),     # a writer may have gone on
                    "merges": merges, "writer": int(writer) if writer and writer.isdigit() else writer}


def _share(part: int, whole: int) -> str:
    share = part / whole if whole else 0.0
    return f"{bar(share)} {percent(share):>4}"


def _segment_row(name: str, state: str, segments: Sequence[dict[str, Any]]) -> list[object]:
    """What of one or more segments is alive, and what dead."""
    whole, *parts = (sum(segment[field] for segment in segments) for field in ("bytes", "live_bytes", "dead_bytes"))
    share, other = (part / whole if whole else 0.0 for part in parts)
    return [name, state, whole, split_bar(share, other), f"{percent(share):>5}", f"{percent(other):>4}"]


def _show_stats(facts: dict[str, Any]) -> None:
    keys, index = facts["keys"], facts["index_bytes"]
    parts = [(name, facts[f"{field}_bytes"]) for name, field in PARTS.items()]
    log = sum(part for _, part in parts)
    cuts, version, writer = len(facts["cuts"]), facts["last_version"], facts["writer"]
    written = datetime.fromtimestamp(version / 1e9).astimezone().isoformat(" ", "seconds") if version else "never"
    table(["", "", ""], [
        ("keys", f"{keys:,}", ""),
        ("values", facts["codec"] or "bytes", ""),
        ("log", size(log), ""),
        *((f"- {name}", size(part), _share(part, log)) for name, part in parts),
        ("index", size(index), f"{index / keys:,.1f} bytes a key" if keys else ""),
        ("merges", f"{facts['merges']:,}", ""),
        ("torn tails cut", f"{cuts:,}", size(facts["cut_bytes"]) if cuts else ""),
        ("last write", written, ""),
        ("generation", f"{facts['generation']:,}", ""),
        ("writer", "none" if writer is None else f"pid {writer}", ""),
    ], title=facts["path"])
    segments = facts["segments"]
    older = segments[:-SEGMENTS]
    rows = [_segment_row(f"{len(older):,} older", "sealed", older)] if older else []
    rows += [_segment_row(str(segment["number"]), segment["state"], [segment]) for segment in segments[-SEGMENTS:]]
    print()
    table(["segment", "state", "bytes", split_bar_head("alive", "dead", "other"), "alive", "dead"], rows)


def _stats(arguments: argparse.Namespace) -> int:
    facts = _facts(arguments.store)
    if arguments.json:
        emit(facts)
    else:
        _show_stats(facts)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    with progress("verify", unit="bytes") as update:
        report = logkv.verify(arguments.store, progress=update)
    if arguments.json:
        emit({"ok": report.ok} | asdict(report) | {"advice": report.advice})
        return 0 if report.ok else 1
    for problem in report.problems:
        print(problem)
    for note in report.notes:
        print(f"note: {note}")
    checked = ", ".join([counted(report.keys, "key"), counted(report.records, "record"),
                         counted(report.segments, "segment"), size(report.bytes)])
    if report.ok:
        print(f"{report.path} is whole: {checked}")
        return 0
    print(f"{report.path} is damaged: {counted(len(report.problems), 'problem')} in {checked}. {report.advice}")
    return 1


def register(commands: Commands) -> None:
    stats = commands.add("stats", _stats, "show what a store holds and what it takes",
                         "Shows keys, what the log's files hold (records alive and dead, the segments' framing, space "
                         "that was allocated ahead and is free), the index, torn tails that were cut off after a "
                         "crash, who writes, and what of each segment of the log is alive and dead. The store may be "
                         "in use.",
                         "logkv stats prices.db")
    verify = commands.add("verify", _verify, "check every byte of a store",
                          "Reads the whole store and compares every checksum, also where it does not open, or is in "
                          "use. Changes nothing. The status is 1 if something is damaged.", "logkv verify prices.db")
    for parser in (stats, verify):
        parser.add_argument("store", metavar="STORE", help="the store's directory")
        parser.add_argument("--json", action="store_true", help="print a JSON object")
