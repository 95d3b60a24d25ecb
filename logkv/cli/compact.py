"""`logkv compact`: space of what was overwritten or deleted goes back to the system."""

from __future__ import annotations

import argparse

from logkv.cli import Commands
from logkv.cli.stores import add_timeout, disk_use, opened_to_write
from logkv.cli.terminal import emit, progress, size


def _compact(arguments: argparse.Namespace) -> int:
    with opened_to_write(arguments.store, "w", arguments.timeout, check=False, compaction="manual") as db:
        before = disk_use(arguments.store)
        with progress("compact", unit="bytes") as update:
            db.compact(progress=update)
        after = disk_use(arguments.store)
    freed = max(0, before - after)
    if arguments.json:
        emit({"disk_bytes": after, "freed_bytes": freed})
    else:
        print(f"{arguments.store} takes {size(after)}: {size(freed) if freed else 'nothing'} came back")
    return 0


def register(commands: Commands) -> None:
    compact = commands.add("compact", _compact, "give back the space of what is dead",
                           "Copies what is alive to new segments and removes the old ones. A writer does that in the "
                           "background as far as it is worth it; this does all of it, now. Readers go on meanwhile. It "
                           "can be interrupted: what was done stays done.", "logkv compact prices.db")
    compact.add_argument("store", metavar="STORE", help="the store's directory")
    compact.add_argument("--json", action="store_true", help="print a JSON object")
    add_timeout(compact)
