"""`logkv repair`: what is intact of a damaged store is kept, what was lost is said."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import logkv
from logkv.cli import Commands
from logkv.cli.records import as_json
from logkv.cli.terminal import counted, emit, progress, table


def _repair(arguments: argparse.Namespace) -> int:
    with progress("repair", unit="bytes") as update:
        report = logkv.repair(arguments.store, progress=update)
    if arguments.json:
        lost = [asdict(loss) | {"keys": [as_json("key", key) for key in loss.keys]} for loss in report.lost]
        emit({"ok": report.ok} | asdict(report) | {"lost": lost})
    else:
        _show(report)
    return 0 if report.ok else 1


def _show(report: logkv.RepairReport) -> None:
    if report.lost:
        table(["lost in", "from", "to", "keys", "why", "saved as"], [
            (loss.file, loss.start, loss.end, "unknown" if loss.others is None else f"{len(loss.keys) + loss.others:,}",
             loss.why, ", ".join(loss.saved)) for loss in report.lost], title=report.path)
        print()
    for loss in report.lost:
        print(loss)
    for note in report.notes:
        print(f"note: {note}")
    if not report.changed:
        print(report)
    elif report.ok:
        print(f"{report.path} is whole again, with {counted(report.keys, 'key')}: nothing was lost")
    else:
        print(f"{report.path} is whole again, with {counted(report.keys, 'key')}; what is above was lost")


def register(commands: Commands) -> None:
    repair = commands.add("repair", _repair, "rescue what is intact of a damaged store",
                          "Keeps every record of a damaged store that is intact, also where the store does not open; sets "
                          "damaged ranges aside in its lost+found; says what was lost. A store that is whole is not changed. "
                          "It can be interrupted and run again. The status is 0 if nothing was lost, 1 if something was.",
                          "logkv repair prices.db")
    repair.add_argument("store", metavar="STORE", help="the store's directory")
    repair.add_argument("--json", action="store_true", help="print a JSON object")
